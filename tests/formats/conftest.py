"""Workdirs of runs that nobody has trained, made once."""

from pathlib import Path

import pytest

from speechjax.adapter_files import read_vocabulary
from speechjax.runs import write_run
from tests.formats.served_runs import make_run


@pytest.fixture(scope="session")
def workdirs(tmp_path_factory) -> Path:
    """asr (ctc), classify, speaker, hubert, lora (ctc with adapters) and mel (ctc on spectra): folders of runs."""
    folder = tmp_path_factory.mktemp("workdirs")
    kinds = dict(
        asr=("ctc", "post"), classify=("classify", "post"), speaker=("speaker", "post"), hubert=("hubert", "post"),
        lora=("ctc-lora", "post"), mel=("ctc", "conformer"),
    )  # fmt: skip
    for name, (task, encoder) in kinds.items():
        run = make_run(folder / f"scratch_{name}", task, encoder)
        if name == "lora":
            (run.workdir / "vocab.json").write_bytes((folder / "scratch_asr" / "vocab.json").read_bytes())
        params = dict(run.variables)
        write_run(
            folder / name, run.config, params.pop("params"), params, step=3, source=dict(made="by a test"),
            vocabulary=read_vocabulary(run.workdir),
        )  # fmt: skip
    return folder
