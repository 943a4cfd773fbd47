"""Adapters in files: what comes back, what is refused, and runs with adapters merged into their weights."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from speechjax import adapter
from speechjax.adapter_files import attach, base_digest, load_adapter, save_adapter
from speechjax.errors import UserError
from speechjax.models.adapters import ADAPTER_LEAF
from speechjax.warm_start import warm_start
from tests.adapting import BIAS, HOULSBY, IA3, LORA, build, features, flat, hashes, opened, write_base, write_run
from tests.tasks.experiments import REPO, make_batch

safetensors: Any = pytest.importorskip("safetensors")
safetensors_numpy: Any = pytest.importorskip("safetensors.numpy")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory)


@pytest.fixture(scope="module")
def tuned(base):
    """Fine-tunes `base` as if: what was there is kept, new leaves are drawn, what else learns moves.

    `task` "phones" has learnt phones, whose names are in phones.json.
    """

    def make(workdir: Path, *adapters: dict[str, Any], task: str = "phones") -> Path:
        config, _, params = build(task, *adapters)
        params, _ = warm_start(params, {}, str(base))
        if any(block["kind"] in ("bias", "houlsby") for block in adapters):
            moves = r"encoder/transformer/.*bias$" if adapters[0]["kind"] == "bias" else r"encoder/transformer/.*norm/"
            params = unflatten_dict(
                {k: v + 0.3 if re.search(moves, k) else v for k, v in flat(params).items()}, sep="/"
            )
        write_run(workdir, config, params)
        (workdir / "phones.json").write_text(json.dumps(dict(format=1, hop=160, symbols=["a", "b"])))
        return workdir

    return make


@pytest.fixture(scope="module")
def tuned_lora(tuned, tmp_path_factory) -> Path:
    return tuned(tmp_path_factory.mktemp("runs") / "lora", LORA)


@pytest.fixture(scope="module")
def lora_file(tuned_lora, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("files") / "lora.safetensors"
    assert adapter.run(["save", f"--workdir={tuned_lora}", f"--out={out}", "--include=."]) == 0
    return out


def test_a_file_holds_what_learnt_and_brings_it_back(tuned_lora, base, lora_file):
    theirs, ours = flat(opened(tuned_lora).variables["params"]), flat(opened(base).variables["params"])
    file = load_adapter(lora_file)
    head = {name for name in theirs if not name.startswith("encoder/")}
    assert file.leaves.keys() == {name for name in theirs if re.search(ADAPTER_LEAF, name)} | head
    assert (file.head, file.about["task"]["name"], file.about["step"]) == ("whole", "frames", 3)
    assert file.adapters == [dict(LORA, dropout=0.0)]
    assert lora_file.stat().st_size < sum(x.nbytes for x in file.leaves.values()) + 8000
    attached = flat(attach(opened(base).variables["params"], [file]))
    assert attached.keys() == theirs.keys()
    jax.tree.map(np.testing.assert_array_equal, attached, theirs)
    assert not head <= ours.keys(), "negative control: the base has another head"


def test_the_same_parameters_make_the_same_bytes(tuned_lora, lora_file, tmp_path):
    again = tmp_path / "again.safetensors"
    adapter.run(["save", f"--workdir={tuned_lora}@newest", f"--out={again}", "--include=."])
    assert again.read_bytes() == lora_file.read_bytes()
    assert list(tmp_path.iterdir()) == [again]


def test_show_says_what_a_file_holds(lora_file, capsys):
    adapter.run(["show", str(lora_file)])
    shown = capsys.readouterr().out
    for part in (
        r"lora +low +\{.*\"rank\": 2",
        r"holds +\d+ arrays of [\d,]+ parameters",
        r"head: whole",
        r"\"frames\"",
    ):
        assert re.search(part, shown), shown


def test_merged_is_a_run_that_does_what_the_adapted_one_did(base, tuned_lora, lora_file, tmp_path):
    before = hashes(base)
    adapter.run(["merge", f"--workdir={base}", f"--adapter={lora_file}", f"--out={tmp_path / 'merged'}"])
    assert hashes(base) == before
    merged, theirs = opened(tmp_path / "merged"), opened(tuned_lora)
    assert merged.config.task.to_dict() == theirs.config.task.to_dict()
    assert merged.config.model.adapters == ()
    assert not [name for name in flat(merged.variables["params"]) if re.search(ADAPTER_LEAF, name)]
    np.testing.assert_allclose(features(merged), features(theirs), atol=1e-5)  # float32
    assert np.abs(features(merged) - features(opened(base))).max() > 1e-2, "negative control"
    head = lambda run: {k: v for k, v in flat(run.variables["params"]).items() if not k.startswith("encoder/")}  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, head(merged), head(theirs))

    adapter.run(["merge", f"--workdir={tuned_lora}", f"--out={tmp_path / 'own'}"])  # a run's own adapters
    ours = opened(tmp_path / "own").variables["params"]
    jax.tree.map(np.testing.assert_array_equal, ours, merged.variables["params"])
    again, _ = warm_start(ours, {}, str(tmp_path / "own"))
    jax.tree.map(np.testing.assert_array_equal, dict(again), dict(ours))


def test_files_stack_in_their_order(base, tuned, tuned_lora, tmp_path):
    """Without a head, the base's stays; scales after a LoRA scale it too."""
    files = []
    for name, workdir in (("lora", tuned_lora), ("ia3", tuned(tmp_path / "run", IA3))):
        files.append(tmp_path / f"{name}.safetensors")
        adapter.run(["save", f"--workdir={workdir}", f"--out={files[-1]}"])
    found = {}
    for order in (files, files[::-1]):
        out = tmp_path / order[0].stem
        adapter.run(["merge", f"--workdir={base}", *(f"--adapter={f}" for f in order), f"--out={out}"])
        found[order[0].stem] = opened(out)
    assert found["lora"].config.task.name == "hubert"
    assert flat(found["lora"].variables["params"]).keys() == flat(opened(base).variables["params"]).keys()
    config, task, _ = build("hubert", LORA, IA3)
    params = attach(opened(base).variables["params"], [load_adapter(f) for f in files])
    batch = make_batch(task, rows=2)
    both = jax.jit(lambda p: task.apply({"params": p}, batch, method="features").frames)(params)
    np.testing.assert_allclose(features(found["lora"]), both, atol=1e-5)  # float32
    assert np.abs(features(found["ia3"]) - both).max() > 1e-3, "negative control: the other order"
    assert config.model.adapters == (LORA, IA3)


