"""Pruned encoders: what did nothing goes without a trace, what matters least goes first, and training goes on."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from speechjax import config as configs
from speechjax import prune, pruning
from speechjax.errors import UserError
from speechjax.formats.flat import unlike
from speechjax.paths import restacked, unstacked
from speechjax.runs import read_config
from speechjax.step import ratio, stream_keys
from speechjax.warm_start import warm_start
from tests.adapting import LORA, hashes, opened, write_run
from tests.choice import some
from tests.drawing import draw_params
from tests.tasks.experiments import REPO, experiment, make_batch

CONFORMER = dict(block=dict(name="conformer", kernel=7), norm="pre", positions=dict(name="none"))
MODELS: dict[str, dict[str, Any]] = {
    "unrolled": {},
    "scan": dict(scan=True, remat=True),
    "relative": dict(CONFORMER, attention=dict(positions="relative")),
    "shaw": dict(CONFORMER, attention=dict(positions="shaw", before=6, after=3), scan=True),
    "rotary": dict(attention=dict(positions="rotary")),
    "alibi": dict(attention=dict(positions="alibi")),
    "buckets": dict(attention=dict(positions="buckets", buckets=16, max_distance=20), scan=True),
}


def make(model: str = "unrolled", task_of: str = "hubert", **more: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(config, task, drawn variables) of an experiment over three layers of four heads."""
    config: Any = ConfigDict(experiment(task_of)[0].to_dict())
    blocks = dict(layers=3, heads=4, mlp=24) | MODELS[model] | more
    config.model = ConfigDict(config.model.to_dict() | blocks)
    task = configs.make_task(config)
    batch = make_batch(task)
    rngs = dict.fromkeys(("params", *task.rngs), jax.random.key(0))
    shapes: Any = dict(jax.eval_shape(lambda: task.init(rngs, batch, step=jnp.int32(0), train=False)))
    shapes.pop("sums", None)
    return config, task, draw_params(shapes)


def flat(tree: Any) -> dict[str, Any]:
    return flatten_dict(dict(tree), sep="/")


def changed(variables: Any, model: Any, change: Any) -> dict[str, Any]:
    """Variables after `change(name, leaf)` of every leaf of a layer, layers one by one."""
    leaves = flat(variables)
    single = {name: change(name, np.array(leaf)) for name, leaf in unstacked(leaves).items()}
    return unflatten_dict(restacked(single, leaves) if model["scan"] else single, sep="/")


def idle(heads: dict[int, list[int]], units: dict[int, list[int]], model: Any) -> Any:
    """For `changed`: what these heads and units of a layer say goes nowhere."""
    E = model["width"] // model["heads"]

    def change(name, leaf):
        found = re.search(r"encoder/transformer/layer(\d+)/(attention/out|mlp\d*_down)/kernel$", name)
        if found and found[2] == "attention/out":
            for head in heads[int(found[1])]:
                leaf[head * E : (head + 1) * E] = 0
        elif found:
            leaf[units[int(found[1])]] = 0
        return leaf

    return change


def frames(task: Any, variables: Any, seconds: float = 0.6) -> np.ndarray:
    batch = make_batch(task, rows=2, seconds=seconds)
    found = jax.jit(lambda v: task.apply(v, batch, method="features").frames)(variables)
    return np.asarray(found)


def smaller(config: Any, variables: Any, chosen: pruning.Plan) -> tuple[Any, dict[str, Any]]:
    """(task, variables) after pruning."""
    less: Any = config.copy_and_resolve_references()
    less.model.update(chosen.model)
    configs.check(less)
    task = configs.make_task(less)
    cut = pruning.cut(variables, config.model.to_dict(), chosen)
    assert not unlike(task, cut["params"], {k: v for k, v in cut.items() if k != "params"})
    return task, cut


# ---- what stays does what it did


