"""What every test starts from: one thread, so that two workers share two cores well, and a fixed seed.

Without a GPU, Triton's interpreter runs the kernels; Triton reads its switch when kernels are first imported.
"""

import os
import random
import sys
import types
from collections import defaultdict

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it deterministic matrix products are refused


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds Python, NumPy and torch, so that a test sees the same numbers alone and among others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture
def where() -> dict[str, str]:
    """A place of measurement, as kept rows have it."""
    from msv.kept import ENVIRONMENT

    return {name: "1" if name == "threads" else f"a {name}" for name in ENVIRONMENT}


@pytest.fixture
def clean_commit(monkeypatch):
    """The commit that is running, with nothing changed beside it, whatever the state of this repository."""
    monkeypatch.setattr("msv.provenance.commit", lambda: "0123456789ab")


class CfgNode(dict):
    """Stands in for yacs', which keeps its flags in the instance and its values in the dict."""

    def __init__(self, values):
        super().__init__(values)
        self.__dict__.update({"__immutable__": True, "__deprecated_keys__": set(), "__renamed_keys__": {}})


CfgNode.__module__ = "yacs.config"


@pytest.fixture
def save_as_published(monkeypatch):
    """Writes a file as the published training does: weights, and a yacs node that cannot be imported on reading."""

    def save(path, **weights):
        assert "yacs" not in sys.modules
        with monkeypatch.context() as patch:
            config = types.ModuleType("yacs.config")
            config.CfgNode = CfgNode
            patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
            patch.setitem(sys.modules, "yacs.config", config)
            node = CfgNode({"MODEL": CfgNode({"TYPE": "vssm", "DEPTHS": [1, 1, 2, 1]}), "SEED": 0, "TAG": None})
            rest = {"optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "lr_scheduler": {}, "scaler": {}}
            torch.save({**weights, **rest, "epoch": 299, "config": node, "max_accuracy": 77.3}, path)
        return path

    return save


@pytest.fixture
def to_published():
    """Turns a network's state dict into the published naming and layout, the half branch's weight set first."""
    from msv.models.published import published_name

    def convert(network):
        parts = defaultdict(dict)
        for name, value in network.state_dict().items():
            parts[published_name(name)][".s6_full." in name] = value
        found = {name: torch.cat([sets[key] for key in sorted(sets)]) for name, sets in parts.items()}
        for name, value in found.items():
            if name.endswith((".A_logs", ".Ds")):
                found[name] = value.flatten(0, 1)
            elif ".convFFN.linear" in name and name.endswith(".weight"):
                found[name] = value[..., None, None]
        return found

    return convert
