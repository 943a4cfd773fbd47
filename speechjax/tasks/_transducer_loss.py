"""Losses of transducers: plain (Graves 2012, arXiv 1211.3711) and with durations (Xu et al. 2023, arXiv 2304.06795).

Shapes: B batch, T frames, U tokens, J width of the joiner, V vocabulary with the blank, R durations.  Everywhere:
`lengths` int32 [B] valid frames, `tokens` int32 [B, U] of which the first `token_lengths` [B] are the transcript.

The logits of all frames with all prefixes of the text, [B, T, U + 1, V + R], would outgrow every other array of a
training step: 8 rows of 30 s at 20 ms with 200 tokens of 1,000 kinds take 9 GiB.  They are computed for a few frames at
a time, in the backward pass anew; what is kept of them is the log-probability of the blank, of the one right token and
of each duration.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import gammaln

from speechjax.models.layers import frame_mask, scale_gradient
from speechjax.models.transducer import BLANK

Join = Callable[[jax.Array, jax.Array], jax.Array]

# The logarithm of nothing.  Finite, so that differences and gradients where there is no path are, too.
_NEVER = -1e30


def fits(lengths: jax.Array, token_lengths: jax.Array, durations: Sequence[int] = ()) -> jax.Array:
    """bool [B]: there is a transcript, and frames enough for it and a last blank."""
    shortest = min(durations, default=0)
    return (token_lengths > 0) & (lengths > shortest * token_lengths)


def transducer_loss(
    join: Join, frames: jax.Array, texts: jax.Array, lengths: jax.Array, tokens: jax.Array, token_lengths: jax.Array,
    *, durations: Sequence[int] = (), chunk: int, sigma: float = 0.0, fastemit: float = 0.0,
) -> jax.Array:  # fmt: skip
    """Negative log-likelihood of each transcript in nats, float32 [B]; 0, also in its gradient, where it does not fit.

    `join` makes logits [..., V + R] of `frames` [B, T, J] and `texts` [B, U + 1, J], `chunk` frames at a time.  Without
    `durations` a blank goes to the next frame and a token stays; with them (ascending, 1 among them) either goes as
    many frames on as the duration says that is drawn beside it, a blank never 0, and a blank ends exactly behind the
    last frame.

    `sigma` is taken off the log-probabilities of tokens and blanks (logit under-normalization, Xu et al.: the fewer
    steps, the better).  `fastemit` adds so much of the gradient of the tokens, not of the blanks, and leaves the value
    (FastEmit, Yu et al. 2021, arXiv 2010.11148).
    """
    arcs = _arcs(join, frames, texts, tokens, durations, chunk)
    arcs = jnp.concatenate([arcs[..., :2] - sigma, arcs[..., 2:]], axis=-1) if sigma else arcs
    if fastemit:
        faster = scale_gradient(arcs[..., 1:2], 1 + fastemit)
        arcs = jnp.concatenate([arcs[..., :1], faster, arcs[..., 2:]], axis=-1)
    loss = -log_likelihood(arcs, lengths, token_lengths, durations)
    return jnp.where(fits(lengths, token_lengths, durations), loss, 0)


def _arcs(join: Join, frames, texts, tokens, durations, chunk) -> jax.Array:
    """Log-probabilities of the blank, the next token and each duration: float32 [B, T, U + 1, 2 + R]."""
    B, T, J = frames.shape
    chunk = min(chunk, T)
    parts = -(-T // chunk)
    x = jnp.pad(frames, ((0, 0), (0, parts * chunk - T), (0, 0))).reshape(B, parts, chunk, J)
    following = jnp.pad(tokens, ((0, 0), (0, 1)))[:, None, :, None]  # none after the last: its arc leads nowhere

    @jax.checkpoint
    def score(part):
        logits = join(part[:, :, None], texts[:, None]).astype(jnp.float32)
        V = logits.shape[-1] - len(durations)
        words = logits[..., :V]
        # A sum over all but one zeros, because the gradient of a gather is a scatter.
        right = jnp.sum(jnp.where(following == jnp.arange(V)[None, None, None], words, 0), axis=3)
        two = jnp.stack([words[..., BLANK], right], axis=3) - jax.nn.logsumexp(words, axis=3, keepdims=True)
        return jnp.concatenate([two, jax.nn.log_softmax(logits[..., V:])], axis=3) if durations else two

    scores = jnp.moveaxis(lax.map(score, jnp.moveaxis(x, 1, 0)), 0, 1)
    return scores.reshape(B, parts * chunk, *scores.shape[3:])[:, :T]


def log_likelihood(
    arcs: jax.Array, lengths: jax.Array, token_lengths: jax.Array, durations: Sequence[int] = ()
) -> jax.Array:
    """Logarithm of the sum over all alignments, float32 [B], from log-probabilities of steps [B, T, U + 1, 2 + R].

    The last axis: blank, next token, durations.  Forward variables go by diagonals of equal t + u, because all steps
    lead from one diagonal to later ones and none within.  About -1e30 where there is no alignment.
    """
    B, _, prefixes, _ = arcs.shape
    diagonals = jnp.pad(_skew(arcs), ((0, 1), (0, 0), (0, 0), (0, 0)))  # one more, for the ends
    column = jnp.arange(prefixes, dtype=jnp.int32)[None]

    @jax.checkpoint  # the forward variables are kept for the backward pass, what they are made of is not
    def step(pending, now):
        """pending[k] [B, U + 1]: the parts of the forward variable of diagonal n + k that are known by now."""
        n, arc = now
        alpha = pending[0]
        ending = jnp.take_along_axis(alpha, token_lengths[:, None], axis=1)[:, 0]
        later = [*pending[1:], jnp.full_like(alpha, _NEVER)]
        blank, token = (alpha + arc[..., i] for i in (0, 1))
        for i, frames in enumerate(durations):
            of_duration = arc[..., 2 + i]
            if frames:
                later[frames - 1] = _add(later[frames - 1], blank + of_duration)
            later[frames] = _add(later[frames], _emitted(token + of_duration, n - column + frames, lengths))
        if not durations:
            later[0] = _add(_add(later[0], blank), _emitted(token, n - column, lengths))
        return later, ending

    pending = [jnp.full((B, prefixes), _NEVER) for _ in range(max(durations, default=0) + 1)]
    pending[0] = pending[0].at[:, 0].set(0)
    _, endings = lax.scan(step, pending, (jnp.arange(len(diagonals), dtype=jnp.int32), diagonals))
    return jnp.take_along_axis(endings, (lengths + token_lengths)[None], axis=0)[0]


def _skew(x: jax.Array) -> jax.Array:
    """[B, T, N, A] -> [T + N - 1, B, N, A] whose [n, :, u] is x[:, n - u, u], or 0 where there is none."""
    B, T, N, A = x.shape
    x = jnp.pad(x.transpose(2, 1, 0, 3), ((0, 0), (0, N), (0, 0), (0, 0)))  # rows of T + N, read as rows of one less
    x = x.reshape(N * (T + N), B, A)[: N * (T + N - 1)].reshape(N, T + N - 1, B, A)
    return x.transpose(1, 2, 0, 3)


def _add(a: jax.Array, b: jax.Array) -> jax.Array:
    """log(exp(a) + exp(b)), whose two derivatives add up to 1.

    Those of `jnp.logaddexp` do not where the values are in the thousands, since they are made of the rounded sum: over
    1,200 steps the gradient was off by 4e-3, and this way by 2e-6.
    """
    return jnp.maximum(a, b) + jnp.log1p(jnp.exp(-jnp.abs(a - b)))


def _emitted(token: jax.Array, lands: jax.Array, lengths: jax.Array) -> jax.Array:
    """Steps with a token, at the prefix they lead to; after one there must be a frame, for the blank that ends."""
    inside = jnp.where(lands < lengths[:, None], token, _NEVER)
    return jnp.pad(inside, ((0, 0), (1, 0)), constant_values=_NEVER)[:, :-1]


def token_frames(
    join: Join, frames: jax.Array, texts: jax.Array, lengths: jax.Array, tokens: jax.Array, token_lengths: jax.Array,
    *, durations: Sequence[int] = (), chunk: int,
) -> jax.Array:  # fmt: skip
    """The frame in which each token is likeliest emitted, once the transcript is known: int32 [B, U], -1 for none.

    The derivative of the log-likelihood by the log-probability of a step is the share of the alignments through it.
    """
    arcs = lax.stop_gradient(_arcs(join, frames, texts, tokens, durations, chunk))
    shares = jax.grad(lambda x: jnp.sum(log_likelihood(x, lengths, token_lengths, durations)))(arcs)[..., 1]
    likeliest = jnp.argmax(shares, axis=1).astype(jnp.int32)[:, :-1]
    known = frame_mask(token_lengths, tokens.shape[1]) & fits(lengths, token_lengths, durations)[:, None]
    return jnp.where(known, likeliest, -1)


def constant_loss(
    classes: int, lengths: jax.Array, tokens: jax.Array, token_lengths: jax.Array, durations: Sequence[int] = ()
) -> jax.Array:
    """`transducer_loss` [B] of who says the same of every frame and prefix: tokens as often as this batch has them.

    Without durations that is the best such guess: all C(T + U - 1, U) alignments are alike.  With durations it is the
    best of those that always say 1, C(T - 1, U) alignments.  Rows with no frame for each token and a
    last blank, which need other durations, pay for their tokens alone.
    """
    keep = fits(lengths, token_lengths, durations)
    inside = frame_mask(token_lengths, tokens.shape[1]) & keep[:, None]
    spoken = jnp.sum(jax.nn.one_hot(jnp.where(inside, tokens, -1), classes), axis=(0, 1))
    words = jnp.log(jnp.maximum(spoken / jnp.maximum(jnp.sum(spoken), 1), jnp.finfo(jnp.float32).tiny))
    of_words = jnp.sum(jnp.where(inside, words[tokens], 0), axis=1)

    counts = keep & (lengths > token_lengths) if durations else keep
    T, U = (jnp.where(counts, x, 0).astype(jnp.float32) for x in (lengths, token_lengths))
    blanks = T - U if durations else T
    steps = blanks + U  # the last of them a blank
    share = jnp.sum(blanks) / jnp.maximum(jnp.sum(steps), 1)
    ways = gammaln(jnp.maximum(steps, 1)) - gammaln(U + 1) - gammaln(jnp.maximum(blanks, 1))
    of_steps = ways + jax.scipy.special.xlogy(blanks, share) + jax.scipy.special.xlog1py(U, -share)
    return -jnp.where(keep, of_words + jnp.where(counts, of_steps, 0), 0)