@pytest.mark.parametrize("model", some(MODELS, ["unrolled", "rotary"]))
def test_heads_and_units_that_say_nothing_go_without_a_trace(model):
    config, task, variables = make(model)
    block = config.model.to_dict()
    # The layers of some models share a bias for each head, so there the same heads go.
    same = model in ("alibi", "buckets")
    heads = {layer: [2] if same else [layer] for layer in range(3)}
    units = {layer: [layer, 5, 23] for layer in range(3)}
    variables = changed(variables, block, idle(heads, units, block))
    chosen = pruning.plan(pruning.weight_norms(variables["params"], block), block, heads=3, mlp=21)
    for layer in range(3):
        assert heads[layer] == sorted(set(range(4)) - set(chosen.heads[layer].tolist()))
        assert all(set(units[layer]).isdisjoint(kept[layer].tolist()) for kept in chosen.units.values())
    assert chosen.model == dict(layers=3, heads=3, mlp=21, head_width=8)
    less, cut = smaller(config, variables, chosen)
    np.testing.assert_allclose(frames(less, cut), frames(task, variables), atol=2e-6)
    other = pruning.plan(pruning.weight_norms(variables["params"], block), block, heads=2, mlp=21)
    less, cut = smaller(config, variables, other)
    assert np.abs(frames(less, cut) - frames(task, variables)).max() > 1e-3, "negative control: a head that speaks"


def test_a_pruned_model_can_be_pruned_again():
    """What was pruned can be pruned again: the width of a head stays, whatever their number."""
    config, _, variables = make("rotary")
    chosen = pruning.plan(pruning.weight_norms(variables["params"], config.model.to_dict()), config.model, heads=2)
    _, cut = smaller(config, variables, chosen)
    assert flat(cut)["params/encoder/transformer/layer0/attention/query/kernel"].shape == (32, 16)
    again: Any = config.copy_and_resolve_references()
    again.model.update(chosen.model)
    chosen = pruning.plan(pruning.weight_norms(cut["params"], again.model), again.model, heads=1)
    assert chosen.model["head_width"] == 8
    smaller(again, cut, chosen)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_a_layer_goes(scan):
    config, task, variables = make(norm="pre", scan=scan)
    block = config.model.to_dict()

    def silent(name, leaf):
        return leaf * 0 if re.search(r"encoder/transformer/layer1/(attention/out|mlp_down)/", name) else leaf

    variables = changed(variables, block, silent)
    chosen = pruning.plan(pruning.weight_norms(variables["params"], block), block, layers=[0, 2])
    assert (chosen.layers, chosen.model["layers"], chosen.model["head_width"]) == ([0, 2], 2, 0)
    less, cut = smaller(config, variables, chosen)
    np.testing.assert_allclose(frames(less, cut), frames(task, variables), atol=1e-6)
    ours, theirs = flat(cut), unstacked(flat(variables)) if not scan else flat(variables)
    if scan:
        kernel = "params/encoder/transformer/layers/mlp_up/kernel"
        np.testing.assert_array_equal(ours[kernel], theirs[kernel][np.array([0, 2])])
    else:
        kernel = "params/encoder/transformer/layer{}/mlp_up/kernel"
        np.testing.assert_array_equal(ours[kernel.format(1)], theirs[kernel.format(2)])
    wrong = pruning.plan(pruning.weight_norms(variables["params"], block), block, layers=[0, 1])
    less, cut = smaller(config, variables, wrong)
    assert np.abs(frames(less, cut) - frames(task, variables)).max() > 1e-3, "negative control: one that does something"


def test_recurrent_layers_go_too_and_have_no_heads():
    config, _, variables = make(block=dict(name="gru"), norm="none", positions=dict(name="none"), heads=1, mlp=1)
    norms = pruning.weight_norms(variables["params"], config.model)
    chosen = pruning.plan(norms, config.model, layers=[1, 2])
    smaller(config, variables, chosen)
    assert chosen.kept(norms) == [{}, {}]
    with pytest.raises(UserError, match=r"--heads=1: blocks of the kind 'gru' have none|--heads: .*'gru' have none"):
        pruning.plan(norms, config.model, heads=1)


