"""Decoding a token at a time: greedy, beam search and sampling with any team of `Scorer`s; CTC's prefix scores as one.

A search maximises the weighted sum of its scorers' scores.  So an attention decoder (`NeuralScorer.listening`) alone,
joint with CTC (`CTCPrefixScorer`; weights 1 - w and w), or fused with a language model are one and the same search:
`scorers` is a sequence of (scorer, weight), weights being numbers of Python.  All of it is for use inside jit.

Shapes: B batch, K beams, N hypotheses, M most tokens, T frames, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from speechjax.decode.neural_scorer import EOS
from speechjax.decode.types import SPECIALS, Hypotheses, Scorer, or_unfinished
from speechjax.errors import UserError

Team = Sequence[tuple[Scorer, float]]


class _Search(NamedTuple):
    """Beams of `number` tokens: states of the scorers, `tokens` [B, K, M], `live` scores [B, K]; and who has ended."""

    number: jax.Array
    states: tuple[Any, ...]
    tokens: jax.Array
    live: jax.Array
    ended: Hypotheses


def beam_search(
    scorers: Team, limits: jax.Array, *, max_tokens: int, beams: int, best: int = 1, alpha: float = 0.0
) -> Hypotheses:
    """The `best` sequences found with `beams` unfinished ones at a time, of at most `limits` int32 [B] tokens.

    What is maximised is the score divided by ((5 + n) / 6)^alpha, n the number of tokens and </s> (Wu et al. 2016,
    equation 14): 0 is the plain sum, which is for shorter sequences than larger `alpha`.

    At every length each unfinished hypothesis is also tried with its end, so ends do not compete for beams.  A row is
    done when no hypothesis of it can be among the `best` any more, provided that no later score is above 0; with
    bonuses (hot words) that is a heuristic.  `limits` may be the rows' frames: then a row without any is empty.  A row
    in which scorers let none end has those that reach its limit, as they are: they may end within a word.

    Raises UserError for scorers of different vocabularies.
    """
    team, B = _team(scorers), limits.shape[0]
    limits = jnp.minimum(limits, max_tokens)
    normaliser = lambda n: ((6 + n).astype(jnp.float32) / 6) ** alpha  # noqa: E731 - n tokens without </s>

    def grow(search: _Search) -> _Search:
        number, live = search.number, search.live
        ended = live + _total(team, search.states, "final")
        none = jnp.all(search.ended.scores == -jnp.inf, axis=1)
        cut = jnp.where((none & (number >= limits))[:, None], live, -jnp.inf)
        found = _merge(search, or_unfinished(ended, cut) / normaliser(number))
        # Scores fall from here on, and divided by more a negative one rises: by most, at the limit.
        best_live = jnp.max(live, axis=1)
        bound = best_live / jnp.where(best_live < 0, normaliser(limits), normaliser(number + 1))
        done = (number >= limits) | (found.scores[:, -1] >= bound)
        live = jnp.where(done[:, None], -jnp.inf, live)

        totals = live[..., None] + _total(team, search.states, "scores").at[..., :SPECIALS].set(-jnp.inf)
        V = totals.shape[2]
        live, at = lax.top_k(totals.reshape(B, -1), beams)
        parents, token = at // V, at % V
        token = jnp.where(live > -jnp.inf, token, -1)  # of what is dead scorers need make no sense
        tokens, states = _of_parents((search.tokens, search.states), parents)
        tokens = tokens.at[:, :, number].set(token, mode="drop")
        states = tuple(s.advance(x, token) for (s, _), x in zip(team, states, strict=True))
        return _Search(number + 1, states, tokens, live, found)

    first = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)[None]
    start = _Search(
        number=jnp.int32(0),
        states=tuple(s.start(B, beams) for s, _ in team),
        tokens=jnp.zeros((B, beams, max_tokens), jnp.int32),
        live=jnp.broadcast_to(first, (B, beams)),
        ended=_hypotheses(
            jnp.zeros((B, best, max_tokens), jnp.int32), jnp.zeros((B, best), jnp.int32), jnp.full((B, best), -jnp.inf)
        ),
    )
    return lax.while_loop(lambda search: jnp.any(search.live > -jnp.inf), grow, start).ended


def greedy(scorers: Team, limits: jax.Array, *, max_tokens: int) -> Hypotheses:
    """The best next token again and again, until that is </s>, or `limits` int32 [B] tokens are there: N is 1."""
    return _roll(scorers, limits, max_tokens, 1, lambda logits, _: jnp.argmax(logits, axis=2))


def sample(
    scorers: Team, limits: jax.Array, key: jax.Array, *, max_tokens: int, samples: int, temperature: float = 1.0,
    top_k: int = 0, top_p: float = 1.0,
) -> Hypotheses:  # fmt: skip
    """`samples` independent sequences for every row, the likeliest first; `limits` int32 [B].

    Scores are divided by `temperature`, then all but the `top_k` best tokens are left out (0: none), then all but the
    fewest that together have `top_p` of the probability (nucleus sampling, Holtzman et al. 2020, section 3.1).  The
    scores of the result know nothing of either: they are the sums of the scorers'.
    """

    def draw(logits, number):
        logits = _nucleus(_best(logits / temperature, top_k), top_p)
        return jax.random.categorical(jax.random.fold_in(key, number), logits)

    found = _roll(scorers, limits, max_tokens, samples, draw)
    scores, order = lax.top_k(found.scores, samples)
    tokens, lengths = _of_parents((found.tokens, found.lengths), order)
    return _hypotheses(tokens, lengths, scores)


def _best(logits: jax.Array, count: int) -> jax.Array:
    if not 0 < count < logits.shape[-1]:
        return logits
    return jnp.where(logits >= lax.top_k(logits, count)[0][..., -1:], logits, -jnp.inf)


def _nucleus(logits: jax.Array, share: float) -> jax.Array:
    """The fewest best tokens with a probability of at least `share` keep their logits; the best always does."""
    if share >= 1:
        return logits
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = (before < share).at[..., 0].set(True)
    return jnp.where(logits >= jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True), logits, -jnp.inf)


def _roll(
    scorers: Team, limits: jax.Array, max_tokens: int, count: int, choose: Callable[[jax.Array, jax.Array], jax.Array]
) -> Hypotheses:
    """`count` sequences a row whose next token `choose` says: (scores [B, N, V], number of tokens) -> [B, N]."""
    team, B = _team(scorers), limits.shape[0]
    limits = jnp.minimum(limits, max_tokens)

    def grow(carry):
        number, states, tokens, lengths, scores, going = carry
        logits = _total(team, states, "scores").at[..., :SPECIALS].set(-jnp.inf)
        logits = jnp.where((number >= limits)[:, None, None], -jnp.inf, logits)
        logits = logits.at[..., EOS].set(_total(team, states, "final"))
        token = choose(logits, number).astype(jnp.int32)
        scores = scores + jnp.where(going, jnp.take_along_axis(logits, token[..., None], axis=2)[..., 0], 0)
        going = going & (token != EOS)
        tokens = tokens.at[:, :, number].set(token, mode="drop")
        token = jnp.where(going, token, -1)
        states = tuple(s.advance(x, token) for (s, _), x in zip(team, states, strict=True))
        return number + 1, states, tokens, lengths + going.astype(jnp.int32), scores, going

    shape = (B, count)
    start = (
        jnp.int32(0), tuple(s.start(*shape) for s, _ in team), jnp.zeros((*shape, max_tokens), jnp.int32),
        jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.ones(shape, bool),
    )  # fmt: skip
    _, _, tokens, lengths, scores, _ = lax.while_loop(lambda carry: jnp.any(carry[-1]), grow, start)
    return _hypotheses(tokens, lengths, scores)


def _team(scorers: Team) -> Team:
    """Without those of weight 0, whose -inf would become NaN."""
    team = [(scorer, weight) for scorer, weight in scorers if weight]
    if not team:
        raise UserError("a search needs a scorer whose weight is not 0")
    return team


def _total(team: Team, states: tuple[Any, ...], method: str) -> jax.Array:
    """The weighted sum of what the scorers' `method` says."""
    parts = [weight * getattr(s, method)(x) for (s, weight), x in zip(team, states, strict=True)]
    if len({part.shape for part in parts}) > 1:
        sizes = ", ".join(str(part.shape[-1]) for part in parts)
        raise UserError(f"the models that decode together have vocabularies of {sizes} tokens: train them with one")
    return functools.reduce(jnp.add, parts)


