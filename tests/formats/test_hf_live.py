"""Parity with `transformers` itself, both ways: every family, class, front-end norm and place of the norms.

Needs torch and transformers, which the project does not: it is skipped where they are missing, and tests/formats/
test_hf_golden.py holds a part of it against stored numbers.  Measured 6e-6 at most; outputs are 1 to 4 in size.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hf_models import CASES, VARIANTS, answers, as_folder, differences, leaking, make_inputs, their_answers, their_model
from hf_models import our_answers as imported

from speechjax.data.text import SPECIALS
from speechjax.formats import hf, imports
from speechjax.runs import open_run, write_run

torch = pytest.importorskip("torch", reason="live parity needs torch and transformers")
transformers = pytest.importorskip("transformers", reason="live parity needs torch and transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # torch and transformers warn of each other

CLOSE = 2e-5
WORDS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"abcdef")


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def words() -> dict[str, bytes]:
    """A tokenizer's files for the miniatures' eleven tokens."""
    return {"vocab.json": json.dumps({w: i for i, w in enumerate(WORDS)}).encode()}


def state_of(model: Any) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def save(config: dict[str, Any], suffix: str, folder: Path) -> Any:
    """Their model as they save it, with a vocabulary."""
    model = their_model(config, suffix)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(do_normalize=False, stride=2)))
    for name, content in words().items():
        (folder / name).write_bytes(content)
    return model


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_both_ways(name, suffix, tmp_path):
    """Theirs is read, answers the same here; written again it is loaded by them, whole, and answers the same there."""
    config, inputs = VARIANTS[name], make_inputs(VARIANTS[name])
    model = save(config, suffix, tmp_path / "theirs")
    theirs = their_answers(model, inputs)

    run, extra = read_run(tmp_path / "theirs", tmp_path / "run")
    ours = answers(leaking(run.config), run.variables["params"], extra, inputs)
    found = differences(ours, theirs)
    assert max(found.values()) < CLOSE, found
    assert {"hidden0", "hidden2", "last" if suffix == "Model" else "hidden1"} <= found.keys()

    hf.write(run, tmp_path / "back", encoder_only=suffix == "Model")
    again, info = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    found = differences(ours, their_answers(again.eval(), inputs))
    assert max(found.values()) < CLOSE, found
    for key, tensor in state_of(again).items():
        unused = "encoder.pos_conv_embed" in key and config["model_type"] == "wav2vec2-conformer"
        if not unused and "inv_freq" not in key:  # a constant
            np.testing.assert_array_equal(tensor, state_of(model)[key], err_msg=key)


def read_run(folder: Path, workdir: Path) -> Any:
    """(their folder as a run of ours, its state beside the parameters)."""
    read = hf.read(folder)
    config, leaves, files = imports.as_run(read)
    params, extra, _ = imports.variables(config, leaves)
    write_run(workdir, config, params, extra, vocabulary=files, source=dict(family=read.family.model_type))
    run = open_run(str(workdir), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return run, {name: part for name, part in run.variables.items() if name != "params"}


def test_parity_notices_one_wrong_weight():
    """Negative control: one kernel left as theirs has it."""
    config, inputs = VARIANTS["hubert-layer-pre"], make_inputs(VARIANTS["hubert-layer-pre"])
    model = their_model(config, "Model")
    state = state_of(model)
    key = "encoder.layers.1.attention.out_proj.weight"
    ours = imported(as_folder(config, "Model", state | {key: state[key].T}), inputs)
    found = differences(ours, their_answers(model, inputs))
    assert found["hidden1"] < CLOSE < 1e-2 < found["hidden2"]


def test_groups_leak_and_layers_do_not():
    """What a padded row becomes alone, and beside a longer one."""
    for norm, leaks in (("group", True), ("layer", False)):
        config = VARIANTS[f"hubert-{norm}-post"]
        model, inputs = their_model(config, "Model"), make_inputs(config)
        alone = {"x": inputs["x"][1:, : inputs["lengths"][1]], "lengths": inputs["lengths"][1:]}
        batch, single = their_answers(model, inputs)["last"], their_answers(model, alone)["last"]
        off = np.abs(batch[1, : single.shape[1]] - single[0]).max()
        assert (off > 1e-2) == leaks, (norm, off)


def test_features_of_w2v_bert_are_those_of_its_extractor():
    rng = np.random.default_rng(0)
    audio = [(0.1 * rng.normal(size=n)).astype(np.float32) for n in (16000, 9000)]
    extractor = transformers.SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80)
    theirs = extractor(audio, sampling_rate=16000, return_tensors="np")
    from speechjax.models.spectral import MelFrontend

    front = MelFrontend(factor=2, normalize="sample")
    padded = np.zeros((2, 16000), np.float32)
    for row, sound in zip(padded, audio, strict=True):
        row[: len(sound)] = sound
    frames, lengths = front.apply({}, padded, np.array([16000, 9000], np.int32))
    assert lengths.tolist() == theirs["attention_mask"].sum(1).tolist() == [49, 27]
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(frames[row, :n], theirs["input_features"][row, :n], atol=2e-3)


def test_their_processor_and_pipeline_spell_as_we_do(tmp_path):
    """From raw audio to a text, with what a folder of ours holds and nothing else."""
    from speechjax.data.text import load_tokenizer
    from speechjax.decode import ctc

    config = VARIANTS["wav2vec2-layer-pre"]
    save(config, "ForCTC", tmp_path / "theirs")
    run, extra = read_run(tmp_path / "theirs", tmp_path / "run")
    hf.write(run, tmp_path / "back")
    pipe = transformers.pipeline("automatic-speech-recognition", model=str(tmp_path / "back"), device="cpu")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "back")
    tokenizer = load_tokenizer(tmp_path / "run")
    assert tokenizer.tokens[: len(SPECIALS)] == SPECIALS
    texts = []
    for seed in range(4):
        sound = (0.1 * np.random.default_rng(seed).normal(size=4000)).astype(np.float32)
        inputs = processor(sound, sampling_rate=16000, return_tensors="np")
        ours = answers(run.config, run.variables["params"], extra,
                       dict(x=inputs["input_values"], lengths=np.array([4000], np.int32)))  # fmt: skip
        ids = np.asarray(ctc.greedy(ours["logits"], ours["frames"]).tokens)[0, 0]
        texts.append(tokenizer.decode(ids[ids > 0]))
        said = pipe(sound)["text"].replace("<s>", "").replace("</s>", "").replace("<unk>", "⁇")
        assert said.strip() == texts[-1].strip()
    assert len(set(texts)) > 1
    assert "".join(texts).strip()
