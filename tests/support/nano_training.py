"""Trainings of msvmamba_nano on real data, short and exact, by one backend or another."""

import copy
import itertools
import os
import statistics
from contextlib import contextmanager
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F

import msv.models  # noqa: F401  registers the presets
from msv.data import Digits, FashionMNIST

DEVICE = "cuda"
BATCH, STEPS = 64, 200
LAST = 20  # steps over which a final loss is the mean


class Training(NamedTuple):
    losses: list[float]
    weights: dict[int, dict[str, torch.Tensor]]  # by step, where asked for

    @property
    def final(self):
        return statistics.fmean(self.losses[-LAST:])


@contextmanager
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


def loss_of(network, batch, step, precision=torch.float32):
    """The loss of a step, whose dropped paths depend on the step alone."""
    images, labels = batch
    torch.manual_seed(step)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == torch.bfloat16):
        return F.cross_entropy(network(images), labels)


def train(backend, seed, precision=torch.float32, keep=()):
    network = make_network(backend, seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    losses, weights = [], {}
    for step, batch in enumerate(batches(seed)):
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


def final_loss(backend, seed, precision):
    """The final loss of a training, in a process of its own."""
    with exact_arithmetic():
        return train(backend, seed, precision).final
