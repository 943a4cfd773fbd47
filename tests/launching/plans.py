"""Jobs for the tests of launchers: flags of every target, and stand-ins for programs."""

import argparse
from pathlib import Path
from typing import Any

from speechjax import launch

JOB = ["--config=configs/pretrain/wav2vec2.py", "--workdir=/shared/runs/a"]
FLAGS = {
    "slurm": ["--nodes=2", "--gpus-per-node=2", "--cpus=8", "--time=1-12:00:00", "--sbatch=--qos=high"],
    "gke tpu": ["--tpu=v5e:4x4", "--slices=2", "--image=i:1", "--mount=/shared=claim", "--queue=lab", "--spot"],
    "gke gpu": ["--gpu=nvidia-h100-80gb", "--nodes=2", "--image=i:1", "--mount=/shared=claim"],
    "tpu-vm": ["--tpu=v5p:2x2x2", "--zone=us-east5-a", "--spot"],
    "skypilot": ["--accelerators=H100:8", "--nodes=2", "--spot", "--mount=/shared=gs://bucket"],
}


def parsed(kind: str, *more: str) -> tuple[argparse.Namespace, list[str]]:
    return launch.parse_args([kind.split()[0], *FLAGS[kind], *JOB, *more])


def plan(kind: str, *more: str) -> Any:
    args, job = parsed(kind, *more)
    return launch.TARGETS[args.target].plan(args, job)


def script(folder: Path, name: str, text: str) -> None:
    """A program of bash."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}")
    (folder / name).chmod(0o755)
