"""The hybrid decoder against the enumeration of all sentences, pauses and segmentations of a few frames."""

import itertools
import math

import numpy as np
import pytest

from speechjax.decode.viterbi import Grammar, HybridDecoder, acoustic_scores, align_units
from speechjax.errors import UserError

T, V, PAUSE = 7, 5, 0
LEXICON = {"ab": [[1, 2]], "b": [[2], [3]], "aab": [[1, 1, 2]], "bi": [[2]]}  # homophones, variants, a unit twice
WORDS = tuple(LEXICON)
rng = np.random.default_rng(0)
BIGRAM = {(a, b): float(rng.normal()) for a in ("", *WORDS) for b in (*WORDS, "")}
BIGRAM["b", "b"] = BIGRAM["", ""] = -math.inf
GRAMMAR = Grammar.explore(WORDS, "", lambda last, word: (word, BIGRAM[last, word]), lambda last: BIGRAM[last, ""])


def segmentations(chain, frames):
    """Every way to give `frames` frames to these (unit, fewest frames), as the numbers of frames."""
    if len(chain) <= 1:
        if chain and frames >= chain[0][1]:
            yield (frames,)
        elif not chain and not frames:
            yield ()
        return
    for n in range(chain[0][1], frames + 1):
        for rest in segmentations(chain[1:], frames - n):
            yield (n, *rest)


def sentences(scores, states, silence, weight, bonus, most=4):
    """(score, [(word, start, end)]) of every path."""
    for n in range(most + 1):
        for words in itertools.product(WORDS, repeat=n):
            grammar = sum(BIGRAM[pair] for pair in itertools.pairwise(("", *words, "")))
            if grammar == -math.inf:
                continue
            for spoken in itertools.product(*(LEXICON[word] for word in words)):
                for pauses in itertools.product((False, True), repeat=n + 1 if silence is not None else 0):
                    pauses = pauses or (False,) * (n + 1)
                    chain, owner = [], []
                    for i in range(n + 1):
                        if pauses[i]:
                            chain, owner = [*chain, (silence, states)], [*owner, -1]
                        if i < n:
                            chain += [(unit, states) for unit in spoken[i]]
                            owner += [i] * len(spoken[i])
                    for counts in segmentations(chain, len(scores)):
                        units = np.repeat([unit for unit, _ in chain], counts).astype(int)
                        score = scores[np.arange(len(scores)), units].sum() + weight * grammar + bonus * n
                        ends = np.cumsum(counts)
                        times = [
                            (
                                word,
                                int(min(e - c for e, c, o in zip(ends, counts, owner, strict=True) if o == i)),
                                int(max(e for e, o in zip(ends, owner, strict=True) if o == i)),
                            )
                            for i, word in enumerate(words)
                        ]
                        yield score, times


