"""The waveform front end against plain convolutions and norms in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import special

from speechjax.errors import UserError
from speechjax.models.frontend import GroupNormConv, WaveformExtractor, conv_out_len, strided_conv, windows

SHAPE: dict[str, Any] = dict(channels=(8, 8, 8), kernels=(10, 3, 2), strides=(5, 2, 2))
LENGTHS = np.array([400, 263, 0], np.int32)


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    """int16 [3, 400], noise in the padding too."""
    return np.random.default_rng(0).integers(-9000, 9000, (3, 400)).astype(np.int16)


@pytest.mark.parametrize(("samples", "frames"), [(16000, 49), (250000, 781), (320000, 999), (399, 0), (400, 1), (0, 0)])
def test_out_len(samples, frames):
    assert WaveformExtractor().out_len(samples) == frames
    assert WaveformExtractor().out_len(jnp.array([samples], jnp.int32))[0] == frames


def test_out_len_is_what_comes_out():
    front = WaveformExtractor(**SHAPE)

    def frames(audio):
        return front.init_with_output(jax.random.key(0), audio, jnp.array([audio.shape[1]], jnp.int32))[0][0]

    for samples in (30, 31, 59, 60, 61):
        assert jax.eval_shape(frames, jnp.zeros((1, samples))).shape == (1, front.out_len(samples), 8)


@pytest.mark.parametrize(
    ("kernel", "stride", "samples"),
    [(10, 5, 10), (10, 5, 43), (3, 2, 40), (2, 2, 43), (5, 1, 10), (7, 3, 40), (2, 5, 40), (2, 5, 43)],
)
def test_windows_are_the_windows(kernel, stride, samples):
    x = np.random.default_rng(0).normal(size=(2, samples, 3)).astype(np.float32)
    frames = conv_out_len(samples, (kernel,), (stride,))
    expected = np.stack([x[:, t * stride : t * stride + kernel].reshape(2, -1) for t in range(frames)], axis=1)
    ours = jax.jit(windows, static_argnums=(1, 2))(x, kernel, stride)
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("samples", [40, 41, 42])
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (10, 5), (7, 3), (2, 3)])
def test_strided_conv_and_its_gradients_equal_the_library(kernel, stride, samples):
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((2, samples, 3), (kernel, 3, 4)))
    g = rng.normal(size=(2, (samples - kernel) // stride + 1, 4)).astype(np.float32)
    library = lambda x, w: lax.conv_general_dilated(  # noqa: E731
        x, w, (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )

    def both(f):
        y, back = jax.vjp(f, x, w)
        return y, *back(g)

    ours = jax.jit(lambda: both(lambda x, w: strided_conv(x, w, stride)))()
    for mine, theirs in zip(ours, jax.jit(lambda: both(library))(), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)  # float32 sums of some dozen terms


def plain_group_norm(x, kernel, scale, offset, lengths, stride):
    """Convolution, then mean and variance of each channel over the valid frames, then GELU; float64."""
    K = len(kernel)
    rows = []
    for row, frames in zip(x, lengths, strict=True):
        y = np.stack([row[t * stride : t * stride + K] @ kernel for t in range((len(row) - K) // stride + 1)])
        mean, var = y[:frames].mean(axis=0), y[:frames].var(axis=0)
        y = (y - mean) / np.sqrt(var + 1e-5) * scale + offset
        rows.append(y * special.ndtr(y))
    return np.stack(rows)


@pytest.mark.parametrize("offset", [0.0, 0.5], ids=["centred", "direct current"])
def test_folded_group_norm_equals_conv_then_norm(audio, random_params, offset):
    K, stride, C = 10, 5, 8
    x = (audio[:2, :, None] / 32768 + offset).astype(np.float32)
    valid = (LENGTHS[:2] - K) // stride + 1
    module = GroupNormConv(C, K, stride)
    params = random_params(module, x, valid)
    ours = np.asarray(jax.jit(module.apply)({"params": params}, x, valid))
    exact = {name: np.asarray(p, np.float64) for name, p in params.items()}
    wide = np.asarray(x, np.float64)[..., 0]
    reference = lambda lengths: plain_group_norm(  # noqa: E731
        wide, exact["kernel"][:, 0], exact["scale"], exact["bias"], lengths, stride
    )
    expected = reference(np.asarray(valid))
    for row, frames in enumerate(np.asarray(valid)):
        # float32; a constant of twenty times the signal costs one digit.
        np.testing.assert_allclose(ours[row, :frames], expected[row, :frames], atol=1e-5 if offset == 0 else 1e-4)
    leaking = reference([expected.shape[1]] * 2)
    assert np.abs(leaking[1] - expected[1]).max() > 1e-2, "negative control: statistics over padding differ"


def test_folded_group_norm_has_the_gradient_of_the_plain_one(audio, random_params):
    K, stride, C = 10, 5, 4
    x = (audio[:2, :, None] / 32768).astype(np.float32)
    valid = (LENGTHS[:2] - K) // stride + 1
    module = GroupNormConv(C, K, stride)
    params = random_params(module, x, valid)
    weight = np.random.default_rng(2).normal(size=(2, 79, C)).astype(np.float32)

    def plain(params, x):
        y = lax.conv_general_dilated(x, params["kernel"], (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
        inside = (jnp.arange(y.shape[1])[None] < valid[:, None])[..., None]
        mean = jnp.mean(y, axis=1, keepdims=True, where=inside)
        y = (y - mean) * lax.rsqrt(jnp.mean((y - mean) ** 2, axis=1, keepdims=True, where=inside) + 1e-5)
        return jax.nn.gelu(y * params["scale"][None, None] + params["bias"][None, None], approximate=False)

    folded = lambda params, x: module.apply({"params": params}, x, valid)  # noqa: E731
    both = jax.jit(lambda *a: [jax.grad(lambda *a, f=f: jnp.sum(f(*a) * weight), (0, 1))(*a) for f in (folded, plain)])
    ours, theirs = both(params, x)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())  # float32


KINDS: dict[str, dict[str, Any]] = {"group": dict(norm="group"), "layer": dict(norm="layer", bias=True, normalize=True)}


@pytest.fixture(scope="module", params=KINDS)
def extractor(request, audio, random_params):
    front = WaveformExtractor(**SHAPE, **KINDS[request.param])
    params = random_params(front, audio, LENGTHS)
    return jax.jit(lambda audio, lengths: front.apply({"params": params}, audio, lengths))


def test_frames_ignore_padding_and_end_with_the_utterance(extractor, audio):
    frames, lengths = extractor(audio, LENGTHS)
    np.testing.assert_array_equal(lengths, [19, 12, 0])
    inside = np.arange(frames.shape[1])[None] < lengths[:, None]
    assert (np.asarray(frames)[~inside] == 0).all()
    assert np.isfinite(frames).all()
    noisy = np.where(np.arange(400) < LENGTHS[:, None], audio, -audio[::-1])
    np.testing.assert_array_equal(frames, extractor(noisy, LENGTHS)[0])
    audio = audio.copy()
    audio[1, 200] += 9000
    changed = extractor(audio, LENGTHS)[0]
    np.testing.assert_array_equal(changed[0], frames[0])
    assert np.abs(changed - frames)[1].max() > 1e-2, "negative control: a valid sample"


def test_group_norm_survives_bfloat16(audio, random_params):
    """Its statistics stay in float32; what remains is the rounding of eight bits."""
    front = WaveformExtractor(**SHAPE)
    params = random_params(front, audio, LENGTHS)

    @jax.jit
    def both():
        kinds = (front, front.clone(dtype=jnp.bfloat16))
        return [kind.apply({"params": params}, audio, LENGTHS)[0].astype(jnp.float32) for kind in kinds]

    exact, rounded = (np.asarray(frames) for frames in both())
    assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.02


def test_int16_is_float_over_32768(extractor, audio):
    ours = extractor(audio, LENGTHS)[0]
    np.testing.assert_array_equal(ours, extractor(audio.astype(np.float32) / 32768, LENGTHS)[0])


def test_normalised_waveform(audio, random_params):
    """Zero mean and unit variance of the valid samples, or by given statistics of the whole recording."""
    plain = WaveformExtractor(**SHAPE, norm="layer")
    front = plain.clone(normalize=True)
    params = random_params(front, audio, LENGTHS)
    run = jax.jit(lambda x, statistics: front.apply({"params": params}, x, LENGTHS, statistics)[0])
    x = np.asarray(audio, np.float32) / 32768
    valid = [row[:n].astype(np.float64) for row, n in zip(x, LENGTHS, strict=True)]
    mean, std = (np.array([f(v) if len(v) else 0.0 for v in valid], np.float32) for f in (np.mean, np.std))
    by_hand = (x - mean[:, None]) / np.sqrt(std**2 + 1e-7)[:, None]
    expected = jax.jit(lambda x: plain.apply({"params": params}, x, LENGTHS)[0])(by_hand)
    np.testing.assert_allclose(run(x, None), expected, atol=2e-5)  # float32
    np.testing.assert_allclose(run(x, (mean, std)), expected, atol=2e-5)
    np.testing.assert_allclose(run(3 * x + 0.25, None), expected, atol=1e-4)  # the offset costs three bits
    assert np.abs(run(x, (mean + 0.5, std)) - expected)[:2].max() > 0.1, "negative control: statistics are used"


def test_unknown_norm_is_named():
    with pytest.raises(UserError, match=r"'batch'.*'group' or 'layer'"):
        WaveformExtractor(**SHAPE, norm="batch").init(jax.random.key(0), jnp.zeros((1, 100)), LENGTHS[:1])
