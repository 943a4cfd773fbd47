"""DistilHuBERT (Chang et al. 2021, arXiv 2110.01900): a small encoder predicts several layers of a trained one.

Shapes: B batch, T frames, C feature channels, D width of the teacher, L layers.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from speechjax.errors import UserError
from speechjax.models.ema import mean_deviation
from speechjax.models.encoder import SpeechEncoder
from speechjax.models.layers import fan_in_uniform, frame_mask, gelu, scale_gradient
from speechjax.runs import find_checkpoint, read_config, read_weights
from speechjax.tasks._base import Sums, Task
from speechjax.tasks._contrastive import unit

log = logging.getLogger("speechjax")


class Distill(Task):
    """Batch of `SpeechEncoder`, packed or not -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    `layers` are the predicted ones: 1 the output of the teacher's first, 12 that of its twelfth.  Each has a head of
    its own on the student's output, two linear maps around a GELU.  The loss of a frame and a layer is the mean over
    features of |prediction - target| ("l1") and `cosine_weight` times -log sigmoid(their cosine) ("cosine"), both
    averaged over layers and frames, as in the published code.  Student and teacher hear the same audio, unmasked; the
    teacher has no dropout and gets no gradient.

    `teacher` names a run's checkpoint, as in `speechjax.runs.open_run` (WORKDIR, WORKDIR@STEP, ...), whose encoder may
    be any with the same frames.  Its parameters are read once, when training begins, and are part of this run's
    checkpoints from then on (collection "teacher"); later only WORKDIR/config.json must still be there, and not even
    that to use the student.
    "random:layers=N" is the student's own kind of encoder with N layers and random parameters: it has nothing to
    teach, and needs no run.

    With `init_from_teacher` the student begins as the teacher: front end, projection, positions, as many of the first
    layers as it has, each of them if all its parameters agree in shape.  (A random teacher gives nothing.)  It
    overrides config.init_from.

    Raises UserError where the run cannot be read, lacks a layer, has other frames, or has nothing to begin with.
    """

    teacher: str
    layers: tuple[int, ...]
    cosine_weight: float
    feature_grad_scale: float
    init_from_teacher: bool

    def teacher_encoder(self) -> SpeechEncoder:
        """The teacher without parameters."""
        layers = _random_layers(self.teacher)
        # Not by clone, which would take the student's bound parts along.
        own = {name: getattr(self.encoder, name) for name in SpeechEncoder.__dataclass_fields__}
        block = {**own, "layers": layers} if layers else _model_block(self.teacher)
        teacher = SpeechEncoder(**{k: v for k, v in block.items() if k not in ("parent", "name")}, parent=None)
        if bad := [i for i in self.layers if not 0 < i <= teacher.layers]:
            raise UserError(
                f"config.task.layers={self.layers}: the teacher has layers 1 to {teacher.layers}, not {bad[0]}"
            )
        if teacher.frame_len() != self.encoder.frame_len():
            raise UserError(
                f"config.task.teacher={self.teacher!r}: its frames are {_frames(teacher)}, the student's "
                f"{_frames(self.encoder)}; make config.model.frontend the teacher's"
            )
        return teacher

    def start(self, params: Any, extra: Any) -> tuple[Any, Any]:
        """The teacher's parameters from its run, and the student's from the teacher."""
        if _random_layers(self.teacher):
            return params, extra
        self.teacher_encoder()  # its complaints are clearer
        checkpoint = find_checkpoint(self.teacher)
        theirs = read_weights(checkpoint)[0]["encoder"]
        if _shapes(theirs) != _shapes(extra["teacher"]["params"]):
            raise UserError(
                f"config.task.teacher={self.teacher!r}: {checkpoint} is not of the model in its config.json"
            )
        extra = {**extra, "teacher": {"params": theirs}}
        if self.init_from_teacher:
            params = {**params, "encoder": self._begun(params["encoder"], theirs)}
        return params, extra

    def _begun(self, student: Any, teacher: Any) -> Any:
        """The student's parameters, the teacher's where there are such."""
        ours: dict[str, Any] = flatten_dict(student, sep="/")
        taken = _matching(ours, flatten_dict(teacher, sep="/"))
        if not taken:
            raise UserError(
                f"config.task.teacher={self.teacher!r}: no part has the shape of the student's; set "
                "config.task.init_from_teacher=False, or make config.model more like the teacher's"
            )
        new = [k for k in ours if k not in taken]
        log.info(
            "%d of the student's %d parameter arrays are the teacher's; new: %s",
            len(taken), len(ours), ", ".join(new[:6]) + (", ..." if len(new) > 6 else "") or "none",
        )  # fmt: skip
        return unflatten_dict(ours | taken, sep="/")

    def __call__(self, batch: dict[str, jax.Array], *, step: jax.Array, train: bool) -> tuple[Sums, Sums]:
        outputs, targets, _, weight = self._regress(batch, train)
        n, L, one = jnp.sum(weight), len(self.layers), jnp.ones(())
        sums = {name: jnp.zeros(()) for name in ("l1", "cosine", "chance_l1", "chance_cosine", "chance_similarity")}
        metrics: Sums = {}
        target_variance, prediction_variance = jnp.zeros(()), jnp.zeros(())
        for layer, output, target in zip(self.layers, outputs, targets, strict=True):
            mean = jnp.einsum("btd,bt->d", target, weight) / jnp.maximum(n, 1)
            absolute, similarity = _compare(output, target, weight)
            chance_absolute, chance_similarity = _compare(mean[None, None], target, weight)
            sums["l1"] += absolute
            sums["cosine"] += self._cosine_loss(similarity, weight)
            sums["chance_l1"] += chance_absolute
            sums["chance_cosine"] += self._cosine_loss(chance_similarity, weight)
            sums["chance_similarity"] += jnp.sum(chance_similarity * weight)
            metrics[f"similarity_{layer}"] = (jnp.sum(similarity * weight), n)
            target_variance += mean_deviation(target, weight) / L
            prediction_variance += mean_deviation(lax.stop_gradient(output), weight) / L
        means: Sums = {name: (total / L, n) for name, total in sums.items()}
        losses = {name: means.pop(name) for name in ("l1", "cosine")}
        metrics |= means | {
            "target_variance": (target_variance, one),
            "prediction_variance": (prediction_variance, one),
        }
        return losses, metrics

    def _cosine_loss(self, similarity, weight):
        return -self.cosine_weight * jnp.sum(jax.nn.log_sigmoid(similarity) * weight)

    @nn.compact
    def _regress(self, batch, train) -> tuple[list[jax.Array], list[jax.Array], jax.Array, jax.Array]:
        """Predictions and targets of each layer, float32 [B, T, D]; lengths; 1 for frames of both, float32 [B, T]."""
        features, lengths = self.encoder.extract(batch)
        features = self.encoder.feature_norm(scale_gradient(features, self.feature_grad_scale))
        encoded = self.encoder.contextualize(features, lengths, train=train)
        frames = encoded.frames.astype(jnp.float32)

        teacher = self.teacher_encoder()
        params = self.variable("teacher", "params", lambda: self._first(teacher, batch))
        heard: Any = teacher.apply({"params": lax.stop_gradient(params.value)}, batch, train=False, hidden=True)
        if heard.frames.shape[1] != frames.shape[1]:
            raise UserError(
                f"config.task.teacher={self.teacher!r} makes {heard.frames.shape[1]} frames of what is "
                f"{frames.shape[1]} to the student; make config.model.frontend the teacher's"
            )
        targets = [heard.hidden[i].astype(jnp.float32) for i in self.layers]
        init, outputs = fan_in_uniform(self.encoder.width), []
        linear: dict[str, Any] = dict(kernel_init=init, bias_init=init, dtype=jnp.float32)
        for i in self.layers:
            hidden = gelu(nn.Dense(self.encoder.width, **linear, name=f"head{i}_in")(frames))
            outputs.append(nn.Dense(teacher.width, **linear, name=f"head{i}_out")(hidden))
        both = frame_mask(encoded.lengths, frames.shape[1]) & frame_mask(heard.lengths, frames.shape[1])
        return outputs, targets, encoded.lengths, both.astype(jnp.float32)

    def _first(self, teacher, batch):
        """Parameters before `start`: a random teacher's own; else NaN, so that none is learnt from by mistake."""
        key = self.make_rng("params")
        make = lambda: teacher.init(key, batch)["params"]  # noqa: E731
        if _random_layers(self.teacher):
            return make()
        return jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(make))

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows: the last predicted layer and its prediction [B, T, D]."""
        outputs, targets, lengths, _ = self._regress(batch, train=False)
        return dict(lengths=lengths, target=targets[-1], output=outputs[-1])

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        alarms = {}
        if metrics["chance_similarity"] > 0.999:
            alarms["teacher_collapsed"] = (
                "the teacher says nearly the same of every frame (cosine to the mean "
                f"{metrics['chance_similarity']:.4f}): it has collapsed; choose another run or @STEP"
            )
        if step >= 1000:
            true, guessed = metrics["target_variance"], metrics["prediction_variance"]
            if guessed < 0.1 * true:
                alarms["mean_prediction"] = (
                    f"predictions vary by {guessed:.3g}, the teacher by {true:.3g}: the student answers its mean; "
                    "lower optim.learning_rate, lengthen optim.warmup, or set task.init_from_teacher"
                )
            if metrics["l1"] > 0.98 * metrics["chance_l1"]:
                alarms["stuck_at_chance"] = (
                    f"distance {metrics['l1']:.3f} is that of the teacher's mean, {metrics['chance_l1']:.3f}: nothing "
                    "learnt yet; check the audio, then optim.learning_rate"
                )
        return alarms


def _compare(output: jax.Array, target: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum over frames of the mean distance, and the cosine of every frame: [B, T, D] x 2, [B, T] -> [], [B, T]."""
    absolute = jnp.sum(jnp.mean(jnp.abs(output - target), axis=2) * weight)
    return absolute, jnp.sum(unit(output) * unit(target), axis=2)


