"""Transcripts from the frames of a transducer: the likeliest step after another, and beam search.

Shapes: B batch, T frames, D width of the encoder, J of the joiner, V vocabulary, R durations, K beams, N hypotheses, U
tokens.  Everywhere: `frames` float32 [B, T, D] of the encoder, `lengths` int32 [B] valid ones; `params` are those of
the `TransducerNetwork`.  Id 0 is the blank; <s> and </s> (1, 2), which no transcript has, are never said.

All functions are to be used inside jit.  `Greedy` decodes streams too: `init`, any number of `step`s with the frames of
a chunk, and `result` at any time; a whole utterance is one step.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from speechjax.decode.types import Hypotheses, Scorer, or_unfinished
from speechjax.errors import UserError
from speechjax.models.transducer import BLANK, TransducerNetwork

UNSAID = (1, 2)  # <s>, </s>
NEVER = -jnp.inf


def _part(network: TransducerNetwork, params: Any, method: str, *args: Any) -> Any:
    return network.apply({"params": params}, *args, method=method)


def _log_probs(logits: jax.Array, classes: int) -> jax.Array:
    """Of tokens and the blank, [..., V + R] -> [..., V]."""
    log_probs = jax.nn.log_softmax(logits[..., :classes])
    return log_probs.at[..., jnp.array(UNSAID)].set(NEVER)


def _where(which: jax.Array, new: Any, old: Any) -> Any:
    """Of two pytrees of arrays [*which.shape, ...], the first where `which` is true."""
    return jax.tree.map(
        lambda a, b: jnp.where(which.reshape(*which.shape, *(1,) * (a.ndim - which.ndim)), a, b), new, old
    )


def _pick(tree: Any, index: jax.Array) -> Any:
    """The beams `index` int32 [B, K'] of a pytree of arrays [B, K, ...]."""
    return jax.tree.map(
        lambda x: jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1), tree
    )


# ------------------------------------------------------------------------------------------- greedy