def test_biases_and_norms_that_learnt_are_in_the_file(base, tuned, tmp_path):
    for block, moves in ((BIAS, r"bias$"), (HOULSBY, r"norm/(scale|bias)$")):
        workdir, file = tuned(tmp_path / block["kind"], block), tmp_path / f"{block['kind']}.safetensors"
        adapter.run(["save", f"--workdir={workdir}", f"--out={file}"])
        leaves = load_adapter(file).leaves
        theirs, ours = flat(opened(workdir).variables["params"]), opened(base).variables["params"]
        expected = {k for k in theirs if re.search(rf"encoder/transformer/.*{moves}", k) or re.search(ADAPTER_LEAF, k)}
        assert leaves.keys() == expected
        attached = flat(attach(ours, [load_adapter(file)]))
        for name in attached.keys() & theirs.keys():
            if name.startswith("encoder/"):
                np.testing.assert_array_equal(attached[name], theirs[name], err_msg=name)
        assert any(np.any(leaves[k] != flat(ours)[k]) for k in leaves.keys() & flat(ours).keys()), "negative control"
    adapter.run(["merge", f"--workdir={base}", f"--adapter={tmp_path / 'bias.safetensors'}", f"--out={tmp_path / 'm'}"])
    np.testing.assert_array_equal(features(opened(tmp_path / "m")), features(opened(tmp_path / "bias")))
    with pytest.raises(UserError, match=r"houlsby 'serial' is no change of weights"):
        adapter.run(["merge", f"--workdir={base}", f"--adapter={tmp_path / 'houlsby.safetensors'}",
                     f"--out={tmp_path / 'n'}"])  # fmt: skip
    assert not (tmp_path / "n").exists()


def test_an_adapter_of_another_base_is_refused(base, lora_file, tmp_path):
    params = opened(base).variables["params"]
    file = load_adapter(lora_file)
    for name in ("encoder/transformer/layer0/mlp_up/kernel", "encoder/projection/bias"):
        other = flat(params)
        other[name] = other[name].at[0].add(1e-6)
        other = unflatten_dict(other, sep="/")
        ours = base_digest(other, file.adapters)
        wrong = f"was trained on another encoder: on {file.base[:16]}, and this one is {ours[:16]}"
        with pytest.raises(UserError, match=wrong):
            attach(other, [file])
    config, _, _ = build("hubert")
    workdir = write_run(tmp_path / "other", config, other)
    with pytest.raises(UserError, match="was trained on another encoder"):
        adapter.run(["merge", f"--workdir={workdir}", f"--adapter={lora_file}", f"--out={tmp_path / 'out'}"])
    head = flat(params)
    head.update({k: v + 1 for k, v in head.items() if not k.startswith("encoder/")})
    attach(unflatten_dict(head, sep="/"), [file])  # another head is none of its business


