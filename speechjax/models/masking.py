"""Span masks, masked slots and negatives: static shapes, inside jit, pure functions of a key.

Shapes: B batch, T frames, M masked slots, K negatives.
"""

import jax
import jax.numpy as jnp


def span_mask(
    key: jax.Array, lengths: jax.Array, frames: int, *, prob: float, span: int, min_spans: int = 2
) -> jax.Array:
    """Which frames are masked: int32 [B] -> bool [B, T] (wav2vec 2.0 section 3.1 and its published code).

    Each utterance of t valid frames gets floor(prob * t / span + U(0, 1)) spans, at least `min_spans`, at distinct
    starts; spans may overlap.  A start may be any frame whose span ends inside the utterance (the published code
    never masks the last frame).  So that no utterance is masked whole, at most floor((t - 1) / span) spans are
    drawn; utterances of up to `span` frames get none.
    """
    count_key, start_key = jax.random.split(key)
    u = jax.random.uniform(count_key, lengths.shape)
    wanted = jnp.floor(prob / span * lengths.astype(jnp.float32) + u).astype(jnp.int32)
    count = jnp.minimum(jnp.maximum(wanted, min_spans), jnp.maximum(lengths - 1, 0) // span)
    # Integer scores: among 24-bit uniform floats ties would add a span to one row in ten thousand.
    score = jax.random.bits(start_key, (lengths.shape[0], frames), jnp.uint32) >> 1
    eligible = jnp.arange(frames)[None, :] <= (lengths - span)[:, None]
    score = jnp.where(eligible, score, jnp.uint32(2**32 - 1))
    # A start is chosen if its score is among the `count` smallest of its row.
    threshold = jnp.take_along_axis(jnp.sort(score, axis=1), jnp.maximum(count - 1, 0)[:, None], axis=1)
    start = (score <= threshold) & (count > 0)[:, None]
    begun = jnp.cumsum(start.astype(jnp.int32), axis=1)
    ended = jnp.pad(begun, ((0, 0), (span, 0)))[:, :frames]
    return begun > ended


def max_masked(frames: int, *, prob: float, span: int, min_spans: int = 2) -> int:
    """The most frames `span_mask` can mask in a row of `frames`; the static number of masked slots."""
    spans = max(int(prob * frames / span + 1), min_spans)
    return max(1, min(frames, spans * span))


def masked_slots(mask: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """Positions of the masked frames in order: bool [B, T] -> (int32 [B, M], valid bool [B, M])."""
    B, T = mask.shape
    rank = jnp.where(mask, jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, slots)
    rows = jnp.arange(B, dtype=jnp.int32)[:, None]
    frames = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    positions = jnp.zeros((B, slots), jnp.int32).at[rows, rank].set(frames, mode="drop")
    valid = jnp.arange(slots)[None, :] < jnp.sum(mask, axis=1)[:, None]
    return positions, valid


def sample_negatives(key: jax.Array, counts: jax.Array, slots: int, negatives: int) -> jax.Array:
    """For every masked slot, other masked slots of its own utterance: int32 [B] -> int32 [B, M, K].

    Uniform with replacement over the `counts` valid slots without the slot itself (drawn from one fewer and
    shifted past it).  Rows with fewer than two slots have no negative; theirs point at slot 0 or 1 and must be
    masked by the caller.
    """
    u = jax.random.uniform(key, (counts.shape[0], slots, negatives))
    others = jnp.maximum(counts - 1, 1)[:, None, None]
    # u * others may round up to `others` in float32.
    drawn = jnp.minimum(jnp.floor(u * others.astype(jnp.float32)).astype(jnp.int32), others - 1)
    own = jnp.arange(slots, dtype=jnp.int32)[None, :, None]
    return jnp.minimum(drawn + (drawn >= own).astype(jnp.int32), slots - 1)
