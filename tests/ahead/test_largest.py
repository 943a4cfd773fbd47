"""The search for the largest number that fits."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechjax.ahead.search import TRIALS, largest


@given(st.floats(0, 50), st.floats(0.1, 10), st.integers(1, 300), st.integers(1, 100), st.booleans(), st.booleans())
def test_the_largest_is_found_in_few_trials(fixed, each, answer, start, silent, steps):
    """Needs that are a line, with steps or without; refused ones may not say what they need."""

    def need(n: int) -> float:
        needed = fixed + each * (n if not steps else -(-n // 3) * 3)
        return math.inf if silent and needed > room else needed

    tried: dict[int, float] = {}
    room = fixed + each * (answer + 0.5)
    found = largest(lambda n: tried.setdefault(n, need(n)), room, {0: fixed, start: need(start)})
    limit = answer if not steps else answer // 3 * 3
    assert limit - limit // 16 - 2 * steps <= found <= limit, "it stops where a share of a thirtieth is left"
    assert len(tried) <= TRIALS
    if found and found != start:
        assert tried[found] <= room, "what is named was tried"


def test_nothing_may_fit():
    assert largest(lambda n: math.inf, 1.0, {0: 0.5, 8: math.inf}) == 0
    assert largest(lambda n: 10.0 + n, 10.5, {0: 10.0, 8: 18.0}) == 0
    assert largest(lambda n: pytest.fail("nothing to try"), 5.0, {0: 10.0}) == 0


def test_a_line_needs_fewer_trials_than_halving():
    tried = []
    # More than the state is there from the first row on: 2.5 of gradients.
    assert largest(lambda n: tried.append(n) or 5.5 + 0.5 * n, 40.0, {0: 3.0, 600: 305.5}) in range(65, 70)
    assert len(tried) <= 3
    tried.clear()
    assert largest(lambda n: tried.append(n) or 5.5 + 0.5 * n, 40.0, {0: 3.0}, start=8) in range(65, 70)
    assert len(tried) <= 4
