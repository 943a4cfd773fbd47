"""Checkpoints of fairseq: every array finds its name, the architecture is found, and foreign files end in one line.

Shapes: B batch, S samples, T frames, D width.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from fairseq_weights import (
    CFG,
    SPECIAL,
    D,
    F,
    Weights,
    cfg,
    conformer,
    fairseq_dictionary,
    front,
    hubert,
    quantizer,
    saved,
    transformer,
)
from flax.traverse_util import unflatten_dict
from torch_writer import dump, members, modules, zipped

from speechjax.errors import UserError
from speechjax.formats.fairseq import read_dictionary, read_fairseq
from speechjax.formats.fairseq_config import Settings, config_of
from speechjax.formats.families import complete
from speechjax.formats.hf import opened, rows
from speechjax.formats.names import to_ours
from speechjax.formats.torch_files import read_torch
from speechjax.models.encoder import SpeechEncoder

GOLDEN = Path(__file__).parents[1] / "golden"

# ---- against fairseq's own models


@pytest.mark.parametrize("name", ["hubert_group", "ctc"])
def test_a_model_of_fairseq_computes_the_same_here(name):
    """Weights and outputs of make_fairseq.py, whose models are fairseq's."""
    golden = np.load(GOLDEN / "fairseq.npz")
    found = read_fairseq(GOLDEN / f"fairseq_{name}.pt")
    assert json.loads(json.dumps(found.about)) == found.about
    config = found.config | dict(do_normalize=False)  # as they computed: their data pipeline normalises
    folder = opened(complete(config, {}), found.state, {}, {}, {})
    model = folder.family.read(folder.hf)
    leaves, missing, strange = to_ours(rows(folder.family, None, model, {}), folder.state)
    assert not missing
    assert all(name.startswith("lm_head.") for name in strange)
    batch = dict(audio=golden["audio"].astype(np.float32) / 32768, lengths=np.full(2, golden["audio"].shape[1]))

    def frames(leaves):
        params = unflatten_dict({tuple(k.split("/")[1:]): v for k, v in leaves.items()})
        return jax.jit(SpeechEncoder(**model).apply)({"params": params}, batch).frames

    np.testing.assert_allclose(frames(leaves), golden[name], atol=1e-5)  # float32; outputs are near 1
    wrong = leaves | {(key := "encoder/transformer/layer1/mlp_up/kernel"): leaves[key] * 1.01}
    assert np.abs(frames(wrong) - golden[name]).max() > 1e-4, "negative control"


def test_what_the_golden_files_say():
    hubert, ctc = (read_fairseq(GOLDEN / f"fairseq_{name}.pt") for name in ("hubert_group", "ctc"))
    assert hubert.config["architectures"] == ["HubertModel"]
    assert hubert.others["label_embs_concat"].shape == (9, 6)
    assert hubert.others["final_proj.weight"].shape == (6, 16)
    assert hubert.about["codes"] == [[*SPECIAL, "|", "E", "T", "1", "0"]]
    assert ctc.config["architectures"] == ["Wav2Vec2ForCTC"]
    assert ctc.config | dict(vocab_size=7, pad_token_id=0, layerdrop=0.25, do_normalize=True) == ctc.config
    assert ctc.about["vocabulary"] == [*SPECIAL, "|", "E", "T"]
    assert (ctc.about["dtype"], ctc.others) == ("float16", {})
    assert {str(array.dtype) for array in ctc.state.values()} == {"float32"}


# ---- names


