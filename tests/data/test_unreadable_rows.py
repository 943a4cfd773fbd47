"""What a run makes of recordings that cannot be read any more: empty rows, counted, up to a share."""

import numpy as np
import pytest
from memory import memory_records as make_records
from memory import random_lengths

from speechjax.data.shards import DamagedError
from speechjax.errors import UserError


@pytest.mark.parametrize("fill", [False, True])
def test_an_unreadable_example_is_an_empty_row_and_is_counted(open_memory, caplog, fill):
    records = make_records(random_lengths(200))
    options = dict(fill=True, crop_seconds=3.0, batch_seconds=12.0) if fill else {}
    whole, data = open_memory(records, **options), open_memory(records, **options)
    wanted = list(whole.train_batches(0, 6))
    lost = int(wanted[2]["mean"].flat[0])
    records.parts[0].shards.broken.add(int(records.row[lost]))  # type: ignore[attr-defined]
    found = list(data.train_batches(0, 6))
    for a, b in zip(found, wanted, strict=True):
        gone = (b["mean"] == lost) & (b["lengths"] > 0)
        np.testing.assert_array_equal(a["lengths"], np.where(gone, 0, b["lengths"]))
        assert a["audio"].shape == b["audio"].shape
        if not fill:
            np.testing.assert_array_equal(a["audio"][~gone], b["audio"][~gone])
            assert not a["audio"][gone].any()
        np.testing.assert_array_equal(a["unread"], gone.reshape(len(gone), -1).sum(axis=1))
        assert not b["unread"].any()
    assert sum(int(a["unread"].sum()) for a in found) > 0
    assert "cannot read r" in caplog.text


def test_too_many_unreadable_examples_end_the_run_with_one_line(open_memory):
    records = make_records(random_lengths(400))
    records.parts[0].shards.broken.update(range(0, 400, 3))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"% of the last .* could not be read, the last one 'r\d+' \(broken"):
        list(open_memory(records, max_bad_share=0.2).train_batches(0, 300))
    data = open_memory(records, max_bad_share=0.5)
    batches = list(data.train_batches(0, 200))  # a third is within what was allowed
    assert sum(batch["unread"].sum() for batch in batches) > 200


def test_a_disk_that_fails_after_a_long_time_ends_the_run_as_soon(open_memory):
    records = make_records(random_lengths(400))
    data = open_memory(records, max_bad_share=0.2)
    for _ in data.train_batches(0, 4000):
        pass
    records.parts[0].shards.broken.update(range(400))  # type: ignore[attr-defined]
    unread = [0]
    with pytest.raises(UserError, match="could not be read"):
        unread.extend(int(batch["unread"].sum()) for batch in data.train_batches(4000, 8000))
    assert sum(unread) < 1500  # a fifth of the last 4,096, not of all


def test_a_disk_that_is_gone_with_names_and_all_is_still_an_empty_row(open_memory, caplog, monkeypatch):
    records = make_records(random_lengths(200))
    data = open_memory(records)
    records.parts[0].shards.broken.update(range(200))  # type: ignore[attr-defined]

    def gone(row):
        raise DamagedError("the lines are gone, too")

    monkeypatch.setattr(records.parts[0].shards, "entry", gone)
    assert not next(data.train_batches(0, 1))["lengths"].any()
    assert "cannot read example" in caplog.text
