"""Distillation: whose features are the targets, losses in closed form, what the student begins with, every alarm."""

import functools
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_hubert import HOP, LARGE, LENGTHS, SAMPLES, equal, means, streams

from speechjax import config as configs
from speechjax.checkpoint import Checkpoints
from speechjax.errors import UserError
from speechjax.models.encoder import SpeechEncoder
from speechjax.step import State
from speechjax.tasks.distill import Distill
from tests.drawing import draw_params

COUNTS = np.array([24, 17, 0])
# Scanned, as teachers of any size are, with dropout that must not be used, and wider than the student.
TEACHER: dict[str, Any] = LARGE | dict(layers=3, norm="post", scan=True, dropout=0.5, layerdrop=0.5)
STUDENT: dict[str, Any] = LARGE | dict(layers=2, norm="post")
LAYERS = (1, 3)


def make_batch(lengths: np.ndarray = LENGTHS) -> dict[str, np.ndarray]:
    """int16 noise, in the padding too."""
    audio = np.random.default_rng(0).integers(-9000, 9000, (len(lengths), SAMPLES)).astype(np.int16)
    row = np.ones(len(lengths), np.float32)
    return dict(audio=audio, lengths=lengths, mean=0 * row, std=0.2 * row)


def save_run(workdir: Path, block: dict[str, Any]) -> Any:
    """A run as training leaves it, with an encoder of `block`; its parameters."""
    encoder = SpeechEncoder(**block)
    shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), make_batch(), train=False))["params"]
    # The student's are drawn from the same numbers.
    params = jax.tree.map(lambda x: 1.25 * x[::-1], draw_params(shapes))
    zero = jnp.int32(0)
    state = State(
        step=jnp.int32(4), params={"encoder": params, "head": jnp.ones(2)}, opt_state=(), extra={}, meters={},
        skipped=zero, skipped_in_row=zero,
    )  # fmt: skip
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1, every=1)
    checkpoints.save(4, state, {"best": {}, "model": {}, "data": ""}, force=True)
    checkpoints.close()
    (workdir / "config.json").write_text(json.dumps({"model": block, "task": {"name": "hubert"}}))
    return jax.tree.map(np.asarray, params)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(workdir, parameters of its encoder)."""
    workdir = tmp_path_factory.mktemp("teacher")
    return workdir, save_run(workdir, TEACHER)


def make_task(teacher: Any, encoder: dict[str, Any] = STUDENT, **settings: Any) -> Distill:
    options: dict[str, Any] = dict(
        teacher=str(teacher), layers=LAYERS, cosine_weight=0.5, feature_grad_scale=1.0, init_from_teacher=True
    )
    return Distill(encoder=SpeechEncoder(**encoder), **(options | settings))


def draw(task: Distill) -> tuple[Any, Any]:
    """(params, extra) drawn without compiling; the teacher's are NaN, as `init` leaves those of a run."""
    rngs = {"params": jax.random.key(0), **streams(task)}
    shapes = jax.eval_shape(lambda: task.init(rngs, make_batch(), step=jnp.int32(0), train=False))
    nothing = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), shapes["teacher"])
    return draw_params(shapes["params"]), {"teacher": nothing}


@pytest.fixture(scope="module")
def begun(source):
    """(task, jitted run, fresh params, params and extra of step 0)."""
    task = make_task(source[0])
    fresh, nothing = draw(task)
    return task, make_run(task), fresh, *task.start(fresh, nothing)


def make_run(task: Distill, train: bool = True) -> Any:
    """run(params, extra, batch, seed) -> losses, metrics, (outputs, targets), gradients of params and extra; numpy."""

    def total(params, extra, batch, seed):
        variables = {"params": params, **extra}
        losses, metrics = task.apply(variables, batch, step=jnp.int32(0), train=train, rngs=streams(task, seed))
        outputs, targets, *_ = task.apply(variables, batch, False, method="_regress")
        return sum(value for value, _ in losses.values()), (losses, metrics, outputs, targets)

    program = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))

    def run(params, extra, batch, seed=0):
        (_, (losses, metrics, *frames)), gradients = program(params, extra, batch, jnp.int32(seed))
        return jax.tree.map(np.asarray, (losses, metrics, frames, gradients))

    return run


# ------------------------------------------------------------------------------------------- targets and losses