FAMILIES = {
    "wav2vec2": lambda: quantizer(transformer(front())),
    "wav2vec2 layer": lambda: quantizer(transformer(front("layer", bias=True))),
    "wav2vec2 same width": lambda: transformer(front(width=D)),
    "hubert": lambda: hubert(transformer(front())),
    "wavlm": lambda: transformer(front("layer"), gated=True),
    "data2vec-audio": lambda: transformer(front("layer"), stacked=True),
    "wav2vec2-conformer": lambda: quantizer(conformer(front("layer"))),
    "wav2vec2-conformer rotary": lambda: conformer(front("layer"), rotary=True),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_array_has_one_place(tmp_path, name):
    weights = FAMILIES[name]()
    changes: dict[str, Any] = dict(layer_norm_first="conformer" in name or name == "wavlm")
    if name == "wav2vec2 same width":
        changes["conv_feature_layers"] = "[(6, 10, 5), (6, 3, 2)]"
    if name == "hubert":
        changes["_name"] = "hubert"
    found = read_fairseq(saved(tmp_path, dict(cfg=cfg(**changes), model=dict(weights))))
    kind = name.split()[0]
    assert (found.config["model_type"], found.about["family"]) == (kind, kind)
    values = sorted(float(x.flat[0]) for x in [*found.state.values(), *found.others.values()])
    made = [0.0, 1.0] if "same width" in name else []  # the bias and the weights of an identity
    repeated = 0 if "rotary" not in name else 1  # the same in every layer
    assert len(values) == len(weights) + len(made) - repeated
    family = opened(complete(found.config, {}), found.state, {}, {}, {})
    expected = {row.theirs for row in rows(family.family, family.head, family.family.read(family.hf), _task(found))}
    strange = set(family.state) - expected
    assert strange <= {"encoder.embed_positions.inv_freq"}
    assert not expected - set(family.state)


def _task(found) -> dict[str, Any]:
    config = found.config
    if not config["architectures"][0].endswith("ForPreTraining"):
        return {}
    return dict(codebooks=config["num_codevector_groups"], codes=config["num_codevectors_per_group"])


PAIRS = {
    "wav2vec2": {
        "mask_emb": "wav2vec2.masked_spec_embed",
        "layer_norm.bias": "wav2vec2.feature_projection.layer_norm.bias",
        "post_extract_proj.weight": "wav2vec2.feature_projection.projection.weight",
        "feature_extractor.conv_layers.0.2.weight": "wav2vec2.feature_extractor.conv_layers.0.layer_norm.weight",
        "encoder.pos_conv.0.weight_g": "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0",
        "encoder.pos_conv.0.weight_v": "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1",
        "encoder.layers.1.self_attn.out_proj.bias": "wav2vec2.encoder.layers.1.attention.out_proj.bias",
        "encoder.layers.1.self_attn_layer_norm.weight": "wav2vec2.encoder.layers.1.layer_norm.weight",
        "encoder.layers.0.fc1.weight": "wav2vec2.encoder.layers.0.feed_forward.intermediate_dense.weight",
        "encoder.layers.0.final_layer_norm.bias": "wav2vec2.encoder.layers.0.final_layer_norm.bias",
        "quantizer.vars": "quantizer.codevectors",
        "final_proj.weight": "project_hid.weight",
        "project_q.bias": "project_q.bias",
    },
    "wavlm": {
        "encoder.layers.0.self_attn.relative_attention_bias.weight": "encoder.layers.0.attention.rel_attn_embed.weight",
        "encoder.layers.1.self_attn.grep_a": "encoder.layers.1.attention.gru_rel_pos_const",
        "encoder.layers.1.self_attn.grep_linear.bias": "encoder.layers.1.attention.gru_rel_pos_linear.bias",
        "feature_extractor.conv_layers.1.2.1.bias": "feature_extractor.conv_layers.1.layer_norm.bias",
    },
    "data2vec-audio": {"encoder.pos_conv.1.0.weight": "encoder.pos_conv_embed.layers.1.conv.weight"},
    "wav2vec2-conformer": {
        "encoder.layers.1.ffn2.w_1.weight": "wav2vec2_conformer.encoder.layers.1.ffn2.intermediate_dense.weight",
        "encoder.layers.0.ffn1.layer_norm.bias": "wav2vec2_conformer.encoder.layers.0.ffn1_layer_norm.bias",
        "encoder.layers.0.self_attn.pos_bias_u": "wav2vec2_conformer.encoder.layers.0.self_attn.pos_bias_u",
        "encoder.layers.1.conv_module.batch_norm.running_var": (
            "wav2vec2_conformer.encoder.layers.1.conv_module.batch_norm.running_var"
        ),
    },
}


@pytest.mark.parametrize("name", PAIRS)
def test_names(tmp_path, name):
    weights = FAMILIES[name]()
    pre = name in ("wavlm", "wav2vec2-conformer")
    state = read_fairseq(saved(tmp_path, dict(cfg=cfg(layer_norm_first=pre), model=dict(weights)))).state
    for theirs, expected in PAIRS[name].items():
        np.testing.assert_array_equal(state[expected], weights[theirs], err_msg=theirs)


# ---- what a file says


def test_the_configuration(tmp_path):
    weights = quantizer(transformer(front("layer", bias=True)))
    content = dict(cfg=cfg(True, layer_norm_first=True), model=dict(weights), optimizer_history=[dict(num_updates=9)])
    found = read_fairseq(saved(tmp_path, content))
    expected = dict(
        model_type="wav2vec2", architectures=["Wav2Vec2ForPreTraining"], hidden_size=D, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=F, conv_dim=[4, 4], conv_kernel=[10, 3], conv_stride=[5, 2],
        conv_bias=True, feat_extract_norm="layer", do_stable_layer_norm=True, do_normalize=True,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, num_codevector_groups=2,
        num_codevectors_per_group=5, codevector_dim=6, proj_codevector_dim=5, contrastive_logits_temperature=0.2,
        num_negatives=7, diversity_loss_weight=0.3, mask_time_prob=0.5, layerdrop=0.05, hidden_act="gelu",
    )  # fmt: skip
    assert found.config | expected == found.config
    assert (found.about["guessed"], found.about["updates"], found.about["source"]) == ([], 9, "fairseq")
    assert found.about["settings"]["model"]["latent_groups"] == 2
    assert found.about["settings"]["criterion"] == dict(loss_weights=[0.3, 10.0])


def test_weights_alone_are_taken_for_the_published_models():
    """By shapes only: arrays of the published sizes, without the memory."""

    def zeros(*shape: int) -> np.ndarray:
        return np.broadcast_to(np.float32(0), shape)

    kernels, width, base = (10, 3, 3, 3, 3, 2, 2), 1024, "encoder.layers.0."
    state = {f"feature_extractor.conv_layers.{i}.conv.weight": zeros(512, 512, k) for i, k in enumerate(kernels)}
    state |= {f"feature_extractor.conv_layers.{i}.layer_norm.weight": zeros(512) for i in range(7)}
    state |= {"encoder.layer_norm.weight": zeros(width), f"{base}layer_norm.weight": zeros(width)}
    state |= {f"{base}feed_forward.intermediate_dense.weight": zeros(4096, width)}
    state |= {"encoder.pos_conv_embed.conv.parametrizations.weight.original1": zeros(width, 64, 128)}
    said = Settings()
    found = config_of("wav2vec2", state, said)
    assert (found["num_attention_heads"], found["conv_stride"]) == (16, [5, 2, 2, 2, 2, 2, 2])
    assert (found["do_stable_layer_norm"], found["do_normalize"]) == (True, True)
    assert [line.split(":")[0] for line in said.guessed] == [
        "strides of the convolutions", "attention heads", "norms come first in layers",
        "audio has zero mean and unit variance",
    ]  # fmt: skip
    group = {k: v for k, v in state.items() if "layer_norm" not in k or "conv_layers.0" in k or ".layer_norm" in k}
    group = {k: v for k, v in group.items() if not any(f"conv_layers.{i}.layer_norm" in k for i in range(1, 7))}
    assert config_of("wav2vec2", group, Settings())["do_stable_layer_norm"] is False
    with pytest.raises(ValueError, match="could have any strides"):
        config_of("wav2vec2", state | {"feature_extractor.conv_layers.6.conv.weight": zeros(512, 512, 4)}, Settings())
    with pytest.raises(ValueError, match="no encoder_attention_heads"):
        config_of("wav2vec2", state | {"encoder.layer_norm.weight": zeros(640)}, Settings())


@pytest.mark.parametrize("family", ["wav2vec2", "hubert"])
def test_ctc_models_of_both_ages(tmp_path, family):
    letters = [*SPECIAL, "|", "A"]
    inner = {f"w2v_encoder.w2v_model.{name}": x for name, x in transformer(front()).items()}
    head = Weights()
    head.pair("w2v_encoder.proj", len(letters), D)
    tuned = dict(_name=f"{family}_ctc", dropout=0.3, layerdrop=0.1, mask_prob=0.0, final_dropout=0.2)
    nested = dict(model=tuned | dict(w2v_args=cfg(_name=family)), task=dict(normalize=False))
    with modules("fairseq.data.dictionary.Dictionary"):
        state = dict(target_dictionary=fairseq_dictionary(letters))
        content, storages = dump(dict(cfg=nested, model=inner | head, task_state=state))
    path = tmp_path / "new.pt"
    path.write_bytes(zipped(members(content, storages)))
    found = read_fairseq(path)
    stem = dict(wav2vec2="Wav2Vec2", hubert="Hubert")[family]
    assert (found.config["architectures"], found.config["vocab_size"]) == ([f"{stem}ForCTC"], 6)
    assert found.about["vocabulary"] == letters
    assert found.config | dict(hidden_dropout=0.3, layerdrop=0.1, final_dropout=0.2) == found.config
    assert found.config | dict(apply_spec_augment=False, mask_time_prob=0.05) == found.config  # see _training
    assert f"{family}.encoder.layers.0.attention.q_proj.weight" in found.state
    np.testing.assert_array_equal(found.state["lm_head.weight"], head["w2v_encoder.proj.weight"])
    # Before 2021: settings in one, and letters in a file of their own.
    flat = CFG | dict(_name=None, arch=family, normalize=False)
    args = dict(arch="wav2vec_ctc", w2v_args=flat, normalize=False)
    old = saved(tmp_path, dict(args=args, model=inner | head), stream=True)
    assert read_fairseq(old).about["vocabulary"] is None
    (tmp_path / "dict.ltr.txt").write_text("| 94\nA 51\n")
    assert read_fairseq(old, tmp_path / "dict.ltr.txt").about["vocabulary"] == letters
    (tmp_path / "dict.ltr.txt").write_text("| 94\nA 51\nB 2\n")
    with pytest.raises(UserError, match=r"has 6 outputs, \S+dict.ltr.txt 7 symbols"):
        read_fairseq(old, tmp_path / "dict.ltr.txt")


def test_what_has_no_place_is_kept(tmp_path):
    weights = transformer(front("layer"), stacked=True)
    weights.pair("final_proj.0", D, D)
    teacher = {"layers.0.fc1.weight": np.ones((F, D), np.float32)}
    found = read_fairseq(saved(tmp_path, dict(cfg=cfg(), model=dict(weights) | {"_ema": teacher})))
    assert found.others.keys() == {"final_proj.0.weight", "final_proj.0.bias", "_ema.layers.0.fc1.weight"}
    decoder = {f"encoder.w2v_model.{k}": x for k, x in transformer(front()).items()} | {"decoder.x": np.ones(3)}
    found = read_fairseq(saved(tmp_path, dict(cfg=cfg(), model=decoder)))
    assert (list(found.others), found.config["architectures"]) == (["decoder.x"], ["Wav2Vec2Model"])


def test_conversions_of_s3prl_and_of_microsoft(tmp_path):
    symbols = [[*SPECIAL, "1", "0", "2"]]
    content = dict(model_cfg=CFG | dict(_name="hubert"), task_cfg=dict(normalize=False), dictionaries_symbols=symbols)
    found = read_fairseq(saved(tmp_path, content | dict(model_weight=dict(hubert(transformer(front()))))))
    assert (found.about["source"], found.about["codes"], found.config["model_type"]) == ("s3prl", symbols, "hubert")
    flat = dict(CFG, normalize=True, max_distance=14, layer_norm_first=True)
    weights = dict(transformer(front("layer"), gated=True))
    found = read_fairseq(saved(tmp_path, dict(cfg=flat, model=weights)))
    expected = dict(num_buckets=16, max_bucket_distance=14, num_attention_heads=3, do_normalize=True)
    assert found.config | expected == found.config
    assert (found.about["source"], found.about["guessed"]) == ("wavlm", [])


# ---- what is refused


def _without(weights: Weights, name: str) -> dict[str, np.ndarray]:
    return {key: x for key, x in weights.items() if key != name}


def _base(**more: Any) -> dict[str, Any]:
    return dict(transformer(front())) | more


ONE = np.ones((2, 2), np.float32)
REFUSED = {
    "mockingjay": (dict(Config={}, Transformer={"x": ONE}, SpecHead={}), "is Mockingjay, TERA or AudioALBERT of s3prl"),
    "distiller": (dict(Config={}, Distiller={"x": ONE}), "is DistilHuBERT of s3prl"),
    "transformers": ({"wav2vec2.feature_projection.projection.weight": ONE}, "is a model of transformers; give its"),
    "data2vec 2": (dict(model={"modality_encoders.AUDIO.x": ONE}), "is data2vec 2.0"),
    "wav2vec 1": (dict(model={"feature_aggregator.conv.weight": ONE}), "is wav2vec 1.0"),
    "other": (dict(model={"decoder.embed": ONE}), "no speech encoder of fairseq: it holds 'decoder.embed'"),
    "number": (3, "it holds one int"),
    "empty": ({}, "nothing that has a name"),
    "unknown array": (dict(cfg=cfg(), model=_base(**{"encoder.layers.0.adapter.weight": ONE})), "has no place"),
    "quantized input": (dict(cfg=cfg(), model=_base(**{"project_inp.weight": ONE})), "has no place"),
    "layer": (dict(cfg=cfg(), model={k: x for k, x in _base().items() if "layers.0." not in k or "conv" in k}),
              r"it has no encoder\.layers\.0"),
    "norm": (dict(cfg=cfg(), model=_without(transformer(front()), "encoder.layer_norm.weight")),
             r"it has no encoder\.layer_norm\.weight"),
    "rank": (dict(cfg=cfg(), model=_base(**{"encoder.layers.0.fc1.weight": ONE[0]})), r"has shape \(2,\)"),
    "heads": (dict(cfg=cfg(encoder_attention_heads=4), model=_base()), "4 heads in a width of 6"),
    "text": (dict(cfg=cfg(encoder_attention_heads="3"), model=_base()), "encoder_attention_heads is no number"),
    "endless": (dict(cfg=cfg(mask_prob=float("nan")), model=_base()), "mask_prob is no number that makes sense"),
    "activation": (dict(cfg=cfg(activation_fn="relu"), model=_base()), "its activation is 'relu'"),
    "convolutions": (dict(cfg=cfg(conv_feature_layers="[(4, 10, 5)] + [(4, 2, 2)]"), model=_base()), "but have"),
    "program": (dict(cfg=cfg(conv_feature_layers="__import__('os').abort()"), model=_base()), "is not understood"),
    "bomb": (dict(cfg=cfg(conv_feature_layers="[(4, 10, 5)] * 10 ** 12"), model=_base()), "is not understood"),
    "deep": (dict(cfg=cfg(conv_feature_layers="[" * 400), model=_base()), "is not understood"),
    "pre-norm data2vec": (
        dict(cfg=cfg(layer_norm_first=True), model=dict(transformer(front("layer"), stacked=True))),
        "layer_norm_first=True, which Data2VecAudio of transformers never has",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_foreign_files_are_one_line(tmp_path, name):
    content, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as error:
        read_fairseq(saved(tmp_path, content))
    assert "\n" not in str(error.value)
    read_fairseq(saved(tmp_path, dict(cfg=cfg(), model=_base())))  # negative control


def test_settings_in_a_circle(tmp_path):
    circle = cfg()
    circle["model"]["w2v_args"] = circle
    found = read_fairseq(saved(tmp_path, dict(cfg=circle, model=_base())))
    assert found.config["num_attention_heads"] == 3


def test_letters_need_a_head(tmp_path):
    (tmp_path / "dict.ltr.txt").write_text("A 1\n")
    with pytest.raises(UserError, match="it is no CTC model"):
        read_fairseq(saved(tmp_path, dict(cfg=cfg(), model=_base())), tmp_path / "dict.ltr.txt")


def test_dictionaries(tmp_path):
    file = tmp_path / "dict.txt"
    file.write_text("| 10\nE 9\nein wort 3\n<s> 1 #fairseq:overwrite\n", encoding="utf-8")
    assert read_dictionary(file) == [*SPECIAL, "|", "E", "ein wort"]
    file.write_text("| 10\nE\n")
    with pytest.raises(UserError, match=r"dict\.txt:2: 'E' is no symbol and its count"):
        read_dictionary(file)
    file.write_bytes(b"\xff\xfe 1\n")
    with pytest.raises(UserError, match="no text in UTF-8"):
        read_dictionary(file)
    with pytest.raises(UserError, match="no such file"):
        read_dictionary(tmp_path / "no.txt")


def test_mutations_are_checkpoints_or_one_line(tmp_path):
    """Of a file without checksums: flips in its pickles, where names, shapes and settings are."""
    real = (GOLDEN / "fairseq_ctc.pt").read_bytes()
    weights = read_torch(GOLDEN / "fairseq_ctc.pt")["model"].values()
    end = len(real) - sum(array.nbytes + 8 for array in weights)  # each with its length, behind the pickles
    rng = np.random.default_rng(0)
    read = 0
    for _ in range(150):
        data = bytearray(real)
        for at in rng.integers(0, end, rng.integers(1, 3)):
            data[at] = rng.integers(256)
        (tmp_path / "x.pt").write_bytes(data)
        try:
            json.dumps(read_fairseq(tmp_path / "x.pt").about)
            said = ""
        except UserError as error:
            said = str(error)
        read += not said
        assert "\n" not in said
    assert 5 < read < 145
