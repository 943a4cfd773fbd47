"""Vocabularies and names of classes: ours, and what processors and tokenizers of `transformers` read.

Ours has the specials <pad>, <s>, </s>, <unk> first and <pad> for CTC's blank; theirs may have them anywhere, under any
name.  What moves in the vocabulary moves in the head: `order` says how.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from speechjax.data.text import SPECIALS
from speechjax.errors import UserError

log = logging.getLogger("speechjax")

_NEVER = -1e4  # bias of a special that their vocabulary has not: as a logit, no probability at all


def write_words(vocabulary: Mapping[str, bytes], front: str) -> dict[str, bytes]:
    """Their tokenizer's files from our vocab.json; `front` is the class of their feature extractor.

    Raises UserError for a vocabulary that no tokenizer of theirs has.
    """
    if "vocab.json" not in vocabulary:
        raise UserError("this run has no vocab.json, so nobody knows what its classes are: copy it into the workdir")
    content = json.loads(vocabulary["vocab.json"])
    kind, tokens = content["kind"], list(content["tokens"])
    config: dict[str, Any] = dict(
        pad_token=SPECIALS[0], bos_token=SPECIALS[1], eos_token=SPECIALS[2], unk_token=SPECIALS[3],
        processor_class="Wav2Vec2BertProcessor" if front.startswith("Seamless") else "Wav2Vec2Processor",
        clean_up_tokenization_spaces=False, do_lower_case=False,
    )  # fmt: skip
    if kind in ("characters", "symbols"):
        delimiter = next(mark for mark in ("|", "▁", "\u241f") if mark not in tokens)
        tokens = [delimiter if token == " " else token for token in tokens]
        config |= dict(tokenizer_class="Wav2Vec2CTCTokenizer", word_delimiter_token=delimiter)
        config["replace_word_delimiter_char"] = " "
    elif kind == "phonemes":
        # do_phonemize would need another library, and other phones.
        config |= dict(tokenizer_class="Wav2Vec2PhonemeCTCTokenizer", do_phonemize=False, phone_delimiter_token=" ")
        config |= dict(word_delimiter_token=None, phonemizer_lang=content["voice"])
    else:
        config |= dict(tokenizer_class="PreTrainedTokenizerFast")
        return {"tokenizer_config.json": _json(config), "tokenizer.json": _json(_fast(kind, tokens))}
    return {
        "tokenizer_config.json": _json(config),
        "vocab.json": _json({token: i for i, token in enumerate(tokens)}),
        "special_tokens_map.json": _json({key: config[key] for key in config if key.endswith("_token") and config[key]
                                          in SPECIALS}),
    }  # fmt: skip


def _fast(kind: str, tokens: list[str]) -> dict[str, Any]:
    """tokenizer.json of pieces or bytes, which decodes alone: texts are cut into pieces by SentencePiece's model."""
    ctc = dict(type="CTC", pad_token=SPECIALS[0], word_delimiter_token="▁", cleanup=False)
    after = [dict(type="ByteFallback"), dict(type="Fuse")] if kind == "bytes" else [dict(type="Fuse")]
    strip = dict(type="Strip", content=" ", start=1, stop=0)
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return dict(
        version="1.0", truncation=None, padding=None, normalizer=None, pre_tokenizer=None, post_processor=None,
        added_tokens=[dict(id=i, content=token, **flags) for i, token in enumerate(SPECIALS)],
        decoder=dict(type="Sequence", decoders=[ctc, *after, *([] if kind == "bytes" else [strip])]),
        model=dict(type="WordLevel", vocab={token: i for i, token in enumerate(tokens)}, unk_token=SPECIALS[3]),
    )  # fmt: skip


