"""Fixtures of the data tests."""

import pytest
from memory import OPTIONS

from speechjax.data import pipeline


@pytest.fixture
def open_memory(monkeypatch):
    """`open_data` over records made by hand."""

    def opened(records, **changes):
        monkeypatch.setattr(pipeline, "open_records", lambda source, **filters: records)
        return pipeline.open_data(**{**OPTIONS, **changes})

    return opened
