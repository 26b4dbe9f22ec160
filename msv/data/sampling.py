"""Randomness of the data as a pure function of (seed, epoch, sample index).

Nothing here reads or moves the global random states, so that a run resumed at an epoch's end sees the same batches as
the straight run, whatever the number of workers.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

# What a draw is for: the first word of every key, so that no two uses share their bits.
SPLIT, SHUFFLE, AUGMENT, WORKERS, PICTURES = range(5)

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def random_bits(*key: int | np.ndarray) -> np.ndarray:
    """64 random bits for each key: SplitMix64's finaliser, chained over the words of the key.

    Args:
        key: Integers or integer arrays, broadcast against each other.

    Returns:
        uint64 array of the broadcast shape, at least 1-D.
    """
    state = np.zeros(1, dtype=np.uint64)
    for word in key:
        state = (state ^ np.atleast_1d(np.asarray(word)).astype(np.uint64)) + _GAMMA
        state = (state ^ (state >> np.uint64(30))) * _MIX_1
        state = (state ^ (state >> np.uint64(27))) * _MIX_2
        state = state ^ (state >> np.uint64(31))
    return state


def uniform(*key: int | np.ndarray) -> np.ndarray:
    """Uniform float64 numbers in [0, 1), one for each key of `random_bits`."""
    return (random_bits(*key) >> np.uint64(11)) * 2.0**-53


def generator(*key: int) -> torch.Generator:
    """A torch generator of its own, seeded by the key."""
    return torch.Generator().manual_seed(int(random_bits(*key)[0] >> np.uint64(1)))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seeds the CPU generators of random, numpy and torch by the key, and restores their states afterwards.

    For transforms that draw from the global generators (timm's, torchvision's). CUDA's generator is left alone:
    `torch.manual_seed` would reset it too, and drop path with it.
    """
    bits = int(random_bits(*key)[0])
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(bits)
    np.random.seed(bits & 0xFFFFFFFF)
    torch.default_generator.manual_seed(bits >> 1)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def hold_out(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Splits indices in two, each class in the same proportion in both parts (to within one image).

    Args:
        labels: (N,) integer classes.
        count: How many of the N indices the second part gets.
        seed: The split's own seed, which has nothing to do with the training's.

    Returns:
        The indices that stay and those held out, both ascending.

    Raises:
        ValueError: if `count` is not between 1 and N - 1.
    """
    total = len(labels)
    if not 1 <= count < total:
        raise ValueError(f"cannot hold out {count} of {total} images; expected a number from 1 to {total - 1}")
    classes, sizes = np.unique(labels.numpy(), return_counts=True)
    exact = sizes * count / total
    quota = np.floor(exact).astype(np.int64)
    # Largest remainders first; a stable sort gives ties to the lower class.
    quota[np.argsort(quota - exact, kind="stable")[: count - quota.sum()]] += 1
    held = np.zeros(total, dtype=bool)
    for label, n in zip(classes, quota, strict=True):
        members = np.flatnonzero(labels.numpy() == label)
        held[members[np.argsort(random_bits(SPLIT, seed, members), kind="stable")[:n]]] = True
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))


class EpochSampler(DistributedSampler):
    """Shuffles anew each epoch and yields (epoch, index), so that the data set knows the epoch without being told.

    A `DistributedSampler`, because Lightning leaves those as they are under DDP and calls their `set_epoch`. The images
    left over when they do not divide evenly by the replicas are dropped (others each epoch), never repeated.

    Args:
        dataset: The training set.
        num_replicas: Number of processes.
        rank: This process's number.
        seed: The training's seed. It is hashed with the epoch rather than added to it, so that epoch 1 of seed 0 is
            not epoch 0 of seed 1.
    """

    def __init__(self, dataset: Dataset, num_replicas: int = 1, rank: int = 0, seed: int = 0):
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        images = len(self.dataset)  # type: ignore[arg-type]
        order = torch.randperm(images, generator=generator(SHUFFLE, self.seed, self.epoch))
        return iter([(self.epoch, index) for index in order[self.rank : self.total_size : self.num_replicas].tolist()])


class ShardSampler(DistributedSampler):
    """Every replica's share in order, without padding: each image is evaluated exactly once over all replicas.

    Lightning would otherwise put in torch's sampler, which repeats images until the shares are equal.

    Args:
        dataset: The validation or test set.
        num_replicas: Number of processes.
        rank: This process's number.
    """

    def __init__(self, dataset: Dataset, num_replicas: int = 1, rank: int = 0):
        super().__init__(dataset, num_replicas, rank, shuffle=False)
        self.share = range(rank, len(dataset), num_replicas)  # type: ignore[arg-type]
        self.num_samples = len(self.share)

    def __iter__(self) -> Iterator[int]:
        return iter(self.share)


class EpochLoader(DataLoader):
    """A DataLoader that asks its sampler for nothing before the first batch is wanted.

    Lightning makes the iterator of a resumed epoch before it calls `set_epoch`. Workers prefetch as soon as they exist,
    so a plain DataLoader with workers would begin a resumed run with the order of epoch 0.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


def split_index(indices: Sequence[int | tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and indices, int64 (B,) each; a plain index, as `Trainer(overfit_batches=...)` gives, is of epoch 0."""
    pairs = np.array([pair if isinstance(pair, tuple) else (0, pair) for pair in indices], dtype=np.int64)
    return pairs[:, 0], pairs[:, 1]
