"""The verbs export and convert: what they print, write and refuse.  What formats hold is tested in tests/formats/."""

import json
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from speechjax import config as configs
from speechjax import convert, export
from speechjax.errors import UserError
from speechjax.formats import trial
from speechjax.runs import open_run, read_config

GOLDEN = Path(__file__).parent.parent / "golden"
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def leaves(workdir: Path) -> dict[str, np.ndarray]:
    return flatten_dict(jax.tree.map(np.asarray, dict(open_run(str(workdir), HERE).variables)), sep="/")


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["asr", "classify", "speaker", "hubert"])
def test_out_to_transformers_and_back_is_the_same_run(workdirs, name, tmp_path):
    """Every bit of parameters and state, the config and the vocabulary, heads without a class of theirs too."""
    assert export.run([f"--workdir={workdirs / name}", "--format=hf", f"--out={tmp_path / 'hf'}", "--no-check"]) == 0
    assert convert.run([f"--from=hf:{tmp_path / 'hf'}", f"--workdir={tmp_path / 'back'}"]) == 0
    assert same(leaves(tmp_path / "back"), leaves(workdirs / name))
    before, after = (configs.to_json(read_config(d)) for d in (workdirs / name, tmp_path / "back"))
    assert after == before
    assert open_run(str(tmp_path / "back"), HERE).step == 3
    if (workdirs / name / "vocab.json").exists():
        assert (tmp_path / "back" / "vocab.json").read_bytes() == (workdirs / name / "vocab.json").read_bytes()
    changed = leaves(tmp_path / "back")
    key = next(k for k in changed if k.endswith("kernel"))
    assert not same(changed | {key: changed[key] + 1}, leaves(workdirs / name)), "negative control"


def test_without_our_files_the_folder_is_read_as_any_other(workdirs, tmp_path):
    """What `save_pretrained` would leave of it: the encoder and the head, on the recipe of the task."""
    export.run([f"--workdir={workdirs / 'asr'}", "--format=hf", f"--out={tmp_path / 'hf'}", "--no-check"])
    for name in ("speechjax.json", "speechjax.safetensors"):
        (tmp_path / "hf" / name).unlink()
    convert.run([f"--from=hf:{tmp_path / 'hf'}", f"--workdir={tmp_path / 'back'}"])
    assert same(leaves(tmp_path / "back"), leaves(workdirs / "asr"))
    assert json.loads((tmp_path / "back" / "source.json").read_text())["family"] == "wav2vec2"
    tokens = [json.loads((d / "vocab.json").read_text())["tokens"] for d in (workdirs / "asr", tmp_path / "back")]
    assert tokens[0] == tokens[1]
    convert.run([f"--from=hf:{tmp_path / 'hf'}", f"--workdir={tmp_path / 'encoder'}", "--encoder-only"])
    assert read_config(tmp_path / "encoder").task["name"] == "wav2vec2"
    ours, theirs = leaves(tmp_path / "encoder"), leaves(workdirs / "asr")
    assert all(np.array_equal(ours[k], v) for k, v in theirs.items() if k.startswith("params/encoder/"))
    assert "params/head/kernel" not in ours


def test_safetensors_out_and_back(workdirs, tmp_path, capsys):
    assert export.run([f"--workdir={workdirs / 'hubert'}", "--format=safetensors", f"--out={tmp_path / 'flat'}"]) == 0
    assert re.search(r"frames +0\.00e\+00", capsys.readouterr().out)
    convert.run([f"--from=safetensors:{tmp_path / 'flat'}", f"--workdir={tmp_path / 'back'}"])
    assert same(leaves(tmp_path / "back"), leaves(workdirs / "hubert"))


def test_adapters_are_merged_for_transformers(workdirs, tmp_path, caplog):
    with caplog.at_level("INFO", logger="speechjax"):
        export.run([f"--workdir={workdirs / 'lora'}", "--format=hf", f"--out={tmp_path / 'hf'}", "--no-check"])
    assert "merged: lora 'task'" in caplog.text
    convert.run([f"--from=hf:{tmp_path / 'hf'}", f"--workdir={tmp_path / 'back'}"])
    found = leaves(tmp_path / "back")
    assert not any("lora" in name for name in found)
    audio, lengths = trial.noise(2, 1.0)
    runs = [open_run(str(d), HERE) for d in (workdirs / "lora", tmp_path / "back")]
    merged, apart = (trial.answers(run)(audio, lengths)["logits"] for run in runs)
    np.testing.assert_allclose(merged, apart, atol=1e-4)


