"""Frames of a stream, step by step, against the frames of the whole recording."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechjax.decode import ctc
from speechjax.errors import UserError
from speechjax.models import spectral
from speechjax.models.encoder import SpeechEncoder
from speechjax.models.spectral import OnlineNorm
from speechjax.models.streaming import Streamer
from speechjax.tasks.ctc import CTC
from tests.drawing import draw_params
from tests.tasks.experiments import experiment

MEL = dict(name="mel", n_mels=8, factor=1, normalize="online")
CONV_MEL = dict(
    name="mel", n_mels=8, factor=4, normalize="online", subsample="conv", conv_channels=4, embedding=12
)  # fmt: skip
CONV = dict(name="conv", kernel=6, groups=2)
CONFORMER = dict(name="conformer", kernel=5)
LIMITED = dict(chunk=4, left=2)
# What it is, and frames of a step.
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "rotary": (dict(attention=dict(positions="rotary", **LIMITED)), 4),
    "alibi, chunks of one": (dict(attention=dict(positions="alibi", chunk=1, left=5)), 3),
    "gated buckets": (
        dict(attention=dict(positions="buckets", gated=True, buckets=8, max_distance=12, chunk=2, left=3), scan=False),
        4,
    ),
    "sinusoidal, a step of two chunks": (dict(attention=LIMITED, positions=dict(name="sinusoidal")), 8),
    "conv, normalised waveform": (
        dict(attention=LIMITED, positions=CONV, norm="post", frontend=dict(normalize=True)),
        4,
    ),
    "deep conv, no chunk to the left": (dict(attention=dict(chunk=4, left=0), positions=CONV | dict(depth=2)), 4),
    "conformer on mel": (dict(attention=dict(positions="relative", **LIMITED), block=CONFORMER, frontend=CONV_MEL), 4),
    "gru": (dict(attention={}, block=dict(name="gru"), frontend=MEL), 5),
    "lstm": (dict(attention={}, block=dict(name="blstm", bidirectional=False)), 7),
    "blstm in chunks": (dict(attention=dict(chunk=4), block=dict(name="blstm", hidden=5)), 8),
}
STATISTICS = (0.01, 0.2)


def make(settings: dict[str, Any]) -> SpeechEncoder:
    tiny: dict[str, Any] = dict(
        frontend={}, width=16, layers=2, heads=2, mlp=24, norm="pre", positions=dict(name="none"), dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, input_dropout=0.0, layerdrop=0.0, scan=True, remat=False,
        dtype="float32",
    )  # fmt: skip
    wave = dict(name="waveform", channels=(8, 8, 8), kernels=(10, 3, 2), strides=(5, 2, 2), norm="layer")
    model = tiny | settings
    front = model["frontend"]
    return SpeechEncoder(**(model | dict(frontend=front if "name" in front else wave | front)))


def recordings(encoder: SpeechEncoder) -> tuple[np.ndarray, np.ndarray]:
    """Of 21 frames and some samples, of 14 and noise after them, and of less than a window."""
    hop, extra = encoder.frame_len()
    samples = 21 * hop + extra + hop // 2
    audio = np.random.default_rng(0).integers(-9000, 9000, (3, samples)).astype(np.int16)
    return audio, np.array([samples, 14 * hop + extra + 1, hop + extra - 1], np.int32)


def batch_of(audio: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    mean, std = (np.full(len(audio), x, np.float32) for x in STATISTICS)
    return dict(audio=audio, lengths=lengths, mean=mean, std=std)


def params_of(module: Any, *args: Any, **kwargs: Any) -> Any:
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
    assert list(variables) == ["params"], "an encoder has no memory of its own"
    return draw_params(variables["params"])


def steps(streamer: Any, audio: np.ndarray, lengths: np.ndarray):
    """(samples, valid ones) of the steps after the first samples, zeros behind the end of the array."""
    S = streamer.samples_per_step
    for start in range(streamer.first_samples, audio.shape[1], S):
        piece = audio[:, start : start + S]
        piece = np.pad(piece, ((0, 0), (0, S - piece.shape[1])))
        yield piece, np.clip(lengths - start, 0, S).astype(np.int32)


def streamed(streamer: Any, audio: np.ndarray, lengths: np.ndarray, forget: bool = False) -> list[np.ndarray]:
    """Frames of each row, [T, D]; with `forget` the layers begin every step anew."""
    first = streamer.init(audio[:, : streamer.first_samples])
    state, rows = first, [[] for _ in audio]
    for piece, valid in steps(streamer, audio, lengths):
        state = state._replace(memory=first.memory) if forget else state
        state, encoded = streamer.step(state, piece, valid)
        assert encoded.frames.shape[1] == streamer.frames
        for row, frames, n in zip(rows, encoded.frames, encoded.lengths, strict=True):
            row.append(np.asarray(frames)[:n])
    return [np.concatenate(row) for row in rows]


def whole(encoder: SpeechEncoder, params: Any, audio: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    encoded = jax.jit(lambda p, batch: encoder.apply({"params": p}, batch))(params, batch_of(audio, lengths))
    return [np.asarray(x)[:n] for x, n in zip(encoded.frames, encoded.lengths, strict=True)]


def difference(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    assert [len(x) for x in a] == [len(x) for x in b] == [21, 14, 0]
    return max(np.abs(x - y).max(initial=0) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_give_the_frames_of_the_whole_recording(kind):
    settings, frames = KINDS[kind]
    encoder = make(settings)
    audio, lengths = recordings(encoder)
    params = params_of(encoder, batch_of(audio, lengths))
    streamer = Streamer(encoder, {"params": params}, rows=3, frames=frames, statistics=STATISTICS)
    expected = whole(encoder, params, audio, lengths)
    found = streamed(streamer, audio, lengths)
    # float32 of values up to 6 through two layers, sums in another order.
    assert difference(found, expected) < 1e-5
    assert np.abs(expected[0]).max() > 1
    assert difference(streamed(streamer, audio, lengths, forget=True), expected) > 0.01, "negative control: no memory"


def test_the_streaming_config_is_served_as_it_is_trained():
    encoder = experiment("best_rq-streaming")[1].encoder
    audio, lengths = recordings(encoder)
    params = params_of(encoder, batch_of(audio, lengths))
    streamer = Streamer(encoder, {"params": params}, rows=3)
    found, expected = streamed(streamer, audio, lengths), whole(encoder, params, audio, lengths)
    assert difference(found, expected) < 1e-5


@pytest.fixture(scope="module")
def served():
    """(streamer, parameters, audio, frames of the whole recordings)."""
    encoder = make(KINDS["rotary"][0])
    audio, lengths = recordings(encoder)
    params = params_of(encoder, batch_of(audio, lengths))
    return Streamer(encoder, {"params": params}, rows=3), params, audio, whole(encoder, params, audio, lengths)


@pytest.mark.parametrize("wrong", [dict(chunk=4, left=1), dict(chunk=4, left=3), {}])
def test_other_context_is_another_encoder(served, wrong):
    """Negative control of the equality: it would notice one chunk more or less."""
    _, params, _, frames = served
    other = make(dict(attention=dict(positions="rotary", **wrong)))
    assert difference(whole(other, params, *recordings(other)), frames) > 1e-3


def close(found: Any, expected: np.ndarray) -> bool:
    return np.abs(np.asarray(found) - expected).max() < 1e-5  # as above


def test_rows_are_streams_of_their_own(served, monkeypatch):
    """Row 0 goes on; row 1 waits, goes on, and starts anew with another recording; row 2 joins late.  One program."""
    streamer, _, audio, expected = served
    S, first = streamer.samples_per_step, streamer.first_samples
    start = lambda row: audio[row, :first]  # noqa: E731
    piece = lambda row, i: audio[row, first + i * S : first + (i + 1) * S]  # noqa: E731
    silence = np.zeros(S, np.int16)

    def step(state, pieces, samples):
        return streamer.step(state, np.stack(pieces), np.array(samples, np.int32))

    state = streamer.init(np.stack([start(0), start(1), start(2)]))
    state, a = step(state, [piece(0, 0), piece(1, 0), silence], [S, S, 0])
    traced = []
    original = SpeechEncoder.extract
    monkeypatch.setattr(SpeechEncoder, "extract", lambda *args: (traced.append(1), original(*args))[1])
    state, b = step(state, [piece(0, 1), silence, silence], [S, 0, 0])
    state = streamer.reset(state, np.array([False, False, True]), np.stack([start(1), start(0), start(0)]))
    state, c = step(state, [piece(0, 2), piece(1, 1), piece(0, 0)], [S, S, S])
    state = streamer.reset(state, np.array([False, True, False]), np.stack([start(1), start(0), start(1)]))
    state, d = step(state, [piece(0, 3), piece(0, 0), piece(0, 1)], [S, S, S])
    assert not traced
    assert [np.asarray(x.lengths).tolist() for x in (a, b, c, d)] == [[4, 4, 0], [4, 0, 0], [4, 4, 4], [4, 4, 4]]
    for i, x in enumerate((a, b, c, d)):
        assert close(x.frames[0], expected[0][4 * i : 4 * i + 4])
    assert close(a.frames[1], expected[1][:4])
    assert close(c.frames[1], expected[1][4:8])
    for x in (c.frames[2], d.frames[1]):
        assert close(x, expected[0][:4])
    assert close(d.frames[2], expected[0][4:8])


def test_an_incomplete_step_ends_a_row_or_looks_ahead(served):
    streamer, _, audio, expected = served
    S, first, hop = streamer.samples_per_step, streamer.first_samples, streamer.samples_per_step // 4
    state = streamer.init(audio[:, :first])
    state, _ = streamer.step(state, audio[:, first : first + S], np.full(3, S, np.int32))
    piece = audio[:, first + S : first + 2 * S]
    same, early = streamer.step(state, piece, np.array([S - 1, 2 * hop, 0], np.int32))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.asarray(early.lengths).tolist() == [3, 2, 0]
    assert not np.asarray(early.frames[0, 3:]).any()
    assert np.abs(early.frames[0, :3] - expected[0][4:7]).max() > 1e-3, "frames see the last one of their chunk"
    noise = np.where(np.arange(S)[None] < np.array([[S - 1], [2 * hop], [0]]), piece, 999).astype(np.int16)
    np.testing.assert_array_equal(
        streamer.step(state, noise, np.array([S - 1, 2 * hop, 0], np.int32))[1].frames, early.frames
    )
    _, late = streamer.step(same, piece, np.full(3, S, np.int32))
    assert close(late.frames[0], expected[0][4:8])


def test_a_stream_has_the_same_memory_always(served):
    streamer, _, audio, _ = served
    state = streamer.init(audio[:, : streamer.first_samples])
    shapes = lambda s: jax.tree.map(lambda x: (x.shape, x.dtype), s)  # noqa: E731
    kept = shapes(state).memory
    attention = kept["transformer"]["layers"]["attention"]
    assert attention == {
        # rows, layers, left * chunk, heads, width of one
        "keys": ((3, 2, 8, 2, 8), jnp.float32), "values": ((3, 2, 8, 2, 8), jnp.float32),
        "ids": ((3, 2, 8), jnp.int32),
    }  # fmt: skip
    S = streamer.samples_per_step
    for _ in range(20):
        state, encoded = streamer.step(state, audio[:, :S], np.full(3, S, np.int32))
    assert shapes(state).memory == kept
    # The same chunk over and over: two layers see two chunks back each, and nothing drifts after that.
    _, again = streamer.step(state, audio[:, :S], np.full(3, S, np.int32))
    np.testing.assert_array_equal(again.frames, encoded.frames)
    hop, extra = 20, 5 + 5  # kernels of 10 and 3 samples, strides of 5 and 2
    assert (S, streamer.first_samples) == (4 * hop, extra)
    assert streamer.latency_seconds == (4 * hop + extra) / 16000


def test_ctc_of_a_stream_is_that_of_the_recording():
    """Logits, through adapters and an average of the layers, and the best path, decoded as it comes."""
    lora = dict(kind="lora", name="digits", targets="attention/(query|key|value)$")
    settings = KINDS["conformer on mel"][0] | dict(adapters=(lora, dict(kind="prefix", name="task", length=3)))
    encoder = make(settings)
    off: Any = dict(mask_prob=0.0, mask_span=3, channel_mask_prob=0.0, channel_mask_span=4, head_dropout=0.0)
    task = CTC(encoder=encoder, layers="weighted", classes=9, recurrent_layers=0, recurrent_width=1, **off)
    audio, lengths = recordings(encoder)
    batch = dict(audio=audio, lengths=lengths)
    params = params_of(task, batch, method="answer")
    offline: Any = jax.jit(lambda p: task.apply({"params": p}, batch, method="answer"))(params)
    expected = jax.jit(ctc.greedy)(offline["logits"], offline["lengths"])

    streamer: Any = Streamer(encoder, {"params": params["encoder"]}, rows=3, hidden=True)
    decoder = ctc.Greedy(tokens=30)

    @jax.jit
    def decode(found, encoded):
        answer: Any = task.apply({"params": params}, encoded, method="respond")
        return decoder.step(found, answer["logits"], answer["lengths"]), answer["logits"]

    state, found, rows = streamer.init(audio[:, : streamer.first_samples]), decoder.init(3), []
    for piece, valid in steps(streamer, audio, lengths):
        state, encoded = streamer.step(state, piece, valid)
        found, logits = decode(found, encoded)
        rows.append(np.asarray(logits))
    logits = np.concatenate(rows, axis=1)
    for row, n in enumerate(np.asarray(offline["lengths"])):
        np.testing.assert_allclose(logits[row, :n], offline["logits"][row, :n], atol=1e-5)
    streamed = decoder.result(found)
    np.testing.assert_array_equal(streamed.lengths, expected.lengths)
    assert np.asarray(streamed.lengths)[:2].min() > 1
    for row, n in enumerate(np.asarray(expected.lengths)[:, 0]):
        np.testing.assert_array_equal(streamed.tokens[row, 0, :n], expected.tokens[row, 0, :n])
        np.testing.assert_array_equal(streamed.frames[row, 0, :n], expected.frames[row, 0, :n])


def test_online_normalisation_by_its_definition(monkeypatch):
    """Mean and deviation of all frames so far; later weights that decay: frame by frame, in float64."""
    monkeypatch.setattr(spectral, "ONLINE_FRAMES", 7)
    x = np.random.default_rng(0).normal(20, 0.3, (2, 30, 4)).astype(np.float32)
    x[:, :, 3] = 20.7  # does not vary
    program = jax.jit(lambda x: OnlineNorm().apply({}, x))
    run = lambda x: np.asarray(program(x))  # noqa: E731
    y = run(x)
    exact = x.astype(np.float64)
    for n in range(2, 8):
        seen = exact[:, :n, :3]
        np.testing.assert_allclose(y[:, n - 1, :3], (seen[:, -1] - seen.mean(1)) / seen.std(1), atol=2e-6)
    weights = np.zeros(30)
    for n in range(1, 31):
        rate = 1 / min(n, 7)
        weights[: n - 1] *= 1 - rate
        weights[n - 1] = rate
    assert weights.sum() == pytest.approx(1)
    mean = np.einsum("n,bnf->bf", weights, exact)[:, None]
    deviation = np.sqrt(np.einsum("n,bnf->bf", weights, (exact - mean) ** 2))[:, None]
    # float32, of the difference to the first frame.
    np.testing.assert_allclose(y[:, -1:, :3], ((exact[:, -1:] - mean) / deviation)[..., :3], atol=2e-6)
    plain = (exact[:, -1] - exact.mean(1)) / (exact.std(1) + 1e-9)
    assert np.abs(y[:, -1] - plain)[:, :3].max() > 0.01, "negative control: all frames alike"
    assert not y[:, :, 3].any()
    assert not y[:, 0].any()
    later = x.copy()
    later[:, 20:] += 1
    np.testing.assert_array_equal(run(later)[:, :20], y[:, :20])


FULL = dict(attention=dict(positions="rotary"))
UNFIT: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (FULL, dict(frames=4), "config.model.attention: chunk=0 and left=-1"),
    (dict(attention=dict(chunk=4)), {}, "config.model.attention: chunk=4 and left=-1"),
    (dict(attention=LIMITED), dict(frames=6), "6 frames: .* config.model.attention.chunk=4"),
    (dict(attention={}, block=dict(name="gru")), {}, "0 frames"),
    (dict(attention={}, block=dict(name="gru"), positions=CONV), dict(frames=4), "config.model.positions.name='conv'"),
    (dict(attention={}, block=dict(name="blstm")), dict(frames=4), "bidirectional=True"),
    (dict(attention=LIMITED, block=dict(name="deep_speech")), {}, "config.model.block.name='deep_speech'"),
    (dict(attention=LIMITED, frontend=dict(norm="group")), {}, "frontend.norm='group'"),
    (dict(attention=LIMITED, frontend=dict(normalize=True)), {}, "frontend.normalize=True"),
    (dict(attention=LIMITED, frontend=MEL | dict(normalize="utterance")), {}, "frontend.normalize='utterance'"),
    (dict(attention=LIMITED, frontend=MEL | dict(convention="librosa")), {}, "frontend.convention='librosa'"),
    (dict(attention=LIMITED, frontend=dict(name="mfcc")), {}, "frontend.name='mfcc'"),
]


@pytest.mark.parametrize(("settings", "options", "message"), UNFIT, ids=[m for _, _, m in UNFIT])
def test_what_cannot_be_streamed_is_refused(settings, options, message):
    encoder = make(settings)
    audio = np.zeros((1, 4000), np.int16)
    variables = jax.eval_shape(lambda: encoder.init(jax.random.key(0), batch_of(audio, np.array([4000], np.int32))))
    with pytest.raises(UserError, match=message):
        Streamer(encoder, variables, rows=1, **options)
