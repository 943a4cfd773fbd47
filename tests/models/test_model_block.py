"""The model block of a config and the blocks inside: what fits is accepted, every mistake named in one line."""

from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from speechjax import config as configs
from speechjax.errors import UserError

TINY = str(Path(__file__).resolve().parent.parent.parent / "configs/pretrain/wav2vec2.py") + ":size=tiny"


def model(**blocks: Any) -> ConfigDict:
    """The tiny config with other blocks inside its model; None deletes one."""
    config = configs.load(TINY).copy_and_resolve_references()
    config.unlock()
    for name, block in blocks.items():
        if name in config.model:
            del config.model[name]
        if block is not None:
            config.model[name] = ConfigDict(block) if isinstance(block, dict) else block
    return config


@pytest.mark.parametrize(
    "blocks",
    [
        {},
        dict(attention=None, block=None),
        dict(positions=dict(kernel=19, groups=16, depth=5)),
        dict(positions=dict(name="sinusoidal")),
        dict(positions=dict(name="none"), attention=dict(positions="buckets", gated=True, buckets=320)),
        dict(attention=dict(positions="relative", chunk=16, left=4)),
        dict(block=dict(name="transformer")),
        dict(block=dict(name="conformer", kernel=15), attention=dict(positions="relative")),
        dict(block=dict(name="gru")),
        dict(frontend=dict(name="mel", n_mels=80)),
    ],
)
def test_what_fits_builds_the_task(blocks):
    config = model(**blocks)
    configs.check(config)
    encoder = configs.make_task(config).encoder
    for name, block in blocks.items():
        if block is not None:
            assert dict(getattr(encoder, name)) == block


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (dict(positions=dict(name="learned")), r"positions\.name='learned': there are conv, sinusoidal, none"),
        (dict(positions=dict(name="sinusoidal", kernel=3)), r"positions has no 'kernel'; allowed: $"),
        (dict(attention=dict(positions="rope")), r"attention\.positions='rope': there are none, rotary"),
        (dict(attention=dict(chunks=3)), r"attention has no 'chunks'; allowed: .*chunk, gated, .*left"),
        (dict(attention=dict(left=3)), "left needs a chunk"),
        (dict(block=dict(name="lstm")), r"block\.name='lstm': there are transformer, conformer, gru"),
        (dict(block=dict(name="transformer", kernel=3)), r"block has no 'kernel'"),
        (dict(block=dict(name="transformer", heads=3)), r"block has no 'heads'"),
        (dict(frontend=dict(name="melody")), r"frontend\.name='melody': there are waveform, mel, mfcc, patch"),
        (dict(frontend=dict(name="mel", kernels=(3,))), r"frontend has no 'kernels'; allowed: .*n_mels"),
    ],
)
def test_mistakes_are_named(blocks, message):
    with pytest.raises(UserError, match=message) as caught:
        configs.check(model(**blocks))
    assert str(caught.value).startswith("config.model.")
    assert "\n" not in str(caught.value)
