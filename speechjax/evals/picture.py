"""A picture of one held-out recording, what the task predicts of it beside what is true, and the audio it shows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speechjax import sharding
from speechjax.audio.features import log_mel
from speechjax.models.frontend import as_float
from speechjax.pictures import mask_picture, reconstruction_picture
from speechjax.step import stream_keys
from speechjax.train import Job


class Picture:
    """The longest recording of the first held-out batch, through `task.predict`.

    Codes (`true` and `predicted`) are shown below its log-mel spectrogram; frames (`target` and `output`) as
    spectrograms of their own.  What was masked is marked, where the task has a `mask`.
    """

    def __init__(self, job: Job, *, every: int):
        self.job, self.every = job, every
        # The last held-out batch has the longest shape; its first row is not planned empty.
        *_, self._batch = job.data.valid_batches(*sharding.host_part(job.mesh))
        seed = job.config.train.seed + 1

        @functools.partial(jax.jit, out_shardings=sharding.replicated(job.mesh))
        def predict(params, extra, batch, step):
            rngs = stream_keys(job.task, seed, jnp.int32(0))
            out = job.task.apply({"params": params, **extra}, batch, step=step, rngs=rngs, method="predict")
            mel, _ = log_mel(as_float(batch["audio"]), batch["lengths"])
            return jax.tree.map(lambda x: x[0], {**out, "mel": mel})

        self._predict = predict

    def __call__(self, params: Any, extra: Any, step: int, name: str) -> dict[str, float]:
        batch = sharding.global_batch(self.job.mesh, self._batch)
        out = jax.device_get(self._predict(params, extra, batch, jnp.int32(step)))
        frames, samples = int(out["lengths"]), int(self._batch["lengths"][0])
        if not frames:  # it could not be read
            return {}
        rate = self.job.data.sample_rate
        seconds, title = samples / rate, f"step {step}"
        mask = out["mask"][:frames] if "mask" in out else None
        if "target" in out:
            image = reconstruction_picture(out["target"][:frames], out["output"][:frames], mask, seconds, title)
        else:
            mel = np.asarray(out["mel"])[: samples * 100 // rate]
            image = mask_picture(mel, mask, out["true"][:frames], out["predicted"][:frames], seconds, title)
        self.job.logs.picture(step, name, image)
        self.job.logs.audio(step, name, self._batch["audio"][0, :samples], rate)
        return {}
