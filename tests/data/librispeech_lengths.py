"""Lengths like those of LibriSpeech's training set, for figures of batching without the corpus."""

import numpy as np

UTTERANCES = 281_241


def librispeech_like(utterances: int = UTTERANCES, seed: int = 0) -> np.ndarray:
    """Samples at 16 kHz, int64.

    Panayotov et al. 2015 cut long recordings at silences into pieces of at most 16 s or so and left the ends as they
    fell: most lengths crowd below 16.5 s, the rest spread down to 1.3 s, very few reach 35 s.  The whole has
    281,241 utterances of 960.9 h; mean 12.3 s, median 13.8 s.
    """
    rng = np.random.default_rng(seed)
    cut = 17 - rng.gamma(4, 0.62, utterances)
    seconds = np.where(rng.random(utterances) < 0.637, cut, 1.3 + (cut.clip(2) - 1.3) * rng.beta(1.5, 1.3, utterances))
    seconds = np.where(rng.random(utterances) < 0.0008, rng.uniform(17, 35, utterances), seconds)
    return (seconds.clip(1.3, 35) * 16000).astype(np.int64)
