"""Packed rows: an utterance among others in one row comes out of the encoder as it does alone."""

from typing import Any

import jax
import numpy as np
import pytest

from speechjax.errors import UserError

HOP, FIELD, ALIGN, SAMPLES = 20, 30, 80, 1000
# Shorter than a frame, exactly one frame, of odd length, up to the last sample; all of a row; after a gap.
STARTS = np.array([[0, 80, 160, 560], [0, 0, 0, 0], [80, 0, 0, 0]], np.int32)
LENGTHS = np.array([[29, 30, 361, 440], [1000, 0, 0, 0], [251, 0, 0, 0]], np.int32)
PLACES = [(r, g) for r in range(3) for g in range(4) if LENGTHS[r, g]]
FRAMES = (SAMPLES - FIELD) // HOP + 1
KINDS: dict[str, dict[str, Any]] = {
    "post": dict(norm="post"),
    "pre, scan": dict(norm="pre", scan=True),
}
LAYER = dict(norm="layer", bias=True, normalize=True)


def frames_of(samples: int) -> int:
    return max(0, (samples - FIELD) // HOP + 1)


@pytest.fixture(scope="module")
def packed() -> dict[str, np.ndarray]:
    """Noise in the gaps too; every segment has another loudness and offset."""
    rng = np.random.default_rng(0)
    audio = rng.normal(0, 4000, (3, SAMPLES))
    for i, (r, g) in enumerate(PLACES):
        segment = np.s_[STARTS[r, g] : STARTS[r, g] + LENGTHS[r, g]]
        audio[r, segment] = audio[r, segment] * (i + 1) / 4 + 300 * i
    mean, std = rng.normal(0, 0.02, (3, 4)), rng.uniform(0.05, 0.3, (3, 4))
    return dict(
        audio=audio.astype(np.int16), starts=STARTS, lengths=LENGTHS, mean=mean.astype(np.float32),
        std=std.astype(np.float32),
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(packed) -> dict[str, np.ndarray]:
    """The same utterances, one a row, noise in the padding."""
    audio = np.random.default_rng(1).integers(-9000, 9000, (len(PLACES), SAMPLES)).astype(np.int16)
    for row, (r, g) in zip(audio, PLACES, strict=True):
        row[: LENGTHS[r, g]] = packed["audio"][r, STARTS[r, g] :][: LENGTHS[r, g]]
    pick = lambda name: np.array([packed[name][place] for place in PLACES])  # noqa: E731
    return dict(audio=audio, **{name: pick(name) for name in ("lengths", "mean", "std")})


def pieces(state: Any) -> list[np.ndarray]:
    """Frames of every segment, cut out of packed rows [B, T, D]."""
    return [np.asarray(state)[r, STARTS[r, g] // HOP :][: frames_of(int(LENGTHS[r, g]))] for r, g in PLACES]


@pytest.mark.parametrize("recorded", [True, False], ids=["recording's statistics", "own statistics"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_is_encoded_as_it_is_alone(tiny_encoder, random_params, packed, alone, kind, recorded):
    encoder = tiny_encoder(frontend=LAYER, **KINDS[kind])
    params = random_params(encoder, alone)

    @jax.jit
    def run(batch):
        batch = batch if recorded else {k: v for k, v in batch.items() if k not in ("mean", "std")}
        features, _ = encoder.apply({"params": params}, batch, method="extract")
        return [features, *encoder.apply({"params": params}, batch, hidden=True)]

    features, frames, ids, hidden = run(packed)
    expected = np.zeros((3, FRAMES), np.int32)
    for r, g in PLACES:
        expected[r, STARTS[r, g] // HOP :][: frames_of(int(LENGTHS[r, g]))] = g + 1
    np.testing.assert_array_equal(ids, expected)
    assert sorted(set(ids[0].tolist())) == [0, 2, 3, 4], "the first segment is too short for a frame"

    features_alone, frames_alone, counts, hidden_alone = run(alone)
    states = [features, frames, *hidden]
    assert len(states) == 2 + encoder.layers + 1
    for ours, theirs in zip(states, [features_alone, frames_alone, *hidden_alone], strict=True):
        assert (np.asarray(ours)[expected == 0] == 0).all()
        for piece, row, n in zip(pieces(ours), np.asarray(theirs), counts, strict=True):
            # float32 of values up to 5: products of other shapes sum in another order.  Measured 5e-7.
            np.testing.assert_allclose(piece, row[:n], atol=2e-5)

    plain = {"audio": packed["audio"], "lengths": np.full(3, SAMPLES, np.int32)}
    plain |= {name: packed[name][:, 0] for name in ("mean", "std")}
    mixed = run(plain)[1]
    for i in (1, 2, 3):
        difference = np.abs(pieces(mixed)[i] - pieces(frames)[i])
        assert difference.max() > 0.01, "negative control: without ids the utterances see each other"


def test_misaligned_rows_become_nan_and_only_those(tiny_encoder, random_params, packed):
    encoder = tiny_encoder(frontend=LAYER)
    params = random_params(encoder, packed)
    run = jax.jit(lambda starts: encoder.apply({"params": params}, packed | {"starts": starts}).frames)
    good = np.asarray(run(STARTS))
    for shift in (1, HOP, 2 * HOP):
        bad = np.asarray(run(STARTS + np.array([[0, 0, shift, 0], [0] * 4, [0, 7, 7, 7]], np.int32)))
        assert np.isnan(bad[0]).any()
        np.testing.assert_array_equal(bad[1:], good[1:])  # row 2: starts of segments that do not exist


@pytest.mark.parametrize(("norm", "packs"), [("group", False), ("layer", True)])
def test_what_a_planner_may_ask_before_there_are_parameters(tiny_encoder, norm, packs):
    encoder = tiny_encoder(frontend=dict(norm=norm))
    assert encoder.packs() is packs
    assert encoder.segment_align() == ALIGN == 4 * HOP


def test_group_norm_refuses_packed_rows(tiny_encoder, packed):
    with pytest.raises(UserError, match=r"frontend\.norm='group'.*use 'layer'"):
        jax.eval_shape(lambda: tiny_encoder().init(jax.random.key(0), packed))
