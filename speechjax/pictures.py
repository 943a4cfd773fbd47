"""Pictures a person judges a model by.

Shapes: T frames, F mel bins, H height, W width; T_mel frames of the spectrogram, over the same time as T.
"""

import warnings
from typing import Any

import numpy as np

MASK_COLOUR = (0.36, 0.72, 1.0)
AGREE, DIFFER, BLANK = (0.16, 0.60, 0.28), (0.86, 0.27, 0.24), (0.95, 0.95, 0.95)
NUMBERED_FRAMES = 60  # up to here a frame is wide enough to carry its code's number


def mask_picture(
    log_mel: np.ndarray,
    mask: np.ndarray,
    true_codes: np.ndarray,
    predicted_codes: np.ndarray,
    seconds: float,
    title: str,
) -> np.ndarray:
    """What was hidden and what was guessed, over time: uint8 [H, W, 3].

    Above, the log-mel spectrogram `log_mel` float [T_mel, F], masked frames (`mask` bool [T]) shaded.  Below, the
    `true_codes` and `predicted_codes` int [T] (-1: none) as colours, equal colours for equal codes, and where both
    are there a strip green where they agree and red where not.

    Raises ValueError where the shapes do not fit.
    """
    if log_mel.ndim != 2 or mask.ndim != 1 or not mask.shape == true_codes.shape == predicted_codes.shape:
        raise ValueError(
            f"want log_mel [T_mel, F] and mask, true_codes, predicted_codes [T]; got {log_mel.shape}, "
            f"{mask.shape}, {true_codes.shape}, {predicted_codes.shape}"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # late: half a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), dpi=100, layout="constrained", facecolor="white")
    mel, true, predicted, agreement = figure.subplots(
        4, 1, sharex=True, gridspec_kw={"height_ratios": [10, 1.3, 1.3, 0.5]}
    )
    compared = (true_codes >= 0) & (predicted_codes >= 0)
    agree = compared & (true_codes == predicted_codes)
    _draw_spectrogram(mel, log_mel, mask, seconds)
    known = np.unique(np.concatenate([true_codes, predicted_codes]))
    _draw_codes(true, true_codes, known, seconds, "true")
    _draw_codes(predicted, predicted_codes, known, seconds, "predicted")
    _draw_strip(agreement, np.where(agree[:, None], AGREE, np.where(compared[:, None], DIFFER, BLANK)), seconds)
    agreement.set_ylabel("agree", rotation=0, ha="right", va="center")
    agreement.set_xlabel("seconds")
    share = f": {agree.sum() / compared.sum():.0%}" if compared.any() else ""
    score = f"{mask.mean():.0%} masked, {agree.sum()} of {compared.sum()} codes right{share}"
    figure.suptitle(f"{title}    {score}", fontsize=12, parse_math=False)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # A title may hold any script; a glyph the font lacks shows as a box, which is no reason to stop.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_spectrogram(axes: Any, log_mel: np.ndarray, mask: np.ndarray, seconds: float) -> None:
    finite = log_mel[np.isfinite(log_mel)]
    low, high = np.percentile(finite, [5, 99.7]) if finite.size else (0.0, 1.0)
    image = np.nan_to_num(log_mel.T, nan=low, neginf=low, posinf=high)
    high = max(high, low + 1e-6)
    extent = (0.0, seconds, 0.0, log_mel.shape[1])
    axes.imshow(image, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=low, vmax=high)
    axes.set_ylabel("mel bin")
    frame = seconds / len(mask)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    for first, end in edges.reshape(-1, 2):
        axes.axvspan(first * frame, end * frame, color=MASK_COLOUR, alpha=0.45, linewidth=0)
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
