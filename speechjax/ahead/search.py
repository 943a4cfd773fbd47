"""The largest number that fits, with few trials: each is a compilation that takes minutes."""

import math
from collections.abc import Callable

TRIALS = 12


def largest(need: Callable[[int], float], room: float, known: dict[int, float], start: int = 1) -> int:
    """The largest n with need(n) <= room, 0 where there is none; need must not fall with n.

    `known` holds needs that are known already, at least that of 0 (infinite: does not fit, but nobody says by how
    much), and gets those that are tried, `start` the first where nothing is known of more than 0.  Needs grow nearly
    in proportion, so a line through two of them says where to look next; where that does not halve what is left, the
    middle does.  Beyond 16 the answer may be 6 % too small; what leaves a thirtieth of the room is not improved on.
    """
    if known[0] > room:
        return 0
    low = max(n for n, needed in known.items() if needed <= room)
    high = min((n for n, needed in known.items() if needed > room), default=math.inf)
    halve = False
    for _ in range(TRIALS):
        if high - low <= max(1, low // 16) or (low > 16 and room - known[low] < (known[low] - known[0]) / 32):
            break
        middle = max(2 * low, start) if high == math.inf else (low + int(high)) // 2
        guess = middle if halve else _on_the_line(known, room, middle)
        guess = int(min(max(guess, low + 1), high - 1, 8 * max(low, 1) if high == math.inf else high))
        known[guess] = need(guess)
        before = high - low
        low, high = (guess, high) if known[guess] <= room else (low, guess)
        halve = high - low > before / 2 and not halve
    return low


def _on_the_line(known: dict[int, float], room: float, middle: int) -> int:
    """Where a line through the two known needs next to `middle` meets `room`; `middle` where there is but one."""
    near = sorted((n for n in known if math.isfinite(known[n])), key=lambda n: abs(n - middle))[:2]
    if len(near) < 2:
        return middle
    a, b = sorted(near)
    slope = (known[b] - known[a]) / (b - a)
    return math.floor(a + (room - known[a]) / slope) if slope > 0 else middle