def _of_parents(tree: Any, parents: jax.Array) -> Any:
    """Every array [B, K, ...] with the beams that `parents` int32 [B, N] names."""
    rows = jnp.arange(parents.shape[0])[:, None]
    return jax.tree.map(lambda x: x[rows, parents], tree)


def _merge(search: _Search, scores: jax.Array) -> Hypotheses:
    """The best of those that have ended before and those that end now, with `scores` [B, K]."""
    ended = search.ended
    best = ended.scores.shape[1]
    lengths = jnp.broadcast_to(search.number, scores.shape)
    together = lambda *parts: jnp.concatenate(parts, axis=1)  # noqa: E731
    scores, order = lax.top_k(together(ended.scores, scores), best)
    both = together(ended.tokens, search.tokens), together(ended.lengths, lengths)
    tokens, lengths = _of_parents(both, order)
    return _hypotheses(tokens, lengths, scores)


def _hypotheses(tokens: jax.Array, lengths: jax.Array, scores: jax.Array) -> Hypotheses:
    """Nothing stands beyond a hypothesis, or where there is none."""
    lengths = jnp.where(scores > -jnp.inf, lengths, 0)
    inside = jnp.arange(tokens.shape[2])[None, None] < lengths[..., None]
    return Hypotheses(jnp.where(inside, tokens, 0), lengths, scores, jnp.full_like(tokens, -1))


