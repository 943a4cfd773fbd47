"""Fixtures of the evaluators' tests."""

import pytest
from ml_collections import ConfigDict

from speechjax import sharding
from speechjax.data import pipeline
from speechjax.logs import Logs
from speechjax.train import Job
from tests.data.memory import OPTIONS
from tests.evals.judging import Oracle


@pytest.fixture
def make_job(monkeypatch, tmp_path):
    """A job that holds out all of some records made by hand."""
    opened = []

    def made(records, task, answer, *, evals=None, **data):
        monkeypatch.setattr(pipeline, "open_records", lambda source, **filters: records)
        options = OPTIONS | dict(valid=".", frame_len=(160, 0), crop_seconds=1.0, batch_seconds=4.0) | data
        block = {key: options.get(key, "") for key in ("label", "units", "text", "cache_dir")}
        block |= dict(max_bad_share=0.1, text_field="text")
        config = ConfigDict(dict(task=task, data=block, evals=evals or {}))
        opened.append(Logs(tmp_path, total_steps=10, start_step=0))
        mesh = sharding.make_mesh(data=-1, fsdp=1)
        return Job(Oracle(answer), config, pipeline.open_data(**options), mesh, tmp_path, opened[-1])

    yield made
    for logs in opened:
        logs.close()
