"""From the units of a batch to those of the encoder's frames.  Shapes: B batch, N units of a row, T frames."""

import jax
import jax.numpy as jnp

from speechjax.errors import UserError
from speechjax.models.encoder import SpeechEncoder
from speechjax.models.layers import frame_mask


def frame_units(
    encoder: SpeechEncoder, batch: dict[str, jax.Array], unit_hop: int, lengths: jax.Array, frames: int
) -> jax.Array:
    """The unit that begins where a frame does, int32 [B, T], -1 for none: of labels at 100 Hz every second one.

    Raises UserError for units at another rate than `unit_hop`, and for encoders with several tokens at one time.
    """
    if encoder.tokens() > 1:
        name = encoder.frontend["name"]
        raise UserError(
            f"config.model.frontend.name={name!r}: has several tokens at one time, but units name one frame each; "
            "use waveform, mel or mfcc"
        )
    hop, _ = encoder.frame_len()
    samples, units = batch["audio"].shape[1], batch["units"].shape[1]
    if units != samples // unit_hop:
        raise UserError(
            f"config.task.unit_hop={unit_hop}, but config.data.units has a unit about every "
            f"{samples / max(units, 1):.0f} samples; set it to the hop of the units"
        )
    # Integers: a float ratio such as 1.6 rounds below its own multiples.
    index = [t * hop // unit_hop for t in range(frames)]
    found = jnp.take(batch["units"], jnp.array(index, jnp.int32), axis=1)
    return jnp.where(frame_mask(lengths, frames), found, -1)
