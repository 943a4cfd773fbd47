"""The first ten updates of every objective's miniature: what `first_steps.json` holds, and how it is made.

    python -m tests.golden.first_steps            # writes tests/golden/first_steps.json anew
    python -m tests.golden.first_steps hubert     # only this one

Ten updates with the experiment's own optimizer on seeded noise (tests/tasks/experiments.py): loss by loss and the norm
of the gradient.  A change in these numbers is a change of the objective, the initialisation, the random streams or the
optimizer: make them anew only when that is meant, and say so in the commit.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401  (the devices and flags of the tests, before JAX starts)

import jax  # isort: skip
import numpy as np

from speechjax.optim import make_optimizer
from speechjax.step import init_state, train_step
from tests.tasks.experiments import EXPERIMENTS, experiment, make_batch

FILE = Path(__file__).with_name("first_steps.json")
STEPS = 10


def first_steps(name: str) -> dict[str, list[float]]:
    """{loss or "grad_norm": value of each of the first ten updates}."""
    config, task = experiment(name)
    tx, _ = make_optimizer(steps=100, **config.optim)
    state = jax.jit(functools.partial(init_state, task, tx, 0))(make_batch(task))
    params, extra = task.start(state.params, state.extra)
    state = state.replace(params=params, extra=extra)
    step = jax.jit(functools.partial(train_step, task, tx, 0, 1))
    found: dict[str, list[float]] = {}
    for number in range(STEPS):
        batch: Any = make_batch(task, seed=number)
        state, meters = step(state, batch)
        losses = jax.eval_shape(
            lambda s, b: task.apply(
                {"params": s.params, **s.extra}, b, step=s.step, train=True,
                rngs={k: jax.random.key(0) for k in task.rngs},
            )[0], state, batch,
        )  # fmt: skip
        for meter in ("loss", "grad_norm", *losses):
            total, weight = np.asarray(meters[meter])
            found.setdefault(meter, []).append(float(total / weight) if weight else 0.0)
    return found


def main(names: list[str]) -> None:
    golden = json.loads(FILE.read_text()) if FILE.exists() else {}
    golden = {name: steps for name, steps in golden.items() if name in EXPERIMENTS}
    for name in names or EXPERIMENTS:
        golden[name] = {k: [float(f"{v:.6g}") for v in values] for k, values in first_steps(name).items()}
        print(name, golden[name]["loss"])
    FILE.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
