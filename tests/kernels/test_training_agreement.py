"""Training msvmamba_nano on real data: the Triton kernels against the parallel scan, TF32 off.

Three questions, each with its own tolerance: do loss and gradients agree at the same weights and batch; do two
trainings from one seed stay together at first; and do trainings end at the same loss, in float32 and in bf16.

    MSV_FASHION_ROOT=... MSV_AGREEMENT_OUT=agreement.json pytest -m gpu -s tests/kernels/test_training_agreement.py

Without MSV_FASHION_ROOT, a folder of Fashion-MNIST's four files, it trains on scikit-learn's digits.
"""

import copy
import itertools
import json
import math
import os
import statistics
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F

import msv.models  # noqa: F401  registers the presets
from msv.data import Digits, FashionMNIST
from msv.models.capture import capture_training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore:.*deterministic"),
]

DEVICE = "cuda"
BACKEND = "triton"
BATCH, STEPS, SEEDS = 64, 200, 5
SAME_WEIGHTS_AT = (0, 50, 100, 200)
TOGETHER = 50  # steps over which two trainings from one seed agree; later they part by chaos
LAST = 20  # steps over which a final loss is the mean


class Training(NamedTuple):
    losses: list[float]
    weights: dict[int, dict[str, torch.Tensor]]  # by step, where asked for

    @property
    def final(self):
        return statistics.fmean(self.losses[-LAST:])


@pytest.fixture(scope="module", autouse=True)
def exact_arithmetic():
    """TF32 off, and cuDNN and torch deterministic wherever they can be."""
    precision, fill = torch.get_float32_matmul_precision(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(autouse=True)
def poisoned():
    """Memory is poisoned in the kernels' own tests; here whole trainings run."""


def data(seed):
    root = os.environ.get("MSV_FASHION_ROOT")
    if root:
        return FashionMNIST(root, download=False, image_size=64, batch_size=BATCH, num_workers=0, seed=seed)
    return Digits(image_size=32, batch_size=BATCH, seed=seed)


def batches(seed):
    """STEPS + 1 batches of a training, shuffled and augmented anew each epoch."""
    module = data(seed)
    module.setup("fit")
    loader = module.train_dataloader()

    def forever():
        for epoch in itertools.count():
            loader.sampler.set_epoch(epoch)
            yield from loader

    return [tuple(t.to(DEVICE) for t in batch) for batch in itertools.islice(forever(), STEPS + 1)]


def make_network(backend, seed):
    torch.manual_seed(seed)
    return timm.create_model("msvmamba_nano", num_classes=10, in_chans=1, backend=backend).to(DEVICE).train()


def autocast(precision):
    return torch.autocast(DEVICE, torch.bfloat16, enabled=precision == torch.bfloat16)


def loss_of(network, batch, step, precision=torch.float32):
    """The loss of a step, whose dropped paths depend on the step alone."""
    images, labels = batch
    torch.manual_seed(step)
    with autocast(precision):
        return F.cross_entropy(network(images), labels)


def train(backend, seed, precision=torch.float32, keep=()):
    """Trains with captured steps, since the parallel scan launches so much that a host takes minutes."""
    network, made = make_network(backend, seed), batches(seed)
    with autocast(precision):
        capture_training(network, made[0][0])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    losses, weights = [], {}
    for step, batch in enumerate(made):
        if step in keep:
            weights[step] = copy.deepcopy(network.state_dict())
        if step == STEPS:
            break
        loss = loss_of(network, batch, step, precision)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return Training(torch.stack(losses).tolist(), weights)


@pytest.fixture(scope="module")
def summary():
    """What was found; printed at the end, and written to the file that MSV_AGREEMENT_OUT names."""
    found = {"data": type(data(0)).__name__, "batch": BATCH, "steps": STEPS, "device": torch.cuda.get_device_name()}
    yield found
    text = json.dumps(found, indent=2)
    print(f"\n{text}")
    if out := os.environ.get("MSV_AGREEMENT_OUT"):
        Path(out).write_text(f"{text}\n")


@pytest.fixture(scope="module")
def trajectory():
    """The training that the others are held against."""
    return train("parallel", 0, keep=SAME_WEIGHTS_AT)


@pytest.fixture(scope="module")
def follower():
    """The kernels' training from the same seed."""
    return train(BACKEND, 0)


def loss_and_gradients(backend, weights, batch, step):
    network = make_network(backend, 0)
    network.load_state_dict(weights)
    loss = loss_of(network, batch, step)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in network.named_parameters()}


def test_loss_and_gradients_at_the_same_weights(trajectory, summary):
    found, batch_of = summary.setdefault("same_weights", {}), batches(0)
    for step in SAME_WEIGHTS_AT:
        weights, batch = trajectory.weights[step], batch_of[step]
        loss, gradients = loss_and_gradients(BACKEND, weights, batch, step)
        expected_loss, expected = loss_and_gradients("parallel", weights, batch, step)
        overall = math.hypot(*(t.norm().item() for t in expected.values()))
        errors = {}
        for name, t in expected.items():
            scale = t.norm().item()
            scale = scale if scale > 1e-6 * overall else overall  # a gradient that is but rounding
            errors[name] = (gradients[name] - t).norm().item() / scale
        worst = max(errors, key=errors.__getitem__)
        found[step] = {
            "loss": expected_loss,
            "loss_relative_difference": abs(loss - expected_loss) / expected_loss,
            "largest_gradient_relative_difference": errors[worst],
            "of": worst,
        }
    assert all(at["loss_relative_difference"] <= 1e-5 for at in found.values()), found
    assert all(at["largest_gradient_relative_difference"] <= 1e-4 for at in found.values()), found


def test_trainings_from_one_seed_stay_together(trajectory, follower, summary):
    differences = [abs(a - b) for a, b in zip(follower.losses, trajectory.losses, strict=True)]
    summary["one_seed"] = {
        "losses": {step: trajectory.losses[step] for step in (0, TOGETHER - 1, STEPS - 1)},
        f"largest_difference_over_{TOGETHER}_steps": max(differences[:TOGETHER]),
        f"largest_difference_over_{STEPS}_steps": max(differences),
    }
    assert max(differences[:TOGETHER]) <= 1e-3
    assert statistics.fmean(trajectory.losses[-LAST:]) < 0.8 * trajectory.losses[0]  # it has learnt something


def test_final_losses_over_seeds(trajectory, follower, summary):
    others = range(1, SEEDS)
    finals = {
        "parallel-float32": [run.final for run in (trajectory, *(train("parallel", seed) for seed in others))],
        f"{BACKEND}-float32": [run.final for run in (follower, *(train(BACKEND, seed) for seed in others))],
        f"{BACKEND}-bf16": [train(BACKEND, seed, torch.bfloat16).final for seed in range(SEEDS)],
    }
    found = summary["final_losses"] = {
        name: {
            "mean": statistics.fmean(losses),
            "standard_error": statistics.stdev(losses) / SEEDS**0.5,
            "losses": losses,
        }
        for name, losses in finals.items()
    }
    differences = summary["final_losses_difference"] = {}
    for one, other in itertools.combinations(found, 2):
        difference = abs(found[one]["mean"] - found[other]["mean"])
        error = math.hypot(found[one]["standard_error"], found[other]["standard_error"])
        differences[f"{one} to {other}"] = {"difference": difference, "standard_error": error}
    assert all(at["difference"] < 2 * at["standard_error"] for at in differences.values()), differences
