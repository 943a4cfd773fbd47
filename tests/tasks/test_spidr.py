"""SpidR and DinoSR: codebooks against brute force, labels and losses, the teacher's way, collapses brought about."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from tiny_teacher import FRAMES, LENGTHS, SAMPLES, call, encoder, init, keys, make_batch, means, replaced

from speechjax.errors import UserError
from speechjax.models.online_codebook import assigned_sums, follow, nearest, new_codebook
from speechjax.step import init_state, train_step
from speechjax.tasks.spidr import SpidR

K, V, D = 2, 5, 32


def spidr(encoder_changes=None, **changes):
    options = dict(
        mask_prob=0.8, mask_span=4, codebooks=K, codes=V, code_decay=0.9, same_layer=True, ema_schedule="exponential",
        ema_start=0.9, ema_end=1.0, ema_steps=3, teacher_until=-1,
    )  # fmt: skip
    return SpidR(encoder=encoder(**(encoder_changes or {})), **(options | changes))


@pytest.fixture(scope="module")
def model():
    task = spidr()
    return task, init(task)


@functools.cache
def _inner(same_layer: bool):
    """Jitted (mask, logits, teacher layers, codes), each of K; for a task like that of the fixture."""
    task = spidr(same_layer=same_layer)

    def inner(self, batch):
        features, lengths, segments = self._features(batch)
        features = self.encoder.feature_norm(features)
        mask = self._mask(features, lengths)
        logits = self._logits(features, lengths, mask=mask, train=False)
        return mask, logits, *self._codes(features, lengths, segments)

    return jax.jit(lambda variables, batch: task.apply(variables, batch, rngs=keys(task), method=inner))


def inner(variables, batch, same_layer=True):
    return jax.tree.map(np.asarray, _inner(same_layer)(variables, batch))


# ------------------------------------------------------------------------------------------- codebooks


def test_codes_are_those_of_the_nearest_codeword():
    rng = np.random.default_rng(0)
    book = dict(
        sums=jnp.asarray(rng.normal(size=(2, 7, 4)), jnp.float32),
        counts=jnp.asarray(rng.uniform(0.5, 3, (2, 7)), jnp.float32),
    )
    x = rng.normal(size=(3, 11, 4)).astype(np.float32)
    words = np.asarray(book["sums"][1], np.float64) / np.asarray(book["counts"][1], np.float64)[:, None]
    distance = ((x[:, :, None].astype(np.float64) - words) ** 2).sum(-1)
    codes = np.asarray(nearest(book, 1, jnp.asarray(x)))
    np.testing.assert_array_equal(codes, distance.argmin(-1))
    assert len(np.unique(codes)) > 3
    assert (codes != (np.asarray(book["sums"][1]) * x[:, :, None]).sum(-1).argmax(-1)).any(), "negative control"


def test_update_moves_active_codes_and_leaves_the_others():
    """By a loop over frames.  Trap: decaying all codes alike makes those out of use vanish."""
    rng = np.random.default_rng(1)
    x, codes = rng.normal(size=(2, 6, 3)), rng.integers(0, 3, (2, 6))  # codes 3 and 4 are never chosen
    masked = rng.random((2, 6)) < 0.7
    book = jax.tree.map(np.asarray, new_codebook(jax.random.key(0), 1, 5, 3))
    sums, counts = book["sums"][0].astype(np.float64), book["counts"][0].astype(np.float64)
    total, number = np.zeros((5, 3)), np.zeros(5)
    for b, t in np.argwhere(masked):
        total[codes[b, t]] += x[b, t]
        number[codes[b, t]] += 1
    for v in np.flatnonzero(number):
        sums[v], counts[v] = 0.9 * sums[v] + 0.1 * total[v], 0.9 * counts[v] + 0.1 * number[v]
    given = assigned_sums(jnp.asarray(x, jnp.float32), jax.nn.one_hot(codes, 5) * masked[..., None].astype(np.float32))
    after = follow(book, jax.tree.map(lambda g: g[None], given), 0.9)
    np.testing.assert_allclose(after["sums"][0], sums, atol=1e-6)  # float32
    np.testing.assert_allclose(after["counts"][0], counts, atol=1e-6)
    idle = number == 0
    assert idle.sum() >= 2
    np.testing.assert_array_equal(after["sums"][0][idle], book["sums"][0][idle])
    np.testing.assert_array_equal(after["counts"][0][idle], 1)


def test_first_codewords_have_zero_mean_and_unit_variance_over_codes():
    book = new_codebook(jax.random.key(0), 3, 50, 8)
    np.testing.assert_allclose(np.mean(book["sums"], 1), 0, atol=1e-5)
    np.testing.assert_allclose(np.var(book["sums"], 1), 1, atol=1e-3)
    assert (np.asarray(book["counts"]) == 1).all()


# ------------------------------------------------------------------------------------------- labels and loss


@pytest.mark.parametrize("same_layer", [True, False], ids=["spidr", "dinosr"])
def test_loss_is_the_mean_cross_entropy_over_codebooks(model, same_layer):
    _, variables = model
    task, batch = spidr(same_layer=same_layer), make_batch()
    losses, metrics, sown = call(task, variables, batch, train=False)
    mask, logits, layers, codes = inner(variables, batch, same_layer)
    loss, correct, guess, entropy, perplexity = [], [], [], [], []
    for k in range(K):
        z, c = logits[k][mask].astype(np.float64), codes[k][mask]
        loss.append((np.log(np.exp(z).sum(-1)) - z[np.arange(len(c)), c]).sum())
        correct.append((z.argmax(-1) == c).sum())
        counts = np.bincount(c, minlength=V)
        p = counts[counts > 0] / counts.sum()
        guess.append(counts.max())
        entropy.append(-(p * np.log(p)).sum())
        perplexity.append(np.exp(entropy[-1]))
        np.testing.assert_allclose(sown["code_counts"][k], counts)
        for v in range(V):
            np.testing.assert_allclose(sown["code_sums"][k, v], layers[k][mask & (codes[k] == v)].sum(0), atol=1e-3)
    n = mask.sum()
    assert losses["prediction"][0] == pytest.approx(np.mean(loss), rel=1e-5)
    assert losses["prediction"][1] == n > 20
    expected = dict(
        accuracy=np.mean(correct) / n, chance_accuracy=np.mean(guess) / n, chance_prediction=np.mean(entropy),
        target_perplexity=np.mean(perplexity),
    )  # fmt: skip
    got = means(metrics)
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_labels_come_from_normalised_feed_forward_outputs_of_the_unmasked_input(model):
    """A fresh teacher is the student."""
    task, variables = model
    batch = make_batch()
    alone = task.encoder.clone(parent=None)
    encoded = jax.jit(lambda p: alone.apply({"params": p}, batch, train=False, hidden="mlp"))(
        variables["params"]["encoder"]
    )
    _, _, layers, codes = inner(variables, batch)
    for k, x in enumerate(np.asarray(h, np.float64) for h in encoded.hidden[-K:]):
        book = variables["codebook"]["books"]
        words = np.asarray(book["sums"][k], np.float64) / np.asarray(book["counts"][k], np.float64)[:, None]
        for row, n in enumerate(FRAMES):
            if not n:
                continue
            normed = (x[row, :n] - x[row, :n].mean(0)) / np.sqrt(x[row, :n].var(0) + 1e-5)
            np.testing.assert_allclose(layers[k][row, :n], normed, atol=1e-3)  # float32, variances of 1e-3
            nearest_word = ((normed[:, None] - words) ** 2).sum(-1).argmin(-1)
            assert (codes[k][row, :n] == nearest_word).mean() > 0.95  # but for ties within rounding


def test_heads_read_their_own_layer_or_all_the_last(model):
    """The last layer's feed-forward output changed: SpidR's first codebook is predicted as before, DinoSR's is not."""
    _, variables = model
    batch = make_batch()
    path = "params/encoder/transformer/layer2/mlp_down/bias"
    moved = replaced(variables, path, lambda x: x + jnp.linspace(-1, 1, x.size))
    change = {
        same: [
            np.abs(a - b).max() for a, b in zip(*(inner(v, batch, same)[1] for v in (variables, moved)), strict=True)
        ]
        for same in (True, False)
    }
    assert change[True][0] == 0
    assert min(change[True][1], *change[False]) > 1e-3


