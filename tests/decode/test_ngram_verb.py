"""The verb that trains language models: every kind of text and unit, what is held out, and the mistakes."""

import gzip
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from speechjax import ngram as verb
from speechjax.data.text import make_tokenizer
from speechjax.decode.arpa import read_arpa
from speechjax.decode.ngram import train
from speechjax.decode.ngram_scorer import NgramScorer
from speechjax.errors import UserError

WORDS = ["die", "katze", "Hund", "läuft", "schläft", "immer", "nie", "und", "der"]
RNG = np.random.default_rng(0)
TEXTS = [" ".join(RNG.choice(WORDS, RNG.integers(2, 6))) for _ in range(120)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n\n")
    return path


def model_of(tmp_path, *args: str):
    out = tmp_path / "new" / "lm.arpa.gz"
    assert verb.run([*args, f"--out={out}"]) == 0
    return read_arpa(out)


def same(a, b) -> bool:
    return a.symbols == b.symbols and all(np.array_equal(x, y) for x, y in zip(a.logp, b.logp, strict=True))


def test_characters_of_a_file(tmp_path, text):
    model = model_of(tmp_path, f"--text={text}", "--unit=characters", "--order=4", "--held-out=0")
    assert same(model, train([list(line) for line in TEXTS], 4))
    assert " " in model.symbols


def test_words_of_gzip_and_of_standard_input(tmp_path, text, monkeypatch):
    packed = tmp_path / "texts.txt.gz"
    packed.write_bytes(gzip.compress(text.read_bytes()))
    wanted = train([line.lower().split() for line in TEXTS], 3)
    options = ("--unit=words", "--order=3", "--held-out=0", "--normalize=lowercase")
    assert same(model_of(tmp_path, f"--text={packed}", *options), wanted)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.read_bytes())))
    assert same(model_of(tmp_path, "--text=-", *options), wanted)
    assert not same(model_of(tmp_path, f"--text={text}", "--unit=words", "--order=3", "--held-out=0"), wanted)


def test_tokens_of_a_run(tmp_path, text):
    """The file's symbols are the vocabulary's tokens, the space among them; what it lacks is <unk>."""
    tokenizer = make_tokenizer("characters", ["die katze hund läuft immer und nie der"], "nfc lowercase")
    tokenizer.save(tmp_path / "run")
    model = model_of(tmp_path, f"--text={text}", f"--vocab={tmp_path / 'run'}", "--order=3", "--held-out=0")
    assert set(model.symbols[3:]) == set(tokenizer.tokens[4:]) != set("".join(TEXTS).lower())
    scorer = NgramScorer.build(model, tokenizer.tokens)
    assert [model.symbols[i] for i in np.asarray(scorer.symbols)[4:]] == list(tokenizer.tokens[4:])
    known = [[c if c in tokenizer.tokens else None for c in line.lower()] for line in TEXTS]
    assert same(model, train(known, 3))


def test_phonemes(tmp_path):
    pytest.importorskip("espeakng_loader")
    path = tmp_path / "texts.txt"
    path.write_text("die Katze\nder Hund\n")
    model = model_of(tmp_path, f"--text={path}", "--unit=phonemes:de", "--held-out=0")
    assert {"k", "t͡s", "h"} & set(model.symbols)
    assert " " not in model.symbols
    with pytest.raises(UserError, match="no such voice"):
        model_of(tmp_path, f"--text={path}", "--unit=phonemes:xx-nowhere")


def test_transcripts_of_a_source_without_reading_audio(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 16_000)
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:50])  # no audio could be read
    rows = [dict(id=f"{'test' if k % 4 == 0 else 'train'}/{k}", audio_filepath="a.wav", text=line, raw=line.upper())
            for k, line in enumerate(TEXTS)]  # fmt: skip
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = (f"--source=manifest:{manifest}", "--unit=words", "--order=2", "--held-out=0")
    assert same(model_of(tmp_path, *options), train([line.split() for line in TEXTS], 2))
    some = train([line.split() for k, line in enumerate(TEXTS) if k % 4], 2)
    assert same(model_of(tmp_path, *options, "--exclude=^test/"), some)
    assert same(model_of(tmp_path, *options, "--include=^train/"), some)
    upper = train([line.upper().split() for line in TEXTS], 2)
    assert same(model_of(tmp_path, *options, "--field=raw"), upper)
    with pytest.raises(UserError, match="none of its 120 recordings has a 'other'"):
        model_of(tmp_path, *options, "--field=other")
    with pytest.raises(UserError, match="no id passes the filters"):
        model_of(tmp_path, *options, "--include=nobody")
    with pytest.raises(UserError, match=r"--include='\(' is not a regular expression"):
        model_of(tmp_path, *options, "--include=(")
    with pytest.raises(UserError, match="leave out weight="):
        model_of(tmp_path, f"--source=manifest:{manifest}?weight=2", *options[1:])


