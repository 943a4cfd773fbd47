"""The wav2vec 2.0 loss and its metrics against loops in float64."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_wav2vec2 import FRAMES, STREAMS, make_batch, random_params

from speechjax.models.masking import sample_negatives, span_mask
from speechjax.tasks import wav2vec2
from speechjax.tasks._contrastive import chance_accuracy


@pytest.fixture(scope="module")
def pieces(tiny_wav2vec2):
    """Losses, metrics and what went into them, with known masks and negatives."""
    task = tiny_wav2vec2(codes=3)
    params, batch = random_params(task), make_batch()
    frames = np.array([24, 17, 0])
    mask = np.asarray(span_mask(jax.random.key(7), jnp.asarray(frames, jnp.int32), FRAMES, prob=0.65, span=4))
    slots = wav2vec2.max_masked(FRAMES, prob=0.65, span=4)
    peers = np.arange(slots) < mask.sum(axis=1)[:, None, None]
    drawn = np.asarray(sample_negatives(jax.random.key(8), jnp.asarray(peers), task.negatives))
    rngs = {name: jax.random.key(9) for name in STREAMS}
    wanted = ("front", "quantizer", "project_context", "project_target")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wav2vec2, "span_mask", lambda *_, **__: jnp.asarray(mask))
        patch.setattr(wav2vec2, "sample_negatives", lambda *_: jnp.asarray(drawn))
        (losses, metrics), seen = jax.jit(
            lambda: task.apply(
                {"params": params}, batch, step=jnp.int32(3), train=True, rngs=rngs, mutable="intermediates",
                capture_intermediates=lambda module, method: module.name in wanted and method == "__call__",
            )
        )()  # fmt: skip
    leaves: dict[str, Any] = flatten_dict(seen["intermediates"], sep="/")
    seen = {path.split("/")[-2]: jax.tree.map(np.asarray, value[0]) for path, value in leaves.items()}
    return task, losses, metrics, seen, mask, drawn


def cosine(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def reference(task, seen, mask, drawn) -> dict[str, float]:
    """Equations 3 and 4 and the published feature penalty, by loops over rows, masked frames and negatives."""
    _, codes, probs = seen["quantizer"]
    sums = dict(contrastive=0.0, correct=0, answerable=0, chance=0.0, guess=0.0, excluded=0)
    mean_probs, chosen, n = np.zeros((2, 3)), np.zeros((2, 3)), 0
    for b, row in enumerate(mask):
        targets, contexts, masked = seen["project_target"][b], seen["project_context"][b], int(row.sum())
        names = [tuple(c) for c in codes[b, :masked]]
        for m in range(masked):
            others = [k for k in drawn[b, m] if names[k] != names[m]]
            positive = cosine(contexts[m], targets[m]) / task.logit_temperature
            negatives = [cosine(contexts[m], targets[k]) / task.logit_temperature for k in others]
            sums["contrastive"] += np.log(np.exp([positive, *negatives]).sum()) - positive
            sums["guess"] += np.log(1 + len(others))
            sums["excluded"] += task.negatives - len(others)
            n += 1
            mean_probs += probs[b, m]
            for g in range(2):
                chosen[g, codes[b, m, g]] += 1
            if others:
                sums["answerable"] += 1
                sums["correct"] += positive > max(negatives)
                wrong = [names.count(c) / (masked - 1) for c in set(names) - {names[m]}]
                sums["chance"] += 1 / (1 + sum(1 - (1 - share) ** task.negatives for share in wrong))
    books = (*mean_probs, *chosen)
    perplexities = [math.exp(-sum(p * math.log(p) for p in book / n if p > 0)) for book in books]
    features, lengths = seen["front"]
    energy = sum(np.square(f[:t], dtype=np.float64).sum() for f, t in zip(features, lengths, strict=True))
    soft, hard = sum(perplexities[:2]), sum(perplexities[2:])
    return sums | dict(n=n, energy=energy / (lengths.sum() * features.shape[-1]), soft=soft, hard=hard)


def test_losses_are_the_papers(pieces):
    task, losses, _, seen, mask, drawn = pieces
    expected = reference(task, seen, mask, drawn)
    n = expected["n"]
    assert n == mask.sum() > 20
    sums = {name: (float(value), float(weight)) for name, (value, weight) in losses.items()}
    assert sums == {
        # float32; cosine over 0.1 amplifies rounding tenfold
        "contrastive": (pytest.approx(expected["contrastive"], rel=1e-5), n),
        "diversity": (pytest.approx(0.1 * n * (6 - expected["soft"]) / 6, rel=1e-5), n),
        "feature_penalty": (pytest.approx(10 * n * expected["energy"], rel=1e-5), n),
    }
    # Negative controls: other negatives, and codes that are never equal, give another loss.
    other = reference(task, seen, mask, np.roll(drawn, 1, axis=1))
    assert abs(other["contrastive"] / expected["contrastive"] - 1) > 1e-3
    assert expected["excluded"] > 10, "equal codes must occur for their exclusion to be tested"


def test_metrics_are_sums_over_masked_frames(pieces):
    task, _, metrics, seen, mask, drawn = pieces
    expected = reference(task, seen, mask, drawn)
    found = {name: (float(value), float(weight)) for name, (value, weight) in metrics.items()}
    assert found == {
        "accuracy": (expected["correct"], expected["answerable"]),
        "chance_accuracy": (pytest.approx(expected["chance"], rel=1e-5), expected["answerable"]),
        "chance_contrastive": (pytest.approx(expected["guess"], rel=1e-5), expected["n"]),
        "code_perplexity": (pytest.approx(expected["hard"], rel=1e-5), 1),
        "prob_perplexity": (pytest.approx(expected["soft"], rel=1e-5), 1),
        "gumbel_temperature": (pytest.approx(2 * 0.999995**3, rel=1e-6), 1),
        "masked_share": (expected["n"], 41),
    }


@pytest.mark.parametrize(("masked", "codes"), [(3, 4), (12, 4), (30, 50)])
def test_chance_accuracy_is_that_of_guessing_among_different_candidates(masked, codes):
    """Monte Carlo of drawing K negatives and guessing among the distinct codes, the right one included."""
    K, slots, draws = 20, 32, 3000
    rng = np.random.default_rng(masked)
    code = rng.integers(0, codes, slots)
    code[:2] = [0, 1]
    valid = jnp.asarray(np.arange(slots) < masked)[None]
    same = jnp.asarray(code[:, None] == code[None])[None]
    estimate = jax.jit(chance_accuracy, static_argnums=3)(same, valid, valid[:, None], K)
    for m in range(masked):
        others = np.delete(np.arange(masked), m)
        distinct = [len(set(code[rng.choice(others, K)]) - {code[m]}) for _ in range(draws // masked + 50)]
        guessing = np.mean([1 / (1 + d) for d in distinct if d])
        # 1 / (1 + mean) is below mean of 1 / (1 + d): by 5 % at most here; the draws add 3 %.
        assert estimate[0, m] == pytest.approx(guessing, rel=0.08)
    assert masked < 30 or abs(1 / (1 + K) / float(estimate[0, 0]) - 1) > 0.08, "negative control: 1 / (1 + K)"


def test_gumbel_temperature_falls_to_its_floor(tiny_wav2vec2):
    """wav2vec 2.0 reaches 0.5 after 277 k updates; float32 must not bend the schedule."""
    task = tiny_wav2vec2()
    steps = np.array([0, 1000, 100_000, 270_000, 300_000, 400_000])
    ours = jax.jit(jax.vmap(task.gumbel_temperature))(jnp.asarray(steps, jnp.int32))
    np.testing.assert_allclose(ours, np.maximum(2 * 0.999995**steps, 0.5), rtol=1e-5)