def test_fairseq_checkpoints_become_runs(tmp_path, caplog):
    with caplog.at_level("INFO", logger="speechjax"):
        convert.run([f"--from=fairseq:{GOLDEN / 'fairseq_ctc.pt'}", f"--workdir={tmp_path / 'ctc'}"])
        convert.run([f"--from=s3prl:{GOLDEN / 'fairseq_hubert_group.pt'}", f"--workdir={tmp_path / 'hubert'}"])
    assert "task ctc" in caplog.text
    assert "--config.init_from=" in caplog.text
    tokens = json.loads((tmp_path / "ctc" / "vocab.json").read_text())["tokens"]
    assert tokens == ["<pad>", "<s>", "</s>", "<unk>", " ", "E", "T"]
    found = leaves(tmp_path / "hubert")
    config = read_config(tmp_path / "hubert")
    assert found["params/code_vectors"].shape == (config.task["codes"], config.task["projection"])
    assert "drawn at random: none" in caplog.text


def test_training_begins_with_a_converted_run_and_not_in_its_folder(workdirs, tmp_path):
    config = configs.load(str(workdirs / "asr" / "config.json"), [f"init_from={workdirs / 'asr'}", "train.steps=7"])
    assert config.train.steps == 7
    configs.claim_workdir(tmp_path / "new", config)
    with pytest.raises(UserError, match=r"holds weights that no training left there.*init_from="):
        configs.claim_workdir(workdirs / "asr", config)
    with pytest.raises(UserError, match="no config file"):
        configs.load(str(tmp_path / "other.json"))
    (tmp_path / "bad.json").write_text("[1")
    with pytest.raises(UserError, match="is not the config of a run"):
        configs.load(str(tmp_path / "bad.json"))


def test_an_export_that_answers_differently_is_an_error(workdirs, tmp_path, capsys, monkeypatch):
    """Negative control of the check: what is loaded has one weight changed."""
    load = trial.loader("safetensors")

    def wrong(folder):
        answer = load(folder)
        return lambda audio, lengths: {k: v + (k == "logits") for k, v in answer(audio, lengths).items()}

    monkeypatch.setattr(trial, "loader", lambda kind: wrong)
    code = export.run([f"--workdir={workdirs / 'asr'}", "--format=safetensors", f"--out={tmp_path / 'flat'}"])
    assert code == 1
    assert "logits" in capsys.readouterr().out


def test_the_check_says_which_library_it_lacks(workdirs, tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with caplog.at_level("WARNING", logger="speechjax"):
        assert export.run([f"--workdir={workdirs / 'asr'}", "--format=hf", f"--out={tmp_path / 'hf'}"]) == 0
    assert "not tried: torch is not installed here" in caplog.text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workdir={w}/mel", "--format=hf", "--out={t}/x"], "transformers has no class for this encoder"),
        (["--workdir={w}/asr", "--format=hf", "--out={w}/asr"], "there already"),
        (["--workdir={w}/none", "--format=hf", "--out={t}/x"], "no such folder"),
        (["--workdir={w}/asr", "--format=hf", "--out={t}/x", "--family=wavlm"], "no wavlm"),
        (["--workdir={w}/asr", "--format=hf", "--out={t}/x", "--family=bert"], "choose from wav2vec2"),
    ],
)
def test_mistakes_of_export_are_one_line(workdirs, tmp_path, argv, message):
    with pytest.raises(UserError, match=message) as caught:
        export.run([a.format(w=workdirs, t=tmp_path) for a in argv])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("verb", "argv", "message"),
    [
        (export, ["--workdir=a", "--format=hf", "--out=b", "--dtype=int8"], "--format=hf has float32"),
        (export, ["--workdir=a", "--format=onnx", "--out=b", "--encoder-only"], "is for --format=hf"),
        (export, ["--workdir=a", "--format=gguf", "--out=b"], "invalid choice"),
        (convert, ["--from=wav2vec2-base", "--workdir=b"], "say hf:..., fairseq:"),
        (convert, ["--from=nemo:x", "--workdir=b"], "say hf:..., fairseq:"),
        (convert, ["--from=hf:x", "--workdir=b", "--dictionary=d"], "is for fairseq: and s3prl:"),
    ],
)
def test_mistakes_of_flags_are_named(verb, argv, message, capsys):
    with pytest.raises(SystemExit):
        verb.run(argv)
    assert message in capsys.readouterr().err


def test_mistakes_of_convert_are_one_line(workdirs, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "text.pt").write_text("no checkpoint")
    cases = [
        (f"hf:{workdirs / 'asr'}", tmp_path / "full", "not empty"),
        (f"hf:{workdirs / 'asr'}", tmp_path / "a", "model_type=None"),
        (f"hf:{tmp_path}/absent", tmp_path / "a", "no such folder"),
        (f"fairseq:{tmp_path}/absent.pt", tmp_path / "a", "absent.pt"),
        (f"fairseq:{tmp_path}/text.pt", tmp_path / "a", "text.pt"),
        (f"safetensors:{workdirs / 'asr'}", tmp_path / "a", "."),
    ]
    for source, workdir, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            convert.run([f"--from={source}", f"--workdir={workdir}"])
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "a").exists()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"to fetch it from the hub: pip install"):
        convert.run(["--from=hf:owner/model", f"--workdir={tmp_path / 'a'}"])


