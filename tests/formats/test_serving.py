"""The function that all formats hold: the run's own answers, whatever is padded, and what folders say of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.errors import UserError
from speechjax.formats import serving
from speechjax.formats.serving import checked, open_served, read_about, serve, write_about
from tests.choice import some
from tests.formats.served_runs import TOKENS, batches, difference, flipped, make_run
from tests.tasks.experiments import EXPERIMENTS, HEADS, experiment


def own(run, audio, lengths):
    """The task's answer to a batch that ends with a whole frame, as evaluators ask for it."""
    batch = {"audio": jnp.asarray(audio), "lengths": jnp.asarray(lengths)}
    method = "answer" if hasattr(run.task, "answer") else "features"
    found = jax.jit(lambda v: run.task.apply(v, batch, method=method))(run.variables)
    found = found if isinstance(found, dict) else {"frames": found.frames, "lengths": found.lengths}
    return jax.tree.map(np.asarray, found)


TASKS = ["ctc", "ctc-lora", "classify", "speaker", "several", "seq2seq", "hubert", "apc"]


@pytest.mark.parametrize("name", some(TASKS, ["ctc", "hubert"]))
def test_answers_are_those_of_the_task(name, tmp_path):
    run = make_run(tmp_path, name)
    served = open_served(run)
    for audio, lengths in batches()[1:3]:
        found = jax.tree.map(np.asarray, jax.jit(served.answer)(served.weights, audio, lengths))
        assert difference(found, own(run, audio, lengths)) < 1e-4


def test_a_changed_weight_changes_the_answer(tmp_path):
    run = make_run(tmp_path)
    served, (audio, lengths) = open_served(flipped(run)), batches()[3]
    found = jax.tree.map(np.asarray, jax.jit(served.answer)(served.weights, audio, lengths))
    assert difference(found, own(run, audio, lengths)) > 1e-2


def test_rows_are_answered_as_if_alone(tmp_path):
    run = make_run(tmp_path)
    leaky = run.task.clone(encoder=run.task.encoder.clone(frontend=run.task.encoder.frontend | {"leaky": True}))
    audio, lengths = batches()[3]
    short = slice(2, 3), slice(0, int(lengths[2]))
    for task in (run.task, leaky):
        answer = jax.jit(serve(task))
        whole = answer(run.variables, audio, lengths)["logits"][2]
        alone = answer(run.variables, audio[short], lengths[2:])["logits"][0]
        np.testing.assert_allclose(whole[: len(alone)], alone, atol=1e-5)
    batch = {"audio": jnp.asarray(audio), "lengths": jnp.asarray(lengths)}
    leaked = leaky.apply(run.variables, batch, method="answer")["logits"][2]
    assert np.abs(leaked[: len(alone)] - alone).max() > 1e-2, "negative control: such a front end leaks elsewhere"


