"""Transposed convolutions against XLA's own, and that nothing of the padding comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from speechjax.models.deconv import FrameDecoder, WaveformDecoder, transposed_conv
from speechjax.models.frontend import WaveformExtractor


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (10, 5), (4, 2), (3, 1)])
def test_transposed_conv_is_xlas(kernel, stride):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 7, 3)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(kernel, 3, 4)), jnp.float32)
    got = transposed_conv(x, w, stride)
    # XLA's keeps the kernel as that of a convolution, so it is laid down backwards.
    wanted = lax.conv_transpose(x, w[::-1], (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
    assert got.shape == (2, 6 * stride + kernel, 4)
    np.testing.assert_allclose(got, wanted, atol=2e-5)  # float32, sums of up to 30 products
    if kernel > 1:
        assert np.abs(np.asarray(transposed_conv(x, w[::-1], stride) - wanted)).max() > 0.1, "negative control"


def test_a_front_end_is_mirrored_sample_for_sample(random_params):
    front = dict(channels=(8, 6, 5), kernels=(10, 3, 2), strides=(5, 2, 2))
    extractor = WaveformExtractor(**front, parent=None)
    decoder = WaveformDecoder(**front, dtype=jnp.float32)
    x, lengths = jnp.ones((3, 24, 5)), jnp.array([24, 17, 0], jnp.int32)
    params = {"params": random_params(decoder, x, lengths)}
    assert [params["params"][f"conv{i}"]["kernel"].shape for i in range(3)] == [(10, 8, 1), (3, 6, 8), (2, 5, 6)]
    run = jax.jit(decoder.apply)
    samples, counts = run(params, x, lengths)
    hop, extra = extractor.frame_len()
    assert samples.shape == (3, 24 * hop + extra)
    np.testing.assert_array_equal(counts, [24 * hop + extra, 17 * hop + extra, 0])
    assert extractor.out_len(int(counts[1])) == 17
    assert extractor.out_len(int(counts[1]) - 1) == 16

    noise = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)
    inside = jnp.arange(24)[None, :, None] < lengths[:, None, None]
    np.testing.assert_array_equal(run(params, jnp.where(inside, x, noise), lengths)[0], samples)
    assert (run(params, x + noise, lengths)[0] != samples).any(), "negative control"
    assert (np.asarray(samples)[1, int(counts[1]) :] == 0).all()
    assert (np.asarray(samples)[2] == 0).all()


@pytest.mark.parametrize("factor", [1, 4])
def test_frames_come_back_in_their_number_and_place(factor, random_params):
    decoder = FrameDecoder(factor, 8, 3, jnp.float32)
    rng = np.random.default_rng(0)
    x, lengths = jnp.asarray(rng.normal(size=(2, 6, 5)), jnp.float32), jnp.array([6, 4], jnp.int32)
    params = {"params": random_params(decoder, x, lengths)}
    run = jax.jit(decoder.apply)
    base = np.asarray(run(params, x, lengths))
    assert base.shape == (2, 6 * factor, 3)
    assert (base[1, 4 * factor :] == 0).all()
    np.testing.assert_array_equal(run(params, x.at[1, 4:].set(99.0), lengths), base, "padding")
    changed = (np.asarray(run(params, x.at[0, 2].add(1.0), lengths)) != base)[0].any(axis=1)
    own = np.arange(6 * factor) // factor == 2
    assert changed[own].all()
    # A doubling reaches one frame further on either side: 2 (1) + 1 at two doublings.
    assert not changed[np.abs(np.arange(6 * factor) - (2.5 * factor - 0.5)) > 0.5 * factor + 3].any()
