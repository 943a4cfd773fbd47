"""What XLA compiles while a run is under way: after the first round of everything, nothing should.

The train step cannot: its programs are compiled before step 0, and refuse other shapes.  Evaluations can, where the
shapes of their batches change.
"""

from collections import defaultdict

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_WORTH_SAYING = 0.2  # seconds; operations outside of programs take less


class Compiles:
    """The programs that are compiled again, by name; listens from its first moment until `close`."""

    def __init__(self) -> None:
        self._before: set[str] = set()
        self._now: dict[str, float] = defaultdict(float)
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **about: str | int) -> None:
        if event == _EVENT:
            self._now[str(about.get("fun_name", "a program"))] += duration_secs

    def again(self) -> dict[str, float]:
        """{name: seconds} of what was compiled since the last call, and had been before it already."""
        now, self._now = self._now, defaultdict(float)
        found = {name: seconds for name, seconds in now.items() if name in self._before and seconds > _WORTH_SAYING}
        self._before |= now.keys()
        return found

    def close(self) -> None:
        """Listens no longer."""
        jax.monitoring.unregister_event_duration_listener(self._note)
