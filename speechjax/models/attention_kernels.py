"""Attention by fused kernels, which never hold all products of queries and keys: which one runs, and how.

Shapes: B batch, T frames, H heads, E head width.

    splash   TPU          no bias; packed rows, chunks        JAX's Pallas kernel of that name
    flash    TPU          a bias or none; packed rows         JAX's Pallas kernel of that name
    cudnn    NVIDIA GPU   bfloat16 or float16, whole rows     cuDNN's, through `jax.nn.dot_product_attention`

A kernel runs only where it computes what `attention` says of the valid frames; anything else is XLA's.  What it leaves
in padding is finite and has no effect, but is not what XLA leaves there.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from speechjax.errors import UserError
from speechjax.models.layers import frame_mask

IMPLS = ("auto", "xla", "splash", "flash", "cudnn")
PLATFORM = {"splash": "tpu", "flash": "tpu", "cudnn": "gpu"}
# Edge of the squares that the Pallas kernels compute at a time, at most.  With 768 those for heads of 256, or with a
# bias, no longer fit beside the registers' spill into the 16 MiB of vector memory of a TPU v4 or v5e.
BLOCK = 512

log = logging.getLogger("speechjax")


# ---- the choice


@dataclass(frozen=True)
class Call:
    """What decides on a kernel: the `platform` compiled for ("" if unknown), and what is asked of it there.

    `capability` is the compute capability of the GPU in this machine, 0 without one.  `recalled`: there are more keys
    than queries; `splits`: every device of the mesh gets whole rows and heads, as many as the others.
    """

    platform: str
    capability: float = 0.0
    dtype: str = "bfloat16"
    width: int = 64
    bias: bool = False
    dropout: bool = False
    prefix: bool = False
    recalled: bool = False
    packed: bool = False
    chunk: bool = False
    splits: bool = True


def choose(impl: str, call: Call) -> tuple[str, str]:
    """(what computes this call: "xla" or a kernel, the kernel that "auto" would rather have and why not, or "").

    "auto" takes splash on TPUs and cuDNN on GPUs.  Raises UserError where `impl` names a kernel that cannot.
    """
    if impl == "auto":
        kernel = {"tpu": "splash", "gpu": "cudnn"}.get(call.platform, "xla")
        reason = kernel != "xla" and obstacle(kernel, call)
        return ("xla", f"{kernel}: {reason}") if reason else (kernel, "")
    if impl != "xla" and (reason := obstacle(impl, call)):
        raise UserError(
            f"config.model.attention.impl={impl!r} does not fit here: {reason}; set config.model.attention.impl='auto'"
        )
    return impl, ""


def obstacle(kernel: str, call: Call) -> str:
    """Why `kernel` does not compute this call; "" where it does."""
    widest = 256 if call.capability >= 9 else 128  # of cuDNN, by the GPU
    bias = (call.bias, "it takes no bias, which config.model.attention.positions makes here")
    chunk = (call.chunk, "it knows no config.model.attention.chunk")
    reasons = [
        (call.platform != PLATFORM[kernel], f"it runs on a {PLATFORM[kernel].upper()}, not a {call.platform.upper()}"),
        (call.dropout, "it has no dropout, which config.model.attention_dropout=0 turns off"),
        (call.prefix, "it has no keys that all frames see, as prefix tuning adds"),
        (call.recalled, "it has as many keys as queries, unlike a stream"),
        (not call.splits, "the mesh does not divide the batch's rows and config.model.heads evenly"),
    ]
    reasons += {
        "splash": [
            bias,
            (
                call.chunk and call.packed,
                "its chunks do not begin anew in packed rows, which config.data.fill=False avoids",
            ),
            (call.width > 256, "its heads are at most 256 wide"),
        ],
        "flash": [chunk, (call.width > 128 and call.width != 256, "its heads are at most 128 wide, or 256")],
        "cudnn": [
            (call.capability < 8, "this machine has no GPU of compute capability 8.0 or more"),
            (call.dtype not in ("bfloat16", "float16"), "it takes half precision, as of config.model.dtype='bfloat16'"),
            bias,
            chunk,
            (call.packed, "it knows no packed rows, which config.data.fill=False avoids"),
            (call.width % 8 or call.width > widest, f"its heads are a multiple of 8 wide, at most {widest} here"),
        ],
    }[kernel]
    return next((reason for applies, reason in reasons if applies), "")


def target(impl: str) -> tuple[str, float]:
    """(platform, compute capability of the GPU in this machine) that a program being traced is compiled for.

    The mesh in context says it, also where its devices are not here.  Without a mesh a program may run anywhere, as
    exported ones do: then "auto" knows no platform, and for a kernel by name it is JAX's default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    # JAX 0.10.0 does not say the platform, which "auto" takes as unknown.
    platform = getattr(device, "platform", "") or ("" if impl == "auto" else jax.default_backend())
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
    if platform != "gpu" or jax.default_backend() != "gpu":
        return platform, 0.0
    try:
        return platform, float(jax.local_devices()[0].compute_capability)
    except (AttributeError, ValueError):  # of another maker
        return platform, 0.0


@functools.cache
def _say(message: str) -> None:
    """Once, not for every layer and program."""
    log.info("attention is XLA's instead of %s", message)


# ---- the call


