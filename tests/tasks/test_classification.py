import math

import lightning.pytorch as pl
import pytest
import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from msv.models import MSVMamba, TimmModel
from msv.tasks import EMA, Classification
from msv.tasks.finite import NonFiniteLossError
from msv.tasks.schedule import accumulation, warmup_cosine

TINY = {"dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1)}


def linear(in_chans: int, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * 16, num_classes))


class Images(pl.LightningDataModule):
    """Random 4x4 images; only what the task asks of a data module."""

    def __init__(self, count: int = 48, batch_size: int = 8, classes: int = 10, labels: torch.Tensor | None = None):
        super().__init__()
        self.num_classes, self.in_chans, self.image_size, self.batch_size = classes, 1, 4, batch_size
        labels = torch.arange(count) % classes if labels is None else labels
        self.dataset = TensorDataset(torch.randn(count, 1, 4, 4), labels)

    def train_dataloader(self):
        return DataLoader(self.dataset, self.batch_size, drop_last=True)

    val_dataloader = test_dataloader = train_dataloader


class Watch(pl.Callback):
    """Notes the learning rate of each optimizer step and the weights after it."""

    def __init__(self):
        self.lr, self.weights, self.batches = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch[0].clone())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.lr.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append([parameter.detach().clone() for parameter in pl_module.parameters()])


def trainer(*callbacks, **options) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return pl.Trainer(**(defaults | options), callbacks=list(callbacks))


def task(**options) -> Classification:
    return Classification(linear, **({"num_classes": 10, "in_chans": 1} | options))


# The schedule.


def test_learning_rate_of_the_published_recipe_step_by_step():
    """300 epochs of 1251 steps, 20 of warm-up from 1e-6, cosine from 1e-3 to 1e-5 over the other 280."""
    epochs, per_epoch, warmup = 300, 1251, 20
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = warmup_cosine(optimizer, epochs * per_epoch, epochs, warmup, warmup_lr=1e-6, min_lr=1e-5)
    w, total = warmup * per_epoch, epochs * per_epoch
    for step in (0, 1, 500, w - 1, w, w + 1, 100_000, total // 2, total - 1, total):
        if step:
            scheduler.step_update(step)
        if step < w:
            expected = 1e-6 + (1e-3 - 1e-6) * step / w
        else:
            expected = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * (step - w) / (total - w)))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9)


def test_learning_rate_of_each_step_of_a_run_follows_the_global_batch():
    watch = Watch()
    model = task(lr=0.1, min_lr=0.01, warmup_lr=0.02, warmup_epochs=1, lr_batch_size=64, global_batch_size=16)
    trainer(watch, max_epochs=3).fit(model, datamodule=Images())
    # 48 images, 16 a step: 3 steps an epoch; all rates times 16 / 64.
    expected = [0.25 * (0.02 + 0.08 * step / 3) for step in range(3)]
    expected += [0.25 * (0.01 + 0.045 * (1 + math.cos(math.pi * step / 6))) for step in range(6)]
    assert [rates[0] for rates in watch.lr] == pytest.approx(expected)
    assert all(len(set(rates)) == 1 for rates in watch.lr)


def test_incomplete_global_batches_are_dropped():
    watch = Watch()
    fitting = trainer(watch, max_epochs=1)
    fitting.fit(task(global_batch_size=32), datamodule=Images(count=56))  # 7 batches of 8, 4 a step
    assert (fitting.global_step, len(watch.batches)) == (1, 4)


@pytest.mark.parametrize(("batch", "devices", "expected"), [(128, 8, 1), (128, 1, 8), (64, 2, 8), (1024, 1, 1)])
def test_accumulation(batch, devices, expected):
    assert accumulation(1024, batch, devices) == expected


def test_accumulation_names_a_batch_that_fits():
    with pytest.raises(ValueError, match=r"global_batch_size=1024 .*batch_size=96 x 2.* = 192; try .*batch_size=64"):
        accumulation(1024, 96, 2)


def test_accumulation_by_hand_beside_a_global_batch():
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=2 beside model.global_batch_size=16"):
        trainer(accumulate_grad_batches=2).fit(task(global_batch_size=16), datamodule=Images())