def test_the_hub_is_asked_for_no_code(workdirs, tmp_path, monkeypatch):
    """With a stand-in for the library: names of files, weights without pickles first, and errors in one line."""
    export.run([f"--workdir={workdirs / 'asr'}", "--format=hf", f"--out={tmp_path / 'hf'}", "--no-check"])
    asked = []

    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            asked.append((name, tuple(allow_patterns)))
            if name == "owner/gone":
                raise RuntimeError("404\nnot found")
            return str(tmp_path / "hf")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    convert.run(["--from=hf:owner/model", f"--workdir={tmp_path / 'run'}"])
    assert asked == [("owner/model", ("*.json", "*.safetensors", "*.txt"))]
    assert same(leaves(tmp_path / "run"), leaves(workdirs / "asr"))
    with pytest.raises(UserError, match=r"the hub did not give it \(404\)"):
        convert.run(["--from=hf:owner/gone", f"--workdir={tmp_path / 'other'}"])


def test_the_check_compares_in_float32(workdirs, tmp_path):
    """A run that trains in bfloat16 answers in float32 elsewhere, and its export is not to blame."""
    config = json.loads((workdirs / "asr" / "config.json").read_text())
    shutil.copytree(workdirs / "asr", tmp_path / "run")
    config["model"]["dtype"] = "bfloat16"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert export.run([f"--workdir={tmp_path / 'run'}", "--format=stablehlo", f"--out={tmp_path / 'x'}"]) == 0


def test_what_is_no_number_or_not_there_is_a_difference():
    lengths = np.array([3, 2])
    ours = np.ones((2, 3, 4))
    assert trial.difference(ours, np.full_like(ours, np.nan), lengths)[0] != 0
    assert trial.difference(ours, ours[:, :2], lengths) == (np.inf, 1)
    assert trial.difference(ours, np.pad(ours, ((0, 0), (0, 2), (0, 0))), lengths) == (0, 1)
    assert trial.difference(np.ones(2), np.ones(2), None) == (0, 1)
    both = {"a": (np.nan, 1.0), "b": (0.0, 1.0)}
    assert np.isnan(trial.Result(both, (1.0, 1.0), []).worst)


def test_words_and_labels_of_others():
    """Delimiters that are objects, small letters that are printed, classes that have names of their own."""
    import speechjax.formats.hf_words as hf_words

    words = {"vocab.json": json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5}).encode()}
    config = dict(word_delimiter_token=dict(content="|"), do_lower_case=True)
    files, order = hf_words.read_words(words | {"tokenizer_config.json": json.dumps(config).encode()}, 6, 0)
    content = json.loads(files["vocab.json"])
    assert content["tokens"] == ["<pad>", "<s>", "</s>", "<unk>", " ", "a"]
    assert content["steps"] == "lowercase single_spaces"
    assert order == [0, 1, 2, 3, 4, 5]
    named = dict(labels=dict(label_emotion=dict(names=["joy", "anger"])))
    stored = {"labels.json": json.dumps(named).encode(), "phones.json": b'{"symbols": ["x", "y"]}'}
    found = hf_words.write_labels(stored, dict(name="classify", label="label_emotion", classes=3))
    assert found["id2label"] == {"0": "joy", "1": "anger", "2": "LABEL_2"}
    assert hf_words.write_labels(stored, dict(name="frames", classes=2))["label2id"] == {"x": 0, "y": 1}
    with pytest.raises(UserError, match=r"no vocab\.json"):
        hf_words.write_words({}, "Wav2Vec2FeatureExtractor")


def test_masks_of_channels_alone_stay():
    from speechjax.formats import heads

    task = dict(mask_prob=0.0, mask_span=2, channel_mask_prob=0.25, channel_mask_span=4, head_dropout=0.0, classes=9)
    written = heads.HEADS[1].write(task | dict(layers="last", recurrent_layers=0), 32)
    assert written["mask_time_prob"] == 0
    assert "apply_spec_augment" not in written
    assert heads.HEADS[1].read(written)["channel_mask_prob"] == 0.25
    off = heads.HEADS[1].write(task | dict(channel_mask_prob=0.0), 32)
    assert off["apply_spec_augment"] is False
    assert off["mask_time_prob"] > 0, "or their model has no mask embedding"
