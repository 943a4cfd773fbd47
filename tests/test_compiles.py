"""Programs that are compiled again are named."""

import jax
import jax.numpy as jnp
import pytest

from speechjax import compiles
from speechjax.compiles import Compiles


@pytest.fixture
def watch(monkeypatch):
    monkeypatch.setattr(compiles, "_WORTH_SAYING", 0.0)
    watch = Compiles()
    yield watch
    watch.close()


def test_a_program_that_is_compiled_again_is_named(watch):
    @jax.jit
    def judge(x):
        return jnp.sin(x) * 2

    judge(jnp.zeros(3))
    judge(jnp.zeros(4))
    assert "jit(judge)" not in watch.again(), "the first round"
    judge(jnp.zeros(3))
    assert not watch.again(), "compiled already"
    judge(jnp.zeros(5))
    found = watch.again()
    assert [name for name in found if "judge" in name]
    assert all(seconds > 0 for seconds in found.values())
    assert not watch.again()


def test_what_takes_no_time_is_not_worth_saying(watch, monkeypatch):
    monkeypatch.setattr(compiles, "_WORTH_SAYING", 3600.0)
    program = jax.jit(lambda x: x + 1)
    program(jnp.zeros(3))
    watch.again()
    program(jnp.zeros(4))
    assert not watch.again()


def test_a_closed_one_hears_nothing():
    watch = Compiles()
    watch.close()
    jax.jit(lambda x: x * 3)(jnp.zeros(7))
    assert not watch._now