def fused(
    impl: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lengths: jax.Array,
    bias: jax.Array | None,
    prefix: bool,
    chunk: int,
    left: int,
    dropout: bool,
) -> jax.Array | None:
    """`attention` by the kernel that `impl` says or "auto" finds, on all devices of the mesh; None where it is XLA's.

    `prefix` and `dropout` say whether there is one, and the rest is that of `attention`.
    """
    if impl == "xla":
        return None
    platform, capability = target(impl)
    if impl == "auto" and platform not in PLATFORM.values():
        return None
    mesh = jax.sharding.get_abstract_mesh()
    B, T, H, E = q.shape
    rows, heads = (1, 1) if mesh.empty else (mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"])
    call = Call(
        platform, capability, q.dtype.name, E, bias is not None, dropout, prefix, T != k.shape[1], lengths.ndim == 2,
        chunk > 0, B % rows == 0 and H % heads == 0,
    )  # fmt: skip
    kernel, reason = choose(impl, call)
    if reason:
        _say(reason)
    if kernel == "xla":
        return None
    run = {"splash": functools.partial(splash, chunk=chunk, left=left), "flash": flash, "cudnn": cudnn}[kernel]
    given = (q, k, v, lengths, *([] if bias is None else [bias]))
    if rows * heads == 1:
        return run(*given)
    # XLA cannot split a kernel: it runs on every device's own rows and heads.
    of_rows, of_heads = PartitionSpec(("data", "fsdp")), PartitionSpec(("data", "fsdp"), None, "tensor")
    specs = [of_heads, of_heads, of_heads, of_rows]
    if bias is not None:
        specs.append(
            PartitionSpec(None if len(bias) == 1 else ("data", "fsdp"), None if bias.shape[1] == 1 else "tensor")
        )
    return jax.shard_map(run, in_specs=tuple(specs), out_specs=of_heads, check_vma=False)(*given)


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, chunk: int = 0, left: int = -1
) -> jax.Array:
    """[B, T, H, E] three times, int32 [B] or [B, T] -> [B, T, H, E].  Blocks without any pair to see are skipped."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    T, H = q.shape[1:3]
    block, pad = _blocks(T)
    (q, k, v), ids = _by_head(q, k, v, pad), _segments(lengths, T, pad)
    mask = pallas.NumpyMask(_chunks(T + pad, chunk, left)) if chunk else pallas.FullMask((T + pad, T + pad))
    sizes: Any = dict.fromkeys(
        ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), block
    )
    kernel: Any = pallas.make_splash_mha(
        pallas.MultiHeadMask([mask] * H), head_shards=1, q_seq_shards=1, block_sizes=pallas.BlockSizes(**sizes)
    )
    y: Any = jax.vmap(kernel)(q, k, v, pallas.SegmentIds(ids, ids))
    return y.swapaxes(1, 2)[:, :T]


def flash(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """[B, T, H, E] three times, int32 [B] or [B, T], a bias that broadcasts to [B, H, T, T] -> [B, T, H, E].

    The bias, and its gradient, are held for every row and head, in float32.
    """
    from jax.experimental.pallas.ops.tpu import flash_attention as pallas

    B, T, H, _ = q.shape
    block, pad = _blocks(T)
    (q, k, v), ids = _by_head(q, k, v, pad), _segments(lengths, T, pad)
    if bias is not None:
        bias = jnp.pad(jnp.broadcast_to(bias, (B, H, T, T)), ((0, 0), (0, 0), (0, pad), (0, pad)))
    names = (
        "block_q", "block_k_major", "block_k", "block_q_major_dkv", "block_k_major_dkv", "block_k_dkv", "block_q_dkv",
        "block_k_major_dq", "block_k_dq", "block_q_dq",
    )  # fmt: skip
    sizes = pallas.BlockSizes(block_b=1, **dict.fromkeys(names, block))
    y = pallas.flash_attention(q, k, v, bias, pallas.SegmentIds(ids, ids), block_sizes=sizes)
    return y.swapaxes(1, 2)[:, :T]


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """[B, T, H, E] three times, int32 [B] -> [B, T, H, E], zero in padding.

    cuDNN promises nothing of what it leaves in padding, forward or backward: so none of it gets out.
    """
    valid = frame_mask(lengths, q.shape[1])[..., None, None]
    inside = lambda x: jnp.where(valid, x, jnp.zeros((), x.dtype))  # noqa: E731
    seen = jnp.maximum(lengths, 1)
    y = jax.nn.dot_product_attention(
        inside(q), inside(k), inside(v), query_seq_lengths=seen, key_value_seq_lengths=seen, implementation="cudnn"
    )
    return inside(y)


def _blocks(frames: int) -> tuple[int, int]:
    """(edge of a block, frames to add): as few equal blocks as cover all, their edge a multiple of 128."""
    count = -(-frames // BLOCK)
    block = -(-frames // (128 * count)) * 128
    return block, count * block - frames


def _by_head(q, k, v, pad):
    """[B, T, H, E] -> [B, H, T + pad, E] each, the queries scaled, as the kernels do not."""
    fill = lambda x: jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, pad), (0, 0)))  # noqa: E731
    return fill(q * q.shape[-1] ** -0.5), fill(k), fill(v)


def _segments(lengths, frames, pad):
    """Segment ids int32 [B, T + pad]: frames see those of their own id, so padding sees padding and stays finite."""
    ids = frame_mask(lengths, frames).astype(jnp.int32) if lengths.ndim == 1 else lengths
    return jnp.pad(ids, ((0, 0), (0, pad)))


def _chunks(frames: int, chunk: int, left: int) -> np.ndarray:
    """Which keys a query sees by their chunks: bool [T, T]."""
    number = np.arange(frames) // chunk
    behind = number[:, None] - number[None]
    return (behind >= 0) & ((behind <= left) | (left < 0))
