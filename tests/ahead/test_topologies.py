"""Names of hardware that is not here, its devices, and what compilers say that refuse a program."""

import math

import pytest

from speechjax.ahead import hardware, program
from speechjax.errors import UserError

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "slices", "platform", "shape", "name"),
    [
        ("v5e:4x4", 1, "tpu", (4, 4), "v5e:4x4"),
        ("v5p:2x2x4", 2, "tpu", (2, 2, 4), "2 slices of v5p:2x2x4"),
        ("h100:2x8", 1, "cuda", (2, 8), "h100:2x8"),
        ("cpu:4", 1, "cpu", (4,), "cpu:4"),
    ],
)
def test_topologies(text, slices, platform, shape, name):
    found = hardware.parse(text, slices)
    assert (found.chip.platform, found.shape, found.slices, str(found)) == (platform, shape, slices, name)


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v9:4x4", 1, "chips are v4, v5e"),
        ("v5e", 1, "write CHIP:SHAPE"),
        ("v5e:4xx4", 1, "write CHIP:SHAPE"),
        ("v5e:0x4", 1, "write CHIP:SHAPE"),
        ("v5e:4x4 ", 1, "write CHIP:SHAPE"),
        ("h100:1x2x8", 1, "as hosts x GPUs h100:2x8"),
        ("cpu:2x2", 1, "--topology=cpu:2x2"),
        ("h100:8", 2, "--slices=2: a whole number from 1 on, of TPUs"),
        ("v5e:4x4", 0, "--slices=0"),
    ],
)
def test_what_is_no_topology(text, slices, message):
    with pytest.raises(UserError, match=r"--(topology|slices)=") as caught:
        hardware.parse(text, slices)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "fix"), [("v5e:2x2", r"'speechjax\[tpu\]'"), ("h100:8", "--no-deps jax-c")])
def test_a_compiler_that_is_not_installed_is_named(text, fix, monkeypatch):
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"--topology={text}: its compiler is not here: pip install .*{fix}"):
        hardware.parse(text).devices()


def test_memory_that_may_be_used(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert hardware.parse("v5e:4x4").usable_memory() == 15.75 * GIB
    assert hardware.parse("h100:8").usable_memory() == pytest.approx(0.75 * 84.94e9)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert hardware.parse("h100:8").usable_memory() == pytest.approx(0.9 * 84.94e9)
    assert hardware.parse("v5e:4x4").usable_memory() == 15.75 * GIB
    assert len(hardware.parse("cpu:2").devices()) == 2
    with pytest.raises(UserError, match="--topology=cpu:64: 4 CPU devices are there already"):
        hardware.parse("cpu:64").devices()


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm.", 24.5 * GIB),
        ("RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (17.50G) exceeds available", 18.5 * GIB),
        ("RESOURCE_EXHAUSTED: something else", math.inf),
    ],
)
def test_what_a_refusal_says(words, needed):
    assert program.needed_of(words, arguments=GIB) == needed
