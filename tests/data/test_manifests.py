"""Lists of recordings in every format that is understood: what they name, and what is answered when they are wrong."""

import csv
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speechjax.data.decode import BadAudio, decode
from speechjax.data.sources import Item, open_source
from speechjax.errors import UserError

RATE = 16_000


def noise(samples: int = 48_000, seed: int = 0) -> np.ndarray:
    """int16, exact in 16 bit files."""
    return np.random.default_rng(seed).integers(-9_000, 9_000, samples).astype(np.int16)


def write(path: Path, audio: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, rate)
    return path


def listed(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"manifest:{path}"


def json_lines(folder: Path, *lines: str | dict) -> str:
    rows = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return listed(folder / "m.jsonl", "\n".join(rows) + "\n")


def items_of(source: str) -> dict[str, Item]:
    return {item.id: item for item in open_source(source).items()}


def verdicts(source: str) -> dict[str, str | int]:
    """Samples of each recording, or why there are none."""
    found = {}
    for item in open_source(source).items():
        try:
            found[item.id] = len(pickle.loads(pickle.dumps(item.read))())
        except BadAudio as verdict:
            found[item.id] = str(verdict)
    return found


@pytest.fixture
def clips(tmp_path) -> Path:
    """A folder with a.wav (1 s), sub/b.flac (2 s) and wavs/LJ-1.wav, wavs/LJ-2.wav (0.5 s each)."""
    write(tmp_path / "a.wav", noise(RATE, 1))
    write(tmp_path / "sub" / "b.flac", noise(2 * RATE, 2))
    write(tmp_path / "wavs" / "LJ-1.wav", noise(8_000, 3))
    write(tmp_path / "wavs" / "LJ-2.wav", noise(8_000, 4))
    return tmp_path


# ---- NeMo


def test_nemo(tmp_path):
    write(tmp_path / "clips" / "a.wav", noise())
    outside = write(tmp_path / "outside.wav", noise(seed=3))
    source = json_lines(
        tmp_path,
        {"audio_filepath": "clips/a.wav", "duration": 3.0, "text": "grüß dich", "speaker_id": 7, "lang": "de"},
        "",
        {"audio_filepath": "clips/a.wav", "offset": 1.0, "duration": 0.5, "transcript": "middle"},
        {"path": str(outside), "id": 12, "label": "x", "phones": ["a"]},
    )
    items = items_of(source)
    assert list(items) == ["12", "clips/a.wav", "clips/a.wav@1.0"]
    assert items["clips/a.wav"].meta == {"text": "grüß dich", "speaker": 7, "lang": "de"}
    assert items["12"].meta == {"label": "x", "phones": ["a"]}
    assert items["clips/a.wav@1.0"].meta == {"text": "middle"}
    np.testing.assert_array_equal(items["12"].read(), noise(seed=3))
    np.testing.assert_array_equal(items["clips/a.wav"].read(), noise())
    np.testing.assert_array_equal(items["clips/a.wav@1.0"].read(), noise()[16_000:24_000])
    inside = str(tmp_path / "clips" / "a.wav")
    assert [item.file for item in items.values()] == [
        (str(outside), 0.0, None), (inside, 0.0, 3.0), (inside, 1.0, 0.5)
    ]  # fmt: skip
    assert [item.size for item in items.values()] == [outside.stat().st_size, 96_000, 16_000]


def test_faults_are_items_with_line_numbers(tmp_path):
    write(tmp_path / "a.wav", noise(RATE))
    source = json_lines(
        tmp_path,
        {"audio_filepath": "a.wav"},
        '{"audio_filepath": "a.wav", "text": ',
        {"text": "no audio"},
        {"audio_filepath": "missing.wav"},
        {"audio_filepath": "a.wav", "offset": -1},
        {"audio_filepath": "a.wav", "id": "late", "offset": 9},
        '["a.wav"]',
        '{"audio_filepath": "a.wav", "duration": Infinity}',
        {"audio_filepath": "nul\0.wav"},
        '{"audio_filepath": "lone \\ud800.wav"}',
        {"audio_filepath": "a.wav", "id": "lone \ud800"},
        {"audio_filepath": "~\0/a.wav", "duration": "1"},
        "[" * 100_000,
        {"audio_filepath": "a.wav", "id": "long", "duration": 2.0},
        {"audio_filepath": ".", "id": "folder"},
    )
    assert verdicts(source) == {
        "a.wav": RATE,
        "m.jsonl:2": "bad JSON",
        "m.jsonl:3": "no audio path",
        "missing.wav": "no such file",
        "m.jsonl:5": "bad offset or duration",
        "late": "offset beyond the end",
        "m.jsonl:7": "not a JSON object",
        "m.jsonl:8": "bad offset or duration",
        "m.jsonl:9": "bad path or id",
        "m.jsonl:10": "bad path or id",
        "m.jsonl:11": "bad path or id",
        "m.jsonl:12": "bad offset or duration",
        "m.jsonl:13": "bad JSON",
        "long": "shorter than its stated duration",
        "folder": "not a file",
    }
    assert all(item.file is not None for item in open_source(source).items())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the manifest is empty"),
        (['[{"audio_filepath": "a.wav"},', '{"audio_filepath": "b.wav"}]'], "line 1: bad JSON; a line looks like"),
        (
            [{"audio_filepath": "x.wav"}, {"audio_filepath": "y.wav"}],
            "line 1: no such file: .*/x.wav .relative paths",
        ),
        ([{"audio_filepath": "x.wav"}, {}, {"audio_filepath": "x.wav"}], "lines 1 and 3 have the same id 'x.wav'"),
    ],
)
def test_refused(tmp_path, lines, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source(json_lines(tmp_path, *lines))
    assert "\n" not in str(caught.value)


def test_fingerprint_sees_text_and_missing_files(tmp_path):
    write(tmp_path / "a.wav", noise())
    lines = [{"audio_filepath": "a.wav"}, {"audio_filepath": "b.wav", "text": "one"}]
    prints = [open_source(json_lines(tmp_path, *lines)).fingerprint for _ in range(2)]
    assert prints[0] == prints[1]
    lines[1]["text"] = "two"
    prints.append(open_source(json_lines(tmp_path, *lines)).fingerprint)
    write(tmp_path / "b.wav", noise())
    prints.append(open_source(json_lines(tmp_path, *lines)).fingerprint)
    assert len(set(prints)) == 3


# ---- Hugging Face and other tables

TABLE = 'file_name,text,speaker_id\r\na.wav,"he said ""no"", twice",7\r\n\r\nsub/b.flac,"two\nlines",\r\n'


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", TABLE),
        ("metadata.csv", TABLE.replace("\r\n", "\n")),
        ("list", TABLE),
        (
            "metadata.jsonl",
            json.dumps({"file_name": "a.wav", "text": 'he said "no", twice', "speaker_id": "7"})
            + "\r\n" + json.dumps({"file_name": "sub/b.flac", "text": "two\nlines"}),
        ),
        ("table.tsv", TABLE.replace(",", "\t").replace('no""\t', 'no"",')),
        ("table.csv", TABLE.replace(",", ";").replace('no"";', 'no"",')),
    ],
)  # fmt: skip
def test_hugging_face(clips, bom, name, content):
    items = items_of(listed(clips / name, bom + content.encode()))
    assert {id: item.meta for id, item in items.items()} == {
        "a.wav": {"text": 'he said "no", twice', "speaker": "7"},
        "sub/b.flac": {"text": "two\nlines"},
    }
    np.testing.assert_array_equal(items["sub/b.flac"].read(), noise(2 * RATE, 2))