def read_words(files: Mapping[str, bytes], size: int, blank: int) -> tuple[dict[str, bytes], list[int]]:
    """(our vocab.json, their id of each of our classes) of a CTC head of `size` classes whose id `blank` is its blank.

    A class that they have not, one of the specials, has the id -1.  Without vocab.json tokens are named by their ids.
    Raises UserError for files that are no vocabulary of that size.
    """
    config = _object(files, "tokenizer_config.json")
    if "vocab.json" in files:
        ids = _object(files, "vocab.json") | _object(files, "added_tokens.json")
        if not all(type(i) is int for i in ids.values()):
            raise UserError("vocab.json: not one id a token; of several languages keep one, {token: id}")
    else:
        log.warning(
            "no vocab.json: the %d classes of the head are named <0>, <1>, ...; copy the tokenizer's files", size
        )
        ids = {f"<{i}>": i for i in range(size)}
    named = {i: token for token, i in ids.items() if 0 <= i < size}
    special = {
        our: ids.get(_name(config.get(key), default), -1)
        for our, key, default in zip(
            SPECIALS, ("pad_token", "bos_token", "eos_token", "unk_token"), SPECIALS, strict=True
        )
    }
    special[SPECIALS[0]] = blank
    special = {our: i if i < size else -1 for our, i in special.items()}
    if len({i for i in special.values() if i >= 0}) != sum(i >= 0 for i in special.values()):
        special |= {our: -1 for our in SPECIALS[1:] if special[our] in (blank, *_repeated(special, our))}
    rest = [i for i in range(size) if i not in special.values()]
    delimiter = _name(config.get("word_delimiter_token", "|"), "")
    tokens = [named.get(i, f"<{i}>") for i in rest]
    if " " not in tokens:
        tokens = [" " if token == delimiter else token for token in tokens]
    steps = "single_spaces"
    if config.get("do_lower_case"):  # which prints small letters, whatever its tokens are
        small = [token.lower() for token in tokens]
        if len(set(small)) != len(small):
            raise UserError("tokenizer_config.json: do_lower_case, but tokens differ in nothing but their case")
        tokens, steps = small, "lowercase single_spaces"
    content: dict[str, Any] = dict(format=1, kind="symbols", steps=steps)
    if config.get("tokenizer_class") == "Wav2Vec2PhonemeCTCTokenizer":
        content |= dict(kind="phonemes", voice=str(config.get("phonemizer_lang", "en-us")))
    elif all(len(token) == 1 for token in tokens):
        content["kind"] = "characters"
    content |= dict(specials={t: i for i, t in enumerate(SPECIALS)}, tokens=[*SPECIALS, *tokens])
    return {"vocab.json": _json(content, indent=1)}, [*(special[our] for our in SPECIALS), *rest]


def _repeated(special: Mapping[str, int], mine: str) -> list[int]:
    """Ids of the specials before `mine`."""
    return [special[our] for our in SPECIALS[: SPECIALS.index(mine)]]


def reorder(head: Mapping[str, np.ndarray], order: list[int]) -> dict[str, np.ndarray]:
    """Kernel [D, V] and bias [V] of their CTC head with the classes of `order`; what they have not never happens."""
    kernel, bias = head["head/kernel"], head["head/bias"]
    there = np.array(order) >= 0
    return {
        "head/kernel": np.where(there, kernel[:, order], 0).astype(kernel.dtype),
        "head/bias": np.where(there, bias[order], _NEVER).astype(bias.dtype),
    }


def write_labels(vocabulary: Mapping[str, bytes], task: Mapping[str, Any]) -> dict[str, Any]:
    """id2label and label2id of the classes of a task block; those without a name are LABEL_k."""
    file, key = ("phones.json", "symbols") if task["name"] == "frames" else ("labels.json", "names")
    content = json.loads(vocabulary.get(file, b"{}"))
    content = content.get("labels", {}).get(task.get("label"), content)  # several labels, each of a name
    names, classes = list(map(str, content.get(key, []))), task["classes"]
    names += [f"LABEL_{k}" for k in range(len(names), classes)]
    return dict(
        id2label={str(k): name for k, name in enumerate(names[:classes])},
        label2id={name: k for k, name in enumerate(names[:classes])},
    )


def read_labels(hf: Mapping[str, Any], label: str) -> dict[str, bytes]:
    """Our labels.json of config.data.label=`label`, or phones.json without one.

    Raises UserError where id2label is no list of names.
    """
    found = hf["id2label"]
    if sorted(found, key=str) != sorted(map(str, range(len(found))), key=str):
        raise UserError("config.json: id2label does not name the classes 0, 1, 2, ...")
    names = [str(found[str(k)]) for k in range(len(found))]
    if not label:
        return {"phones.json": _json(dict(format=1, symbols=names), indent=1)}
    return {"labels.json": _json(dict(format=1, label=label, names=names), indent=1)}


def _name(token: Any, default: str) -> str:
    """The text of a token, which may be an object."""
    return str(token.get("content", default) if isinstance(token, dict) else default if token is None else token)


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        found = json.loads(files[name]) if name in files else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{name}: damaged, it is no JSON object")
    return found


def _json(content: Any, indent: int = 2) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=indent) + "\n").encode()
