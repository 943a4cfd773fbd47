"""The speech encoder: front end, projection, positions and blocks.

Shapes: B batch, S samples, N frames before subsampling, F their features, T frames, C channels, D width, G segments.
`lengths` is int32 [B], or [B, T] for packed rows: see layers.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.adapters import adapted
from speechjax.models.deep_speech import DeepSpeechFrontend
from speechjax.models.frontend import WaveformExtractor
from speechjax.models.layers import LayerNorm, fan_in_uniform, shard_batch
from speechjax.models.positions import FRAMES_PER_ROW
from speechjax.models.spectral import MelFrontend, MfccFrontend, PatchFrontend
from speechjax.models.transformer import Transformer

FRONTENDS = {
    "waveform": WaveformExtractor,
    "mel": MelFrontend,
    "mfcc": MfccFrontend,
    "patch": PatchFrontend,
    "deep_speech": DeepSpeechFrontend,
}


class Encoded(NamedTuple):
    """`frames` [B, T, D], `lengths` [B] (packed rows: [B, T]), and on demand states of the layers [B, T, D]."""

    frames: jax.Array
    lengths: jax.Array
    hidden: list[jax.Array]


class SpeechEncoder(nn.Module):
    """Front end, layer norm, projection to `width`, transformer.  The model block of a config is its arguments.

    `__call__` goes from batch to `Encoded`.  Pretraining tasks use the halves: `extract` (batch to features) and
    `contextualize` (features, perhaps masked, to `Encoded`).  With a spectral front end the first half has halves
    too, for tasks that mask or predict its frames: `inputs` and `embed`.

    `positions` are those added to the input (see positions.py; "conv" where unnamed), `attention` those inside
    attention and how far it sees (see relative.py), `block` names the layer (see transformer.py) and its own options,
    `adapters` are learned parts of `contextualize` beside the rest (see adapters.py).
    A head is `width / heads` wide, or `head_width` where that is not 0.
    `hidden`, wherever it is an argument: see `Transformer`.

    A batch is {audio int16 or float [B, S], lengths int32 [B]} and perhaps {mean, std [B]} of the recordings.  In a
    packed batch a row holds up to G utterances: {starts, lengths int32 [B, G], mean, std [B, G]}.  Segment g is the
    lengths[g] samples from starts[g], a multiple of `segment_align()`; segments are in order and do not overlap,
    those that do not exist come last and have length 0, and what is between them does not matter.
    """

    frontend: dict[str, Any]
    width: int
    layers: int
    heads: int
    mlp: int
    norm: str
    positions: dict[str, Any]
    dropout: float
    attention_dropout: float
    activation_dropout: float
    input_dropout: float
    layerdrop: float
    scan: bool
    remat: bool
    dtype: str
    block: Mapping[str, Any] = field(default_factory=lambda: {"name": "transformer"})
    attention: Mapping[str, Any] = field(default_factory=lambda: {"positions": "none"})
    adapters: Sequence[Mapping[str, Any]] = ()
    head_width: int = 0

    def setup(self):
        options = dict(self.frontend)
        name = options.pop("name")
        dtype = jnp.dtype(self.dtype)
        self.front = FRONTENDS[name](**options, dtype=dtype)
        self.feature_norm = LayerNorm(out_dtype=dtype)
        features = self.front.channels[-1]
        init = fan_in_uniform(features)
        self.projection = nn.Dense(self.width, dtype=dtype, kernel_init=init, bias_init=init)
        self.input_drop = nn.Dropout(self.input_dropout)
        self.mask_embedding = self.param("mask_embedding", nn.initializers.uniform(1.0), (self.width,))
        self.transformer = Transformer(
            layers=self.layers, heads=self.heads, mlp=self.mlp, norm=self.norm, positions=dict(self.positions),
            dropout=self.dropout, attention_dropout=self.attention_dropout,
            activation_dropout=self.activation_dropout, layerdrop=self.layerdrop, scan=self.scan,
            remat=self.remat, dtype=dtype, block=dict(self.block), attention=dict(self.attention),
            head_width=self.head_width,
        )  # fmt: skip

    def frame_len(self) -> tuple[int, int]:
        """(samples from one frame to the next, samples the first frame takes beyond that)."""
        return self._detached_front().frame_len()

    def tokens(self) -> int:
        """Tokens at one time: those of a column of patches, otherwise 1."""
        return self._detached_front().tokens()

    def packs(self) -> bool:
        """Whether the front end can tell the utterances of a packed row apart."""
        return self._detached_front().packs()

    def segment_align(self) -> int:
        """Samples of which the start of every segment of a packed row is a multiple."""
        hop, _ = self.frame_len()
        return hop * FRAMES_PER_ROW

    def subsampling(self) -> int:
        """Frames of `inputs` that become one frame.  Raises UserError where the front end has none."""
        return self._spectral(self._detached_front()).subsampling

    def _spectral(self, front):
        if not hasattr(front, "subsampling"):
            raise UserError(
                f"config.model.frontend.name={self.frontend['name']!r} has no frames before its convolutions, which "
                "this objective needs: choose mel, mfcc or patch"
            )
        return front

    def _detached_front(self):
        front = dict(self.frontend)
        return FRONTENDS[front.pop("name")](**front, parent=None)

    def extract(self, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Features of the front end before any norm: batch -> ([B, T, C], [B] or [B, T]).

        Raises UserError for packed rows where not `packs()`.  Rows with a misaligned segment become NaN: a compiled
        program cannot raise, and the loop stops on NaN.
        """
        statistics = (batch["mean"], batch["std"]) if "mean" in batch else None
        starts = batch.get("starts")
        features, lengths = self.front(batch["audio"], batch["lengths"], statistics, starts)
        if starts is not None:
            aligned = jnp.all((starts % self.segment_align() == 0) | (batch["lengths"] == 0), axis=1)
            features = jnp.where(aligned[:, None, None], features, jnp.nan)
        return shard_batch(features), lengths

    def inputs(self, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Normalised frames of a spectral front end before subsampling: batch -> float32 [B, N, F], [B].

        Raises UserError for the waveform front end and for packed rows.
        """
        front = self._spectral(self.front)
        if "starts" in batch:
            raise UserError("config.model.frontend cannot tell the utterances of a packed row apart: data.fill=False")
        x, lengths = front.inputs(batch["audio"], batch["lengths"])
        return shard_batch(x), lengths

    def embed(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`inputs`, perhaps masked, to what `extract` makes of a batch: [B, N, F], [B] -> [B, T, C], [B]."""
        features, lengths = self._spectral(self.front).embed(x, lengths)
        return shard_batch(features), lengths

    def contextualize(
        self,
        features: jax.Array,
        lengths: jax.Array,
        *,
        mask: jax.Array | None = None,
        channel_mask: jax.Array | None = None,
        train: bool,
        hidden: bool | str = False,
    ) -> Encoded:
        """Normalised features [B, T, C], masked where `mask` [B, T] is true, through the transformer.

        Where `channel_mask` [B, D] is true a channel is zero in all frames of the row, masked ones too.
        """
        with adapted(self.adapters, train=train):
            return self._contextualize(features, lengths, mask, channel_mask, train, hidden)

    def _contextualize(self, features, lengths, mask, channel_mask, train, hidden):
        x = self.input_drop(self.projection(features), deterministic=not train)
        if mask is not None:
            x = jnp.where(mask[..., None], self.mask_embedding.astype(x.dtype)[None, None], x)
        if channel_mask is not None:
            x = jnp.where(channel_mask[:, None], jnp.zeros((), x.dtype), x)
        frames, states = self.transformer(x, lengths, train=train, hidden=hidden)
        return Encoded(frames, lengths, states)

    def __call__(self, batch: dict[str, jax.Array], *, train: bool = False, hidden: bool | str = False) -> Encoded:
        features, lengths = self.extract(batch)
        return self.contextualize(self.feature_norm(features), lengths, train=train, hidden=hidden)