def test_leaves_that_do_not_fit_are_refused(tuned_lora, base, lora_file):
    file = load_adapter(lora_file)
    params, theirs = opened(base).variables["params"], opened(tuned_lora).variables["params"]
    jax.tree.map(np.testing.assert_array_equal, attach(theirs, [file]), theirs)  # in place of others of their names
    a = "encoder/transformer/layer0/attention/query/lora_low_a"
    wide = file._replace(leaves=file.leaves | {a: np.zeros((32, 3), np.float32)})
    with pytest.raises(UserError, match=r"query/lora_low_a of shape \(32, 3\), this model of \(32, 2\)"):
        attach(theirs, [wide])
    with pytest.raises(UserError, match=r"layer7/attention/query/lora_low_a, for which this model has no place"):
        attach(params, [file._replace(leaves={a.replace("layer0", "layer7"): file.leaves[a]})])
    with pytest.raises(UserError, match=r"has head/kernel, for which"):
        attach(params, [file._replace(leaves={"head/kernel": file.leaves[a]}, head="part")])
    with pytest.raises(UserError, match="both bring a head"):
        attach(params, [file, file._replace(adapters=[IA3])])
    with pytest.raises(UserError, match="two are named 'low'"):
        attach(params, [file, file])


def changed_header(content: bytes, change: Any) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def edit(**entries: Any):
    def change(metadata):
        metadata["speechjax_adapter"] = json.dumps(json.loads(metadata["speechjax_adapter"]) | entries)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[:-10], r"is damaged or no safetensors file \(.+\); get it anew"),
        (lambda c: c[:100], r"is damaged or no safetensors file"),
        (lambda c: b"", r"is damaged or no safetensors file"),
        (lambda c: b"\x80\x04N." + c, r"is damaged or no safetensors file"),
        (lambda c: c[:-10] + bytes([c[-10] ^ 1]) + c[-9:], r"is damaged: its digest does not match its contents"),
        (lambda c: changed_header(c, edit(base="0" * 64)), r"is damaged: its digest does not match"),
        (lambda c: changed_header(c, edit(format=9)), r"has format 9, this version reads 1 and 2;"),
        (lambda c: changed_header(c, lambda m: m.clear()), r"is not an adapter of speechjax"),
    ],
)
def test_a_damaged_file_is_refused(lora_file, tmp_path, damage, message):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(damage(lora_file.read_bytes()))
    with pytest.raises(UserError, match=message):
        load_adapter(broken)
    broken.write_bytes(changed_header(lora_file.read_bytes(), lambda m: None))
    load_adapter(broken)  # negative control: writing a header anew is no damage


def test_mistakes_are_one_line(base, tuned_lora, lora_file, tmp_path):
    out, full = tmp_path / "x.safetensors", tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    config, _, params = build("phones", LORA)
    with_state = write_run(tmp_path / "state", config, params, {"batch_stats": {"encoder": {"m": 0.5}}})
    for argv, message in (
        (["save", f"--workdir={base}", f"--out={out}"], r"trained without config.model.adapters"),
        (["save", f"--workdir={tuned_lora}", f"--out={out}", "--include=nothing"], r"fits nothing of the head; there"),
        (["save", f"--workdir={tuned_lora}", f"--out={tmp_path}/no/x.safetensors"], r"no such folder: \S+no$"),
        (["save", f"--workdir={with_state}", f"--out={out}"], r"batch_stats/encoder/m is no parameter"),
        (["merge", f"--workdir={base}", f"--out={tmp_path / 'm'}"], r"no adapters of its own; name files"),
        (["merge", f"--workdir={base}", f"--adapter={lora_file}", f"--out={full}"], r"is there already"),
        (["merge", f"--workdir={base}", f"--adapter={out}", f"--out={tmp_path / 'm'}"], r"no such file"),
        (["show", str(out)], r"no such file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            adapter.run(argv)
        assert "\n" not in str(error.value)
    assert not out.exists()
    with pytest.raises(UserError, match=r"ia3 'scales' is not among the parameters"):
        save_adapter(out, opened(base).variables["params"], [IA3], about={})


def test_the_verb_as_a_process(lora_file, tmp_path, caplog):
    def verb(*arguments):
        command = [sys.executable, "-m", "speechjax.adapter", *map(str, arguments)]
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120, check=False)

    caplog.set_level(logging.INFO)
    shown, missing, unknown = verb("show", lora_file), verb("show", tmp_path / "no"), verb("save", "--out=x.npz")
    assert (shown.returncode, missing.returncode, unknown.returncode) == (0, 1, 2)
    assert missing.stderr == f"error: {tmp_path / 'no'}: no such file\n"
    assert "lora" in shown.stdout
    assert "speechjax.adapter merge --workdir=runs/hubert" in str(adapter.__doc__)
