"""Heads in adapter files: their state and what their classes mean come along, or are refused."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax import adapter, adapter_files, transcribe
from speechjax.adapter_files import attach, attach_state, load_adapter, save_adapter
from speechjax.data.text import load_tokenizer, make_tokenizer
from speechjax.errors import UserError
from speechjax.warm_start import warm_start
from tests.adapting import LORA, build, flat, hashes, opened, write_base, write_run
from tests.tasks.experiments import make_batch

safetensors_numpy: Any = pytest.importorskip("safetensors.numpy")

OURS, OTHERS = (make_tokenizer("characters", [letters]) for letters in ("abcde", "fghij"))  # nine tokens each


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory)


@pytest.fixture(scope="module")
def tuned(base):
    """Fine-tunes `base` as if: the encoder is kept, the head and its state are drawn."""

    def make(workdir: Path, task_of: str, *adapters: dict[str, Any], **data: Any) -> Path:
        config, task, params = build(task_of, *adapters)
        config.data.update(data)
        params, _ = warm_start(params, {}, str(base))
        rngs = dict.fromkeys(("params", *task.rngs), jax.random.key(0))
        shapes = jax.eval_shape(lambda: task.init(rngs, make_batch(task), step=0, train=False))
        rng = np.random.default_rng(1)
        extra = {
            name: jax.tree.map(lambda x: np.asarray(rng.integers(3, 9, x.shape), x.dtype), tree)
            for name, tree in shapes.items() if name in ("prior", "scale")
        }  # fmt: skip
        write_run(workdir, config, params, extra)
        if config.data.label:
            (workdir / "labels.json").write_text(json.dumps(dict(format=1, label="meta:x", names=["a", task_of])))
        if config.data.text:
            OURS.save(workdir)
        return workdir

    return make


@pytest.fixture(scope="module")
def ctc_run(tuned, tmp_path_factory) -> Path:
    return tuned(tmp_path_factory.mktemp("runs") / "ctc", "ctc", LORA)


@pytest.fixture(scope="module")
def ctc_file(ctc_run, tmp_path_factory) -> Path:
    return saved(ctc_run, tmp_path_factory.mktemp("files") / "ctc.safetensors", "--include=.")


def saved(workdir: Path, out: Path, *arguments: str) -> Path:
    assert adapter.run(["save", f"--workdir={workdir}", f"--out={out}", *arguments]) == 0
    return out


def merged(base: Path, out: Path, *files: Path, more: tuple[str, ...] = ()) -> Path:
    adapter.run(["merge", f"--workdir={base}", *(f"--adapter={file}" for file in files), f"--out={out}", *more])
    return out


def answers(run: Any, *variants: Any) -> list[dict[str, np.ndarray]]:
    """What the task answers, and what it measures, with each of these variables."""

    def both(task):
        encoded = task.encode(batch, train=False)
        measured = {name: jnp.stack(pair) for name, pair in task.score(encoded, batch, step=0, train=False)[1].items()}
        return {**task.respond(encoded), **measured}

    batch, program = make_batch(run.task, rows=3), jax.jit(lambda v: run.task.apply(v, method=both))
    return [{k: np.asarray(v) for k, v in program(variables).items()} for variables in variants]


# ---- state


@pytest.mark.parametrize(
    ("task_of", "collection"),
    [
        ("classify", "prior"),
        ("regress", "scale"),
        pytest.param("speaker", "prior", marks=pytest.mark.slow),
        pytest.param("several", "prior", marks=pytest.mark.slow),
    ],
)
def test_a_head_with_state_answers_as_before(base, tuned, tmp_path, task_of, collection):
    workdir = tuned(tmp_path / "run", task_of, LORA)
    file = saved(workdir, tmp_path / "x.safetensors", "--include=.")
    run, theirs = opened(merged(base, tmp_path / "merged", file)), opened(workdir)
    zeros = jax.tree.map(np.zeros_like, theirs.variables[collection])
    (found,) = answers(run, run.variables)
    expected, without = answers(theirs, theirs.variables, {**theirs.variables, collection: zeros})
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)  # float32
    assert any(np.abs(without[k] - expected[k]).max() > 1e-2 for k in expected), "negative control"
    if task_of == "regress":
        assert np.abs(without["value"] - expected["value"]).max() > 1, "negative control: of the answers too"

    content = load_adapter(file)
    assert (content.head, {name.split("/")[0] for name in content.state}) == ("whole", {collection})
    variables = dict(opened(base).variables)
    params = attach(variables.pop("params"), [content])
    ours = {"params": params, **attach_state({"teacher": {"x": np.ones(2)}, **variables}, [content])}
    assert flat(ours).keys() == flat(theirs.variables).keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs.variables)


def test_state_of_the_encoder_stays_and_a_part_needs_its_place(tuned, tmp_path):
    several, number = tuned(tmp_path / "several", "several", LORA), tuned(tmp_path / "regress", "regress", LORA)
    who = load_adapter(saved(several, tmp_path / "who.safetensors", "--include=^who/"))
    assert (who.head, list(who.state)) == ("part", ["prior/who/counts"])
    counts = {name: {"counts": np.zeros(64)} for name in ("who", "b")}
    fresh = {"batch_stats": {"encoder": {"m": np.ones(1)}}, "prior": counts}
    found = flat(attach_state(fresh, [who]))
    assert found.keys() == flat(fresh).keys()
    np.testing.assert_array_equal(found["prior/who/counts"], who.state["prior/who/counts"])
    assert not found["prior/b/counts"].any(), "negative control: of another head"
    with pytest.raises(UserError, match=r"has state prior/who/counts of shape \(64,\), for which this model has no"):
        attach_state({"prior": {"who": {"counts": np.zeros(3)}}}, [who])
    whole = attach_state(fresh, [who._replace(head="whole")])
    assert flat(whole).keys() == {"batch_stats/encoder/m", "prior/who/counts"}
    with pytest.raises(UserError, match=r"--include=head/bias fits only a part of what has state .*\(scale/count\)"):
        saved(number, tmp_path / "x.safetensors", "--include=head/bias")
    assert not load_adapter(saved(number, tmp_path / "none.safetensors")).state


# ---- vocabularies


def test_a_merged_run_has_the_vocabulary_of_its_head(base, ctc_run, ctc_file, tuned, tmp_path):
    (ctc_run / "rejected.jsonl").write_text("no vocabulary")
    run = merged(base, tmp_path / "ctc", ctc_file)
    assert (run / "vocab.json").read_bytes() == (ctc_run / "vocab.json").read_bytes()
    assert load_tokenizer(run).tokens == OURS.tokens
    assert not (run / "rejected.jsonl").exists()

    workdir = tuned(tmp_path / "classes", "classify", LORA)  # all kinds of them
    for name in ("phones.json", "vocab.json", "sentencepiece.model"):
        (workdir / name).write_bytes(f"\xff of {name}".encode("latin-1"))
    whole = saved(workdir, tmp_path / "whole.safetensors", "--include=.")
    before, without = hashes(workdir), saved(workdir, tmp_path / "none.safetensors")
    for out in (merged(base, tmp_path / "theirs", whole), merged(workdir, tmp_path / "own")):
        for name in adapter_files.VOCABULARIES:
            assert (out / name).read_bytes() == (workdir / name).read_bytes()
    assert hashes(workdir) == before
    # The head is the base's, and so are its classes.
    assert load_adapter(without).vocabulary == {}
    OTHERS.save(base)
    try:
        kept = merged(base, tmp_path / "kept", without)
        assert [path.name for path in kept.glob("*.*") if path.name in adapter_files.VOCABULARIES] == ["vocab.json"]
        assert load_tokenizer(kept).tokens == OTHERS.tokens
        theirs = merged(base, tmp_path / "again", ctc_file)
        assert load_tokenizer(theirs).tokens == OURS.tokens, "not the base's, where the file brings the head"
    finally:
        (base / "vocab.json").unlink()


def test_another_vocabulary_is_refused(base, ctc_run, ctc_file, tuned, tmp_path):
    other = tmp_path / "other"
    OTHERS.save(other)
    wrong = r" has another vocab.json than that of the head of \S+: its classes would mean something else"
    with pytest.raises(UserError, match=f"^--vocabulary={other}{wrong}"):
        merged(base, tmp_path / "m", ctc_file, more=(f"--vocabulary={other}",))
    part = saved(ctc_run, tmp_path / "part.safetensors", "--include=head/bias")
    like = tuned(tmp_path / "like", "ctc")
    assert load_tokenizer(merged(like, tmp_path / "same", part)).tokens == OURS.tokens, "negative control"
    with pytest.raises(UserError, match=f"^--vocabulary={other}{wrong}"):  # than the base's
        merged(like, tmp_path / "m", saved(ctc_run, tmp_path / "none.safetensors"), more=(f"--vocabulary={other}",))
    (like / "vocab.json").unlink()
    OTHERS.save(like)
    with pytest.raises(UserError, match=rf"part.safetensors{wrong}"):
        merged(like, tmp_path / "m", part)
    assert not (tmp_path / "m").exists()

    params, about = opened(ctc_run).variables["params"], load_adapter(ctc_file).about
    strange = tmp_path / "strange.safetensors"
    given: dict[str, Any] = dict(include=".", about=about)
    save_adapter(strange, params, [LORA], **given, vocabulary={"../escaped": b"x"})
    with pytest.raises(UserError, match=r"'\.\./escaped' is no vocabulary"):
        load_adapter(strange)
    save_adapter(strange, params, [LORA], **given, vocabulary={"vocab.json": b"x"})
    load_adapter(strange)  # negative control


def test_files_of_the_first_format_load_and_want_their_vocabulary(base, ctc_run, ctc_file, tmp_path):
    now, old = load_adapter(ctc_file), tmp_path / "old.safetensors"
    header = {"format": 1, **{key: getattr(now, key) for key in ("adapters", "base", "head", "about")}}
    header["content"] = adapter_files._sha(now.leaves, header)
    old.write_bytes(safetensors_numpy.save(now.leaves, metadata={"speechjax_adapter": json.dumps(header)}))
    file = load_adapter(old)
    assert file.leaves.keys() == now.leaves.keys()
    assert (file.state, file.vocabulary) == ({}, {})
    assert now.vocabulary, "negative control"
    with pytest.raises(UserError, match=r"brings a head and not its vocab.json, .* save it anew from its run"):
        merged(base, tmp_path / "m", old)
    assert not (tmp_path / "m").exists()
    run = merged(base, tmp_path / "m", old, more=(f"--vocabulary={ctc_run}",))
    assert load_tokenizer(run).tokens == OURS.tokens


def test_transcripts_are_in_the_vocabulary_of_the_head(ctc_run, ctc_file, tuned, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SPEECHJAX_CACHE", str(tmp_path / "cache"))
    base = tuned(tmp_path / "base", "ctc")  # as many tokens, others
    (base / "vocab.json").unlink()
    OTHERS.save(base)

    def model(*arguments: str) -> Any:
        return transcribe.open_model(transcribe.parse_args([f"--workdir={base}", *arguments, "x.wav"])[0], [])

    assert model().tokenizer.tokens == OTHERS.tokens
    found = model(f"--adapter={ctc_file}")
    assert found.tokenizer.tokens == OURS.tokens
    assert model(f"--adapter={ctc_file}", f"--vocabulary={ctc_run}").tokenizer.tokens == OURS.tokens
    theirs = opened(ctc_run).variables
    jax.tree.map(np.testing.assert_array_equal, found.variables, theirs)
    with pytest.raises(UserError, match=rf"--vocabulary={base} has another vocab.json than that of the head of"):
        model(f"--adapter={ctc_file}", f"--vocabulary={base}")
    part, none = (saved(ctc_run, tmp_path / f"{x or 'none'}.safetensors", f"--include={x}") for x in ("bias", ""))
    assert model(f"--adapter={none}").tokenizer.tokens == OTHERS.tokens, "the base's head"
    assert model(f"--adapter={none}", f"--vocabulary={ctc_run}").tokenizer.tokens == OURS.tokens, "as was asked for"
    with pytest.raises(UserError, match=r"bias.safetensors has another vocab.json"):
        model(f"--adapter={part}")
    assert "no adapter holds a vocabulary" not in caplog.text