@pytest.mark.parametrize(
    ("options", "fitting", "message"),
    [
        ({"warmup_epochs": 2}, {}, r"warmup_epochs=2 leaves none of trainer.max_epochs=2"),
        ({}, {"max_epochs": -1}, r"max_epochs=-1: .*from 1 up"),
        ({"mixup": 0.8}, {}, r"batch_size=7: .*even number"),
        ({"global_batch_size": 20}, {}, r"no multiple of data.batch_size=7"),
    ],
)
def test_check_before_training(options, fitting, message):
    with pytest.raises(ValueError, match=message):
        task(**options).check(trainer(**fitting), Images(batch_size=7))


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.0}, {"lr": float("nan")}, {"min_lr": -1.0}, {"mixup": -0.1}, {"mixup_prob": 1.5}, {"num_classes": 1},
     {"label_smoothing": 2.0}, {"global_batch_size": 0}],
)  # fmt: skip
def test_values_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        task(**options)


# The optimizer.


def test_weight_decay_of_the_published_nano():
    """6,818,208 parameters decayed and 45,928 not, as the published code has it."""
    network = TimmModel("msvmamba_nano")(3, 1000)
    groups = param_groups_weight_decay(network, 0.05, no_weight_decay_list=network.no_weight_decay())
    sizes = {group["weight_decay"]: sum(p.numel() for p in group["params"]) for group in groups}
    assert sizes == {0.05: 6_818_208, 0.0: 45_928}


class Undecayed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(3, 3))
        self.linear = nn.Linear(16, 10)

    def no_weight_decay(self):
        return {"table"}

    def forward(self, x):
        return self.linear(x.flatten(1)) + 0 * self.table.sum()


