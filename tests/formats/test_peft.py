"""Adapters in the folders of peft, without peft: names, shapes and the way back.  tests/formats/test_peft_live.py asks
the library itself.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy  # pyright: ignore[reportMissingImports]
from flax.traverse_util import flatten_dict
from hf_folders import adapted, as_run, write_folder

from speechjax.adapter_files import attach, load_adapter, save_adapter
from speechjax.errors import UserError
from speechjax.formats import hf, peft
from speechjax.runs import Run

NAME = "hubert-layer-pre"
LORA = dict(kind="lora", name="low", targets="attention/(query|value)$", rank=2, alpha=6.0, dropout=0.1)
IA3 = dict(kind="ia3", name="scales")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Run:
    root = tmp_path_factory.mktemp("base")
    return as_run(write_folder(root / "theirs", NAME, "ForCTC"), root / "run")


@pytest.fixture(scope="module")
def runs(base) -> dict[str, Run]:
    return {block["kind"]: adapted(base, block) for block in (LORA, IA3)}


@pytest.fixture(scope="module")
def folders(runs, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("peft")
    for kind, run in runs.items():
        assert peft.write(run, root / kind).name == "adapter_model.safetensors"
    return {kind: root / kind for kind in runs}


def leaves_of(run: Run) -> dict[str, np.ndarray]:
    return flatten_dict(hf.jax_free({"params": run.variables["params"]}), sep="/")


def test_what_peft_reads(folders, runs):
    state = safetensors.numpy.load_file(folders["lora"] / "adapter_model.safetensors")
    layer = "base_model.model.hubert.encoder.layers.1.attention."
    ours = leaves_of(runs["lora"])
    assert len(state) == 2 * 2 * 2 + 2
    a = ours["encoder/transformer/layer1/attention/query/lora_low_a"]
    np.testing.assert_array_equal(state[layer + "q_proj.lora_A.weight"], a.T)
    b = ours["encoder/transformer/layer1/attention/query/lora_low_b"]
    np.testing.assert_array_equal(state[layer + "q_proj.lora_B.weight"], b.T)
    np.testing.assert_array_equal(state["base_model.model.lm_head.weight"], ours["head/kernel"].T)
    config = json.loads((folders["lora"] / "adapter_config.json").read_text())
    assert config["target_modules"] == r"hubert\.encoder\.layers\.\d+\.(?:attention\.q_proj|attention\.v_proj)"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["modules_to_save"]) == (
        2, 6.0, 0.1, ["lm_head"],
    )  # fmt: skip
    scales = safetensors.numpy.load_file(folders["ia3"] / "adapter_model.safetensors")
    assert scales[layer + "k_proj.ia3_l"].shape == (24, 1)
    assert scales["base_model.model.hubert.encoder.layers.0.feed_forward.output_dense.ia3_l"].shape == (1, 40)
    config = json.loads((folders["ia3"] / "adapter_config.json").read_text())
    assert config["feedforward_modules"] == r"hubert\.encoder\.layers\.\d+\.(?:feed_forward\.output_dense)"


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_every_bit_comes_back(kind, base, runs, folders, tmp_path):
    found, ours = peft.read(folders[kind]), leaves_of(runs[kind])
    assert (found.head, found.about["step"], found.about["task"]["name"]) == ("whole", 3, "ctc")
    assert found.vocabulary.keys() == {"vocab.json"}
    assert found.adapters == [dict(LORA) if kind == "lora" else IA3]
    params = attach(base.variables["params"], [found])  # which checks the digest of the base
    back = flatten_dict(hf.jax_free({"params": params}), sep="/")
    assert back.keys() == ours.keys()
    for name, leaf in ours.items():
        np.testing.assert_array_equal(back[name], leaf, err_msg=name, strict=True)
    # The same as a file of ours, and of that file.
    file = save_adapter(
        tmp_path / "x.safetensors", params, found.adapters, include=".", about=found.about, vocabulary=found.vocabulary
    )
    peft.write(load_adapter(file.path), tmp_path / "again", family="hubert")
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (folders[kind] / name).read_bytes()


def theirs(folder: Path, out: Path, change: Any = None, **said: Any) -> Path:
    """A folder as peft leaves it: nothing of ours in it, and no head."""
    shutil.copytree(folder, out)
    (out / "speechjax.safetensors").unlink()
    state = safetensors.numpy.load_file(out / "adapter_model.safetensors")
    state = {key: array for key, array in state.items() if "lm_head" not in key}
    safetensors.numpy.save_file((change or (lambda state: state))(state), out / "adapter_model.safetensors")
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | dict(modules_to_save=None) | said))
    return out


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_those_of_peft_need_the_run_of_their_base(kind, base, runs, folders, tmp_path):
    folder = theirs(folders[kind], tmp_path / "theirs")
    with pytest.raises(UserError, match="was not written by speechjax: name the run"):
        peft.read(folder)
    found = peft.read(folder, base, name=runs[kind].config.model.adapters[0]["name"])
    params, ours = attach(base.variables["params"], [found]), leaves_of(runs[kind])
    for name, leaf in flatten_dict(hf.jax_free({"params": params}), sep="/").items():
        np.testing.assert_array_equal(leaf, ours[name], err_msg=name)
    if kind == "lora":
        pattern = r"(^|/)transformer/layer(?:s|\d+)/(?:attention/query|attention/value)$"
        assert found.adapters == [LORA | dict(targets=pattern)]


def test_scales_that_peft_has_not_are_one(base, folders, tmp_path):
    def keys_only(state):
        return {name: array for name, array in state.items() if "k_proj" in name}

    found = peft.read(theirs(folders["ia3"], tmp_path / "x", keys_only), base)
    assert len(found.leaves) == 2 * 3
    for name, leaf in found.leaves.items():
        assert np.all(leaf == 1) != ("key" in name)


def test_rank_stabilised_scales(base, folders, tmp_path):
    """alpha / sqrt(rank) there is alpha sqrt(rank) / rank here."""
    found = peft.read(theirs(folders["lora"], tmp_path / "x", use_rslora=True), base)
    assert found.adapters[0]["alpha"] == pytest.approx(6 * 2**0.5)


def test_layers_may_differ(base, folders, tmp_path):
    def first(state):
        return {name: array for name, array in state.items() if "layers.0" in name}

    found = peft.read(theirs(folders["lora"], tmp_path / "x", first), base)
    pattern = "(^|/)transformer/layer(?:0)/(?:attention/query|attention/value)$"
    assert found.adapters[0]["targets"] == pattern
    stacked = base.config.copy_and_resolve_references()
    stacked.model.scan = True
    with pytest.raises(UserError, match="on some layers only"):
        peft.read(tmp_path / "x", Run(**{**vars(base), "config": stacked}))


def test_stacked_layers(base, folders, tmp_path):
    """Of a run whose layers a scan stacks, and for one."""
    config = base.config.copy_and_resolve_references()
    config.model.scan = True
    other = Run(**{**vars(base), "config": config})
    stacked = adapted(other, LORA)
    assert stacked.variables["params"]["encoder"]["transformer"]["layers"]["attention"]["query"]["lora_low_a"].ndim == 3
    peft.write(stacked, tmp_path / "out")
    found, ours = peft.read(tmp_path / "out"), leaves_of(stacked)
    assert any("/layers/" in name for name in found.leaves)
    for name, leaf in found.leaves.items():
        np.testing.assert_array_equal(leaf, ours[name], err_msg=name)
    whole = Run(**{**vars(other), "variables": {"params": stacked.variables["params"]}})
    again = peft.read(theirs(tmp_path / "out", tmp_path / "x"), whole, name="low")
    assert again.leaves.keys() == {name for name in found.leaves if name.startswith("encoder/")}


def test_convolutions_of_one_frame(tmp_path):
    """Dense layers here, convolutions there: their factors are convolutions too.  Of all layers, so w2v-BERT's."""
    base = as_run(write_folder(tmp_path / "theirs", "bert", "ForSequenceClassification"), tmp_path / "run")
    run = adapted(base, LORA | dict(targets="conv/pointwise_(in|out)$|mlp1_up$"))
    peft.write(run, tmp_path / "out")
    state = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = "base_model.model.wav2vec2_bert.encoder.layers.0.conv_module.pointwise_conv1.lora_{}.weight"
    assert (state[name.format("A")].shape, state[name.format("B")].shape) == ((2, 24, 1), (48, 2, 1))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "projector"]
    found, ours = peft.read(tmp_path / "out"), leaves_of(run)
    for key, leaf in found.leaves.items():
        np.testing.assert_array_equal(leaf, ours[key], err_msg=key)


