"""data2vec 1 and 2: targets, losses, the teacher's way, and each of its collapses, brought about."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from tiny_teacher import FRAMES, LENGTHS, SAMPLES, call, compiled, encoder, init, keys, make_batch, means, replaced

from speechjax.errors import UserError
from speechjax.models.ema import instance_norm
from speechjax.step import init_state, train_step
from speechjax.tasks.data2vec import Data2Vec
from speechjax.tasks.data2vec2 import Data2Vec2

COMMON = dict(mask_prob=0.65, mask_span=4, target_layers=2, ema_start=0.9, ema_end=0.99, ema_steps=4)
SECOND = dict(
    mask_prob=0.5, mask_adjust=0.05, masks=3, mask_noise=0.01, decoder_layers=2, decoder_width=16, decoder_kernel=3,
    decoder_groups=4, decoder_dropout=0.0,
)  # fmt: skip


def first(encoder_changes=None, **changes):
    return Data2Vec(encoder=encoder(**(encoder_changes or {})), **(COMMON | changes))


def second(encoder_changes=None, **changes):
    changed = dict(attention=dict(positions="alibi")) | (encoder_changes or {})
    return Data2Vec2(encoder=encoder(**changed), **(COMMON | SECOND | changes))


@pytest.fixture(scope="module", params=[first, second], ids=["data2vec", "data2vec2"])
def model(request):
    task = request.param()
    return task, init(task)


def predict(task, variables, batch, seed=0, train=False):
    out, _ = compiled(task, "_regress", train)(variables, batch, keys(task, seed), jnp.int32(0))
    return jax.tree.map(np.asarray, out)


def shake(x):
    return x + 0.5 * jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)


def utterances(task, x):
    """Rows of a task as utterances of the batch."""
    return x[:: getattr(task, "masks", 1)]


# ------------------------------------------------------------------------------------------- targets and loss


def test_targets_are_the_normalised_top_layers_of_the_unmasked_input(model):
    """A fresh teacher is the student, so the student's own feed-forward outputs, unmasked, give the targets."""
    task, variables = model
    batch = make_batch()
    alone = task.encoder.clone(parent=None)
    encoded = jax.jit(lambda params: alone.apply({"params": params}, batch, train=False, hidden="mlp"))(
        variables["params"]["encoder"]
    )
    layers = [np.asarray(x, np.float64) for x in encoded.hidden[-2:]]
    target = utterances(task, predict(task, variables, batch)["target"])
    for row, n in enumerate(FRAMES):
        if n:
            normed = [(x[row, :n] - x[row, :n].mean(0)) / np.sqrt(x[row, :n].var(0) + 1e-5) for x in layers]
            np.testing.assert_allclose(target[row, :n], np.mean(normed, axis=0), atol=1e-4)  # float32, small variances
    last = np.asarray(instance_norm(encoded.frames, encoded.lengths))
    assert np.abs(last - target).max() > 0.1, "negative control: the layer's output is not the target"


def test_loss_is_squared_distance_over_root_width(model):
    task, variables = model
    batch = make_batch()
    losses, metrics, _ = call(task, variables, batch, train=False)
    out = predict(task, variables, batch)
    mask, difference = out["mask"], (out["output"] - out["target"]).astype(np.float64)
    total, n = losses["regression"]
    assert n == mask.sum() > 15
    assert total == pytest.approx((difference[mask] ** 2).sum() / math.sqrt(32), rel=1e-5)  # float32
    chance = ((out["target"][mask] - out["target"][mask].mean(0)) ** 2).sum() / math.sqrt(32)
    assert metrics["chance_regression"][0] == pytest.approx(chance, rel=1e-4)
    assert metrics["chance_regression"][1] == n
    spread = np.sqrt(out["target"][mask].var(0, ddof=1) + 1e-6).mean()
    assert metrics["target_variance"][0] == pytest.approx(spread, rel=1e-4)
    assert metrics["masked_share"] == (n, FRAMES.sum() * getattr(task, "masks", 1))


def test_predicting_the_mean_scores_at_chance():
    """The head's kernel zero, its bias the mean target."""
    task = first()
    variables, batch = init(task), make_batch()
    out = predict(task, variables, batch)
    head = dict(kernel=np.zeros((32, 32), np.float32), bias=out["target"][out["mask"]].mean(0))
    losses, metrics, _ = call(task, replaced(variables, "params/head", head), batch, train=False)
    assert losses["regression"][0] == pytest.approx(metrics["chance_regression"][0], rel=1e-5)


def test_padding_changes_nothing(model):
    task, variables = model
    batch = make_batch()
    padding = np.arange(SAMPLES) >= LENGTHS[:, None]
    noise = batch | {"audio": np.where(padding, make_batch(1)["audio"], batch["audio"])}
    a, b = call(task, variables, batch), call(task, variables, noise)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    audio = batch["audio"].copy()
    audio[1, 180] += 5000
    assert call(task, variables, batch | {"audio": audio})[0]["regression"] != a[0]["regression"], "negative control"


