"""The data under Lightning's Trainer: the batches of a resumed run are the straight run's."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from PIL import Image

from msv.data import Digits
from msv.data.sampling import EpochSampler, ShardSampler

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Recorder(LightningModule):
    """A linear model that keeps every batch it is given, by (stage, epoch)."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(32 * 32, 10)
        self.seen: dict[tuple[str, int], list[torch.Tensor]] = {}

    def training_step(self, batch, _):
        images, labels = batch
        self.seen.setdefault(("train", self.current_epoch), []).append(images)
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch, _):
        self.seen.setdefault(("val", self.current_epoch), []).append(batch[0])

    def predict_step(self, batch, _):
        return batch[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stop(Callback):
    """Ends the run when an epoch begins, as Ctrl-C between two epochs does."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == self.epoch:
            raise InterruptedRunError


class InterruptedRunError(Exception):
    pass


def trainer(folder, epochs, callbacks=(), **arguments):
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        **arguments,
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("after_validation", [True, False], ids=["saved-after-val", "saved-at-epoch-end"])
def test_a_resumed_run_sees_the_batches_of_the_straight_run(tmp_path, workers, after_validation):
    straight = Recorder()
    trainer(tmp_path, 4).fit(straight, Digits(seed=1, batch_size=256))

    first, again = Recorder(), Recorder()
    saving = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=not after_validation)
    with pytest.raises(InterruptedRunError):
        trainer(tmp_path, 4, [saving, Stop(2)]).fit(first, Digits(seed=1, batch_size=256, num_workers=workers))
    again_data = Digits(seed=1, batch_size=256, num_workers=workers)
    trainer(tmp_path, 4).fit(again, again_data, ckpt_path=tmp_path / "last.ckpt")

    assert sorted(again.seen) == [("train", 2), ("train", 3), ("val", 2), ("val", 3)]
    for key, batches in {**first.seen, **again.seen}.items():
        assert len(batches) == len(straight.seen[key])
        for got, expected in zip(batches, straight.seen[key], strict=True):
            assert torch.equal(got, expected)
    assert not torch.equal(straight.seen["train", 0][0], straight.seen["train", 1][0])


def test_lightning_leaves_our_samplers(tmp_path):
    module, data = Recorder(), Digits(batch_size=256)
    running = trainer(tmp_path, 1)
    running.fit(module, data)
    assert isinstance(running.train_dataloader.sampler, EpochSampler)
    assert isinstance(running.val_dataloaders.sampler, ShardSampler)


@pytest.mark.parametrize(("world", "rank"), [(2, 0), (2, 1), (3, 2)])
def test_replicas_come_from_the_trainer(world, rank):
    class Attached:
        world_size = world
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        global_rank = rank
        strategy = SimpleNamespace(root_device=torch.device("cpu"))

    data = Digits()
    data.trainer = Attached()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert (loader.sampler.num_replicas, loader.sampler.rank) == (world, rank)
    assert len(data.train_dataloader()) == 1077 // world // 64


def test_two_processes_see_each_image_once(tmp_path):
    # Real processes: that Lightning leaves the samplers under DDP too, and that unequal shares do not wait for ever.
    # Forked from a process of their own, since this one may have touched a GPU by now.
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, timeout=300)
    seen = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert [len(rank["train"]) for rank in seen] == [500, 500]  # 538 each, the incomplete batch dropped
    assert len(set(seen[0]["train"]) | set(seen[1]["train"])) == 1000
    assert len(seen[0]["val"]) + len(seen[1]["val"]) == len(set(seen[0]["val"]) | set(seen[1]["val"])) == 360


class Shares(Recorder):
    """Writes which images this process has seen, each known by its sum."""

    def on_train_end(self):
        sums = {
            stage: [image.double().sum().item() for batch in self.seen[stage, 0] for image in batch]
            for stage in ("train", "val")
        }
        torch.save(sums, f"{self.trainer.default_root_dir}/rank{self.global_rank}.pt")


def test_overfit_batches_work(tmp_path):
    module = Recorder()
    trainer(tmp_path, 2, overfit_batches=1, limit_val_batches=0).fit(module, Digits())
    # Lightning's own sequential sampler gives plain indices: the same images each epoch.
    assert torch.equal(module.seen["train", 0][0], module.seen["train", 1][0])


def test_predict(tmp_path):
    for name in "abc":
        Image.new("L", (40, 40)).save(tmp_path / f"{name}.png")
    data = Digits(predict_paths=[str(tmp_path)], batch_size=2)
    indices = trainer(tmp_path, 1).predict(Recorder(), data)
    assert torch.cat(indices).tolist() == [0, 1, 2]


if __name__ == "__main__":
    trainer(sys.argv[1], 1, devices=2, strategy="ddp_fork").fit(Shares(), Digits(batch_size=100))
