"""The units evaluator: what it counts, that its halves are apart, and that its pictures show what they say."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from speechjax import config as configs
from speechjax import metrics, sharding
from speechjax.errors import UserError
from speechjax.evals import _frames, units
from speechjax.evals.picture import Picture
from speechjax.evals.units import Units
from speechjax.pictures import mask_picture, reconstruction_picture, unit_map, unit_spectrogram
from speechjax.train import Job


class Sheet:
    """Stands in for the logs."""

    def __init__(self):
        self.saved, self.pictures = {}, {}

    def table(self, title, columns, rows):
        self.title, self.columns, self.rows = title, columns, rows

    def save_json(self, name, content):
        self.saved[name] = json.loads(json.dumps(content))

    def picture(self, step, name, image):
        self.pictures[name] = image

    def audio(self, step, name, samples, rate):
        self.pictures[f"{name}.wav"] = samples


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A manifest of 10 recordings: silence and two tones, each with its phone."""
    folder = tmp_path_factory.mktemp("spoken")
    rng, lines, rate = np.random.default_rng(0), [], 16000
    for k in range(10):
        audio, phones, begin = [], [], 0
        for symbol in ["sil", *rng.permutation(list("abab"))]:
            count = int(rng.integers(2400, 4000))
            tone = dict(sil=0, a=0.3, b=0.3)[symbol] * np.sin(
                2 * np.pi * (600 if symbol == "a" else 2500) * np.arange(count) / rate
            )
            audio.append(tone + 0.002 * rng.standard_normal(count))
            phones.append([symbol, begin / rate, (begin + count) / rate])
            begin += count
        soundfile.write(folder / f"{k}.wav", np.concatenate(audio), rate)
        lines.append(dict(audio_filepath=f"{k}.wav", phones=phones))
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    config = configs.load("configs/pretrain/wav2vec2.py:size=tiny,smoke")
    config.unlock()
    config.data.cache_dir = str(tmp_path_factory.mktemp("cache"))
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    return Job(configs.make_task(config), config, None, mesh, tmp_path_factory.mktemp("work"), Sheet())  # pyright: ignore


