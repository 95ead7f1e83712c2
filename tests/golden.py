"Read the golden cases: numbers computed by running the original repositories (see `case`)."

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FOLDER = Path(os.environ.get("DLM_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


class Case:
    "One golden case: tensors by name, the configuration they were made with, and the tolerance of each output"

    def __init__(self, name):
        self.info = json.loads((FOLDER / f"{name}.json").read_text())
        self.tensors = load_file(FOLDER / f"{name}.safetensors")
        self.config = self.info["config"]

    def __getitem__(self, name):
        return self.tensors[name]

    def names(self, prefix):
        "Names below `prefix`, the prefix removed"
        return [n.removeprefix(prefix) for n in self.tensors if n.startswith(prefix)]

    def compare(self, actual, name, where=None):
        "Assert that `actual` equals the golden tensor `name` within the tolerance of its JSON, at `where` if given"
        expected, tolerance = self.tensors[name], self.info["tensors"][name]["tolerance"]
        assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, golden {tuple(expected.shape)}"
        mask = where if where is not None else torch.ones_like(expected, dtype=torch.bool)
        mask = mask.bool().expand_as(expected)
        assert mask.any(), f"{name}: nothing to compare"
        torch.testing.assert_close(actual[mask].to(expected.dtype), expected[mask], **tolerance)


def case(name):
    "The golden case `name`; skips the test where the folder is absent"
    if not (FOLDER / f"{name}.json").exists():
        pytest.skip(f"golden data not found in {FOLDER.name}/: set DLM_GOLDEN to the folder that holds it")
    return Case(name)
