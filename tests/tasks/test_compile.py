"""`compile: true` in the YAML: the network is compiled, and all else is as without it."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from msv.data import Digits
from msv.models import MSVMamba
from msv.tasks import EMA, Classification

TINY = {"dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "backend": "parallel"}


@pytest.fixture
def graphs(monkeypatch):
    """Compiles without generating code, and notes the mode of each graph."""
    modes = []

    def backend(graph, inputs):
        modes.append("training" if torch.is_grad_enabled() else "evaluation")
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield modes
    torch._dynamo.reset()


def fit(folder, compile: bool, stop: bool = False, resume: bool = False) -> Classification:
    def network(in_chans: int, num_classes: int) -> nn.Module:
        return MSVMamba(in_chans, num_classes, **TINY)

    model = Classification(network, 10, 1, compile=compile, lr=1e-2)
    saving = pl.callbacks.ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_progress_bar=False, limit_train_batches=2,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[EMA(0.5), saving], limit_val_batches=2,
    )  # fmt: skip
    if stop:
        trainer.callbacks.append(Stop())
    trainer.fit(model, datamodule=Digits(batch_size=8), ckpt_path=str(folder / "last.ckpt") if resume else None)
    return model


class Stop(pl.Callback):
    """Ends the training after the first of its two epochs."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


def test_compiled_training_validates_saves_and_resumes_as_without(tmp_path, graphs):
    plain = fit(tmp_path / "plain", compile=False)
    assert graphs == []
    compiled = fit(tmp_path / "compiled", compile=True)
    assert set(graphs) == {"training", "evaluation"}
    fit(tmp_path / "cut", compile=True, stop=True)
    resumed = fit(tmp_path / "cut", compile=True, resume=True)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    for one, two, three in zip(*(m.state_dict().values() for m in (plain, compiled, resumed)), strict=True):
        torch.testing.assert_close(one, two)
        assert torch.equal(two, three)
    kept = [torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("plain", "compiled")]
    for key in ("state_dict", "current_model_state"):
        assert list(kept[0][key]) == list(kept[1][key])


def test_a_checkpoint_of_a_compiled_training_loads_without(tmp_path, graphs):
    compiled = fit(tmp_path, compile=True)
    plain = Classification(lambda c, n: MSVMamba(c, n, **TINY), 10, 1, pretrained=str(tmp_path / "last.ckpt"))
    for one, two in zip(plain.state_dict().values(), compiled.state_dict().values(), strict=True):
        assert torch.equal(one, two)
