"""`cuda_graphs: true` in the YAML: training replays what it launched once, and all else is as without it."""

import copy
import types

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from msv.data import Digits
from msv.models import MSVMamba
from msv.models.capture import capture_inference, capture_training, release
from msv.tasks import EMA, Classification

SHALLOW = {"depths": (1, 1, 1, 1)}  # and as wide as msvmamba_nano, for which kernels are compiled anyway
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def task(cuda_graphs=True, **network) -> Classification:
    def make(in_chans: int, num_classes: int) -> nn.Module:
        return MSVMamba(in_chans, num_classes, **SHALLOW, **network)

    return Classification(make, 10, 1, cuda_graphs=cuda_graphs, lr=1e-2)


def trainer(**options) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return pl.Trainer(
        **{"accelerator": "gpu", "devices": 1, "max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 2}
        | {"num_sanity_val_steps": 0, "callbacks": [EMA(0.5)]}
        | quiet
        | options
    )


def test_a_cpu_has_no_cuda_graphs():
    with pytest.raises(ValueError, match=r"model\.cuda_graphs=true: a cpu has no CUDA graphs; set it to false, or"):
        trainer(accelerator="cpu").fit(task(), datamodule=Digits(batch_size=8))


class OnGPU:
    """As much of a trainer as is asked whether its steps can be captured."""

    def __init__(self, accumulate_grad_batches=1, world_size=1):
        self.strategy = types.SimpleNamespace(root_device=torch.device("cuda"))
        self.accumulate_grad_batches, self.world_size = accumulate_grad_batches, world_size


@pytest.mark.parametrize("given", [{"accumulate_grad_batches": 4}, {"world_size": 2}], ids=str)
def test_a_step_is_one_batch_on_one_gpu(given):
    name, number = {"accumulate_grad_batches": "trainer.accumulate_grad_batches", "world_size": "devices"}, [*given]
    check = Classification._check_capture
    on_gpu, batches = OnGPU(**given), given.get("accumulate_grad_batches", 1)
    with pytest.raises(
        ValueError, match=rf"beside {name[number[0]]}={given[number[0]]}: expected 1, .*cuda_graphs=false"
    ):
        check(task(), on_gpu, batches)
    check(task(cuda_graphs=False), on_gpu, batches)
    check(task(), OnGPU(), 1)


def test_a_training_that_failed_leaves_nothing_captured(monkeypatch):
    captured = []

    def capture(network, images):
        captured.append([parameter.requires_grad for parameter in network.parameters()])
        network.forward = network.forward

    class Fail(pl.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("on purpose")

    class Freeze(pl.Callback):
        """Freezes the stem in the second epoch."""

        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.network.stem.requires_grad_(trainer.current_epoch == 0)

    monkeypatch.setattr("msv.tasks.classification.capture_training", capture)
    monkeypatch.setattr(Classification, "_check_capture", lambda *_: None)
    model, data = task(backend="parallel"), Digits(batch_size=4)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer(accelerator="cpu", callbacks=[Fail()]).fit(model, datamodule=data)
    assert "forward" in vars(model.network)
    trainer(accelerator="cpu", callbacks=[Freeze()], limit_val_batches=0).fit(model, datamodule=data)
    assert [all(found) for found in captured] == [True, True, False]
    assert "forward" not in vars(model.network)


def test_blocks_that_are_recomputed_cannot_be_captured():
    with pytest.raises(ValueError, match="beside grad_checkpointing=true, which cannot be captured; set one to false"):
        task(grad_checkpointing=True)._check_capture(OnGPU(), 1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_training_is_as_without(tmp_path, device, precision):
    found = []
    for cuda_graphs in (False, True):
        pl.seed_everything(0)
        model, saving = task(cuda_graphs, drop_path_rate=0.3), tmp_path / str(cuda_graphs)
        keep = pl.callbacks.ModelCheckpoint(saving, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        fit = {"precision": precision, "callbacks": [EMA(0.5), keep], "enable_checkpointing": True}
        trainer(**fit).fit(model, datamodule=Digits(batch_size=8))
        assert "forward" not in vars(model.network)
        again = task(cuda_graphs, drop_path_rate=0.3)
        trainer(**fit | {"callbacks": [EMA(0.5)]}).fit(
            again, datamodule=Digits(batch_size=8), ckpt_path=str(saving / "epoch=0.ckpt")
        )
        for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)  # resumed is straight
        found.append(model.state_dict())
    loose = {"rtol": 1e-3, "atol": 1e-3} if precision == "bf16-mixed" else {"rtol": 1e-5, "atol": 1e-6}
    for one, other in zip(*(weights.values() for weights in found), strict=True):
        torch.testing.assert_close(one, other, **loose)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_a_replay_is_the_call(device):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)).to(device)
    plain, images = copy.deepcopy(network), torch.randn(8, 3, 2, 2, device=device)
    state = torch.cuda.get_rng_state()
    capture_training(network, images)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(network.buffers(), plain.buffers(), strict=True))
    for batch in (torch.randn_like(images), torch.randn_like(images), images[:3]):
        found = []
        for which in (network, plain):
            torch.manual_seed(1)
            y = which(batch)
            y.square().sum().backward()
            found.append((y.detach().clone(), [p.grad.clone() for p in which.parameters()]))
            which.zero_grad()
        torch.testing.assert_close(*found)
    torch.testing.assert_close(network.eval()(images), plain.eval()(images))
    release(network)
    assert "forward" not in vars(network)
    replay = capture_inference(network, images)
    for batch in (images, torch.randn_like(images)):
        torch.testing.assert_close(replay(batch), plain(batch))
