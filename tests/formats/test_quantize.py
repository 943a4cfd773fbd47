"""Eight-bit weights: how far they move, what stays as it is, and dense layers that compute in them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from speechjax import config as configs
from speechjax.errors import UserError
from speechjax.formats.quantize import SCALE, dequantize, int8_dense, int8_product, pack, quantize
from tests.drawing import draw_params
from tests.tasks.experiments import experiment, make_batch

RNG = np.random.default_rng(0)


def weights() -> dict[str, Any]:
    """Kernels of every sort, and what is none."""
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return dict(
        mlp_up=dict(kernel=normal(96, 40), bias=normal(40)),
        front=dict(conv0=dict(kernel=normal(10, 1, 8)), conv1=dict(kernel=normal(3, 32, 24))),
        layers=dict(attention=dict(query=dict(kernel=normal(2, 64, 16))), norm=dict(scale=normal(2, 64))),
        positions=dict(direction=normal(16, 8, 32), gain=normal(16, 1, 1)),
        quantizer=dict(codebook=normal(64, 64)),
        prior=dict(counts=np.arange(200).reshape(100, 2)),
    )


def flat(tree: Any) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


def test_a_weight_moves_by_half_a_step_of_its_channel():
    before = flat(weights())
    small = quantize(weights())
    after = flat(dequantize(small))
    large = {n for n, a in small.items() if a.dtype == np.int8}
    assert large == {
        "mlp_up/kernel", "front/conv1/kernel", "layers/attention/query/kernel", "positions/direction",
    }  # fmt: skip
    assert after.keys() == before.keys()
    for name, array in before.items():
        if name not in large:
            np.testing.assert_array_equal(small[name], array)
            continue
        scale = small[name + SCALE]
        assert scale.shape == (
            *((2,) if name.startswith("layers/") else (1,)),
            *([1] * (array.ndim - 2)),
            array.shape[-1],
        )
        assert after[name].dtype == np.float32
        assert np.all(np.abs(after[name] - array) <= scale * (0.5 + 1e-4))
        assert np.all(np.abs(small[name]).max(axis=tuple(range(scale.shape[0] > 1, array.ndim - 1))) == 127)
        assert np.abs(after[name] - array).max() > 0, "negative control"


def test_what_is_in_eight_bits_already_stays_so():
    once = dequantize(quantize(weights()))
    again = quantize(once)
    jax.tree.map(np.testing.assert_array_equal, dequantize(again), once)


def test_channels_and_layers_do_not_share_their_scales():
    kernel = RNG.normal(size=(2, 64, 8)).astype(np.float32)
    kernel[0] *= 1e-4
    kernel[1, :, 3] *= 1e-3
    kernel[1, :, 5] = 0
    found = dequantize(quantize({"layers": {"kernel": kernel}}))["layers"]["kernel"]
    for part in (np.s_[0], np.s_[1, :, 3]):
        assert np.linalg.norm(found[part] - kernel[part]) < 0.01 * np.linalg.norm(kernel[part])
    assert not found[1, :, 5].any()
    one = dequantize(quantize({"conv": {"kernel": kernel}}))["conv"]["kernel"]
    assert np.linalg.norm(one[0] - kernel[0]) > 0.5 * np.linalg.norm(kernel[0]), "negative control: taps share theirs"


def test_the_size_is_a_quarter():
    big = {"kernel": RNG.normal(size=(512, 256)).astype(np.float32), "bias": np.zeros(256, np.float32)}
    assert sum(a.nbytes for a in quantize(big).values()) < 0.26 * sum(a.nbytes for a in big.values())


def test_mistakes_are_named():
    kernel = np.ones((64, 4), np.float32)
    kernel[3, 2] = np.nan
    with pytest.raises(UserError, match="a/kernel has values that are not finite"):
        quantize({"a": {"kernel": kernel}})
    fits = quantize({"kernel": np.ones((64, 4), np.float32)})
    dequantize(fits)  # negative control
    for shape in ((1, 3), (4,), (2, 4), (64, 4), (1, 1, 4), (1, 1)):
        with pytest.raises(ValueError, match="has scales of shape"):
            dequantize(fits | {"kernel" + SCALE: np.ones(shape, np.float32)})


def test_a_product_of_integers_is_exact():
    x = RNG.integers(-127, 128, (2, 5, 300)).astype(np.float32)
    x[..., 0] = 127  # the scale of every frame is then one
    kernel = RNG.integers(-127, 128, (300, 7)).astype(np.int8)
    scale = np.float32(2.0) ** np.arange(-3, 4, dtype=np.float32)
    wanted = np.einsum("btd,de->bte", x.astype(np.float64), kernel.astype(np.float64)) * scale
    np.testing.assert_array_equal(jax.jit(int8_product)(x, kernel, scale), wanted.astype(np.float32))


def test_a_product_has_the_error_of_its_steps():
    x = RNG.normal(size=(3, 4, 256)).astype(np.float32) * np.array([1e-3, 1, 1e3], np.float32)[:, None, None]
    x[1, 2] = 0
    kernel = RNG.normal(size=(256, 32)).astype(np.float32)
    small = quantize({"kernel": kernel})
    found = np.asarray(
        int8_product(jnp.asarray(x), jnp.asarray(small["kernel"]), jnp.asarray(small["kernel" + SCALE][0]))
    )
    wanted = x @ kernel
    error = np.linalg.norm(found - wanted, axis=-1) / np.maximum(np.linalg.norm(wanted, axis=-1), 1e-9)
    # Both roundings are uniform within a step of 1/127 of the largest of some 256 normals, three deviations.
    assert 1e-3 < error[[0, 0, 1, 2], [0, 1, 0, 3]].max() < 0.02
    assert not found[1, 2].any()


def encoder_of(scan: bool, dtype: str = "float32") -> tuple[Any, Any, Any]:
    """(task, variables, batch) of an encoder wide enough for eight bits."""
    config: Any = ConfigDict(experiment("hubert")[0].to_dict())
    config.model.update(width=64, mlp=96, layers=2, scan=scan, dtype=dtype)
    task = configs.make_task(config)
    batch = make_batch(task, rows=2)
    rngs = dict.fromkeys(("params", *task.rngs), jax.random.key(0))
    shapes = jax.eval_shape(lambda: task.init(rngs, batch, step=0, train=False))
    return task, {"params": draw_params(shapes["params"])}, batch


def frames(task: Any, variables: Any, batch: Any) -> np.ndarray:
    found = jax.jit(lambda v: task.apply(v, batch, method="features").frames)(variables)
    return np.asarray(found, np.float32)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_an_encoder_computes_in_eight_bits(scan):
    task, variables, batch = encoder_of(scan)
    packed = pack(task, variables)
    there = flat(packed["params"])
    ours = {name for name, leaf in there.items() if leaf.dtype == np.int8}
    layers = ["layers"] if scan else ["layer0", "layer1"]
    dense = [*(f"attention/{name}" for name in ("query", "key", "value", "out")), "mlp_up", "mlp_down"]
    assert ours >= {f"encoder/transformer/{layer}/{name}/kernel" for layer in layers for name in dense}
    assert not [name for name in ours if not name.startswith("encoder/")], "heads keep their precision"
    wanted = frames(task, variables, batch)
    with int8_dense():
        found = frames(task, packed, batch)
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert 1e-4 < error < 0.05
    with int8_dense():
        np.testing.assert_array_equal(frames(task, variables, batch), wanted)  # nothing is packed there
    # Weights alone, as `dequantize` makes them, miss the rounding of what goes in.
    alone = unflatten_dict(flat(variables["params"]) | flat(dequantize(there)), sep="/")
    weights_only = frames(task, {"params": alone}, batch)
    assert 0 < np.linalg.norm(weights_only - wanted) < np.linalg.norm(found - wanted) * 1.5
    assert np.abs(weights_only - found).max() > 1e-4, "negative control: inputs are rounded too"


def test_the_result_has_the_type_of_the_layer():
    task, variables, batch = encoder_of(scan=False, dtype="bfloat16")
    packed = pack(task, variables)
    with int8_dense():
        found = jax.eval_shape(lambda v: task.apply(v, batch, method="features").frames, packed)
    assert found.dtype == jnp.bfloat16