def test_state_of_the_encoder_and_its_moving_average_become_smaller_too():
    config, _, variables = make(task_of="data2vec")
    chosen = pruning.plan(pruning.weight_norms(variables["params"], config.model), config.model, heads=2, mlp=8)
    _, cut = smaller(config, variables, chosen)
    for name, leaf in flat(cut).items():
        if name.startswith("teacher/"):
            twin = flat(cut)[name.replace("teacher/", "params/encoder/")]
            assert leaf.shape == twin.shape, name
    config, _, variables = make("relative", block=dict(name="conformer", kernel=7, conv_norm="batch"))
    chosen = pruning.plan(pruning.weight_norms(variables["params"], config.model), config.model, layers=[2])
    _, cut = smaller(config, variables, chosen)
    name = "batch_stats/encoder/transformer/layer{}/conv/norm/mean"
    np.testing.assert_array_equal(flat(cut)[name.format(0)], flat(variables)[name.format(2)])
    assert name.format(1) not in flat(cut)


def test_a_head_that_mixes_layers_keeps_the_weights_of_those_that_stay():
    config, _, variables = make(task_of="classify")
    assert "layer_weights" in variables["params"]
    chosen = pruning.plan(pruning.weight_norms(variables["params"], config.model), config.model, layers=[1])
    _, cut = smaller(config, variables, chosen)
    np.testing.assert_array_equal(
        cut["params"]["layer_weights"], variables["params"]["layer_weights"][np.array([0, 2])]
    )


# ---- importance


def loss_importance(config: Any, task: Any, variables: Any, batches: Any) -> pruning.Importance:
    return pruning.Gradients(task, variables, config.model.to_dict(), step=0, seed=0)(batches)


@pytest.mark.parametrize("model", some(["unrolled", "shaw"], ["unrolled"]))
def test_importance_is_how_the_loss_changes(model):
    """A head or a unit times 1 +- h is the rows of the next kernel times that."""
    config, task, variables = make(model)
    block = config.model.to_dict()
    batch = {k: jnp.asarray(v) for k, v in make_batch(task, rows=1, seconds=0.5).items()}
    found = loss_importance(config, task, variables, [batch])
    branch = sorted(found.units)[0]
    assert (found.heads.shape, found.units[branch].shape) == ((3, 4), (3, 24))
    assert found.layers is not None
    assert found.layers.shape == (3,)
    rngs = stream_keys(task, 0, jnp.int32(0))

    @jax.jit
    def loss(variables):
        losses, _ = task.apply(variables, batch, step=jnp.int32(0), train=False, rngs=rngs)
        return sum(ratio(pair) for pair in losses.values())

    E, h = block["width"] // block["heads"], 2e-2
    for part, rows, wanted in (
        ("attention/out", np.s_[2 * E : 3 * E], found.heads[1, 2]),
        (f"{branch}_down", np.s_[7:8], found.units[branch][1, 7]),
    ):

        def times(factor, part=part, rows=rows):
            def change(name, leaf):
                if name == f"params/encoder/transformer/layer1/{part}/kernel":
                    leaf[rows] *= factor
                return leaf

            return changed(variables, block, change)

        slope = (loss(times(1 + h)) - loss(times(1 - h))) / (2 * h)
        # A central difference of a float32 loss around 4.
        np.testing.assert_allclose(wanted, abs(slope), rtol=0.05, atol=1e-4)


def test_remat_measures_the_same():
    found = []
    for remat in (False, True):
        config, task, variables = make("unrolled", scan=True, remat=remat)
        found.append(loss_importance(config, task, variables, [make_batch(task, rows=2, seconds=0.5)]))
    np.testing.assert_allclose(found[0].heads, found[1].heads, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found[0].layers, found[1].layers, rtol=1e-3, atol=1e-6)


