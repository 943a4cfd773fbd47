"""Prefix beam search against the enumeration of all paths of a few frames, and against a search in dictionaries."""

import collections
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.decode import ctc
from speechjax.decode.bonus import Bonus
from speechjax.errors import UserError

V, T, STATES = 6, 5, 3
SYMBOLS = (0, 3, 4, 5)  # <s> and </s> are blanks too
LENGTHS = np.array([5, 3, 1, 0, 4], np.int32)
EVERY = 400  # 1 + 3 + 9 + ... + 243 = 364 sequences of at most five of the three tokens


class Table(NamedTuple):
    """A random automaton over tokens: what a scorer is, as plainly as possible."""

    next: jax.Array
    gain: jax.Array
    end: jax.Array

    def start(self, rows, beams):
        return jnp.zeros((rows, beams), jnp.int32)

    def scores(self, state):
        return self.gain[state]

    def advance(self, state, tokens):
        return jnp.where(tokens < 0, state, self.next[state, jnp.maximum(tokens, 0)])

    def final(self, state):
        return self.end[state]

    def of(self, text):
        state, total = 0, 0.0
        for token in text:
            total, state = total + float(self.gain[state, token]), int(self.next[state, token])
        return total + float(self.end[state])


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(size=(len(LENGTHS), T, V)).astype(np.float32) * 2


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(1)
    gain = rng.normal(size=(STATES, V)).astype(np.float32) * 2
    gain[:, :4] = 0
    gain[1, 5] = -np.inf
    to = rng.integers(0, STATES, (STATES, V)).astype(np.int32)
    return Table(*map(jnp.asarray, (to, gain, rng.normal(size=STATES).astype(np.float32))))


@pytest.fixture(scope="module")
def paths(logits):
    """For every row {transcript: (log-probability, frames of its likeliest path)}."""
    found = []
    for x, frames in zip(logits.astype(np.float64), LENGTHS, strict=True):
        p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
        p[:, 0] += p[:, 1] + p[:, 2]
        sums, best = collections.Counter(), {}
        for path in itertools.product(SYMBOLS, repeat=int(frames)):
            starts = [t for t, s in enumerate(path) if s and (t == 0 or path[t - 1] != s)]
            text = tuple(path[t] for t in starts)
            own = math.prod(p[t, s] for t, s in enumerate(path))
            sums[text] += own
            best[text] = max(best.get(text, (-1, [])), (own, starts))
        found.append({text: (math.log(total), best[text][1]) for text, total in sums.items()})
    return found


def read(hypotheses, row):
    """[(tokens, score, frames)] of a row, with what lies beyond them checked."""
    found = []
    for n, length in enumerate(np.asarray(hypotheses.lengths)[row].tolist()):
        tokens, frames = np.asarray(hypotheses.tokens)[row, n], np.asarray(hypotheses.frames)[row, n]
        assert not tokens[length:].any()
        assert (frames[length:] == -1).all()
        score = float(hypotheses.scores[row, n])
        if score > -np.inf:
            found.append((tuple(tokens[:length].tolist()), score, frames[:length].tolist()))
    scores = np.asarray(hypotheses.scores)[row]
    assert (scores[:-1] >= scores[1:]).all()
    return found


def search(beams, symbols=3, best=None, scorers=(), tokens=T):
    best = min(beams, 30) if best is None else best
    return ctc.PrefixBeam(beams=beams, tokens=tokens, symbols=symbols, best=best, scorers=scorers)


@functools.cache
def compiled(beams, symbols=3, best=None):
    return jax.jit(search(beams, symbols, best))


def test_all_transcripts_have_the_sum_of_their_paths_and_the_times_of_the_best(logits, paths):
    found = jax.jit(search(EVERY, best=EVERY))(logits, LENGTHS)
    for row, texts in enumerate(paths):
        ours = read(found, row)
        assert len(ours) == len({text for text, _, _ in ours}) == len(texts), "each transcript once"
        for text, score, frames in ours:
            assert score == pytest.approx(texts[text][0], abs=1e-5), (row, text)  # float32
            assert frames == texts[text][1], (row, text)
    assert (3, 3) in paths[0], "the same token twice is among them"
    assert len(paths[3]) == 1, "and so is a row without frames"


