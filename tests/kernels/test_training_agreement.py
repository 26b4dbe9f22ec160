"""Training msvmamba_nano on real data: the Triton kernels against the parallel scan, TF32 off.

Three questions, each with its own tolerance: do loss and gradients agree at the same weights and batch; do two
trainings from one seed stay together at first; and do trainings end at the same loss, in float32 and in bf16.

    MSV_FASHION_ROOT=... MSV_AGREEMENT_OUT=agreement.json pytest -m gpu -s tests/kernels/test_training_agreement.py

Without MSV_FASHION_ROOT, a folder of Fashion-MNIST's four files, it trains on scikit-learn's digits.
"""

import itertools
import json
import math
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nano_training
import pytest
import torch
from nano_training import BATCH, LAST, STEPS, batches, data, final_loss, loss_of, make_network, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.xdist_group("training_agreement"),
    pytest.mark.filterwarnings("ignore:.*deterministic"),
]

BACKEND = "triton"
KINDS = (("parallel", torch.float32), (BACKEND, torch.float32), (BACKEND, torch.bfloat16))
SEEDS = 5
SAME_WEIGHTS_AT = (0, 50, 100, 200)
TOGETHER = 50  # steps over which two trainings from one seed agree; later they part by chaos


@pytest.fixture(scope="module", autouse=True)
def exact_arithmetic():
    with nano_training.exact_arithmetic():
        yield


@pytest.fixture(autouse=True)
def poisoned():
    """Memory is poisoned in the kernels' own tests; here whole trainings run."""


@pytest.fixture(scope="module")
def summary():
    """What was found; printed at the end, and written to the file that MSV_AGREEMENT_OUT names."""
    found = {"data": type(data(0)).__name__, "batch": BATCH, "steps": STEPS, "device": torch.cuda.get_device_name()}
    yield found
    text = json.dumps(found, indent=2)
    print(f"\n{text}")
    if out := os.environ.get("MSV_AGREEMENT_OUT"):
        Path(out).write_text(f"{text}\n")


@pytest.fixture(scope="module", autouse=True)
def others():
    """The final losses to come of the trainings that `trajectory` and `follower` are not.

    They run beside each other and beside the tests, since a host launches such small steps more slowly than a GPU runs
    them.
    """
    runs = [(*kind, seed) for kind, seed in itertools.product(KINDS, range(SEEDS))]
    runs = [run for run in runs if run not in ((kind, torch.float32, 0) for kind in ("parallel", BACKEND))]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(runs), os.cpu_count() or 1), spawn) as pool:
        yield {run: pool.submit(final_loss, run[0], run[2], run[1]) for run in runs}


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


def test_final_losses_over_seeds(trajectory, follower, others, summary):
    known = {("parallel", torch.float32, 0): trajectory.final, (BACKEND, torch.float32, 0): follower.final}
    known |= {which: training.result() for which, training in others.items()}
    finals = {
        f"{backend}-{str(precision).removeprefix('torch.')}": [known[backend, precision, seed] for seed in range(SEEDS)]
        for backend, precision in KINDS
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
