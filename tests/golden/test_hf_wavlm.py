"""Parity with `transformers.WavLMModel`: buckets, hidden states and every gradient, layers unrolled and stacked."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hf_wav2vec2 import block_of
from make_hf_wav2vec2 import KINDS
from make_hf_wavlm import SPAN

from speechjax.formats.families import FAMILIES
from speechjax.formats.names import to_ours
from speechjax.models.encoder import SpeechEncoder
from speechjax.models.layers import frame_mask
from speechjax.models.relative import distance_buckets

# float32, sums in another order.  Measured 6e-7 for states, 4e-6 for gradients.
CLOSE = 1e-5
Results = dict[str, Any]


def encoder_for(config: dict[str, Any], scan: bool) -> SpeechEncoder:
    return SpeechEncoder(
        frontend=dict(
            name="waveform", channels=tuple(config["conv_dim"]), kernels=tuple(config["conv_kernel"]),
            strides=tuple(config["conv_stride"]), norm=config["feat_extract_norm"], bias=config["conv_bias"],
        ),
        width=config["hidden_size"], layers=config["num_hidden_layers"], heads=config["num_attention_heads"],
        mlp=config["intermediate_size"], norm="pre" if config["do_stable_layer_norm"] else "post",
        positions=dict(kernel=config["num_conv_pos_embeddings"], groups=config["num_conv_pos_embedding_groups"]),
        attention=dict(
            positions="buckets", gated=True, buckets=config["num_buckets"], max_distance=config["max_bucket_distance"]
        ),
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, input_dropout=0.0, layerdrop=0.0, scan=scan,
        remat=scan, dtype="float32",
    )  # fmt: skip


def from_hf(arrays: Results, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """{our path, flat: array} from their names; every name has a place."""
    table = FAMILIES["wavlm"].encoder(block_of(encoder_for(config, scan=False)), "")
    found, missing, strange = to_ours(table, {name: np.asarray(a, np.float32) for name, a in arrays.items()})
    assert missing == ["masked_spec_embed"]  # nothing is masked
    assert not strange
    return {name.removeprefix("encoder/"): array for name, array in found.items()}


def stack(flat: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """Paths of unrolled layers -> those of one stacked layer."""
    first = "transformer/layer0/"
    out = {name: a for name, a in flat.items() if "/layer" not in name}
    for name in (n for n in flat if n.startswith(first)):
        rest = name.removeprefix(first)
        out[f"transformer/layers/{rest}"] = np.stack([flat[f"transformer/layer{i}/{rest}"] for i in range(layers)])
    return out


def under(golden: Results, prefix: str) -> Results:
    return {name.removeprefix(prefix): a for name, a in golden.items() if name.startswith(prefix)}


def compute(golden: Results, scan: bool) -> tuple[Any, dict[str, Any]]:
    """(`Encoded` with hidden states, flat gradients) by our encoder, with the golden file's weights."""
    config = json.loads(str(golden["config"]))
    weights: Any = from_hf(under(golden, "weight/"), config)
    weights = stack(weights, config["num_hidden_layers"]) if scan else weights
    weights["mask_embedding"] = np.zeros(config["hidden_size"], np.float32)  # nothing is masked
    encoder = encoder_for(config, scan)
    batch = dict(audio=jnp.asarray(golden["audio"]), lengths=jnp.asarray(golden["lengths"]))

    def total(params):
        out: Any = encoder.apply({"params": params}, batch, hidden=True)
        valid = frame_mask(out.lengths, out.frames.shape[1])[..., None]
        return jnp.sum(jnp.where(valid, jnp.sin(3 * out.frames), 0)), out

    (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(unflatten_dict(weights, sep="/"))
    return out, flatten_dict(gradient, sep="/")


def error(ours: Any, theirs: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def worst_state(out: Any, golden: Results) -> float:
    inside = np.arange(golden["last"].shape[1]) < golden["frames"][:, None]
    states = [golden[f"hidden{i}"] for i in range(len(out.hidden))]
    assert f"hidden{len(states)}" not in golden
    pairs = [*zip(out.hidden, states, strict=True), (out.frames, golden["last"])]
    return max(error(np.asarray(a)[inside], b[inside]) for a, b in pairs)


@pytest.fixture(scope="module", params=KINDS)
def golden(request) -> Results:
    with np.load(Path(__file__).parent / f"hf_wavlm_{request.param}.npz") as file:
        return dict(file)


@pytest.mark.parametrize("scan", [False, True])
def test_states_and_gradients_equal_the_reference(golden, scan):
    config = json.loads(str(golden["config"]))
    out, gradient = compute(golden, scan)
    np.testing.assert_array_equal(out.lengths, golden["frames"])
    assert worst_state(out, golden) < CLOSE
    theirs = from_hf(under(golden, "gradient/"), config)
    theirs = stack(theirs, config["num_hidden_layers"]) if scan else theirs
    assert gradient.keys() - {"mask_embedding"} == theirs.keys()
    for path, expected in theirs.items():
        if path.endswith("key/bias"):  # softmax does not feel it: rounding on both sides
            assert max(np.abs(expected).max(), np.abs(gradient[path]).max()) < 1e-5
        else:
            assert error(gradient[path], expected) < 3 * CLOSE, path


@pytest.mark.parametrize("name", ["layers.1.attention.gru_rel_pos_const", "layers.0.attention.rel_attn_embed.weight"])
def test_parity_notices_a_wrong_gate_or_bias(golden, name):
    """Negative control: heads in reverse order."""
    key = f"weight/encoder.{name}"
    axis = 1
    out, _ = compute(golden | {key: np.flip(golden[key], axis)}, scan=False)
    assert worst_state(out, golden) > 1e-3


def test_buckets_of_the_published_size_equal_the_reference(golden):
    distances = np.arange(-SPAN, SPAN + 1)
    np.testing.assert_array_equal(distance_buckets(distances, 320, 800), golden["buckets"])
    assert (distance_buckets(distances, 320, 780) != golden["buckets"]).any(), "negative control"
