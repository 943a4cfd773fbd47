"""Error rates of what a search finds: of utterances that were heard whole, and of nothing else."""

import logging
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.decode.types import Hypotheses
from speechjax.errors import UserError
from speechjax.evals import recognition
from tests.data.memory import memory_records
from tests.evals.judging import table

TEXT = "one two"
SECONDS = (1.0, 1.0, 1.0, 5.0, 2.5, 1.0)


@pytest.fixture
def make(make_job, monkeypatch):
    """(records, crop in seconds) -> a job, and an evaluator whose search hears a word in every full second."""

    class Search:
        def __init__(self, task, tokenizer, decoding, place):
            self.width = len(tokenizer.encode(TEXT))
            self.ids = np.array(tokenizer.encode(TEXT))

        def __call__(self, variables, batch):
            length = jnp.where(batch["lengths"] >= 16_000, self.width, 0)[:, None]
            found = jnp.broadcast_to(jnp.asarray(self.ids), (len(length), 1, self.width))
            return Hypotheses(found, length, jnp.zeros(length.shape), jnp.full_like(found, -1))

    monkeypatch.setattr(recognition, "Recognizer", Search)

    def job(records: Any, crop: float, group: str = "", **data: Any) -> Any:
        made = make_job(records, dict(name="ctc"), table(), text="characters", crop_seconds=crop, **data)
        return recognition.Recognition(made, every=1, group=group)

    return job


def recordings():
    return memory_records([int(16_000 * s) for s in SECONDS], meta=[dict(text=TEXT) for _ in SECONDS])


def test_utterances_longer_than_a_row_are_not_judged_and_counted(make, caplog):
    with caplog.at_level(logging.WARNING, "speechjax"):
        found = make(recordings(), 3.0)({}, {}, 3, "spoken")
    assert found["word_error"] == 0
    assert "1 held-out utterances are longer than a row and not judged: raise config.data.crop_seconds" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "speechjax"):
        assert make(recordings(), 6.0)({}, {}, 3, "spoken")["word_error"] == 0
    assert not caplog.text
    with pytest.raises(UserError, match="no held-out recording with a transcript was heard whole"):
        make(memory_records([48_000] * 2, meta=[dict(text=TEXT)] * 2), 1.0)({}, {}, 3, "spoken")


def test_recordings_that_cannot_be_read_are_not_judged(make, caplog):
    records = recordings()
    records.parts[0].shards.broken.add(2)
    with caplog.at_level(logging.WARNING, "speechjax"):
        assert make(records, 6.0, max_bad_share=0.5)({}, {}, 3, "spoken")["word_error"] == 0
    assert "1 held-out examples could not be read: they are not judged" in caplog.text


def test_a_wrong_group_is_named_before_training(make):
    for group, message in (("speaker", "meta:FIELD or id:REGEX"), ("id:(", "regular expression")):
        with pytest.raises(UserError, match=message):
            make(recordings(), 6.0, group=group)
