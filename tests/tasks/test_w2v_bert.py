"""w2v-BERT: both losses against loops and against wav2vec 2.0, where gradients go, and the ways it collapses."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_wav2vec2 import (
    FRAMES,
    LENGTHS,
    STREAMS,
    assert_temperature_shapes_gradients,
    make_batch,
    make_run,
    random_params,
)

from speechjax import config as configs
from speechjax.errors import UserError
from speechjax.models.encoder import SpeechEncoder
from speechjax.models.masking import max_masked, sample_negatives, span_mask
from speechjax.tasks import w2v_bert
from speechjax.tasks.w2v_bert import W2vBert
from speechjax.tasks.wav2vec2 import Wav2Vec2
from tests.drawing import draw_params

V, FRONT = 12, dict(name="waveform", channels=(16, 16, 16), kernels=(10, 3, 2), strides=(5, 2, 2), norm="group")
ENCODER: dict[str, Any] = dict(
    frontend=FRONT, width=32, layers=3, heads=2, mlp=48, norm="post", positions=dict(kernel=6, groups=4),
    dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, input_dropout=0.0, layerdrop=0.0, scan=False,
    remat=False, dtype="float32",
)  # fmt: skip
CONTRAST: dict[str, Any] = dict(
    mask_prob=0.65, mask_span=4, negatives=6, logit_temperature=0.1, codes=V, code_dim=16, projection=12,
    gumbel_start=2.0, gumbel_floor=0.5, gumbel_decay=0.999995, diversity=0.1,
)  # fmt: skip


def make_task(encoder: dict[str, Any] | None = None, **changes: Any) -> W2vBert:
    tiny = CONTRAST | dict(contrastive_layers=2, contrastive_weight=1.0, prediction_weight=1.0)
    return W2vBert(encoder=SpeechEncoder(**(ENCODER | (encoder or {}))), **(tiny | changes))


@pytest.fixture(scope="module", params=["post", "pre"])
def model(request):
    """(task, parameters, jitted run with the gradient of the sum of all losses)."""
    task = make_task(dict(norm=request.param))
    return task, random_params(task), make_run(task)


@pytest.fixture(scope="module")
def forward():
    """Jitted `run(params, batch, seed)` -> losses, metrics, of the post-norm task."""
    task = make_task()

    @jax.jit
    def run(params, batch, seed):
        rngs = {name: jax.random.fold_in(jax.random.key(seed), i) for i, name in enumerate(STREAMS)}
        return task.apply({"params": params}, batch, step=jnp.int32(0), train=True, rngs=rngs)

    return task, random_params(task), lambda *args: jax.tree.map(np.asarray, run(*args))


def means(losses, metrics) -> dict[str, float]:
    """What a log window shows."""
    return {k: float(s / w) if w else math.nan for k, (s, w) in (losses | metrics).items()}


# ------------------------------------------------------------------------------------------- losses


def cosine(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def reference(task, seen, mask, drawn) -> dict[str, float]:
    """Both losses and their chance levels by loops over rows, masked frames and negatives."""
    _, sampled, probs = seen["quantizer"]
    sums = dict(contrastive=0.0, prediction=0.0, right=0, n=0)
    wanted, guessed, mean_probs = np.zeros(V), np.zeros(V), np.zeros(V)
    for b, row in enumerate(mask):
        targets, contexts, logits = (np.float64(seen[k][b]) for k in ("project_target", "project_context", "head"))
        for m in range(int(row.sum())):
            others = [k for k in drawn[b, m] if sampled[b, k, 0] != sampled[b, m, 0]]
            positive = cosine(contexts[m], targets[m]) / task.logit_temperature
            negatives = [cosine(contexts[m], targets[k]) / task.logit_temperature for k in others]
            sums["contrastive"] += np.log(np.exp([positive, *negatives]).sum()) - positive
            code = probs[b, m, 0].argmax()  # the likeliest, whatever was drawn
            sums["prediction"] += np.log(np.exp(logits[m]).sum()) - logits[m, code]
            sums["right"] += logits[m].argmax() == code
            sums["n"] += 1
            wanted[code] += 1
            guessed[logits[m].argmax()] += 1
            mean_probs += probs[b, m, 0]
    n = sums["n"]
    spread = lambda c: float(np.exp(-np.sum(c / n * np.log(np.maximum(c / n, 1e-30)))))  # noqa: E731
    return dict(
        contrastive=sums["contrastive"] / n, prediction=sums["prediction"] / n,
        diversity=0.1 * (V - spread(mean_probs)) / V, prediction_accuracy=sums["right"] / n,
        chance_prediction_accuracy=wanted.max() / n, chance_prediction=math.log(spread(wanted)),
        code_perplexity=spread(wanted), prediction_perplexity=spread(guessed), prob_perplexity=spread(mean_probs),
        masked_share=n / 41,
    )  # fmt: skip


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_losses_and_metrics_are_the_definitions(norm):
    task = make_task(dict(norm=norm))
    params, batch = random_params(task), make_batch()
    frames = jnp.array([24, 17, 0], jnp.int32)
    mask = np.asarray(span_mask(jax.random.key(7), frames, FRAMES, prob=0.65, span=4))
    peers = np.arange(max_masked(FRAMES, prob=0.65, span=4)) < mask.sum(axis=1)[:, None, None]
    drawn = np.asarray(sample_negatives(jax.random.key(8), jnp.asarray(peers), task.negatives))
    rngs = {name: jax.random.key(9) for name in STREAMS}
    wanted = ("quantizer", "project_context", "project_target", "head")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w2v_bert, "span_mask", lambda *_, **__: jnp.asarray(mask))
        patch.setattr(w2v_bert, "sample_negatives", lambda *_: jnp.asarray(drawn))
        (losses, metrics), seen = jax.jit(
            lambda: task.apply(
                {"params": params}, batch, step=jnp.int32(3), train=True, rngs=rngs, mutable="intermediates",
                capture_intermediates=lambda module, method: module.name in wanted and method == "__call__",
            )
        )()  # fmt: skip
    leaves: dict[str, Any] = flatten_dict(seen["intermediates"], sep="/")
    seen = {path.split("/")[-2]: jax.tree.map(np.asarray, value[0]) for path, value in leaves.items()}
    expected, got = reference(task, seen, mask, drawn), means(losses, metrics)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=2e-5), name  # float32
    assert [int(weight) for _, weight in losses.values()] == [mask.sum()] * 3
    _, sampled, probs = seen["quantizer"]
    assert (sampled[..., 0] != probs[:, :, 0].argmax(axis=2)).mean() > 0.1, "the noise must matter"


def test_the_contrastive_half_is_wav2vec2_over_the_layers_below():
    """The published contrastive loss of a model of only those layers, where the extra layer norm changes nothing."""
    both, batch = make_task(), make_batch()
    below = Wav2Vec2(
        encoder=SpeechEncoder(**(ENCODER | dict(layers=2))), codebooks=1, feature_penalty=0.0, feature_grad_scale=1.0,
        feature_dropout=0.0, **CONTRAST,
    )  # fmt: skip
    params = random_params(both)
    plain = dict(scale=jnp.ones(32), bias=jnp.zeros(32))
    params["context_norm"] = plain
    params["encoder"]["transformer"]["layer1"]["mlp_norm"] = plain
    transformer = {k: v for k, v in params["encoder"]["transformer"].items() if k != "layer2"}
    theirs = {k: params[k] for k in ("quantizer", "project_context", "project_target")}
    theirs["encoder"] = params["encoder"] | {"transformer": transformer}

    def run(task, params):
        rngs = {name: jax.random.fold_in(jax.random.key(0), i) for i, name in enumerate(STREAMS)}
        # In evaluation no noise is drawn, so module paths, which it depends on, do not matter; neither do the masks'.
        out = jax.jit(lambda p: task.apply({"params": p}, batch, step=jnp.int32(0), train=False, rngs=rngs))
        return jax.tree.map(np.asarray, out(params))

    (ours, our_metrics), (published, metrics) = run(both, params), run(below, theirs)
    for name in ("contrastive", "diversity"):
        np.testing.assert_allclose(ours[name], published[name], rtol=1e-4)  # a second layer norm's epsilon, over 0.1
    for name in ("accuracy", "chance_accuracy", "chance_contrastive"):
        np.testing.assert_allclose(our_metrics[name], metrics[name], rtol=1e-5)
    deeper = run(make_task(contrastive_layers=1), params)[0]
    assert abs(deeper["contrastive"][0] / published["contrastive"][0] - 1) > 1e-3, "negative control"


def test_weights_scale_losses_and_their_chance_levels(forward):
    _, params, run = forward
    rngs = {name: jax.random.fold_in(jax.random.key(0), i) for i, name in enumerate(STREAMS)}
    heavy = make_task(contrastive_weight=2.0, prediction_weight=0.5)
    scaled = jax.jit(lambda p, b: heavy.apply({"params": p}, b, step=jnp.int32(0), train=True, rngs=rngs))
    one = means(*run(params, make_batch(), 0))
    other = means(*jax.tree.map(np.asarray, scaled(params, make_batch())))
    for name in ("contrastive", "diversity", "chance_contrastive"):
        assert other[name] == pytest.approx(2 * one[name], rel=1e-5)
    for name in ("prediction", "chance_prediction"):
        assert other[name] == pytest.approx(0.5 * one[name], rel=1e-5)


# ------------------------------------------------------------------------------------------- gradients


def touched(gradient, threshold: float = 1e-6) -> set[str]:
    flat: dict[str, Any] = flatten_dict(gradient, sep="/")
    return {path for path, g in flat.items() if np.abs(g).max() > threshold}


def test_gradient_reaches_every_parameter(model):
    _, params, run = model
    gradient = run(params, make_batch())[2]
    deaf = set(flatten_dict(params, sep="/")) - touched(gradient)
    assert deaf == {path for path in deaf if path.endswith("key/bias")}, "they move all scores alike"
    assert len(deaf) == 3


def test_each_loss_trains_what_is_below_it():
    """Prediction: all layers, but not the codes it predicts.  Contrast: no layer above it, and the codes."""
    task = make_task()
    params, rngs = random_params(task), {name: jax.random.key(0) for name in STREAMS}

    @jax.jit
    def gradients(params):
        def both(params):
            losses, _ = task.apply({"params": params}, make_batch(), step=jnp.int32(0), train=True, rngs=rngs)
            return losses["prediction"][0], losses["contrastive"][0] + losses["diversity"][0]

        _, pull = jax.vjp(both, params)
        return pull((1.0, 0.0))[0], pull((0.0, 1.0))[0]

    prediction, contrast = (touched(jax.tree.map(np.asarray, g), 1e-5) for g in gradients(params))
    codes = ("quantizer/", "project_target/", "project_context/", "context_norm/")
    assert not [path for path in prediction if path.startswith(codes)]
    assert not [path for path in contrast if path.startswith(("head/", "encoder/transformer/layer2"))]
    for layer in range(3):
        name = f"encoder/transformer/layer{layer}/mlp_up/kernel"
        assert name in prediction
        assert (name in contrast) == (layer < 2)
    assert {"head/kernel", "encoder/front/conv1_kernel", "encoder/mask_embedding"} <= prediction
    assert {"quantizer/codebook", "quantizer/logits/kernel", "encoder/front/conv1_kernel"} <= contrast


@pytest.mark.parametrize("model", ["post"], indirect=True)
def test_the_gumbel_temperature_shapes_the_gradient_not_the_choice(model):
    _, params, run = model
    assert_temperature_shapes_gradients(run, params)


# ------------------------------------------------------------------------------------------- invariances


def test_padding_changes_nothing(model):
    _, params, run = model
    batch = make_batch()
    padding = np.arange(batch["audio"].shape[1]) >= LENGTHS[:, None]
    noise = batch | {"audio": np.where(padding, make_batch(1)["audio"], batch["audio"])}
    assert (noise["audio"] != batch["audio"]).any()
    base = run(params, batch)
    jax.tree.map(np.testing.assert_array_equal, base, run(params, noise))
    batch["audio"][1, 180] += 5000
    assert base[0]["prediction"][0] != run(params, batch)[0]["prediction"][0], "negative control: a valid sample"


def test_batches_of_nothing_are_finite_and_weigh_nothing(model):
    _, params, run = model
    losses, metrics, gradient = run(params, make_batch(lengths=LENGTHS * 0))
    assert all(pair == (0, 0) for pair in losses.values())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((metrics, gradient)))


def test_utterances_of_a_packed_row_do_not_meet():
    front = FRONT | dict(norm="layer")
    task = make_task(dict(frontend=front, positions=dict(kernel=5, groups=4)))
    align = task.encoder.segment_align()
    second = -(-300 // align) * align
    batch = dict(
        audio=make_batch()["audio"][:1], starts=np.array([[0, second]], np.int32),
        lengths=np.array([[290, 500 - second]], np.int32),
    )  # fmt: skip
    rngs = {name: jax.random.key(0) for name in ("params", *STREAMS)}
    params = draw_params(jax.eval_shape(lambda: task.init(rngs, batch, step=jnp.int32(0), train=True))["params"])

    @jax.jit
    def run(audio):
        out = task.apply({"params": params}, batch | {"audio": audio}, jnp.int32(0), True, rngs=rngs, method="_predict")
        return out["loss"], out["contrast"].loss, out["slots"].positions, out["slots"].valid

    changed = batch["audio"].copy()
    changed[0, second:] //= -2
    base, other = jax.tree.map(np.asarray, (run(batch["audio"]), run(changed)))
    first = base[3] & (base[2] < second // 20)
    assert 0 < first.sum() < base[3].sum()
    for i in range(2):
        np.testing.assert_array_equal(base[i][first], other[i][first])
        assert (base[i] != other[i])[base[3] & ~first].any(), "negative control: their own losses"


def test_predict_shows_codes_and_guesses_at_masked_frames(forward):
    task, params, _ = forward
    rngs = {"mask": jax.random.key(4)}
    shown, raw = jax.jit(
        lambda: (
            task.apply({"params": params}, make_batch(), step=jnp.int32(0), rngs=rngs, method="predict"),
            task.apply({"params": params}, make_batch(), jnp.int32(0), False, rngs=rngs, method="_predict"),
        )
    )()
    shown, raw = jax.tree.map(np.asarray, (shown, raw))
    np.testing.assert_array_equal(shown["lengths"], [24, 17, 0])
    for name, source in (("true", "code"), ("predicted", "guess")):
        np.testing.assert_array_equal(shown[name] >= 0, shown["mask"])
        for b, mask in enumerate(shown["mask"]):
            np.testing.assert_array_equal(shown[name][b][mask], raw[source][b, : mask.sum()])


# ------------------------------------------------------------------------------------------- collapse and mistakes


def test_collapse_to_one_code_raises_alarms(forward):
    """Every frame has one code; the head soon knows it."""
    task, params, run = forward
    assert task.health(means(*run(params, make_batch(), 0)), 500) == {}
    bias = 200 * np.eye(V, dtype=np.float32)[3]
    quantizer = params["quantizer"] | {"logits": params["quantizer"]["logits"] | {"bias": bias}}
    values = means(*run(params | {"quantizer": quantizer}, make_batch(), 0))
    assert values["code_perplexity"] == pytest.approx(1)
    assert set(task.health(values, 10)) == {"codebook_collapse"}
    head = params["head"] | {"bias": bias}
    values = means(*run(params | {"quantizer": quantizer, "head": head}, make_batch(), 0))
    assert values["prediction_accuracy"] == 1
    assert values["chance_prediction_accuracy"] == 1, "chance tells collapse from success"
    assert values["contrastive"] == 0, "no negative is left"
    assert set(task.health(values, 100)) == {"codebook_collapse", "shortcut"}


def test_equal_targets_are_stuck_at_chance(forward):
    """Different codes that all project to one vector; and a head that gives all frames one distribution."""
    task, params, run = forward
    target = dict(kernel=np.zeros((16, 12), np.float32), bias=np.eye(12, dtype=np.float32)[0])
    learnt = dict(prediction=0.5, prediction_accuracy=0.9)
    values = means(*run(params | {"project_target": target}, make_batch(), 0))
    assert values["contrastive"] == pytest.approx(values["chance_contrastive"], rel=1e-5)  # float32
    assert set(task.health(values | learnt, 1000)) == {"stuck_at_chance_contrastive"}
    assert task.health(values | learnt, 999) == {}

    head = dict(kernel=np.zeros((32, V), np.float32), bias=np.zeros(V, np.float32))
    values = means(*run(params | {"head": head}, make_batch(), 0))
    assert values["prediction"] == pytest.approx(math.log(V))
    learnt = dict(contrastive=0.5, accuracy=0.9)
    assert set(task.health(values | learnt | dict(prediction_accuracy=0.1), 1000)) == {"stuck_at_chance_prediction"}
    assert task.health(values | learnt | dict(prediction=0.5, prediction_accuracy=0.9), 1000) == {}


@pytest.mark.parametrize("layers", [0, 3, 4])
def test_both_modules_need_a_layer(layers):
    task = make_task(contrastive_layers=layers)
    with pytest.raises(UserError, match="contrastive_layers"):
        random_params(task)


@pytest.mark.parametrize(
    ("arg", "layers", "below"),
    [("size=xl", 24, 12), ("size=xxl", 42, 12), ("size=tiny", 3, 1), ("size=xl,smoke", 2, 1)],
)
def test_configs_are_sound(arg, layers, below):
    config = configs.load(f"configs/pretrain/w2v_bert.py:{arg}")
    assert (config.model.layers, config.task.contrastive_layers) == (layers, below)
    if "tiny" not in arg:
        assert config.task.mask_prob / config.task.mask_span == pytest.approx(0.065)
    assert configs.task_class("w2v_bert") is W2vBert
