"""From a task to transcripts: what steers, what is refused, and error rates of a real run."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from speechjax import recognition
from speechjax.data.text import make_tokenizer
from speechjax.decode.arpa import write_arpa
from speechjax.decode.bonus import Bonus, Known
from speechjax.decode.hot_words import HotWords
from speechjax.decode.lexicon import LexiconScorer
from speechjax.decode.ngram import train
from speechjax.decode.ngram_scorer import NgramScorer
from speechjax.errors import UserError
from speechjax.recognition import Decoding, Recognizer

TEXTS = ["an ant", "a tan ant", "nat"]
CHARACTERS = make_tokenizer("characters", TEXTS)


class CTC:
    """Says what the batch says it says."""

    def apply(self, variables: Any, batch: Any, method: str) -> Any:
        assert method == "answer"
        return dict(logits=batch["logits"] + variables["params"], lengths=batch["lengths"])


def said(text: str, sure: float = 8.0) -> dict[str, Any]:
    """Logits that spell `text`, a blank behind every symbol."""
    ids = [symbol for i in CHARACTERS.encode(text) for symbol in (i, 0)]
    logits = sure * np.eye(CHARACTERS.size, dtype=np.float32)[ids]
    return dict(logits=jnp.asarray(logits[None]), lengths=jnp.array([len(ids)], jnp.int32))


def recognise(batch: dict[str, Any], **decoding: Any) -> list[str]:
    found = Recognizer(CTC(), CHARACTERS, Decoding(**decoding))({"params": jnp.zeros(())}, batch)
    found = type(found)(*map(np.asarray, found))
    return [text for text, _ in recognition.texts(CHARACTERS, found)[0]]


@pytest.fixture
def files(tmp_path):
    arpa, lexicon, hot = (tmp_path / name for name in ("lm.arpa.gz", "lexicon.txt", "hot.txt"))
    write_arpa(train([[CHARACTERS.tokens[i] for i in CHARACTERS.encode(text)] for text in TEXTS * 5], 3), arpa)
    lexicon.write_text("an\nant\na\ntan\n")
    hot.write_text("nat\n\n")
    return SimpleNamespace(lm=str(arpa), lexicon=str(lexicon), hot_words=str(hot))


def test_what_is_said_is_recognised():
    assert recognise(said("an ant")) == ["an ant"]
    assert recognise(said("an ant"), search="beam")[0] == "an ant"
    found = recognise(said("an ant", 2.0), search="beam", best=3)
    assert found[0] == "an ant"
    assert len(set(found)) == 3


def test_files_steer_the_beam(files):
    kinds = lambda **options: [type(s) for s, _ in recognition.scorers(CHARACTERS, Decoding(search="beam", **options))]  # noqa: E731
    assert kinds() == []
    assert kinds(lm=files.lm) == [Known, NgramScorer]
    assert kinds(lexicon=files.lexicon) == [Known, LexiconScorer]
    assert kinds(hot_words=files.hot_words, token_bonus=0.5) == [Known, HotWords, Bonus]
    unclear = said("ana", 1.0)
    assert recognise(unclear, search="beam", lexicon=files.lexicon)[0] in ("an", "ant", "a", "tan", "an a")
    assert recognise(said("nat", 1.0), search="beam", hot_words=files.hot_words, hot_word_bonus=9.0)[0].count("nat")
    assert recognise(unclear, search="beam", lm=files.lm, lm_weight=3.0) != recognise(unclear, search="beam")


def test_a_lexicon_rules_whatever_the_weight_of_the_model(files):
    def weights(**options: Any) -> list[Any]:
        found = recognition.scorers(CHARACTERS, Decoding(search="beam", **options))
        return [(type(scorer), weight, getattr(scorer, "model", None) is not None) for scorer, weight in found[1:]]

    for weight in (0.0, 0.5):
        assert weights(lexicon=files.lexicon, lm_weight=weight) == [(LexiconScorer, 1.0, False)]
    assert weights(lexicon=files.lexicon, lm=files.lm, lm_weight=0.0) == [(LexiconScorer, 1.0, False)]
    assert weights(lexicon=files.lexicon, lm=files.lm, lm_weight=0.5) == [(LexiconScorer, 0.5, True)]
    assert weights(lm=files.lm, lm_weight=0.0) == []
    assert recognise(said("tnt"), search="beam", lexicon=files.lexicon, lm_weight=0.0)[0] != "tnt"
    assert recognise(said("tnt"), search="beam")[0] == "tnt", "negative control"


def test_speech_cut_off_within_a_word_is_not_lost(files):
    assert recognise(said("an ta"), search="beam", lexicon=files.lexicon, symbols=1, beams=1) == ["an ta"]


def test_files_with_a_mark_of_the_byte_order_and_hot_words_that_cannot_be_said(tmp_path, files):
    path = tmp_path / "marked.txt"
    path.write_bytes("\ufeffnat\n".encode())
    kinds = [type(s) for s, _ in recognition.scorers(CHARACTERS, Decoding(search="beam", hot_words=str(path)))]
    assert kinds == [Known, HotWords]
    path.write_text("nat\nZoë\n")
    with pytest.raises(UserError, match="hot word 'Zoë' has symbols that the vocabulary lacks"):
        recognition.scorers(CHARACTERS, Decoding(search="beam", hot_words=str(path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(search="best"), "search='best': choose greedy or beam"),
        (dict(lm="x.arpa"), "lm steers a beam: set search=beam"),
        (dict(best=2), "best=2 hypotheses need a beam"),
        (dict(search="beam", lm="/nowhere.arpa"), "nowhere.arpa"),
        (dict(search="beam", hot_words="/nowhere"), "a text file with a phrase a line"),
        (dict(search="beam", lexicon="/nowhere"), "which lexicon"),
        (dict(search="beam", lm_weight=-0.5), "lm_weight=-0.5: at least 0"),
        (dict(search="beam", word_bonus=float("nan")), "word_bonus=nan: not a number"),
        (dict(search="beam", beams=0), "beams=0: at least 1"),
        (dict(search="beam", symbols=-1), "symbols=-1: at least 1"),
        (dict(best=0), "best=0: at least 1"),
        (dict(search="beam", beams=4, best=5), "best=5 hypotheses of beams=4"),
        (dict(ctc_weight=1.5), "ctc_weight=1.5: from 0 to 1"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        recognise(said("a"), **options)


def test_a_lexicon_needs_spaces_and_a_damaged_model_says_where(tmp_path, files):
    no_space = make_tokenizer("characters", ["nat"])
    with pytest.raises(UserError, match="no space between words"):
        recognition.scorers(no_space, Decoding(search="beam", lexicon=files.lexicon))
    (_, (scorer, _)) = recognition.scorers(make_tokenizer("bytes", []), Decoding(search="beam", lexicon=files.lexicon))
    assert isinstance(scorer, LexiconScorer)
    assert scorer.boundary == 4 + 0x20
    broken = tmp_path / "broken.arpa.gz"
    broken.write_bytes(gzip.compress(gzip.decompress(Path(files.lm).read_bytes())[:200]))
    with pytest.raises(UserError, match=r"broken\.arpa\.gz"):
        recognise(said("a"), search="beam", lm=str(broken))


def test_a_task_without_transcripts_is_refused():
    with pytest.raises(UserError, match="the task simplenamespace gives no transcripts; those that do: ctc"):
        Recognizer(SimpleNamespace(), CHARACTERS, Decoding())


@pytest.mark.slow
def test_fine_tuning_from_a_run_with_error_rates_and_its_vocabulary(tmp_path):
    """From scratch, then on from that run: encoder, head, vocabulary; unknown characters are named."""
    from speechjax import config as configs
    from speechjax.experiment import open_experiment
    from speechjax.logs import read_metrics
    from speechjax.train import train as fit

    spec = "configs/finetune/ctc.py:size=tiny,smoke"
    first, second = tmp_path / "first", tmp_path / "second"
    config: Any = configs.load(spec, ["evals.recognition.every=1", "evals.recognition.group=meta:speaker"])
    configs.claim_workdir(first, config)
    _, data = open_experiment(config, first)
    assert config.task.classes == data.transcripts.tokenizer.size > 10
    configs.claim_workdir(first, config)
    assert fit(config, data, first) == 0
    [entry] = [entry for entry in read_metrics(first) if entry["split"] == "recognition"]
    assert entry["char_error"] > 0
    assert entry["word_error"] > 0
    lines = [json.loads(line) for line in (first / "report" / "recognition.jsonl").read_text().splitlines()]
    assert [line["errors"] for line in lines] == sorted((line["errors"] for line in lines), reverse=True)
    assert all(line["reference"] for line in lines)

    other: Any = configs.load("configs/finetune/ctc.py:smoke", [f"init_from={first}", "data.exclude=1$"])
    configs.claim_workdir(second, other)
    _, data = open_experiment(other, second)
    assert (second / "vocab.json").read_bytes() == (first / "vocab.json").read_bytes()
    assert fit(other, data, second) == 0
