"""Every tokenizer gives back what it was given, the same vocabulary each time, and its fault where a file has one."""

import json
import os
import pickle
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from speechjax.data import pieces
from speechjax.data import text as text_module
from speechjax.data.normalize import normalize
from speechjax.data.text import BOS, EOS, PAD, SPECIALS, UNK, load_tokenizer, make_tokenizer
from speechjax.errors import UserError

REPO = Path(__file__).resolve().parents[2]
TEXTS = [
    "Der schnelle Fuchs springt über 20 faule Hunde!",
    "Schöne Grüße aus Köln, sagte sie; wie geht's?",
    "Fischers Fritze fischt frische Fische.",
    "Frische Fische fischt Fischers Fritze, und die Füchse springen.",
    "你好，世界！再见。",
    "مَرْحَبًا بالعالم",
    "Привет, мир 👩‍💻❤️ 1234567890",
    "cafe\u0301 q\u0323\u0307 <pad> <unk>",  # marks that compose and marks that cannot, and names of specials
]
GERMAN = TEXTS[:4]
STEPS = "nfc single_spaces"
SPECS = ("characters", "bytes", "sentencepiece:100", "phonemes:de")
QUICK = settings(max_examples=20, deadline=None)


def make(spec: str, texts: list[str] = TEXTS, **kwargs):
    if spec.startswith("sentencepiece"):
        pytest.importorskip("sentencepiece")
    if spec.startswith("phonemes"):
        pytest.importorskip("espeakng_loader")
    return make_tokenizer(spec, texts, **kwargs)


@pytest.fixture(params=SPECS)
def tokenizer(request):
    return make(request.param)


# ---- round trips


@pytest.mark.parametrize("spec", SPECS[:3])
@pytest.mark.parametrize("text", TEXTS)
def test_what_was_learnt_comes_back(spec, text):
    tokenizer = make(spec)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == normalize(text, STEPS)
    assert min(ids) >= len(SPECIALS)  # nothing unknown, and no special, though one text spells their names
    assert max(ids) < tokenizer.size


@QUICK
@given(st.text())
@example("\0 a\tb\n")
@example("\ud800 \U0001f469\u200d\U0001f4bb")
def test_bytes_write_every_text(text):
    tokenizer = make_tokenizer("bytes", [], steps="")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == normalize(text, "")
    assert [i - len(SPECIALS) for i in ids] == list(normalize(text, "").encode())


@QUICK
@given(st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_characters_write_the_texts_they_were_learnt_from(texts):
    tokenizer = make_tokenizer("characters", texts, steps="nfc")
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == normalize(text, "nfc")
    assert tokenizer.tokens[len(SPECIALS) :] == tuple(sorted(set("".join(normalize(t, "nfc") for t in texts))))
    assert not tokenizer.unknown(texts)


@QUICK
@given(st.lists(st.sampled_from(sorted({c for t in TEXTS for c in normalize(t, STEPS)})), max_size=30).map("".join))
def test_pieces_write_every_text_in_known_characters(text):
    expected = normalize(text, STEPS)  # composes marks anew, so that some characters may be unknown after all
    tokenizer = make("sentencepiece:100")
    if not tokenizer.unknown([text]):
        assert tokenizer.decode(tokenizer.encode(text)) == expected
    else:
        assert any(unicodedata.combining(c) for c in text)


def test_empty_text_is_no_ids(tokenizer):
    for text in ("", " ", "\t\n\u2003"):
        assert tokenizer.encode(text) == []
    assert tokenizer.decode([]) == ""


def test_specials_have_the_same_ids_everywhere(tokenizer):
    assert (PAD, BOS, EOS, UNK) == (0, 1, 2, 3)
    assert tokenizer.tokens[:4] == SPECIALS == ("<pad>", "<s>", "</s>", "<unk>")
    assert tokenizer.size == len(tokenizer.tokens)
    ids = tokenizer.encode(TEXTS[0])
    assert tokenizer.decode([BOS, *ids, EOS, PAD, PAD]) == tokenizer.decode(ids)
    assert tokenizer.decode(np.asarray(ids, np.int32)) == tokenizer.decode(ids)


def test_ids_that_do_not_exist_are_refused(tokenizer):
    assert tokenizer.decode([tokenizer.size - 1])
    for i in (-1, tokenizer.size):
        with pytest.raises(ValueError, match=f"id {i} is not among the vocabulary's 0 to {tokenizer.size - 1}"):
            tokenizer.decode([i])


def test_bytes_cut_inside_a_character_still_decode():
    tokenizer = make_tokenizer("bytes", [])
    assert tokenizer.decode(tokenizer.encode("né")[:-1]) == "n\ufffd"


# ---- what is unknown


@pytest.mark.parametrize("spec", ["characters", "sentencepiece:60"])
def test_unknown_characters_are_marked_and_counted(spec):
    tokenizer = make(spec, GERMAN)
    ids = tokenizer.encode("Köln 東 Köln")
    assert ids.count(UNK) == 1
    assert tokenizer.decode(ids) == "Köln ⁇ Köln"
    assert tokenizer.unknown(["東 Köln", "ñ 東", "Köln"]) == Counter({"東": 2, "ñ": 1})


def test_unknown_phones_are_marked_and_counted():
    tokenizer = make("phonemes:en-us", ["a cat sat"])
    assert tokenizer.decode(tokenizer.encode("a cap")) == "ɐ k æ ⁇"
    assert tokenizer.unknown(["a cap", "pat"]) == Counter({"p": 2})


def test_bytes_know_everything():
    assert not make_tokenizer("bytes", []).unknown([chr(i) for i in range(0, 0x110000, 997)])


# ---- normalisation is part of the vocabulary


def test_steps_apply_to_texts_and_are_stored(tmp_path):
    tokenizer = make_tokenizer("characters", ["Straße, ﬁne!"], steps="nfkc  lowercase no_punctuation")
    assert tokenizer.tokens[4:] == tuple(" aefinrstß")
    assert tokenizer.decode(tokenizer.encode("FEINSTE... STRAßEN?")) == "feinste straßen"
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "vocab.json").read_text())["steps"] == "nfkc lowercase no_punctuation"
    assert load_tokenizer(tmp_path).encode("FEINSTE") == tokenizer.encode("feinste")


