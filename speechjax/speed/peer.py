"""The same work in `transformers` and torch: a model of the same shape and with the same weights, on the same audio.

Training is the loop body of its example scripts: forward, backward, norm of the gradients (clipping, where the config
clips), AdamW.  Where that has a slower and a faster form of the same, it is the faster one: the fused AdamW, and the
loss divided by the number of masked frames instead of every gradient.  Wav2vec 2.0 is its Wav2Vec2ForPreTraining, with
masks and negatives drawn by its own functions; HuBERT and WavLM have no objective there and get one here, on its
encoder.  Audio is on the device from the start, as it is for us.

Shapes: B batch, S samples, T frames, M masked frames, K negatives, P projection, V codes.
"""

import contextlib
import functools
import gc
import importlib.util
import itertools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from speechjax.errors import UserError
from speechjax.formats.families import Family, family_of
from speechjax.formats.heads import Head, head_of
from speechjax.formats.names import Arrays, to_theirs
from speechjax.machine import threads
from speechjax.models.frontend import conv_out_len
from speechjax.paths import unstacked
from speechjax.speed.turns import Run
from speechjax.speed.work import Batch

VARIANTS = ("eager", "compile", "bf16", "bf16+compile")
AHEAD = 64  # masks that are made before an accelerator is timed; its loaders' workers would make them meanwhile


def check() -> None:
    """UserError where torch or transformers is not installed, or JAX computes where torch cannot."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--peer=hf: {name} is not installed: run `pip install torch transformers`")
    if (backend := jax.default_backend()) not in ("cpu", "gpu"):
        raise UserError(f"--peer=hf: JAX computes on {backend}, where torch cannot; JAX_PLATFORMS=cpu compares CPUs")


@functools.cache
def libraries() -> tuple[Any, Any]:
    """(torch, transformers), ready for `device()`; UserError where torch does not see it."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    if device() == "cpu":
        torch.set_num_threads(threads())
    elif torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # as JAX there
    else:
        raise UserError("--peer=hf: JAX computes on a GPU, where this torch cannot")
    return torch, transformers


class Translation:
    """A config and its parameters in the terms of `transformers`.  UserError where it has no class for the encoder."""

    def __init__(self, config: Any, params: Any):
        self.model, self.task = config.model.to_dict(), config.task.to_dict()
        self.leaves = unstacked(flatten_dict(jax.tree.map(np.asarray, dict(params)), sep="/"))
        try:
            self.family: Family = family_of(self.model, self.task["name"])
        except UserError:
            front, block = self.model["frontend"]["name"], self.model.get("block", {}).get("name", "transformer")
            raise UserError(f"--peer=hf: transformers has no class for this encoder ({front}, {block})") from None

    def encoder(self) -> Any:
        """Their encoder with our weights."""
        arrays, _ = to_theirs(self.family.encoder(self.model, ""), self.leaves)
        return self._built("Model", {}, arrays)

    def pretraining_head(self) -> Head | None:
        """Of their model with an objective; None where they have none."""
        head, _ = head_of(self.family, self.task, self.model["width"])
        return head if head is not None and head.suffix == "ForPreTraining" else None

    def pretraining(self) -> Any:
        """Their model with its own objective, our weights in it."""
        head, width = self.pretraining_head(), self.model["width"]
        assert head is not None
        arrays, _ = to_theirs(self.family.encoder(self.model, self.family.prefix), self.leaves)
        more, _ = to_theirs(head.rows(self.task, width), self.leaves)
        return self._built(head.suffix, head.write(self.task, width), arrays | more)

    def _built(self, suffix: str, block: Mapping[str, Any], arrays: Arrays) -> Any:
        torch, transformers = libraries()
        values = dict(mask_time_prob=0.05) | self.family.write(self.model) | dict(block)
        made = transformers.CONFIG_MAPPING[self.family.model_type](**values)
        model = getattr(transformers, self.family.stem + suffix)(made)
        state = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in arrays.items()}
        model.load_state_dict(state)
        return model.to(device())


_device = ""


def device() -> str:
    """Where torch computes, "cpu" or "cuda": where JAX does, unless `compute_on` has said it."""
    return _device or ("cuda" if jax.default_backend() == "gpu" else "cpu")


def compute_on(device: str) -> None:
    """For processes in which JAX must not start: it would take memory of the device."""
    global _device
    _device = device


