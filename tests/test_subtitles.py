"""From tokens to words to files: what is written is parsed back by readers of the formats' own rules."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax.data.text import make_tokenizer
from speechjax.subtitles import FORMATS, LINE, LINES, LONGEST_CUE, Spelling, Token, Transcript, Word, cues, segments

HOP, EXTRA, RATE = 320, 80, 16_000


def transcript(words, seconds=None, joint=" ", file="talk.wav") -> Transcript:
    found = [Word(*word) for word in words]
    return Transcript(file, seconds or (found[-1].end if found else 0.0) + 1, found, joint, "frames")


def spelling(spec: str, texts: list[str]) -> Any:
    return Spelling(make_tokenizer(spec, texts), HOP, EXTRA, RATE)


def tokens(speller, text, step=5, confidence=0.5):
    return [Token(i, 10 + step * n, confidence) for n, i in enumerate(speller.tokenizer.encode(text))]


# ---- words


@pytest.mark.parametrize(
    ("spec", "said", "words"),
    [
        ("characters", "it is so", ["it", "is", "so"]),
        ("bytes", "grün ist so", ["grün", "ist", "so"]),
        ("characters", " so  it  ", ["so", "it"]),
    ],
)
def test_words_stand_between_spaces(spec, said, words):
    speller = spelling(spec, ["it is so grün"])
    assert [word.text for word in speller.words(tokens(speller, said), 100.0)] == words
    assert speller.joint == " "


def test_pieces_begin_words():
    pytest.importorskip("sentencepiece")
    speller = spelling("sentencepiece:20", ["the other mother gathers another feather"] * 20)
    found = tokens(speller, "mother gathers")
    assert len(found) > 2, "negative control: a piece a word would prove nothing"
    assert [word.text for word in speller.words(found, 100.0)] == ["mother", "gathers"]


def test_a_script_without_spaces_has_a_word_a_character():
    speller = spelling("characters", ["你好世界"])
    found = speller.words(tokens(speller, "世界你好"), 100.0)
    assert [word.text for word in found] == list("世界你好")
    assert transcript(found, joint=speller.joint).text == "世界你好"


def test_times_and_confidence_of_words():
    speller = spelling("characters", ["a b"])
    a, space, b = speller.tokenizer.encode("a b")
    said = [Token(a, 0, 1.0), Token(a, 2, 0.5), Token(space, 4, 0.1), Token(b, 50, None), Token(b, 51, None)]
    first, second = speller.words(said, 100.0)
    # Frame 0 hears samples 0 to 399 and stands for the 320 in their middle, from 40 on.
    assert first == Word("aa", 0.0025, (4 * 320 + 40) / 16_000, 0.75)
    assert second.start == (50 * 320 + 40) / 16_000
    assert second.end == pytest.approx((52 * 320 + 40) / 16_000 + 0.2)
    assert second.confidence is None
    assert speller.words(said, 1.1)[1].end == 1.1, "no word is longer than its recording"
    assert spelling("characters", ["a b"]).words([], 1.0) == []


def test_several_tokens_in_one_frame_are_words_that_take_time():
    speller = spelling("characters", ["a b"])
    said = [Token(i, 7, None) for i in speller.tokenizer.encode("a b")]
    first, last = speller.words(said, 9.0)
    assert [first.start, last.start] == [0.1425, 0.1425]
    assert [first.end, last.end] == pytest.approx([0.1625, 0.3625])


# ---- subtitles


def parse_srt(text: str):
    """[(start ms, end ms, lines)]; AssertionError where a block is not number, times, text, empty line."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    found = []
    for number, block in enumerate(blocks, 1):
        index, times, *lines = block.split("\n")
        assert index == str(number)
        match = re.fullmatch(r"(\d{2,}):([0-5]\d):([0-5]\d),(\d{3}) --> (\d{2,}):([0-5]\d):([0-5]\d),(\d{3})", times)
        assert match, times
        assert lines
        assert all(line.strip() for line in lines)
        parts = [int(part) for part in match.groups()]
        start, end = (((h * 60 + m) * 60 + s) * 1000 + ms for h, m, s, ms in (parts[:4], parts[4:]))
        found.append((start, end, lines))
    return found


