"""The peer in a process of its own: with the memory allocator and the threads that its users have, none of ours."""

import multiprocessing
import signal
import time
from typing import Any

from speechjax.errors import UserError
from speechjax.speed import peer
from speechjax.speed.turns import Run
from speechjax.verb import keep_freed_memory


class Apart:
    """A side (see peer.py) made, opened and run in another process; only what `ask` asks for comes back.

    `tuned`: its allocator keeps freed memory, as ours does.  Raises UserError where a side of `args` makes no sense.
    """

    def __init__(self, kind: Any, *args: Any, tuned: bool = False):
        kind(*args)
        self.kind, self.args, self.tuned = kind, args, tuned
        self._process: Any = None
        self._pipe: Any = None

    def open(self) -> Run:
        """Starts the process.  What fails there is raised here: a UserError as one, else a RuntimeError."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        args = (theirs, peer.device(), self.tuned, self.kind, self.args)
        process = context.Process(target=_serve, args=args, daemon=True)
        process.start()
        self._process = process
        theirs.close()
        self.ask("open")
        return self.run

    def run(self, steps: int) -> float:
        """So many steps; the CPU seconds that its process has spent on them."""
        return self.ask("run", steps)

    def ask(self, name: str, *args: Any) -> Any:
        """What an attribute of the side is, or answers when called with `args`."""
        try:
            self._pipe.send((name, args))
            answer, error = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            raise RuntimeError(f"its process ended with code {self._process.exitcode}") from None
        if error:
            kind, text = error
            raise UserError(text) if kind == UserError.__name__ else RuntimeError(f"{kind}: {text}")
        return answer

    def memory(self) -> int | None:
        """The most bytes of a GPU that it has had in use; None on CPUs, and where it has failed."""
        return self.ask("used_memory") if self._process is not None else None

    def close(self) -> None:
        """Ends the process, and so frees all its memory."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = None


def _serve(pipe: Any, device: str, tuned: bool, kind: Any, args: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asks; this ends with the pipe
    if tuned:
        keep_freed_memory()
    peer.compute_on(device)
    side = kind(*args)
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            return
        answer, error, began = None, None, time.process_time()
        try:
            found = getattr(side, name)
            answer = found(*args) if callable(found) else found
        except Exception as problem:  # of any library: whoever asks decides
            error = type(problem).__name__, str(problem)
        if name == "open":
            answer = None
        elif name == "run":
            answer = time.process_time() - began
        pipe.send((answer, error))
