"""Folders of `transformers` as they come: in parts, narrow, of older versions, by PyTorch; and what is refused.

Nothing here needs torch.  Whatever is wrong with a file ends in one clear line.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hf_folders import as_run, save, state_of, write_folder, write_texts

from speechjax.errors import UserError
from speechjax.formats import hf, imports
from speechjax.formats.names import Arrays

NAME, SUFFIX = "wav2vec2-group-post", "ForCTC"


def same(found: Arrays, wanted: Arrays) -> None:
    wanted = {key.removeprefix("wav2vec2."): array for key, array in wanted.items()}
    assert found.keys() == wanted.keys()
    for key, array in wanted.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key, strict=True)


# ---------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("parts", [1, 3])
def test_in_parts_and_by_pytorch(kind, parts, tmp_path):
    state, stem = state_of(NAME, SUFFIX), {"safetensors": "model", "bin": "pytorch_model"}[kind]
    write_texts(tmp_path, NAME, SUFFIX)
    if parts == 1:
        save(tmp_path / f"{stem}.{kind}", state)
    else:
        names = [f"{stem}-{i + 1:05}-of-{parts:05}.{kind}" for i in range(parts)]
        place = {key: names[i % parts] for i, key in enumerate(state)}
        for name in names:
            save(tmp_path / name, {key: array for key, array in state.items() if place[key] == name})
        index = dict(metadata=dict(total_size=1), weight_map=place)
        (tmp_path / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    same(hf.read(tmp_path).state, state)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_other_widths_become_float32(dtype, kind, tmp_path):
    wide = {key: array + np.float32(1e-3) for key, array in state_of(NAME, SUFFIX).items()}
    if dtype is ml_dtypes.bfloat16 and kind.startswith("model"):
        pytest.importorskip("safetensors")
    write_texts(tmp_path, NAME, SUFFIX, dtype=np.dtype(dtype).name)
    stored = {key: array.astype(dtype) for key, array in wide.items()}
    save(tmp_path / kind, stored)
    same(hf.read(tmp_path).state, {key: array.astype(np.float32) for key, array in stored.items()})


def test_names_of_older_versions(tmp_path):
    """Weight norm before PyTorch 2.1, and encoders saved without their prefix."""
    state = state_of(NAME, "Model")
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    renamed = {key: array for key, array in state.items() if "original" not in key}
    for key, array in state.items():
        for new, name in old.items():
            if new in key:
                renamed[key.replace(new, name)] = array
    assert len(renamed) == len(state)
    assert renamed.keys() != state.keys()
    write_folder(tmp_path / "old", NAME, "Model", renamed)
    same(hf.read(tmp_path / "old").state, state)
    write_folder(tmp_path / "prefixed", NAME, "Model", {f"wav2vec2.{key}": array for key, array in state.items()})
    same(hf.read(tmp_path / "prefixed").state, state)


def test_a_processor_in_one_file(tmp_path):
    """As version 5 saves it, beside a tokenizer."""
    for normalize in (True, False):
        write_folder(tmp_path / str(normalize), NAME)
        (tmp_path / str(normalize) / "preprocessor_config.json").unlink()
        whole = dict(feature_extractor=dict(do_normalize=normalize), processor_class="Wav2Vec2Processor")
        (tmp_path / str(normalize) / "processor_config.json").write_text(json.dumps(whole))
        assert hf.read(tmp_path / str(normalize)).hf["do_normalize"] is normalize


def test_safetensors_come_before_pytorch(tmp_path):
    write_folder(tmp_path, NAME)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    same(hf.read(tmp_path).state, state_of(NAME, "Model"))


def test_what_has_no_place_is_left_out(tmp_path, caplog):
    state = state_of(NAME, "Model") | {"encoder.layers.7.extra": np.ones(2, np.float32)}
    run = as_run(write_folder(tmp_path / "theirs", NAME, "Model", state), tmp_path / "run")
    assert "1 arrays have no place here and are left out: encoder.layers.7.extra" in caplog.text
    assert run.config.task.name == "wav2vec2"


def test_words_move_with_their_classes(tmp_path):
    """A vocabulary with the blank elsewhere and no <s>: ours has the specials first, rows of the head follow."""
    folder = write_folder(tmp_path / "theirs", NAME, SUFFIX, pad_token_id=9)
    words = {w: i for i, w in enumerate(["a", "b", "c", "|", "d", "<unk>", "e", "f", "g", "[PAD]", "h"])}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(pad_token="[PAD]", unk_token="<unk>")))
    config, leaves, files = imports.as_run(hf.read(folder))
    tokens = json.loads(files["vocab.json"])["tokens"]
    assert tokens == ["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", " ", "d", "e", "f", "g", "h"]
    assert config.task.classes == 13
    theirs = state_of(NAME, SUFFIX)
    order = [9, None, None, 5, 0, 1, 2, 3, 4, 6, 7, 8, 10]
    for k, i in enumerate(order):
        expected = np.zeros(24, np.float32) if i is None else theirs["lm_head.weight"][i]
        np.testing.assert_array_equal(leaves["head/kernel"][:, k], expected)
        assert leaves["head/bias"][k] == (-1e4 if i is None else theirs["lm_head.bias"][i])


# ---------------------------------------------------------------------------------------------- what is refused


def change(**more: Any) -> Any:
    """Of config.json."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | more))

    return apply


