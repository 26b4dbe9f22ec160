"""Where commands run, and networks that are only counted."""

import pytest
import torch
from torch import nn

from msv.profiling.devices import chosen_device, without_weights


def test_a_network_that_is_only_counted_fills_no_memory():
    assert without_weights(lambda: nn.Linear(3, 4)).weight.is_meta


def test_one_that_computes_with_values_while_it_is_built_is_built_for_real():
    assert without_weights(lambda: nn.Linear(int(torch.ones(3).sum().item()), 4)).weight.shape == (4, 3)


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="--device is cuda, but torch finds no GPU here; use --device cpu"):
        chosen_device("cuda")
