"""The learning-rate finder on losses with a known answer, and on a real miniature."""

import json
import math

import numpy as np
import pytest

from speechjax import distributed, find_rate
from speechjax.errors import UserError

RATES = np.geomspace(1e-6, 1.0, 200).tolist()


def falling_at(rate: float, width: float = 0.3) -> list[float]:
    """A loss that falls from 5 to 3 in a sigmoid around `rate`, and explodes at a hundred times that."""
    at = [math.log10(r / rate) for r in RATES]
    return [5 - 2 / (1 + math.exp(-x / width)) + (50 * max(x - 2, 0)) ** 2 for x in at]


@pytest.mark.parametrize("rate", [1e-4, 1e-3])
def test_suggests_where_the_loss_falls_fastest(rate):
    found = find_rate.judge(RATES, falling_at(rate))
    # Smoothing over ten updates of 7 % growth each looks back by about a factor of two.
    assert rate / 1.5 < found.suggestion < 3 * rate


def test_noise_does_not_decide():
    rng = np.random.default_rng(0)
    noisy = [x + rng.normal(0, 0.05) for x in falling_at(1e-3)]
    assert 3e-4 < find_rate.judge(RATES, noisy).suggestion < 6e-3


def test_a_loss_that_never_falls_is_an_error():
    with pytest.raises(UserError, match="did not fall at any rate"):
        find_rate.judge(RATES, list(np.linspace(5, 9, 200)))


def test_divergence_ends_the_search():
    losses = falling_at(1e-3)
    ends = [k for k in range(1, 200) if find_rate._diverged(losses[:k])]
    assert ends
    assert 1e-1 / 2 < RATES[ends[0]] < 1  # after the minimum, before the end
    assert find_rate._diverged([5.0, math.nan])


@pytest.mark.slow
def test_the_verb_trains_and_draws(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEECHJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(distributed, "init", lambda: None)  # too late once another test has used JAX
    argv = ["--config=configs/pretrain/mae.py:size=tiny,smoke", f"--out={tmp_path}/rate", "--steps=30", "--high=10"]
    assert find_rate.run(argv) == 0
    found = json.loads((tmp_path / "rate/rate.json").read_text())
    assert found["rates"][0] == pytest.approx(1e-6)
    assert len(found["rates"]) == len(found["losses"]) <= 30
    assert (tmp_path / "rate/rate.png").stat().st_size > 5000