def test_heads_that_peft_cannot_name_stay_beside(tmp_path, base, runs):
    speaker = as_run(write_folder(tmp_path / "theirs", "wavlm-group-pre", "ForXVector"), tmp_path / "run")
    run = adapted(speaker, LORA)
    peft.write(run, tmp_path / "out")
    state = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.encoder.layers.") for name in state)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "WavLMModel.from_pretrained" in text
    assert "merge_and_unload()" in text
    found, ours = peft.read(tmp_path / "out"), leaves_of(run)
    assert found.head == "whole"
    assert found.leaves.keys() == {k for k in ours if "lora_" in k or not k.startswith("encoder/")}
    for key, leaf in found.leaves.items():
        np.testing.assert_array_equal(leaf, ours[key], err_msg=key)


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([], "this run has no adapters"),
        ([LORA, IA3], "holds one adapter, this run has lora 'low', ia3 'scales'"),
        ([dict(kind="houlsby", name="h")], "houlsby 'h': peft has no adapter of this kind for encoders"),
        ([dict(kind="parallel", name="p")], "parallel 'p': peft has no adapter"),
        ([dict(kind="prefix", name="p")], "prefix 'p': peft has no adapter"),
        ([dict(kind="bias", name="b")], "bias 'b': peft has no adapter"),
    ],
)
def test_runs_that_peft_has_no_place_for(blocks, message, base, tmp_path):
    config = base.config.copy_and_resolve_references()
    config.model = dict(config.model.to_dict(), adapters=blocks)
    with pytest.raises(UserError, match=message):
        peft.write(Run(**{**vars(base), "config": config}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_encoder_with_state_is_refused(tmp_path):
    base = as_run(write_folder(tmp_path / "theirs", "conformer-rotary"), tmp_path / "run")
    with pytest.raises(UserError, match=r"the encoder has state beside its parameters \(batch_stats\)"):
        peft.write(adapted(base, LORA), tmp_path / "out")


def renamed(old: str, new: str) -> Any:
    return lambda state: {name.replace(old, new): array for name, array in state.items()}


@pytest.mark.parametrize(
    ("change", "said", "message"),
    [
        (None, dict(peft_type="LOHA"), "peft_type='LOHA'; those that can be read are LORA and IA3"),
        (None, dict(use_dora=True), "use_dora=True has no place here"),
        (None, dict(bias="all"), "bias='all' has no place"),
        (None, dict(rank_pattern={"q": 3}), "rank_pattern="),
        (None, dict(r="2"), "r='2' is no number"),
        (None, dict(r=3), r"would need arrays of the shapes \{'a': \(24, 3\)"),
        (None, dict(lora_alpha=float("nan")), "lora_alpha=nan is no number"),
        (None, dict(lora_alpha=0), "alpha=0.0 must be above 0"),
        (renamed("q_proj", "conv"), {}, "has no place here: adapters are on dense layers"),
        (renamed("lora_B", "lora_embedding_B"), {}, "would need arrays"),
        (lambda state: {name: array[:, :-1] for name, array in state.items()}, {}, "would need arrays"),
        (lambda state: {name: array[0] for name, array in state.items()}, {}, "would need arrays|is damaged"),
        (lambda state: {}, {}, "holds no adapter"),
    ],
)
def test_what_is_no_adapter_of_this_model(change, said, message, base, folders, tmp_path):
    folder = theirs(folders["lora"], tmp_path / "x", change, **said)
    with pytest.raises(UserError, match=message) as error:
        peft.read(folder, base)
    assert "\n" not in str(error.value)


def test_mutations_are_adapters_or_one_line(base, folders, tmp_path):
    rng, said = np.random.default_rng(0), []
    for i in range(150):
        folder = tmp_path / str(i)
        shutil.copytree(folders["lora" if i % 2 else "ia3"], folder)
        if i % 3 == 0:
            (folder / "speechjax.safetensors").unlink()
        names = sorted(path.name for path in folder.iterdir() if path.suffix != ".md")
        file = folder / names[rng.integers(len(names))]
        data = bytearray(file.read_bytes())
        end = 8 + int.from_bytes(data[:8], "little") if file.suffix == ".safetensors" else len(data)
        for at in rng.integers(0, end, rng.integers(1, 3)):
            data[at] = rng.choice([rng.integers(256), *b'0123456789"{}[],-eF'])
        file.write_bytes(data)
        try:
            peft.read(folder, base)
            said.append("")
        except UserError as error:
            said.append(str(error))
    assert not [text for text in said if "\n" in text]
    assert 5 < said.count("") < 145
