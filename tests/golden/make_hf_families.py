"""Writes hf_families.npz: weights and answers of tiny random models of every family and class of `transformers`.

Needs torch and transformers: `pip install torch transformers==5.23.0`, then
`PYTHONPATH=.:tests/formats python tests/golden/make_hf_families.py`.  See tests/formats/hf_golden.py for what is in it,
tests/formats/hf_models.py for the models.
"""

from typing import Any

import numpy as np
from hf_golden import COVERED, FILE, pack
from hf_models import VARIANTS, make_inputs, suffixes, their_answers, their_model

from speechjax.formats.families import FAMILIES

UNUSED = {"wav2vec2-conformer": "encoder.pos_conv_embed."}  # what models own and never call
CONSTANT = ("inv_freq", "num_batches_tracked")


def numbers(model: Any) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def make(config: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(weights, answers) of one variant, all classes with one encoder."""
    family, inputs = FAMILIES[config["model_type"]], make_inputs(config)
    base = their_model(config, "Model")
    encoder = numbers(base)
    said = their_answers(base, inputs)
    skipped = UNUSED.get(family.model_type, "nothing")
    weights = {k: v for k, v in encoder.items() if not k.startswith(skipped) and not k.endswith(CONSTANT)}
    found = {k: v for k, v in said.items() if k != "last"}
    if not np.array_equal(said["last"], said["hidden2"]):
        found["Model/last"] = said["last"]
    for suffix in suffixes(family.model_type)[1:]:
        model = their_model(config, suffix)
        inside = {name: name.removeprefix(family.prefix) for name in model.state_dict()}
        inside = {name: ours for name, ours in inside.items() if ours in encoder}
        assert len(inside) == len(encoder)
        state = model.state_dict()
        for name, ours in inside.items():
            state[name].copy_(base.state_dict()[ours])
        weights |= {f"{suffix}/{k}": v for k, v in numbers(model).items() if k not in inside}
        said = their_answers(model, inputs)
        for key, value in said.items():
            if key.startswith("hidden"):
                np.testing.assert_array_equal(value, found[key])
            else:
                found[f"{suffix}/{key}"] = value
    for value in weights.values():
        np.testing.assert_array_equal(value.astype(np.float16).astype(np.float32), value)
    return weights, found


if __name__ == "__main__":
    content = {}
    for variant in COVERED:
        made = dict(zip(("weights", "answers"), make(VARIANTS[variant]), strict=True))
        for what, arrays in made.items():
            packed = pack(arrays, np.float16 if what == "weights" else np.float32)
            content |= {f"{variant}/{what}/{key}": value for key, value in packed.items()}
        print(variant, {what: sum(x.size for x in arrays.values()) for what, arrays in made.items()})
    np.savez_compressed(FILE, **content)
    print(FILE.name, FILE.stat().st_size // 1024, "KiB")