def test_table_rows(clips):
    rows = [
        "file_name,id,offset,duration,note",
        'a.wav,1,,,"a',
        'b"',
        "a.wav,2,0.25,0.5,",
        "a.wav,3,later,,",
        "a.wav,4,nan,,",
        "a.wav,5",
        "a.wav,6,,,x,y",
        ",7,,,",
        "gone.wav,,,,",
    ]
    source = listed(clips / "metadata.csv", "\n".join(rows))
    assert verdicts(source) == {
        "1": RATE,
        "2": 8_000,
        "metadata.csv:5": "bad offset or duration",
        "metadata.csv:6": "bad offset or duration",
        "metadata.csv:7": "fewer fields than columns",
        "metadata.csv:8": "more fields than columns",
        "metadata.csv:9": "no audio path",
        "gone.wav": "no such file",
    }
    assert items_of(source)["1"].meta == {"note": "a\nb"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "", "the manifest is empty"),
        ("m.csv", "\ufeff\n", "the manifest is empty"),
        ("m.csv", "name,text\na.wav,x\n", r"m.csv:1: no known format: the header 'name,text' names no column"),
        ("m.csv", "file_name text\na.wav x\n", r"m.csv:1: .*'file_name text' names no column"),
        ("m.csv", "file_name,text\n", "lists no recording; a line looks like a.wav,some text"),
        ("m.csv", "file_name,text,text\na.wav,x,y\n", "m.csv:1: two columns of the same name in 'file_name,text,text'"),
        (
            "m.csv",
            'file_name,text\na.wav,x\na.wav,"open\nb.wav,y\n',
            r'm.csv:3: .*; a field with quotes .*"like ""this',
        ),
        ("m.csv", 'file_name,text\na.wav,"x" y\n', "m.csv:2: ',' expected after"),
        ("m.csv", b"file_name,text\na.wav,x\nb.wav,caf\xe9\n", "m.csv:3: not UTF-8"),
        ("m.csv", "file_name,text\na.wav,x\n".encode("utf-16"), "m.csv is UTF-16; save it as UTF-8"),
        ("m.csv", "file_name,text\na.wav,x\nsub/b.flac,\na.wav,y\n", "lines 2 and 4 have the same id 'a.wav'"),
        ("m.csv", "file_name,text\nx.wav,a\ny.wav,b\n", "none of its 2 lines is usable; line 2: no such file: .*x.wav"),
        ("m.txt", "a.wav\nb.wav\n", "m.txt:1: no known format: the header 'a.wav' .*write JSON lines such as"),
        ("m.bin", bytes(range(128, 250)) * 9, r"m.bin:1: no known format: the header '\\ufffd.*\.\.\.' names"),
        ("m.tsv", "/root\na.wav 16000\n", "line 2: not a path, a tab and a number of frames; .*a.wav<TAB>16000"),
        ("m.csv", "a|b|c|d\n", r"line 1: not id\|text or id\|text\|normalised text; .*LJ001"),
    ],
)
def test_what_is_wrong_with_the_whole_file(clips, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source(listed(clips / name, content))
    assert "\n" not in str(caught.value)


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.fixed_dictionaries({
            "file_name": NAMES.map(lambda name: f"a{name}"),
            "text": st.text(st.characters(codec="utf-8", exclude_characters="\0\r")),
        }),
        min_size=1, max_size=5, unique_by=lambda row: row["file_name"],
    ),
    dialect=st.sampled_from(["excel", "unix"]),
)  # fmt: skip
def test_whatever_csv_and_json_can_write_is_read_back(tmp_path, rows, dialect):
    """Any name and any text, through the standard library's writers; one more line keeps the manifest usable."""
    write(tmp_path / "here.wav", noise(100))
    rows = [*rows, {"file_name": "here.wav", "text": "x"}]
    with open(tmp_path / "m.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text"], dialect=dialect)
        writer.writeheader()
        writer.writerows(rows)
    wanted = {row["file_name"]: row["text"] for row in rows}
    found = {item.id: item.meta.get("text", "") for item in open_source(f"manifest:{tmp_path}/m.csv").items()}
    assert found == wanted
    source = listed(tmp_path / "m.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert {item.id: item.meta["text"] for item in open_source(source).items()} == wanted


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=60), head=st.sampled_from(["", "file_name,x\n", "/r\na\t1\n", "{", "a|b\n"]))
@pytest.mark.parametrize("name", ["m.jsonl", "m.csv", "m.tsv", "m"])
def test_junk_is_refused_or_rejected_and_no_crash(tmp_path, name, junk, head):
    try:
        source = open_source(listed(tmp_path / name, head.encode() + junk))
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert all(isinstance(verdict, str) for verdict in verdicts(source.name).values())


