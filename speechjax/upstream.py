"""A trained model as an upstream of s3prl: what SUPERB's downstream experts are fed by.

Shapes: B batch, S samples, T frames, D width.

In s3prl, `hub.py` of an upstream would say

    from speechjax.upstream import UpstreamExpert

    def speechjax_local(ckpt, *args, **kwargs):
        return UpstreamExpert(ckpt, *args, **kwargs)

Needs torch, which is no dependency of this project.  The encoder is fixed, as in SUPERB: no gradient flows into it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from speechjax.pretrained import load


class UpstreamExpert(torch.nn.Module):
    """`ckpt` is what `speechjax.load` takes; other arguments of s3prl's hub are accepted and without effect.

    Called with a list of waveforms [S] at 16 kHz it gives {"hidden_states": [float32 [B, T, D], ...]}, the input of the
    first layer and the output of each, and the last of them as "last_hidden_state"; rows are padded with zeros to the
    longest.
    """

    def __init__(self, ckpt: str, *args: Any, **kwargs: Any):
        del args, kwargs
        super().__init__()
        self.model = load(ckpt)

    def get_downsample_rates(self, key: str = "") -> int:
        """Samples from one frame to the next."""
        hop, _ = self.model.task.encoder.frame_len()
        return hop // self.model.task.encoder.tokens()

    def forward(self, wavs: Sequence[Any]) -> dict[str, Any]:
        device = wavs[0].device
        rows = self.model.hidden_states([np.asarray(wav.detach().cpu().numpy(), np.float32) for wav in wavs])
        layers = [
            torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row[k]) for row in rows], batch_first=True).to(device)
            for k in range(self.model.layers + 1)
        ]
        return {"hidden_states": layers, "last_hidden_state": layers[-1]}