@pytest.mark.parametrize("samples", [1, 79, 80, 399, 400])
def test_audio_shorter_than_a_frame_has_no_frames(samples, tmp_path):
    run = make_run(tmp_path)
    found = jax.jit(serve(run.task))(run.variables, np.zeros((1, samples), np.float32), np.int32([samples]))
    assert found["logits"].shape == (1, samples // 400, 9)
    assert found["lengths"].tolist() == [samples // 400]


@pytest.mark.parametrize("name", some([*EXPERIMENTS, *HEADS], ["ctc", "classify", "hubert"]))
def test_every_task_says_what_it_answers(name, tmp_path):
    outputs = open_served(make_run(tmp_path, name)).about["outputs"]
    assert all(shape[0] == "B" for _, shape in outputs.values())
    if not hasattr(experiment(name)[1], "answer"):
        assert outputs["frames"][1][:2] == ["B", "T"]
        assert outputs["lengths"] == ["int32", ["B"]]


def test_only_what_the_answer_needs_is_served(tmp_path):
    run = make_run(tmp_path, "seq2seq")
    weights = open_served(run).weights
    assert "params/encoder/projection/kernel" in weights
    assert not any("token_decoder" in name or "mask_embedding" in name for name in weights)
    assert any("token_decoder" in name for name in serving.flatten_dict(run.variables, sep="/"))


def test_smaller_types_are_smaller_and_nearly_the_same(tmp_path):
    run, (audio, lengths) = make_run(tmp_path), batches()[3]
    wanted = own(run, audio, lengths)
    bytes_of = lambda served: sum(x.nbytes for x in served.weights.values())  # noqa: E731
    full = open_served(run)
    for dtype, share, near in (("bfloat16", 0.62, 0.1), ("int8", 0.8, 0.1)):
        served = open_served(run, dtype=dtype)
        found = jax.tree.map(np.asarray, jax.jit(served.answer)(served.weights, audio, lengths))
        assert 1e-5 < difference(found, wanted) < near * np.abs(wanted["logits"]).max()
        assert bytes_of(served) < share * bytes_of(full)
    with pytest.raises(UserError, match="choose float32, bfloat16, int8"):
        open_served(run, dtype="float16")


def test_stacked_layers_become_single_ones(tmp_path):
    run, (audio, lengths) = make_run(tmp_path, "ctc", "stacked"), batches()[1]
    served = open_served(run, unroll=True)
    assert any("/layer1/" in name for name in served.weights)
    assert not any("/layers/" in name for name in served.weights)
    found = jax.tree.map(np.asarray, jax.jit(served.answer)(served.weights, audio, lengths))
    assert difference(found, own(run, audio, lengths)) < 1e-5
    small = open_served(run, dtype="int8").weights
    scales = [x for name, x in small.items() if name.endswith("mlp_down/kernel_scale")]
    assert scales[0].shape == (2, 1, 32), "each layer has scales of its own"


def test_a_language_model_is_refused(tmp_path):
    run = make_run(tmp_path)
    run.config.task.name = "language_model"
    try:
        with pytest.raises(UserError, match="does not listen"):
            open_served(run)
    finally:
        run.config.task.name = "ctc"


@pytest.fixture
def folder(tmp_path):
    served = open_served(make_run(tmp_path / "run"))
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "weights").write_bytes(b"some weights")
    write_about(tmp_path / "out", "anything", served, more=1)
    return tmp_path / "out"


def test_a_folder_says_what_it_holds(folder):
    about = read_about(folder, "anything")
    assert about["tokens"] == TOKENS
    assert (about["task"], about["hop"], about["extra"], about["sample_rate"], about["more"]) == (
        "ctc",
        320,
        80,
        16000,
        1,
    )
    assert about["outputs"] == {"logits": ["float32", ["B", "T", 9]], "lengths": ["int32", ["B"]]}
    assert set(about["files"]) == {"deep/weights", "vocab.json"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "serving.json").unlink(), "not a model to serve"),
        (lambda folder: (folder / "serving.json").write_text("{"), "damaged, or not of speechjax"),
        (lambda folder: (folder / "serving.json").write_text("[" * 100_000), "damaged, or not of speechjax"),
        (lambda folder: (folder / "serving.json").write_bytes(b"\xff\xfe"), "damaged, or not of speechjax"),
        (lambda folder: edit(folder, format=2), "has format 2, this version reads 1"),
        (lambda folder: edit(folder, kind="another"), "holds another, not anything"),
        (lambda folder: edit(folder, files=3), "damaged, or not of speechjax"),
        (lambda folder: edit(folder, files={"../secret": "0"}), "../secret is missing"),
        (lambda folder: (folder / "deep/weights").write_bytes(b"some weight!"), "weights is damaged"),
        (lambda folder: (folder / "deep/weights").rename(folder / "weights"), "deep/weights is missing"),
    ],
)
def test_folders_that_are_not_what_they_were_are_refused(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message):
        read_about(folder, "anything")


def edit(folder, **changes):
    file = folder / "serving.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("audio", "lengths", "message"),
    [
        (np.zeros(9, np.float32), [9], r"must be float \[B, S\]"),
        (np.zeros((1, 0), np.float32), [0], r"must be float \[B, S\]"),
        (np.zeros((1, 9), np.int16), [9], "not int16"),
        (np.zeros((2, 9), np.float32), [9], r"must be int \[B=2\]"),
        (np.zeros((1, 9), np.float32), [9.0], "not float64"),
        (np.zeros((1, 9), np.float32), [10], "between 0 and S=9"),
        (np.zeros((1, 9), np.float32), [-1], "between 0 and S=9"),
    ],
)
def test_what_is_no_audio_is_refused(audio, lengths, message):
    with pytest.raises(UserError, match=message):
        checked(audio, lengths)
