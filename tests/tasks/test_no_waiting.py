"""The training loop asks the device for nothing between two steps: on a GPU that would stall it."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils._python_dispatch import TorchDispatchMode

from msv.data import Digits
from msv.models import MSVMamba
from msv.tasks import EMA, Classification, History

WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique", "_unique2", "masked_select"}
"""Operators that read a value back from the device."""


STEPS = 5


class Watch(TorchDispatchMode, pl.Callback):
    """Notes operators that wait, in all steps of an epoch but the last, whose end is where things are read."""

    def __init__(self):
        super().__init__()
        self.within, self.waited = False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.within and func._schema.name.partition("::")[2] in WAITING:
            self.waited.append(func._schema.name)
        return func(*args, **(kwargs or {}))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.within = batch_idx < STEPS - 1


class Watched(Classification):
    """Its labels are looked at while they are still on the host, which waits for nothing."""

    watch: Watch

    def on_before_batch_transfer(self, batch, dataloader_idx):
        within, self.watch.within = self.watch.within, False
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        self.watch.within = within
        return batch


def waited(folder, *callbacks, **options) -> list[str]:
    watch = Watch()
    model = Watched(
        lambda c, n: MSVMamba(c, n, (8, 16, 32, 64), (1, 1, 1, 1), drop_path_rate=0.2, drop_rate=0.1),
        10, 1, mixup=0.8, cutmix=1.0, label_smoothing=0.1,
    )  # fmt: skip
    model.watch = watch
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=STEPS, limit_val_batches=0,
        logger=CSVLogger(folder), enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=5.0, callbacks=[watch, EMA(0.9), History(), *callbacks], **options,
    )  # fmt: skip
    data = Digits(batch_size=8)
    with watch:
        trainer.fit(model, datamodule=data)
    assert trainer.global_step == STEPS
    return watch.waited


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_no_step_waits(tmp_path, precision):
    assert waited(tmp_path, precision=precision, log_every_n_steps=50) == []


def test_logging_reads_now_and_then(tmp_path):
    assert waited(tmp_path, log_every_n_steps=2)


def test_a_callback_that_waits_is_seen(tmp_path):
    class Read(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            outputs["loss"].item()

    found = waited(tmp_path, Read(), log_every_n_steps=50)
    assert found == ["aten::_local_scalar_dense"] * (STEPS - 1)


def test_the_average_lies_where_training_runs():
    """Before the weights do: they are moved after the callbacks' setup."""

    class Trainer:
        class strategy:  # noqa: N801
            root_device = torch.device("meta")

    ema, model = EMA(), Classification(lambda c, n: torch.nn.Linear(4, n), 10, 1)
    ema.setup(Trainer, model, "fit")
    assert next(model.parameters()).device.type == "cpu"
    assert next(ema._average_model.parameters()).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_no_step_waits_on_a_gpu(tmp_path):
    class Strict(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("error" if 0 < batch_idx < 4 else "default")

    trainer = pl.Trainer(
        accelerator="gpu", devices=1, max_epochs=1, limit_train_batches=6, limit_val_batches=2, gradient_clip_val=5.0,
        precision="bf16-mixed", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Strict(), EMA(0.9), History()],
    )  # fmt: skip
    model = Classification(lambda c, n: MSVMamba(c, n, drop_path_rate=0.2), 10, 1, mixup=0.8, cutmix=1.0)
    try:
        trainer.fit(model, datamodule=Digits(batch_size=64))
    finally:
        torch.cuda.set_sync_debug_mode("default")