class GreedyState(NamedTuple):
    """Of `Greedy`, for B rows: what was found; what is predicted after it; frames seen, and still to be skipped."""

    tokens: jax.Array
    times: jax.Array
    lengths: jax.Array
    scores: jax.Array
    predictor: Any
    texts: jax.Array
    seen: jax.Array
    skip: jax.Array


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The likeliest step at every frame and text: a blank goes to the next frame, a token stays (Graves 2012).

    With durations both go as many frames on as the likeliest one says, a blank at least 1, as in NeMo (Xu et al. 2023,
    arXiv 2304.06795); frames between are never looked at.

    tokens: a row keeps U of them and then says nothing.  symbols: after so many in one frame the next one is due,
    without a step of its own.  The score is the log-probability of the steps taken.
    """

    network: TransducerNetwork
    tokens: int
    symbols: int = 10

    def __post_init__(self):
        if min(self.tokens, self.symbols) < 1:
            raise UserError("greedy search: tokens and symbols must be at least 1")

    def __call__(self, params: Any, frames: jax.Array, lengths: jax.Array) -> Hypotheses:
        """The transcripts of whole utterances, N = 1."""
        return self.result(self.step(params, self.init(params, len(lengths)), frames, lengths))

    def init(self, params: Any, rows: int) -> GreedyState:
        nothing, empty = jnp.zeros(rows, jnp.int32), jnp.zeros((rows, self.tokens), jnp.int32)
        predictor, texts = _part(self.network, params, "begin", (rows,))
        return GreedyState(empty, empty - 1, nothing, jnp.zeros(rows), predictor, texts, nothing, nothing)

    def step(self, params: Any, state: GreedyState, frames: jax.Array, lengths: jax.Array) -> GreedyState:
        """State after the next frames of every row, [B, T, D] of which `lengths` count (none is allowed).

        Every row goes through its frames at its own pace, so a batch takes as many steps as its slowest row.
        """
        frames, join = _part(self.network, params, "frames", frames), _part(self.network, params, "joint")

        def going(carry):
            _, time, _ = carry
            return jnp.any(time < lengths)

        def advance(carry):
            state, time, here = carry
            frame = jnp.take_along_axis(frames, jnp.minimum(time, frames.shape[1] - 1)[:, None, None], axis=1)[:, 0]
            full = state.lengths == self.tokens
            token, span, score = self._choose(join(frame, state.texts), full)
            active = time < lengths
            says = active & (token != BLANK)
            here = jnp.where(span > 0, 0, here + 1)
            span = jnp.where(here == self.symbols, 1, span)
            here = jnp.where(here == self.symbols, 0, here)
            after = _part(self.network, params, "step", state.predictor, token)
            predictor, texts = _where(says, after, (state.predictor, state.texts))
            place = jnp.where(says, state.lengths, self.tokens)  # outside: dropped
            row = jnp.arange(len(place), dtype=jnp.int32)
            state = state._replace(
                tokens=state.tokens.at[row, place].set(token, mode="drop"),
                times=state.times.at[row, place].set(state.seen + time, mode="drop"),
                lengths=state.lengths + says.astype(jnp.int32),
                scores=state.scores + jnp.where(active, score, 0),
                predictor=predictor,
                texts=texts,
            )
            return state, jnp.where(active, time + span, time), jnp.where(active, here, 0)

        state, time, _ = lax.while_loop(going, advance, (state, state.skip, jnp.zeros_like(lengths)))
        return state._replace(seen=state.seen + lengths, skip=time - lengths)

    def _choose(self, logits: jax.Array, full: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(symbol, frames it goes on, log-probability of both) of [B, V + R]; only blanks where `full` [B]."""
        classes, durations = self.network.classes, tuple(self.network.durations)
        log_probs = _log_probs(logits, classes)
        token = jnp.where(full, BLANK, jnp.argmax(log_probs, axis=1).astype(jnp.int32))
        score = jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]
        if not durations:
            return token, (token == BLANK).astype(jnp.int32), score
        spans = jax.nn.log_softmax(logits[:, classes:])
        frames = jnp.array(durations, jnp.int32)
        number = jnp.argmax(spans, axis=1)
        number = jnp.where((token == BLANK) & (frames[number] == 0), durations.index(1), number)
        return token, frames[number], score + jnp.take_along_axis(spans, number[:, None], axis=1)[:, 0]

    def result(self, state: GreedyState) -> Hypotheses:
        """What was found so far."""
        return Hypotheses(state.tokens[:, None], state.lengths[:, None], state.scores[:, None], state.times[:, None])


# ------------------------------------------------------------------------------------------- beam search


class Found(NamedTuple):
    """Hypotheses that have read all frames: `tokens`, `times` int32 [B, N, U], `lengths` [B, N], `scores` [B, N].

    `ended` bool [B, N]: whether the scorers let them end; others are there only as long as a row has none that is.
    """

    tokens: jax.Array
    times: jax.Array
    lengths: jax.Array
    scores: jax.Array
    ended: jax.Array


