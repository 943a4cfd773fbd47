"""The first parameters of a whole wav2vec 2.0, as its `init` draws them: those of the published code."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_wav2vec2 import STREAMS, make_batch

LINEAR = re.compile(r".*/(attention/(query|key|value|out)|mlp_(up|down))/(kernel|bias)")


@pytest.fixture(scope="module", params=["base", "large"])
def fresh(request, tiny_wav2vec2):
    """{path: parameter} of two layers, in a scan with "large"; widths at which a deviation is known to 1 %."""
    task = tiny_wav2vec2(request.param, encoder=dict(layers=2), codes=40)
    rngs = {name: jax.random.fold_in(jax.random.key(3), i) for i, name in enumerate(("params", *STREAMS))}
    params = jax.jit(lambda: task.init(rngs, make_batch(), step=jnp.int32(0), train=True)["params"])()
    return {path: np.asarray(x) for path, x in flatten_dict(params, sep="/").items()}


def test_layers_start_normal_with_deviation_a_fiftieth(fresh):
    found = {path: x for path, x in fresh.items() if LINEAR.fullmatch(path)}
    stacked = any("/layers/" in path for path in found)
    assert len(found) == (12 if stacked else 24)
    for path, x in found.items():
        for layer in x if stacked else [x]:
            if path.endswith("bias"):
                assert not layer.any(), path
                continue
            assert layer.size >= 64 * 64
            assert layer.std() == pytest.approx(0.02, rel=0.1), path
            assert layer.mean() == pytest.approx(0, abs=0.002), path
            assert (np.abs(layer) > 0.04).mean() == pytest.approx(0.0455, abs=0.015), f"{path}: normal"
    kernels = [x for path, x in found.items() if path.endswith("kernel")]
    assert len(np.unique(np.concatenate([x.ravel() for x in kernels]))) > 0.99 * sum(x.size for x in kernels)


def test_the_quantizer_starts_with_unit_logits_and_codewords_in_the_unit_cube(fresh):
    assert fresh["quantizer/logits/kernel"].shape == (32, 2 * 40)
    assert fresh["quantizer/logits/kernel"].std() == pytest.approx(1, rel=0.1)
    assert fresh["quantizer/logits/kernel"].mean() == pytest.approx(0, abs=0.1)
    assert not fresh["quantizer/logits/bias"].any()
    book = fresh["quantizer/codebook"]
    assert book.shape == (2, 40, 8)
    assert 0 <= book.min() < 0.02
    assert 0.98 < book.max() < 1
    assert book.mean() == pytest.approx(0.5, abs=0.05)


def test_the_mask_embedding_starts_between_0_and_1(fresh):
    embedding = fresh["encoder/mask_embedding"]
    assert embedding.shape == (64,)
    assert 0 <= embedding.min() < 0.2
    assert 0.8 < embedding.max() < 1
