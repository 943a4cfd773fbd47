"""Span masks, masked slots and negatives: static shapes, inside jit, pure functions of a key.

Shapes: B batch, T frames, M masked slots, K negatives.  `lengths` is int32 [B], or [B, T] for packed rows (see
layers.py); each segment of a packed row is an utterance of its own.
"""

import jax
import jax.numpy as jnp


def span_mask(
    key: jax.Array, lengths: jax.Array, frames: int, *, prob: float, span: int, min_spans: int = 2
) -> jax.Array:
    """Which frames are masked: int32 [B] or [B, T] -> bool [B, T] (wav2vec 2.0 section 3.1, its published code).

    Each utterance of t valid frames gets floor(prob * t / span + U(0, 1)) spans, at least `min_spans`, at distinct
    starts; spans may overlap.  A start may be any frame whose span ends inside the utterance (the published code
    never masks the last frame).  So that no utterance is masked whole, at most floor((t - 1) / span) spans are
    drawn; utterances of up to `span` frames get none.
    """
    count_key, start_key = jax.random.split(key)
    u = jax.random.uniform(count_key, lengths.shape)
    # Integer scores: among 24-bit uniform floats ties would add a span to one row in ten thousand.
    score = jax.random.bits(start_key, (lengths.shape[0], frames), jnp.uint32) >> 1

    def draw(t, u, last_start):
        wanted = jnp.floor(prob / span * t.astype(jnp.float32) + u).astype(jnp.int32)
        count = jnp.minimum(jnp.maximum(wanted, min_spans), jnp.maximum(t - 1, 0) // span)
        eligible = jnp.arange(frames)[None, :] <= last_start
        return count, jnp.where(eligible, score, jnp.uint32(2**32 - 1))

    # A start is chosen if its score is among the `count` smallest of its utterance.
    if lengths.ndim == 1:
        count, score = draw(lengths, u, (lengths - span)[:, None])
        threshold = jnp.take_along_axis(jnp.sort(score, axis=1), jnp.maximum(count - 1, 0)[:, None], axis=1)
        start = (score <= threshold) & (count > 0)[:, None]
    else:
        # Everything by frame.  A sort within segments would need their number; counting smaller scores does not.
        same_BxTxT = (lengths[:, :, None] == lengths[:, None, :]) & (lengths > 0)[:, :, None]
        t, first = jnp.sum(same_BxTxT, axis=2), jnp.argmax(same_BxTxT, axis=2)
        count, score = draw(t, jnp.take_along_axis(u, first, axis=1), first + t - span)
        rank = jnp.sum(same_BxTxT & (score[:, None, :] < score[:, :, None]), axis=2)
        start = rank < count
    begun = jnp.cumsum(start.astype(jnp.int32), axis=1)
    ended = jnp.pad(begun, ((0, 0), (span, 0)))[:, :frames]
    return begun > ended


def max_masked(frames: int, *, prob: float, span: int, min_spans: int = 2, segments: int = 1) -> int:
    """The most frames `span_mask` can mask in a row of `frames`; the static number of masked slots.

    One utterance has at most max(prob * frames / span + 1, min_spans) spans.  Of several in a row, one of t frames
    has at most prob * t / span + 1; or it is given k <= min_spans spans where it has more than k * span frames,
    so at most prob * t / span + k * (1 - prob).  Summed over `segments`, the most a row may hold, that is
    prob * frames / span + segments * max(1, min_spans * (1 - prob)).
    """
    if segments == 1:
        spans = max(int(prob * frames / span + 1), min_spans)
    else:
        spans = int(prob * frames / span + segments * max(1, min_spans * (1 - prob)))
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


def slot_peers(lengths: jax.Array, positions: jax.Array, valid: jax.Array) -> jax.Array:
    """Which valid slots are of the same utterance as a slot, itself included: [B] or [B, T], `masked_slots` of it ->
    bool [B, 1, M] (one answer for the whole row) or [B, M, M].
    """
    peers = valid[:, None, :]
    if lengths.ndim == 1:
        return peers
    segment = jnp.take_along_axis(lengths, positions, axis=1)
    return peers & (segment[:, :, None] == segment[:, None, :])


def sample_negatives(key: jax.Array, peers: jax.Array, negatives: int) -> jax.Array:
    """For every masked slot, other slots of its own utterance: `slot_peers` bool [B, 1 or M, M] -> int32 [B, M, K].

    Uniform with replacement over the slot's peers, a run of slots, without the slot itself (drawn from one fewer
    and shifted past it).  Slots without another peer have no negative; theirs point anywhere and must be masked by
    the caller.
    """
    B, _, slots = peers.shape
    u = jax.random.uniform(key, (B, slots, negatives))
    others = jnp.maximum(jnp.sum(peers, axis=2) - 1, 1)[..., None]
    # u * others may round up to `others` in float32.
    drawn = jnp.minimum(jnp.floor(u * others.astype(jnp.float32)).astype(jnp.int32), others - 1)
    drawn = drawn + jnp.argmax(peers, axis=2)[..., None]
    own = jnp.arange(slots, dtype=jnp.int32)[None, :, None]
    return jnp.minimum(drawn + (drawn >= own).astype(jnp.int32), slots - 1)
