"""SentencePiece models: trained to the same bytes each time, or loaded; silent, and errors that say what to change.

The library is the extra `speechjax[text]`, imported when first needed.
"""

import io
import re
from typing import TYPE_CHECKING, Any

from speechjax.errors import UserError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_SILENT = 2  # minloglevel: what is an error is raised as well
# The trainer cuts the names of its specials out of the texts, and then < and > have no pieces. U+FDD0 is in no text.
_SPECIALS = {
    option: value
    for i, name in enumerate(("pad", "bos", "eos", "unk"))
    for option, value in ((f"{name}_id", i), (f"{name}_piece", f"\ufdd0{name}"))
}


def _library() -> Any:
    try:
        import sentencepiece
    except ImportError:
        raise UserError("sentencepiece is not installed: run `pip install 'speechjax[text]'`") from None
    return sentencepiece


def load(model: bytes) -> "SentencePieceProcessor":
    """The processor of a serialised model. Raises ValueError where it is none, UserError without the library."""
    library = _library()
    try:
        # Of no bytes the library makes a processor that complains on stderr at every call.
        if not model:
            raise RuntimeError("empty")
        return library.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError("not a SentencePiece model") from error


def ordinary(processor: "SentencePieceProcessor") -> list[str]:
    """The pieces that are neither pad, bos, eos nor unk, in the order of their ids."""
    specials = {processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()}
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size()) if i not in specials]


def train(texts: list[str], size: int) -> bytes:
    """A unigram model (Kudo 2018) of `size` pieces that begin with the specials pad, bos, eos and unk.

    Every character of the texts gets a piece, so none of them is unknown later. The order of the texts does not
    matter. Raises UserError for texts that are all empty or allow no model of this size; it says which they do.
    """
    library = _library()
    # One thread, whole texts and a fixed order: sums of floats must not depend on who came first.
    sentences = sorted(text for text in texts if text.strip())
    if not sentences:
        raise UserError("sentencepiece: all texts are empty, or there are none; does the source have transcripts?")
    model = io.BytesIO()
    try:
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            character_coverage=1.0,
            # Texts come normalised, by steps that vocab.json spells out.
            normalization_rule_name="identity",
            # What is longer, in bytes, the trainer would leave out without a word.
            max_sentence_length=max(len(sentence.encode()) for sentence in sentences),
            num_threads=1,
            minloglevel=_SILENT,
            **_SPECIALS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"sentencepiece:{size}: {_advice(str(error), len(sentences))}") from None
    return model.getvalue()


def _advice(error: str, count: int) -> str:
    """What to do about a training error; the numbers are in the library's words for it."""
    given = f"{count} text{'s' * (count > 1)}"
    if most := re.search(r"size too high .* <= (\d+)", error):
        return f"no more than {most[1]} tokens come out of {given}: say sentencepiece:{most[1]}, or take more texts"
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"the characters of {given} need at least {least[1]} tokens: say so many, or bytes instead"
    return f"cannot train on {given}: {error.strip().splitlines()[-1]}"