def test_scorers_and_their_ends_are_added(logits, paths, table):
    bonus = Bonus(symbols=V, token=0.7, word=-0.4, boundary=4)
    found = jax.jit(search(EVERY, best=EVERY, scorers=((table, 0.6), (bonus, 1.0))))(logits, LENGTHS)
    found_without = compiled(EVERY, best=EVERY)(logits, LENGTHS)

    def steer(text):
        rewarded = [token for token in text if token >= 4]
        words = sum(1 for own, _ in itertools.groupby(text, lambda token: token == 4) if not own)
        # <unk> is no token to reward, but opens a word, whose next token then does not begin one.
        words -= sum(1 for own, run in itertools.groupby(text, lambda token: token == 4) if not own and next(run) == 3)
        return 0.6 * table.of(text) + 0.7 * len(rewarded) - 0.4 * words

    for row, texts in enumerate(paths):
        expected = {text: score + steer(text) for text, (score, _) in texts.items()}
        expected = {text: score for text, score in expected.items() if score > -np.inf}
        ours = read(found, row)
        assert {text for text, _, _ in ours} == set(expected)
        for text, score, _ in ours:
            assert score == pytest.approx(expected[text], abs=1e-5), (row, text)
    assert len(read(found, 0)) < len(paths[0]), "what the table forbids is not found"
    assert read(found, 0)[0][0] != read(found_without, 0)[0][0], "negative control: the scorers decide"


