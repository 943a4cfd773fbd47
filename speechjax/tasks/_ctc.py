"""Connectionist temporal classification (Graves et al. 2006): transcripts without times, and what goes wrong with them.

Shapes: B batch, T frames, V symbols (the blank is one), U tokens.  Everywhere: `logits` [B, T, V] with `lengths` int32
[B] valid frames, `tokens` int32 [B, U] of which the first `token_lengths` [B] are the transcript.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax import lax

from speechjax.models.layers import frame_mask
from speechjax.tasks._base import Sums

BLANK = 0  # <pad> of every vocabulary (speechjax.data.text)


def fits(lengths: jax.Array, tokens: jax.Array, token_lengths: jax.Array) -> jax.Array:
    """bool [B]: there is a transcript, and the row has a frame for each token and for a blank between equal ones."""
    inside = frame_mask(token_lengths, tokens.shape[1])[:, 1:]
    repeats = jnp.sum((tokens[:, 1:] == tokens[:, :-1]) & inside, axis=1)
    return (token_lengths > 0) & (lengths >= token_lengths + repeats)


def ctc_loss(logits: jax.Array, lengths: jax.Array, tokens: jax.Array, token_lengths: jax.Array) -> jax.Array:
    """Negative log-likelihood of each transcript in nats, float32 [B]; 0, also in its gradient, where it does not fit.

    float32 whatever `logits` are: in 16 bits the sums over paths lose short tokens.
    """
    keep = fits(lengths, tokens, token_lengths)
    # Rows that do not fit pass as empty transcripts: impossible ones have finite losses too, around 1e5, but not 0.
    label_paddings = 1 - (frame_mask(token_lengths, tokens.shape[1]) & keep[:, None]).astype(jnp.float32)
    paddings = 1 - frame_mask(lengths, logits.shape[1]).astype(jnp.float32)
    with jax.default_matmul_precision("float32"):  # optax picks the log-probabilities by a product with one-hots
        loss = optax.ctc_loss(logits.astype(jnp.float32), paddings, tokens, label_paddings, blank_id=BLANK)
    return jnp.where(keep, loss, 0)


def constant_loss(
    symbols: int, frames: int, lengths: jax.Array, tokens: jax.Array, token_lengths: jax.Array
) -> jax.Array:
    """`ctc_loss` [B] of who says the same of every frame: blank, or a token as often as this batch has it."""
    keep = fits(lengths, tokens, token_lengths)
    inside = frame_mask(token_lengths, tokens.shape[1]) & keep[:, None]
    spoken = jnp.sum(jax.nn.one_hot(jnp.where(inside, tokens, -1), symbols), axis=(0, 1))
    blanks = jnp.sum(jnp.where(keep, lengths - token_lengths, 0)).astype(jnp.float32)
    share = (spoken.at[BLANK].add(blanks)) / jnp.maximum(jnp.sum(spoken) + blanks, 1)
    constant = jnp.log(jnp.maximum(share, jnp.finfo(jnp.float32).tiny))
    return ctc_loss(jnp.broadcast_to(constant, (len(lengths), frames, symbols)), lengths, tokens, token_lengths)


def score(
    logits: jax.Array, lengths: jax.Array, tokens: jax.Array, token_lengths: jax.Array, weight: float = 1.0
) -> tuple[Sums, Sums]:
    """The loss of a CTC head in nats a token, times `weight`, and what it is worth: ({loss}, {metric: (sum, weight)}).

    Chance is who says the same of every frame.  Rows without a transcript carry nothing, nor do those that do not fit,
    `too_long_share`.  `error_rate` is that of the best path: (substitutions + insertions + deletions) / tokens.
    """
    text = tokens, token_lengths
    there, fitting = token_lengths > 0, fits(lengths, *text)
    frames = frame_mask(lengths, logits.shape[1]) & there[:, None]
    blank = frames & (jnp.argmax(logits, axis=2) == BLANK)
    total = lambda x: jnp.sum(x).astype(jnp.float32)  # noqa: E731
    n = total(jnp.where(fitting, token_lengths, 0))
    weighted = lambda loss: (weight * jnp.sum(loss), n)  # noqa: E731
    errors = greedy_errors(lax.stop_gradient(logits), lengths, *text)
    metrics = {
        "chance_ctc": weighted(constant_loss(logits.shape[2], logits.shape[1], lengths, *text)),
        "error_rate": (total(jnp.where(there, errors, 0)), total(token_lengths)),
        "blank_share": (total(blank), total(frames)),
        "too_long_share": (total(there & ~fitting), total(there)),
    }
    return {"ctc": weighted(ctc_loss(logits, lengths, *text))}, metrics


def alignment(logits: jax.Array, lengths: jax.Array, tokens: jax.Array, token_lengths: jax.Array) -> jax.Array:
    """The symbol of every frame that is likeliest once the transcript is known: int32 [B, T], -1 for none.

    What the model says of a frame, less the gradient of the loss, is the share of the transcript's paths through each
    symbol (Graves et al. 2006, section 4.2).  None: padding, and rows whose transcript does not fit.
    """
    logits = logits.astype(jnp.float32)
    gradient = jax.grad(lambda x: jnp.sum(ctc_loss(x, lengths, tokens, token_lengths)))(logits)
    likeliest = jnp.argmax(jax.nn.softmax(logits) - gradient, axis=2).astype(jnp.int32)
    known = frame_mask(lengths, logits.shape[1]) & fits(lengths, tokens, token_lengths)[:, None]
    return jnp.where(known, likeliest, -1)


def greedy_errors(logits: jax.Array, lengths: jax.Array, tokens: jax.Array, token_lengths: jax.Array) -> jax.Array:
    """Substitutions, insertions and deletions from the transcript to the best path, int32 [B].

    Best path: the likeliest symbol of every frame, repeats merged, blanks left out.
    """
    best = jnp.argmax(logits, axis=2).astype(tokens.dtype)
    before = jnp.pad(best, ((0, 0), (1, 0)), constant_values=BLANK)[:, :-1]
    emits = frame_mask(lengths, logits.shape[1]) & (best != BLANK) & (best != before)
    column = jnp.arange(tokens.shape[1] + 1, dtype=jnp.int32)[None]

    def read(row, frame):
        """One more symbol: row[b, u] is the distance to the first u tokens, as in Wagner and Fischer 1974."""
        symbol, emitted = frame
        replaced = row[:, :-1] + (tokens != symbol[:, None]).astype(jnp.int32)
        found = jnp.concatenate([row[:, :1] + 1, jnp.minimum(row[:, 1:] + 1, replaced)], axis=1)
        # A missing token costs 1 from the column before: a running minimum, once the slope is out.
        found = lax.cummin(found - column, axis=1) + column
        return jnp.where(emitted[:, None], found, row), None

    start = jnp.broadcast_to(column, (len(lengths), column.shape[1]))
    rows, _ = lax.scan(read, start, (best.T, emits.T))
    return jnp.take_along_axis(rows, token_lengths[:, None], axis=1)[:, 0]


def alarms(metrics: Mapping[str, float], step: int) -> dict[str, str]:
    """Known ways CTC fails, {alarm: message}, from one log window's metrics."""
    found = {}
    if metrics["transcribed_share"] < 0.25:
        found["untranscribed"] = (
            f"only {metrics['transcribed_share']:.0%} of the rows have a transcript, the others teach nothing; crops "
            "have none: raise config.data.crop_seconds, or take a source with more transcripts"
        )
    if metrics["too_long_share"] > 0.05:
        found["too_long"] = (
            f"{metrics['too_long_share']:.0%} of the transcripts have more tokens than the row has frames, and are "
            "left out: subsample less in config.model.frontend, or use larger tokens in config.data.text"
        )
    if step >= 1000:  # before, saying nothing is a stage every run goes through
        if metrics["blank_share"] > 0.99:
            found["only_blanks"] = (
                f"{metrics['blank_share']:.1%} of the frames are blank: CTC is stuck at saying nothing; lower "
                "optim.learning_rate or lengthen optim.warmup, and check config.model.frontend.normalize"
            )
        if metrics["ctc"] > 0.98 * metrics["chance_ctc"]:
            found["stuck_at_chance"] = (
                f"loss {metrics['ctc']:.3f} a token is that of who does not listen, {metrics['chance_ctc']:.3f}: do "
                "the transcripts belong to this audio? Then check the learning rate"
            )
    return found