# ---- fairseq


def test_fairseq(clips):
    rows = f"{clips}\na.wav\t16000\nsub/b.flac\t32000\n"
    items = items_of(listed(clips / "train.tsv", rows))
    assert {id: item.meta for id, item in items.items()} == {"a.wav": {}, "sub/b.flac": {}}
    assert items["sub/b.flac"].file == (str(clips / "sub" / "b.flac"), 0.0, None)
    np.testing.assert_array_equal(items["sub/b.flac"].read(), noise(2 * RATE, 2))
    # The same under another name, a folder relative to the manifest, and with CRLF.
    (clips / "lists").mkdir()
    other = listed(clips / "lists" / "train.lst", rows.replace(str(clips), "..").replace("\n", "\r\n"))
    assert list(items_of(other)) == list(items)
    np.testing.assert_array_equal(items_of(other)["a.wav"].read(), noise(RATE, 1))


def test_fairseq_transcripts(clips):
    source = listed(clips / "train.tsv", f"{clips}\nsub/b.flac\t32000\na.wav\t16000\n")
    before = open_source(source).fingerprint
    (clips / "train.ltr").write_text("T W O | W O R D S |\n\n")
    (clips / "train.phn").write_text("t uː\na\u2028 b\n")
    items = items_of(source)
    assert items["sub/b.flac"].meta == {"text": "TWO WORDS", "phones": ["t", "uː"]}
    assert items["a.wav"].meta == {"text": "", "phones": ["a", "b"]}
    (clips / "train.wrd").write_text("Two words\na\u2028b\n")  # a separator, but no end of a line
    assert [item.meta["text"] for item in items_of(source).values()] == ["a\u2028b", "Two words"]
    assert open_source(source).fingerprint != before
    (clips / "train.wrd").write_text("Two words\n")
    with pytest.raises(UserError, match=r"train.wrd has 1 lines for the 2 recordings of .*train.tsv"):
        open_source(source)


