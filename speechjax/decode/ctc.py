"""Transcripts from the frames of CTC: the best path, prefix beam search, and the alignment of a known transcript.

Shapes: B batch, T frames, V vocabulary, K beams, C symbols of a frame, N hypotheses, U tokens.  Everywhere: `logits`
[B, T, V] of any scale, `lengths` int32 [B] valid frames.  Id 0 is the blank; <s> and </s> (1, 2), which no transcript
has, count as further blanks; <unk> (3) is a token like any other.

All functions are to be used inside jit.  `Greedy` and `PrefixBeam` decode streams too: `init`, any number of `step`s
with the logits of a chunk, and `result` at any time; a whole utterance is one step.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from speechjax.decode.types import Hypotheses, Scorer, or_unfinished
from speechjax.errors import UserError
from speechjax.models.layers import frame_mask

BLANK = 0
BLANKS = 3  # ids 0, 1, 2: <pad>, <s>, </s>
NEVER = -jnp.inf


def _log_probs(logits: jax.Array) -> jax.Array:
    """float32 [B, T, V], with what <s> and </s> have given to the blank."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    blank = jax.nn.logsumexp(log_probs[..., :BLANKS], axis=-1, keepdims=True)
    never = jnp.full_like(log_probs[..., 1:BLANKS], NEVER)
    return jnp.concatenate([blank, never, log_probs[..., BLANKS:]], axis=-1)


class GreedyState(NamedTuple):
    """Of `Greedy`, for B rows: what was found, the last symbol, and how many frames were seen."""

    tokens: jax.Array
    times: jax.Array
    lengths: jax.Array
    scores: jax.Array
    last: jax.Array
    seen: jax.Array


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Best path: the likeliest symbol of every frame, repeats merged, blanks left out.

    Graves et al. 2006, section 3.2.  A row keeps its first `tokens` tokens.  The score is the log-probability of the
    path, not of the transcript; the frame of a token is its first.
    """

    tokens: int

    def init(self, rows: int) -> GreedyState:
        nothing = jnp.zeros(rows, jnp.int32)
        empty = jnp.zeros((rows, self.tokens), jnp.int32)
        return GreedyState(empty, empty - 1, nothing, jnp.zeros(rows), nothing, nothing)

    def step(self, state: GreedyState, logits: jax.Array, lengths: jax.Array) -> GreedyState:
        inside = frame_mask(lengths, logits.shape[1])
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        best = jnp.argmax(logits, axis=2).astype(jnp.int32)
        symbols = jnp.where(best < BLANKS, BLANK, best)
        before = jnp.concatenate([state.last[:, None], symbols[:, :-1]], axis=1)
        emits = inside & (symbols != BLANK) & (symbols != before)
        place = state.lengths[:, None] + jnp.cumsum(emits, axis=1, dtype=jnp.int32) - 1
        place = jnp.where(emits, place, self.tokens)  # outside: dropped
        row = jnp.arange(len(lengths), dtype=jnp.int32)[:, None]
        time = state.seen[:, None] + jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
        with_last = jnp.concatenate([state.last[:, None], symbols], axis=1)
        return GreedyState(
            tokens=state.tokens.at[row, place].set(symbols, mode="drop"),
            times=state.times.at[row, place].set(time, mode="drop"),
            lengths=jnp.minimum(state.lengths + jnp.sum(emits, axis=1, dtype=jnp.int32), self.tokens),
            scores=state.scores + jnp.sum(jnp.where(inside, jnp.max(log_probs, axis=2), 0), axis=1),
            last=jnp.take_along_axis(with_last, lengths[:, None], axis=1)[:, 0],
            seen=state.seen + lengths,
        )

    def result(self, state: GreedyState) -> Hypotheses:
        return Hypotheses(state.tokens[:, None], state.lengths[:, None], state.scores[:, None], state.times[:, None])


def greedy(logits: jax.Array, lengths: jax.Array) -> Hypotheses:
    """Best path of whole utterances, N = 1 and U = T; see `Greedy`."""
    decoder = Greedy(tokens=logits.shape[1])
    return decoder.result(decoder.step(decoder.init(len(lengths)), logits, lengths))


class Mass(NamedTuple):
    """Logarithms, float32 [B, K], of a prefix's alignments that end in a blank, and of those that end in its token."""

    blank: jax.Array
    token: jax.Array


