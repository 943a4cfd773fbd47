"""N-gram language models of words, characters, phones or pieces: training and perplexity.  NumPy; files in arpa.py.

A model is a trie in sorted arrays.  Row r of order k is an n-gram of k symbols: its last one is `keys[k - 1][r] % V`,
and the k - 1 before it are row `keys[k - 1][r] // V` of order k - 1.  So every n-gram's beginning is in the model, as
in every ARPA file, and looking up many n-grams is one binary search an order.

Shapes: V symbols, T places of a text, n_k n-grams of order k.
"""

import array
import collections
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from speechjax.errors import UserError

log = logging.getLogger("speechjax")

UNKNOWN, BEGIN, END = range(3)
MARKS = ("<unk>", "<s>", "</s>")
NEVER = -99.0  # log10 of what cannot be, as in SRILM's files
_FALLBACK = np.array([0.0, 0.5, 1.0, 1.5])  # discounts of KenLM where counts of counts give none


@dataclass(frozen=True, eq=False)
class NGram:
    """A back-off model of order N over V `symbols`, of which the first three are <unk>, <s> and </s>.

    By order: `keys` int64 [n_k] ascending, `logp` float32 [n_k] and, but for the highest, `backoff` float32 [n_k], in
    log10.  Order 1 has every symbol, in the order of ids.
    """

    symbols: tuple[str, ...]
    keys: list[np.ndarray]
    logp: list[np.ndarray]
    backoff: list[np.ndarray]

    @property
    def order(self) -> int:
        return len(self.keys)

    @functools.cached_property
    def _ids(self) -> dict[str | None, int]:
        return {symbol: i for i, symbol in enumerate(self.symbols) if i >= len(MARKS)}

    def id(self, symbol: str | None) -> int:
        """Of a symbol; that of <unk> for None and for what the model does not know."""
        return self._ids.get(symbol, UNKNOWN)

    def find(self, k: int, parents: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """Rows of order k >= 2 of the n-grams (row of order k - 1, symbol); -1 where there is none, or the row is."""
        keys, wanted = self.keys[k - 1], parents.astype(np.int64) * len(self.symbols) + symbols
        if not len(keys):
            return np.full(wanted.shape, -1)
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[at] == wanted, at, -1)

    def score(self, texts: Iterable[Sequence[str | None]]) -> tuple[np.ndarray, np.ndarray]:
        """log10 p(symbol | those before it in its text) float64 [T], and the symbols' ids int32 [T].

        Of all texts in a row, with the </s> that ends each; what is not in the model counts as <unk>.
        """
        stream = _stream(texts, self.id)
        context, found = stream, self.logp[0][stream].astype(np.float64)
        for k in range(2, self.order + 1):
            before = np.append(-1, context[:-1])  # the row of the k - 1 symbols before each place
            row = self.find(k, before, stream)
            weight = np.where(before >= 0, self.backoff[k - 2][before], 0)
            found = np.where(row >= 0, self.logp[k - 1][row], found + weight)
            context = row
        predicted = stream != BEGIN
        return found[predicted], stream[predicted]

    def measure(self, texts: Iterable[Sequence[str | None]]) -> "Measure":
        """How well the model predicts these texts."""
        logp, ids = self.score(texts)
        known = ids != UNKNOWN
        words, unknown = (ids != END).sum(), (~known).sum()
        return Measure(int(words), len(ids) - int(words), int(unknown), float(logp.sum()), float(logp[known].sum()))


class Measure(NamedTuple):
    """Of texts: symbols and </s>, how many symbols are unknown; log10 of their probability, and without those."""

    symbols: int
    ends: int
    unknown: int
    logp: float
    logp_known: float

    @property
    def perplexity(self) -> float:
        """Of symbols and </s>, with <unk> a symbol like any other."""
        return 10 ** (-self.logp / (self.symbols + self.ends))

    @property
    def perplexity_known(self) -> float:
        """Without the unknown ones."""
        return 10 ** (-self.logp_known / (self.symbols + self.ends - self.unknown))

    @property
    def unknown_share(self) -> float:
        """The out-of-vocabulary rate."""
        return self.unknown / max(self.symbols, 1)


# ---- training


