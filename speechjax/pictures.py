"""Pictures a person judges a model by.

Shapes: T frames, F mel bins, H height, W width; T_mel frames of the spectrogram, over the same time as T.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

MASK_COLOUR = (0.36, 0.72, 1.0)
AGREE, DIFFER, BLANK = (0.16, 0.60, 0.28), (0.86, 0.27, 0.24), (0.95, 0.95, 0.95)
NAMED_PHONES = 14
NUMBERED_FRAMES = 60  # up to here a frame is wide enough to carry its code's number


def mask_picture(
    log_mel: np.ndarray,
    mask: np.ndarray | None,
    true_codes: np.ndarray,
    predicted_codes: np.ndarray,
    seconds: float,
    title: str,
) -> np.ndarray:
    """What was hidden and what was guessed, over time: uint8 [H, W, 3].

    Above, the log-mel spectrogram `log_mel` float [T_mel, F], masked frames (`mask` bool [T], None: an objective
    without masks) shaded.  Below, the `true_codes` and `predicted_codes` int [T] (-1: none) as colours, equal colours
    for equal codes, and where both are there a strip green where they agree and red where not.

    Raises ValueError where the shapes do not fit.
    """
    hidden = np.zeros(true_codes.shape, bool) if mask is None else mask
    if log_mel.ndim != 2 or hidden.ndim != 1 or not hidden.shape == true_codes.shape == predicted_codes.shape:
        raise ValueError(
            f"want log_mel [T_mel, F] and mask, true_codes, predicted_codes [T]; got {log_mel.shape}, "
            f"{hidden.shape}, {true_codes.shape}, {predicted_codes.shape}"
        )
    figure = figure_of((12, 5.2))
    mel, true, predicted, agreement = figure.subplots(
        4, 1, sharex=True, gridspec_kw={"height_ratios": [10, 1.3, 1.3, 0.5]}
    )
    compared = (true_codes >= 0) & (predicted_codes >= 0)
    agree = compared & (true_codes == predicted_codes)
    _draw_spectrogram(mel, log_mel, hidden, seconds)
    known = np.unique(np.concatenate([true_codes, predicted_codes]))
    _draw_codes(true, true_codes, known, seconds, "true")
    _draw_codes(predicted, predicted_codes, known, seconds, "predicted")
    _draw_strip(agreement, np.where(agree[:, None], AGREE, np.where(compared[:, None], DIFFER, BLANK)), seconds)
    agreement.set_ylabel("agree", rotation=0, ha="right", va="center")
    agreement.set_xlabel("seconds")
    share = f": {agree.sum() / compared.sum():.0%}" if compared.any() else ""
    masked = "" if mask is None else f"{mask.mean():.0%} masked, "
    score = f"{masked}{agree.sum()} of {compared.sum()} codes right{share}"
    figure.suptitle(f"{title}    {score}", fontsize=12, parse_math=False)
    return pixels(figure)


def _draw_spectrogram(axes: Any, log_mel: np.ndarray, mask: np.ndarray, seconds: float) -> None:
    low, high = _range(log_mel)
    image = np.nan_to_num(log_mel.T, nan=low, neginf=low, posinf=high)
    extent = (0.0, seconds, 0.0, log_mel.shape[1])
    axes.imshow(image, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=low, vmax=high)
    axes.set_ylabel("mel bin")
    _mark(axes, mask, seconds)


def _range(values: np.ndarray) -> tuple[float, float]:
    """Limits of the colours of a spectrogram."""
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, [5, 99.7]) if finite.size else (0.0, 1.0)
    return float(low), float(max(high, low + 1e-6))


def _mark(axes: Any, mask: np.ndarray, seconds: float, tint: float = 0.45) -> None:
    """Shades the frames of `mask` [T], under a solid bar."""
    frame = seconds / len(mask)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    for first, end in edges.reshape(-1, 2):
        axes.axvspan(first * frame, end * frame, color=MASK_COLOUR, alpha=tint, linewidth=0)
        # A solid bar on top: a tint alone is hard to tell from a loud vowel.
        axes.axvspan(first * frame, end * frame, 0.965, 1.0, color=MASK_COLOUR, linewidth=0)


def _draw_strip(axes: Any, colours: np.ndarray, seconds: float) -> None:
    axes.imshow(colours[None], aspect="auto", extent=(0.0, seconds, 0.0, 1.0), interpolation="nearest")
    axes.set_yticks([])


def _draw_codes(axes: Any, codes: np.ndarray, known: np.ndarray, seconds: float, label: str) -> None:
    palette = _palette(len(known))
    colours = np.where((codes >= 0)[:, None], palette[np.searchsorted(known, codes)], BLANK)
    _draw_strip(axes, colours, seconds)
    axes.set_ylabel(label, rotation=0, ha="right", va="center")
    if len(codes) <= NUMBERED_FRAMES:
        for index in np.flatnonzero(codes >= 0):
            ink = "black" if colours[index] @ (0.30, 0.59, 0.11) > 0.55 else "white"
            where = (index + 0.5) * seconds / len(codes)
            axes.text(where, 0.45, str(codes[index]), color=ink, fontsize=7, ha="center", va="center")


def _palette(count: int) -> np.ndarray:
    """`count` colours float [count, 3]: neighbours far apart in hue (golden angle), three shades in turn."""
    from matplotlib.colors import hsv_to_rgb

    index = np.arange(count)
    shades = np.array([[0.75, 0.85], [0.45, 0.95], [0.90, 0.60]])[index % 3]
    return hsv_to_rgb(np.column_stack([index * 0.618034 % 1.0, shades]))


# ---- a model's own frames


def reconstruction_picture(
    target: np.ndarray, output: np.ndarray, mask: np.ndarray | None, seconds: float, title: str
) -> np.ndarray:
    """What was to be predicted and what was, over time: uint8 [H, W, 3].

    `target` and `output` float [T, F] in colours of one scale; with a `mask` bool [T] also what the model was shown,
    the target without the masked frames.  Below, the difference, on the scale of the target's own deviations.

    Raises ValueError where the shapes do not fit.
    """
    if target.ndim != 2 or target.shape != output.shape or (mask is not None and mask.shape != target.shape[:1]):
        shapes = f"{target.shape}, {output.shape}" + ("" if mask is None else f", {mask.shape}")
        raise ValueError(f"want target and output [T, F], and mask [T]; got {shapes}")
    figure = figure_of((12, 7.6 if mask is not None else 5.9))
    hidden = np.zeros(len(target), bool) if mask is None else mask
    panels = {"target": target, "output": output, "output - target": output - target}
    if mask is not None:
        panels = {"target": target, "what the\nmodel saw": np.where(mask[:, None], np.nan, target), **panels}
    low, high = _range(target)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    spread = max(float(np.nanstd(target)), 1e-6)
    for (name, values), panel in zip(panels.items(), axes, strict=True):
        difference = name.startswith("output -")
        scale: dict[str, Any] = (
            dict(cmap="RdBu_r", vmin=-2 * spread, vmax=2 * spread)
            if difference
            else dict(cmap="magma", vmin=low, vmax=high)
        )
        panel.set_facecolor(MASK_COLOUR)
        shown = panel.imshow(
            np.ma.masked_invalid(values.T), origin="lower", aspect="auto", interpolation="nearest",
            extent=(0.0, seconds, 0.0, target.shape[1]), **scale,
        )  # fmt: skip
        figure.colorbar(shown, ax=panel, pad=0.01, aspect=12)
        panel.set_ylabel(name, rotation=0, ha="right", va="center")
        if name.startswith("output"):  # no tint here, where colours are to be compared
            _mark(panel, hidden, seconds, tint=0.0)
    axes[-1].set_xlabel("seconds")
    scores = [f"mean squared error {_mean_square(output - target):.3g}"]
    if mask is not None and mask.any():
        scores = [f"{mask.mean():.0%} masked", f"mean squared error there {_mean_square((output - target)[mask]):.3g}"]
    scores.append(f"variance of the target {np.nanvar(target):.3g}")
    figure.suptitle(f"{title}    {', '.join(scores)}", fontsize=12, parse_math=False)
    return pixels(figure)


def unit_spectrogram(
    log_mel: np.ndarray, seconds: float, codes: np.ndarray, first: float, hop: float,
    phones: Sequence[tuple[str, float, float]], title: str,
) -> np.ndarray:  # fmt: skip
    """Speech, its phones and its units, over time: uint8 [H, W, 3].

    `log_mel` float [T_mel, F] with a line at every phone boundary; below, `phones` (symbol, start s, end s) and the
    units: `codes` int [T], `hop` seconds each from `first` on, equal colours for equal units, numbered where they last.
    """
    figure = figure_of((14, 5.4))
    mel, spoken, units = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [10, 1.1, 2.0]})
    _draw_spectrogram(mel, log_mel, np.zeros(len(log_mel), bool), seconds)
    names = sorted({symbol for symbol, _, _ in phones})
    palette = _palette(len(names))
    for symbol, start, end in phones:
        mel.axvline(start, color="white", linewidth=0.7, alpha=0.7)
        spoken.axvspan(start, end, color=0.55 + 0.45 * palette[names.index(symbol)], linewidth=0)
        spoken.axvline(start, color="0.35", linewidth=0.7)
        spoken.text((start + end) / 2, 0.45, symbol, fontsize=8, ha="center", va="center", parse_math=False)
    palette = _palette(int(codes.max(initial=0)) + 1)
    edges = np.flatnonzero(np.diff(codes, prepend=-1, append=-1))
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        colour = palette[codes[begin]]
        units.axvspan(first + begin * hop, first + end * hop, color=colour, linewidth=0)
        if (end - begin) * hop > 0.012 * seconds:
            ink = "black" if colour @ (0.30, 0.59, 0.11) > 0.55 else "white"
            where = first + (begin + end) / 2 * hop
            units.text(where, 0.5, str(codes[begin]), color=ink, fontsize=7, ha="center", va="center", rotation=90)
    for _, start, _ in phones:
        units.axvline(start, color="black", linewidth=0.7)
    for strip, label in ((spoken, "phones"), (units, "units")):
        strip.set_yticks([])
        strip.set_ylim(0, 1)
        strip.set_ylabel(label, rotation=0, ha="right", va="center")
    mel.set_xlim(0, seconds)
    units.set_xlabel("seconds")
    figure.suptitle(f"{title}    {len(codes)} frames, {len(edges) - 1} runs of a unit, {len(phones)} phones",
                    fontsize=12, parse_math=False)  # fmt: skip
    return pixels(figure)


def unit_map(
    frames: np.ndarray, phones: np.ndarray, centroids: np.ndarray, likeliest: np.ndarray, usage: np.ndarray,
    symbols: Sequence[str], title: str, seed: int,
) -> np.ndarray:  # fmt: skip
    """Where phones lie among the frames, and units among them: two t-SNE maps, uint8 [H, W, 3].

    Left, `frames` [N, D] in the colours of their `phones` [N] (indices of `symbols`), the commonest named.  Right, the
    units' `centroids` [K, D], named after their `likeliest` phone [K] (-1: dead, left out), as large as their `usage`
    [K].  What is far apart in such a map says little; what lies together is alike (van der Maaten and Hinton 2008).
    """
    figure = figure_of((14, 7))
    left, right = figure.subplots(1, 2)
    number, counts = np.unique(phones, return_counts=True)
    common = number[np.argsort(-counts, kind="stable")][:NAMED_PHONES]
    order = {int(k): i for i, k in enumerate(common)}
    palette = _palette(len(common))
    colour = lambda k: palette[order[int(k)]] if int(k) in order else np.array([0.8] * 3)  # noqa: E731
    place = _tsne(frames, seed)
    left.scatter(*place.T, c=[colour(k) for k in phones], s=9, linewidths=0)
    for k in common:
        # The member nearest to the median: the mean of a phone in two heaps lies in neither.
        own = place[phones == k]
        middle = own[np.argmin(np.square(own - np.median(own, axis=0)).sum(axis=1))]
        left.text(*middle, symbols[k], fontsize=11, weight="bold", ha="center", va="center", parse_math=False,
                  bbox=dict(boxstyle="round,pad=0.15", facecolor="white", edgecolor=colour(k), alpha=0.85))  # fmt: skip
    left.set_title(f"{len(frames):,} frames, {len(common)} commonest of {len(number)} phones in colour", fontsize=11)
    alive = np.flatnonzero(likeliest >= 0)
    place = _tsne(centroids[alive], seed)
    size = 40 + 900 * np.sqrt(usage[alive] / max(usage.max(), 1))
    right.scatter(*place.T, s=size, c=[0.45 + 0.55 * colour(k) for k in likeliest[alive]], edgecolors="0.4")
    for where, k in zip(place, likeliest[alive], strict=True):
        right.text(*where, symbols[k], fontsize=9, ha="center", va="center", parse_math=False)
    right.set_title(f"{len(alive)} units in use, by their likeliest phone, as large as used", fontsize=11)
    for axes in (left, right):
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(title, fontsize=12, parse_math=False)
    return pixels(figure)


def _tsne(points: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if len(points) < 5 or not np.ptp(points, axis=0).any():  # nothing to arrange
        return np.zeros((len(points), 2), np.float32)
    points = points - points.mean(axis=0)
    if min(points.shape) > 50:
        points = PCA(50, random_state=seed).fit_transform(points)
    perplexity = min(30.0, (len(points) - 1) / 3)
    with threadpool_limits(1):  # its threads wait for each other in busy loops
        return TSNE(perplexity=perplexity, init="pca", random_state=seed, max_iter=500).fit_transform(points)


def _mean_square(x: np.ndarray) -> float:
    return float(np.mean(np.square(x)))


def figure_of(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure  # late: half a second

    return Figure(figsize=size, dpi=100, layout="constrained", facecolor="white")


def pixels(figure: Any) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # A title may hold any script; a glyph the font lacks shows as a box, which is no reason to stop.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