def test_batches_of_nothing_are_finite_and_weigh_nothing(model):
    task, variables = model
    losses, metrics, _ = call(task, variables, make_batch(lengths=LENGTHS * 0))
    assert losses["regression"] == (0, 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics))


# ------------------------------------------------------------------------------------------- the teacher


def test_teacher_is_in_evaluation_and_sees_no_mask():
    """With dropout and layer drop on, another key changes the student's output and mask, not one target."""
    task = first(dict(dropout=0.3, attention_dropout=0.3, layerdrop=0.3))
    variables, batch = init(task), make_batch()
    a, b = (predict(task, variables, batch, seed, train=True) for seed in (0, 1))
    np.testing.assert_array_equal(a["target"], b["target"])
    assert (a["mask"] != b["mask"]).any()
    assert np.abs(a["output"] - b["output"]).max() > 0.01


@pytest.mark.parametrize(
    ("make", "shared", "own"),
    [
        (first, ["front/conv1_kernel", "projection/kernel", "transformer/positions/conv0_kernel"],
         ["transformer/layer2/mlp_down/kernel"]),
        (second, ["front/conv1_kernel", "projection/kernel"],
         ["transformer/layer2/mlp_down/kernel", "transformer/positions/conv0_kernel",
          "transformer/attention_bias/scale"]),
    ],
)  # fmt: skip
def test_what_the_teacher_shares_and_what_it_owns(make, shared, own):
    """Trap 10: an average of the transformer only; front end and projection, in the first version positions, shared."""
    task = make()
    variables, batch = init(task), make_batch()
    target = predict(task, variables, batch)["target"]
    for path in (*shared, *own):
        moved = replaced(
            variables, f"params/encoder/{path}", lambda x: x + 0.5 * jnp.sin(jnp.arange(x.size)).reshape(x.shape)
        )
        change = np.abs(predict(task, moved, batch)["target"] - target).max()
        assert (change > 1e-3) == (path in shared), path
    assert ("positions" in variables["teacher"]["transformer"]) == task.own_positions


def test_no_gradient_reaches_teacher_or_targets(model):
    task, variables = model
    batch = make_batch()

    def total(variables):
        out = task.apply(variables, batch, True, rngs=keys(task), method="_regress")
        return jnp.stack([jnp.sum(out[name] ** 2) for name in ("target", "output")])

    both = jax.jit(jax.jacrev(total))(variables)
    gradients = {name: jax.tree.map(lambda g, i=i: g[i], both) for i, name in enumerate(("target", "output"))}
    assert all((g == 0).all() for g in jax.tree.leaves(gradients["target"]))
    assert all((g == 0).all() for g in jax.tree.leaves(gradients["output"]["teacher"]))
    deaf = {p for p, g in flatten_dict(gradients["output"]["params"], sep="/").items() if jnp.abs(g).max() < 1e-6}
    unused = {"encoder/mask_embedding"} if task.own_positions else set()  # masked frames are cut out
    assert deaf == {f"encoder/transformer/layer{i}/attention/key/bias" for i in range(3)} | unused


def test_teacher_follows_after_the_update(model):
    """Closed form over four updates of the real step: rates 1 - (0.9 + 0.09 n / 4), the student after update n."""
    task, _ = model
    tx = optax.adam(1e-2)
    batch = {k: jnp.asarray(v) for k, v in make_batch().items()}
    state = jax.jit(lambda: init_state(task, tx, 0, batch))()
    assert set(state.extra) == {"teacher"}
    # As where a run continues another's parameters: the teacher is theirs too, and no array is donated twice.
    params, extra = task.start(jax.tree.map(lambda x: 1.1 * x, state.params), state.extra)
    state = state.replace(params=params, extra=extra)
    step = jax.jit(functools.partial(train_step, task, tx, 0, 100), donate_argnums=0)
    path = ("layer1", "mlp_up", "kernel")

    def leaf(tree):
        return np.asarray(functools.reduce(lambda t, k: t[k], path, tree), np.float64)

    expected = leaf(state.params["encoder"]["transformer"])
    np.testing.assert_array_equal(leaf(state.extra["teacher"]["transformer"]), expected)
    early = expected.copy()
    for n in range(1, 5):
        rate, before = 1 - (0.9 + 0.09 * n / 4), leaf(state.params["encoder"]["transformer"])
        state, _ = step(state, batch)
        expected += rate * (leaf(state.params["encoder"]["transformer"]) - expected)
        early += rate * (before - early)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state.extra)), "what a checkpoint can hold"
    np.testing.assert_allclose(leaf(state.extra["teacher"]["transformer"]), expected, atol=1e-6)  # float32
    assert np.abs(early - expected).max() > 1e-5, "negative control: the student before the update"


