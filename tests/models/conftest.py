"""A small network of every kind, and perturbation away from initial values, where norms and skips do nothing."""

import pytest
import torch

from msv.models import MSVMamba

SMALL = {"num_classes": 10, "dims": (8, 16, 32, 64), "depths": (1, 1, 2, 1), "d_state": 2}


@pytest.fixture
def perturb():
    def perturb(module, scale=0.1):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(scale * torch.randn_like(parameter))
        return module

    return perturb


@pytest.fixture
def make_small(perturb):
    """Makes a small network, perturbed, in evaluation mode; equal parameters for equal arguments."""

    def make(perturbed=True, **arguments):
        torch.manual_seed(0)
        network = MSVMamba(**{**SMALL, **arguments}).eval()
        return perturb(network) if perturbed else network

    return make
