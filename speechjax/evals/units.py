"""Units: what k-means of a frozen encoder's frames has to do with phones, beside controls, in numbers and pictures."""

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from speechjax import metrics, pictures
from speechjax.audio.features import log_mel
from speechjax.errors import UserError
from speechjax.evals import _frames
from speechjax.evals._frames import LOG_MEL, MFCC, RANDOM, SUFFIXES, THIS
from speechjax.models import kmeans
from speechjax.train import Job

log = logging.getLogger("speechjax")

_WHAT = "config.evals.units"
_PASSES = 20  # of Lloyd's algorithm
_SHOWN_SECONDS = 4.0
_COLUMNS = {
    "pnmi": "PNMI", "phone_purity": "phone purity", "cluster_purity": "cluster purity",
    "perplexity": "perplexity", "dead": "dead units",
}  # fmt: skip


class Found(NamedTuple):
    """Units of one layer: `counts` [P, K] of the tested frames, frames of all units [K], and what pictures show.

    `codes` are those of the recording shown; `frames` [S, D] and `phones` [S] of a sample of the tested frames.
    """

    counts: np.ndarray
    usage: np.ndarray
    codes: np.ndarray
    centroids: np.ndarray
    frames: np.ndarray
    phones: np.ndarray

    def metrics(self) -> dict[str, float]:
        return dict(
            pnmi=metrics.pnmi(self.counts), phone_purity=metrics.phone_purity(self.counts),
            cluster_purity=metrics.cluster_purity(self.counts), perplexity=metrics.perplexity(self.usage),
            dead=float(np.sum(self.usage == 0)),
        )  # fmt: skip


