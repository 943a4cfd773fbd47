"""The main job with a fault: `python -m tests.hosts.worker FAULT@BATCH ARG...`, arguments as of speechjax.main.

kill, terminate, stop: this process gets SIGKILL, SIGTERM or SIGSTOP before it hands over the batch of that number, from
0; raise: an exception instead of it; stall: nothing any more; none: as always.
"""

import os
import signal
import sys
import time

from speechjax import main, sharding

SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "stop": signal.SIGSTOP}


def arm(fault: str, number: int) -> None:
    hand_over, seen = sharding.global_batch, 0

    def faulty(mesh, batch):
        nonlocal seen
        if seen == number:
            if fault in SIGNALS:
                os.kill(os.getpid(), SIGNALS[fault])
            if fault == "stall":
                time.sleep(3600)
            if fault == "raise":
                raise RuntimeError("the machine is on fire")
        seen += 1
        return hand_over(mesh, batch)

    sharding.global_batch = faulty


if __name__ == "__main__":
    fault, _, number = sys.argv[1].partition("@")
    arm(fault, int(number or 0))
    main.main(sys.argv[2:])