def put(name: str, content: bytes | str) -> Any:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return apply


def cut(name: str, size: int) -> Any:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def weights(**more: Any) -> Any:
    """None takes an array away."""

    def apply(folder: Path) -> None:
        state = state_of(NAME, SUFFIX) | {key.replace("__", "."): value for key, value in more.items()}
        save(folder / "model.safetensors", {key: array for key, array in state.items() if array is not None})

    return apply


def without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


ZEROS = np.zeros((3, 3), np.float32)
PROJECTION = "wav2vec2__feature_projection__projection__weight"
REFUSED = {
    "no folder": (lambda folder: [file.unlink() for file in folder.iterdir()], "No such file"),
    "no weights": (without("model.safetensors"), "has neither model.safetensors nor pytorch_model.bin"),
    "no JSON": (cut("config.json", 40), r"config\.json is damaged, it is no JSON object"),
    "bytes": (put("config.json", b"\xff\xfe{"), r"config\.json is damaged"),
    "a list": (put("config.json", "[]"), r"config\.json is damaged"),
    "deep": (put("config.json", "[" * 100_000), r"config\.json is damaged"),
    "empty": (put("config.json", "{}"), "model_type=None; those that can be read are wav2vec2, hubert, "),
    "another kind": (change(model_type="whisper"), "model_type='whisper'; those that can be read"),
    "a list of kinds": (change(model_type=["hubert"]), r"model_type=\['hubert'\]; those"),
    "architecture": (change(architectures=["WhisperModel"]), "names WhisperModel; of Wav2Vec2 there are Model, ForPre"),
    "no class of its family": (change(architectures=["HubertForCTC"]), "names HubertForCTC; of Wav2Vec2 there are"),
    "architectures": (change(architectures="Wav2Vec2ForCTC"), "is no list of names"),
    "text for a number": (change(hidden_size="24"), "hidden_size='24' is no int"),
    "truth for a number": (change(num_hidden_layers=True), "num_hidden_layers=True is no int"),
    "number for a text": (change(hidden_act=3), "hidden_act=3 is no str"),
    "number for truth": (change(conv_bias=0), "conv_bias=0 is no bool"),
    "a fraction": (change(hidden_size=24.5), "hidden_size=24.5 is no int"),
    "no number": (change(hidden_dropout=float("nan")), "hidden_dropout=nan makes no sense"),
    "negative": (change(hidden_dropout=-0.5), r"hidden_dropout=-0\.5 makes no sense"),
    "heads": (change(num_attention_heads=0), "num_attention_heads=0 makes no sense"),
    "odd heads": (change(num_attention_heads=5), "is no multiple of config.model.heads=5"),
    "endless": (change(num_hidden_layers=2**20), "the weights lack wav2vec2.encoder|the weights lack encoder"),
    "beyond": (change(num_hidden_layers=10**12), "num_hidden_layers=1000000000000 makes no sense"),
    "huge": (change(hidden_size=2**20), "no feature_projection.projection.weight of width 1048576"),
    "sizes": (change(conv_dim=[16, 8, "16", 16]), "is no list of sizes"),
    "no sizes": (change(conv_dim=[]), "is no list of sizes"),
    "three sizes": (change(conv_dim=[16, 8, 16]), "are not of one length"),
    "strides": (change(conv_stride=[2**20] * 4), "a frame of this encoder comes every .* makes no sense"),
    "norm": (change(feat_extract_norm="batch"), "feat_extract_norm='batch'; there are 'group' and 'layer'"),
    "act": (change(hidden_act="relu"), "hidden_act='relu'; here it is always 'gelu'"),
    "epsilon": (change(layer_norm_eps=1e-12), "layer_norm_eps=1e-12; here it is always 1e-5"),
    "adapter": (change(add_adapter=True), "add_adapter=True: layers of adapters"),
    "classes": (change(vocab_size=12), r"vocab_size=12 and pad_token_id=0.*lm_head has \(11,\) and"),
    "blank": (change(pad_token_id=11), "pad_token_id=11, which is the blank"),
    "one more layer": (change(num_hidden_layers=3), r"the weights lack encoder\.layers\.2\.\S+ \(16 of \d+ names"),
    "missing": (weights(wav2vec2__encoder__layer_norm__bias=None), r"lack encoder\.layer_norm\.bias \(1 of"),
    "the first missing": (weights(**{PROJECTION: None}), "no feature_projection.projection.weight of width 24"),
    "shape": (weights(lm_head__weight=ZEROS), r"lm_head has \(3,\) and \(11,\) classes"),
    "rank": (weights(wav2vec2__encoder__layers__0__layer_norm__weight=ZEROS), r"attention_norm/scale has the shape"),
    "integers": (weights(wav2vec2__encoder__layer_norm__bias=np.zeros(24, np.int64)), "is of type int64, where the"),
    "truncated": (lambda f: cut("model.safetensors", 30_000)(f), r"model\.safetensors is damaged or no safetensors"),
    "header alone": (cut("model.safetensors", 8), "is damaged or no safetensors"),
    "nothing": (put("model.safetensors", b""), "is damaged or no safetensors"),
    "a pickle": (put("model.safetensors", b"\x80\x04N."), "is damaged or no safetensors"),
    "words": (put("vocab.json", "{"), r"vocab\.json: damaged"),
    "words of languages": (put("vocab.json", '{"deu": {"a": 0}}'), "of several languages keep one"),
    "preprocessor": (put("preprocessor_config.json", "3"), r"preprocessor_config\.json is damaged"),
    "normalize": (put("preprocessor_config.json", '{"do_normalize": "yes"}'), "do_normalize='yes' is no bool"),
    "ours of another age": (put("speechjax.json", '{"format": 99}'), "has format 99, this version reads 1"),
    "ours damaged": (put("speechjax.json", '{"format": 1}'), r"speechjax\.json is damaged"),
    "ours alone": (put("speechjax.json", '{"format": 1, "config": {}, "vocabulary": {}}'), "damaged, or not the one"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_one_line(name, tmp_path):
    damage, message = REFUSED[name]
    folder = write_folder(tmp_path, NAME, SUFFIX)
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        read_whole(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def read_whole(folder: Path) -> Any:
    config, leaves, _ = imports.as_run(hf.read(folder))
    return imports.variables(config, leaves)


def test_nothing_is_wrong_with_the_folder_itself(tmp_path):
    """Negative control of the mistakes."""
    read_whole(write_folder(tmp_path, NAME, SUFFIX))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "names no files beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names no files beside it"),
        ({"weight_map": {"a": 3}}, "names no files beside it"),
        ({"weight_map": ["model-1.safetensors"]}, "names no files beside it"),
        ({}, "names no files beside it"),
        ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "no such file"),
        ({"weight_map": {}}, "no feature_projection"),
    ],
)
def test_indices_that_lead_nowhere(index, message, tmp_path):
    write_texts(tmp_path, NAME, SUFFIX)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        read_whole(tmp_path)