class Units:
    """PNMI, purities, perplexity and dead units of `clusters` k-means units of hidden state `layer`.

    `source` names recordings with phone alignments (empty: no test).  Units are fitted to at most `max_frames` frames
    of one half of the recordings and tested on the other, so that a codebook gains nothing by heart.  A frame has the
    phone at its centre, silence being one.  With `layers` "all" the table has every hidden state.  Two pictures:
    <name>_map, a t-SNE of `points` frames and of the units, and <name>_speech, a tested recording with its units.

    Frames last 10 ms in the controls log-mel and MFCC and 20 ms or more in an encoder; the controls are fitted to as
    many.  Measures depend on `clusters` and on the phone set: compare only what agrees in both.
    """

    def __init__(
        self, job: Job, *, every: int, source: str = "", layer: int = -1, layers: str = "one", clusters: int = 100,
        max_frames: int = 20_000, points: int = 1000, seed: int = 0,
    ):  # fmt: skip
        self.job, self.every, self.on, self.clusters = job, every, bool(source), clusters
        self.max_frames, self.points, self.seed = max_frames, points, seed
        for name, value, least in (("clusters", clusters, 2), ("points", points, 50)):
            if value < least:
                raise UserError(f"{_WHAT}.{name}={value}: at least {least}")
        if not source:
            return
        records = _frames.open_source(job, source)
        phones = _frames.aligned(records, f"{_WHAT}.source={source}")
        if len(phones) < 2:
            raise UserError(f"{_WHAT}.source={source}: only one recording has phones; units are tested on another")
        self.recordings = _frames.batched(job, records, list(phones))
        self.phones = list(phones.values())
        self.symbols = sorted({symbol for own in self.phones for symbol, _, _ in own})
        order = np.random.default_rng(seed).permutation(len(phones))
        self._fitted = set(order[::2].tolist())
        lengths = records.lengths[self.recordings.part]
        tested = order[1::2]
        self._shown = int(tested[np.argmin(np.abs(lengths[tested] / _frames.SAMPLE_RATE - _SHOWN_SECONDS))])
        self.layers = _frames.chosen_layers(job, self.recordings, layer, layers, _WHAT)
        self._features = {k: _frames.encoder_features(job, [k]) for k in self.layers}
        self._controls: dict[str, Found] = {}

    def __call__(self, params: Any, extra: Any, step: int, name: str) -> dict[str, float]:
        if not self.on:
            return {}
        rows = {f"{THIS}, layer {k}": self._find(found, params, extra) for k, found in self._features.items()}
        main = self.layers[-1]
        this = rows[f"{THIS}, layer {main}"]
        if not self._controls:  # they do not change in training
            never = _frames.random_variables(self.job, self.recordings)
            self._controls = {
                RANDOM: self._find(self._features[main], *never),
                LOG_MEL: self._find(_frames.control_features(self.job, LOG_MEL), None, None),
                MFCC: self._find(_frames.control_features(self.job, MFCC), None, None),
            }
        self._show(step, name, rows | self._controls)
        self._draw(step, name, this, main)
        every = {THIS: this} | self._controls
        return {
            f"{key}{SUFFIXES[row]}": value for row, found in every.items() for key, value in found.metrics().items()
        }

    def _find(self, features: _frames.Features, params: Any, extra: Any) -> Found:
        """Fits units to the frames of one half, and counts those of the other."""
        sweep = functools.partial(_frames.sweep, self.job, self.recordings, features, params, extra)
        # Keyed by the recording, so that the order of the batches does not matter.
        whole = [(n, frames[0]) for n, frames in sweep() if n in self._fitted]
        points = np.concatenate([frames for _, frames in sorted(whole, key=lambda pair: pair[0])])
        if not np.isfinite(points).all():
            raise UserError("the features to make units of contain NaN or infinity: the model has diverged")
        if len(points) < self.clusters:
            raise UserError(f"{_WHAT}.clusters={self.clusters}: there are only {len(points)} frames to fit them to")
        rng = np.random.default_rng(self.seed)
        some = rng.choice(len(points), min(self.max_frames, len(points)), replace=False)
        centroids = np.asarray(_fit(jax.random.key(self.seed), points[some], self.clusters))
        counts = np.zeros((len(self.symbols), self.clusters), np.int64)
        usage = np.zeros(self.clusters, np.int64)
        kept, codes_shown = [], np.zeros(0, np.int32)
        for n, layers in sweep():
            if n in self._fitted or not len(layers[0]):
                continue
            codes = _nearest(layers[0], centroids)
            phones = self._phones_of(n, features.timing, len(codes))
            counts += metrics.joint_counts(phones, codes, len(self.symbols), self.clusters)
            usage += np.bincount(codes, minlength=self.clusters)
            kept.append((n, layers[0], phones))
            codes_shown = codes if n == self._shown else codes_shown
        kept.sort(key=lambda entry: entry[0])
        frames, phones = (np.concatenate(column) for column in list(zip(*kept, strict=True))[1:])
        known = np.flatnonzero(phones >= 0)
        drawn = np.sort(rng.choice(known, min(self.points, len(known)), replace=False))
        return Found(counts, usage, codes_shown, centroids, frames[drawn], phones[drawn])

    def _phones_of(self, n: int, timing: _frames.Timing, count: int) -> np.ndarray:
        """Number of the phone at the centre of each frame of recording n, -1 where there is none: int [count]."""
        phones = np.full(count, -1)
        for symbol, start, end in self.phones[n]:
            first, stop = timing.between(start, end)
            phones[first:stop] = self._number[symbol]
        return phones

    @functools.cached_property
    def _number(self) -> dict[str, int]:
        return {symbol: k for k, symbol in enumerate(self.symbols)}

    def _show(self, step: int, name: str, rows: dict[str, Found]) -> None:
        """The table on the console and, as <name>.json, in report/."""
        frames = int(next(iter(rows.values())).counts.sum())
        title = (
            f"{self.clusters} k-means units at step {step} against {len(self.symbols)} phones, "
            f"on {frames:,} frames of recordings they were not fitted to"
        )
        cells = [[row, *(_cell(key, found.metrics()[key]) for key in _COLUMNS)] for row, found in rows.items()]
        columns = ["features", *_COLUMNS.values()]
        self.job.logs.table(title, columns, cells)
        self.job.logs.save_json(name, dict(title=title, columns=columns, rows=cells))

    def _draw(self, step: int, name: str, found: Found, layer: int) -> None:
        if jax.process_index():
            return
        records, n = self.recordings.records, self._shown
        likeliest = np.where(found.counts.sum(axis=0) > 0, found.counts.argmax(axis=0), -1)
        image = pictures.unit_map(
            found.frames, found.phones, found.centroids, likeliest, found.usage, self.symbols,
            f"step {step}, layer {layer}: {self.clusters} units, PNMI {metrics.pnmi(found.counts):.3f}", self.seed,
        )  # fmt: skip
        self.job.logs.picture(step, f"{name}_map", image)
        audio = records.read(int(self.recordings.part[n]))
        mel, _ = log_mel(jnp.asarray(audio[None]), jnp.array([len(audio)], jnp.int32))
        timing = self._features[layer].timing
        # A unit lasts from the middle between two centres to the next.
        first = (timing.centre - timing.hop / 2) / _frames.SAMPLE_RATE
        image = pictures.unit_spectrogram(
            np.asarray(mel)[0], len(audio) / _frames.SAMPLE_RATE, found.codes, first, timing.hop / _frames.SAMPLE_RATE,
            self.phones[n], f"step {step}, layer {layer}: {records.id(int(self.recordings.part[n]))}",
        )  # fmt: skip
        self.job.logs.picture(step, f"{name}_speech", image)
        self.job.logs.audio(step, f"{name}_speech", audio, _frames.SAMPLE_RATE)


def _cell(key: str, value: float) -> str:
    return f"{value:.3f}" if key == "pnmi" else f"{value:.1%}" if key.endswith("purity") else f"{value:.0f}"


@functools.partial(jax.jit, static_argnums=2)
def _fit(key: jax.Array, points: jax.Array, clusters: int) -> jax.Array:
    return kmeans.fit(key, points, clusters, passes=_PASSES).centroids


def _nearest(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """`kmeans.assign` without a compilation for every length: [T, D] -> int64 [T]."""
    middle = centroids.mean(axis=0)
    near = centroids - middle
    return np.argmax((points - middle) @ near.T - 0.5 * np.square(near).sum(axis=1), axis=1)
