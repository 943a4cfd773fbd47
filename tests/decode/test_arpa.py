"""ARPA files: back and forth, as others write them, and damaged in every way that people meet."""

import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax.decode.arpa import SPACE, escape, read_arpa, unescape, write_arpa
from speechjax.decode.ngram import MARKS, train
from speechjax.errors import UserError

TEXTS = [list("ab ba"), list("a ▁a\t\\"), ["<s>", "<space>", "<unk>", "a b"], list("abab ü\u3000")]

# As SRILM writes: no back-off where there is none, -99 for <s>; with a comment, and blanks of both kinds.
GOOD = r"""
a comment

\data\
ngram 1=5
ngram 2=3
ngram 3=1

\1-grams:
-1.0	<unk>
-99	<s>	-0.25
-0.5	</s>
-0.75 a   -0.125
-0.5	b

\2-grams:
-0.5	<s> a	-0.5
-0.25	a b
-0.375 a </s>

\3-grams:
-0.0625	<s> a b

\end\
"""


def same(a, b) -> bool:
    return a.symbols == b.symbols and all(
        len(x) == len(y) and all(map(np.array_equal, x, y))
        for x, y in ((a.keys, b.keys), (a.logp, b.logp), (a.backoff, b.backoff))
    )


@pytest.mark.parametrize("name", ["lm.arpa", "lm.arpa.gz"])
def test_what_is_written_is_read(tmp_path, name):
    model = train(TEXTS, 3)
    write_arpa(model, tmp_path / name)
    assert same(read_arpa(tmp_path / name), model)
    assert not same(read_arpa(tmp_path / name), train(TEXTS, 2))
    first = (tmp_path / name).read_bytes()
    assert (first[:2] == b"\x1f\x8b") == name.endswith("gz")
    write_arpa(train(TEXTS[::-1], 3), tmp_path / name)
    assert (tmp_path / name).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_others_files_are_read(tmp_path):
    path = tmp_path / "lm.arpa"
    path.write_text("\ufeff" + GOOD[GOOD.index("\\data") :])  # the mark of the byte order that Windows writes
    assert read_arpa(path).order == 3
    path.write_text(GOOD.replace("\n", "\r\n"))
    model = read_arpa(path)
    assert (model.symbols, model.order) == ((*MARKS, "a", "b"), 3)
    scores, _ = model.score([["a", "b", "x"], ["b"]])
    # p(x | a b): back-offs of "a b" and "b" are missing.  p(</s> | <unk>) likewise.
    np.testing.assert_array_equal(scores, [-0.5, -0.0625, -1, -0.5, -0.75, -0.5])


def test_without_unk_as_in_kenlm(tmp_path):
    path = tmp_path / "lm.arpa"
    path.write_text(GOOD.replace("-1.0\t<unk>\n", "").replace("1=5", "1=4"))
    assert read_arpa(path).score([["x"]])[0][0] == -100.25
    path.write_text(GOOD.replace("<unk>", "<UNK>"))
    assert read_arpa(path).score([["x"]])[0][0] == -1.25


def test_an_empty_highest_order_is_left_out(tmp_path):
    path = tmp_path / "lm.arpa"
    path.write_text(GOOD.replace("3=1", "3=0").replace("-0.0625\t<s> a b\n", ""))
    assert read_arpa(path).order == 2


