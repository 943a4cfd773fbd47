"""What masked autoencoders spoil: runs of frames, blocks of bins, noise, patches; by counting over many draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechjax.models.masking import span_mask
from speechjax.tasks._alterations import Mockingjay, Patches, Tera
from speechjax.tasks._frames import interpolate, unstack_frames, utterance_mean

F = 10
few = settings(max_examples=8, deadline=None, derandomize=True)
N, ROWS = 40, 400


def altered(how, lengths, seed: int = 0):
    """(clean, altered) for as many rows as there are lengths, zero beyond these."""
    x = np.random.default_rng(5).normal(size=(len(lengths), N, F)).astype(np.float32)
    x[np.arange(N)[None] >= np.asarray(lengths)[:, None]] = 0
    out = jax.jit(how.__call__)(jax.random.key(seed), jnp.asarray(x), jnp.asarray(lengths, jnp.int32))
    return x, jax.tree.map(np.asarray, out)


@few
@given(st.lists(st.integers(0, N), min_size=4, max_size=4), st.integers(0, 1000))
def test_only_valid_frames_are_altered_and_judged(lengths, seed):
    _, out = altered(Tera(prob=0.4, span=3, channels=0.5, noise_prob=1.0), lengths, seed)
    outside = np.arange(N)[None] >= np.array(lengths)[:, None]
    assert not out.chosen[outside].any()
    assert not out.judged[outside].any()
    assert (out.frames[outside] == 0).all()


def test_runs_become_zero_other_frames_or_stay():
    """Each utterance one of three things, 8 : 1 : 1, and outside the runs nothing changes."""
    how = Mockingjay()
    x, out = altered(how, np.full(ROWS, N))
    key = jax.random.split(jax.random.key(0), 3)[0]
    mask = span_mask(key, jnp.full(ROWS, N), N, prob=0.15, span=7, min_spans=1)
    np.testing.assert_array_equal(out.chosen, mask)
    np.testing.assert_array_equal(out.judged, np.broadcast_to(out.chosen[..., None], x.shape))
    np.testing.assert_array_equal(out.frames[~out.chosen], x[~out.chosen])
    counts = dict(zero=0, random=0, same=0)
    for row, new, chosen in zip(x, out.frames, out.chosen, strict=True):
        own, changed = row[chosen], new[chosen]
        if (changed == 0).all():
            counts["zero"] += 1
        elif np.array_equal(own, changed):
            counts["same"] += 1
        else:
            assert all((frame == row).all(axis=1).any() for frame in changed), "frames of the same utterance"
            counts["random"] += 1
    # 400 draws: standard errors of 2 % and 1.5 %.
    assert counts["zero"] / ROWS == pytest.approx(0.8, abs=0.08)
    assert counts["random"] / ROWS == pytest.approx(0.1, abs=0.06)
    assert counts["same"] / ROWS == pytest.approx(0.1, abs=0.06)


def test_replacements_stay_inside_the_utterance():
    _, out = altered(Mockingjay(prob=0.9, span=2, zero=0.0, random=1.0), np.full(50, 8))
    new = out.frames[out.chosen]
    assert len(new) > 100
    assert (new != 0).all(), "padding is zero"


def test_a_block_of_bins_and_noise():
    how = Tera(prob=0.15, span=7, zero=0.0, random=0.0, channels=0.4, noise_prob=0.15, noise_std=0.2)
    x, out = altered(how, np.full(ROWS, N))
    block = out.judged & ~out.chosen[..., None]
    block = block.any(axis=1)
    widths, noisy = block.sum(axis=1), []
    for b in range(ROWS):
        bins = np.flatnonzero(block[b])
        assert len(bins) == 0 or np.array_equal(bins, np.arange(bins[0], bins[-1] + 1))
        assert out.judged[b, :, block[b]].all(), "in all frames"
        rest = (out.frames - x)[b][:, ~block[b]]
        noisy.append((rest != 0).any())
        if noisy[-1]:
            assert rest.std() == pytest.approx(0.2, rel=0.25)  # 240 draws and more
        else:
            assert (out.frames[b][:, block[b]] == 0).all()
    # 0 to 4 of 10 bins alike: 400 draws, standard error of a share 2 %.
    np.testing.assert_allclose(np.bincount(widths, minlength=5) / ROWS, 0.2, atol=0.08)
    assert np.mean(noisy) == pytest.approx(0.15, abs=0.07)
    assert block[:, 0].any()
    assert block[:, -1].any()


def test_alterations_are_functions_of_key_and_row():
    lengths = np.array([40, 30, 40, 20])
    _, out = altered(Tera(), lengths)
    _, again = altered(Tera(), lengths)
    jax.tree.map(np.testing.assert_array_equal, out, again)
    _, other = altered(Tera(), lengths, 1)
    assert (out.chosen != other.chosen).any()
    _, shorter = altered(Tera(), np.array([40, 10, 40, 0]))
    np.testing.assert_array_equal(shorter.frames[0], out.frames[0], "the other rows' lengths do not matter")
    assert (out.chosen[0] != out.chosen[2]).any(), "every row its own"


@few
@given(st.lists(st.integers(0, N), min_size=4, max_size=4), st.integers(0, 1000))
def test_exactly_the_share_of_patches_is_hidden(lengths, seed):
    hide = Patches(share=0.8)
    hidden = np.asarray(jax.jit(hide.__call__, static_argnums=2)(jax.random.key(seed), jnp.asarray(lengths), N))
    np.testing.assert_array_equal(hidden.sum(axis=1), [4 * t // 5 for t in lengths])
    assert not hidden[np.arange(N)[None] >= np.array(lengths)[:, None]].any()


def test_any_patch_is_hidden_as_often_as_another():
    hidden = np.asarray(Patches(share=0.8)(jax.random.key(0), jnp.full(2000, 20), 20))
    np.testing.assert_allclose(hidden.mean(axis=0), 0.8, atol=0.04)  # 2000 draws, standard error 0.9 %


@few
@given(st.integers(0, 1000), st.floats(0.1, 0.9))
def test_lines_are_numpys(seed, share):
    rng = np.random.default_rng(seed)
    x, known = rng.normal(size=(2, 12, 3)).astype(np.float32), rng.random((2, 12)) < share
    got = np.asarray(interpolate(jnp.asarray(x), jnp.asarray(known)))
    for b, f in np.ndindex(2, 3):
        at = np.flatnonzero(known[b])
        expected = np.interp(np.arange(12), at, x[b, at, f]) if len(at) else np.zeros(12)
        np.testing.assert_allclose(got[b, :, f], expected, atol=1e-5)


def test_unstack_and_mean():
    x = jnp.arange(24.0).reshape(1, 3, 8)
    np.testing.assert_array_equal(unstack_frames(x, 7, 2)[0], [*np.arange(24.0).reshape(6, 4), np.zeros(4)])
    mean = utterance_mean(jnp.array([[[1.0], [3.0], [50.0]], [[9.0], [9.0], [9.0]]]), jnp.array([2, 0], jnp.int32))
    np.testing.assert_array_equal(mean, [[[2.0]], [[0.0]]])
