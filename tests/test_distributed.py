"""What all processes of a job must agree on."""

import jax
import numpy as np
import pytest

from speechjax import distributed
from speechjax.errors import UserError

ONE, OTHER = "ab" * 32, "ab" * 31 + "ac"


def gathered(monkeypatch, *digests):
    """As if there were a process for each digest."""
    from jax.experimental import multihost_utils

    values = np.stack([np.frombuffer(bytes.fromhex(digest), np.uint8) for digest in digests])
    monkeypatch.setattr(jax, "process_count", lambda: len(digests))
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: values)


def test_one_process_agrees_with_itself():
    distributed.agree("the recordings", ONE)


def test_processes_that_agree(monkeypatch):
    gathered(monkeypatch, ONE, ONE, ONE)
    distributed.agree("the recordings", ONE)


def test_the_others_are_named(monkeypatch):
    gathered(monkeypatch, ONE, OTHER, ONE, OTHER)
    with pytest.raises(UserError, match="the recordings of process 1, 3 are not those of process 0"):
        distributed.agree("the recordings", ONE)
