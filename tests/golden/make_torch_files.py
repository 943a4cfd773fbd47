"""Writes torch_zip.pt and torch_stream.pt: one value in both layouts of `torch.save`.

Needs torch: `pip install torch`, then `python tests/golden/make_torch_files.py`.  tests/formats/test_torch_files.py
knows what they hold.
"""

import argparse
from collections import OrderedDict
from pathlib import Path

import torch

FOLDER = Path(__file__).parent


def value() -> dict:
    x = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    parameter = torch.nn.Parameter(torch.tensor([0.5, -0.5]))
    parameter.origin = "here"  # type: ignore[attr-defined]
    state = torch.nn.Linear(3, 2).state_dict()  # an ordered dictionary with metadata
    return {
        "args": argparse.Namespace(layers=2, inner=argparse.Namespace(rates=[0.5, 1.0]), name=None),
        "x": x, "row": x[1], "transposed": x.t(), "every_second": x[::2, 1::3], "scalar": x[2, 3],
        "none": torch.zeros(0, 3), "bfloat16": torch.tensor([1.0, -2.5, 3e38]).bfloat16(),
        "float16": torch.tensor([1.0, -2.5]).half(), "float64": torch.tensor([1e300], dtype=torch.float64),
        "int64": torch.tensor([1 << 40, -1]), "int32": torch.tensor([-7], dtype=torch.int32),
        "int16": torch.tensor([-7], dtype=torch.int16), "int8": torch.tensor([-7], dtype=torch.int8),
        "uint8": torch.tensor([200], dtype=torch.uint8), "bool": torch.tensor([True, False]),
        "parameter": parameter, "names": list(state), "ordered": OrderedDict(b=1, a=(2, "two")),
        "state": OrderedDict(state, weight=torch.ones(2, 3), bias=torch.zeros(2)), "device": torch.device("cpu"),
    }  # fmt: skip


if __name__ == "__main__":
    torch.save(value(), FOLDER / "torch_zip.pt")
    torch.save(value(), FOLDER / "torch_stream.pt", _use_new_zipfile_serialization=False)