def test_padding_changes_nothing(model):
    task, variables = model
    batch = make_batch()
    padding = np.arange(SAMPLES) >= LENGTHS[:, None]
    noise = batch | {"audio": np.where(padding, make_batch(1)["audio"], batch["audio"])}
    a, b = call(task, variables, batch), call(task, variables, noise)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    other = call(task, variables, make_batch(2))
    assert other[0]["prediction"] != a[0]["prediction"], "negative control"


def test_batches_of_nothing_are_finite_and_give_nothing(model):
    task, variables = model
    losses, metrics, sown = call(task, variables, make_batch(lengths=LENGTHS * 0))
    assert losses["prediction"] == (0, 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics))
    assert all((x == 0).all() for x in jax.tree.leaves(sown))


# ------------------------------------------------------------------------------------------- teacher, codebooks, step


def test_no_gradient_reaches_teacher_codebooks_or_front_end_through_the_labels(model):
    task, variables = model
    batch = make_batch()

    def total(variables):
        (losses, _), sown = task.apply(
            variables, batch, step=jnp.int32(0), train=True, rngs=keys(task), mutable=["sums"]
        )  # fmt: skip
        return jnp.stack([losses["prediction"][0], jnp.sum(sown["sums"]["code_sums"] ** 2)])

    both = jax.jit(jax.jacrev(total))(variables)
    loss, labels = (jax.tree.map(lambda g, i=i: g[i], both) for i in (0, 1))
    assert all((g == 0).all() for name in ("teacher", "codebook") for g in jax.tree.leaves(loss[name]))
    assert all((g == 0).all() for g in jax.tree.leaves(labels["params"])), "what the codebooks are given"
    deaf = {p for p, g in flatten_dict(loss["params"], sep="/").items() if jnp.abs(g).max() < 1e-7}
    # The last layer norm comes after the last feed-forward output, which the last head reads.
    unused = {f"encoder/transformer/layer2/mlp_norm/{name}" for name in ("scale", "bias")}
    assert deaf == {f"encoder/transformer/layer{i}/attention/key/bias" for i in range(3)} | unused