def test_a_mark_of_the_byte_order_is_no_text(tmp_path, text):
    text.write_bytes(b"\xef\xbb\xbf" + text.read_bytes())
    model = model_of(tmp_path, f"--text={text}", "--unit=words", "--order=2", "--held-out=0")
    assert same(model, train([line.split() for line in TEXTS], 2))


def test_what_is_held_out_is_measured_and_not_learned(tmp_path, text, caplog):
    with caplog.at_level("INFO", "speechjax"):
        model = model_of(tmp_path, f"--text={text}", "--unit=words", "--order=2", "--held-out=0.3")
    from speechjax.data.shards import id_key

    held = [line for line in TEXTS if id_key(line) < 0.3 * 2**64]
    assert 15 < len(held) < 60
    assert same(model, train([line.split() for line in TEXTS if line not in held], 2))
    perplexity = model.measure([line.split() for line in held]).perplexity
    assert f"held out, {len(held)} texts" in caplog.text
    assert f"perplexity {perplexity:.2f} a symbol" in caplog.text
    assert 5 < perplexity < 15  # nine words and </s>, all alike


@pytest.mark.parametrize(
    ("args", "fault"),
    [
        (["--text={no}", "--unit=words"], "--text=.*nowhere: No such file"),
        (["--text={text}", "--unit=syllables"], "--unit=syllables: choose characters, words or phonemes:VOICE"),
        (["--text={text}", "--vocab={no}"], "no vocabulary at .*nowhere"),
        (["--text={text}", "--unit=words", "--normalize=upper"], "no step 'upper'"),
        (["--text={latin}", "--unit=words"], "latin:2: not UTF-8"),
        (["--text={empty}", "--unit=words"], "a language model needs text"),
        (["--source=nothing", "--unit=words"], "unknown kind"),
    ],
)
def test_mistakes(tmp_path, text, args, fault):
    (tmp_path / "latin").write_bytes("eins\nfür\n".encode("latin-1"))
    (tmp_path / "empty").write_text("\n \n")
    names = dict(text=text, no=tmp_path / "nowhere", latin=tmp_path / "latin", empty=tmp_path / "empty")
    with pytest.raises(UserError, match=fault):
        model_of(tmp_path, *(arg.format(**names) for arg in args))


@pytest.mark.parametrize(
    "args",
    [
        ["--unit=words"],
        ["--text=-"],
        ["--text=-", "--source=x", "--unit=words"],
        ["--text=-", "--unit=words", "--order=0"],
        ["--text=-", "--unit=words", "--held-out=1"],
        ["--text=-", "--vocab=x", "--normalize=nfc"],
        ["--text=-", "--unit=words", "--exclude=x"],
    ],
)
def test_impossible_arguments(args, capsys):
    with pytest.raises(SystemExit):
        verb.parse_args([*args, "--out=lm.arpa"])
    assert "error:" in capsys.readouterr().err


def test_a_folder_is_no_model(tmp_path, capsys):
    with pytest.raises(SystemExit):
        verb.parse_args(["--text=-", "--unit=words", f"--out={tmp_path}"])
    assert "is a folder: name a file in it" in capsys.readouterr().err


def test_as_a_person_runs_it(tmp_path, text):
    def call(*args: str):
        command = [sys.executable, "-m", "speechjax.ngram", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    done = call(f"--text={text}", "--unit=words", "--order=2", f"--out={tmp_path / 'lm.arpa'}")
    assert (done.returncode, "perplexity" in done.stderr) == (0, True)
    assert read_arpa(tmp_path / "lm.arpa").order == 2
    failed = call(f"--text={tmp_path / 'x'}", "--unit=words", f"--out={tmp_path / 'lm.arpa'}")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: --text=")
    assert failed.stderr.count("\n") == 1
