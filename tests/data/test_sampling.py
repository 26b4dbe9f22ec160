"""Samplers, seeds and splits."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from msv.data.sampling import EpochLoader, EpochSampler, ShardSampler, hold_out, random_bits, seeded, uniform


def images(n):
    return TensorDataset(torch.arange(n))


def test_random_bits_are_a_function_of_the_key():
    # Frozen: other bits would move every split and every augmentation.
    assert random_bits(0, 1, 2).tolist() == [6768782832058643234]
    keys = random_bits(7, np.arange(4)[:, None], np.arange(1000))
    assert keys.shape == (4, 1000)
    assert len(np.unique(keys)) == keys.size
    assert keys[3, 5] == random_bits(7, 3, 5)[0]
    assert random_bits(1, 2) != random_bits(2, 1)


def test_uniform_is_uniform():
    draws = uniform(0, np.arange(100_000))
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 50  # chi-squared, 19 degrees: 43.8 at p = 0.001
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.02


def test_seeded_decides_the_draws_and_leaves_the_global_states():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    with seeded(1, 2, 3):
        first = draw()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with seeded(1, 2, 3):
        assert draw() == first
    with seeded(1, 2, 4):
        assert not set(draw()) & set(first)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_hold_out_is_stratified_disjoint_and_fixed():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 21)
    rest, held = hold_out(labels, 20, seed=0)
    assert sorted([*rest.tolist(), *held.tolist()]) == list(range(101))
    assert torch.bincount(labels[held]).tolist() == [10, 6, 4]
    assert torch.equal(hold_out(labels, 20, seed=0)[1], held)
    assert not torch.equal(hold_out(labels, 20, seed=1)[1], held)


@pytest.mark.parametrize("count", [0, 10, -1])
def test_hold_out_refuses_all_or_nothing(count):
    with pytest.raises(ValueError, match=f"hold out {count} of 10 images"):
        hold_out(torch.zeros(10, dtype=torch.long), count, seed=0)


def test_ranks_partition_each_epoch():
    ranks = [EpochSampler(images(103), 4, rank, seed=3) for rank in range(4)]
    for epoch in range(2):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in ranks]
        assert [len(share) for share in shares] == [len(sampler) for sampler in ranks] == [25] * 4
        seen = [index for share in shares for _, index in share]
        assert len(set(seen)) == 100
        assert {got for share in shares for got, _ in share} == {epoch}


def test_orders_of_epochs_and_seeds_differ():
    def order(seed, epoch):
        sampler = EpochSampler(images(50), seed=seed)
        sampler.set_epoch(epoch)
        return tuple(index for _, index in sampler)

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    # Nine different ones: epoch 1 of seed 0 is not epoch 0 of seed 1, as it would be with seed + epoch.
    assert len(set(orders)) == 9
    assert order(1, 2) == order(1, 2)


def test_shards_cover_every_image_once():
    shares = [ShardSampler(images(10), 4, rank) for rank in range(4)]
    assert sorted(index for share in shares for index in share) == list(range(10))
    assert [len(share) for share in shares] == [3, 3, 2, 2]
    assert list(ShardSampler(images(5))) == [0, 1, 2, 3, 4]


def test_loader_asks_its_sampler_only_when_a_batch_is_wanted():
    sampler = EpochSampler(images(8), seed=0)
    loader = EpochLoader(Echo(), batch_size=8, sampler=sampler, num_workers=1, collate_fn=list)
    iterator = iter(loader)
    sampler.set_epoch(5)  # as Lightning does, after it has made the iterator
    assert {epoch for epoch, _ in next(iterator)} == {5}


class Echo(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return index
