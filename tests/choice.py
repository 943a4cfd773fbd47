"""Which cases of a parametrization every run takes, and which only `make slow`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """All `cases` for a parametrization, those that are not `quick` marked slow."""
    cases = list(cases)
    assert all(case in cases for case in quick), "a quick case that is none"
    slow = lambda case: pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)  # noqa: E731
    return [case if case in quick else slow(case) for case in cases]
