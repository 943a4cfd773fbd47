"""The speech encoder: padding, stacking, recomputation, layer drop, hidden states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SAMPLES, FRAMES = 500, 24
LENGTHS = jnp.array([500, 261, 0], jnp.int32)
KINDS = {
    "base": dict(norm="post"),
    "large": dict(norm="pre", frontend=dict(norm="layer", bias=True, normalize=True)),
}


@pytest.fixture(scope="module")
def audio() -> jax.Array:
    return jax.random.randint(jax.random.key(0), (3, SAMPLES), -9000, 9000).astype(jnp.int16)


@pytest.fixture(scope="module", params=KINDS)
def model(request, tiny_encoder, audio):
    """(encoder, parameters away from their start, jitted `run(audio, lengths)` with hidden states)."""
    encoder = tiny_encoder(**KINDS[request.param])
    params = jax.jit(lambda: encoder.init(jax.random.key(1), dict(audio=audio, lengths=LENGTHS))["params"])()
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    leaves = [p + jnp.asarray(0.1 * rng.normal(size=p.shape), jnp.float32) for p in leaves]
    params = jax.tree.unflatten(tree, leaves)
    run = jax.jit(lambda a, n: encoder.apply({"params": params}, dict(audio=a, lengths=n), hidden=True))
    return encoder, params, run


def test_hidden_states_are_the_first_input_and_every_layer(model, audio):
    encoder, params, run = model
    frames, lengths, hidden = run(audio, LENGTHS)
    assert frames.shape == (3, FRAMES, 64) and len(hidden) == encoder.layers + 1
    np.testing.assert_array_equal(lengths, [24, 12, 0])
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(hidden, hidden[1:], strict=False))
    last = np.asarray(hidden[-1], np.float64)
    if encoder.norm == "post":
        np.testing.assert_array_equal(frames, hidden[-1])
    else:
        scale, bias = (np.asarray(params["transformer"]["norm"][k]) for k in ("scale", "bias"))
        normed = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-5) * scale + bias
        np.testing.assert_allclose(frames[0], normed[0], atol=1e-5)  # float32
        assert np.abs(frames - hidden[-1]).max() > 0.1
    without = encoder.apply({"params": params}, dict(audio=audio, lengths=LENGTHS))
    assert without.hidden == []
    np.testing.assert_allclose(without.frames, frames, atol=1e-5)  # compiled otherwise


def test_padding_changes_nothing(model, audio):
    _, _, run = model
    base = run(audio, LENGTHS)
    outside = np.arange(FRAMES)[None] >= base.lengths[:, None]
    for state in [base.frames, *base.hidden]:
        assert (np.asarray(state)[outside] == 0).all() and np.isfinite(state).all()
    noise = jnp.where(jnp.arange(SAMPLES)[None] < LENGTHS[:, None], audio, -audio[::-1])
    assert (noise != audio).any()
    jax.tree.map(np.testing.assert_array_equal, base, run(noise, LENGTHS))
    other = run(audio.at[1, 130].add(5000), LENGTHS)
    assert np.abs(other.frames - base.frames)[1, :12].max(axis=-1).min() > 1e-4, "negative control: attention spreads it"
    np.testing.assert_array_equal(other.frames[0], base.frames[0])


def test_a_longer_row_changes_nothing(model, audio):
    """The same utterances in a bucket of 680 samples; other shapes, other summation order: float32."""
    _, _, run = model
    longer = jnp.concatenate([audio, audio[:, :180]], axis=1)
    for a, b in zip(run(audio, LENGTHS).hidden, run(longer, LENGTHS).hidden, strict=True):
        np.testing.assert_allclose(a, b[:, :FRAMES], atol=2e-5)
    cut = run(longer, LENGTHS.at[0].add(40))
    assert np.abs(cut.frames[0, :FRAMES] - run(audio, LENGTHS).frames[0]).max() > 1e-2, "negative control"


def test_masked_frames_are_replaced_by_the_embedding(model, audio):
    encoder, params, run = model
    base = run(audio, LENGTHS)
    mask = jnp.zeros((3, FRAMES), bool).at[0, 3:6].set(True)

    @jax.jit
    def masked(features_noise):
        def body(encoder, batch):
            features, lengths = encoder.extract(batch)
            features = encoder.feature_norm(features) + features_noise
            return encoder.contextualize(features, lengths, mask=mask, train=False)

        return encoder.apply({"params": params}, dict(audio=audio, lengths=LENGTHS), method=body)

    clean = masked(jnp.zeros((3, FRAMES, 1)))
    assert np.abs(clean.frames - base.frames)[0].max() > 1e-2
    hidden = jnp.zeros((3, FRAMES, 1)).at[0, 3:6].set(7.0)
    np.testing.assert_array_equal(masked(hidden).frames, clean.frames)
    seen = hidden.at[0, 6].set(7.0)
    assert np.abs(masked(seen).frames - clean.frames)[0].max() > 1e-2, "negative control: an unmasked frame"


def stacked(params):
    """Unrolled layers `layer0`, `layer1`, ... as the one stacked `layers` of a scan."""
    transformer = dict(params["transformer"])
    layers = [transformer.pop(f"layer{i}") for i in range(2)]
    transformer["layers"] = jax.tree.map(lambda *p: jnp.stack(p), *layers)
    return params | {"transformer": transformer}


def test_scan_and_remat_change_nothing(model, audio, request, tiny_encoder):
    encoder, params, _ = model

    def value_and_gradient(params, scan, remat):
        variant = encoder.clone(scan=scan, remat=remat, parent=None)

        def loss(params):
            out = variant.apply({"params": params}, dict(audio=audio, lengths=LENGTHS), hidden=True)
            return jnp.sum(jnp.sin(out.frames)) + jnp.sum(jnp.cos(out.hidden[1])), out

        (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return out, gradient

    out, gradient = value_and_gradient(params, scan=False, remat=False)
    reference = [out, stacked(gradient)]
    again = value_and_gradient(stacked(params), scan=True, remat=True)
    out, gradient = value_and_gradient(params, scan=False, remat=True)
    for other in ([out, stacked(gradient)], list(again)):
        # Compiled otherwise, so float32 rounds otherwise.
        for a, b in zip(jax.tree.leaves(reference), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(a).max()))
    swapped = {**params["transformer"], "layer0": params["transformer"]["layer1"], "layer1": params["transformer"]["layer0"]}
    wrong = encoder.clone(scan=True, parent=None).apply(
        {"params": stacked(params | {"transformer": swapped})}, dict(audio=audio, lengths=LENGTHS)
    )
    assert np.abs(wrong.frames - reference[0].frames).max() > 1e-2, "negative control: order of the layers"


@pytest.mark.parametrize("scan", [False, True])
def test_layerdrop_skips_layers_of_the_whole_batch(tiny_encoder, audio, scan):
    """Two layers at one half: over many keys exactly four outcomes; both dropped is the stack's own input."""
    encoder = tiny_encoder(norm="post", layerdrop=0.5, scan=scan)
    batch = dict(audio=audio, lengths=LENGTHS)
    params = jax.jit(lambda: encoder.init(jax.random.key(1), batch)["params"])()

    def body(encoder, batch, train):
        features, lengths = encoder.extract(batch)
        return encoder.contextualize(encoder.feature_norm(features), lengths, train=train, hidden=True)

    run = jax.jit(
        lambda seed: encoder.apply(
            {"params": params}, batch, True, method=body, rngs={"layerdrop": jax.random.key(seed)}
        )
    )
    outcomes = set()
    for seed in range(24):
        x, middle, last = (np.asarray(h) for h in run(seed).hidden)
        kept = (x != middle).any(axis=(1, 2)), (middle != last).any(axis=(1, 2))
        assert all(k[0] == k[1] for k in kept), "rows of a batch differ in the layers they drop"
        outcomes.add((bool(kept[0][0]), bool(kept[1][0])))
    assert len(outcomes) == 4  # P(one is missing) < 4 (3/4)^24 = 0.4 %, and the keys are fixed
    evaluate = jax.jit(lambda: encoder.apply({"params": params}, batch, False, method=body))
    x, middle, last = (np.asarray(h) for h in evaluate().hidden)
    assert (x != middle).any() and (middle != last).any(), "evaluation drops nothing"