def test_targets_are_the_layers_of_the_run(begun, source):
    """Its parameters bit by bit; its features in evaluation mode, whatever is drawn."""
    _, run, _, params, extra = begun
    equal(extra["teacher"]["params"], source[1])
    encoder = SpeechEncoder(**TEACHER)
    own = jax.jit(lambda: encoder.apply({"params": source[1]}, make_batch(), train=False, hidden=True))()
    targets = run(params, extra, make_batch())[2][1]
    for layer, target in zip(LAYERS, targets, strict=True):
        # The same arithmetic in another program: XLA may fuse it in another way.
        np.testing.assert_allclose(target, own.hidden[layer], rtol=1e-5, atol=1e-6)
    assert np.abs(targets[0] - np.asarray(own.hidden[0])).max() > 0.1, "negative control: the layer before"
    first, second = (run(params, extra, make_batch(), seed=s)[1] for s in (0, 1))
    assert first["target_variance"] == second["target_variance"], "the teacher's dropout is off"


def test_losses_are_those_of_a_loop(begun):
    _, run, _, params, extra = begun
    losses, metrics, (outputs, targets), _ = run(params, extra, make_batch())
    inside = np.arange(24)[None] < COUNTS[:, None]
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    expected: dict[str, float] = dict.fromkeys(("l1", "cosine", "chance_l1", "chance_cosine"), 0.0)
    for layer, output, target in zip(LAYERS, outputs, targets, strict=True):
        y, x = (f[inside].astype(np.float64) for f in (output, target))
        for prefix, guess in (("", y), ("chance_", np.broadcast_to(x.mean(axis=0), x.shape))):
            alike = np.array([cosine(a, b) for a, b in zip(guess, x, strict=True)])
            expected[f"{prefix}l1"] += np.abs(guess - x).mean(axis=1).sum() / 2
            expected[f"{prefix}cosine"] += 0.5 * np.log1p(np.exp(-alike)).sum() / 2
            if not prefix:
                assert metrics[f"similarity_{layer}"] == (pytest.approx(alike.sum(), rel=1e-4), 41)
    assert {**losses, **metrics}["l1"][1] == 41
    for name, value in expected.items():
        assert {**losses, **metrics}[name][0] == pytest.approx(value, rel=1e-5), name
    deviations = [f[inside].std(axis=0, ddof=1).mean() for f in targets]
    assert metrics["target_variance"][0] == pytest.approx(np.mean(deviations), rel=1e-3)  # 1e-6 in the root


def test_the_teacher_has_no_gradient_and_the_student_has(begun):
    _, run, _, params, extra = begun
    *_, (student, teacher) = run(params, extra, make_batch())
    assert not any(g.any() for g in jax.tree.leaves(teacher))
    without = {k for k, g in flatten_dict(student, sep="/").items() if not g.any()}
    assert without == {"encoder/mask_embedding"}  # nothing is masked


def test_feature_grad_scale_reaches_the_front_end_only(begun, source):
    _, run, _, params, extra = begun
    slow = make_run(make_task(source[0], feature_grad_scale=0.1))
    full, scaled = (each(params, extra, make_batch())[3][0]["encoder"] for each in (run, slow))
    for a, b in zip(jax.tree.leaves(full["front"]), jax.tree.leaves(scaled["front"]), strict=True):
        assert a.any()
        np.testing.assert_allclose(b, 0.1 * a, atol=1e-5 * np.abs(a).max())  # float32
    for part in ("feature_norm", "projection"):
        for a, b in zip(jax.tree.leaves(full[part]), jax.tree.leaves(scaled[part]), strict=True):
            np.testing.assert_allclose(b, a, atol=1e-6 * np.abs(a).max(), err_msg=part)


def test_padding_and_empty_rows_weigh_nothing(begun):
    _, run, _, params, extra = begun
    batch = make_batch()
    noisy = batch | {"audio": np.where(np.arange(SAMPLES) < LENGTHS[:, None], batch["audio"], -batch["audio"])}
    equal(run(params, extra, batch)[0], run(params, extra, noisy)[0])
    losses, metrics, _, gradients = run(params, extra, make_batch(LENGTHS * 0))
    assert losses["l1"] == losses["cosine"] == (0, 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((metrics, gradients)))