def test_one_update_after_another():
    """Labels by the codebook before the update; then the codebook follows them, the teacher the updated student."""
    task = spidr(teacher_until=3)
    tx = optax.adam(1e-2)
    batch = {k: jnp.asarray(v) for k, v in make_batch().items()}
    state = jax.jit(lambda: init_state(task, tx, 0, batch))()
    assert set(state.extra) == {"teacher", "codebook"}
    params, extra = task.start(jax.tree.map(lambda x: 1.1 * x, state.params), state.extra)  # of another run
    state = state.replace(params=params, extra=extra)
    step = jax.jit(functools.partial(train_step, task, tx, 0, 100))
    leaf = lambda tree: np.asarray(tree["layer1"]["mlp_up"]["kernel"], np.float64)  # noqa: E731
    np.testing.assert_array_equal(leaf(extra["teacher"]["transformer"]), leaf(params["encoder"]["transformer"]))
    teacher = leaf(state.extra["teacher"]["transformer"])
    sown_by = jax.jit(
        lambda state, rngs: task.apply(
            {"params": state.params, **state.extra}, batch, step=state.step, train=True, rngs=rngs, mutable=["sums"]
        )[1]["sums"]
    )
    for n in range(1, 5):
        rngs = {
            name: jax.random.fold_in(jax.random.fold_in(jax.random.key(0), n - 1), i)
            for i, name in enumerate(task.rngs)
        }
        given = jax.tree.map(np.asarray, sown_by(state, rngs))
        before = jax.tree.map(np.asarray, state.extra["codebook"]["books"])
        state, _ = step(state, batch)
        keep = np.where(given["code_counts"] > 0, 0.9, 1.0)
        after = state.extra["codebook"]["books"]
        np.testing.assert_allclose(
            after["counts"], keep * before["counts"] + (1 - keep) * given["code_counts"], rtol=1e-5
        )
        keep = keep[..., None]
        np.testing.assert_allclose(after["sums"], keep * before["sums"] + (1 - keep) * given["code_sums"], atol=1e-4)
        if n <= 3:  # then the teacher stands still
            rate = 0.1 * np.exp(-n / 3)
            teacher += rate * (leaf(state.params["encoder"]["transformer"]) - teacher)
        np.testing.assert_allclose(leaf(state.extra["teacher"]["transformer"]), teacher, atol=1e-6)
    assert "positions" not in state.extra["teacher"]["transformer"], "shared with the student"
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state.extra)), "what a checkpoint can hold"


