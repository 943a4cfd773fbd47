"""Continued pretraining: what is taken over, what begins anew, and every mistake."""

import functools
import json
import logging
import re

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from speechjax.checkpoint import Checkpoints
from speechjax.config import load, to_json
from speechjax.errors import UserError
from speechjax.runs import find_checkpoint, read_weights
from speechjax.step import State, init_state
from speechjax.warm_start import fresh_state, renamed, warm_start
from tests.tasks.experiments import experiment, make_batch


class Classes:
    """Data of which only the files of its vocabularies are known."""

    def __init__(self, files: dict):
        self.files = files

    def save(self, workdir):
        for name, content in self.files.items():
            (workdir / name).write_text(json.dumps(content))


def make_state(seed: int = 0, width: int = 3, codes: int = 5) -> State:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jax.numpy.asarray(rng.normal(size=shape), np.float32)  # noqa: E731
    params = {
        "encoder": {"front": draw(4, width), "layer0": {"kernel": draw(width, width)}},
        "head": draw(width, codes),
    }
    zero, extra = jax.numpy.int32(0), {"teacher": {"w": draw(3)}}
    return State(
        step=jax.numpy.int32(seed), params=params, opt_state=(draw(2), {"mu": params}), extra=extra,
        meters={"loss": draw(2)}, skipped=zero, skipped_in_row=zero,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    for room, steps in (("checkpoints", (2, 4)), ("best", (2,))):
        checkpoints = Checkpoints(workdir / room, keep=3, every=1)
        for step in steps:
            checkpoints.save(step, make_state(step), {"best": {}, "model": {}, "data": ""}, force=True)
        checkpoints.close()
    return workdir


def test_reads_the_named_checkpoint_and_only_the_part_asked_for(run):
    for source, seed in ((f"{run}", 2), (f"{run}@4", 4), (f"{run}@2", 2), (f"{run}@best", 2), (f"{run}@newest", 4)):
        params, _, _ = read_weights(find_checkpoint(source))
        jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.asarray, make_state(seed).params))
    _, extra, _ = read_weights(find_checkpoint(f"{run}@2"))
    np.testing.assert_array_equal(extra["teacher"]["w"], make_state(2).extra["teacher"]["w"])


def test_the_encoder_is_taken_and_another_head_begins_anew(run, caplog):
    fresh = make_state(9, codes=7).params
    with caplog.at_level(logging.INFO, "speechjax"):
        params = flatten_dict(warm_start(fresh, {}, f"{run}@2")[0], sep="/")
    there = flatten_dict(make_state(2).params, sep="/")
    for name in ("encoder/front", "encoder/layer0/kernel"):
        np.testing.assert_array_equal(params[name], there[name])
    np.testing.assert_array_equal(params["head"], fresh["head"])
    assert "2 of 3 parameter arrays" in caplog.text
    assert "new: head" in caplog.text


def test_layers_that_are_not_there_are_no_start(run):
    """A model whose layers have other names would begin with a trained front end and random layers."""
    fresh = make_state(9).params
    encoder = {"front": fresh["encoder"]["front"], "transformer": {"layers": {"kernel": np.zeros((2, 3, 3))}}}
    with pytest.raises(UserError, match=r"has no encoder/transformer/layers: use its config.model.layers"):
        warm_start({**fresh, "encoder": encoder}, {}, str(run))