def test_rows_add_up(begun):
    """Sums, so that one division by the global count of frames is the mean."""
    _, run, _, params, extra = begun
    both = run(params, extra, make_batch())[0]["l1"]
    one, two = (
        run(params, extra, make_batch(LENGTHS * np.array(k, np.int32)))[0]["l1"] for k in ([1, 0, 0], [0, 1, 0])
    )
    assert both == (pytest.approx(one[0] + two[0], rel=1e-5), one[1] + two[1])


def test_packed_rows_are_as_if_alone(begun):
    task, run, _, params, extra = begun
    batch, align = make_batch(), task.encoder.segment_align()
    second = -(-SAMPLES // align) * align
    packed: dict[str, Any] = dict(
        audio=np.concatenate([batch["audio"][0], np.zeros(second - SAMPLES, np.int16), batch["audio"][1]])[None],
        starts=np.array([[0, second]], np.int32), lengths=LENGTHS[None, :2], mean=batch["mean"][None, :2],
        std=batch["std"][None, :2],
    )  # fmt: skip
    alone, together = run(params, extra, batch)[0], run(params, extra, packed)[0]
    for name in ("l1", "cosine"):
        assert together[name] == (pytest.approx(alone[name][0], rel=1e-5), 41)
    moved = packed | {"audio": packed["audio"][:, ::-1]}
    assert abs(run(params, extra, moved)[0]["l1"][0] / alone["l1"][0] - 1) > 1e-4, "negative control: other audio"


def test_nothing_is_learnt_from_a_teacher_that_was_never_read(begun):
    task, run, fresh, _, _ = begun
    rngs = {"params": jax.random.key(0), **streams(task)}
    variables = jax.jit(lambda: task.init(rngs, make_batch(), step=jnp.int32(0), train=False))()
    assert np.isnan(run(fresh, {"teacher": variables["teacher"]}, make_batch())[0]["l1"][0])


# ------------------------------------------------------------------------------------------- what it begins with


def test_the_student_begins_with_the_first_layers(begun, source, caplog):
    task, _, fresh, _, extra = begun
    with caplog.at_level(logging.INFO, "speechjax"):
        params, _ = task.start(fresh, extra)
    ours, theirs = (flatten_dict(tree, sep="/") for tree in (params["encoder"], source[1]))
    assert "arrays are the teacher's; new: none" in caplog.text
    for path, value in ours.items():
        if "transformer/layer" in path:
            number = int(path.split("transformer/layer")[1][0])
            teacher = theirs[path.replace(f"layer{number}", "layers")]
            np.testing.assert_array_equal(value, teacher[number], err_msg=path)
            assert not np.array_equal(value, teacher[2]), path
        else:
            np.testing.assert_array_equal(value, theirs[path], err_msg=path)
    heads = {k: v for k, v in params.items() if k != "encoder"}
    equal(heads, {k: v for k, v in fresh.items() if k != "encoder"})


def test_a_scanned_student_begins_alike(source, begun):
    task = make_task(source[0], STUDENT | dict(scan=True))
    fresh, nothing = draw(task)
    params, _ = task.start(fresh, nothing)
    equal(
        params["encoder"]["transformer"]["layers"],
        jax.tree.map(lambda x: x[:2], source[1]["transformer"]["layers"]),
    )


def test_a_narrower_student_takes_the_front_end_only_and_none_if_asked(source):
    narrow = STUDENT | dict(width=16, mlp=24)
    task = make_task(source[0], narrow)
    fresh, nothing = draw(task)
    params, _ = task.start(fresh, nothing)
    ours, before = (flatten_dict(tree["encoder"], sep="/") for tree in (params, fresh))
    changed = {k for k in ours if not np.array_equal(ours[k], before[k])}
    front = {k for k in ours if k.startswith(("front/", "feature_norm/"))}
    assert changed == front, "and not the gains of a narrower convolution, though they have the same shape"
    for k in front:
        np.testing.assert_array_equal(ours[k], flatten_dict(source[1], sep="/")[k])
    params, extra = make_task(source[0], narrow, init_from_teacher=False).start(fresh, nothing)
    equal(params, fresh)
    equal(extra["teacher"]["params"], source[1])


def test_mistakes_are_named(source, tmp_path):
    def begin(task):
        return task.start(*draw(task))

    def refuses(message, task):
        with pytest.raises(UserError, match=message) as caught:
            begin(task)
        assert "\n" not in str(caught.value)

    refuses("teacher is empty", make_task(""))
    refuses("none: not the workdir of a run", make_task(tmp_path / "none"))
    refuses("no such checkpoint in .*; there are 4", make_task(f"{source[0]}@7"))
    refuses(r"the teacher has layers 1 to 3, not 4", make_task(source[0], layers=(2, 4)))
    other = dict(LARGE["frontend"], strides=(5, 2, 1))
    refuses(f"frames are 30 samples every {HOP}, the student's 30 samples every 10", make_task(
        source[0], STUDENT | dict(frontend=other)))  # fmt: skip
    (tmp_path / "config.json").write_text('{"model": 3, "task"')
    refuses("is not the config of a run", make_task(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    refuses("has no model block", make_task(tmp_path))
    changed = tmp_path / "changed"
    shutil.copytree(source[0], changed)
    (changed / "config.json").write_text(json.dumps({"model": TEACHER | dict(width=64)}))
    refuses(r"is not of the model in its config\.json", make_task(changed))


def test_the_student_is_used_without_the_teachers_folder(begun):
    task, _, _, params, extra = begun
    alone = make_task("/gone/run")
    use = lambda task: jax.jit(functools.partial(task.apply, method="features"))(  # noqa: E731
        {"params": params, **extra}, make_batch()
    ).frames  # fmt: skip
    np.testing.assert_array_equal(use(alone), use(task))


# ------------------------------------------------------------------------------------------- alarms, the loop


def test_alarms(begun):
    task, run, _, params, extra = begun
    _, _, (_, targets), _ = run(params, extra, make_batch())
    inside = np.arange(24)[None] < COUNTS[:, None]
    mean = dict(params)
    for layer, target in zip(LAYERS, targets, strict=True):
        head = params[f"head{layer}_out"]
        mean[f"head{layer}_out"] = dict(kernel=0 * head["kernel"], bias=jnp.asarray(target[inside].mean(axis=0)))
    losses, metrics, *_ = run(mean, extra, make_batch())
    found = means(losses, metrics)
    assert found["l1"] == pytest.approx(found["chance_l1"], rel=1e-5)
    assert found["cosine"] == pytest.approx(found["chance_cosine"], rel=1e-5)
    assert set(task.health(found, 1000)) == {"mean_prediction", "stuck_at_chance"}
    assert task.health(found, 999) == {}

    dead = jax.tree.map(lambda x: x, extra["teacher"]["params"])
    norm = dead["transformer"]["layers"]["mlp_norm"]
    dead["transformer"]["layers"]["mlp_norm"] = dict(scale=0 * norm["scale"], bias=1 + norm["bias"])
    losses, metrics, *_ = run(params, {"teacher": {"params": dead}}, make_batch())
    assert "teacher_collapsed" in task.health(means(losses, metrics), 0)
    good = dict(chance_similarity=0.8, target_variance=0.3, prediction_variance=0.2, l1=0.1, chance_l1=0.2)
    assert task.health(good, 5000) == {}


@pytest.mark.slow
def test_a_run_teaches_another_which_resumes_without_its_checkpoints(tmp_path):
    from speechjax.experiment import open_experiment
    from speechjax.logs import read_metrics
    from speechjax.train import train

    def run(spec, workdir, *overrides):
        config = configs.load(f"configs/pretrain/{spec}", list(overrides))
        config.unlock()
        del config.evals["picture"], config.evals["probe"]
        configs.claim_workdir(workdir, config)
        _, data = open_experiment(config, workdir)
        assert train(config, data, workdir) == 0

    teacher, student = tmp_path / "teacher", tmp_path / "student"
    run("hubert.py:size=tiny,smoke", teacher)
    settings = f"task.teacher={teacher}", "task.layers=(1,)"
    run("distill.py:size=tiny,smoke", student, *settings)
    shutil.rmtree(teacher / "checkpoints")
    run("distill.py:size=tiny,smoke", student, *settings, "train.steps=3")
    last = [entry for entry in read_metrics(student) if entry["split"] == "train"][-1]
    assert last["step"] == 3
    assert (
        0.9 < last["similarity_1"] <= 1 or last["l1"] < 10
    )  # it began as the teacher's first layer, behind a new head