def test_the_networks_no_weight_decay_counts():
    model = Classification(lambda chans, classes: Undecayed(), 10, 1)
    fitting = trainer(max_epochs=1)
    fitting.fit(model, datamodule=Images())
    optimizer = fitting.optimizers[0]
    none, decayed = optimizer.param_groups
    assert [p.shape for p in none["params"]] == [(3, 3), (10,)]
    assert [p.shape for p in decayed["params"]] == [(10, 16)]
    assert (none["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"] is True


def test_gradients_are_clipped_under_bf16_with_a_fused_optimizer():
    norms = []

    class Norm(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if grads:
                norms.append(torch.stack([g.norm() for g in grads]).norm().item())

    fitting = trainer(Norm(), precision="bf16-mixed", gradient_clip_val=1e-3, max_epochs=2)
    fitting.fit(task(), datamodule=Images())
    assert fitting.optimizers[0].defaults["fused"] is True
    assert norms
    assert max(norms) == pytest.approx(1e-3, rel=1e-3)


# The loss and the metrics.


@pytest.mark.parametrize(
    ("options", "name"),
    [({}, "CrossEntropyLoss"), ({"label_smoothing": 0.1}, "LabelSmoothingCrossEntropy"),
     ({"mixup": 0.8}, "SoftTargetCrossEntropy"), ({"cutmix": 1.0, "mixup_prob": 0.0}, "CrossEntropyLoss")],
)  # fmt: skip
def test_loss(options, name):
    assert type(task(**options).train_loss).__name__ == name


@pytest.mark.parametrize(("classes", "names"), [(5, {"top1"}), (6, {"top1", "top5"})])
def test_top5_needs_more_than_five_classes(classes, names):
    assert set(task(num_classes=classes).configure_metrics().keys()) == names


def test_metrics_are_of_all_images():
    """48 images in batches of 32 and 16, the first batch all wrong: neither counts for more than its images."""
    data = Images(classes=10)
    data.train_dataloader = data.test_dataloader = lambda: DataLoader(data.dataset, 32)
    model = task()
    images = data.dataset.tensors[0]
    logits = model(images)
    data.dataset = TensorDataset(images, torch.cat([logits[:32].argmin(1), logits[32:].argmax(1)]))
    (result,) = trainer().test(model, datamodule=data, verbose=False)
    assert result["test_top1"] == pytest.approx(16 / 48)
    assert result["test_top5"] == pytest.approx(16 / 48)
    wanted = nn.functional.cross_entropy(logits, data.dataset.tensors[1]).item()
    assert result["test_loss"] == pytest.approx(wanted, rel=1e-5)


def test_predictions_are_probabilities():
    out = task().predict_step((torch.randn(3, 1, 4, 4), torch.arange(3)), 0)
    assert out.shape == (3, 10)
    assert torch.allclose(out.sum(1), torch.ones(3))


def test_mixing_is_a_function_of_seed_and_epoch(tmp_path):
    def mixed(**options):
        seen = []

        class Spy(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(16, 10)

            def forward(self, x):
                seen.append(x.clone())
                return self.linear(x.flatten(1))

        torch.manual_seed(7)
        data = Images()
        # Whatever was drawn before must not matter.
        torch.randn(options.pop("drawn", 0))
        model = Classification(lambda chans, classes: Spy(), 10, 1, mixup=0.8, cutmix=1.0, **options)
        trainer(limit_val_batches=0).fit(model, datamodule=data)
        return torch.stack(seen)

    one, same, other = mixed(seed=3), mixed(seed=3, drawn=5), mixed(seed=4)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one[:6], one[6:])  # two epochs over the same unshuffled images


@pytest.mark.parametrize("steps", [6, 4])
def test_the_epochs_loss_is_the_mean_over_its_images(steps):
    losses = []

    class Note(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    fitting = trainer(Note(), limit_val_batches=0, max_epochs=1, max_steps=steps)  # an epoch has 6
    fitting.fit(task(), datamodule=Images())
    assert len(losses) == steps
    assert fitting.callback_metrics["train_loss"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-6)


# What is wrong with a batch.


@pytest.mark.parametrize(("label", "shown"), [(10, "10"), (-1, "-1")])
def test_label_out_of_range(label, shown):
    labels = torch.zeros(48, dtype=torch.int64)
    labels[20] = label
    with pytest.raises(ValueError, match=rf"label {shown} in a batch: expected 0 to 9"):
        trainer().fit(task(), datamodule=Images(labels=labels))


@pytest.mark.parametrize("every", [1, 4, 50])
def test_non_finite_loss_names_the_first_step_and_its_range(every):
    data = Images()
    images = data.dataset.tensors[0]
    images[16:24] = images[16:24].clamp(-1, 1)
    images[16, 0, 0, 0] = math.inf
    data.dataset.tensors[0][20, 0, 0, 0] = -3.0
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at step 2; .* from -3 to inf.*lower model.lr"):
        trainer(log_every_n_steps=every).fit(task(), datamodule=data)


def test_a_non_finite_epoch_is_never_validated_or_saved(tmp_path):
    calls = []

    class Note(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            calls.append("validation")

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            calls.append("save")

    data = Images()
    data.dataset.tensors[0][-1] = math.nan
    saving = pl.callbacks.ModelCheckpoint(tmp_path, save_on_train_epoch_end=True)
    with pytest.raises(NonFiniteLossError):
        trainer(Note(), saving, enable_checkpointing=True, log_every_n_steps=50).fit(task(), datamodule=data)
    assert calls == []


# The moving average.


def hand_loop(watch: Watch, first: list[torch.Tensor], decay: float, warmup: bool) -> list[torch.Tensor]:
    average = [tensor.double() for tensor in first]
    for step, weights in enumerate(watch.weights):
        d = min(decay, (1 + step) / (10 + step)) if warmup else decay
        average = [d * a + (1 - d) * w.double() for a, w in zip(average, weights, strict=True)]
    return average


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, False), (0.9, True), (0.3, True), (0.0, False)])
def test_ema_equals_a_loop_by_hand(decay, warmup):
    watch, model = Watch(), task(lr=0.05)
    first = [parameter.detach().clone() for parameter in model.parameters()]
    trainer(watch, EMA(decay, warmup)).fit(model, datamodule=Images())
    assert len(watch.weights) == 12
    for got, wanted in zip(model.parameters(), hand_loop(watch, first, decay, warmup), strict=True):
        torch.testing.assert_close(got.detach().double(), wanted, rtol=0, atol=1e-6)


def test_ema_follows_optimizer_steps_not_batches():
    watch, model = Watch(), task(lr=0.05, global_batch_size=16)
    first = [parameter.detach().clone() for parameter in model.parameters()]
    trainer(watch, EMA(0.5)).fit(model, datamodule=Images())
    watch.weights = watch.weights[1::2]
    for got, wanted in zip(model.parameters(), hand_loop(watch, first, 0.5, False), strict=True):
        torch.testing.assert_close(got.detach().double(), wanted, rtol=0, atol=1e-6)


def test_ema_of_integer_buffers():
    """BatchNorm counts its batches in an int64 buffer, which cannot be averaged."""

    def network(chans, classes):
        return nn.Sequential(nn.BatchNorm2d(chans), nn.Flatten(), nn.Linear(16, classes))

    model = Classification(network, 10, 1)
    trainer(EMA(0.5)).fit(model, datamodule=Images())
    assert model.network[0].num_batches_tracked == 12


def test_validation_sees_the_averaged_weights_and_training_goes_on_with_the_raw_ones():
    seen = []

    class Look(pl.Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            seen.append(pl_module.network[1].weight.detach().clone())

    watch, model = Watch(), task(lr=0.05)
    trainer(watch, EMA(1.0), Look()).fit(model, datamodule=Images())
    assert all(torch.equal(weight, seen[0]) for weight in seen)  # decay 1: the average never moves
    assert not torch.equal(watch.weights[-1][0], seen[0])


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_ema_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="expected a number from 0 to 1"):
        EMA(decay)


# Weights from elsewhere.


def test_initial_weights_are_a_function_of_the_seed():
    torch.manual_seed(1)
    one = Classification(lambda c, n: MSVMamba(c, n, **TINY), 10, 1, seed=5).state_dict()
    torch.manual_seed(2)
    two = Classification(lambda c, n: MSVMamba(c, n, **TINY), 10, 1, seed=5).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", ["plain", "lightning", "safetensors"])
def test_pretrained(tmp_path, kind):
    source = MSVMamba(1, 10, **TINY)
    state = source.state_dict()
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    elif kind == "lightning":
        torch.save({"state_dict": {f"network.{name}": value for name, value in state.items()}, "epoch": 3}, path)
    else:
        torch.save(state, path)
    model = Classification(lambda c, n: MSVMamba(c, n, **TINY), 10, 1, pretrained=str(path))
    assert all(torch.equal(value, state[name]) for name, value in model.network.state_dict().items())


def test_pretrained_with_another_number_of_classes(tmp_path, caplog):
    source = MSVMamba(1, 7, **TINY)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    options = {"pretrained": str(tmp_path / "weights.pt")}
    with pytest.raises(ValueError, match=r"head.fc.weight is \(7, 64\), expected \(10, 64\)\); set model.drop_head"):
        Classification(lambda c, n: MSVMamba(c, n, **TINY), 10, 1, **options)
    model = Classification(lambda c, n: MSVMamba(c, n, **TINY), 10, 1, drop_head=True, **options)
    assert "another number of classes" in caplog.text
    own, theirs = model.network.state_dict(), source.state_dict()
    differ = [name for name in own if own[name].shape != theirs[name].shape or not torch.equal(own[name], theirs[name])]
    assert differ == ["head.fc.weight", "head.fc.bias"]


def test_pretrained_of_another_architecture(tmp_path):
    torch.save(MSVMamba(1, 10, **(TINY | {"depths": (1, 1, 2, 1)})).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"another architecture: \d+ unexpected: stages.2.blocks.1"):
        Classification(lambda c, n: MSVMamba(c, n, **TINY), 10, 1, pretrained=str(tmp_path / "weights.pt"))


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_pretrained_truncated_or_missing(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match="no such"):
        task(pretrained=str(path))
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ValueError, match="truncated"):
        task(pretrained=str(path))
