"""The store of units: what goes in comes out, whatever happens in between is noticed, and a crash costs one shard."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax.data import shard_writer
from speechjax.data.units import _BLOCK, IDENTITY, UnitWriter, open_units, unit_count
from speechjax.errors import UserError

HOP, EXTRA = 20, 5
CLAIM = dict(hop=HOP, extra=EXTRA, codes=500, codebook_digest="book", source_digest="source", shards=3)


def identity(key, samples, mean=0.0, std=0.1):
    return np.array((key, samples, mean, std), IDENTITY)[()]


def recordings(n=20, codes=500, seed=0):
    """{shard: [(identity, units)]}: lengths from no unit at all to several blocks, keys all over 64 bits."""
    rng = np.random.default_rng(seed)
    samples = np.concatenate([[1, EXTRA + HOP - 1, EXTRA + HOP, 3 * _BLOCK * HOP + 7], rng.integers(30, 3000, n - 4)])
    keys = rng.integers(0, 2**64, n, np.uint64)
    made = [
        (identity(key, count, *rng.uniform(0.1, 0.2, 2)), rng.integers(0, codes, unit_count(int(count), HOP, EXTRA)))
        for key, count in zip(keys, samples, strict=True)
    ]
    return {shard: made[shard::3] for shard in range(3)}


def write(folder, made, order=(0, 1, 2), **changes):
    writer = UnitWriter(folder, **{**CLAIM, **changes})
    for shard in order:
        if not writer.done(shard):
            writer.write(shard, iter(made[shard]))
    return writer.finish()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def store(tmp_path):
    """(folder, what was written, the identities, the units)."""
    made = recordings()
    write(tmp_path, made)
    flat = list(itertools.chain(*made.values()))
    return tmp_path, made, np.array([who for who, _ in flat]), [units for _, units in flat]


# ---- in and out


@pytest.mark.parametrize("codes", [500, 1 << 16, (1 << 16) + 1])
def test_units_come_out_as_they_went_in(tmp_path, codes):
    made = recordings(codes=codes)
    made[0][0] = (identity(1, HOP + EXTRA), np.array([codes - 1]))  # the largest code, which a small type would wrap
    info = write(tmp_path, made, codes=codes)
    units = open_units(tmp_path)
    assert (units.hop, units.extra, units.codes, units.codebook) == (HOP, EXTRA, codes, "book")
    flat = list(itertools.chain(*made.values()))
    rows = units.find(np.array([who for who, _ in flat]))
    for row, (_, wanted) in zip(rows, flat, strict=True):
        found = units.read(int(row))
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, wanted)
    everything = np.concatenate([wanted for _, wanted in flat])
    np.testing.assert_array_equal(info["counts"], np.bincount(everything, minlength=codes))
    assert (info["recordings"], info["units"]) == (20, len(everything))
    size = sum((tmp_path / f"shard-0000{k}.units").stat().st_size for k in range(3))
    assert size <= len(everything) * (2 if codes <= 1 << 16 else 4) + 4 * (20 + 3)  # no more than codes and checksums


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A store of one recording of three and a half blocks, between two others, and its units."""
    folder = tmp_path_factory.mktemp("one")
    rng = np.random.default_rng(1)
    sizes = {7: 100, 8: 3 * _BLOCK + _BLOCK // 2, 9: 100}
    made = {key: (identity(key, n * HOP + EXTRA), rng.integers(0, 500, n)) for key, n in sizes.items()}
    writer = UnitWriter(folder, **{**CLAIM, "shards": 1})
    writer.write(0, made.values())
    writer.finish()
    units = open_units(folder)
    return units, int(units.find(np.array([made[8][0]]))[0]), made[8][1]


EDGES = [k * _BLOCK + d for k in range(-1, 5) for d in (-1, 0, 1)]


@settings(max_examples=60, deadline=None)
@given(
    first=st.one_of(st.sampled_from(EDGES), st.integers(-6000, 20_000)),
    count=st.one_of(st.sampled_from(range(4)), st.sampled_from([n for n in EDGES if n > 0]), st.integers(0, 20_000)),
)
def test_any_window_is_that_of_the_whole_and_nothing_beyond(one, first, count):
    units, row, whole = one
    wanted = [whole[j] if 0 <= j < len(whole) else -1 for j in range(first, first + count)]
    np.testing.assert_array_equal(units.read(row, first, count), np.array(wanted, np.int32))


def test_the_number_of_units_is_that_of_the_frames():
    """wav2vec's frames (400 samples every 320) and Kaldi's (400 every 160), counted one by one."""
    for hop, window in ((320, 400), (160, 400), (160, 160)):
        for samples in (0, 1, 159, 160, 399, 400, 719, 720, 16_000, 250_000):
            frames = sum(1 for t in range(2000) if t * hop + window <= samples)
            assert unit_count(samples, hop, window - hop) == frames


@pytest.mark.parametrize(
    ("who", "units"),
    [
        (identity(1, 100), np.zeros(5, int)),  # four fit
        (identity(1, 100), np.zeros(3, int)),
        (identity(1, 100), np.array([0, 1, 2, 500])),
        (identity(1, 100), np.array([0, 1, 2, -1])),
        (identity(1, 100), np.zeros(4)),
    ],
)
def test_units_that_do_not_fit_are_refused_and_leave_nothing(tmp_path, who, units):
    writer = UnitWriter(tmp_path, **CLAIM)
    good = (identity(2, 100), np.arange(4))
    with pytest.raises(ValueError, match="units"):
        writer.write(0, [good, (who, units)])
    assert not writer.done(0)
    assert list(content(tmp_path)) == ["labelling.json"]
    writer.write(0, [good])
    assert writer.done(0)


# ---- interruptions


def test_the_order_of_the_shards_does_not_matter_and_what_is_labelled_by_what_does(tmp_path):
    made = recordings()
    stores = [
        write(tmp_path / "a", made), write(tmp_path / "b", made, order=(2, 0, 1)),
        write(tmp_path / "c", made, codebook_digest="another"), write(tmp_path / "d", made, source_digest="another"),
        write(tmp_path / "e", recordings(seed=1)),
    ]  # fmt: skip
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert len({info["digest"] for info in stores}) == 4


class Crash(BaseException):
    """What no code catches: as if the process had ended."""


def test_a_crash_at_any_moment_costs_one_shard_at_most(tmp_path, monkeypatch):
    """Each file appears by a rename, so a crash before or after the k-th one is every state there can be."""
    made = recordings()
    write(tmp_path / "whole", made)
    whole, moments = content(tmp_path / "whole"), 0
    for k, after in itertools.product(range(20), (False, True)):
        folder = tmp_path / f"crash{k}{after}"
        renames = itertools.count()
        rename = Path.replace

        def crashing(self, target, k=k, after=after, renames=renames, rename=rename):
            now = next(renames) == k
            if now and not after:
                raise Crash
            rename(self, target)
            if now:
                raise Crash

        monkeypatch.setattr(Path, "replace", crashing)
        try:
            write(folder, made)
            crashed = False
        except Crash:
            crashed = True
        monkeypatch.undo()
        if not crashed:
            break
        moments += 1
        if folder.exists() and "units.json" not in content(folder):
            with pytest.raises(UserError, match=r"not finished|holds no units"):
                open_units(folder)
        begun = sum(1 for shard in range(3) if (folder / f"shard-0000{shard}.units").exists())
        kept = sum(UnitWriter(folder, **CLAIM).done(shard) for shard in range(3))
        assert begun - kept <= 1
        write(folder, made)
        assert content(folder) == whole
    assert moments == 2 * (1 + 3 * 3 + 2)  # labelling.json, three files a shard, index.npy, units.json


def test_a_torn_shard_is_written_again_and_no_other(tmp_path):
    made = recordings()
    write(tmp_path, made)
    whole = content(tmp_path)
    with open(tmp_path / "shard-00001.units", "r+b") as file:
        file.truncate(10)
    writer = UnitWriter(tmp_path, **CLAIM)
    assert [writer.done(k) for k in range(3)] == [True, False, True]
    with pytest.raises(UserError, match=r"1 of 3 shards .* not whole: give the label command again"):
        writer.finish()
    write(tmp_path, {1: made[1], 0: None, 2: None})  # None would not be iterable
    assert content(tmp_path) == whole


def test_an_error_while_labelling_leaves_no_half_shard(tmp_path):
    made = recordings()

    def broken():
        yield made[0][0]
        raise OSError(28, "No space left on device")

    writer = UnitWriter(tmp_path, **CLAIM)
    with pytest.raises(OSError, match="No space"):
        writer.write(0, broken())
    assert list(content(tmp_path)) == ["labelling.json"]
    write(tmp_path, made)
    open_units(tmp_path)


def test_labels_of_something_else_are_not_mixed_in(tmp_path):
    made = recordings()
    write(tmp_path, made)
    for changes in (dict(hop=40), dict(extra=0), dict(codes=100), dict(codebook_digest="new"), dict(shards=4)):
        name = next(iter(changes)).removesuffix("_digest")
        with pytest.raises(UserError, match=rf"holds other labels \({name} differ\); use another folder"):
            UnitWriter(tmp_path, **{**CLAIM, **changes})
    (tmp_path / "labelling.json").unlink()
    with pytest.raises(UserError, match="something unknown"):
        UnitWriter(tmp_path, **CLAIM)


def test_a_claim_before_the_first_shard_binds_nobody(tmp_path):
    UnitWriter(tmp_path, **CLAIM)
    write(tmp_path, recordings(codes=100), codes=100)
    assert open_units(tmp_path).codes == 100


# ---- which recording


def test_a_recording_that_changed_is_told_from_one_that_is_unknown(store):
    folder, _, who, _ = store
    units = open_units(folder)
    longer, louder, unknown, rounded = who.copy(), who.copy(), who.copy(), who.copy()
    longer["samples"] += 1  # the same number of units, mostly
    louder["std"] *= 1.01
    unknown["key"] += np.uint64(1)
    rounded["std"] *= 1 + 1e-6
    rounded["mean"] += 1e-8
    assert (units.find(who) >= 0).all()
    assert (units.find(longer) == -2).all()
    assert (units.find(louder) == -2).all()
    assert (units.find(unknown) == -1).all()
    np.testing.assert_array_equal(units.find(rounded), units.find(who))
    np.testing.assert_array_equal(units.find(who[::2]), units.find(who)[::2])  # a subset is fine


def test_one_id_in_several_parts_of_a_mixture(tmp_path):
    same = [identity(5, 100, std=0.1), identity(5, 100, std=0.2), identity(5, 140), identity(6, 100)]
    made = [(who, np.full(unit_count(int(who["samples"]), HOP, EXTRA), k)) for k, who in enumerate(same)]
    writer = UnitWriter(tmp_path, **{**CLAIM, "shards": 1})
    writer.write(0, made)
    writer.finish()
    units = open_units(tmp_path)
    for k, row in enumerate(units.find(np.array(same)).tolist()):
        assert set(units.read(row).tolist()) == {k}
    assert units.find(np.array([identity(5, 100, std=0.3)])).tolist() == [-2]


# ---- damage


@pytest.mark.parametrize("where", [0, 1, 6000, -5, -1])
def test_a_changed_byte_is_an_error_where_it_is_read(store, where):
    folder, _, who, wanted = store
    data = bytearray((folder / "shard-00000.units").read_bytes())
    data[where] ^= 1
    (folder / "shard-00000.units").write_bytes(data)
    units = open_units(folder)
    bad = 0
    for row, right in zip(units.find(who).tolist(), wanted, strict=True):
        try:
            np.testing.assert_array_equal(units.read(row), right)
        except UserError as error:
            assert "shard-00000.units has changed since it was written; empty the folder" in str(error)  # noqa: PT017
            bad += 1
    assert bad == 1


def test_units_in_the_wrong_place_are_an_error(tmp_path):
    """Whole blocks with whole checksums, but of each other: so is what a wrong offset in the index would read."""
    made = [(identity(k, 100), np.full(4, k)) for k in (1, 2)]
    writer = UnitWriter(tmp_path, **{**CLAIM, "shards": 1})
    writer.write(0, made)
    writer.finish()
    file = tmp_path / "shard-00000.units"
    data = file.read_bytes()
    file.write_bytes(data[12:] + data[:12])
    units = open_units(tmp_path)
    for row in range(2):
        with pytest.raises(UserError, match="has changed since it was written"):
            units.read(row)
    file.write_bytes(data)  # the control
    assert [open_units(tmp_path).read(row)[0] for row in range(2)] == [1, 2]


def test_blocks_of_one_recording_in_the_wrong_order_are_an_error(one, tmp_path):
    units, row, _ = one
    for path in units.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = (tmp_path / "shard-00000.units").read_bytes()
    begin, size = 100 * 2 + 4, _BLOCK * 2 + 4
    blocks = data[begin + size : begin + 2 * size] + data[begin : begin + size]
    (tmp_path / "shard-00000.units").write_bytes(data[:begin] + blocks + data[begin + 2 * size :])
    with pytest.raises(UserError, match="has changed since it was written"):
        open_units(tmp_path).read(row, 10, 20)
    units.read(row, 10, 20)


def test_damage_that_shows_at_once(store, tmp_path_factory):
    folder, *_ = store
    whole = content(folder)

    def after(name, change):
        for path, data in whole.items():
            (folder / path).write_bytes(data)
        change(folder / name)
        with pytest.raises(UserError) as error:
            open_units(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "shard-00002.units has another size" in after("shard-00002.units", lambda f: f.write_bytes(b"1234"))
    assert "No such file" in after("shard-00002.units", Path.unlink)
    assert "has another size" in after("index.npy", lambda f: f.write_bytes(f.read_bytes()[:-1]))
    assert "damaged: it cannot be read" in after("units.json", lambda f: f.write_text("{"))
    assert "damaged" in after("units.json", lambda f: f.write_text("[]"))
    format_2 = json.dumps({**json.loads(whole["units.json"]), "format": 2})
    assert "has format 2, this version reads 1" in after("units.json", lambda f: f.write_text(format_2))
    assert "are not finished: give their label command again" in after("units.json", Path.unlink)
    nothing = tmp_path_factory.mktemp("nothing")
    with pytest.raises(UserError, match=r"holds no units; make them with python -m speechjax\.label"):
        open_units(nothing)


def test_a_shard_made_anew_makes_the_store_unfinished(store):
    """Else units.json would speak of shards that are no more."""
    folder, made, *_ = store
    UnitWriter(folder, **CLAIM).write(1, made[1])
    with pytest.raises(UserError, match="not finished"):
        open_units(folder)


def test_a_store_of_nothing(tmp_path):
    write(tmp_path, {shard: [] for shard in range(3)})
    units = open_units(tmp_path)
    assert len(units) == 0
    assert units.find(np.array([identity(1, 100)])).tolist() == [-1]


def test_files_are_whole_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(shard_writer.os, "fsync", lambda number: synced.append(number))
    write(tmp_path, recordings())
    assert len(synced) == 12  # as many as there are renames
