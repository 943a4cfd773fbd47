"""What parameters are called here and in `transformers`: one table a family, read in both directions.

A row pairs a path of ours, "encoder/transformer/layer0/mlp_up/kernel" (layers one by one, never stacked), with a name
of theirs and the turn that makes one array of the other.  State beside parameters has its collection in front,
"batch_stats/encoder/...".  Turns only move numbers, so that a round trip gives back every bit.

Shapes: D width, C channels, K kernel, H heads, E width of a head, G codebooks, V codes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from speechjax.errors import UserError

Arrays = dict[str, np.ndarray]
Change = Callable[[np.ndarray], np.ndarray]


class Turn(NamedTuple):
    """`to` makes their array of ours, `back` ours of theirs."""

    to: Change
    back: Change


class Row(NamedTuple):
    """`ours` "" is what only they have: without effect, written as `filler`, and left out when read."""

    ours: str
    theirs: str
    turn: Turn
    filler: np.ndarray | None = None


SAME = Turn(lambda x: x, lambda x: x)
FLIP = Turn(np.transpose, np.transpose)  # dense [in, out] and [out, in]; convolutions [K, I, O] and [O, I, K]
POINTWISE = Turn(lambda x: x.T[..., None], lambda x: x[..., 0].T)  # dense [in, out] and convolution [out, in, 1]
DEPTHWISE = Turn(lambda x: x.T[:, None], lambda x: x[:, 0].T)  # [K, D] and [D, 1, K]
PER_HEAD = Turn(lambda x: x.reshape(1, -1, 1, 1), np.ravel)  # [H] and [1, H, 1, 1]


def _interleave(x: np.ndarray) -> np.ndarray:
    """Rows of sines, then of cosines, become sine, cosine, sine, cosine: [D, out] -> [D, out]."""
    return x.reshape(2, len(x) // 2, -1).transpose(1, 0, 2).reshape(x.shape)


def _part(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x) // 2, 2, -1).transpose(1, 0, 2).reshape(x.shape)


SINUSOIDS = Turn(lambda x: _interleave(x).T, lambda x: _part(x.T))  # a dense layer on positions


def codebook(groups: int) -> Turn:
    """[G, V, C / G] and [1, G V, C / G]."""
    return Turn(lambda x: x.reshape(1, -1, x.shape[-1]), lambda x: x.reshape(groups, -1, x.shape[-1]))


def tdnn(kernel: int) -> Turn:
    """A convolution [K, I, O] and a dense layer on windows [O, K I]."""
    return Turn(
        lambda x: x.transpose(2, 0, 1).reshape(x.shape[2], -1),
        lambda x: x.reshape(len(x), kernel, -1).transpose(1, 2, 0),
    )


def dense(ours: str, theirs: str, *, bias: bool = True, turn: Turn = FLIP) -> Iterator[Row]:
    yield Row(f"{ours}/kernel", f"{theirs}.weight", turn)
    if bias:
        yield Row(f"{ours}/bias", f"{theirs}.bias", SAME)


def norm(ours: str, theirs: str) -> Iterator[Row]:
    yield Row(f"{ours}/scale", f"{theirs}.weight", SAME)
    yield Row(f"{ours}/bias", f"{theirs}.bias", SAME)


def only_theirs(theirs: str, value: Any) -> Row:
    return Row("", theirs, SAME, np.asarray(value))


# ---------------------------------------------------------------------------------------------- encoders


def waveform(model: Mapping[str, Any], base: str) -> Iterator[Row]:
    """The convolutions of the front end and the projection of their features."""
    front = model["frontend"]
    for i, channels in enumerate(front["channels"]):
        ours, theirs = "encoder/front/", f"{base}feature_extractor.conv_layers.{i}."
        folded = front["norm"] == "group" and i == 0
        yield Row(ours + ("conv0/kernel" if folded else f"conv{i}_kernel"), theirs + "conv.weight", FLIP)
        if front["bias"] and folded:  # the norm over time takes it off again
            yield only_theirs(theirs + "conv.bias", np.zeros(channels, np.float32))
        elif front["bias"]:
            yield Row(f"{ours}conv{i}_bias", theirs + "conv.bias", SAME)
        if folded or front["norm"] == "layer":
            yield from norm(ours + ("conv0" if folded else f"norm{i}"), theirs + "layer_norm")
    yield from projection(base)


def projection(base: str) -> Iterator[Row]:
    yield from norm("encoder/feature_norm", f"{base}feature_projection.layer_norm")
    yield from dense("encoder/projection", f"{base}feature_projection.projection")
    yield Row("encoder/mask_embedding", f"{base}masked_spec_embed", SAME)


LAYER_DENSE = {
    "attention/query": "attention.q_proj",
    "attention/key": "attention.k_proj",
    "attention/value": "attention.v_proj",
    "attention/out": "attention.out_proj",
    "mlp_up": "feed_forward.intermediate_dense",
    "mlp_down": "feed_forward.output_dense",
}
LAYER_NORM = {"attention_norm": "layer_norm", "mlp_norm": "final_layer_norm"}


def transformer(model: Mapping[str, Any], base: str) -> Iterator[Row]:
    """Positions by convolution, and transformer layers."""
    positions, theirs = "encoder/transformer/positions/", f"{base}encoder.pos_conv_embed."
    depth = model["positions"].get("depth", 1)
    if depth == 1:
        yield Row(positions + "direction", theirs + "conv.parametrizations.weight.original1", FLIP)
        yield Row(positions + "gain", theirs + "conv.parametrizations.weight.original0", FLIP)
        yield Row(positions + "bias", theirs + "conv.bias", SAME)
    for i in range(depth if depth > 1 else 0):
        yield Row(f"{positions}conv{i}_kernel", f"{theirs}layers.{i}.conv.weight", FLIP)
        yield Row(f"{positions}conv{i}_bias", f"{theirs}layers.{i}.conv.bias", SAME)
    yield from norm("encoder/transformer/norm", f"{base}encoder.layer_norm")
    gated = model.get("attention", {}).get("gated", False)
    for i in range(model["layers"]):
        ours, theirs = f"encoder/transformer/layer{i}/", f"{base}encoder.layers.{i}."
        for mine, name in LAYER_DENSE.items():
            yield from dense(ours + mine, theirs + name)
        for mine, name in LAYER_NORM.items():
            yield from norm(ours + mine, theirs + name)
        if gated:
            yield from dense(ours + "attention/gate", theirs + "attention.gru_rel_pos_linear")
            yield Row(ours + "attention/gate_scale", theirs + "attention.gru_rel_pos_const", PER_HEAD)
    if gated:
        name = f"{base}encoder.layers.0.attention.rel_attn_embed.weight"
        yield Row("encoder/transformer/attention_bias/table", name, SAME)


CONFORMER_DENSE = {
    "mlp1_up": "ffn1.intermediate_dense",
    "mlp1_down": "ffn1.output_dense",
    "mlp2_up": "ffn2.intermediate_dense",
    "mlp2_down": "ffn2.output_dense",
    "attention/query": "self_attn.linear_q",
    "attention/key": "self_attn.linear_k",
    "attention/value": "self_attn.linear_v",
    "attention/out": "self_attn.linear_out",
}
CONFORMER_NORM = {
    "mlp1_norm": "ffn1_layer_norm",
    "attention_norm": "self_attn_layer_norm",
    "conv_norm": "conv_module.layer_norm",
    "mlp2_norm": "ffn2_layer_norm",
    "norm": "final_layer_norm",
}


def conformer(model: Mapping[str, Any], base: str) -> Iterator[Row]:
    """Conformer layers, and the norm above them where there is one."""
    if model["norm"] == "pre":
        yield from norm("encoder/transformer/norm", f"{base}encoder.layer_norm")
    kind = model["attention"]["positions"]
    if kind == "rotary_inputs":  # which here are computed
        E = model["width"] // model["heads"]
        frequencies = (10000.0 ** -(np.arange(0, E, 2) / E)).astype(np.float32)
        yield only_theirs(f"{base}encoder.embed_positions.inv_freq", frequencies)
    for i in range(model["layers"]):
        ours, theirs = f"encoder/transformer/layer{i}/", f"{base}encoder.layers.{i}."
        for mine, name in CONFORMER_DENSE.items():
            yield from dense(ours + mine, theirs + name)
        for mine, name in CONFORMER_NORM.items():
            yield from norm(ours + mine, theirs + name)
        yield from dense(ours + "conv/pointwise_in", theirs + "conv_module.pointwise_conv1", bias=False, turn=POINTWISE)
        yield Row(ours + "conv/depthwise_kernel", theirs + "conv_module.depthwise_conv.weight", DEPTHWISE)
        yield from dense(
            ours + "conv/pointwise_out", theirs + "conv_module.pointwise_conv2", bias=False, turn=POINTWISE
        )
        yield from _conv_norm(model, ours, theirs)
        if kind == "relative":
            yield Row(ours + "attention/distance/kernel", theirs + "self_attn.linear_pos.weight", SINUSOIDS)
            yield Row(ours + "attention/content_bias", theirs + "self_attn.pos_bias_u", SAME)
            yield Row(ours + "attention/distance_bias", theirs + "self_attn.pos_bias_v", SAME)
        if kind == "shaw":
            yield Row(ours + "attention/distance_table", theirs + "self_attn.distance_embedding.weight", SAME)


def _conv_norm(model: Mapping[str, Any], ours: str, theirs: str) -> Iterator[Row]:
    if model["block"]["conv_norm"] == "layer":
        yield from norm(ours + "conv/norm", theirs + "conv_module.depthwise_layer_norm")
        return
    name = theirs + "conv_module.batch_norm."
    yield from norm(ours + "conv/norm", name[:-1])
    yield Row(f"batch_stats/{ours}conv/norm/mean", name + "running_mean", SAME)
    yield Row(f"batch_stats/{ours}conv/norm/variance", name + "running_var", SAME)
    yield only_theirs(name + "num_batches_tracked", np.int64(0))


def unused_positions(model: Mapping[str, Any], base: str) -> Iterator[Row]:
    """A convolution that their conformers own and never call: here as small as it can be, kernel 1, D groups."""
    D, name = model["width"], f"{base}encoder.pos_conv_embed.conv."
    yield only_theirs(name + "parametrizations.weight.original0", np.ones((1, 1, 1), np.float32))
    yield only_theirs(name + "parametrizations.weight.original1", np.ones((D, 1, 1), np.float32))
    yield only_theirs(name + "bias", np.zeros(D, np.float32))


# ---------------------------------------------------------------------------------------------- reading and writing


def to_theirs(rows: Iterable[Row], leaves: Mapping[str, Any]) -> tuple[Arrays, Arrays]:
    """(their arrays, what of `leaves` they have no place for).  Raises UserError where a leaf is not there."""
    found: Arrays = {}
    left = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    for row in rows:
        if not row.ours:
            assert row.filler is not None
            found[row.theirs] = row.filler
        elif row.ours not in left:
            raise UserError(f"this model has no {row.ours}, which its config promises")
        else:
            found[row.theirs] = np.asarray(row.turn.to(left.pop(row.ours)), order="C")
    return found, left


def to_ours(rows: Iterable[Row], state: Mapping[str, np.ndarray]) -> tuple[Arrays, list[str], list[str]]:
    """(our leaves, names of theirs that are missing, names that are in no row)."""
    found: Arrays = {}
    missing, left = [], dict.fromkeys(state)
    for row in rows:
        left.pop(row.theirs, None)
        if row.theirs in state and row.ours:
            found[row.ours] = np.asarray(row.turn.back(np.asarray(state[row.theirs])), order="C")
        elif row.ours:
            missing.append(row.theirs)
    return found, missing, list(left)


def modern(state: Mapping[str, np.ndarray]) -> Arrays:
    """Weight norms of older PyTorch, `weight_g` and `weight_v`, under the names of today."""
    endings = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    renamed = {}
    for name, array in state.items():
        path, _, leaf = name.rpartition(".")
        renamed[f"{path}.{endings[leaf]}" if leaf in endings else name] = array
    return renamed
