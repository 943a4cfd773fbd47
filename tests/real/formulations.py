"""A real run: what each formulation of a training step is worth, beside the plain one that it replaces.

    python tests/real/formulations.py --out=formulations.json
    python tests/real/formulations.py --overrides= --repeats=8      # wav2vec 2.0 Base as published

wav2vec 2.0 on the CPU, 2 x 5 s, float32.  Each variant changes one thing and trains in turns with ours; ratios are of
the samples of one round, variant / ours.  The first steps' losses must agree, where the variant draws what ours does.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from speechjax import config as configs
from speechjax.models import attention, frontend, layers, positions, transformer
from speechjax.models.layers import frame_mask
from speechjax.speed import work
from speechjax.speed.apart import Apart
from speechjax.speed.ours import Training
from speechjax.speed.turns import Contestant, spread, take_turns
from speechjax.tasks import _contrastive, wav2vec2
from speechjax.verb import keep_memory

CONFIG = str(Path(__file__).resolve().parents[2] / "configs/pretrain/wav2vec2.py")
SMALL = ("width=256", "layers=4", "heads=4", "mlp=1024", f"frontend.channels={(256,) * 7}")


class PlainGroupNorm(nn.Module):
    """Convolution, then statistics of its output: the parameters of `GroupNormConv`."""

    channels: int
    kernel: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, lengths):
        w = self.param("kernel", frontend.kernel_init, (self.kernel, 1, self.channels))
        scale = self.param("scale", nn.initializers.ones, (self.channels,))
        offset = self.param("bias", nn.initializers.zeros, (self.channels,))
        y = frontend._native_conv(x.astype(self.dtype), w.astype(self.dtype), self.stride)
        valid = frame_mask(lengths, y.shape[1])[..., None]
        count = jnp.maximum(lengths, 1).astype(jnp.float32)[:, None, None]
        mean = jnp.sum(jnp.where(valid, y, 0), axis=1, keepdims=True) / count
        variance = jnp.sum(jnp.where(valid, y - mean, 0) ** 2, axis=1, keepdims=True) / count
        return layers.gelu((y - mean) * lax.rsqrt(variance + 1e-5) * scale[None, None] + offset[None, None])


def native_grouped_conv(x, kernel, groups, frames_per_row=4, segments=None, causal=False):
    K = len(kernel)
    pad = (K - 1, 0) if causal else (K // 2, K - 1 - K // 2)
    return lax.conv_general_dilated(
        x, kernel, (1,), [pad], dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
    )


def gathered_contrast(context, target, code, slots, drawn, temperature):
    """Every negative as a vector of its own [B, M, K, P], as the published code has them."""
    found = _contrastive.contrast(context, target, code, slots, drawn, temperature)
    rows = jnp.arange(len(code), dtype=jnp.int32)[:, None, None]
    unit = lambda x: x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-16))  # noqa: E731
    positive = jnp.sum(unit(context) * unit(target), axis=-1) / temperature
    negative = jnp.sum(unit(context)[:, :, None] * unit(target[rows, drawn]), axis=-1) / temperature
    negative = jnp.where(code[:, :, None] == code[rows, drawn], _contrastive.EXCLUDED, negative)
    logits = jnp.concatenate([positive[..., None], negative], axis=-1)
    return found._replace(loss=jax.nn.logsumexp(logits, axis=-1) - positive)


def frames_before_heads(q, k, v, *, lengths, dropout=None, deterministic=True, **_):
    """Attention without what wav2vec 2.0 does not use, its products over [B, T, H, E]."""
    logits = jnp.einsum("bthe,bshe->bhts", q * q.shape[-1] ** -0.5, k)
    valid = frame_mask(lengths, k.shape[1])[:, None, None, :]
    weights = jax.nn.softmax(jnp.where(valid, logits, jnp.finfo(jnp.float32).min))
    weights = weights if dropout is None else dropout(weights, deterministic=deterministic)
    return jnp.einsum("bhts,bshe->bthe", weights, v)


def library_gelu(x):
    return jax.nn.gelu(x, approximate=False)


Change = tuple[Any, str, Any]  # (module, name, what stands there instead)
PLAIN: dict[str, tuple[list[Change], list[str]]] = {
    "group norm of the convolution's output": ([(frontend, "GroupNormConv", PlainGroupNorm)], []),
    "native grouped convolution for positions": ([(positions, "grouped_conv", native_grouped_conv)], []),
    "negatives gathered as vectors": ([(wav2vec2, "contrast", gathered_contrast)], []),
    "GELU of jax.nn": ([(module, "gelu", library_gelu) for module in (frontend, positions, transformer)], []),
    "native gradient of convolutions' weights": ([(frontend, "_conv", frontend._native_conv)], []),
    "attention over [B, T, H, E]": ([(attention, "attention", frames_before_heads)], []),
    "scan over layers": ([], ["model.scan=True"]),
    "scan over layers, all computed again": ([], ["model.scan=True", "model.remat=True"]),
}


def training(overrides: tuple[str, ...]) -> Training:
    config, _ = work.open_config(f"{CONFIG}:size=base", overrides, "", comparable=True)
    task = configs.make_task(config)
    return Training(config, work.make_batch(task, *work.shape_of(task, 10.0, 5.0, 1)))


class InItsOwnProcess:
    """Ours without `keep_memory`, which is for a whole process."""

    def __init__(self, overrides: tuple[str, ...]):
        self.overrides, self.side = overrides, None

    def open(self) -> None:
        self.side = training(self.overrides)
        self.side.open()

    def run(self, steps: int) -> None:
        assert self.side is not None
        self.side.run(steps)

    def first(self) -> dict[str, float]:
        return self.side.first if self.side else {}


def changed(changes: list[Change], side: Training) -> Callable[[int], Any]:
    """The step of `side`, traced while `changes` stand in their places."""
    before = [getattr(module, name) for module, name, _ in changes]
    try:
        for module, name, other in changes:
            setattr(module, name, other)
        return side.open()
    finally:
        for (module, name, _), old in zip(changes, before, strict=True):
            setattr(module, name, old)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--overrides", default=";".join(SMALL), help="of config.model, separated by ;")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    keep_memory()
    shared = tuple(f"model.{text}" for text in args.overrides.split(";") if text)
    sides: dict[str, Any] = {"ours": training(shared)}
    contestants = [Contestant("ours", sides["ours"].open)]
    for name, (changes, more) in PLAIN.items():
        sides[name] = training((*shared, *more))
        contestants.append(Contestant(name, functools.partial(changed, changes, sides[name])))
    other = "memory given back after every step"
    apart = Apart(InItsOwnProcess, shared)
    contestants.append(Contestant(other, apart.open, apart.close))
    timings = take_turns(contestants, args.repeats)

    ours, found = timings[0], {}
    print(f"ours: {1000 * ours.median:,.0f} ms, {sides['ours'].memory / 2**20:,.0f} MiB planned")
    print("| instead of ours | time, of ours | quartiles | memory, of ours | first loss |")
    print("|---|---|---|---|---|")
    for timing in timings[1:]:
        if timing.error:
            print(f"| {timing.name} | failed: {timing.error} |")
            continue
        ratios = spread([a / b for a, b in zip(timing.wall, ours.wall, strict=True)])
        first = (apart.ask("first") if timing.name == other else sides[timing.name].first)["loss"]
        memory = math.nan if timing.name == other else sides[timing.name].memory / sides["ours"].memory
        found[timing.name] = ratios | {"memory": memory, "first_loss": first}
        low, high = ratios["quartiles"]
        print(f"| {timing.name} | {ratios['median']:.2f} | {low:.2f}-{high:.2f} | {memory:.2f} | {first:.4f} |")
        np.testing.assert_allclose(first, sides["ours"].first["loss"], rtol=2e-3)
    apart.close()
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