def test_layerdrop_of_one_makes_the_stack_the_identity(tiny_encoder, audio):
    encoder = tiny_encoder(norm="pre", layerdrop=1.0)
    batch = dict(audio=audio, lengths=LENGTHS)
    params = jax.jit(lambda: encoder.init(jax.random.key(1), batch)["params"])()

    def body(encoder, batch, train):
        features, lengths = encoder.extract(batch)
        return encoder.contextualize(encoder.feature_norm(features), lengths, train=train, hidden=True)

    rngs = {"layerdrop": jax.random.key(0)}
    run = jax.jit(lambda p: encoder.apply({"params": p}, batch, True, method=body, rngs=rngs))
    out = run(params)
    for state in out.hidden[1:]:
        np.testing.assert_array_equal(state, out.hidden[0])


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "activation_dropout", "input_dropout"])
def test_every_dropout_acts_in_training_only(tiny_encoder, audio, name):
    encoder = tiny_encoder(**{name: 0.5}, layers=1)
    batch = dict(audio=audio, lengths=LENGTHS)

    def body(encoder, batch, train):
        features, lengths = encoder.extract(batch)
        return encoder.contextualize(encoder.feature_norm(features), lengths, train=train).frames

    @jax.jit
    def run(key):
        params = encoder.init(jax.random.key(1), batch)
        on, off = (encoder.apply(params, batch, t, method=body, rngs={"dropout": key}) for t in (True, False))
        return on, off

    (on, off), (again, _), (other, off_too) = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(on, again)
    np.testing.assert_array_equal(off, off_too)
    assert np.abs(on - other).max() > 1e-3 and np.abs(on - off).max() > 1e-3


def test_bfloat16_keeps_parameters_and_norms_in_float32(tiny_encoder, audio):
    encoder = tiny_encoder(dtype="bfloat16", frontend=dict(norm="layer", bias=True), norm="pre")
    batch = dict(audio=audio, lengths=LENGTHS)
    out, variables = jax.eval_shape(
        lambda: encoder.init_with_output(jax.random.key(0), batch, hidden=True)
    )
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert {x.dtype for x in [out.frames, *out.hidden]} == {jnp.dtype("bfloat16")}


def test_unknown_names_are_named(tiny_encoder, audio):
    batch = dict(audio=audio, lengths=LENGTHS)
    for settings, message in ((dict(norm="rms"), "'rms'.*'post' or 'pre'"), (dict(frontend={"name": "mel"}), "'mel'.*waveform")):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda s=settings: tiny_encoder(**s).init(jax.random.key(0), batch))
