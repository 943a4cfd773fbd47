"""A lexicon in a search: only its words come out, and a language model of words scores them.

Shapes: B batch, K beams, V tokens, S nodes of the trie, W words with their spellings, H of one spelling at most.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from speechjax.decode.automaton import DENSE_BYTES, Arcs, Automaton, make_automaton
from speechjax.decode.ngram import END, NGram
from speechjax.decode.ngram_scorer import ngram_arcs, start_state
from speechjax.decode.types import SPECIALS
from speechjax.errors import UserError

Lexicon = Mapping[str, Sequence[Sequence[int]]]
_NOWHERE, _ROOT = 0, 1


def read_lexicon(path: str | os.PathLike[str], tokens: Sequence[str]) -> dict[str, list[list[int]]]:
    """{word: its spellings in ids} of a text file, with the strings of all ids of a vocabulary, the specials' first.

    A line is `word<TAB>token token ...` or `word token token ...`; a word alone is spelled with its characters, of a
    vocabulary of bytes with those of UTF-8.  A word on several lines has several spellings.

    Raises UserError for a file that cannot be read, one without words, and for words with tokens that the vocabulary
    lacks, which it lists.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; which lexicon?") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save the lexicon in that encoding") from None
    ids = {token: i for i, token in enumerate(tokens) if i >= SPECIALS}
    spell = _bytes if len(ids) == 256 and "<0x00>" in ids else list
    lexicon: dict[str, list[list[int]]] = {}
    lost: dict[str, str] = {}
    for line in lines:
        word, *spelling = re.split("[ \t]+", line.strip(" \t\r"))
        if not word:
            continue
        spelling = spelling or spell(word)
        missing = [token for token in spelling if token not in ids]
        if missing:
            lost[word] = missing[0]
            continue
        found = [ids[token] for token in spelling]
        if found not in lexicon.setdefault(word, []):
            lexicon[word].append(found)
    if lost:
        shown = ", ".join(f"{word} ({token!r})" for word, token in list(lost.items())[:10])
        raise UserError(
            f"{path}: the vocabulary has no such tokens: {shown}{', ...' * (len(lost) > 10)} ({len(lost)} words in "
            "all); spell these words with its tokens, or leave them out"
        )
    if not lexicon:
        raise UserError(f"{path}: no words in it; a lexicon has one a line, with its tokens")
    return lexicon


def _bytes(word: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in word.encode()]


class LexiconState(NamedTuple):
    """Where in a word a hypothesis is, and the words before it: node and state of the model, int32 [B, K]."""

    node: jax.Array
    context: jax.Array