def test_fairseq_frames_tell_of_files_that_were_cut(clips):
    """Frames count at the file's own rate, so 8 kHz and 48 kHz tell too; 0.1 s may be missing."""
    for rate in (8_000, 48_000):
        write(clips / f"{rate}.wav", noise(rate), rate)
    rows = [
        "a.wav\t17500", "sub/b.flac\t33700", "8000.wav\t8000", "48000.wav\t48000",
        "./8000.wav\t12000", "./48000.wav\t53000", "gone.wav\t1", "a.wav 16000", "\ta.wav", "a\tb\t1",
    ]  # fmt: skip
    short = "shorter than its stated duration"
    bad = "not a path, a tab and a number of frames"
    assert verdicts(listed(clips / "m.tsv", "\n".join([str(clips), *rows]))) == {
        "a.wav": RATE,
        "sub/b.flac": short,
        "8000.wav": RATE,
        "48000.wav": RATE,
        "./8000.wav": short,
        "./48000.wav": short,
        "gone.wav": "no such file",
        **{f"m.tsv:{number}": bad for number in (9, 10, 11)},
    }


def test_fairseq_name_that_is_not_utf8(clips):
    name = os.fsdecode(b"caf\xe9.wav")
    try:
        os.rename(clips / "a.wav", clips / name)
    except OSError:
        pytest.skip("the file system insists on UTF-8")
    source = listed(clips / "m.tsv", os.fsencode(f"{clips}\n{name}\t16000\n"))
    assert verdicts(source) == {name: RATE}


# ---- LJSpeech


def test_ljspeech(clips):
    rows = 'LJ-1|Dr. "X, 1|doctor "X, one\nLJ-2.wav|only one\n\nLJ-3|gone|gone\nLJ-4\n'
    source = listed(clips / "metadata.csv", rows)
    items = items_of(source)
    assert items["LJ-1"].meta == {"raw_text": 'Dr. "X, 1', "text": 'doctor "X, one'}
    assert items["LJ-2.wav"].meta == {"text": "only one"}
    np.testing.assert_array_equal(items["LJ-1"].read(), noise(8_000, 3))
    assert verdicts(source) == {
        "LJ-1": 8_000,
        "LJ-2.wav": 8_000,
        "LJ-3": "no such file",
        "metadata.csv:5": "not id|text or id|text|normalised text",
    }


# ---- the same recordings in all formats


def test_all_formats_agree_on_real_speech(real_speech, tmp_path):
    names = sorted(path.name for path in (real_speech / "fsdd").glob("*_0.wav"))[:6]
    (tmp_path / "wavs").symlink_to(real_speech / "fsdd")
    texts = {name: f"word {name[0]}" for name in names}
    frames = {name: soundfile.info(tmp_path / "wavs" / name).frames for name in names}
    (tmp_path / "fairseq.wrd").write_text("".join(f"{texts[name]}\n" for name in names))
    made = [
        listed(tmp_path / "nemo.jsonl", "\n".join(
            json.dumps({"audio_filepath": f"wavs/{name}", "text": texts[name]}) for name in names)),
        listed(tmp_path / "fairseq.tsv", "\n".join(["wavs", *(f"{name}\t{frames[name]}" for name in names)])),
        listed(tmp_path / "metadata.csv", "\n".join(f"{name}|{texts[name]}|{texts[name]}" for name in names)),
        listed(tmp_path / "hf.csv", "\n".join(["text,file_name", *(f"{texts[name]},wavs/{name}" for name in names)])),
    ]  # fmt: skip
    for source in made:
        items = list(open_source(source).items())
        assert len(items) == len(names)
        for item, name in zip(items, names, strict=True):
            assert item.id.removeprefix("wavs/") == name
            assert item.meta["text"] == texts[name]
            np.testing.assert_array_equal(item.read(), decode(real_speech / "fsdd" / name))