def energies(params, extra, batch):
    """Frames of 20 ms: loudness and zero crossings, which tell the three phones apart."""
    frames = batch["audio"][:, : batch["audio"].shape[1] // 320 * 320].reshape(len(batch["audio"]), -1, 320)
    x = frames.astype(jnp.float32) / 32768
    loud = jnp.log(jnp.mean(jnp.square(x), axis=-1) + 1e-7)
    crossings = jnp.mean(jnp.abs(jnp.diff(jnp.sign(x), axis=-1)), axis=-1)
    crossings = jnp.where(loud > -6, crossings, 0.0)  # of noise they say nothing
    return jnp.stack([loud / 10, 4 * crossings], axis=-1)[:, None], batch["lengths"] // 320


def test_units_of_telling_frames_agree_with_the_phones(job, spoken):
    with jax.set_mesh(job.mesh):
        evaluator = Units(job, every=1, source=f"manifest:{spoken}/m.jsonl", clusters=3, points=60)
        found = evaluator._find(_frames.Features(_frames.Timing(320, 160), jax.jit(energies)), None, None)
        shifted = evaluator._find(_frames.Features(_frames.Timing(320, 160 + 3200), jax.jit(energies)), None, None)
    # Frames across a boundary are neither phone; a tenth of all at most.
    assert metrics.pnmi(found.counts) > 0.75
    assert metrics.phone_purity(found.counts) > 0.9
    assert metrics.pnmi(shifted.counts) < 0.3  # negative control: phones of 0.2 s earlier
    # Half of the recordings were tested, every frame of them once.
    tested = [n for n in range(10) if n not in evaluator._fitted]
    assert len(tested) == 5
    frames = evaluator.recordings.records.lengths[evaluator.recordings.part[tested]] // 320
    assert found.usage.sum() == frames.sum()
    assert found.counts.sum() == frames.sum()  # the phones cover everything
    assert found.metrics()["dead"] == 0
    assert found.metrics()["perplexity"] == pytest.approx(metrics.perplexity(found.usage))


def test_nearest_equals_brute_force():
    rng = np.random.default_rng(0)
    points, centroids = rng.normal(size=(200, 5)) + 30, rng.normal(size=(7, 5)) + 30
    wanted = np.argmin(np.square(points[:, None] - centroids[None]).sum(axis=-1), axis=1)
    np.testing.assert_array_equal(units._nearest(points.astype(np.float32), centroids.astype(np.float32)), wanted)


def test_phones_of_frames_are_those_at_their_centres(job, spoken):
    evaluator = object.__new__(Units)
    evaluator.phones, evaluator.symbols = [[("a", 0.0, 0.05), ("b", 0.05, 0.09)]], ["a", "b"]
    # Centres at 10, 30, 50, 70, 90, 110 ms; a phone has its first instant, not its last.
    assert evaluator._phones_of(0, _frames.Timing(320, 160), 6).tolist() == [0, 0, 1, 1, -1, -1]


@pytest.mark.slow
def test_the_table_has_every_control_and_pictures_are_made(job, spoken):
    with jax.set_mesh(job.mesh):
        evaluator = Units(job, every=1, source=f"manifest:{spoken}/m.jsonl", clusters=5, points=60, layers="all")
        variables = _frames.random_variables(job, evaluator.recordings, seed=1)
        found = evaluator(*variables, 7, "units")
    rows = [row[0] for row in job.logs.rows]
    assert rows == ["this encoder, layer 0", "this encoder, layer 1", "random-initialised encoder", "log-mel", "MFCC"]
    assert found["pnmi_log_mel"] > 0.6  # tones
    assert found["phone_purity_mfcc"] > 0.6  # two fifths are the commonest phone; some units are taken by boundaries
    assert {"pnmi", "perplexity", "dead", "cluster_purity", "pnmi_random"} <= found.keys()
    assert float(job.logs.rows[1][1]) == pytest.approx(found["pnmi"], abs=6e-4)  # three decimals
    for name in ("units_map", "units_speech"):
        image = job.logs.pictures[name]
        assert image.dtype == np.uint8
        assert image.std() > 10
    assert evaluator._shown not in evaluator._fitted
    shown = evaluator.recordings.part[evaluator._shown]
    assert len(job.logs.pictures["units_speech.wav"]) == evaluator.recordings.records.lengths[shown]


def test_mistakes_are_named(job, spoken):
    source = f"manifest:{spoken}/m.jsonl"
    for options, message in (
        (dict(source=source, layer=-3), "units.layer=-3: there are the hidden states 0 to 1"),
        (dict(source=source, clusters=1), "units.clusters=1: at least 2"),
        (dict(source=source, layers="some"), "units.layers='some'"),
    ):
        with jax.set_mesh(job.mesh), pytest.raises(UserError, match=message):
            Units(job, every=1, **options)
    with jax.set_mesh(job.mesh):
        evaluator = Units(job, every=1, source=source, clusters=5000)
        with pytest.raises(UserError, match="clusters=5000: there are only"):
            evaluator._find(_frames.Features(_frames.Timing(320, 160), jax.jit(energies)), None, None)
    assert Units(job, every=1)(None, None, 0, "units") == {}


# ---- pictures


class TestReconstruction:
    rng = np.random.default_rng(0)
    target = np.cumsum(rng.normal(size=(60, 20)), axis=0)
    mask = np.arange(60) // 10 % 2 == 1

    def test_a_wrong_output_looks_wrong_and_a_right_one_does_not(self):
        right = reconstruction_picture(self.target, self.target, self.mask, 1.0, "t")
        wrong = reconstruction_picture(self.target, -self.target, self.mask, 1.0, "t")
        bottom = slice(int(0.78 * right.shape[0]), int(0.95 * right.shape[0])), slice(200, 1000)
        middle = right[bottom].std(axis=(0, 1)).max(), wrong[bottom].std(axis=(0, 1)).max()
        assert middle[1] > 2 * middle[0]

    def test_what_was_masked_is_hidden_and_nothing_is_without_a_mask(self):
        blue = (np.array([0.36, 0.72, 1.0]) * 255).round()
        count = lambda image: int(np.sum(np.all(np.abs(image - blue) <= 2, axis=-1)))  # noqa: E731
        shown = reconstruction_picture(self.target, self.target, self.mask, 1.0, "t")
        # Half of one panel of four, which is about an eighth of the picture, and bars.
        assert 0.06 < count(shown) / shown[..., 0].size < 0.16
        assert count(reconstruction_picture(self.target, self.target, None, 1.0, "t")) == 0

    def test_shapes_that_do_not_fit(self):
        with pytest.raises(ValueError, match="want target and output"):
            reconstruction_picture(self.target, self.target[:5], None, 1.0, "t")
        with pytest.raises(ValueError, match="want target and output"):
            reconstruction_picture(self.target, self.target, self.mask[:5], 1.0, "t")


def test_a_picture_of_codes_without_a_mask_has_no_shade():
    mel, codes = np.random.default_rng(0).normal(size=(100, 80)), np.arange(50) % 7
    plain = mask_picture(mel, None, codes, codes, 1.0, "t")
    none = mask_picture(mel, np.zeros(50, bool), codes, codes, 1.0, "t")
    title = plain.shape[0] // 12  # says "0% masked" in the second
    np.testing.assert_array_equal(plain[title:], none[title:])
    assert (plain != mask_picture(mel, np.ones(50, bool), codes, codes, 1.0, "t"))[title:].any()


def test_unit_pictures_take_symbols_that_fonts_and_formulas_do_not_know():
    codes = np.repeat(np.arange(5), 4)
    phones = [("$x", 0.0, 0.2), ("\U0001f600", 0.2, 0.4)]
    image = unit_spectrogram(np.zeros((40, 80)), 0.4, codes, 0.0, 0.02, phones, "$")
    assert image.ndim == 3
    frames = np.random.default_rng(0).normal(size=(40, 3))
    shown = unit_map(
        frames, np.arange(40) % 2, frames[:4], np.array([0, 1, 1, -1]), np.array([3, 2, 1, 0]), ["$x", "_"], "t", 0
    )
    assert shown.ndim == 3


@pytest.mark.parametrize("kind", ["codes", "frames"])
@pytest.mark.parametrize("masked", [True, False])
def test_the_picture_evaluator_takes_codes_or_frames_with_or_without_a_mask(kind, masked):
    """`target` and `output` alone decide which picture it is; without "mask" nothing is marked."""

    def apply(variables, batch, *, step, rngs, method):
        B, T = batch["audio"].shape[0], 40
        codes = jnp.broadcast_to(jnp.arange(T)[None] % 5, (B, T))
        frames = jnp.broadcast_to(jnp.sin(jnp.arange(T, dtype=jnp.float32))[None, :, None], (B, T, 9))
        shown = dict(target=frames, output=-frames) if kind == "frames" else dict(true=codes, predicted=codes)
        mask = dict(mask=codes > 2) if masked else {}
        return dict(lengths=jnp.full(B, 30, jnp.int32), **shown, **mask)

    task = SimpleNamespace(apply=apply, rngs=("mask",))
    batch = dict(audio=np.ones((4, 12800), np.int16), lengths=np.full(4, 9600, np.int32))
    data = SimpleNamespace(valid_batches=lambda host, hosts: iter([batch]), sample_rate=16000)
    config = SimpleNamespace(train=SimpleNamespace(seed=0))
    job = Job(task, config, data, sharding.make_mesh(data=-1, fsdp=1), Path("."), Sheet())  # pyright: ignore
    with jax.set_mesh(job.mesh):
        assert Picture(job, every=1)({}, {}, 5, "picture") == {}
    image = job.logs.pictures["picture"]
    blue = (np.array([0.36, 0.72, 1.0]) * 255).round()
    assert np.any(np.all(np.abs(image - blue) <= 2, axis=-1)) == masked
    assert image.shape[0] == (520 if kind == "codes" else 760 if masked else 590)
    assert len(job.logs.pictures["picture.wav"]) == 9600
