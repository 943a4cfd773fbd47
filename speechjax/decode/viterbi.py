"""The classic hybrid decoder: frame-wise scores of units, a pronunciation lexicon, a grammar of words, and Viterbi.

Shapes: T frames, V units.  Everything here is NumPy, one utterance at a time; scores are natural logarithms.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from speechjax.errors import UserError

NEVER = -np.inf
SILENCE = -1  # in place of a word


def acoustic_scores(log_posteriors: np.ndarray, log_priors: np.ndarray, prior_weight: float) -> np.ndarray:
    """Scores of the frames given the units, [T, V], from the posteriors of units [T, V] and their log-priors [V].

    Bayes' rule without the frame's own probability (Bourlard and Morgan 1994, "Connectionist speech recognition",
    chapter 7); `prior_weight` 1 is the rule, 0 leaves the posteriors.  UserError for a prior of 0, which would make
    its unit certain.
    """
    log_priors = np.asarray(log_priors, np.float64)
    if not np.isfinite(log_priors).all():
        unit = int(np.flatnonzero(~np.isfinite(log_priors))[0])
        raise UserError(f"unit {unit} has the prior 0: count every unit once more, or leave it out")
    return np.asarray(log_posteriors, np.float64) - prior_weight * log_priors[None]


@dataclasses.dataclass(frozen=True)
class Grammar:
    """A finite automaton over words: arcs (state, word, next state, score), from `start`; `finals` {state: score}."""

    words: tuple[str, ...]
    arcs: tuple[tuple[int, int, int, float], ...]
    start: int
    finals: Mapping[int, float]

    @classmethod
    def explore(
        cls,
        words: Sequence[str],
        start: Any,
        read: Callable[[Any, str], tuple[Any, float]],
        end: Callable[[Any], float],
    ) -> "Grammar":
        """The automaton of a language model: `read(state, word)` gives the next state and the word's score.

        States are anything that can be a key; `end(state)` is the score of ending there.
        Every state that words lead to from `start` is visited once with every word, so that backing off is exact; for
        an n-gram the states are its contexts, words x contexts arcs in all.  Scores of -inf make no arc.
        """
        states, arcs, finals = {start: 0}, [], {}
        waiting = [start]
        while waiting:
            state = waiting.pop()
            if (score := end(state)) > NEVER:
                finals[states[state]] = score
            for number, word in enumerate(words):
                to, score = read(state, word)
                if score == NEVER:
                    continue
                if to not in states:
                    states[to] = len(states)
                    waiting.append(to)
                arcs.append((states[state], number, states[to], score))
        return cls(tuple(words), tuple(arcs), 0, finals)

    @classmethod
    def line(cls, words: Sequence[str]) -> "Grammar":
        """These words in this order and nothing else: for the alignment of what was said."""
        return cls(tuple(words), tuple((i, i, i + 1, 0.0) for i in range(len(words))), 0, {len(words): 0.0})


class Word(NamedTuple):
    """What was said from frame `start` to the one before `end`."""

    text: str
    start: int
    end: int


class Decoded(NamedTuple):
    """The best path's words, and its score: acoustics of all frames plus the grammar's share.

    Without words and of score -inf: no path of the grammar has as few frames, or as many.
    """

    words: list[Word]
    score: float


class HybridDecoder:
    """Viterbi over the hidden Markov model that a grammar and a lexicon make (Rabiner 1989, section III.B).

    `lexicon` {word: [pronunciation, ...]}, each the ids of its units.  A unit is `states` states in a row, each with a
    loop on itself, all with the unit's score: so `states` is the fewest frames a unit has.  For units with states that
    the model tells apart write those into the lexicon, with `states` 1.  Transitions score nothing: loop and exit of
    equal probability cost every path of T frames the same.

    Unit `silence` may stand before, between and after words (None: nowhere).  A word's score is `weight` times the
    grammar's plus `bonus`.  The search is exact: memory grows with T x (arcs' ends), no path is pruned.

    Raises UserError for words without a pronunciation, pronunciations without units, and ids below 0.
    """

    def __init__(
        self,
        lexicon: Mapping[str, Sequence[Sequence[int]]],
        grammar: Grammar,
        *,
        states: int,
        silence: int | None,
        weight: float,
        bonus: float,
    ):
        _check(lexicon, grammar, states)
        self.grammar = grammar
        # A copy of a word for every state of the grammar it leads to: its end must tell them apart.
        copies: dict[tuple[int, int, tuple[int, ...]], int] = {}
        entries = []
        for state, word, to, score in grammar.arcs:
            for units in lexicon[grammar.words[word]]:
                copy = copies.setdefault((word, to, tuple(units)), len(copies))
                entries.append((copy, state, weight * score + bonus))
        nodes = 1 + max([grammar.start, *grammar.finals, *(n for s, _, to, _ in grammar.arcs for n in (s, to))])
        if silence is not None:
            for node in range(nodes):
                copies[SILENCE, node, (silence,)] = len(copies)
                entries.append((len(copies) - 1, node, 0.0))
        chains = [np.repeat(np.asarray(units, np.int64), states) for _, _, units in copies]
        sizes = np.array([len(chain) for chain in chains], np.int64)
        self._unit = np.concatenate([*chains, np.zeros(0, np.int64)])
        self._last = np.cumsum(sizes) - 1
        self._first = self._last - sizes + 1
        self._word = np.array([word for word, _, _ in copies], np.int64)
        self._into = np.array([node for _, node, _ in copies], np.int64)
        entries.sort()
        self._copy, self._from = (np.array([entry[i] for entry in entries], np.int64) for i in (0, 1))
        self._gain = np.array([gain for _, _, gain in entries], np.float64)
        self._group = np.searchsorted(self._copy, np.arange(len(copies)))
        self._end = np.full(nodes, NEVER)
        for node, score in grammar.finals.items():
            self._end[node] = weight * score

    def decode(self, scores: np.ndarray) -> Decoded:
        """The best words of float [T, V], such as `acoustic_scores` or log-posteriors."""
        scores = np.asarray(scores, np.float64)
        if len(self._unit) and self._unit.max() >= scores.shape[1]:
            raise UserError(f"the lexicon has unit {self._unit.max()}, the scores only {scores.shape[1]} units")
        score = np.full(len(self._unit), NEVER)
        # The entry that a path last went through, frame x copies + copy; -1: none yet.
        entry = np.full(len(self._unit), -1, np.int64)
        node = np.full(len(self._end), NEVER)
        node[self.grammar.start], node_entry = 0.0, np.full(len(node), -1, np.int64)
        before = []
        for t, frame in enumerate(scores):
            arrived, came_from = self._enter(node, node_entry)
            before.append(came_from)
            score, entry = self._advance(score, entry, arrived, t)
            score += frame[self._unit]
            node, node_entry = self._leave(score, entry)
        final = node + self._end
        best = int(final.argmax())
        if final[best] == NEVER:
            return Decoded([], NEVER)
        return Decoded(self._trace(before, int(node_entry[best]), len(scores)), float(final[best]))

    def _enter(self, node: np.ndarray, node_entry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Best score of coming into each copy of a word, and the entry before it."""
        if not len(self._copy):
            return np.zeros(0), np.zeros(0, np.int64)
        ways = node[self._from] + self._gain
        best = np.maximum.reduceat(ways, self._group)
        winner = np.zeros(len(best), np.int64)
        which = np.flatnonzero(ways == best[self._copy])[::-1]  # the first of equals is written last
        winner[self._copy[which]] = which
        return best, node_entry[self._from[winner]]

    def _advance(self, score: np.ndarray, entry: np.ndarray, arrived: np.ndarray, t: int):
        """Into every state: from itself, from the one before it in the word, or into the word."""
        moved, moved_entry = np.full_like(score, NEVER), np.full_like(entry, -1)
        moved[1:], moved_entry[1:] = score[:-1], entry[:-1]
        moved[self._first] = arrived
        moved_entry[self._first] = t * len(arrived) + np.arange(len(arrived))
        moves = moved > score
        return np.where(moves, moved, score), np.where(moves, moved_entry, entry)

    def _leave(self, score: np.ndarray, entry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Best word's end at each state of the grammar."""
        node, node_entry = np.full(len(self._end), NEVER), np.full(len(self._end), -1, np.int64)
        ends = score[self._last]
        np.maximum.at(node, self._into, ends)
        which = np.flatnonzero((ends == node[self._into]) & (ends > NEVER))[::-1]
        node_entry[self._into[which]] = entry[self._last[which]]
        return node, node_entry

    def _trace(self, before: list[np.ndarray], entry: int, frames: int) -> list[Word]:
        words, end = [], frames
        while entry >= 0:
            start, copy = divmod(entry, len(self._word))
            if self._word[copy] != SILENCE:
                words.append(Word(self.grammar.words[self._word[copy]], start, end))
            entry, end = int(before[start][copy]), start
        return words[::-1]


def align_units(scores: np.ndarray, units: Sequence[int], *, states: int, silence: int | None) -> list[tuple[int, int]]:
    """First frame of each of these units, said in this order, and the one after its last; scores [T, V].

    With no blanks between them (`ctc_align` has those): every frame belongs to a unit, or to a pause between two.
    Raises UserError where there are fewer frames than states.
    """
    names = [str(i) for i in range(len(units))]
    lexicon = {name: [[unit]] for name, unit in zip(names, units, strict=True)}
    decoder = HybridDecoder(lexicon, Grammar.line(names), states=states, silence=silence, weight=1.0, bonus=0.0)
    found = decoder.decode(scores)
    if found.score == NEVER:
        raise UserError(f"{len(units)} units of {states} states do not fit into {len(scores)} frames")
    return [(word.start, word.end) for word in found.words]


def _check(lexicon: Mapping[str, Sequence[Sequence[int]]], grammar: Grammar, states: int) -> None:
    if states < 1:
        raise UserError(f"states={states}: a unit has at least 1")
    missing = [word for word in grammar.words if not lexicon.get(word)]
    if missing:
        raise UserError(f"no pronunciation of {', '.join(missing[:5])} ({len(missing)} words): add them to the lexicon")
    for word in grammar.words:
        if any(not units or min(units) < 0 for units in lexicon[word]):
            raise UserError(f"the pronunciation of {word!r} has no units, or ids below 0")