def parse_vtt(text: str):
    """As `parse_srt`, by WebVTT's grammar: a header, no bare < or &, and no arrow in a text."""
    head, *blocks = text.removesuffix("\n").split("\n\n")
    assert head == "WEBVTT"
    for block in blocks:
        body = block.split("\n", 1)[1]
        assert "-->" not in body
        assert "<" not in re.sub(r"&(amp|lt|gt);", "", body)
        assert "&" not in re.sub(r"&(amp|lt|gt);", "", body)
    unescape = lambda line: line.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")  # noqa: E731
    as_srt = "".join(
        f"{n}\n{block.split(chr(10), 1)[0].replace('.', ',')}\n{block.split(chr(10), 1)[1]}\n\n"
        for n, block in enumerate(blocks, 1)
    )
    return [(start, end, [unescape(line) for line in lines]) for start, end, lines in parse_srt(as_srt)]


spoken = st.lists(
    st.tuples(
        st.text("abcdefgh<&>-", min_size=1, max_size=60),
        st.floats(0, 3),
        st.floats(0.02, 2),
        st.none() | st.floats(0, 1),
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(spoken, st.sampled_from(["", " "]))
def test_subtitles_are_read_back_whole_and_in_order(said, joint):
    words, now = [], 0.0
    for text, pause, length, confidence in said:
        words.append(Word(text, now + pause, now + pause + length, confidence))
        now += pause + length
    made = transcript(words, joint=joint)
    read = parse_srt(FORMATS["srt"](made))
    assert parse_vtt(FORMATS["vtt"](made)) == read
    squeeze = lambda text: "".join(text.split())  # noqa: E731
    assert squeeze("".join(line for *_, lines in read for line in lines)) == squeeze(made.text)
    for (start, end, lines), following in zip(read, [*read[1:], None], strict=True):
        assert start < end
        assert following is None or end <= following[0] or end == start + 1
        words_in = " ".join(lines).split()
        if len(words_in) > 1 and joint:
            assert len(lines) <= LINES
            assert end - start <= 1000 * LONGEST_CUE + 1
        assert all(len(line) <= LINE or len(line.split()) == 1 for line in lines)


def test_a_long_sentence_parts_at_its_longest_pause_and_not_at_its_edge():
    # 0.1 s between words of 0.5 s; 0.7 s before the eighth, and before the second, too near to the beginning.
    words, now = [], 0.0
    for n in range(16):
        now += {7: 0.7, 1: 0.7}.get(n, 0.1)
        words.append(("word", now, now + 0.5, None))
        now += 0.5
    made = transcript(words)
    assert len(segments(made)) == 1
    assert [len(" ".join(cue.lines).split()) for cue in cues(made)] == [7, 9]


def test_pauses_make_segments_and_lines_of_text():
    made = transcript([("one", 0, 1, 0.5), ("two", 1.5, 2, 0.25), ("three", 3, 4, 0.75)])
    assert FORMATS["txt"](made) == "one two\nthree\n"
    assert [cue.lines for cue in cues(made)] == [["one two"], ["three"]]


def test_a_glimpse_of_a_word_stays_where_there_is_room():
    made = transcript([("a", 0, 0.1, None), ("b", 1.0, 1.1, None), ("c", 9, 9.1, None)], seconds=9.5)
    assert [(cue.start, cue.end) for cue in cues(made)] == [(0, 1000), (1000, 2000), (9000, 9500)]


# ---- other formats


def test_ctm_has_six_columns_or_five():
    made = transcript([("one", 0.5, 1, 0.5), ("two", 1.25, 2, None)], file="/data/a talk.flac")
    assert FORMATS["ctm"](made) == "a_talk 1 0.500 0.500 one 0.500\na_talk 1 1.250 0.750 two\n"


def test_json_has_words_in_segments():
    made = transcript([("one", 0, 1, 0.5), ("two", 3, 4, None)], seconds=5.0)
    one = dict(word="one", start=0, end=1, confidence=0.5)
    two = dict(word="two", start=3, end=4, confidence=None)
    assert json.loads(FORMATS["json"](made)) == dict(
        file="talk.wav", seconds=5.0, timing="frames", text="one two",
        segments=[dict(start=0, end=1, text="one", words=[one]), dict(start=3, end=4, text="two", words=[two])],
    )  # fmt: skip


def test_nothing_said_is_a_file_without_words():
    made = transcript([], seconds=3.0)
    assert [FORMATS[kind](made) for kind in ("txt", "srt", "vtt", "ctm")] == ["", "", "WEBVTT\n", ""]
    assert json.loads(FORMATS["json"](made))["segments"] == []