@pytest.mark.parametrize(
    ("states", "silence", "weight", "bonus", "frames"),
    [
        (1, PAUSE, 1.0, 0.0, 4),
        (1, None, 0.5, 1.0, 5),
        (1, PAUSE, 2.0, 0.8, 4),
        (2, PAUSE, 1.0, 0.5, T),
        (3, None, 1.0, 0.0, T),
    ],
)
def test_it_finds_the_best_sentence_with_its_times(states, silence, weight, bonus, frames):
    decoder = HybridDecoder(LEXICON, GRAMMAR, states=states, silence=silence, weight=weight, bonus=bonus)
    lengths = set()
    for seed in range(4):
        scores = np.random.default_rng(seed).normal(size=(frames, V)) * 2
        every = list(sentences(scores, states, silence, weight, bonus, most=frames // states))
        best = max(score for score, _ in every)
        equal = [times for score, times in every if score > best - 1e-9]  # "bi bi" is one unit, cut anywhere
        found = decoder.decode(scores)
        assert found.score == pytest.approx(best, abs=1e-9)
        assert [tuple(word) for word in found.words] in equal
        assert len({len(times) for times in equal}) == 1
        lengths.add(len(found.words))
        without = HybridDecoder(LEXICON, GRAMMAR, states=states, silence=silence, weight=0.0, bonus=0.0)
        assert without.decode(scores).score != pytest.approx(best, abs=1e-3), "negative control: the grammar counts"
    assert max(lengths) >= 2


def test_too_few_frames_have_no_sentence():
    """The empty sentence is forbidden, and one word takes at least three frames of three states."""
    decoder = HybridDecoder(LEXICON, GRAMMAR, states=3, silence=None, weight=1.0, bonus=0.0)
    for frames in range(3):
        assert decoder.decode(np.zeros((frames, V))) == ([], -math.inf)
    assert decoder.decode(np.zeros((3, V))).score > -math.inf


def test_silence_alone_is_no_words():
    grammar = Grammar(WORDS, (), 0, {0: -0.5})
    decoder = HybridDecoder(LEXICON, grammar, states=1, silence=PAUSE, weight=2.0, bonus=0.0)
    scores = np.random.default_rng(1).normal(size=(5, V))
    assert decoder.decode(scores) == ([], pytest.approx(scores[:, PAUSE].sum() - 1.0))
    mute = HybridDecoder(LEXICON, grammar, states=1, silence=None, weight=2.0, bonus=0.0)
    assert mute.decode(scores) == ([], -math.inf)
    assert mute.decode(scores[:0]) == ([], -1.0)


def test_states_of_a_grammar_tell_histories_apart():
    """A trigram: what follows a word depends on the one before it, also where copies of a word sound alike."""
    read = lambda past, word: ((*past, word)[-2:], 3.0 if (*past, word) == ("ab", "b", "ab") else -1.0)  # noqa: E731
    grammar = Grammar.explore(WORDS, (), read, lambda past: 0.0 if past == ("b", "ab") else -2.0)
    decoder = HybridDecoder(LEXICON, grammar, states=1, silence=None, weight=1.0, bonus=0.0)
    scores = np.zeros((5, V))
    scores[np.arange(5), [1, 2, 3, 1, 2]] = 4
    found = decoder.decode(scores)
    assert [word.text for word in found.words] == ["ab", "b", "ab"]
    assert found.score == pytest.approx(20 - 1 - 1 + 3)


def test_priors_are_taken_out_of_posteriors():
    posteriors, priors = np.log([[0.7, 0.2, 0.1]]), np.log([0.9, 0.05, 0.05])
    assert acoustic_scores(posteriors, priors, 0.0).argmax() == 0
    assert acoustic_scores(posteriors, priors, 1.0).argmax() == 1
    np.testing.assert_allclose(np.exp(acoustic_scores(posteriors, priors, 1.0)), [[7 / 9, 4, 2]])
    with np.errstate(divide="ignore"), pytest.raises(UserError, match="unit 1 has the prior 0"):
        acoustic_scores(posteriors, np.log([0.5, 0.0, 0.5]), 1.0)


@pytest.mark.parametrize(("states", "silence"), [(1, None), (1, PAUSE), (2, None), (2, PAUSE)])
def test_units_are_aligned_as_by_enumeration(states, silence):
    units = [1, 2, 2, 3][: 4 if states == 1 else 2]
    scores = np.random.default_rng(2).normal(size=(T, V)) * 2
    found = align_units(scores, units, states=states, silence=silence)
    best = -math.inf, []
    for pauses in itertools.product((False, True) if silence is not None else (False,), repeat=len(units) + 1):
        chain, owner = [], []
        for i in range(len(units) + 1):
            if pauses[i]:
                chain, owner = [*chain, (silence, states)], [*owner, -1]
            if i < len(units):
                chain, owner = [*chain, (units[i], states)], [*owner, i]
        for counts in segmentations(chain, T):
            own = np.repeat([unit for unit, _ in chain], counts).astype(int)
            ends = np.cumsum(counts).tolist()
            spans = [(e - c, e) for e, c, o in zip(ends, counts, owner, strict=True) if o >= 0]
            best = max(best, (scores[np.arange(T), own].sum(), spans))
    assert found == best[1]
    with pytest.raises(UserError, match="do not fit into 1 frames"):
        align_units(scores[:1], units, states=states, silence=silence)


def test_mistakes_are_named():
    make = lambda lexicon, states=1: HybridDecoder(  # noqa: E731
        lexicon, GRAMMAR, states=states, silence=None, weight=1.0, bonus=0.0
    )
    with pytest.raises(UserError, match="no pronunciation of b, bi"):
        make({"ab": [[1]], "aab": [[1]], "b": []})
    with pytest.raises(UserError, match="'b' has no units"):
        make({**LEXICON, "b": [[]]})
    with pytest.raises(UserError, match="states=0"):
        make(LEXICON, states=0)
    with pytest.raises(UserError, match="unit 3, the scores only 3 units"):
        make(LEXICON).decode(np.zeros((2, 3)))
