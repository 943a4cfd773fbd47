"""Encoders of patches have several tokens at one time: what names single frames refuses them."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from speechjax.errors import UserError
from speechjax.evals import _frames
from speechjax.labelling import features
from tests.tasks.experiments import experiment


def test_tokens_are_those_of_a_column():
    """Ten hops of audio become ten times as many tokens as there are at one time."""
    for name, tokens in (("mae-patches", 2), ("mae", 1), ("hubert", 1)):
        encoder = experiment(name)[1].encoder
        hop, extra = encoder.frame_len()
        assert encoder.tokens() == tokens
        samples = 10 * hop + extra
        audio = jax.ShapeDtypeStruct((1, samples), np.int16)
        batch = dict(audio=audio, lengths=jax.ShapeDtypeStruct((1,), np.int32))
        batch |= {key: jax.ShapeDtypeStruct((1,), np.float32) for key in ("mean", "std")}
        call = lambda batch, encoder=encoder: encoder.init_with_output(  # noqa: E731
            {"params": jax.random.key(0)}, batch, train=False
        )[0]
        assert jax.eval_shape(call, batch).frames.shape[1] == 10 * tokens


def test_patches_have_no_units_and_no_phones(monkeypatch):
    _, task = experiment("mae-patches")
    with pytest.raises(UserError, match=r"2 tokens at one time.*leave out abx and units"):
        _frames.encoder_features(SimpleNamespace(task=task), [0])  # type: ignore[arg-type]
    monkeypatch.setattr(features, "open_run", lambda *args: SimpleNamespace(task=task))
    with pytest.raises(UserError, match="--features=run: its encoder has 2 tokens at one time"):
        features.hidden("run", 0, jax.make_mesh((1,), ("data",)))