def test_packed_utterances_have_the_targets_they_have_alone():
    task = first()
    variables, alone = init(task), make_batch(lengths=np.array([320, 160], np.int32))
    audio = np.zeros((1, 640), np.int16)
    audio[0, :320], audio[0, 400:560] = alone["audio"][0, :320], alone["audio"][1, :160]
    packed = dict(
        audio=audio, starts=np.array([[0, 400, 0]], np.int32), lengths=np.array([[320, 160, 0]], np.int32),
        mean=np.zeros((1, 3), np.float32), std=np.full((1, 3), 0.2, np.float32),
    )  # fmt: skip
    a, b = predict(task, variables, alone)["target"], predict(task, variables, packed)["target"]
    n, m = (int(x) for x in predict(task, variables, alone)["lengths"])
    np.testing.assert_allclose(b[0, :n], a[0, :n], atol=2e-4)  # float32 sums in another order, small variances
    np.testing.assert_allclose(b[0, 20 : 20 + m], a[1, :m], atol=2e-4)
    with pytest.raises(UserError, match=r"data\.fill=False"):
        predict(second(), variables, packed)


# ------------------------------------------------------------------------------------------- version 2


def test_masks_of_one_utterance_share_one_teacher():
    task = second()
    out = predict(task, init(task), make_batch())
    target, mask = (out[k].reshape(4, 3, *out[k].shape[1:]) for k in ("target", "mask"))
    for i in (1, 2):
        np.testing.assert_array_equal(target[:, 0], target[:, i])
        assert (mask[0, 0] != mask[0, i]).any()
    np.testing.assert_array_equal(mask.sum(2), np.broadcast_to((FRAMES // 2)[:, None], (4, 3)))


def test_scanned_and_rematerialised_layers_train_too():
    """Same numbers of the same stacked parameters, with layer drop and dropout on."""
    task = second(dict(scan=True, remat=True, dropout=0.1, layerdrop=0.1), decoder_dropout=0.1)
    variables = init(task)
    flat = task.clone(encoder=task.encoder.clone(scan=False, remat=False, parent=None), parent=None)

    def unstack(tree):
        own = {f"layer{i}": jax.tree.map(lambda x, i=i: x[i], tree["layers"]) for i in range(3)}
        return {k: v for k, v in tree.items() if k != "layers"} | own

    loose = replaced(variables, "params/encoder/transformer", unstack)
    loose = replaced(loose, "teacher/transformer", unstack)
    a, b = (call(t, v, make_batch())[0]["regression"][0] for t, v in ((task, variables), (flat, loose)))
    assert a == pytest.approx(b, rel=1e-5)  # float32
    other = call(task, variables, make_batch(), seed=1)[0]["regression"][0]
    assert other != pytest.approx(a, rel=1e-3), "negative control: other masks, other dropout"


# ------------------------------------------------------------------------------------------- collapse


def alarms(task, variables, step=1000):
    losses, metrics, _ = call(task, variables, make_batch(), train=False)
    return task.health(means({**losses, **metrics}), step)


def test_nothing_alarms_at_the_start(model):
    task, variables = model
    assert alarms(task, variables, step=0) == {}


def test_a_teacher_that_says_the_same_of_all_frames():
    task = first()
    variables = init(task)
    for i in range(3):
        variables = replaced(variables, f"teacher/transformer/layer{i}/mlp_down/kernel", jnp.zeros_like)
    found = alarms(task, variables)
    assert "0.1" in found["target_collapse"]
    assert "ema_start" in found["target_collapse"]


def test_a_student_that_says_the_same_of_all_frames():
    task = first()
    variables = replaced(init(task), "params/head/kernel", jnp.zeros_like)
    found = alarms(task, variables)
    assert "learning_rate" in found["prediction_collapse"]
    assert "stuck_at_chance" in found
    assert "prediction_collapse" not in alarms(task, variables, step=100), "every student begins near there"


def test_a_front_end_that_became_constant_while_the_targets_look_fine(model):
    """fairseq issue 5239: a thousandth of the energy varies, instance norm blows it up, and no other alarm rings."""
    task, variables = model
    for i in range(3):  # as large as after training: fresh outputs are near the epsilon of the norm
        for name in ("mlp_up", "mlp_down"):
            variables = replaced(variables, f"teacher/transformer/layer{i}/{name}/kernel", lambda x: 10 * x)
    path = "params/encoder/front/norm2"
    variables = replaced(variables, f"{path}/scale", lambda x: 0.03 * x)
    variables = replaced(variables, f"{path}/bias", lambda x: jnp.linspace(-1, 2, x.size))
    found = alarms(task, variables)
    assert "optim.warmup" in found["front_end_collapse"]
    assert not {"target_collapse", "prediction_collapse"} & set(found)


# ------------------------------------------------------------------------------------------- settings


def test_wrong_settings_name_their_key():
    for task, key in (
        (first(target_layers=4), "target_layers=4"), (second(masks=0), "masks=0"),
        (second(decoder_kernel=4), "decoder_kernel"), (second(dict(attention=dict(positions="rotary"))), "attention"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=key):
            init(task)