class CTCState(NamedTuple):
    """Of a prefix: log-probability `nonblank`, `blank` [B, K, T + 1] that the first t frames say it and end so, that
    of all that begins with it, `prefix` [B, K], and its `last` token, -1 for none.
    """

    nonblank: jax.Array
    blank: jax.Array
    prefix: jax.Array
    last: jax.Array


@flax.struct.dataclass
class CTCPrefixScorer:
    """What CTC knows of hypotheses that begin so (Watanabe et al. 2017, algorithm 2; Graves 2008, section 7.5.2).

    `log_probs` float32 [B, T, V] are normalised, id 0 the blank, `lengths` int32 [B] frames count.  The scores of a
    prefix's tokens add up to the log-probability of all transcripts that begin with it, with the final one to that of
    itself.  Every token is scored, where ESPnet scores those that attention prefers.
    """

    log_probs: jax.Array
    lengths: jax.Array

    def _frames(self) -> jax.Array:
        """Frames beyond a row's say blank for certain: they change nothing, and all rows end with the last."""
        T, V = self.log_probs.shape[1:]
        inside = jnp.arange(T)[None] < self.lengths[:, None]
        silence = jnp.where(jnp.arange(V) == 0, 0.0, -jnp.inf)[None, None]
        return jnp.where(inside[..., None], self.log_probs, silence)

    def start(self, rows: int, beams: int) -> CTCState:
        """The empty prefix: nothing but blanks."""
        blank = jnp.cumsum(self._frames()[..., 0], axis=1)
        blank = jnp.pad(blank, ((0, 0), (1, 0)))[:, None]
        blank = jnp.broadcast_to(blank, (rows, beams, blank.shape[2]))
        zero = jnp.zeros((rows, beams))
        return CTCState(jnp.full_like(blank, -jnp.inf), blank, zero, jnp.full((rows, beams), -1, jnp.int32))

    def scores(self, state: CTCState) -> jax.Array:
        """float32 [B, K, V], 0 for specials."""
        frames, V = self._frames(), self.log_probs.shape[2]
        any_end = jnp.logaddexp(state.nonblank, state.blank)[:, :, :-1]

        def add(total, frame):
            ends, says = frame
            return jnp.logaddexp(total, ends[..., None] + says[:, None]), None

        # Frame by frame, because one sum over all would make an array [B, K, T, V].
        nothing = jnp.full((*state.last.shape, V), -jnp.inf)
        new, _ = lax.scan(add, nothing, (jnp.moveaxis(any_end, 2, 0), frames.transpose(1, 0, 2)))
        # After the same token only a blank lets it begin anew.
        last = jnp.maximum(state.last, 0)
        again = jax.nn.logsumexp(state.blank[:, :, :-1] + self._of(frames, last), axis=2)
        new = jnp.where(jnp.arange(V)[None, None] == last[..., None], again[..., None], new)
        return _since(new, state.prefix[..., None]).at[..., :SPECIALS].set(0.0)

    def _of(self, frames: jax.Array, tokens: jax.Array) -> jax.Array:
        """Log-probability of a token in every frame: [B, T, V], int32 [B, K] -> [B, K, T]."""
        return jnp.take_along_axis(frames.transpose(0, 2, 1), tokens[..., None], axis=1)

    def advance(self, state: CTCState, tokens: jax.Array) -> CTCState:
        """The forward variables of the longer prefix; where `tokens` are negative nothing changes."""
        frames, reads = self._frames(), tokens >= 0
        token = jnp.maximum(tokens, 0)
        says = self._of(frames, token)
        any_end = jnp.logaddexp(state.nonblank, state.blank)
        begins = jnp.where((token == state.last)[..., None], state.blank, any_end)[:, :, :-1]

        def hear(carry, frame):
            nonblank, blank = carry
            says, begins, silence = frame
            carry = jnp.logaddexp(nonblank, begins) + says, jnp.logaddexp(nonblank, blank) + silence[:, None]
            return carry, carry

        nothing = jnp.full(tokens.shape, -jnp.inf)
        by_frame = (jnp.moveaxis(says, 2, 0), jnp.moveaxis(begins, 2, 0), frames[..., 0].T)
        _, heard = lax.scan(hear, (nothing, nothing), by_frame)
        nonblank, blank = (jnp.concatenate([nothing[..., None], jnp.moveaxis(x, 0, 2)], axis=2) for x in heard)
        new = CTCState(nonblank, blank, jax.nn.logsumexp(begins + says, axis=2), token)
        stay = lambda new, old: jnp.where(reads.reshape(*reads.shape, *[1] * (new.ndim - 2)), new, old)  # noqa: E731
        return jax.tree.map(stay, new, state)

    def final(self, state: CTCState) -> jax.Array:
        """float32 [B, K]: that nothing follows."""
        return _since(jnp.logaddexp(state.nonblank[..., -1], state.blank[..., -1]), state.prefix)


def _since(after: jax.Array, before: jax.Array) -> jax.Array:
    """The difference of log-probabilities, where what was impossible stays so."""
    return jnp.where(before > -jnp.inf, after - before, -jnp.inf)
