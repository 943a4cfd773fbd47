"""BLEU and chrF of what a search finds: against sacrebleu on the same texts."""

import jax.numpy as jnp
import numpy as np
import pytest
import sacrebleu

from speechjax.decode.types import Hypotheses
from speechjax.errors import UserError
from speechjax.evals import translation
from tests.data.memory import memory_records
from tests.evals.judging import table

REFERENCES = ["The cat sat on the mat today.", "", "A dog barked at the old cat.", "It rained all day and all night.",
              "Birds sing in the morning light.", "The end of the story."]  # fmt: skip
SAID = [
    "The cat sat on a mat today.", "noise", "A dog barked at the cat.", "It rained all day.", "", "The end of story.",
]  # fmt: skip


@pytest.fixture
def made(make_job, monkeypatch):
    """An evaluator whose search says `SAID`."""
    records = memory_records([40_000] * 6, meta=[dict(text=text) for text in REFERENCES])
    job = make_job(records, dict(name="seq2seq"), table(), text="characters", crop_seconds=3.0)
    tokenizer = job.data.transcripts.tokenizer
    ids = [tokenizer.encode(text) for text in SAID]
    width = max(map(len, ids))
    tokens = np.array([own + [0] * (width - len(own)) for own in ids], np.int32)[:, None]
    lengths = np.array([[len(own)] for own in ids], np.int32)

    class Search:
        def __init__(self, task, tokenizer, decoding, place):
            self.decoding = decoding

        def __call__(self, variables, batch):
            row = batch["mean"].astype(jnp.int32)
            found = jnp.asarray(tokens)[row]
            return Hypotheses(found, jnp.asarray(lengths)[row], jnp.zeros((len(row), 1)), jnp.full_like(found, -1))

    monkeypatch.setattr(translation, "Recognizer", Search)
    return job


def test_scores_are_sacrebleus(made, tmp_path):
    found = translation.Translation(made, every=1)({}, {}, 3, "spoken")
    kept = [i for i, text in enumerate(REFERENCES) if text]
    said, references = [SAID[i] for i in kept], [[REFERENCES[i] for i in kept]]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(said, references).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(said, references).score)
    assert found["bleu_low"] <= found["bleu"] <= found["bleu_high"]
    lines = (tmp_path / "report/spoken.jsonl").read_text().splitlines()
    assert "version" in lines[0]  # the signature
    assert len(lines) == 1 + len(kept)
    characters = translation.Translation(made, every=1, tokenize="char")({}, {}, 3, "spoken")
    assert characters["bleu"] != found["bleu"]


def test_groups_are_scored_by_themselves(made):
    found = translation.Translation(made, every=1, group="id:r000(?P<label>[0-3])")({}, {}, 3, "spoken")
    alone = [sacrebleu.corpus_bleu([SAID[i]], [[REFERENCES[i]]]).score for i in (0, 2, 3)]
    assert found["bleu_worst"] == pytest.approx(min(alone))
    assert found["bleu_gap"] == pytest.approx(max(alone) - min(alone))
    with pytest.raises(UserError, match="group='speaker': write meta:FIELD"):
        translation.Translation(made, every=1, group="speaker")


def test_mistakes_are_named(made):
    with pytest.raises(UserError, match="BLEU has no tokenizer 'klingon'"):
        translation.Translation(made, every=1, tokenize="klingon")({}, {}, 0, "spoken")
    made.data.transcripts = None
    with pytest.raises(UserError, match="translation needs texts"):
        translation.Translation(made, every=1)
