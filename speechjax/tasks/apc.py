"""Autoregressive predictive coding (Chung et al. 2019, arXiv 1904.03240): a frame ahead, from the past alone.

Shapes: B batch, N frames of 10 ms, F features of one, k frames stacked, T = N // k, C = k F, D width, V codes,
P = 8 F + 1 inputs of the linear control.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from speechjax.audio.waveform import EXACT
from speechjax.errors import UserError
from speechjax.models.ema import mean_deviation
from speechjax.models.encoder import Encoded
from speechjax.models.layers import fan_in_uniform, frame_mask
from speechjax.models.quantizer import GumbelQuantizer
from speechjax.models.spectral import stack_frames
from speechjax.tasks._base import Sums, sow_sum
from speechjax.tasks._contrastive import codebook_perplexity
from speechjax.tasks._frames import FrameTask, batch_mean, constant_output_alarm

PAST = 8  # frames the linear control sees
CONTROL_DECAY = 0.999  # an update: the control remembers about a thousand batches
CONTROL_RIDGE = 1e-3  # of a feature's variance; of speech it leaves all but the least of 640 directions as they are
CONTROL_EVERY = 20  # updates between two solutions


class APC(FrameTask):
    """Batch of a causal `SpeechEncoder` with a spectral front end -> ({loss: (sum, weight)}, {metric: (sum, weight)}).

    From frame t of the encoder, which has seen input frames before (t + 1) k, one linear map predicts the k input
    frames from t k + `shift` on; the loss is the mean absolute error over frames whose targets lie in the utterance.
    With `model.layers=0` the map reads the stacked input frame itself and nothing else.  With `codes` (0: none) the
    last layer's output passes a Gumbel-softmax codebook of that many first (VQ-APC, Chung et al. 2020, arXiv
    2005.08392, section 3), at the temperature `code_temperature`.

    In the same batch, as controls: the mean target of the batch (chance), the last input frame seen (copy), and least
    squares from the last eight frames (linear).  The linear control is solved from running normal equations in the
    collection "control", so it is judged on batches it has not been fitted to, has no learning rate of its own, and
    takes no part in the loss; a layer trained beside the model would be behind the optimum as long as the model is.

    What still looks ahead: the normalisation of the input over the utterance, as published
    (`frontend.normalize="none"` has none), and the deltas of an "mfcc" front end, by up to four frames.
    Raises UserError for encoders that see the future, for `shift` below k, and for packed rows.
    """

    shift: int
    codes: int
    code_temperature: float

    rngs = ("dropout", "gumbel", "layerdrop")

    def setup(self):
        k = self.encoder.subsampling()
        check_causal(self.encoder)
        if self.shift < k:
            raise UserError(
                f"config.task.shift={self.shift} is below config.model.frontend.factor={k}: the encoder has seen what "
                "it is to predict; raise the shift"
            )
        self.frame_size = k * self.encoder.front.n_features
        init = fan_in_uniform(self.encoder.width if self.encoder.layers else self.frame_size)
        self.head = nn.Dense(self.frame_size, kernel_init=init, bias_init=init, dtype=jnp.float32)
        if self.codes:
            self.quantizer = GumbelQuantizer(1, self.codes, self.encoder.width)

    def encode(self, x: jax.Array, lengths: jax.Array, *, train: bool, hidden: bool | str = False) -> Encoded:
        if self.encoder.layers:
            return super().encode(x, lengths, train=train, hidden=hidden)
        frames, lengths = stack_frames(x, lengths, self.encoder.subsampling())
        return Encoded(frames, lengths, [frames] if hidden else [])

    def __call__(self, batch: dict[str, jax.Array], *, step: jax.Array, train: bool) -> tuple[Sums, Sums]:
        x, lengths = self.encoder.inputs(batch)
        output, codes = self._predict(x, lengths, train)
        target, counts = self._targets(x, lengths)
        weight = frame_mask(counts, target.shape[1]).astype(jnp.float32)
        n = jnp.sum(weight)
        elements = n * self.frame_size

        def errors(guess):
            difference = (guess - target) * weight[..., None]
            return jnp.sum(jnp.abs(difference)), jnp.sum(jnp.square(difference))

        def root(square):
            return jnp.sqrt(square / jnp.maximum(elements, 1)) * n, n

        absolute, square = errors(output)
        mean, copy, linear = (
            errors(guess) for guess in (batch_mean(target, weight), self._copy(x), self._linear(x, target, weight))
        )
        one = jnp.ones(())
        metrics = {
            "chance_prediction": (mean[0], elements),
            # Of the batch; over several it is their mean, and the root of `mse` is that of all frames.
            "mse": (square, elements),
            "rmse": root(lax.stop_gradient(square)),
            "chance_rmse": root(mean[1]),
            "copy_error": (copy[0], elements),
            "copy_rmse": root(copy[1]),
            "linear_error": (linear[0], elements),
            "linear_rmse": root(linear[1]),
            "output_deviation": (mean_deviation(lax.stop_gradient(output), weight), one),
            "target_deviation": (mean_deviation(target, weight), one),
        }
        return {"prediction": (absolute, elements)}, metrics | self._code_metrics(codes, weight > 0)

    def _predict(self, x, lengths, train) -> tuple[jax.Array, Any]:
        """From every frame what it says of its target, float32 [B, T, C], and its code."""
        y, codes = self.encode(x, lengths, train=train).frames.astype(jnp.float32), None
        if self.codes:
            codes = self.quantizer(y, jnp.float32(self.code_temperature), train=train)
            y = codes.vectors
        return self.head(y), codes

    def _targets(self, x, lengths):
        """Input frames from t k + shift on: [B, N, F], [B] -> [B, T, C], and how many of them there are [B]."""
        k = self.encoder.subsampling()
        ahead, counts = stack_frames(x[:, self.shift :], jnp.maximum(lengths - self.shift, 0), k)
        return jnp.pad(ahead, ((0, 0), (0, x.shape[1] // k - ahead.shape[1]), (0, 0))), counts

    def _copy(self, x):
        """The last input frame seen, k times: [B, N, F] -> [B, T, C]."""
        k = self.encoder.subsampling()
        return jnp.tile(x[:, k - 1 :: k][:, : x.shape[1] // k], (1, 1, k))

    @nn.compact  # its state is as wide as the input
    def _linear(self, x, target, weight):
        """The linear control's guess, float32 [B, T, C]; sows what the next solution is made of."""
        past_BxTxP = last_frames(x, self.encoder.subsampling())
        P, C = past_BxTxP.shape[2], target.shape[2]
        shapes = dict(gram=(P, P), cross=(P, C), weights=(P, C))
        state = {
            name: self.variable("control", name, jnp.zeros, shape).value
            for name, shape in shapes.items()
        }  # fmt: skip
        self.variable("control", "frames", jnp.zeros, ())
        weighed = past_BxTxP * weight[..., None]
        for name, other in (("gram", past_BxTxP), ("cross", target)):
            sow_sum(self, name, jnp.einsum("btp,btc->pc", weighed, other, precision=EXACT))
        sow_sum(self, "frames", jnp.sum(weight))
        return jnp.einsum("btp,pc->btc", past_BxTxP, state["weights"], precision=EXACT)

    def _code_metrics(self, codes, valid) -> Sums:
        if codes is None:
            return {}
        one = jnp.ones(())
        return {
            "code_perplexity": (codebook_perplexity(jax.nn.one_hot(codes.codes, self.codes), valid), one),
            "prob_perplexity": (lax.stop_gradient(codebook_perplexity(codes.probs, valid)), one),
        }

    def after_step(self, params: Any, extra: Any, sums: Any, step: jax.Array) -> Any:
        """The linear control's normal equations follow the batch; every `CONTROL_EVERY` updates they are solved."""
        old = extra["control"]
        new = {name: CONTROL_DECAY * old[name] + sums[name] for name in ("gram", "cross", "frames")}
        weights = lax.cond(step % CONTROL_EVERY == 0, solve_control, lambda _: old["weights"], new)
        return {**extra, "control": {**new, "weights": weights}}

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows: targets and predictions [B, T, C], each in the place it is predicted from."""
        x, lengths = self.encoder.inputs(batch)
        target, counts = self._targets(x, lengths)
        return dict(lengths=counts, target=target, output=self._predict(x, lengths, False)[0])

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways this objective fails, {alarm: message}, from one log window's metrics."""
        alarms = {}
        if self.codes and metrics["code_perplexity"] < max(1.5, 0.02 * self.codes):
            alarms["codebook_collapse"] = (
                f"code perplexity {metrics['code_perplexity']:.1f} of {self.codes}: nearly all frames share a code; "
                "raise task.code_temperature or lower optim.learning_rate"
            )
        if step < 1000:
            return alarms
        alarms |= constant_output_alarm(metrics["output_deviation"], metrics["target_deviation"])
        if "output_collapse" not in alarms and metrics["prediction"] > 0.98 * metrics["chance_prediction"]:
            alarms["stuck_at_chance"] = (
                f"error {metrics['prediction']:.3f} is that of the mean frame, {metrics['chance_prediction']:.3f}, "
                f"where eight frames and a linear map have {metrics['linear_error']:.3f}: nothing learnt; raise "
                "optim.learning_rate"
            )
        return alarms


