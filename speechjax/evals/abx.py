"""ABX: how well the frames of a frozen encoder tell phones apart, without any training, always beside controls."""

import logging
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from speechjax.data.records import Records
from speechjax.errors import UserError
from speechjax.evals import _abx, _frames
from speechjax.evals._dtw import DISTANCES
from speechjax.evals._frames import LOG_MEL, MFCC, RANDOM, SUFFIXES, THIS
from speechjax.train import Job

log = logging.getLogger("speechjax")

_WHAT = "config.evals.abx"
_BYTES = 1 << 30  # of features held at once


class ABX:
    """ABX errors in %, within and across speakers (see `_abx` for what is measured; chance is 50).

    `source` names the recordings (empty: no test): with phone alignments and a speaker in their metadata, or with an
    `item` file of the ZeroSpeech format, whose first column is the recordings' names without folder and extension.
    From alignments, an item's `span` is "triphone" (the phone and its neighbours) or "phone"; items of a file are as
    long as they stand there.  `context` "within": a, b and x have the same neighbours; "any": whatever they have,
    which needs less data and is harder.  `distance`: "angular", or "kl" between softmax(frame).

    Metrics `within` and `across` are of hidden state `layer`; with `layers` "all" the table has every one.
    `max_items` and `max_speakers` bound the work, see `_abx.plan_blocks`.
    """

    def __init__(
        self, job: Job, *, every: int, source: str = "", item: str = "", context: str = "within",
        span: str = "triphone", distance: str = "angular", layer: int = -1, layers: str = "one", max_items: int = 10,
        max_speakers: int = 5, seed: int = 0,
    ):  # fmt: skip
        self.job, self.every, self.on = job, every, bool(source)
        self.context, self.span, self.distance = context, span, distance
        for name, value, choices in (
            ("context", context, _abx.CONTEXTS), ("span", span, _abx.SPANS), ("distance", distance, DISTANCES),
        ):  # fmt: skip
            if value not in choices:
                raise UserError(f"{_WHAT}.{name}={value!r}: choose {' or '.join(choices)}")
        for name, value in (("max_items", max_items), ("max_speakers", max_speakers)):
            if value < 0:
                raise UserError(f"{_WHAT}.{name}={value}: at least 1, or 0 for no limit")
        if not source:
            return
        records = _frames.open_source(job, source)
        items = self._items(records, source, item)
        self._plan(records, source, items, dict(max_items=max_items, max_speakers=max_speakers, seed=seed))
        self.layers = _frames.chosen_layers(job, self.recordings, layer, layers, _WHAT)
        self._features = _frames.encoder_features(job, self.layers)
        self._last = _frames.encoder_features(job, self.layers[-1:])
        self._controls: dict[str, dict[str, _abx.Score]] = {}

    def _items(self, records: Records, source: str, item: str) -> list[_abx.Item]:
        if not item:
            items = []
            for i, phones in _frames.aligned(records, f"{_WHAT}.source={source}").items():
                meta = records.meta(i)
                if meta.get("speaker") is None:
                    raise UserError(f"{_WHAT}.source={source}: {records.id(i)} has phones but no speaker")
                lang = str(meta.get("lang") or "")
                items += _abx.items_of_phones(i, phones, str(meta["speaker"]), self.span, lang)
            return items
        names: dict[str, int] = {}
        for i, name in enumerate(records.ids):
            stem = PurePosixPath(name).name.rsplit(".", 1)[0]
            if stem in names:
                raise UserError(f"{_WHAT}.item={item}: two recordings of {source} are called {stem}")
            names[stem] = i
        items, elsewhere = _abx.read_items(item, names)
        if elsewhere:
            log.warning(
                "%d of %d items of %s are of recordings not in %s", elsewhere, elsewhere + len(items), item, source
            )
        if not items:
            raise UserError(f"{_WHAT}.item={item}: none of its recordings is in {source}, e.g. {records.id(0)!r}")
        return items

    def _plan(self, records: Records, source: str, items: list[_abx.Item], options: dict[str, int]) -> None:
        """Keeps the items that every row of the table has frames for, and decides which are compared."""
        hop, more = self.job.task.encoder.frame_len()
        encoder, control = _frames.Timing(hop, (hop + more) / 2), _frames.CONTROL_TIMING

        def frames(item: _abx.Item) -> int:
            length = int(records.lengths[item.recording])
            return min(_inside(encoder, item, (length - more) // hop), _inside(control, item, length // control.hop))

        whole = [item for item in items if frames(item) > 0]
        if len(whole) < len(items):
            log.info("ABX: %d of %d items are shorter than a frame and left out", len(items) - len(whole), len(items))
        within, across = _abx.plan_blocks(whole, context=self.context, **options)
        if not within and not across:
            raise UserError(
                f"{_WHAT}.source={source}: no two of its {len(whole)} items make a triplet; use more speech"
                + (f", or {_WHAT}.context=any" if self.context == "within" else "")
            )
        used = np.unique(np.concatenate([side for block in (*within, *across) for side in (block.ab, block.x)]))
        number = np.full(len(whole), -1)
        number[used] = np.arange(len(used))
        self.blocks = {
            name: [block._replace(ab=number[block.ab], x=number[block.x]) for block in blocks]
            for name, blocks in (("within", within), ("across", across))
            if blocks
        }
        for name in {"within", "across"} - self.blocks.keys():
            log.warning("ABX: %s has no triplets %s speakers", source, name)
        part, where = np.unique([whole[k].recording for k in used], return_inverse=True)
        self.items = [whole[k]._replace(recording=int(n)) for k, n in zip(used.tolist(), where.tolist(), strict=True)]
        self.recordings = _frames.batched(self.job, records, part)

    def __call__(self, params: Any, extra: Any, step: int, name: str) -> dict[str, float]:
        if not self.on:
            return {}
        rows = {}
        for layer, scores in zip(self.layers, self._measure_layers(params, extra), strict=True):
            rows[f"{THIS}, layer {layer}"] = scores
        this = rows[f"{THIS}, layer {self.layers[-1]}"]
        if not self._controls:  # they do not change in training
            self._controls = {
                RANDOM: self._measure(self._last, *_frames.random_variables(self.job, self.recordings))[0],
                LOG_MEL: self._measure(_frames.control_features(self.job, LOG_MEL), None, None)[0],
                MFCC: self._measure(_frames.control_features(self.job, MFCC), None, None)[0],
            }
        self._show(step, name, rows | self._controls)
        return {
            f"{kind}{SUFFIXES[row]}": 100 * score.error
            for row, scores in ({THIS: this} | self._controls).items()
            for kind, score in scores.items()
        }

    def _measure_layers(self, params: Any, extra: Any) -> list[dict[str, _abx.Score]]:
        """Of every layer of the table; as many passes over the audio as memory for their frames asks for."""
        limits = [self._features.timing.between(item.onset, item.offset) for item in self.items]
        frames = sum(stop - first for first, stop in limits)
        at_once = max(1, _BYTES // (4 * self.job.task.encoder.width * frames))
        if at_once >= len(self.layers):
            return self._measure(self._features, params, extra)
        groups = [self.layers[k : k + at_once] for k in range(0, len(self.layers), at_once)]
        return [
            scores
            for group in groups
            for scores in self._measure(_frames.encoder_features(self.job, group), params, extra)
        ]

    def _measure(self, features: _frames.Features, params: Any, extra: Any) -> list[dict[str, _abx.Score]]:
        of_recording: dict[int, list[int]] = {}
        for k, item in enumerate(self.items):
            of_recording.setdefault(item.recording, []).append(k)
        frames: list[list[np.ndarray]] = [[] for _ in self.items]
        for n, found in _frames.sweep(self.job, self.recordings, features, params, extra):
            for k in of_recording.pop(n, []):
                first, stop = features.timing.between(self.items[k].onset, self.items[k].offset)
                # Copies: a view would keep the frames of the whole recording.
                frames[k] = [layer[first:stop].copy() for layer in found]
        phones = [item.phone for item in self.items]
        scores = []
        for layer in range(len(frames[0])):
            own = [states[layer] for states in frames]
            if not all(np.isfinite(x).all() for x in own):
                raise UserError("the features of the ABX test contain NaN or infinity: the model has diverged")
            scores.append({
                kind: _abx.score(blocks, _abx.distances(blocks, own, self.distance), phones)
                for kind, blocks in self.blocks.items()
            })  # fmt: skip
        return scores

    def _show(self, step: int, name: str, rows: dict[str, dict[str, _abx.Score]]) -> None:
        """The table on the console and, as <name>.json, in report/."""
        kinds = list(self.blocks)
        counts = next(iter(rows.values()))
        triplets = ", ".join(f"{counts[kind].triplets:,} {kind}" for kind in kinds)
        where = "in the same context" if self.context == "within" else "in any context"
        title = f"ABX at step {step}: error in %, chance 50, {where}; triplets {triplets}"
        columns = ["features", *(f"{kind} speakers" for kind in kinds)]
        cells = [[row, *(f"{100 * scores[kind].error:.2f}" for kind in kinds)] for row, scores in rows.items()]
        self.job.logs.table(title, columns, cells)
        self.job.logs.save_json(name, dict(title=title, columns=columns, rows=cells))


def _inside(timing: _frames.Timing, item: _abx.Item, count: int) -> int:
    """How many of a recording's `count` frames are centred in an item."""
    first, stop = timing.between(item.onset, item.offset)
    return min(stop, count) - first