def test_an_empty_order_below_another_is_damage(tmp_path):
    path = tmp_path / "lm.arpa"
    pairs = GOOD[GOOD.index("-0.5\t<s> a") : GOOD.index("\\3-grams")]
    path.write_text(GOOD.replace("2=3", "2=0").replace(pairs, ""))
    with pytest.raises(UserError, match="the first 2 symbols of this 3-gram are no 2-gram"):
        read_arpa(path)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("\\data\\", "", r"no line \\data\\ in it"),
        ("ngram 1=5", "words 5", r":5: 'words 5' where 'ngram 1=...' should be"),
        ("ngram 2=3", "ngram 3=3", r":6: 'ngram 3=3' where that of order 2 should be"),
        ("1=5", "1=6", r":16: \\1-grams: ends after 5 lines, where the header says 6"),
        ("2=3", "2=2", r":21: \\2-grams: ends after 3 lines, where the header says 2"),
        ("\\3-grams:\n", "", r":21: '-0.0625.*<s> a b' has no number where one should be"),
        ("\\3-grams:", "\\4-grams:", r":21: '\\\\4-grams:' where \\3-grams: should be"),
        (GOOD[GOOD.index("\\3-grams") :], "", r":20: the file ends in \\2-grams:, which should have 3 .* truncated"),
        ("\\end\\\n", "", r":23: the file ends in \\3-grams:.* truncated"),
        ("ngram 3=1", "", r":21: '\\\\3-grams:' where \\end\\ should be: the header names 2 orders"),
        ("-0.5\t<s> a", "O.5\t<s> a", r":17: .* has no number where one should be"),
        ("-0.5\t<s> a", "nan\t<s> a", r":17: a log probability above 0, or not a number"),
        ("-0.5\t<s> a", "0.5\t<s> a", r":17: a log probability above 0"),
        ("a   -0.125", "a   inf", r":13: a log probability above 0, or not a number"),
        ("-0.25\ta b", "-0.25\ta c", r":18: 'c' is not among the 1-grams"),
        ("-0.25\ta b", "-0.25\ta", r":18: .* is not a number, 2 symbols"),
        ("-0.25\ta b", "-0.25\t<s> a", r":18: this n-gram is there twice"),
        ("-0.5\tb", "-0.5\ta", r":14: this n-gram is there twice"),
        ("<s> a b", "a a b", r":22: the first 2 symbols of this 3-gram are no 2-gram"),
        ("</s>\n-0.75", "<e>\n-0.75", r"\\1-grams: has no </s>"),
    ],
)
def test_damage_is_named_with_its_line(tmp_path, old, new, fault):
    path = tmp_path / "lm.arpa"
    text = GOOD.replace("a </s>", "a a") if "<e>" in new else GOOD
    damaged = text.replace(old, new, 1)
    assert damaged != text
    path.write_text(damaged)
    with pytest.raises(UserError, match=fault) as caught:
        read_arpa(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_bytes_are_no_arpa_file(tmp_path):
    path = tmp_path / "lm.arpa"
    path.write_bytes(GOOD.replace("b", "ß").encode("latin-1"))
    with pytest.raises(UserError, match=r":14: .* is not UTF-8; convert"):
        read_arpa(path)
    path.write_bytes(np.random.default_rng(0).bytes(1000))
    with pytest.raises(UserError, match="is it an ARPA file"):
        read_arpa(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is it an ARPA file"):
        read_arpa(path)


def test_damaged_gzip(tmp_path):
    path = tmp_path / "lm.arpa.gz"
    whole = gzip.compress(GOOD.encode())
    broken = whole[:40] + bytes([whole[40] ^ 255]) + whole[41:]
    for data in (whole[:-30], GOOD.encode(), broken):
        path.write_bytes(data)
        with pytest.raises(UserError, match="damaged, or not gzip"):
            read_arpa(path)
    with pytest.raises(UserError, match="No such file"):
        read_arpa(tmp_path / "other.arpa")


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1))
def test_every_symbol_survives(symbol):
    name = escape(symbol)
    assert unescape(name) == symbol
    assert name.encode("utf-8").split() == [name.encode("utf-8")] == [name.strip().encode("utf-8")]
    assert name not in (*MARKS, "<UNK>")
    assert (name == SPACE) == (symbol == " ")


def test_ordinary_symbols_stay_as_they_are():
    for symbol in ("▁the", "ü", "t͡ʃ", "l'eau", "می‌خواهم", "<0x20>"):
        assert escape(symbol) == symbol
    assert [escape(s) for s in (" ", "\\", "<s>", "\u00a0", "a b")] == [SPACE, "\\\\", "\\<s>", "\\u00a0", "a\\u0020b"]
