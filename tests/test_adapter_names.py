"""Adapters under other names: alone each does what it did, and several go into one run."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from speechjax import adapter
from speechjax.adapter_files import attach, load_adapter
from speechjax.errors import UserError
from speechjax.warm_start import warm_start
from tests.adapting import BIAS, IA3, LORA, build, features, flat, opened, write_base, write_run

pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory)


@pytest.fixture(scope="module")
def tuned(base):
    """Fine-tunes `base` as if: what was there is kept, leaves of adapters and the head are drawn, times `scale`."""

    def make(workdir: Path, *adapters: dict[str, Any], scale: float = 1.0) -> Path:
        config, _, params = build("hubert", *adapters)
        params, _ = warm_start(jax.tree.map(lambda x: scale * x, params), {}, str(base))
        return write_run(workdir, config, params)

    return make


def saved(workdir: Path, out: Path, *arguments: str) -> Path:
    adapter.run(["save", f"--workdir={workdir}", f"--out={out}", *arguments])
    return out


def merged(base: Path, out: Path, *files: Path) -> Path:
    adapter.run(["merge", f"--workdir={base}", *(f"--adapter={file}" for file in files), f"--out={out}"])
    return out


def test_two_of_one_name_stack_under_new_names(base, tuned, tmp_path):
    """LoRAs add up, so that in the stack each changes the weights as it does alone."""
    runs, files, alone = {}, {}, {}
    for name, scale in (("one", 1.0), ("two", 3.0)):
        runs[name] = tuned(tmp_path / name, LORA, scale=scale)
        files[name] = saved(runs[name], tmp_path / f"{name}.safetensors", f"--name={name}")
        assert load_adapter(files[name]).adapters == [dict(LORA, dropout=0.0, name=name)]
        alone[name] = opened(merged(base, tmp_path / f"{name}-merged", files[name]))
    np.testing.assert_allclose(features(alone["two"]), features(opened(runs["two"])), atol=1e-5)  # float32
    both = flat(opened(merged(base, tmp_path / "both", *files.values())).variables["params"])
    ours = flat(opened(base).variables["params"])
    one, two = (flat(alone[name].variables["params"]) for name in ("one", "two"))
    assert both.keys() == ours.keys()
    for path, kernel in both.items():
        np.testing.assert_allclose(kernel - one[path], two[path] - ours[path], atol=1e-5, err_msg=path)  # float32
    for path in (path for path in both if path.endswith("query/kernel")):
        assert min(np.abs(x[path] - ours[path]).max() for x in (one, two)) > 1e-2, "negative control"

    with pytest.raises(
        UserError, match=r"another encoder: .*, so give all at once, --adapter=ONE --adapter=TWO, to the"
    ):
        merged(tmp_path / "one-merged", tmp_path / "m", files["two"])
    low = [saved(runs[name], tmp_path / f"low-{name}.safetensors") for name in runs]
    with pytest.raises(UserError, match=r"two are named 'low': save one of them anew with --name=NEW"):
        merged(base, tmp_path / "m", *low)
    assert not (tmp_path / "m").exists()


def test_names_that_are_taken_or_unclear_are_refused(tuned, tmp_path):
    one, pair = tuned(tmp_path / "one", LORA), tuned(tmp_path / "pair", LORA, IA3)
    plain, same = saved(one, tmp_path / "plain.safetensors"), saved(one, tmp_path / "same.safetensors", "--name=low")
    assert same.read_bytes() == plain.read_bytes()
    file = saved(pair, tmp_path / "x.safetensors", "--name=low=scales", "--name=scales=low")  # exchanged
    assert [block["name"] for block in load_adapter(file).adapters] == ["scales", "low"]
    names = {name.rpartition("/")[2] for name in load_adapter(file).leaves}
    assert names == {"lora_scales_a", "lora_scales_b", "ia3_low_scale"}
    for workdir, name, message in (
        (one, "a=b", r"no adapter 'a'; there are lora 'low'"),
        (one, "a_b", r"name='a_b' must be letters, digits and -"),
        (pair, "new", r"has 2 adapters \(low, scales\): say --name=OLD=new"),
        (pair, "scales=low", r"two are named 'low'"),
    ):
        with pytest.raises(UserError, match=message):
            saved(workdir, tmp_path / "no.safetensors", f"--name={name}")
    assert not (tmp_path / "no.safetensors").exists()


def test_what_two_replace_is_refused(base, tuned, tmp_path):
    """Or the biases of the second would be those of the first too, and nobody would know."""
    workdir = tuned(tmp_path / "run", BIAS)
    files = [load_adapter(saved(workdir, tmp_path / f"{n}.safetensors", f"--name={n}")) for n in ("one", "two")]
    params = opened(base).variables["params"]
    with pytest.raises(UserError, match=r"two.safetensors and \S+one.safetensors both replace encoder/\S+bias: use"):
        attach(params, files)
    with pytest.raises(UserError, match=r"one.safetensors and bias 'mine' both replace"):
        attach(params, files[:1], own=[dict(BIAS, name="mine")])
    attach(params, files[:1], own=[LORA])  # negative control: which replaces nothing
