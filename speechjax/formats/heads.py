"""Heads of `transformers`' models: which class one of our tasks becomes, its rows, its part of the configuration.

A task without a class of its own gives its encoder alone, and its head stays in a file beside.  Blocks are plain dicts;
see families.py.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from speechjax.errors import UserError
from speechjax.formats.families import Block, Family
from speechjax.formats.names import SAME, Row, codebook, dense, only_theirs, tdnn
from speechjax.tasks.speaker import TDNN


@dataclass(frozen=True)
class Head:
    """`task` is ours, `suffix` what their class is called after its family's stem.

    `unlike` says why a task block has no such class ("" if it has), `rows` lists names, `write` and `read` translate
    its part of a configuration.
    """

    task: str
    suffix: str
    unlike: Callable[[Mapping[str, Any], int], str]
    rows: Callable[[Mapping[str, Any], int], Iterator[Row]]
    write: Callable[[Mapping[str, Any], int], Block]
    read: Callable[[Mapping[str, Any]], Block]


def _pretraining_rows(task: Mapping[str, Any], width: int) -> Iterator[Row]:
    yield from dense("quantizer/logits", "quantizer.weight_proj")
    yield Row("quantizer/codebook", "quantizer.codevectors", codebook(task["codebooks"]))
    yield from dense("project_context", "project_hid")
    yield from dense("project_target", "project_q")


def _write_pretraining(task: Mapping[str, Any], width: int) -> Block:
    return dict(
        num_codevector_groups=task["codebooks"], num_codevectors_per_group=task["codes"],
        codevector_dim=task["code_dim"], proj_codevector_dim=task["projection"], num_negatives=task["negatives"],
        contrastive_logits_temperature=task["logit_temperature"], diversity_loss_weight=task["diversity"],
        feat_quantizer_dropout=task["feature_dropout"], mask_time_prob=task["mask_prob"],
        mask_time_length=task["mask_span"],
    )  # fmt: skip


def _read_pretraining(hf: Mapping[str, Any]) -> Block:
    return dict(
        codebooks=hf["num_codevector_groups"], codes=hf["num_codevectors_per_group"], code_dim=hf["codevector_dim"],
        projection=hf["proj_codevector_dim"], negatives=hf["num_negatives"],
        logit_temperature=float(hf["contrastive_logits_temperature"]), diversity=float(hf["diversity_loss_weight"]),
        feature_dropout=float(hf["feat_quantizer_dropout"]),
    )  # fmt: skip


def _masks(task: Mapping[str, Any]) -> Block:
    """SpecAugment; with probabilities of 0 their model would have no mask embedding, so then it is off otherwise."""
    off = dict(apply_spec_augment=False, mask_time_prob=0.05)
    on = task["mask_prob"] or task["channel_mask_prob"]
    return (dict(mask_time_prob=task["mask_prob"]) if on else off) | dict(
        mask_time_length=task["mask_span"], mask_time_min_masks=0, mask_feature_prob=task["channel_mask_prob"],
        mask_feature_length=task["channel_mask_span"], final_dropout=task["head_dropout"],
    )  # fmt: skip


def _read_masks(hf: Mapping[str, Any]) -> Block:
    on = hf.get("apply_spec_augment", True)
    return dict(
        mask_prob=float(hf["mask_time_prob"]) if on else 0.0, mask_span=hf["mask_time_length"],
        channel_mask_prob=float(hf["mask_feature_prob"]) if on else 0.0, channel_mask_span=hf["mask_feature_length"],
        head_dropout=float(hf["final_dropout"]),
    )  # fmt: skip


def _ctc_unlike(task: Mapping[str, Any], width: int) -> str:
    if task["layers"] != "last":
        return "config.task.layers='weighted' (needs 'last')"
    return "config.task.recurrent_layers (needs 0)" if task["recurrent_layers"] else ""


def _write_ctc(task: Mapping[str, Any], width: int) -> Block:
    # What the loss here does; theirs is a sum, with infinities of transcripts that do not fit.
    return _masks(task) | dict(vocab_size=task["classes"], ctc_loss_reduction="mean", ctc_zero_infinity=True)


def _read_ctc(hf: Mapping[str, Any]) -> Block:
    return _read_masks(hf) | dict(classes=hf["vocab_size"], layers="last", recurrent_layers=0, recurrent_width=0)


def _weighted(task: Mapping[str, Any]) -> Iterator[Row]:
    if task["layers"] == "weighted":
        yield Row("layer_weights", "layer_weights", SAME)


def _projector(task: Mapping[str, Any], width: int) -> Iterator[Row]:
    """Theirs is always there: where ours has none, one that changes nothing."""
    if task["projection"]:
        yield from dense("project", "projector")
    else:
        yield only_theirs("projector.weight", np.eye(width, dtype=np.float32))
        yield only_theirs("projector.bias", np.zeros(width, np.float32))


def _classify_unlike(task: Mapping[str, Any], width: int) -> str:
    return "" if task["pooling"] == "mean" else f"config.task.pooling={task['pooling']!r} (needs 'mean')"


def _classify_rows(task: Mapping[str, Any], width: int) -> Iterator[Row]:
    yield from _weighted(task)
    yield from _projector(task, width)
    yield from dense("head", "classifier")


def _write_classify(task: Mapping[str, Any], width: int) -> Block:
    return _masks(task) | dict(
        use_weighted_layer_sum=task["layers"] == "weighted", classifier_proj_size=task["projection"] or width,
        problem_type="single_label_classification" if task["loss"] == "softmax" else "multi_label_classification",
    )  # fmt: skip


def _read_layers(hf: Mapping[str, Any]) -> Block:
    return _read_masks(hf) | dict(layers="weighted" if hf["use_weighted_layer_sum"] else "last")


def _read_classify(hf: Mapping[str, Any]) -> Block:
    several = hf.get("problem_type") == "multi_label_classification"
    return _read_layers(hf) | dict(
        classes=len(hf["id2label"]), projection=hf["classifier_proj_size"], pooling="mean",
        loss="sigmoid" if several else "softmax",
    )  # fmt: skip


def _frames_rows(task: Mapping[str, Any], width: int) -> Iterator[Row]:
    yield from _weighted(task)
    yield from dense("head", "classifier")


def _write_frames(task: Mapping[str, Any], width: int) -> Block:
    return _masks(task) | dict(use_weighted_layer_sum=task["layers"] == "weighted")


def _read_frames(hf: Mapping[str, Any]) -> Block:
    return _read_layers(hf) | dict(classes=len(hf["id2label"]), loss="softmax")


def _speaker_unlike(task: Mapping[str, Any], width: int) -> str:
    if task["pooling"] != "xvector":
        return f"config.task.pooling={task['pooling']!r} (needs 'xvector')"
    if task["loss"] == "softmax":
        return "config.task.loss='softmax' (needs 'am' or 'aam')"
    inputs = task["projection"] or width
    return "" if inputs == task["tdnn"] else f"config.task.tdnn={task['tdnn']} (needs {inputs}, what it is fed)"


def _speaker_rows(task: Mapping[str, Any], width: int) -> Iterator[Row]:
    yield from _weighted(task)
    yield from _projector(task, width)
    for i, (size, _) in enumerate(TDNN):
        yield from dense(f"xvector/tdnn_{i + 1}", f"tdnn.{i}.kernel", turn=tdnn(size))
    yield from dense("embed", "feature_extractor")
    E = task["embedding"]
    if task.get("second_layer"):
        yield from dense("second", "classifier")
    else:
        yield only_theirs("classifier.weight", np.eye(E, dtype=np.float32))
        yield only_theirs("classifier.bias", np.zeros(E, np.float32))
    yield Row("prototypes", "objective.weight", SAME)


def _write_speaker(task: Mapping[str, Any], width: int) -> Block:
    sizes, dilations = zip(*TDNN, strict=True)
    return _masks(task) | dict(
        use_weighted_layer_sum=task["layers"] == "weighted", tdnn_dim=[task["tdnn"]] * 4 + [task["tdnn_top"]],
        tdnn_kernel=list(sizes), tdnn_dilation=list(dilations), xvector_output_dim=task["embedding"],
    )  # fmt: skip


def _read_speaker(hf: Mapping[str, Any]) -> Block:
    found = tuple(zip(hf["tdnn_kernel"], hf["tdnn_dilation"], strict=False))
    *below, top = hf["tdnn_dim"]
    if found != TDNN or len(set(below)) != 1 or len(below) != 4:
        raise UserError(
            f"config.json: tdnn_kernel, tdnn_dilation and tdnn_dim {hf['tdnn_dim']}: x-vectors here are those of "
            "Snyder et al. 2018, four layers alike and a wider one"
        )
    return _read_layers(hf) | dict(
        classes=len(hf["id2label"]), projection=below[0], pooling="xvector", tdnn=below[0], tdnn_top=top,
        embedding=hf["xvector_output_dim"], second_layer=True, loss="am", margin=0.4, scale=30.0,
    )  # fmt: skip


def _none(task: Mapping[str, Any], width: int) -> str:
    return ""


def _turns(task: Mapping[str, Any], width: int) -> str:
    return "" if task["loss"] == "softmax" else f"config.task.loss={task['loss']!r} (needs 'softmax')"


HEADS = (
    Head("wav2vec2", "ForPreTraining", _none, _pretraining_rows, _write_pretraining, _read_pretraining),
    Head("ctc", "ForCTC", _ctc_unlike, lambda task, width: dense("head", "lm_head"), _write_ctc, _read_ctc),
    Head("classify", "ForSequenceClassification", _classify_unlike, _classify_rows, _write_classify, _read_classify),
    Head("frames", "ForAudioFrameClassification", _turns, _frames_rows, _write_frames, _read_frames),
    Head("speaker", "ForXVector", _speaker_unlike, _speaker_rows, _write_speaker, _read_speaker),
)


def head_of(family: Family, task: Mapping[str, Any], width: int) -> tuple[Head | None, str]:
    """(the head of a task block or None, why there is none)."""
    name = task["name"]
    for head in HEADS:
        if head.task == name and (name in family.tasks or name == family.pretraining):
            return (None, why) if (why := head.unlike(task, width)) else (head, "")
    return None, f"{family.stem} has no class for the task {name}"


def head_named(family: Family, architecture: str) -> Head | None:
    """The head of a class of theirs, None for the encoder alone; UserError for classes that have no task here."""
    suffix = architecture.removeprefix(family.stem)
    if suffix == "Model":
        return None
    for head in HEADS:
        if head.suffix == suffix and (head.task in family.tasks or head.task == family.pretraining):
            return head
    there = ", ".join(["Model", *(h.suffix for h in HEADS if h.task in family.tasks or h.task == family.pretraining)])
    raise UserError(f"config.json: architectures names {architecture}; of {family.stem} there are {there}")