@pytest.mark.parametrize("beams", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("symbols", [1, 3])
def test_a_narrower_search_never_scores_above_the_exact_one(logits, paths, beams, symbols):
    found = compiled(beams, symbols)(logits, LENGTHS)
    pruned = 0
    for row, texts in enumerate(paths):
        ours = read(found, row)
        assert ours
        assert len({text for text, _, _ in ours}) == len(ours), "equal prefixes are one"
        for text, score, _ in ours:
            assert score <= texts[text][0] + 1e-5
            pruned += score < texts[text][0] - 1e-3
    assert pruned, "negative control: the narrow search is not exact here"


def in_dictionaries(log_probs, beams, tokens, symbols):
    """Prefix beam search as it is usually written, one row: {prefix: (blank, token)}."""
    kept = {(): (0.0, -np.inf)}
    for frame in log_probs:
        merged = collections.defaultdict(lambda: [-np.inf, -np.inf])
        likely = 3 + np.argsort(-frame[3:], kind="stable")[:symbols]
        for text, (blank, token) in kept.items():
            every = np.logaddexp(blank, token)
            merged[text][0] = np.logaddexp(merged[text][0], every + frame[0])
            if text:
                merged[text][1] = np.logaddexp(merged[text][1], token + frame[text[-1]])
            children = {other[-1] for other in kept if other and other[:-1] == text}  # not cut by `symbols`
            for s in {*likely.tolist(), *children} if len(text) < tokens else ():
                mass = merged[(*text, s)]
                mass[1] = np.logaddexp(mass[1], (blank if text and s == text[-1] else every) + frame[s])
        kept = dict(sorted(merged.items(), key=lambda item: -np.logaddexp(*item[1]))[:beams])
    return {text: np.logaddexp(*mass) for text, mass in kept.items()}


@pytest.mark.parametrize(("beams", "symbols", "tokens"), [(1, 5, 9), (4, 2, 9), (8, 5, 9), (8, 5, 3)])
def test_a_pruned_search_keeps_what_dictionaries_keep(beams, symbols, tokens):
    """The merging: a prefix that left the beam comes back while what grew out of it has stayed."""
    logits = np.random.default_rng(5).normal(size=(6, 12, 8)).astype(np.float32) * 1.5
    lengths = np.array([12, 12, 12, 12, 7, 2], np.int32)
    found = jax.jit(search(beams, symbols, best=beams, tokens=tokens))(logits, lengths)
    for row in range(6):
        log_probs = np.asarray(ctc._log_probs(logits[row])[: lengths[row]], np.float64)
        expected = in_dictionaries(log_probs, beams, tokens, symbols)
        ours = {text: score for text, score, _ in read(found, row)}
        assert set(ours) == set(expected)
        for text, score in ours.items():
            assert score == pytest.approx(expected[text], abs=1e-5), (row, text)


def test_unmerged_prefixes_would_be_seen(monkeypatch, logits, paths):
    """The negative control of all above: with no beam known as another's parent, transcripts appear twice."""
    monkeypatch.setattr(ctc, "_parents", lambda state: jnp.full(state.lengths.shape, -1, jnp.int32))
    ours = read(jax.jit(search(60, best=60))(logits, LENGTHS), 0)
    assert len({text for text, _, _ in ours}) < len(ours)
    assert any(score < paths[0][text][0] - 1e-3 for text, score, _ in ours)


def test_equal_hashes_do_not_merge_different_prefixes(monkeypatch, logits, paths):
    """All prefixes of one hash: mass may be lost, but none goes to a transcript that it does not belong to."""
    monkeypatch.setattr(ctc, "_named", lambda stem, token: jnp.zeros_like(stem))
    found = jax.jit(search(60, best=60))(logits, LENGTHS)
    for row, texts in enumerate(paths):
        for text, score, _ in read(found, row):
            assert score <= texts[text][0] + 1e-5


def test_rows_do_not_know_of_each_other_nor_of_padding(logits, table):
    beam = jax.jit(search(4, best=4, scorers=((table, 0.5),)))
    together = beam(logits, LENGTHS)
    outside = np.arange(T)[None, :, None] >= LENGTHS[:, None, None]
    noise = np.where(outside, 50 * logits[::-1], logits)
    for ours, its in zip(beam(noise, LENGTHS), together, strict=True):
        np.testing.assert_array_equal(ours, its)
    assert not np.array_equal(beam(noise, LENGTHS + (LENGTHS < T)).scores, together.scores), "negative control"
    for row in range(len(LENGTHS)):
        alone = read(beam(logits[row : row + 1], LENGTHS[row : row + 1]), 0)
        for (text, score, frames), (text_, score_, frames_) in zip(alone, read(together, row), strict=True):
            assert (text, frames) == (text_, frames_)
            assert score == pytest.approx(score_, abs=1e-5)


@pytest.fixture(scope="module")
def stream(table):
    """A search, and its three parts compiled; many beams: the times of unlikely alignments matter too."""
    beam = search(60, best=60, scorers=((table, 0.5),))
    return beam, jax.jit(beam), jax.jit(beam.step), jax.jit(beam.result)


@pytest.mark.parametrize("cuts", [[1] * 5, [2, 0, 3], [4, 1]])
def test_chunks_say_what_the_whole_says(logits, stream, cuts):
    beam, whole, step, result = stream
    expected, state, first = whole(logits, LENGTHS), beam.init(len(LENGTHS)), 0
    for cut in cuts:
        chunk = np.full((len(LENGTHS), 4, V), 9.0, np.float32)  # longer than the chunk: its end is padding
        chunk[:, :cut] = logits[:, first : first + cut]
        state = step(state, chunk, np.clip(LENGTHS - first, 0, cut).astype(np.int32))
        first += cut
    for ours, its in zip(result(state), expected, strict=True):
        np.testing.assert_allclose(ours, its, rtol=1e-6)
    last = step(beam.init(len(LENGTHS)), chunk, np.clip(LENGTHS - first + cut, 0, cut).astype(np.int32))
    assert not np.array_equal(result(last).tokens, expected.tokens), "negative control: the state matters"


def test_the_best_transcript_is_not_the_best_path():
    """Frames that are blank two times in five: the path of blanks is the likeliest, "a" has more paths."""
    frame = np.log(np.array([0.4, 0.0001, 0.0001, 0.0001, 0.3998, 0.1999], np.float32))
    logits, lengths = np.tile(frame, (1, 2, 1)), np.array([2], np.int32)
    assert int(ctc.greedy(logits, lengths).lengths[0, 0]) == 0
    assert read(compiled(8)(logits, lengths), 0)[0][0] == (4,)


def test_a_token_again_needs_a_blank():
    strong = lambda path: (np.eye(V, dtype=np.float32)[list(path)] * 12)[None]  # noqa: E731
    for path, expected in [([4, 4, 5], (4, 5)), ([4, 0, 4, 5], (4, 4, 5)), ([4, 1, 4], (4, 4))]:
        found = compiled(8)(strong(path), np.array([len(path)], np.int32))
        assert read(found, 0)[0][0] == expected


def test_where_no_transcript_may_end_the_best_unfinished_ones_are_given(logits):
    """As within a word of a lexicon: the first table forbids every end, the second only that of texts ending in 4."""
    free = Table(jnp.zeros((2, V), jnp.int32).at[:, 4].set(1), jnp.zeros((2, V)), jnp.zeros(2))
    one = lambda scorer, x: search(4, best=2, scorers=((scorer, 1.0),))(x, LENGTHS)  # noqa: E731
    run = functools.partial(jax.jit(one), x=logits)
    jax.tree.map(np.testing.assert_array_equal, run(free._replace(end=jnp.full(2, -jnp.inf))), run(free))
    some = run(free._replace(end=jnp.array([0, -jnp.inf])))
    for row in range(len(LENGTHS)):
        found = read(some, row)
        assert found
        assert all(text[-1:] != (4,) for text, _, _ in found), "where one may end, no other does"


def test_sizes_that_mean_nothing_are_refused():
    with pytest.raises(UserError, match="at least 1"):
        search(0, best=1)
    with pytest.raises(UserError, match="best=3"):
        search(2, best=3)
    with pytest.raises(UserError, match="no token among them"):
        search(2)(np.zeros((1, 2, 3), np.float32), np.array([2], np.int32))
