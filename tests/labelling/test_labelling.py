"""The parts of labelling: windows, features, fitting, the codebook's files, units, the report's numbers."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans, MiniBatchKMeans

from speechjax.audio import features as audio_features
from speechjax.data.records import Records, open_records
from speechjax.data.units import identities, open_units, unit_count
from speechjax.errors import UserError
from speechjax.labelling import assign, fit, windows
from speechjax.labelling.codebook import Codebook, load_codebook
from speechjax.labelling.features import Features, mfcc, mfcc39
from speechjax.labelling.report import phone_of_units
from speechjax.sharding import make_mesh

SECONDS = (1.7, 0.02, 5.3, 0.9, 3.1, 0.4)  # the second is too short for a frame


def noise(seconds: float, seed: int) -> np.ndarray:
    """Bursts of coloured noise: something that clusters."""
    rng = np.random.default_rng(seed)
    n = round(seconds * 16000)
    loud = np.repeat(10 ** rng.uniform(-3, -0.7, n // 1600 + 1), 1600)[:n]
    tone = np.sin(np.arange(n) * np.repeat(rng.uniform(0.05, 1.5, n // 1600 + 1), 1600)[:n])
    return (loud * (tone + 0.3 * rng.standard_normal(n))).clip(-1, 0.999)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Records:
    """Six recordings, whole."""
    folder = tmp_path_factory.mktemp("sounds")
    for k, seconds in enumerate(SECONDS):
        soundfile.write(folder / f"{k}.wav", noise(seconds, k), 16_000, subtype="PCM_16")
    return open_whole(folder, tmp_path_factory.mktemp("cache"))


def open_whole(folder: Path, cache: Path) -> Records:
    return open_records(
        f"folder:{folder}", cache_dir=str(cache), segment_seconds=1e9, min_seconds=0, max_bad_share=1, progress=False
    )


def mesh(devices: int = 4) -> jax.sharding.Mesh:
    return make_mesh(data=-1, fsdp=1, devices=jax.devices()[:devices])


def material(records: Records, features: Features, seconds: float = 2.0, devices: int = 4) -> fit.Material:
    about = dict(hop=features.hop, extra=features.extra)
    cut = windows.cut(records.lengths, context=features.context, seconds=seconds, **about)
    shapes = windows.shapes_of(cut, batch_seconds=2.0, devices=devices, **about)
    return fit.Material(records, cut, windows.plan_of(cut, shapes, 0), features, mesh(devices))


_compiled = jax.jit(lambda audio, lengths: mfcc39(None, {"audio": audio, "lengths": lengths}))


def mfcc_of(audio: np.ndarray) -> np.ndarray:
    """[T, 39] of int16 samples, padded to a length that is compiled once."""
    padded = np.pad(audio, (0, -len(audio) % 90_000))[None]
    frames, lengths = _compiled(padded, np.int32([len(audio)]))
    return np.asarray(frames)[0, : int(lengths[0])]


def whole_mfcc(records: Records, i: int) -> np.ndarray:
    """The features of a whole recording, on their own: [T, 39]."""
    return mfcc_of(records.read(i))


# ---- windows


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 40_000), min_size=1, max_size=5),
    st.sampled_from([(160, 240, 4), (320, 80, 5), (640, 0, 2)]),
)
def test_every_frame_of_every_recording_is_kept_once_with_its_context(lengths, frame):
    hop, extra, context = frame
    lengths = np.array(lengths)
    found = windows.cut(lengths, hop=hop, extra=extra, context=context, seconds=0.5)
    kept = [[] for _ in lengths]
    for i, begin, count, offset, number, first in zip(*dataclasses.asdict(found).values(), strict=True):
        assert begin % hop == 0  # or its frames would lie between the recording's
        assert 0 <= begin <= begin + count <= lengths[i]
        assert begin // hop + offset == first
        frames, total = unit_count(count, hop, extra), unit_count(int(lengths[i]), hop, extra)
        assert offset == min(context, first)
        assert frames - offset - number == min(context, total - first - number)
        assert count <= 8000 + hop + max(0, 4 * context * hop + extra - 8000)
        kept[i] += range(first, first + number)
    assert kept == [list(range(unit_count(int(n), hop, extra))) for n in lengths]


def test_cut_windows_give_the_frames_of_the_whole(records):
    """Features dumped in pieces, as is usual, lose the frames at the cuts and bend the slopes beside them."""
    features = mfcc()
    whole = whole_mfcc(records, 2)

    def pieced(context: int) -> np.ndarray:
        cut = windows.cut(records.lengths[2:3], hop=160, extra=240, context=context, seconds=1.0)
        assert len(cut) > 4
        found = np.zeros_like(whole)
        for w in range(len(cut)):
            frames = mfcc_of(records.read(2, int(cut.begin[w]), int(cut.count[w])))
            here = slice(int(cut.first[w]), int(cut.first[w] + cut.kept[w]))
            found[here] = frames[int(cut.offset[w]) : int(cut.offset[w] + cut.kept[w])]
        return found

    scale = np.abs(whole).max()
    np.testing.assert_allclose(pieced(features.context), whole, atol=1e-5 * scale)  # the FFTs' float32
    assert np.abs(pieced(features.context - 1) - whole).max() > 1e-3 * scale
    # Without overlap not even the number of frames is right.
    assert sum(unit_count(n, 160, 240) for n in (16_000,) * 5) + unit_count(4_800, 160, 240) < len(whole)


# ---- features


def test_mfcc39_are_kaldis_with_slopes_by_regression():
    audio = (np.random.default_rng(0).standard_normal(9_000) * 3000).astype(np.int16)
    found = mfcc_of(audio)
    kaldi = np.asarray(audio_features.mfcc(audio[None], np.int32([9_000]), convention="kaldi", n_mels=23)[0])[0]
    assert found.shape == (unit_count(9_000, 160, 240), 39)
    # Another scale only moves c0, by the same everywhere, where no band is at the log's floor.
    shift = -2 * np.log(32768) * np.sqrt(23)
    np.testing.assert_allclose(found[:, 1:13], kaldi[:, 1:], atol=2e-3)
    np.testing.assert_allclose(found[:, 0], kaldi[:, 0] + shift, atol=2e-3)
    for base, slope in ((found[:, :13], found[:, 13:26]), (found[:, 13:26], found[:, 26:])):
        inner = slice(4, -4)
        wanted = (2 * (base[4:] - base[:-4]) + (base[3:-1] - base[1:-3])) / 10
        np.testing.assert_allclose(slope[2:-2][inner], wanted[inner], atol=1e-4)


def test_digital_silence_is_quiet_speechs_neighbour_not_an_outlier():
    c0 = mfcc_of(np.zeros(800, np.int16))[0, 0]
    assert c0 == pytest.approx(np.log(np.finfo(np.float32).eps) * np.sqrt(23), rel=1e-5)


# ---- fitting


@pytest.mark.parametrize("devices", [1, 4])
def test_lloyd_over_streamed_windows_equals_scikit_learns_over_all_frames(records, tmp_path, monkeypatch, devices):
    points = np.concatenate([whole_mfcc(records, i) for i in range(len(records))])
    first = points[:: len(points) // 6][:6]
    monkeypatch.setattr(fit, "_initial", lambda *_: jnp.asarray(first))
    monkeypatch.setattr(fit, "_TOLERANCE", -1.0)
    recipe = fit.Recipe(6, method="lloyd", passes=4)
    found, progress = fit.fit(material(records, mfcc(), devices=devices), recipe, tmp_path / "fit", {})
    theirs = KMeans(6, init=first, n_init=1, max_iter=4, tol=0, algorithm="lloyd").fit(points)
    assert theirs.n_iter_ == 4
    # Float32 means of some hundred frames of values up to 100.
    np.testing.assert_allclose(found.centroids, theirs.cluster_centers_, atol=2e-3)
    assert found.counts.sum() == len(points)  # every frame once, padding and context never
    assert all(b <= a for a, b in zip(progress.inertia, progress.inertia[1:], strict=False))


def test_mini_batches_of_streamed_windows_equal_scikit_learns_of_the_same_frames(records, tmp_path, monkeypatch):
    """The frames of each batch come from the features of whole recordings: no padding and no context among them."""
    given = material(records, mfcc(), seconds=0.5)
    whole = [whole_mfcc(records, i) for i in range(len(records))]
    first = np.concatenate(whole)[:: sum(map(len, whole)) // 6][:6]
    monkeypatch.setattr(fit, "_initial", lambda *_: jnp.asarray(first))
    found, progress = fit.fit(given, fit.Recipe(6, passes=2, reassign=0), tmp_path / "fit", {})
    assert progress.batch == 2 * given.plan.batches_per_epoch > 6
    theirs, total = MiniBatchKMeans(6, init=first, n_init=1, reassignment_ratio=0), 0
    for number in range(progress.batch):
        rows = given.plan.batch(number)
        example = rows.example[:, 0]
        w = given.windows.of(example[example >= 0])
        cut = zip(w.recording, w.first, w.kept, strict=True)
        points = np.concatenate([whole[i][begin : begin + count] for i, begin, count in cut])
        assert len(points) == w.kept.sum() < rows.shape.rows * unit_count(rows.shape.samples, 160, 240)
        theirs.partial_fit(points)
        total += len(points)
    assert found.counts.sum() == total
    np.testing.assert_array_equal(found.counts, theirs._counts)
    # Float32 means of some hundred frames of values up to 100.
    np.testing.assert_allclose(found.centroids, theirs.cluster_centers_, atol=2e-3)
    assert np.abs(found.centroids - first).max() > 1, "negative control: they have moved"


@pytest.mark.parametrize("method", ["minibatch", "lloyd"])
def test_an_interrupted_fit_goes_on_to_the_same_bits(records, tmp_path, monkeypatch, method):
    monkeypatch.setattr(fit, "SAVE_EVERY", 2)
    recipe = fit.Recipe(5, method=method, passes=9, inits=2, reassign=0.05)
    given = material(records, mfcc())
    whole, done = fit.fit(given, recipe, tmp_path / "whole", {"a": 1})
    assert done.batch >= 8
    save, saved = fit._save, []

    def interrupted(*args):
        save(*args)
        saved.append(args[-1].batch)
        if len(saved) in (2, 4):
            raise KeyboardInterrupt

    monkeypatch.setattr(fit, "_save", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit.fit(given, recipe, tmp_path / "part", {"a": 1})
    again, progress = fit.fit(given, recipe, tmp_path / "part", {"a": 1})
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    assert progress == done
    assert saved == sorted(set(saved))  # nothing was computed twice
    other = fit.fit(given, dataclasses.replace(recipe, seed=1), tmp_path / "other", {"a": 1})[0]
    assert not np.array_equal(other.centroids, whole.centroids)
    # Finished, but not yet written as a codebook: nothing is left to do.
    monkeypatch.setattr(fit, "_save", None)
    jax.tree.map(np.testing.assert_array_equal, fit.fit(given, recipe, tmp_path / "part", {"a": 1})[0], whole)
    with pytest.raises(UserError, match=r"holds another codebook \(a: 1 -> 2\)"):
        fit.fit(given, recipe, tmp_path / "part", {"a": 2})


def test_patience_ends_a_fit_that_gets_no_better():
    recipe, progress = fit.Recipe(2, patience=3), fit.Progress()
    for number, inertia in enumerate([9.0, 5.0, 4.0, 6.0, 6.0, 6.0]):
        assert not progress.done, number
        fit._judge(progress, inertia, points=10, total_points=100, recipe=recipe)
    assert progress.done
    assert progress.best == pytest.approx(5 + (4 - 5) * 20 / 101)  # the first batch does not count


def test_fits_that_cannot_be_are_refused(records, tmp_path):
    with pytest.raises(UserError, match=r"only .* different frames .* fewer"):
        fit.fit(material(records, mfcc()), fit.Recipe(5000, inits=1), tmp_path / "a", {})
    broken = dataclasses.replace(mfcc(), compute=lambda v, b: (mfcc39(v, b)[0] * jnp.nan, mfcc39(v, b)[1]))
    with pytest.raises(UserError, match="not finite"):
        fit.fit(material(records, broken), fit.Recipe(5, inits=1), tmp_path / "b", {})
    for wrong in (dict(clusters=1), dict(clusters=5, method="em"), dict(clusters=5, passes=0)):
        with pytest.raises(UserError, match="--"):
            fit.Recipe(**wrong)  # type: ignore[arg-type]


# ---- codebooks and units


def codebook(records: Records, k: int = 6) -> Codebook:
    points = np.concatenate([whole_mfcc(records, i) for i in range(len(records))])
    return Codebook(points[:: len(points) // k][:k], np.ones(k, np.float32), mfcc().definition, {"hours": 1})


def test_a_codebook_is_known_by_what_decides_its_units(records, tmp_path):
    one = codebook(records)
    one.save(tmp_path)
    again = load_codebook(tmp_path)
    assert again is not None
    assert again.digest == one.digest
    np.testing.assert_array_equal(again.centroids, one.centroids)
    other = dataclasses.replace(one, features={**one.features, "n_mels": 24})
    moved = dataclasses.replace(one, centroids=np.nextafter(one.centroids, np.float32(np.inf)))
    assert len({book.digest for book in (one, other, moved)}) == 3
    assert dataclasses.replace(one, fit={}).digest == one.digest
    assert load_codebook(tmp_path / "nowhere") is None
    frames = whole_mfcc(records, 0)
    exact = np.square(frames[:, None].astype(np.float64) - one.centroids[None]).sum(-1)
    assert np.array_equal(one.assign(jnp.asarray(frames)), exact.argmin(1))
    with pytest.raises(ValueError, match="39"):
        one.assign(jnp.zeros((2, 13)))


@pytest.mark.parametrize("damage", ["other", "torn", "gone", "json"])
def test_a_damaged_or_exchanged_codebook_is_refused(records, tmp_path, damage):
    codebook(records).save(tmp_path)
    arrays = tmp_path / "codebook.npz"
    if damage == "other":
        other = tmp_path / "other"
        other.mkdir()
        codebook(records, 5).save(other)
        shutil.copy(other / "codebook.npz", arrays)
    elif damage == "torn":
        arrays.write_bytes(arrays.read_bytes()[:200])
    elif damage == "gone":
        arrays.unlink()
    else:
        (tmp_path / "codebook.json").write_text("{")
    with pytest.raises(UserError, match="codebook"):
        load_codebook(tmp_path)


@pytest.mark.parametrize("devices", [1, 4])
def test_units_are_the_nearest_centroids_of_the_whole_recordings_frames(records, tmp_path, monkeypatch, devices):
    cut = windows.cut
    monkeypatch.setattr(windows, "cut", lambda lengths, **about: cut(lengths, seconds=1.0, **about))
    monkeypatch.setattr(assign, "SHARD_UNITS", 400)
    book = codebook(records)
    assign.label(records, mfcc(), book, tmp_path, mesh(devices), batch_seconds=4.0)
    store = open_units(tmp_path)
    assert store.info["shards"] > 1
    assert (store.codes, store.hop, store.extra, store.codebook) == (6, 160, 240, book.digest)
    for i, row in enumerate(store.find(identities(records)).tolist()):
        frames = whole_mfcc(records, i).astype(np.float64)
        d2 = np.square(frames[:, None] - book.centroids[None]).sum(-1)
        units = store.read(row)
        assert len(units) == unit_count(int(records.lengths[i]), 160, 240) == len(frames)
        # A frame whose two nearest are equally near, to the features' rounding, may take either.
        assert (d2[np.arange(len(units)), units] <= d2.min(axis=1, initial=np.inf) * (1 + 1e-4) + 1e-3).all()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assign.label(records, mfcc(), book, tmp_path, mesh(devices), batch_seconds=4.0)
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"other labels \(codes, codebook differ\)"):
        assign.label(records, mfcc(), codebook(records, 5), tmp_path, mesh(devices), batch_seconds=4.0)


def test_what_cannot_be_read_is_an_error_not_a_unit_of_silence(records, tmp_path, monkeypatch):
    folder = tmp_path / "sounds"
    folder.mkdir()
    soundfile.write(folder / "a.wav", noise(1, 0), 16_000)
    own = open_whole(folder, tmp_path / "cache")
    [pcm] = (tmp_path / "cache").rglob("*.pcm")
    pcm.write_bytes(pcm.read_bytes()[:1000])
    with pytest.raises(UserError, match="label again"):
        assign.label(own, mfcc(), codebook(records), tmp_path / "out", mesh(), batch_seconds=4.0)
    assert not (tmp_path / "out" / "units.json").exists()


def test_frames_of_a_batch_that_are_no_points():
    """Context and padding are masked, whatever the features say of their lengths."""
    made = Features("", {}, 1, 0, 0, {}, lambda v, b: (jnp.ones((2, 5, 3)), jnp.int32([5, 3])))
    batch = {"offset": np.int32([1, 0]), "kept": np.int32([2, 9])}
    points, valid = fit.points_of(made, {}, batch)
    assert points.shape == (10, 3)
    assert valid.reshape(2, 5).astype(int).tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    assert set(batch) == {"offset", "kept"}


def test_phones_are_those_at_the_centres_of_the_frames():
    phones = [("sil", 0.0, 0.05), ("a", 0.05, 0.07), ("b", 0.08, 0.2)]
    number = {"sil": 0, "a": 1, "b": 2}
    # Frames of 25 ms every 10 ms: centres at 12.5, 22.5, ... ms; 72.5 ms lies in the gap, 202.5 ms behind the end.
    found = phone_of_units(phones, number, 20, hop=160, extra=240)
    assert found.tolist() == [0] * 4 + [1] * 2 + [-1] + [2] * 12 + [-1]
