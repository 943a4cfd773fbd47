"""The page of statistics: whole files, nothing from outside, and names of users that cannot break it."""

import html.parser
import json
import os
from pathlib import Path

import numpy as np
import pytest

from speechjax.data.statistics import Statistics, numbers, write_page
from speechjax.data.statistics_page import overview

RATE = 16_000
EVIL = '<script>alert(\'&"1")</script>'


def counted(*recordings: np.ndarray, **known) -> Statistics:
    made = Statistics.new()
    for audio in recordings:
        made.add(audio, **known)
    return made


def constant(value: int, samples: int = RATE) -> np.ndarray:
    return np.full(samples, value, np.int16)


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8_000, 8_000, RATE).astype(np.int16)


class Reader(html.parser.HTMLParser):
    """Tags and text of a page."""

    def __init__(self, page: Path):
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.outside: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href") and not value.startswith("data:")]

    def handle_data(self, data):
        self.text.append(data)


def evil() -> Statistics:
    found = counted(noise(), rate=8_000, kind=EVIL, meta={"speaker": EVIL, "lang": EVIL, "text": EVIL})
    found.reject(EVIL, f"{EVIL} no audio")
    return found


def test_page(tmp_path):
    parts = {"manifest:a.csv": counted(noise(), noise(1), rate=16_000), "folder:$x_1$": counted(constant(0))}
    page = write_page(tmp_path / "new" / "set", "my set", parts)
    assert page == tmp_path / "new" / "set" / "index.html"
    assert sorted(os.listdir(page.parent)) == ["index.html", "statistics.json", "statistics.png"]
    stored = json.loads((page.parent / "statistics.json").read_text())
    assert stored["title"] == "my set"
    for name, part in parts.items():
        assert Statistics.from_json(stored["parts"][name]["counts"]) == part
        assert stored["parts"][name]["numbers"] == numbers(part)
    assert stored["all"]["numbers"]["recordings"] == 3
    assert (page.parent / "statistics.png").read_bytes().startswith(b"\x89PNG\r\n")
    found = Reader(page)
    assert found.outside == []
    assert found.tags.count("img") == 1
    assert {"my set", *parts, "all", "Rejected"} <= set(found.text)
    assert "16000" in found.text


def test_page_escapes_what_users_wrote(tmp_path):
    found = Reader(write_page(tmp_path, EVIL, {EVIL: evil(), "b": evil()}))
    assert "script" not in found.tags
    shown = [text for text in found.text if EVIL in text]
    # Title twice; a column of the five tables; a row of formats and one of languages; a reason and its id, which both
    # parts rejected.
    assert len(shown) == 2 + 5 + 2 + 1 + 2


def test_the_same_page_twice(tmp_path):
    one, two = (write_page(tmp_path / name, "t", {"a": evil()}).parent for name in "ab")
    for path in sorted(one.iterdir()):
        assert path.read_bytes() == (two / path.name).read_bytes()


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"empty": Statistics.new()},
        {f"part {k}": counted(noise(seed=k)) for k in range(9)},
        {"all": counted(noise()), "": Statistics.new()},
        {"_語😀\udcff$": counted(constant(-32_768, 1))},
        {"long": counted(np.zeros(3600 * RATE, np.int16)), "n" * 300: counted(constant(1, 1))},
    ],
    ids=["none", "empty", "nine", "all", "letters", "long"],
)
def test_pages_of_odd_parts(tmp_path, parts):
    found = Reader(write_page(tmp_path, "odd", parts))
    assert found.tags.count("img") == 1
    header, *rows = overview(parts)
    assert len(header) == 1 + len(parts) + (len(parts) != 1)
    assert {len(row) for row in rows} == {len(header)}


def test_long_tables_are_cut_on_the_page_only(tmp_path):
    found = Statistics.new()
    for number in range(40):
        found.add(constant(1, 10), meta={"lang": f"l{number:02d}"})
    page = write_page(tmp_path, "many", {"a": found})
    assert "and 10 more in statistics.json" in Reader(page).text
    assert len(json.loads((tmp_path / "statistics.json").read_text())["all"]["numbers"]["language_hours"]) == 40


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_a_full_disk_tears_no_file(tmp_path, monkeypatch, survivors):
    write_page(tmp_path, "old", {"a": evil()})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    left = [None] * survivors
    fsync = os.fsync

    def full(descriptor):
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_page(tmp_path, "new", {"b": counted(constant(5))})
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert sum(after[name] != before[name] for name in before) == survivors
    json.loads(after["statistics.json"])