# ---- the same vocabulary each time


def vocabulary(spec: str, texts: list[str]) -> list[str]:
    return [content.hex() for content in make(spec, texts)._files().values()]


@pytest.mark.parametrize("spec", SPECS)
def test_order_of_the_texts_does_not_matter(spec):
    texts = [*GERMAN, GERMAN[0]]
    spec = spec.replace("100", "58")  # they allow 61
    assert vocabulary(spec, texts) == vocabulary(spec, texts[::-1])
    if spec.startswith(("sentencepiece", "char")):
        assert vocabulary(spec, texts) != vocabulary(spec, [*GERMAN, GERMAN[1] + " Ausgezeichnet, ÄÖÜ!"])


def test_same_bytes_in_another_process():
    pytest.importorskip("sentencepiece")
    pytest.importorskip("espeakng_loader")
    code = "import json; from tests.data.test_text import *; print(json.dumps([vocabulary(s, TEXTS) for s in SPECS]))"
    environment = {**os.environ, "PYTHONHASHSEED": "123", "LC_ALL": "C", "PYTHONUTF8": "0"}
    other = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=environment, capture_output=True, text=True)
    assert other.returncode == 0, other.stderr[-2000:]
    assert json.loads(other.stdout) == [vocabulary(spec, TEXTS) for spec in SPECS]


# ---- at rest


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    folder = tmp_path / "work" / "dir"
    tokenizer.save(folder)
    loaded = load_tokenizer(folder)
    assert type(loaded) is type(tokenizer)
    assert loaded._files() == tokenizer._files()
    assert sorted(tokenizer._files()) == sorted(path.name for path in folder.iterdir())
    for text in (*TEXTS, "東 unseen"):
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_vocab_json_is_readable(tmp_path):
    make_tokenizer("characters", ["gäb"]).save(tmp_path)
    assert (tmp_path / "vocab.json").read_text("utf-8").splitlines() == [
        "{",
        ' "format": 1,',
        ' "kind": "characters",',
        ' "steps": "nfc single_spaces",',
        ' "specials": {',
        '  "<pad>": 0,',
        '  "<s>": 1,',
        '  "</s>": 2,',
        '  "<unk>": 3',
        " },",
        ' "tokens": [',
        '  "<pad>",',
        '  "<s>",',
        '  "</s>",',
        '  "<unk>",',
        '  "b",',
        '  "g",',
        '  "ä"',
        " ]",
        "}",
    ]