class Beams(NamedTuple):
    """K different texts a row after the same number of steps: a text of u tokens waits at frame `number` - u.

    `mass` float32 [B, K] is the logarithm of the sum over the alignments so far, -inf for beams that there are not, and
    `steer` what the scorers gave, weighted.  `tokens` and `times` int32 [B, K, U] are 0 and -1 behind `lengths`.
    """

    tokens: jax.Array
    times: jax.Array
    lengths: jax.Array
    mass: jax.Array
    steer: jax.Array
    predictor: Any
    texts: jax.Array
    scorers: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Beam:
    """Alignment-length synchronous search (Saon, Tüske and Audhkhasi 2020, ICASSP) for transducers without durations.

    A step of all hypotheses is a blank or a token, so those with the same text after the same number of steps are at
    the same frame, and their alignments are added up.  A score is the logarithm of the sum over the alignments that the
    beam kept, at most the exact one and equal to it where nothing was pruned, plus `weight` times what each of
    `scorers` says of the tokens and of their end (shallow fusion).  The paper divides final scores by the length; an
    insertion bonus (the scorer `Bonus`) is this module's way.

    beams: texts K that survive a step.  tokens: longest transcript U; a search takes T + U steps.  best: hypotheses N
    in the result.  The frame of a token is that of the likelier alignments where two ways meet.

    UserError for durations, and for sizes that mean nothing.
    """

    network: TransducerNetwork
    beams: int
    tokens: int
    best: int
    scorers: tuple[tuple[Scorer, float], ...] = ()

    def __post_init__(self):
        if min(self.beams, self.tokens, self.best) < 1:
            raise UserError("transducer beam search: beams, tokens and best must be at least 1")
        if self.network.durations:
            raise UserError("a transducer with durations (config.task.kind=tdt) has no beam search: use search=greedy")

    def __call__(self, params: Any, frames: jax.Array, lengths: jax.Array) -> Hypotheses:
        """The N best transcripts of whole utterances; of a row without frames, the empty one."""
        frames, join = _part(self.network, params, "frames", frames), _part(self.network, params, "joint")
        last = jnp.max(lengths) + self.tokens

        def going(carry):
            number, beams, _ = carry
            return (number < last) & jnp.any(beams.mass > NEVER)

        def advance(carry):
            number, beams, found = carry
            time = number - beams.lengths
            at = jnp.clip(time, 0, frames.shape[1] - 1)
            logits = join(jnp.take_along_axis(frames, at[..., None], axis=1), beams.texts)
            blank, token = _extended(beams, _log_probs(logits, self.network.classes))
            blank, token, times = _merged(beams, blank, token, time)
            ends = time + 1 == lengths[:, None]
            found = self._collect(found, beams, times, jnp.where(ends, blank, NEVER))
            return number + 1, self._grow(params, beams, jnp.where(ends, NEVER, blank), token, times, time), found

        start = self._start(params, lengths)
        _, _, found = lax.while_loop(going, advance, (jnp.int32(0), *start))
        return Hypotheses(found.tokens, found.lengths, found.scores, found.times)

    def _start(self, params: Any, lengths: jax.Array) -> tuple[Beams, Found]:
        B, K, N = len(lengths), self.beams, self.best
        empty = jnp.zeros((B, K, self.tokens), jnp.int32)
        none = jnp.zeros((B, N, self.tokens), jnp.int32)
        heard = lengths > 0
        mass = jnp.full((B, K), NEVER).at[:, 0].set(jnp.where(heard, 0.0, NEVER))
        scores = jnp.full((B, N), NEVER).at[:, 0].set(jnp.where(heard, NEVER, 0.0))
        predictor, texts = _part(self.network, params, "begin", (B, K))
        states = tuple(scorer.start(B, K) for scorer, _ in self.scorers)
        beams = Beams(empty, empty - 1, empty[..., 0], mass, jnp.zeros((B, K)), predictor, texts, states)
        return beams, Found(none, none - 1, none[..., 0], scores, scores > NEVER)

    def _collect(self, found: Found, beams: Beams, times: jax.Array, mass: jax.Array) -> Found:
        """The N best of what was found before and the beams whose last blank leaves them `mass` [B, K].

        A row in which scorers let none end has the best as they are, which may end within a word.
        """
        unfinished = mass + beams.steer
        scores = unfinished
        for (scorer, weight), state in zip(self.scorers, beams.scorers, strict=True):
            scores = scores + weight * scorer.final(state)
        ended = scores > NEVER
        fresh = Found(beams.tokens, times, beams.lengths, jnp.where(ended, scores, unfinished), ended)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), found, fresh)
        scores = or_unfinished(jnp.where(both.ended, both.scores, NEVER), both.scores)
        scores, order = lax.top_k(scores, self.best)
        best = _pick(both, order)
        there = scores > NEVER
        nothing = jax.tree.map(jnp.zeros_like, best)._replace(times=jnp.full_like(best.times, -1))
        return _where(there, best, nothing)._replace(scores=scores)

    def _grow(self, params: Any, beams: Beams, blank: jax.Array, token: jax.Array, times: Any, time: Any) -> Beams:
        """The K best after one more step, by mass and steering, of masses `blank` [B, K] and `token` [B, K, V]."""
        B, K, V = token.shape
        steer = jnp.broadcast_to(beams.steer[..., None], token.shape)
        for (scorer, weight), state in zip(self.scorers, beams.scorers, strict=True):
            steer = steer + weight * scorer.scores(state)
        room = (beams.lengths < self.tokens)[..., None]
        token = jnp.where(room, token, NEVER)
        mass = jnp.concatenate([blank, token.reshape(B, K * V)], axis=1)
        steer = jnp.concatenate([beams.steer, steer.reshape(B, K * V)], axis=1)
        scores, order = lax.top_k(mass + steer, K)
        said = jnp.where(order < K, BLANK, (order - K) % V)
        parent = jnp.where(order < K, order, (order - K) // V)
        mass, steer = _pick((mass, steer), order)
        # Where there are fewer than K: what is forbidden has a mass, and -inf of steering, from which no sum returns.
        mass, steer = jnp.where(scores > NEVER, mass, NEVER), jnp.where(scores > NEVER, steer, 0)
        beams, times, time = _pick((beams, times, time), parent)

        says = said != BLANK
        after = _part(self.network, params, "step", beams.predictor, said)
        predictor, texts = _where(says, after, (beams.predictor, beams.texts))
        here = (jnp.arange(self.tokens, dtype=jnp.int32)[None, None] == beams.lengths[..., None]) & says[..., None]
        heard = jnp.where(says, said, -1)
        states = (s.advance(state, heard) for (s, _), state in zip(self.scorers, beams.scorers, strict=True))
        return Beams(
            tokens=jnp.where(here, said[..., None], beams.tokens),
            times=jnp.where(here, time[..., None], times),
            lengths=beams.lengths + says.astype(jnp.int32),
            mass=mass,
            steer=steer,
            predictor=predictor,
            texts=texts,
            scorers=tuple(states),
        )


def _extended(beams: Beams, log_probs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Masses after one more step, [B, K, V] -> of a blank [B, K], of a token [B, K, V]."""
    each = beams.mass[..., None] + log_probs
    return each[..., BLANK], each.at[..., BLANK].set(NEVER)


def _merged(
    beams: Beams, blank: jax.Array, token: jax.Array, time: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same masses where no text comes twice, and the times of the beams that a blank extends.

    A text in the beam after a blank, and the beam of all its tokens but the last after that token, are one: the mass of
    the second goes to the first.  Both are at the same frame, having taken the same number of steps.
    """
    final = jnp.arange(beams.tokens.shape[2], dtype=jnp.int32)[None, None] == beams.lengths[..., None] - 1
    stems = jnp.where(final, 0, beams.tokens)
    last = jnp.sum(jnp.where(final, beams.tokens, 0), axis=2)
    same = jnp.all(stems[:, :, None] == beams.tokens[:, None], axis=3)  # [b, k, j]: k is j and one token
    same = same & (beams.lengths[:, :, None] == beams.lengths[:, None] + 1)
    same = same & (beams.mass > NEVER)[:, :, None] & (beams.mass > NEVER)[:, None]

    of_last = jax.vmap(lambda own, ids: own[:, ids].T)(token, last)  # [b, k, j]
    joining = jnp.where(same, of_last, NEVER)
    more, source = jnp.max(joining, axis=2), jnp.argmax(joining, axis=2).astype(jnp.int32)
    other = _pick(beams.times, source)
    other = jnp.where(final, _pick(time, source)[..., None], other)
    times = _where(more > blank, other, beams.times)

    spoken = jax.nn.one_hot(last, token.shape[2], dtype=jnp.float32)
    gone = jnp.einsum("bkj,bkv->bjv", same.astype(jnp.float32), spoken) > 0
    return jnp.logaddexp(blank, more), jnp.where(gone, NEVER, token), times