class BeamState(NamedTuple):
    """Of `PrefixBeam`: K different prefixes a row, best first, those of which there are fewer have no mass.

    `total` is the sum over all alignments and `path` the best one; `times` int32 [B, K, 2, U] are the frames at which
    the best ones that end in a blank and in the token emit.  `name` uint32 [B, K] is a hash of the prefix and `stem`
    that of the prefix without its last token.  `steer` float32 [B, K] is what the scorers gave, weighted.
    """

    tokens: jax.Array
    lengths: jax.Array
    last: jax.Array
    total: Mass
    path: Mass
    times: jax.Array
    name: jax.Array
    stem: jax.Array
    steer: jax.Array
    scorers: tuple[Any, ...]
    seen: jax.Array


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """The beams `index` int32 [B, K'] of [B, K, ...]."""
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def _named(stem: jax.Array, token: jax.Array) -> jax.Array:
    """Hash of a prefix and one more token: a product and the final mix of MurmurHash3."""
    x = (stem ^ (token.astype(jnp.uint32) * jnp.uint32(0x9E3779B1))) + jnp.uint32(0x7F4A7C15)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@dataclasses.dataclass(frozen=True, eq=False)
class PrefixBeam:
    """Prefix beam search (Graves and Jaitly 2014, algorithm 1; with scorers: Hannun et al. 2014, arXiv 1408.2873).

    A hypothesis' score is the logarithm of the sum over its alignments that the beam kept, plus `weight` times what
    each of `scorers` says of its tokens and of its end (shallow fusion; insertion bonuses are the scorer `Bonus`).
    It is at most the exact one, and equal to it where nothing was pruned.

    beams: prefixes K that survive a frame.  tokens: longest transcript U; longer prefixes are not searched.
    symbols: only the likeliest C tokens of a frame may extend a prefix (the probability of repeats, blanks and
    extensions that lead to another beam is never cut).  best: hypotheses N in the result, at most `beams`.

    The frame of a token is the one in which the best alignment of the transcript (among those kept) emits it.
    UserError for sizes that mean nothing.
    """

    beams: int
    tokens: int
    symbols: int
    best: int
    scorers: tuple[tuple[Scorer, float], ...] = ()

    def __post_init__(self):
        if min(self.beams, self.tokens, self.symbols) < 1:
            raise UserError("prefix beam search: beams, tokens and symbols must be at least 1")
        if not 1 <= self.best <= self.beams:
            raise UserError(f"prefix beam search: best={self.best} hypotheses of beams={self.beams}; lower the first")

    def __call__(self, logits: jax.Array, lengths: jax.Array) -> Hypotheses:
        """The N best transcripts of whole utterances."""
        return self.result(self.step(self.init(len(lengths)), logits, lengths))

    def init(self, rows: int) -> BeamState:
        """Before the first frame the empty prefix has all the mass, as if after a blank."""
        B, K = rows, self.beams
        empty = jnp.zeros((B, K), jnp.int32)
        never = jnp.full((B, K), NEVER)
        mass = Mass(never.at[:, 0].set(0.0), never)
        return BeamState(
            tokens=jnp.zeros((B, K, self.tokens), jnp.int32),
            lengths=empty,
            last=empty,
            total=mass,
            path=mass,
            times=jnp.full((B, K, 2, self.tokens), -1, jnp.int32),
            name=jnp.zeros((B, K), jnp.uint32),
            stem=jnp.zeros((B, K), jnp.uint32),
            steer=jnp.zeros((B, K)),
            scorers=tuple(scorer.start(B, K) for scorer, _ in self.scorers),
            seen=jnp.zeros(B, jnp.int32),
        )

    def step(self, state: BeamState, logits: jax.Array, lengths: jax.Array) -> BeamState:
        """State after the next frames of every row, [B, T, V] of which `lengths` count (none is allowed)."""
        if logits.shape[2] <= BLANKS:
            raise UserError(f"prefix beam search: {logits.shape[2]} symbols have no token among them")
        inside = frame_mask(lengths, logits.shape[1])
        frames = _log_probs(logits).transpose(1, 0, 2), inside.T
        state, _ = lax.scan(lambda state, now: (self._frame(state, *now), None), state, frames)
        return state

    def result(self, state: BeamState) -> Hypotheses:
        """The N best if the utterance ended now; where scorers let none end, the N best as they are, within a word."""
        unfinished = jnp.logaddexp(*state.total) + state.steer
        scores = unfinished
        for (scorer, weight), own in zip(self.scorers, state.scorers, strict=True):
            scores = scores + weight * scorer.final(own)
        scores, order = lax.top_k(or_unfinished(scores, unfinished), self.best)
        lengths = jnp.where(scores > NEVER, _pick(state.lengths, order), 0)
        there = jnp.arange(self.tokens, dtype=jnp.int32)[None, None] < lengths[..., None]
        in_token = _pick(state.path.token > state.path.blank, order)
        times = _pick(state.times, order)
        times = jnp.where(in_token[..., None], times[:, :, 1], times[:, :, 0])
        tokens = jnp.where(there, _pick(state.tokens, order), BLANK)
        return Hypotheses(tokens, lengths, scores, jnp.where(there, times, -1))

    def _frame(self, state: BeamState, log_probs: jax.Array, inside: jax.Array) -> BeamState:
        """One frame: float32 [B, V], bool [B]."""
        parents = _parents(state)
        stay = _stay(state, parents, log_probs)
        symbols, grown, gain = self._grow(state, parents, log_probs)
        B, K, C = grown.shape
        scores = jnp.concatenate([jnp.logaddexp(*stay), (grown + gain).reshape(B, K * C)], axis=1)
        scores = scores + jnp.concatenate([state.steer, jnp.repeat(state.steer, C, axis=1)], axis=1)
        choice = lax.top_k(scores, K)[1]
        # After its end a row keeps its beams as they are: every prefix stays, nothing is added to its mass.
        choice = jnp.where(inside[:, None], choice, jnp.arange(K, dtype=jnp.int32)[None])
        grows, of = choice >= K, jnp.maximum(choice - K, 0)
        source = jnp.where(grows, of // C, choice)
        token = jnp.where(grows, _pick(symbols, of % C), _pick(state.last, source))
        total = Mass(
            jnp.where(grows, NEVER, _pick(stay.blank, source)),
            jnp.where(grows, _pick(grown.reshape(B, K * C), of), _pick(stay.token, source)),
        )
        total = jax.tree.map(lambda new, old: jnp.where(inside[:, None], new, old), total, state.total)
        path, times = _best_alignments(state, parents, log_probs, inside, source, grows, token)
        lengths = _pick(state.lengths, source)
        here = grows[..., None] & (jnp.arange(self.tokens, dtype=jnp.int32)[None, None] == lengths[..., None])
        name = _pick(state.name, source)
        return BeamState(
            tokens=jnp.where(here, token[..., None], _pick(state.tokens, source)),
            lengths=lengths + grows.astype(jnp.int32),
            last=token,
            total=total,
            path=path,
            times=times,
            name=jnp.where(grows, _named(name, token), name),
            stem=jnp.where(grows, name, _pick(state.stem, source)),
            steer=_pick(state.steer, source) + jnp.where(grows, _pick(gain.reshape(B, K * C), of), 0),
            scorers=self._advance(state.scorers, source, jnp.where(grows, token, -1)),
            seen=state.seen + inside.astype(jnp.int32),
        )

    def _grow(self, state: BeamState, parents: jax.Array, log_probs: jax.Array):
        """Every prefix with each of the frame's likeliest tokens: int32 [B, C], masses and scorers' gain [B, K, C].

        What another beam has already has no mass here: `_stay` gives it to that beam.
        """
        C = min(self.symbols, log_probs.shape[1] - BLANKS)
        likely, symbols = lax.top_k(log_probs[:, BLANKS:], C)
        symbols = symbols + BLANKS
        repeats = symbols[:, None] == state.last[..., None]
        # A token again is another token only after a blank.
        grown = jnp.where(repeats, state.total.blank[..., None], jnp.logaddexp(*state.total)[..., None])
        grown = jnp.where((state.lengths < self.tokens)[..., None], grown + likely[:, None], NEVER)
        column = jnp.max(jnp.where(repeats, jnp.arange(C, dtype=jnp.int32)[None, None], -1), axis=2)
        owner = jnp.where((parents >= 0) & (column >= 0), parents, self.beams)  # outside: dropped
        row = jnp.arange(len(symbols), dtype=jnp.int32)[:, None]
        grown = grown.at[row, owner, column].set(NEVER, mode="drop")
        gain = jnp.zeros_like(grown)
        for (scorer, weight), own in zip(self.scorers, state.scorers, strict=True):
            said = jnp.take_along_axis(scorer.scores(own), symbols[:, None], axis=2)
            gain = gain + weight * said
        return symbols, grown, gain

    def _advance(self, states: tuple[Any, ...], source: jax.Array, tokens: jax.Array) -> tuple[Any, ...]:
        moved = jax.tree.map(lambda x: _pick(x, source), states)
        return tuple(scorer.advance(own, tokens) for (scorer, _), own in zip(self.scorers, moved, strict=True))


def _parents(state: BeamState) -> jax.Array:
    """Which beam has a prefix without its last token, int32 [B, K]; -1: none.

    The hash names a candidate, the tokens decide: two prefixes are never taken for one.
    """
    alive = jnp.logaddexp(*state.total) + state.steer > NEVER
    match = state.stem[:, :, None] == state.name[:, None]
    match &= (state.lengths[:, :, None] == state.lengths[:, None] + 1) & alive[:, None]
    found = jnp.max(jnp.where(match, jnp.arange(match.shape[1], dtype=jnp.int32)[None, None], -1), axis=2)
    other = _pick(state.tokens, jnp.maximum(found, 0))
    before = jnp.arange(other.shape[2], dtype=jnp.int32)[None, None] < state.lengths[..., None] - 1
    same = jnp.all((other == state.tokens) | ~before, axis=2)
    return jnp.where(same & alive, found, -1)


def _stay(state: BeamState, parents: jax.Array, log_probs: jax.Array) -> Mass:
    """Mass of the same prefixes a frame later: a blank, the token held, and the token new from the parent's beam."""
    said = jnp.take_along_axis(log_probs, state.last, axis=1)
    token = jnp.logaddexp(state.total.token, _enter(state, parents)) + said
    return Mass(jnp.logaddexp(*state.total) + log_probs[:, :1], token)


def _enter(state: BeamState, parents: jax.Array) -> jax.Array:
    """What a parent's alignments can give to its child: all, or those that end in a blank if the token repeats."""
    at = jnp.maximum(parents, 0)
    every = jnp.logaddexp(*state.total)
    mass = jnp.where(_pick(state.last, at) == state.last, _pick(state.total.blank, at), _pick(every, at))
    return jnp.where(parents >= 0, mass, NEVER)


def _best_alignments(
    state: BeamState,
    parents: jax.Array,
    log_probs: jax.Array,
    inside: jax.Array,
    source: jax.Array,
    grows: jax.Array,
    token: jax.Array,
) -> tuple[Mass, jax.Array]:
    """`path` and `times` of the next beams: what `_stay` and `_grow` do, with the maximum in place of the sum."""
    blank, held = state.path
    ends_in_token = held > blank
    best = jnp.maximum(blank, held)
    giver = jnp.where(grows, source, _pick(parents, source))
    at = jnp.maximum(giver, 0)
    again = _pick(state.last, at) == token
    entered = jnp.where(again, _pick(blank, at), _pick(best, at))
    entered = jnp.where(giver >= 0, entered, NEVER)
    repeated = jnp.where(grows, NEVER, _pick(held, source))
    # After its end a row changes nothing, and must not take the token it holds for a new one.
    emits = (entered > repeated) & inside[:, None]
    said = jnp.take_along_axis(log_probs, token, axis=1)
    path = Mass(jnp.where(grows, NEVER, _pick(best, source) + log_probs[:, :1]), jnp.maximum(entered, repeated) + said)
    path = jax.tree.map(lambda new, old: jnp.where(inside[:, None], new, old), path, state.path)
    # Two lists of times for each beam: 2 k for alignments that end in a blank, 2 k + 1 for those in the token.
    B, K, _, U = state.times.shape
    flat = state.times.reshape(B, 2 * K, U)
    of_giver = 2 * at + (_pick(ends_in_token, at) & ~again).astype(jnp.int32)
    of_token = jnp.where(emits, of_giver, 2 * source + 1)
    of_blank = 2 * source + (_pick(ends_in_token, source) & inside[:, None]).astype(jnp.int32)
    last = _pick(state.lengths, source) - 1 + grows.astype(jnp.int32)
    here = emits[..., None] & (jnp.arange(U, dtype=jnp.int32)[None, None] == last[..., None])
    in_token = jnp.where(here, state.seen[:, None, None], _pick(flat, of_token))
    return path, jnp.stack([_pick(flat, of_blank), in_token], axis=2)