@flax.struct.dataclass
class LexiconScorer:
    """A `Scorer`: -inf for what is not words of a lexicon with a `boundary` token between them.

    With a model of words, a word weighs its log p (nats) given the words before it, with the exact back-off; one that
    the model does not know weighs what <unk> does, and of words spelled alike the likeliest counts.  Half a word is
    charged for what the likeliest unigram weighs that it can still become, and the rest when the word ends (look-ahead:
    Ortmanns, Ney and Eiden 1996); so words compete before they end, and sums over a text are the model's.  Without a
    model all words weigh 0.

    A text may end with a boundary and holds no two in a row; an empty one is allowed.  Made for vocabularies in which
    one token, such as the space of characters, ends words: where words follow each other without a mark (phonemes),
    one hypothesis could be several sequences of words, which a search by tokens cannot keep apart.

    `owed` float32 [S] is what half a word has been charged; the words that end at node s are `words` int32 [W], ids of
    the model, from `first[s]` on.
    """

    trie: Automaton
    owed: jax.Array
    first: jax.Array
    words: jax.Array
    model: Automaton | None
    homophones: int = flax.struct.field(pytree_node=False)
    begin: int = flax.struct.field(pytree_node=False)
    boundary: int = flax.struct.field(pytree_node=False)

    @classmethod
    def build(
        cls, lexicon: Lexicon, model: NGram | None, *, tokens: int, boundary: int, dense_bytes: int = DENSE_BYTES
    ) -> Self:
        """Of a lexicon in ids of a vocabulary of V `tokens`; a boundary at the end of a spelling is left out.

        Raises UserError for spellings that are empty, hold a boundary or ids that are no tokens.
        """
        endings: dict[tuple[int, ...], list[str]] = {}
        for word, spellings in lexicon.items():
            for spelling in spellings:
                bare = tuple(spelling[:-1] if len(spelling) and spelling[-1] == boundary else spelling)
                if not bare or not all(SPECIALS <= token < tokens and token != boundary for token in bare):
                    raise UserError(
                        f"lexicon: {word!r} is spelled {list(spelling)}, which is empty, holds the word boundary "
                        f"{boundary}, or ids outside {SPECIALS} to {tokens - 1}"
                    )
                endings.setdefault(bare, []).append(word)
        number = {spelling: [model.id(word) if model else 0 for word in words] for spelling, words in endings.items()}
        arcs, owed, nodes = _trie(number, model.logp[0] * np.log(10) if model else np.zeros(1), tokens)
        counts = np.zeros(len(owed) + 1, np.int64)
        at_node = {nodes[spelling]: ids for spelling, ids in number.items()}
        for node, ids in at_node.items():
            counts[node + 1] = len(ids)
        return cls(
            trie=make_automaton(arcs, tokens, dense_bytes),
            owed=jnp.asarray(owed, jnp.float32),
            first=jnp.asarray(np.cumsum(counts), jnp.int32),
            words=jnp.asarray([id for node in sorted(at_node) for id in at_node[node]], jnp.int32),
            model=make_automaton(ngram_arcs(model), len(model.symbols), dense_bytes) if model else None,
            homophones=int(counts.max()),
            begin=start_state(model) if model else 0,
            boundary=boundary,
        )

    def start(self, rows: int, beams: int) -> LexiconState:
        full = lambda value: jnp.full((rows, beams), value, jnp.int32)  # noqa: E731
        return LexiconState(full(_ROOT), full(self.begin))

    def scores(self, state: LexiconState) -> jax.Array:
        inside = self.trie.weights(state.node)
        return inside.at[..., :SPECIALS].set(0.0).at[..., self.boundary].set(self._end_word(state)[0])

    def advance(self, state: LexiconState, tokens: jax.Array) -> LexiconState:
        ends = tokens == self.boundary
        ended, context = self._end_word(state)
        inside = self.trie.step(state.node, jnp.maximum(tokens, 0))[1]
        node = jnp.where(ends, jnp.where(jnp.isfinite(ended), _ROOT, _NOWHERE), inside)
        new = LexiconState(node, jnp.where(ends, context, state.context))
        return jax.tree.map(lambda old, new: jnp.where(tokens < SPECIALS, old, new), state, new)

    def final(self, state: LexiconState) -> jax.Array:
        """float32 [B, K]: of a word that ends here, and then the text; or of the text alone after a boundary."""
        between = state.node == _ROOT
        ended, context = self._end_word(state)
        return jnp.where(between, 0.0, ended) + self._end_text(jnp.where(between, state.context, context))

    def _end_text(self, context: jax.Array) -> jax.Array:
        if self.model is None:
            return jnp.zeros(context.shape, jnp.float32)
        return self.model.step(context, jnp.full_like(context, END))[0]

    def _end_word(self, state: LexiconState) -> tuple[jax.Array, jax.Array]:
        """Weight of ending a word here, less what it was charged, -inf where none ends; and the context after it."""
        entry = self.first[state.node][..., None] + jnp.arange(self.homophones, dtype=jnp.int32)[None, None]
        there = entry < self.first[state.node + 1][..., None]
        context = jnp.broadcast_to(state.context[..., None], entry.shape)
        weight, after = jnp.zeros(entry.shape, jnp.float32), context
        if self.model is not None:
            weight, after = self.model.step(context, self.words[entry])
        weight = jnp.where(there, weight, -jnp.inf)
        best = jnp.argmax(weight, axis=-1, keepdims=True)
        pick = lambda x: jnp.take_along_axis(x, best, axis=-1)[..., 0]  # noqa: E731
        return pick(weight) - self.owed[state.node], pick(after)


def _trie(
    words: Mapping[tuple[int, ...], Sequence[int]], logp: np.ndarray, tokens: int
) -> tuple[Arcs, np.ndarray, dict[tuple[int, ...], int]]:
    """The trie as an automaton, what each node is charged, and the node of every spelling.

    Node 0 is where nothing leads on: all tokens lead there, at -inf, unless a node has an arc for them.
    """
    nodes: dict[tuple[int, ...], int] = {(): _ROOT}
    best: dict[tuple[int, ...], float] = {(): 0.0}
    for spelling, ids in words.items():
        likeliest = float(logp[list(ids)].max())
        for n in range(1, len(spelling) + 1):
            beginning = spelling[:n]
            nodes.setdefault(beginning, len(nodes) + 1)
            best[beginning] = max(best.get(beginning, -np.inf), likeliest)
    owed = np.array([0.0, *best.values()])
    arcs = sorted((nodes[beginning[:-1]], beginning[-1], node) for beginning, node in nodes.items() if beginning)
    source, symbol, target = np.array(arcs).T
    everything = np.arange(tokens)
    nowhere = np.full(tokens, _NOWHERE)
    weight = owed[target] - owed[source]
    joined = Arcs(
        np.concatenate([nowhere, source]),
        np.concatenate([everything, symbol]),
        np.concatenate([nowhere, target]),
        np.concatenate([np.full(tokens, -np.inf), weight]),
        np.zeros(len(owed), np.int64),
        np.zeros(len(owed)),
    )
    return joined, owed, nodes