def _frames(encoder: SpeechEncoder) -> str:
    hop, extra = encoder.frame_len()
    return f"{hop + extra} samples every {hop}"


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat: dict[str, Any] = flatten_dict(tree, sep="/")
    return {path: tuple(x.shape) for path, x in flat.items()}


def _random_layers(teacher: str) -> int:
    """N of "random:layers=N", 0 for others."""
    found = re.fullmatch(r"random:layers=(\d+)", teacher)
    return int(found[1]) if found else 0


def _model_block(teacher: str) -> dict[str, Any]:
    """The model block of the run that `teacher` names a checkpoint of, though there may be none any more."""
    if not teacher:
        raise UserError("config.task.teacher is empty: name the --workdir of a trained run")
    workdir = Path(re.sub(r"@(\d+|best|newest)$", "", teacher)).expanduser()
    config: Any = read_config(workdir)
    try:
        return config["model"].to_dict()
    except (KeyError, AttributeError):
        raise UserError(f"config.task.teacher={teacher!r}: {workdir / 'config.json'} has no model block") from None


def _matching(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The parts of the encoder of which `theirs` has all arrays in the shapes of `ours`: {path: array}.

    Scanned layers are the same as layers one by one.
    """
    stack, single = "transformer/layers/", "transformer/layer{}/"
    apart = {k: v for k, v in theirs.items() if stack not in k}
    for k in theirs.keys() - apart.keys():
        apart |= {k.replace(stack, single.format(i)): x for i, x in enumerate(theirs[k])}
    found, other = {}, set[str]()
    for k, own in ours.items():
        paths = [k.replace(stack, single.format(i)) for i in range(own.shape[0])] if stack in k else [k]
        values = [apart[path] for path in paths if path in apart]
        shape = own.shape[1:] if stack in k else own.shape
        if len(values) == len(paths) and all(x.shape == shape for x in values):
            found[k] = jnp.asarray(np.stack(values) if stack in k else values[0], own.dtype)
        else:
            other.add(_part(k))
    # Half of a part is nonsense: the gains of another convolution, say.
    return {k: value for k, value in found.items() if _part(k) not in other}


def _part(path: str) -> str:
    """front, projection, transformer/positions, transformer/layer0, ..."""
    keys = path.split("/")
    return "/".join(keys[: 2 if keys[0] == "transformer" else 1])