def test_what_says_nothing_has_no_importance_and_goes_first():
    config, task, variables = make()
    block = config.model.to_dict()
    heads, units = {0: [3], 1: [0], 2: [2]}, {0: [1, 2], 1: [22, 23], 2: [0, 9]}
    variables = changed(variables, block, idle(heads, units, block))
    batches = [make_batch(task, rows=2, seconds=0.5, seed=seed) for seed in (0, 1)]
    found = loss_importance(config, task, variables, batches)
    for layer in range(3):
        assert np.flatnonzero(found.heads[layer] < 1e-9).tolist() == heads[layer]
        assert np.flatnonzero(found.units["mlp"][layer] < 1e-9).tolist() == units[layer]
    chosen = pruning.plan(found, block, heads=3, mlp=22, layers=2)
    assert found.layers is not None
    assert chosen.layers == sorted(np.argsort(-found.layers)[:2].tolist())
    for shares in chosen.kept(found):
        assert shares == pytest.approx({"heads": 1.0, "mlp": 1.0})
    silent = batches[0] | {"lengths": batches[0]["lengths"] * 0}
    with pytest.raises(UserError, match="were there recordings"):
        loss_importance(config, task, variables, [silent])


# ---- mistakes


@pytest.mark.parametrize(
    ("model", "wish", "message"),
    [
        ({}, dict(heads=5), "--heads=5: there are 4, so keep 1 to 4"),
        ({}, dict(mlp=99), "--mlp=99: there are 24"),
        ({}, dict(layers=4), "--layers=4: there are 3"),
        ({}, dict(layers=2), "weight norms say nothing of whole layers"),
        ({}, dict(layers=[0, 3]), "--layers=0,3: name layers of 0 to 2"),
        ({}, dict(layers=[1, 0]), "in their order and once each"),
        ({}, dict(layers=[1, 1]), "in their order and once each"),
        ({}, dict(heads=4, mlp=24, layers=3), "nothing would be removed"),
        (dict(adapters=(LORA,)), dict(heads=2), "has adapters: merge them first"),
        (dict(attention=dict(positions="rotary_inputs")), dict(heads=2), "positions='rotary_inputs' every head hears"),
        (dict(attention=dict(positions="buckets", gated=True)), dict(heads=2), "gated=True every head hears its own"),
    ],
)
def test_what_cannot_go_is_named(model, wish, message):
    block = make()[0].model.to_dict() | model
    importance = pruning.Importance(np.ones((3, 4)), {"mlp": np.ones((3, 24))}, None)
    with pytest.raises(UserError, match=message) as caught:
        pruning.plan(importance, block, **wish)
    assert "\n" not in str(caught.value)
    pruning.plan(importance, block, mlp=12) if "adapters" not in model else None  # negative control


@pytest.mark.parametrize("options", [dict(positions="rotary_inputs"), dict(positions="buckets", gated=True)])
def test_a_model_that_splits_its_input_over_heads_has_no_head_width(options):
    with pytest.raises(UserError, match=r"config\.model\.head_width=8: config\.model\.attention\..*set head_width=0"):
        make(attention=options, head_width=8)
    make(attention=options)  # negative control


def test_heads_may_have_any_width():
    config, _, variables = make(heads=3, head_width=10)
    kernels = {name: flat(variables)[f"params/encoder/transformer/layer0/attention/{name}/kernel"].shape
               for name in ("query", "key", "value", "out")}  # fmt: skip
    assert kernels == dict(query=(32, 30), key=(32, 30), value=(32, 30), out=(30, 32))
    assert config.model.width == 32