def test_what_lies_beside_must_be_of_this_model(tmp_path):
    """speechjax.json of one folder in another, and damaged."""
    tiny = as_run(write_folder(tmp_path / "a", NAME, SUFFIX), tmp_path / "run")
    hf.write(tiny, tmp_path / "ours")
    other = write_folder(tmp_path / "b", "hubert-layer-pre")
    for name in (hf.OURS, "speechjax.safetensors"):
        (other / name).write_bytes((tmp_path / "ours" / name).read_bytes())
    with pytest.raises(UserError, match=r"model\.safetensors is damaged, or not the one that was exported"):
        read_whole(other)
    (tmp_path / "b" / hf.WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor"):
        read_whole(other)
    read = hf.read(tmp_path / "ours")
    with pytest.raises(UserError, match=r"is of another model than config\.json \(conv_bias="):
        imports.as_run(dataclasses.replace(read, hf=read.hf | dict(conv_bias=not read.hf["conv_bias"])))
    for ours, message in (
        (dict(vocabulary={"vocab.json": "xy"}), "its vocabulary is no hexadecimal text"),
        (dict(vocabulary={"../../x": "00"}), "is no vocabulary"),
        (dict(config=read.ours["config"] | dict(task=3)), r"speechjax\.json describes no model"),
        (dict(config=read.ours["config"] | dict(task=dict(name="os"))), "no tasks named 'os'"),
        (dict(config={}), "a config has the blocks"),
    ):
        with pytest.raises(UserError, match=message) as error:
            imports.as_run(dataclasses.replace(read, ours=read.ours | ours))
        assert not re.search(r"\n", str(error.value))
    imports.as_run(read)  # negative control
