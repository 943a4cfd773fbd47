"""A trained model in a program: `speechjax.load` and what it gives.

Shapes: B batch, S samples, T frames, D width, V classes.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from speechjax import config as configs
from speechjax import runs
from speechjax.adapter_files import write_vocabulary
from speechjax.data.text import Tokenizer, load_tokenizer
from speechjax.errors import UserError

SAMPLE_RATE = 16000
_WHOLE = 30.0  # seconds that are heard in one piece; longer recordings are transcribed in windows that overlap
_LEAST = 0.5

Audio = np.ndarray | Sequence[np.ndarray]


def load(which: str | Path) -> "Pretrained":
    """A model from a folder: of a run (WORKDIR, or WORKDIR@STEP, @best, @newest), one that `transformers` saved, or one
    of `speechjax.export --format=safetensors`.

        model = speechjax.load("runs/asr")
        model.features(audio)                      # float32 [T, D], of audio [S] at 16 kHz
        model.features(audio, layer=6)
        model.transcribe(audio, sample_rate=8000)  # resampled first

    Reads without executing anything in it, and without TensorFlow.  Raises UserError where there is no such model.
    """
    folder = Path(which).expanduser()
    if (folder / "config.json").is_file() and _is_theirs(folder / "config.json"):
        from speechjax.formats import hf, imports

        config, leaves, files = imports.as_run(hf.read(folder))
        params, extra, _ = imports.variables(config, leaves)
        return Pretrained(configs.make_task(config), {"params": params, **extra}, files, str(which))
    if (folder / "speechjax.json").is_file() and not (folder / "config.json").exists():
        from speechjax.formats import flat

        found = flat.read(folder)
        return Pretrained(found.task, {"params": found.params, **found.extra}, found.vocabulary, str(which))
    from speechjax.adapter_files import read_vocabulary

    run = runs.open_run(str(which), jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    return Pretrained(run.task, run.variables, read_vocabulary(run.workdir), str(which))


def _is_theirs(path: Path) -> bool:
    import json

    try:
        return "model_type" in json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError, TypeError):
        return False


class Pretrained:
    """A task with its weights.  Audio is an array [S] or [B, S], or a list of arrays [S] of any lengths.

    Floating-point audio is taken as it is, from -1 to 1; int16 is divided by 32768.  Answers are NumPy arrays: of [S]
    that of the one row, of a list a list without padding.  Audio at another `sample_rate` is resampled (soxr).
    `task` and `variables` are there for programs that want more.
    """

    def __init__(self, task: Any, variables: Any, vocabulary: dict[str, bytes], name: str):
        encoder = task.encoder.clone(remat=False)
        self.task, self.name = task.clone(encoder=encoder), name
        self.variables = jax.device_put(variables, jax.local_devices()[0])
        self.sample_rate = SAMPLE_RATE
        self._vocabulary = vocabulary
        self._programs: dict[str, Any] = {}
        self._tokenizer: Tokenizer | None = None

    @property
    def width(self) -> int:
        """D, of layers; what stands above them, as in autoencoders, may be narrower."""
        return self.task.encoder.width

    @property
    def layers(self) -> int:
        """Layers; `features` knows them as 1 to this, and the input of the first as 0."""
        return self.task.encoder.layers

    def frames(self, samples: int) -> int:
        """T, of so many samples at 16 kHz."""
        hop, extra = self.task.encoder.frame_len()
        return max(samples - extra, 0) // hop * self.task.encoder.tokens()

    def features(self, audio: Audio, sample_rate: int = SAMPLE_RATE, *, layer: int | None = None) -> Any:
        """Last hidden state, float32 [T, D] or [B, T, D]; or the output of `layer`, 0 being the input of the first.

        Negative layers count from the end.  Raises UserError for a layer that there is not.
        """
        if layer is not None and not -self.layers - 1 <= layer <= self.layers:
            raise UserError(f"layer={layer}: {self.name} has 0 to {self.layers}")

        def hear(batch):
            found = self.task.apply(self.variables, batch, method="features")
            # Some have states above their layers, such as the narrow middle of an autoencoder.
            return found.frames if layer is None else found.hidden[: self.layers + 1][layer]

        return self._run(f"features {layer}", hear, audio, sample_rate)

    def hidden_states(self, audio: Audio, sample_rate: int = SAMPLE_RATE) -> list[Any]:
        """What `features` gives of all layers at once, 0 to `layers`."""

        def hear(batch):
            return self.task.apply(self.variables, batch, method="features").hidden[: self.layers + 1]

        return self._run("hidden", hear, audio, sample_rate)

    def logits(self, audio: Audio, sample_rate: int = SAMPLE_RATE) -> Any:
        """What the head says: float32 [T, V] of ctc and frames, [V] of classify, [E] of speaker (the embedding).

        With a batch in front.  Raises UserError for a model without such a head.
        """
        if type(self.task).__name__ not in _ANSWERS:
            kind = type(self.task).__name__.lower()
            raise UserError(
                f"{self.name}: the task {kind} has no logits; those that have: ctc, classify, frames, speaker"
            )
        name = _ANSWERS[type(self.task).__name__]
        hear = lambda batch: self.task.apply(self.variables, batch, method="answer")[name]  # noqa: E731
        return self._run("logits", hear, audio, sample_rate)

    def transcribe(self, audio: Audio, sample_rate: int = SAMPLE_RATE, **decoding: Any) -> Any:
        """Text of [S], a list of texts of others; `decoding` as in `recognition.Decoding` (search="beam", lm=..., ...).

        Audio of more than 30 s is transcribed in windows, as `python -m speechjax.transcribe` does.  Raises UserError
        for a model without transcripts, and for what `Decoding` refuses.
        """
        from speechjax.recognition import Decoding, Recognizer, texts

        how = Decoding(**decoding)
        rows, single = _rows(audio, sample_rate)
        name = f"transcribe {how}"
        if name not in self._programs:  # compiled, and files that steer read, once
            self._programs[name] = Recognizer(self.task, self.tokenizer, how)
        recognizer = self._programs[name]
        found = []
        for row in rows:
            if len(row) > _WHOLE * SAMPLE_RATE:
                found.append(self._in_windows(row, how))
                continue
            padded, length = _padded(row)
            batch: Any = {"audio": padded[None], "lengths": np.array([length], np.int32)}
            best = recognizer(self.variables, batch)
            found.append(texts(self.tokenizer, jax.device_get(best))[0][0][0])
        return found[0] if single else found

    @property
    def tokenizer(self) -> Tokenizer:
        """Of a model that transcribes; UserError where it has no vocabulary."""
        if self._tokenizer is None:
            if "vocab.json" not in self._vocabulary:
                raise UserError(f"{self.name} has no vocabulary, so no transcripts")
            with tempfile.TemporaryDirectory() as folder:
                write_vocabulary(Path(folder), self._vocabulary)
                self._tokenizer = load_tokenizer(folder)
        return self._tokenizer

    def _in_windows(self, row: np.ndarray, how: Any) -> str:
        import soundfile

        from speechjax import sharding
        from speechjax.transcription import Transcriber

        mesh = sharding.make_mesh(data=-1, fsdp=1)
        with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "audio.wav"
            soundfile.write(path, np.clip(row, -1, 1), SAMPLE_RATE, subtype="PCM_16")
            variables = jax.device_put(self.variables, sharding.replicated(mesh))
            model = Transcriber(self.task, variables, self.tokenizer, how, mesh, seconds=20.0, overlap=4.0, rows=4)
            [(_, result)] = model([path], lambda _: None)
        if isinstance(result, str):
            raise UserError(result)
        return result.text

    def _run(self, name: str, hear: Callable[[Any], Any], audio: Audio, sample_rate: int) -> Any:
        """`hear` of every row, compiled once a length; frames of padding cut off."""
        rows, single = _rows(audio, sample_rate)
        program = self._programs.setdefault(name, jax.jit(hear))
        found = []
        for row in rows:
            padded, length = _padded(row)
            whole = program({"audio": padded[None], "lengths": np.array([length], np.int32)})
            frames = self.frames(len(row))
            cut = lambda x, T=frames: np.asarray(x[0, :T] if x.ndim == 3 else x[0], np.float32)  # noqa: E731
            found.append(jax.tree.map(cut, whole))
        if single:
            return found[0]
        together = isinstance(audio, np.ndarray) or hasattr(audio, "ndim")
        return jax.tree.map(lambda *parts: np.stack(parts), *found) if together else found


_ANSWERS = {"CTC": "logits", "Classify": "scores", "Frames": "scores", "Speaker": "embedding"}


def _rows(audio: Audio, sample_rate: int) -> tuple[list[np.ndarray], bool]:
    """(rows float32 [S] at 16 kHz, whether `audio` was one)."""
    single = hasattr(audio, "ndim") and np.ndim(audio) == 1
    given = [audio] if single else list(audio)
    if not given:
        raise UserError("audio: no rows")
    return [_row(np.asarray(row), sample_rate) for row in given], bool(single)


def _row(row: np.ndarray, sample_rate: int) -> np.ndarray:
    if row.ndim != 1 or row.dtype.kind not in "fi" or (row.dtype.kind == "i" and row.dtype != np.int16):
        raise UserError(f"audio: an array {row.dtype}{list(row.shape)}; give samples [S] or [B, S], float or int16")
    row = row.astype(np.float32) / (32768 if row.dtype == np.int16 else 1)
    if not np.isfinite(row).all():
        raise UserError("audio: not all samples are numbers")
    if sample_rate == SAMPLE_RATE:
        return row
    if not 1000 <= sample_rate <= 1_000_000:
        raise UserError(f"sample_rate={sample_rate}: from 1000 to 1000000")
    import soxr

    return soxr.resample(row, sample_rate, SAMPLE_RATE).astype(np.float32)


def _padded(row: np.ndarray) -> tuple[np.ndarray, int]:
    """Zeros at the end, which no model here hears, so that a few lengths serve all: (float32 [S], valid samples)."""
    # At most 19 % longer: four lengths an octave.
    octave = max(math.log2(max(len(row), 1) / (_LEAST * SAMPLE_RATE)), 0)
    samples = math.ceil(_LEAST * SAMPLE_RATE * 2 ** (math.ceil(4 * octave) / 4))
    return np.pad(row, (0, max(samples - len(row), 0))), len(row)
