"""SentencePiece models are the library's own, hold all of the texts, and say which sizes the texts allow."""

import io
import random
import sys
from pathlib import Path

import pytest

sentencepiece = pytest.importorskip("sentencepiece")

from speechjax.data import embedded  # noqa: E402
from speechjax.data.text import load_tokenizer, make_tokenizer  # noqa: E402
from speechjax.errors import UserError  # noqa: E402

GERMAN = [
    "Der schnelle Fuchs springt über 20 faule Hunde!",
    "Schöne Grüße aus Köln, sagte sie; wie geht's?",
    "Fischers Fritze fischt frische Fische.",
    "Frische Fische fischt Fischers Fritze, und die Füchse springen.",
]


def library_model(texts: list[str], size: int, **options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=size, minloglevel=2, **options
    )
    return model.getvalue()


def test_pieces_are_those_of_the_library_called_directly():
    tokenizer = make_tokenizer("sentencepiece:60", GERMAN)
    options = dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3, normalization_rule_name="identity", character_coverage=1.0)
    library = sentencepiece.SentencePieceProcessor(
        model_proto=library_model(sorted(GERMAN), 60, num_threads=1, **options)
    )
    assert tokenizer.size == 60
    assert tokenizer.tokens[4:] == tuple(library.id_to_piece(i) for i in range(4, 60))
    for text in (*GERMAN, "Hunde 東京 grüßen Füchse"):
        assert tokenizer.encode(text) == library.encode(text)
    assert len(tokenizer.encode(GERMAN[2])) < 0.5 * len(GERMAN[2])  # measured 0.34: they are more than characters


def test_order_of_the_texts_does_not_matter_though_it_does_to_the_library():
    texts = Path(embedded.__file__).with_name("embedded_text").joinpath("de.txt").read_text("utf-8").splitlines()[:8]
    orders = [random.Random(seed).sample(texts, len(texts)) for seed in range(6)]
    assert len({library_model(order, 90) for order in orders}) > 1
    assert len({make_tokenizer("sentencepiece:90", order)._files()["sentencepiece.model"] for order in orders}) == 1


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_model_from_elsewhere_keeps_its_pieces_behind_the_specials(tmp_path, model_type):
    path = tmp_path / "other.model"
    path.write_bytes(library_model(GERMAN, 58, model_type=model_type))  # the library's defaults: unk 0, no pad
    tokenizer = make_tokenizer(f"sentencepiece:{path}", [])
    library = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    assert tokenizer.size == 58 + 1
    assert [tokenizer.tokens[i] for i in tokenizer.encode(GERMAN[0])] == library.encode(GERMAN[0], out_type=str)
    assert tokenizer.decode(tokenizer.encode(GERMAN[1])) == library.decode(library.encode(GERMAN[1]))
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode(GERMAN[0]) == tokenizer.encode(GERMAN[0])


def test_long_texts_are_not_left_out():
    texts = ["ab c" * 2000, "ba"]
    assert "c" in make_tokenizer("sentencepiece:8", texts).tokens
    library = sentencepiece.SentencePieceProcessor(model_proto=library_model(texts, 6))
    assert "c" not in [library.id_to_piece(i) for i in range(6)]  # which skips what is above 4192 bytes


def test_the_largest_and_smallest_size_named_in_the_message_work():
    with pytest.raises(UserError, match=r"sentencepiece:500: no more than \d+ tokens come out of 3 texts") as error:
        make_tokenizer("sentencepiece:500", GERMAN[:3])
    assert "\n" not in str(error.value)
    largest = int(str(error.value).split("say sentencepiece:")[1].split(",")[0])
    assert make_tokenizer(f"sentencepiece:{largest}", GERMAN[:3]).size == largest
    with pytest.raises(UserError, match=r"the characters of 3 texts need at least \d+ tokens") as error:
        make_tokenizer("sentencepiece:8", GERMAN[:3])
    smallest = int(str(error.value).split("at least ")[1].split()[0])
    assert smallest < largest
    assert make_tokenizer(f"sentencepiece:{smallest}", GERMAN[:3]).size == smallest


def test_training_is_silent(capfd):
    make_tokenizer("sentencepiece:60", GERMAN)
    with pytest.raises(UserError):
        make_tokenizer("sentencepiece:500", GERMAN)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_without_the_library_the_user_learns_which_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"pip install 'speechjax\[text\]'"):
        make_tokenizer("sentencepiece:60", GERMAN)


@pytest.mark.parametrize("content", [b"", b"\n\x07no model", b"\x00" * 100])
def test_a_file_that_is_no_model(tmp_path, content, capfd):
    path = tmp_path / "some.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        make_tokenizer(f"sentencepiece:{path}", [])
    assert capfd.readouterr().err == ""