def train(texts: Iterable[Sequence[str | None]], order: int) -> NGram:
    """Interpolated modified Kneser-Ney of order N; of a lower order where no text is so long.

    Texts are sequences of symbols, None for one outside the vocabulary.  Chen and Goodman 1998 (TR-10-98, section 3.1,
    equations 25 to 27): three discounts an order.  The rest as in KenLM (Heafield et al. 2013): unigrams are
    interpolated with a uniform distribution over all symbols but <s>, so <unk> has a share; n-grams that begin with <s>
    count as often as they occur; an order whose counts of counts give no discounts has 0.5, 1 and 1.5 (logged).
    Raises UserError where there are no texts.
    """
    symbols, stream = _vocabulary(texts)
    V, T = len(symbols), len(stream)
    if not T:
        raise UserError("a language model needs text, and there is none")
    keys, counts = [np.arange(V, dtype=np.int64)], [np.bincount(stream, minlength=V)]
    starts = [keys[0] == BEGIN]  # whether an n-gram begins with <s>
    suffixes: list[np.ndarray] = [np.zeros(V, np.int64)]  # row of an n-gram without its first symbol
    rows, places = stream, np.arange(T)  # of the n-gram that begins at a place; those where one does
    for k in range(2, order + 1):
        places = places[stream[places + k - 2] != END]
        if not len(places):
            log.warning("order %d instead of %d: no text is longer", k - 1, order)
            break
        found, first, inverse, count = np.unique(
            rows[places].astype(np.int64) * V + stream[places + k - 1],
            return_index=True, return_inverse=True, return_counts=True,
        )  # fmt: skip
        keys.append(found)
        counts.append(count)
        starts.append(starts[-1][found // V])
        suffixes.append(rows[places[first] + 1].astype(np.int64))
        rows = np.full(T, -1, np.int32)
        rows[places] = inverse
    return _smooth(symbols, keys, counts, starts, suffixes)


def _smooth(
    symbols: tuple[str, ...],
    keys: list[np.ndarray],
    counts: list[np.ndarray],
    starts: list[np.ndarray],
    suffixes: list[np.ndarray],
) -> NGram:
    """The model of counted n-grams, order by order from the lowest."""
    V = len(symbols)
    logp, backoff, lower = [], [], np.array([1 / (V - 1)])
    for k in range(1, len(keys) + 1):
        adjusted = counts[k - 1]
        if k < len(keys):  # in how many ways it goes on to the left
            ways = np.bincount(suffixes[k], minlength=len(adjusted))
            adjusted = np.where(starts[k - 1], adjusted, ways)
        if k == 1:
            adjusted = np.where(starts[0], 0, adjusted)  # nothing predicts <s>
        discount = _discounts(adjusted, k)[np.minimum(adjusted, 3)]
        context = keys[k - 1] // V
        contexts = len(keys[k - 2]) if k > 1 else 1
        total = np.bincount(context, adjusted, minlength=contexts)
        freed = np.bincount(context, discount, minlength=contexts)
        weight = np.where(total > 0, freed / np.maximum(total, 1), 1)  # 1: nothing follows
        lower = (adjusted - discount) / total[context] + weight[context] * lower[suffixes[k - 1]]
        logp.append(_log10(np.where(starts[0], 0, lower) if k == 1 else lower))
        if k > 1:
            backoff.append(_log10(weight))
    return NGram(symbols, keys, logp, backoff)


def _discounts(adjusted: np.ndarray, order: int) -> np.ndarray:
    """float64 [4]: what a count of 0, 1, 2, and 3 or more gives up."""
    n = np.bincount(adjusted[adjusted < 5], minlength=5).astype(np.float64)
    if n[1:4].all():
        j = np.arange(1, 4)
        found = j - (j + 1) * n[1] / (n[1] + 2 * n[2]) * n[2:5] / n[1:4]
        if ((found >= 0) & (found <= j)).all():
            return np.append(0, found)
    log.info("%d-grams: few symbols or little text, no discounts of their own; taking 0.5, 1 and 1.5", order)
    return _FALLBACK


def _log10(x: np.ndarray) -> np.ndarray:
    return np.log10(np.maximum(x, 10.0**NEVER)).astype(np.float32)


def _vocabulary(texts: Iterable[Sequence[str | None]]) -> tuple[tuple[str, ...], np.ndarray]:
    """Symbols, sorted after the marks, and the texts as ids."""
    ids: dict[str | None, int] = collections.defaultdict(itertools.count(len(MARKS)).__next__)
    ids[None] = UNKNOWN
    stream = _stream(texts, ids.__getitem__)
    found = [symbol for symbol in ids if symbol is not None]  # in the order of their ids
    order = sorted(range(len(found)), key=found.__getitem__)
    rank = np.arange(len(MARKS) + len(found), dtype=np.int32)
    rank[np.array(order, np.int64) + len(MARKS)] = np.arange(len(found)) + len(MARKS)
    return (*MARKS, *(found[i] for i in order)), rank[stream]


def _stream(texts: Iterable[Sequence[str | None]], id: Callable[[str | None], int]) -> np.ndarray:
    """int32: <s>, the ids of a text, </s>, and so on."""
    stream = array.array("i")
    for text in texts:
        stream.append(BEGIN)
        stream.extend(map(id, text))
        stream.append(END)
    return np.array(stream, np.int32)