# ---- the verb


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    config, _, variables = make(task_of="ctc")
    variables = changed(variables, config.model, idle({0: [0], 1: [1], 2: [2]}, {0: [3], 1: [4], 2: [5]}, config.model))
    extra = {name: tree for name, tree in variables.items() if name != "params"}
    workdir = write_run(tmp_path_factory.mktemp("runs") / "base", config, variables["params"], extra)
    (workdir / "vocab.json").write_text(json.dumps({"tokens": ["a"]}))
    return workdir


def test_the_verb_writes_a_run_to_begin_with(base, tmp_path, capsys):
    before, out = hashes(base), tmp_path / "small"
    flags = [f"--workdir={base}", f"--out={out}", "--heads=3", "--mlp=23", "--importance=norm"]
    assert prune.run(flags) == 0
    assert hashes(base) == before
    assert re.search(r"2\W+3 of 4, 100.0%\W+23 of 24, 100.0%", capsys.readouterr().out)
    small, theirs = opened(out), opened(base)
    np.testing.assert_allclose(frames(small.task, small.variables), frames(theirs.task, theirs.variables), atol=2e-6)
    assert (out / "vocab.json").read_bytes() == (base / "vocab.json").read_bytes()
    assert small.config.data.to_dict() == theirs.config.data.to_dict()
    told = json.loads((out / "source.json").read_text())["pruned"]
    assert (told["digest"], told["heads"][1], told["layers"]) == (theirs.digest, [0, 2, 3], [0, 1, 2])
    params, extra = small.variables["params"], {k: v for k, v in small.variables.items() if k != "params"}
    empty = jax.tree.map(jnp.zeros_like, params)
    jax.tree.map(np.testing.assert_array_equal, dict(warm_start(empty, extra, str(out))[0]), dict(params))
    # A fine-tuning config takes the smaller encoder from there.
    config: Any = configs.load(f"{REPO}/configs/finetune/ctc.py", [f"init_from={out}"])
    assert (config.model.heads, config.model.mlp, config.model.head_width) == (3, 23, 8)
    with pytest.raises(UserError, match="is there already"):
        prune.run(flags)


def test_the_verb_measures_on_the_data_of_the_run(tmp_path):
    config, _, variables = make(task_of="wav2vec2")
    base = write_run(tmp_path / "base", config, variables["params"])
    data = ["--config.data.source=embedded:0.02", "--config.data.shapes=1"]
    prune.run([f"--workdir={base}", f"--out={tmp_path / 'small'}", "--heads=3", "--layers=2", "--batches=2", *data])
    small = opened(tmp_path / "small")
    assert (small.config.model.layers, small.config.model.heads, small.config.model.mlp) == (2, 3, 24)
    there: Any = read_config(base)
    assert small.config.data.source == there.data.source  # where it is on this machine is not what it was


def test_the_verb_as_a_process(base, tmp_path):
    done = lambda *flags: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "speechjax.prune", *flags], cwd=REPO, capture_output=True, text=True, timeout=120
    )
    out = tmp_path / "no"
    found = done(f"--workdir={base}", f"--out={out}", "--importance=norm", "--layers=2")
    assert (found.returncode, found.stderr.strip().splitlines()[-1][:24]) == (1, "error: --layers=2: weigh")
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "say what to keep"),
        (["--heads=-1"], "--heads=-1: at least 1"),
        (["--layers=0"], "--layers=0: at least one layer"),
        (["--layers=a,b"], "--layers=a,b: a number"),
        (["--heads=1", "--batches=0"], "--batches=0: at least 1"),
        (["--heads=1", "--importance=norm", "--config.data.source=x"], "looks at no data"),
        (["--heads=1", "--config.model.heads=3"], "unknown argument"),
    ],
)
def test_flags_that_make_no_sense(flags, message, capsys):
    with pytest.raises(SystemExit):
        prune.parse_args(["--workdir=a", "--out=b", *flags])
    assert message in capsys.readouterr().err
    assert prune.parse_args(["--workdir=a", "--out=b", "--layers=0,"])[0].layers == [0]
