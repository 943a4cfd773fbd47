"""What is held out and what is trained on."""

import numpy as np
import pytest

from speechjax.data.split import held_out, list_ids, recording_id, some
from speechjax.errors import UserError
from tests.data.memory import memory_records

IDS = [f"{word}_{speaker}_{take}" for word in "abc" for speaker in ("ann", "bob") for take in range(5)]


def records(ids=IDS):
    return memory_records([16_000 + 100 * i for i in range(len(ids))], ids)


def test_a_pattern_holds_out_whom_it_names_whatever_the_seconds():
    found = held_out(records(), 1.0, "_bob_")
    assert [IDS[i] for i in found] == [name for name in IDS if "_bob_" in name]
    assert len(held_out(records(), 1.0, ".")) == len(IDS)


def test_a_pattern_that_names_nobody_is_an_error():
    with pytest.raises(UserError, match=r"config.data.valid='_eve_' matches no id, e.g. 'a_ann_0'"):
        held_out(records(), 1.0, "_eve_")
    with pytest.raises(UserError, match="is not a regular expression"):
        held_out(records(), 1.0, "(")


def test_by_hash_at_most_a_tenth_and_the_same_ones_when_files_come_in():
    before = {IDS[i] for i in held_out(records(), 3.0, "")}
    assert 1 <= len(before) <= 3
    more = [*IDS, *(f"z_eve_{i}" for i in range(4))]
    after = {more[i] for i in held_out(memory_records([16_000] * len(more), more), 1e9, "")}
    assert before & after


def test_less_is_a_part_of_more():
    """Ten minutes of labels are among the sixty."""
    found = records()
    everything = np.arange(len(IDS))
    few, many = (set(some(found, everything, seconds).tolist()) for seconds in (4.0, 12.0))
    assert few < many
    assert found.lengths[sorted(few)].sum() <= 4 * 16_000
    assert found.lengths[sorted(many)].sum() > 10 * 16_000
    assert some(found, everything, 0.0) is everything
    with pytest.raises(UserError, match=r"config.data.train_seconds=0.1 is less than any recording has"):
        some(found, everything, 0.1)


def test_a_file_names_recordings_with_all_their_segments(tmp_path, caplog):
    ids = ["a#0000", "a#0001", "b", "b2", "c\u2028d", "a+c"]
    file = tmp_path / "held_out.txt"
    file.write_bytes(list_ids(["c\u2028d", "a", "gone"]))
    found = held_out(records(ids), 1.0, f"@{file}")
    assert [ids[i] for i in found] == ["a#0000", "a#0001", "c\u2028d"]  # neither "b" nor, as a pattern would, "a+c"
    assert "1 of its 3 ids are of no recording" in caplog.text
    assert recording_id(records(ids), 1) == "a"
    file.write_bytes(b"b\r\n\r\nb2")  # as another system writes it
    assert [ids[i] for i in held_out(records(ids), 1.0, f"@{file}")] == ["b", "b2"]


def test_recordings_of_a_mixture_are_named_with_their_part(tmp_path):
    both = memory_records([16_000] * 4, ["x", "y", "x", "y"], part=[0, 0, 1, 1], weights=(1.0, 1.0))
    (tmp_path / "list").write_bytes(list_ids(["1:x"]))
    assert held_out(both, 1.0, f"@{tmp_path}/list").tolist() == [2]


def test_a_file_that_names_nobody_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: No such file.*; write a file with an id a line"):
        held_out(records(), 1.0, f"@{tmp_path}/nowhere")
    (tmp_path / "list").write_text("eve\n")
    with pytest.raises(UserError, match=r"no recording has one of its 1 ids, e.g. 'a_ann_0'"):
        held_out(records(), 1.0, f"@{tmp_path}/list")
    with pytest.raises(UserError, match="has a line break"):
        list_ids(["a\nb"])