def test_another_vocabulary_is_not_written_over(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tokenizer.save(tmp_path)  # a resumed run does that
    with pytest.raises(UserError, match=r"vocab\.json is another vocabulary.*choose a new workdir"):
        make_tokenizer("characters", ["abc"]).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nothing_there(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(UserError, match=r"no vocabulary at .*is it the workdir"):
            load_tokenizer(folder)


def damage(tokens=None, **changes):
    """A change to the parsed vocab.json: `tokens` maps the list, other keywords replace fields."""

    def change(content: dict) -> dict:
        changed = {**content, **changes}
        return {**changed, "tokens": tokens(changed["tokens"])} if tokens else changed

    return change


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        ("characters", damage(format=2), "has format 2, and this code reads 1"),
        ("characters", damage(format="1"), "not the JSON that was saved"),
        ("characters", damage(kind="os.system"), "there is no kind 'os.system'"),
        ("characters", damage(kind=["bytes"]), "there is no kind"),
        ("characters", damage(steps="nfc shout"), "no step 'shout'"),
        ("characters", damage(steps=None), "no normalisation steps"),
        ("characters", damage(lambda tokens: "".join(tokens)), "not a list of strings"),
        ("characters", damage(lambda tokens: [*tokens, 7]), "not a list of strings"),
        ("characters", damage(lambda tokens: tokens[1:]), "do not begin with <pad> <s> </s> <unk>"),
        ("characters", damage(lambda tokens: [*tokens, tokens[-1]]), "a token is listed twice"),
        ("characters", damage(lambda tokens: [*tokens, "ab"]), "a token is not one character"),
        ("bytes", damage(lambda tokens: tokens[:-1]), "tokens are not <0x00> to <0xFF>"),
        ("phonemes:de", damage(voice=None), "it names no voice"),
        ("sentencepiece:60", damage(model_sha256="0"), "sentencepiece.model beside it is damaged"),
        ("sentencepiece:60", damage(lambda tokens: tokens[::-1][4:]), "do not begin with"),
        ("sentencepiece:60", damage(lambda tokens: [*tokens[:4], *tokens[:3:-1]]), "not those of sentencepiece.model"),
    ],
)
def test_changed_fields_are_found(tmp_path, spec, change, message):
    make(spec, GERMAN).save(tmp_path)
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(change(json.loads(path.read_text("utf-8")))))
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b'{"format": 1', b"[" * 100_000])
def test_other_content_is_damage(tmp_path, content):
    (tmp_path / "vocab.json").write_bytes(content)
    with pytest.raises(UserError, match=r"vocab\.json is damaged: it is not the JSON that was saved"):
        load_tokenizer(tmp_path)


def test_a_file_cut_anywhere_is_damage(tmp_path):
    make_tokenizer("characters", ["ab"]).save(tmp_path)
    path = tmp_path / "vocab.json"
    whole = path.read_bytes().rstrip()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is damaged"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("spoil", [lambda model: model[:-1], lambda model: b"", lambda model: None])
def test_a_damaged_model_is_found(tmp_path, spoil, capfd):
    make("sentencepiece:60", GERMAN).save(tmp_path)
    path = tmp_path / "sentencepiece.model"
    spoilt = spoil(path.read_bytes())
    path.unlink()
    if spoilt is not None:
        path.write_bytes(spoilt)
    with pytest.raises(UserError, match=r"vocab\.json is damaged: sentencepiece\.model beside it"):
        load_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""
    make("sentencepiece:60", GERMAN).save(tmp_path)  # the same vocabulary: that mends it
    load_tokenizer(tmp_path)


# ---- what a config may say


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("words", "tokenizer 'words': choose characters, bytes, sentencepiece:SIZE"),
        ("", "tokenizer '': choose"),
        ("characters:30", "say characters alone"),
        ("bytes:2", "say bytes alone"),
        ("sentencepiece", "say sentencepiece:500 to train one"),
        ("sentencepiece:missing.model", r"no model 'missing.model' \(No such file"),
        ("sentencepiece:0", "cannot train on 8 texts"),
        ("sentencepiece:99999999999", "cannot train on 8 texts"),
        ("phonemes", "no voice ''"),
    ],
)
def test_a_spec_that_means_nothing(spec, message):
    with pytest.raises(UserError, match=message) as error:
        make(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["characters", "sentencepiece:20", "phonemes:de"])
@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_no_text_to_learn_from(spec, texts):
    with pytest.raises(UserError, match=r"all texts are empty, or there are none"):
        make(spec, texts)


def test_texts_may_be_a_generator(tokenizer):
    spec = {"sentencepiece": "sentencepiece:100", "phonemes": "phonemes:de"}.get(tokenizer.kind, tokenizer.kind)
    assert make(spec, iter(TEXTS)).tokens == tokenizer.tokens  # pyright: ignore[reportArgumentType]


def test_modules_import_nothing_optional_at_their_top():
    assert not {"sentencepiece", "espeakng_loader"} & (vars(pieces).keys() | vars(text_module).keys())


def test_the_library_is_imported_only_when_needed():
    code = "import sys; from speechjax.data.text import make_tokenizer as m; m('characters', ['a']); m('bytes', [])\n"
    code += "print(*{'sentencepiece', 'tensorflow', 'espeakng_loader'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