@pytest.mark.parametrize("name", ["best_rq", "spidr", "autoencode"])
def test_heads_come_with_the_codebook_they_have_learnt(name, tmp_path):
    """Also where the new run's seed draws another one; step and optimizer begin anew."""
    config, task = experiment(name)
    tx, batch = optax.adam(1e-3), make_batch(task)
    begin = [functools.partial(init_state, task, tx, seed, batch) for seed in (0, 1)]
    there = jax.jit(begin[0])()
    moved = jax.tree.map(lambda x: x + 0.5, there.params), jax.tree.map(lambda x: x * 2, there.extra)
    there = there.replace(step=jax.numpy.int32(7), params=moved[0], extra=moved[1])
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, every=1)
    checkpoints.save(7, there, {"best": {}, "model": {}, "data": ""}, force=True)
    checkpoints.close()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(begin[1])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    config.init_from = str(tmp_path)
    state = fresh_state(task, begin[1], abstract, config, Classes({}))
    jax.tree.map(np.testing.assert_array_equal, state.params, there.params)
    assert set(state.extra) == set(there.extra)
    for kind in set(state.extra) - {"teacher"}:
        jax.tree.map(np.testing.assert_array_equal, state.extra[kind], there.extra[kind])
    if "teacher" in state.extra:  # begins as a copy of the student that the run begins with
        ours = flatten_dict(state.extra["teacher"]["transformer"], sep="/")
        theirs = flatten_dict(there.params["encoder"]["transformer"], sep="/")
        assert ours
        for key, value in ours.items():
            np.testing.assert_array_equal(value, theirs[key])
    assert int(state.step) == 0
    assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))


def test_reading_leaves_a_live_run_as_it_is(run):
    scratch = run / "checkpoints" / "6.orbax-checkpoint-tmp-1"
    scratch.mkdir()  # a save under way in another process
    read_weights(find_checkpoint(f"{run}@newest"))
    assert scratch.is_dir()
    scratch.rmdir()


def test_mistakes_are_named(run, tmp_path):
    for source, message in {
        f"{tmp_path}/none": "no such folder; name the --workdir",
        f"{tmp_path}": "there is none yet",
        f"{run}@3": "there are 2, 4",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            find_checkpoint(source)
    with pytest.raises(UserError, match=r"another encoder \(encoder/front: \(4, 3\) there, \(4, 2\) here"):
        warm_start(make_state(width=2).params, {}, str(run))
    with pytest.raises(UserError, match="shares no parameter of the encoder"):
        warm_start({"encoder": {"other": np.zeros(3, np.float32)}}, {}, str(run))


def test_a_flipped_byte_is_noticed(run, tmp_path):
    """Uncompressed arrays restore silently wrong; the digest tells."""
    state = make_state(2)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, every=1)
    checkpoints.save(1, state, {"best": {}, "model": {}, "data": ""}, force=True)
    checkpoints.close()
    meta = tmp_path / "checkpoints/1/meta/metadata"
    text = meta.read_text()
    first = re.search(r'"digest": \[\d+, (\d+)', text)  # of the first parameter
    assert first
    meta.write_text(text.replace(first[1], str(int(first[1]) ^ 1)))
    with pytest.raises(UserError, match="digest does not match"):
        read_weights(find_checkpoint(str(tmp_path)))


