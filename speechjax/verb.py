"""What all verbs share: from an exception to one clear line and an exit code."""

import argparse
import ctypes
import errno
import logging
import os
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from speechjax.errors import FAILED, RESTART, UserError

log = logging.getLogger("speechjax")


def split_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, prefixes: tuple[str, ...] = ("--config.",)
) -> tuple[argparse.Namespace, list[str]]:
    """Known flags, and every override that begins with one of `prefixes`, as `key=value` without "--config."."""
    args, rest = parser.parse_known_args(argv)
    overrides = []
    while rest:
        item = rest.pop(0)
        if not item.startswith(prefixes):
            parser.error(f"unknown argument {item!r}; values are set with {'key=value, '.join(prefixes)}key=value")
        if "=" not in item and rest and not rest[0].startswith("--"):
            item = f"{item}={rest.pop(0)}"
        overrides.append(item.removeprefix("--").removeprefix("config."))
    return args, overrides


def keep_compiled() -> None:
    """Compiled programs stay on disk for the next process, in JAX_COMPILATION_CACHE_DIR or this user's cache."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/speechjax/xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def keep_memory() -> None:
    """Steps on a CPU find the memory of the step before; call it before the first computation.

    XLA allocates a step's temporaries anew every time, and glibc would return them to the system after every step: all
    their pages would be mapped and zeroed again.  Freed memory stays with the heap that the main thread allocates from,
    so that thread has to run the steps itself.  Does nothing where JAX computes elsewhere, or without glibc.
    """
    import jax

    step_in_main_thread()
    if jax.default_backend() == "cpu":
        keep_freed_memory()


def step_in_main_thread() -> None:
    """The half of `keep_memory` that has no effect once JAX has devices, as after `distributed.init`."""
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_freed_memory() -> bool:
    """Whether glibc is there and was told to keep what is freed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    top_pad, trim, mmap = -2, -1, -3  # M_TOP_PAD, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    most = 2**31 - 1
    return bool(mallopt) and all([mallopt(trim, most), mallopt(top_pad, 2**28), mallopt(mmap, most)])


def call(command: Sequence[str], log_file: Path) -> int:
    """Runs `python -m COMMAND` with its output in a file; peak resident memory in bytes.  Raises UserError."""
    log.info("%s", shlex.join(["python", "-m", *command]))
    with open(log_file, "ab") as out:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=out, stderr=out)
        try:
            _, status, usage = os.wait4(process.pid, 0)  # tells the memory of this process alone
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code := process.returncode:
        tail = log_file.read_text(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"python -m {command[0]} ended with code {code} ({' '.join(tail)}); see {log_file}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def leave(
    run: Callable[[], int], *, interrupted: str, full_disk: str,
    lost: Callable[[BaseException], bool] = lambda error: False,
) -> None:  # fmt: skip
    """Runs a verb and leaves the process with its exit code at once; the messages say how to go on.

    `lost` says whether an exception only means that another process of the job is gone.

    `os._exit`, because the exit barrier of a distributed job waits minutes for peers that a failed process has
    already let down.
    """
    handler = logging.StreamHandler(sys.stderr)
    # orbax's background writers print tracebacks of errors that reach us anyway, and become one line below.
    handler.addFilter(lambda record: record.name != "absl")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    log.setLevel(logging.INFO)
    # Every exception is caught below; what still gets here are echoes from the threads of a writer that failed.
    sys.excepthook = sys.unraisablehook = lambda *_: None
    try:
        code = run()
    except SystemExit as leaving:  # argparse
        code = int(leaving.code or 0)
    except UserError as error:
        log.error("error: %s", error)
        code = FAILED
    except KeyboardInterrupt:
        log.error("interrupted; %s", interrupted)
        code = FAILED
    except BaseException as error:
        code = RESTART if lost(error) else FAILED
        if code == RESTART:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            log.error("a process of the job was lost (%s): exit code %d asks for a restart", reason, RESTART)
        elif _disk_is_full(error):
            log.error("error: no space left on the disk; %s", full_disk)
        elif isinstance(error, OSError) and error.filename:
            log.error("error: %s: %s", error.filename, error.strerror)
        else:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_to_go_on(run: Callable[[], int]) -> None:
    """`leave` of verbs that go on where they were stopped; SIGTERM stops them as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    again = "the same command goes on where this one stopped"
    leave(run, interrupted=again, full_disk=f"free some; {again}")


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind this; checkpoint writers report it in words, from another thread."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
