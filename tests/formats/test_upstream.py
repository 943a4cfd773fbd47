"""The upstream of s3prl, as its featurizer uses one.  Needs torch, which the project does not."""

import numpy as np
import pytest

import speechjax

torch = pytest.importorskip("torch", reason="the upstream of s3prl needs torch")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_hidden_states_of_a_batch_are_those_of_its_rows(workdirs):
    from speechjax.upstream import UpstreamExpert

    model = speechjax.load(workdirs / "hubert")
    upstream = UpstreamExpert(str(workdirs / "hubert"), refresh=False)
    rows = [(0.1 * np.random.default_rng(k).normal(size=n)).astype(np.float32) for k, n in enumerate((7000, 4321))]
    found = upstream([torch.from_numpy(row) for row in rows])
    states = found["hidden_states"]
    assert len(states) == model.layers + 1
    assert upstream.get_downsample_rates("hidden_states") == 320
    # What s3prl's featurizer asserts: lengths by the rate, within five frames.
    assert abs(states[0].shape[1] - round(7000 / 320)) < 5
    for k, state in enumerate(states):
        assert state.shape == (2, model.frames(7000), model.width)
        for row, audio in zip(state.numpy(), rows, strict=True):
            alone = model.features(audio, layer=k)
            np.testing.assert_allclose(row[: len(alone)], alone, atol=1e-5)
            assert not row[len(alone) :].any()
    assert found["last_hidden_state"] is states[-1]
    assert not any(parameter.requires_grad for parameter in upstream.parameters())