@pytest.mark.parametrize("stacked_there", [True, False])
def test_stacked_layers_and_layers_one_by_one_are_the_same(tmp_path, stacked_there):
    """What scan stacks for a pod, fine-tuning by layer takes apart; and the way back."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(11, 2, 2)).astype(np.float32)  # more than ten: by number, not by name
    one_by_one = {f"layer{i}": {"kernel": kernel[i]} for i in range(11)}
    theirs, ours = ({"layers": {"kernel": kernel}}, one_by_one)[:: 1 if stacked_there else -1]
    there = {"encoder": {"transformer": theirs, "front": rng.normal(size=3).astype(np.float32)}}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, every=1)
    state = make_state(1).replace(params=there)
    checkpoints.save(1, state, {"best": {}, "model": {}, "data": ""}, force=True)
    checkpoints.close()
    mine = jax.tree.map(np.zeros_like, {"encoder": {"transformer": ours, "front": there["encoder"]["front"]}})
    params, _ = warm_start(mine, {}, str(tmp_path))
    wanted = {"encoder": {"transformer": ours, "front": there["encoder"]["front"]}}
    jax.tree.map(np.testing.assert_array_equal, params, wanted)


def test_what_a_head_knows_of_other_labels_stays_behind(tmp_path):
    """Ages are no opinion scores, though both are numbers."""
    state = make_state(1).replace(extra={"scale": {"mean": np.float32(3.2)}, "teacher": {"w": np.ones(3, np.float32)}})
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, every=1)
    checkpoints.save(1, state, {"best": {}, "model": {}, "data": ""}, force=True)
    checkpoints.close()
    config = load("configs/finetune/regress.py:size=tiny", ["data.label=number:mos"])
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    fresh = jax.tree.map(np.zeros_like, state.extra)
    for label, mean in (("number:mos", np.float32(3.2)), ("number:age", 0)):
        _, extra = warm_start(state.params, fresh, str(tmp_path), label)
        assert extra["scale"]["mean"] == mean
        assert extra["teacher"]["w"].tolist() == [1, 1, 1]


def test_adapters_are_not_left_behind(tmp_path):
    """Without them the encoder is not the one that was fine-tuned."""
    layer = {"kernel": np.ones((2, 2), np.float32)}
    adapted = {"encoder": {"transformer": {"layer0": {"query": layer | {"lora_task_a": np.ones((2, 1), np.float32)}}}}}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, every=1)
    checkpoints.save(1, make_state(1).replace(params=adapted), {"best": {}, "model": {}, "data": ""}, force=True)
    checkpoints.close()
    with pytest.raises(UserError, match=r"has adapters that this model lacks, e.g. \S+/lora_task_a: .*adapter merge"):
        warm_start({"encoder": {"transformer": {"layer0": {"query": layer}}}}, {}, str(tmp_path))
    params, _ = warm_start(jax.tree.map(np.zeros_like, adapted), {}, str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, params, adapted)


class OfClasses:
    """A task that has five classes of tokens."""

    def sizes(self):
        return {"tokens": ("config.task.classes", 5)}


@pytest.mark.parametrize(
    ("file", "there", "here", "same"),
    [
        ("vocab.json", {"kind": "symbols", "tokens": ["a", "b"]}, {"kind": "characters", "tokens": ["a", "b"]}, True),
        ("vocab.json", {"steps": "nfc", "tokens": ["a", "b"]}, {"steps": "nfc", "tokens": ["a", "c"]}, False),
        ("labels.json", {"label": "meta:who", "names": ["a"]}, {"label": "meta:tongue", "names": ["a"]}, False),
        ("phones.json", {"hop": 320, "symbols": ["a", "b"]}, {"hop": 160, "symbols": ["a", "b"]}, True),
    ],
)
def test_classes_of_one_number_and_other_meanings_are_not_learnt_classes(tmp_path, caplog, file, there, here, same):
    """A head of five other letters is a head of five letters in shape alone."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, every=1)
    checkpoints.save(1, make_state(1), {"best": {}, "model": {}, "data": ""}, force=True)
    checkpoints.close()
    (tmp_path / file).write_text(json.dumps(there))
    sizes = renamed(OfClasses(), Classes({file: here}), str(tmp_path))
    assert sizes == (set() if same else {5})
    assert (f"{file} of {tmp_path} has other classes" in caplog.text) != same
    mine = make_state(2)
    params, _ = warm_start(mine.params, {}, str(tmp_path), "", sizes)
    kept = make_state(1) if same else mine
    np.testing.assert_array_equal(params["head"], kept.params["head"])
    np.testing.assert_array_equal(params["encoder"]["front"], make_state(1).params["encoder"]["front"])


def test_classes_of_a_damaged_vocabulary_are_a_mistake_with_one_line(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, every=1)
    checkpoints.save(1, make_state(1), {"best": {}, "model": {}, "data": ""}, force=True)
    checkpoints.close()
    (tmp_path / "vocab.json").write_text("[1, 2")
    with pytest.raises(UserError, match=r"vocab.json is damaged"):
        renamed(OfClasses(), Classes({"vocab.json": {"tokens": []}}), str(tmp_path))