# ------------------------------------------------------------------------------------------- units and pictures


def test_units_are_codes_of_whole_utterances(model):
    task, variables = model
    variables = replaced(variables, "params/head_kernel", lambda x: 50 * x)  # fresh heads say little but their bias
    units = jax.jit(lambda v, b: task.apply(v, b, method="units"))
    alone = np.asarray(units(variables, make_batch(lengths=np.array([320, 160], np.int32))))
    for row, n in enumerate((15, 7)):
        assert ((alone[row, :n] >= 0) & (alone[row, :n] < V)).all()
        assert (alone[row, n:] == -1).all()
    assert len(np.unique(alone)) > 2
    audio = np.zeros((1, 640), np.int16)
    audio[0, :320], audio[0, 400:560] = (make_batch()["audio"][i, :n] for i, n in ((0, 320), (1, 160)))
    packed = dict(
        audio=audio, starts=np.array([[0, 400, 0]], np.int32), lengths=np.array([[320, 160, 0]], np.int32),
        mean=np.zeros((1, 3), np.float32), std=np.full((1, 3), 0.2, np.float32),
    )  # fmt: skip
    together = np.asarray(task.apply(variables, packed, method="units"))[0]
    np.testing.assert_array_equal(together[:15], alone[0, :15])
    np.testing.assert_array_equal(together[20:27], alone[1, :7])
    assert (np.delete(together, [*range(15), *range(20, 27)]) == -1).all()


def test_picture_shows_the_last_codebook_where_masked(model):
    task, variables = model
    batch = make_batch()
    out = task.apply(variables, batch, step=jnp.int32(0), rngs=keys(task), method="predict")
    mask, logits, _, codes = inner(variables, batch)
    np.testing.assert_array_equal(out["true"], np.where(mask, codes[-1], -1))
    np.testing.assert_array_equal(out["predicted"], np.where(mask, logits[-1].argmax(-1), -1))
    assert set(out) == {"lengths", "mask", "true", "predicted"}


# ------------------------------------------------------------------------------------------- collapse


def alarms(task, variables, step=1000):
    losses, metrics, _ = call(task, variables, make_batch(), train=False)
    return task.health(means({**losses, **metrics}), step)


def test_nothing_alarms_at_the_start(model):
    assert alarms(*model, step=0) == {}


def test_codebooks_of_which_one_code_takes_all(model):
    """The others have drifted away: every frame is next to the one that is left."""
    task, variables = model
    variables = replaced(variables, "codebook/books/sums", lambda x: x.at[:, 1:].add(100.0))
    found = alarms(task, variables)
    assert "perplexity 1.0 of 5" in found["codebook_collapse"]
    assert "learning_rate" in found["codebook_collapse"]


def test_a_student_with_one_answer(model):
    task, variables = model
    variables = replaced(variables, "params/head_kernel", jnp.zeros_like)
    found = alarms(task, variables)
    assert "constant" in found["prediction_collapse"]
    assert "stuck_at_chance" in found
    assert "prediction_collapse" not in alarms(task, variables, step=100), "every student begins near there"


def test_a_front_end_that_became_constant_while_the_labels_look_fine(model):
    task, variables = model
    for i in range(3):  # as large as after training: fresh outputs are near the epsilon of the norm
        for name in ("mlp_up", "mlp_down"):
            variables = replaced(variables, f"teacher/transformer/layer{i}/{name}/kernel", lambda x: 10 * x)
    path = "params/encoder/front/norm2"
    variables = replaced(variables, f"{path}/scale", lambda x: 0.03 * x)
    variables = replaced(variables, f"{path}/bias", lambda x: jnp.linspace(-1, 2, x.size))
    found = alarms(task, variables)
    assert "optim.warmup" in found["front_end_collapse"]
    assert "codebook_collapse" not in found


@pytest.mark.parametrize("wrong", [dict(codebooks=4), dict(code_decay=1.0), dict(ema_schedule="cosine")])
def test_wrong_settings_name_their_key(wrong):
    with pytest.raises(UserError, match=f"config.task.{next(iter(wrong))}"):
        init(spidr(**wrong))