def check_causal(encoder: Any) -> None:
    """UserError unless a frame of the encoder has seen no later frame, and its frames are frames in time."""
    if encoder.frontend["name"] == "patch":
        raise UserError("config.model.frontend.name='patch' has patches, not frames in time: choose mel or mfcc")
    chunk = encoder.attention.get("chunk", 0)
    recurrent = encoder.block["name"] == "gru"
    # What is added to the input looks ahead too, unless a chunk makes all of the encoder causal.
    local = encoder.positions.get("name", "conv") != "conv"
    if encoder.layers and not (chunk == 1 or (recurrent and (chunk or local))):
        raise UserError(
            "config.model sees the frames it is to predict: set model.attention.chunk=1, or model.block.name=gru with "
            "model.positions.name=none"
        )


def last_frames(x: jax.Array, factor: int) -> jax.Array:
    """Of every stacked frame the last `PAST` input frames, oldest first, and a 1: [B, N, F] -> [B, T, P].

    Before the utterance there are zeros.
    """
    N = x.shape[1]
    padded = jnp.pad(x, ((0, 0), (PAST - 1, 0), (0, 0)))
    past = jnp.concatenate([padded[:, i : i + N] for i in range(PAST)], axis=2)
    past = past[:, factor - 1 :: factor][:, : N // factor]
    return jnp.concatenate([past, jnp.ones((*past.shape[:2], 1), x.dtype)], axis=2)


def solve_control(state: dict[str, jax.Array]) -> jax.Array:
    """Ridge regression from its normal equations: {gram [P, P], cross [P, C], frames []} -> [P, C]."""
    n = jnp.maximum(state["frames"], 1)
    gram = state["gram"] / n + CONTROL_RIDGE * jnp.eye(len(state["gram"]))
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram), state["cross"] / n)
