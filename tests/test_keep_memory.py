"""On a CPU a step works in the memory of the step before."""

import os
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import jax, jax.numpy as jnp
from speechjax import distributed
from speechjax.verb import keep_memory, step_in_main_thread

if sys.argv[1] == "kept":  # as the main job does
    step_in_main_thread()
    distributed.init()
    keep_memory()
step = jax.jit(lambda x: jnp.sum(jnp.sort(x, axis=0)))
x = jnp.ones((2000, 8000))
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step(x).block_until_ready()
before = faults()
for _ in range(3):
    step(x).block_until_ready()
print(faults() - before)
"""


def page_faults(how: str) -> int:
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, how], capture_output=True, text=True, timeout=300, env=env, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is told to keep it")
def test_steps_do_not_ask_the_system_for_memory_again():
    pages = 2000 * 8000 * 4 / os.sysconf("SC_PAGE_SIZE")  # of what a step sorts: no loop of XLA's can do without it
    assert page_faults("kept") < 0.1 * pages
    assert page_faults("returned") > 2 * pages, "negative control: in each of three steps"