def audio_of(config: Any, batch: Batch) -> Any:
    """float32 [B, S], normalised where the model wants it: their processors do that before any batch is made."""
    torch, _ = libraries()
    audio = batch["audio"].astype(np.float32) / 32768
    if config.model.frontend.normalize:
        inside = np.arange(audio.shape[1])[None] < batch["lengths"][:, None]
        audio = np.where(inside, (audio - batch["mean"][:, None]) / np.sqrt(batch["std"][:, None] ** 2 + 1e-7), 0)
    return torch.from_numpy(audio.astype(np.float32)).to(device())


def _autocast(variant: str) -> Any:
    torch, _ = libraries()
    return torch.autocast(device(), dtype=torch.bfloat16) if "bf16" in variant else contextlib.nullcontext()


def _compiled(module: Any, variant: str) -> Any:
    torch, _ = libraries()
    if "compile" not in variant:
        return module
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # it tells of each of their graph breaks, at length
    return torch.compile(module)


def _wait() -> None:
    torch, _ = libraries()
    if device() == "cuda":
        torch.cuda.synchronize()


def _free() -> None:
    """Returns what torch keeps of a GPU's memory for itself."""
    torch, _ = libraries()
    gc.collect()
    if device() == "cuda":
        torch.cuda.empty_cache()


class _Side:
    """What both sides below have."""

    def used_memory(self) -> int | None:
        """The most bytes of a GPU that torch has had in use at once; None on CPUs."""
        torch, _ = libraries()
        return int(torch.cuda.max_memory_allocated()) if device() == "cuda" else None


class TheirTraining(_Side):
    """Their training step on one batch, again and again; `losses` and `norms` of the first two steps are kept.

    Raises UserError where transformers has no class for the encoder, or nothing like the objective.
    """

    model: Any = None
    optimizer: Any = None
    _loss: Any = None
    _draw: Any = None

    def __init__(self, config: Any, params: Any, batch: Batch, variant: str):
        self.config, self.batch, self.variant = config, batch, variant
        self.translation = Translation(config, params)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.own = self.translation.pretraining_head() is not None
        if not self.own and config.task.name not in ("hubert", "wavlm"):
            raise UserError(
                f"--peer=hf: transformers trains no {config.task.name}; it can stand beside wav2vec2, hubert and "
                "wavlm, and in --what=inference beside most encoders on waveforms"
            )

    def open(self) -> Run:
        torch, _ = libraries()
        optim, audio = self.config.optim, audio_of(self.config, self.batch)
        np.random.seed(0)
        if self.own:
            self.model = self.translation.pretraining()
            self._loss, self._draw = _contrastive(self.model, audio, self.variant)
        else:
            units = _frame_units(self.config, self.batch)
            self.model, self._loss, self._draw = _masked_units(self.translation, audio, units, self.variant)
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=optim.learning_rate / max(optim.warmup, 1), betas=(optim.b1, optim.b2),
            eps=optim.eps, weight_decay=optim.weight_decay[0][1], fused=True,
        )  # fmt: skip
        if device() == "cuda":
            self._draw = drawn_ahead(self._draw, lambda x: x.pin_memory())
        return self.run

    def close(self) -> None:
        """Frees the model and all that belongs to it."""
        self.model = self.optimizer = self._loss = self._draw = None
        _free()

    def run(self, steps: int) -> None:
        """So many updates."""
        torch, _ = libraries()
        clip = self.config.optim.clip_norm or float("inf")
        for _ in range(steps):
            drawn = self._draw()
            with _autocast(self.variant):
                loss = self._loss(*drawn)
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            if clip < float("inf"):
                torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), clip, norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if len(self.losses) < 2:  # a GPU is waited for, so not in what is timed
                self.losses.append(loss.item())
                self.norms.append(norm.item())
        _wait()


def _contrastive(model: Any, audio: Any, variant: str) -> tuple[Callable, Callable]:
    """(loss of masks and negatives, what draws those) of their own wav2vec 2.0."""
    torch, _ = libraries()
    draw_mask, draw_negatives = _samplers()
    forward, hf = _compiled(model, variant), model.config
    shape = (audio.shape[0], int(model._get_feat_extract_output_lengths(audio.shape[1])))

    def draw() -> tuple[Any, ...]:
        mask = draw_mask(shape, hf.mask_time_prob, hf.mask_time_length)
        negatives = draw_negatives(shape, hf.num_negatives, mask)
        return torch.from_numpy(mask), torch.from_numpy(negatives), int(mask.sum())

    def loss(mask, negatives, count):
        mask, negatives = (x.to(device(), non_blocking=True) for x in (mask, negatives))
        return forward(audio, mask_time_indices=mask, sampled_negative_indices=negatives).loss / count

    return loss, draw


