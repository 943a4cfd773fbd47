"""Moving averages of parameters, their schedules, and norms over time, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.errors import UserError
from speechjax.models.ema import ema, ema_rate, instance_norm, mean_deviation, time_variation, tracked


def rate(step, **options):
    return float(ema_rate(jnp.int32(step), **options))


def test_linear_decay_is_that_of_data2vec():
    base = dict(schedule="linear", start=0.999, end=0.9999, steps=30_000)
    assert rate(0, **base) == pytest.approx(1e-3, rel=1e-6)
    assert rate(15_000, **base) == pytest.approx(5.5e-4, rel=1e-6)
    assert rate(30_000, **base) == rate(400_000, **base) == pytest.approx(1e-4, rel=1e-6)
    large2 = dict(schedule="linear", start=0.9997, end=1.0, steps=300_000)
    assert rate(150_000, **large2) == pytest.approx(1.5e-4, rel=1e-6)
    assert rate(300_000, **large2) == 0


def test_exponential_decay_is_that_of_spidr():
    spidr = dict(schedule="exponential", start=0.999, end=1.0, steps=20_000)
    for step in (0, 1, 20_000, 150_000):
        assert rate(step, **spidr) == pytest.approx(0.001 * np.exp(-step / 20_000), rel=1e-5)
    # 0.001 exp(-t / 20 k) falls to 1e-7 after 20 k ln 10 k = 184,207 updates; then the teacher stands still.
    assert rate(184_000, **spidr) > 1e-7
    assert rate(184_400, **spidr) == 0


def test_rates_survive_float32_where_decays_do_not():
    """A decay of 0.99999 in float32 is off by 0.1 % in what it averages over, one of 1 - 2e-7 by 10 %."""
    slow = dict(schedule="linear", start=0.999, end=0.99999, steps=75_000)
    assert rate(75_000, **slow) == pytest.approx(1e-5, rel=1e-5)
    assert abs(float(1 - np.float32(0.99999)) / 1e-5 - 1) > 1e-3, "negative control"


@pytest.mark.parametrize("wrong", [dict(schedule="cosine"), dict(start=1.2), dict(steps=0)])
def test_wrong_schedules_name_the_key(wrong):
    with pytest.raises(UserError, match=r"config\.task"):
        rate(0, **(dict(schedule="linear", start=0.9, end=0.99, steps=10) | wrong))


def test_average_over_several_updates():
    rng = np.random.default_rng(0)
    students = rng.normal(size=(5, 4))
    rates = [0.5, 0.1, 0.01, 0.3, 0.0]
    teacher, expected = {"a": {"b": jnp.asarray(students[0], jnp.float32)}}, students[0].copy()
    for student, r in zip(students, rates, strict=True):
        teacher = ema(teacher, {"a": {"b": jnp.asarray(student, jnp.bfloat16)}}, jnp.float32(r))
        expected = (1 - r) * expected + r * np.asarray(jnp.asarray(student, jnp.bfloat16), np.float64)
    assert teacher["a"]["b"].dtype == jnp.float32
    np.testing.assert_allclose(teacher["a"]["b"], expected, atol=1e-6)  # float32


def test_tracked_parts_are_float32_with_or_without_positions():
    tree = {"positions": {"w": jnp.zeros(2)}, "norm": {"s": jnp.ones(2, jnp.bfloat16)}, "layer0": {"w": jnp.ones(3)}}
    assert set(tracked(tree, positions=False)) == {"norm", "layer0"}
    assert set(tracked(tree, positions=True)) == set(tree)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(tracked(tree, positions=True)))


# ------------------------------------------------------------------------------------------- norms over time

X = np.random.default_rng(1).normal(3, 2, (3, 9, 4)).astype(np.float32)
LENGTHS = np.array([9, 5, 0], np.int32)


def test_instance_norm_takes_every_utterance_alone_and_no_padding():
    out = np.asarray(instance_norm(jnp.asarray(X), jnp.asarray(LENGTHS)))
    for row, n in enumerate(LENGTHS):
        part = X[row, :n].astype(np.float64)
        if n:
            expected = (part - part.mean(0)) / np.sqrt(part.var(0) + 1e-5)
            np.testing.assert_allclose(out[row, :n], expected, atol=2e-5)  # float32 of values around 3
        assert (out[row, n:] == 0).all()
    padded = (X[1] - X[1].mean(0)) / X[1].std(0)  # negative control: what F.instance_norm does with padding
    assert np.abs(padded[:5] - out[1, :5]).max() > 0.1


def test_padding_does_not_enter():
    noise = np.where(np.arange(9)[None, :, None] < LENGTHS[:, None, None], X, 1e4).astype(np.float32)
    for function in (instance_norm, time_variation):
        a, b = function(jnp.asarray(X), jnp.asarray(LENGTHS)), function(jnp.asarray(noise), jnp.asarray(LENGTHS))
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_packed_utterances_are_taken_alone():
    ids = jnp.asarray([[1, 1, 1, 0, 2, 2, 2, 2, 0]], jnp.int32)
    packed = instance_norm(jnp.asarray(X[:1]), ids, segments=3)
    for first, end in ((0, 3), (4, 8)):
        alone = instance_norm(jnp.asarray(X[:1, first:end]), jnp.asarray([end - first]))
        np.testing.assert_allclose(packed[:, first:end], alone, atol=2e-5)
    assert (np.asarray(packed)[0, [3, 8]] == 0).all()
    parts = [time_variation(jnp.asarray(X[:1, a:b]), jnp.asarray([b - a])) for a, b in ((0, 3), (4, 8))]
    whole = time_variation(jnp.asarray(X[:1]), ids, segments=3)
    np.testing.assert_allclose(np.asarray(whole), np.asarray(parts).sum(0), rtol=1e-5)


def test_variation_is_zero_for_constants_of_any_size_and_does_not_depend_on_scale():
    lengths = jnp.asarray(LENGTHS)
    around, square = time_variation(jnp.asarray(X), lengths)
    valid = [X[0], X[1, :5]]
    assert float(around) == pytest.approx(sum(((v - v.mean(0)) ** 2).sum() for v in valid), rel=1e-5)
    assert float(square) == pytest.approx(sum((v**2).sum() for v in valid), rel=1e-5)
    scaled = time_variation(jnp.asarray(1e-3 * X), lengths)
    assert float(scaled[0] / scaled[1]) == pytest.approx(float(around / square), rel=1e-4)
    constant = np.broadcast_to(X[:, :1], X.shape)
    assert float(time_variation(jnp.asarray(constant), lengths)[0]) < 1e-9


def test_deviation_over_the_chosen_frames():
    weight = np.zeros((3, 9), np.float32)
    weight[0, 2:8] = weight[1, 1] = 1
    chosen = X[weight > 0].astype(np.float64)
    expected = np.sqrt(chosen.var(0, ddof=1) + 1e-6).mean()
    assert float(mean_deviation(jnp.asarray(X), jnp.asarray(weight))) == pytest.approx(expected, rel=1e-5)
    assert float(mean_deviation(jnp.asarray(X), jnp.zeros((3, 9)))) == pytest.approx(1e-3)  # of nothing: finite
