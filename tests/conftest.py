"""What every test starts from: one thread, so that two workers share two cores well, and a fixed seed.

Without a GPU, Triton's interpreter runs the kernels; Triton reads its switch when kernels are first imported.
"""

import os
import random

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