def _frame_units(config: Any, batch: Batch) -> np.ndarray:
    """The unit that begins where a frame does: int [B, T]."""
    hop = math.prod(config.model.frontend.strides)
    frames = conv_out_len(batch["audio"].shape[1], config.model.frontend.kernels, config.model.frontend.strides)
    return batch["units"][:, [t * hop // config.task.unit_hop for t in range(frames)]].astype(np.int64)


def _masked_units(
    translation: Translation, audio: Any, units: np.ndarray, variant: str
) -> tuple[Any, Callable, Callable]:  # fmt: skip
    """(model, loss of masks, what draws those): HuBERT's prediction of masked units [B, T] on their encoder."""
    torch, _ = libraries()
    draw_mask, _ = _samplers()
    encoder, task, leaves = translation.encoder(), translation.task, translation.leaves
    width, projection = leaves["project/kernel"].shape
    head = torch.nn.Linear(width, projection)
    weights = {"weight": leaves["project/kernel"].T, "bias": leaves["project/bias"]}
    head.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in weights.items()})
    codes = torch.nn.ParameterList([torch.from_numpy(np.array(leaves["code_vectors"]))])
    whole = torch.nn.ModuleDict({"encoder": encoder, "head": head, "codes": codes}).to(device())
    forward, unit = _compiled(encoder, variant), torch.nn.functional.normalize

    def draw() -> tuple[Any, ...]:
        mask = draw_mask(units.shape, task["mask_prob"], task["mask_span"])
        places = np.flatnonzero(mask)
        return tuple(map(torch.from_numpy, (mask, places, units.reshape(-1)[places])))

    def loss(mask, places, targets):
        mask, places, targets = (x.to(device(), non_blocking=True) for x in (mask, places, targets))
        frames = forward(audio, mask_time_indices=mask).last_hidden_state
        vectors = unit(whole["head"](frames.reshape(-1, width)[places]).float(), dim=-1)  # [M, P]
        logits = vectors @ unit(whole["codes"][0], dim=-1).T / task["logit_temperature"]  # [M, V]
        return torch.nn.functional.cross_entropy(logits.float(), targets)

    return whole, loss, draw


def _samplers() -> tuple[Callable, Callable]:
    """Their functions for masks (bool [B, T]) and negatives (int [B, T, K])."""
    from transformers.models.wav2vec2 import modeling_wav2vec2 as theirs  # pyright: ignore[reportMissingImports]

    return theirs._compute_mask_indices, theirs._sample_negative_indices


def drawn_ahead(draw: Callable, pin: Callable[[Any], Any]) -> Callable:
    """Repeats what was drawn before anything is timed; `pin` moves a tensor to where a GPU reads it by itself."""
    torch, _ = libraries()
    ahead = [tuple(pin(x) if torch.is_tensor(x) else x for x in draw()) for _ in range(AHEAD)]
    number = itertools.count()
    return lambda: ahead[next(number) % AHEAD]


class TheirEncoding(_Side):
    """Their encoder's forward pass on a padded batch with its mask, without gradients."""

    model: Any = None
    audio: Any = None
    mask: Any = None

    def __init__(self, config: Any, params: Any, batch: Batch, variant: str):
        self.config, self.batch, self.variant = config, batch, variant
        self.translation = Translation(config, params)

    def open(self) -> Run:
        torch, _ = libraries()
        self.model = _compiled(self.translation.encoder().eval(), self.variant)
        self.audio = audio_of(self.config, self.batch)
        inside = np.arange(self.audio.shape[1])[None] < self.batch["lengths"][:, None]
        # Without padding they need no mask, and are faster.
        self.mask = None if inside.all() else torch.from_numpy(inside.astype(np.int64)).to(device())
        return self.run

    def close(self) -> None:
        """Frees the model."""
        self.model = self.audio = self.mask = None
        _free()

    def run(self, steps: int) -> None:
        """So many passes."""
        for _ in range(steps):
            self._forward()
        _wait()

    def _forward(self) -> Any:
        torch, _ = libraries()
        with torch.inference_mode(), _autocast(self.variant):
            return self.model(self.audio, attention_mask=self.mask).last_hidden_state

    def frames(self) -> np.ndarray:
        """float32 [B, T, D]."""
        return self._forward().float().cpu().numpy()
