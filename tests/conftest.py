"""What every test starts from: one thread, so that two workers share two cores well, and a fixed seed."""

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds Python, NumPy and torch, so that a test sees the same numbers alone and among others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0
