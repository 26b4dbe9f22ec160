"""Image classification: loss, optimizer, schedule and metrics round any network."""

import logging
import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from msv.models import TimmModel
from msv.models.capture import capture_training, release
from msv.tasks.checkpoint import check_architecture, load_pretrained
from msv.tasks.finite import FiniteLatch
from msv.tasks.optimizer import adamw
from msv.tasks.schedule import accumulation, check_accumulation_free, check_epochs, check_mixing, warmup_cosine

log = logging.getLogger(__name__)


class Classification(pl.LightningModule):
    """Train a network to classify images.

    Args:
        network: The network: a class whose first two arguments are the channels of an image and the number of
            classes, such as msv.models.MSVMamba, or msv.models.TimmModel for any model of timm's registry.
        num_classes: Classes to tell apart; the command line takes it from the data.
        in_chans: Channels of an image; the command line takes it from the data.
        seed: Initial weights, mixup, drop path and dropout are functions of (seed, epoch, rank); the command line
            takes it from seed_everything.
        pretrained: Weights to start from: a .safetensors file, a state dict, a checkpoint of this task, or a
            published checkpoint.
        drop_head: Whether `fit` may start from weights of another number of classes: their classifier is left out
            then, and starts anew; otherwise that is an error. For validate, test and predict it always is one, since
            a classifier that starts anew knows nothing, unless a checkpoint of `fit` brings the trained one.
        lr: Learning rate after warm-up.
        min_lr: Learning rate at the end of the cosine.
        warmup_lr: Learning rate of the first step, when there are warm-up epochs.
        warmup_epochs: Epochs of linear warm-up; the cosine runs over the epochs after them.
        lr_batch_size: The global batch that the three learning rates are meant for: they are multiplied by the actual
            one over it. None takes them as they are.
        global_batch_size: Images of one optimizer step over all devices; gradients are accumulated to reach it. None
            takes data.batch_size times the number of devices.
        weight_decay: AdamW's weight decay, not on biases, one-dimensional tensors and the network's no_weight_decay().
        betas: AdamW's coefficients of the running averages.
        eps: AdamW's epsilon.
        label_smoothing: Share of the target that is spread over all classes.
        mixup: Alpha of mixup; 0 turns it off.
        cutmix: Alpha of cutmix; 0 turns it off.
        mixup_prob: Probability that a batch is mixed at all.
        mixup_switch_prob: Probability of cutmix when both are on.
        compile: Whether the network runs compiled, by torch.compile with its defaults. Names in checkpoints, and which
            run a grid takes for the same, are as without.
        cuda_graphs: Whether training replays the network's forward and backward as CUDA graphs, on one GPU: for small
            networks and slow hosts, whose launches take longer than the kernels. Names and runs are as without.

    Raises:
        ValueError: A value outside its range, or pretrained weights that do not fit the network.
    """

    def __init__(
        self,
        network: Callable[[int, int], nn.Module] | TimmModel,
        num_classes: int = 1000,
        in_chans: int = 3,
        seed: int = 0,
        pretrained: str | None = None,
        drop_head: bool = False,
        lr: float = 1e-3,
        min_lr: float = 1e-5,
        warmup_lr: float = 1e-6,
        warmup_epochs: int = 0,
        lr_batch_size: int | None = None,
        global_batch_size: int | None = None,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
        mixup_switch_prob: float = 0.5,
        compile: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: classification needs at least 2 classes; check the data")
        for name, value in (("lr", lr), ("eps", eps)):
            if not value > 0:
                raise ValueError(f"model.{name}={value}: expected a number above 0")
        for name, value in (
            ("min_lr", min_lr), ("warmup_lr", warmup_lr), ("warmup_epochs", warmup_epochs),
            ("weight_decay", weight_decay), ("mixup", mixup), ("cutmix", cutmix),
        ):  # fmt: skip
            if not value >= 0:
                raise ValueError(f"model.{name}={value}: expected a number from 0 up")
        for name, value in (
            ("label_smoothing", label_smoothing), ("mixup_prob", mixup_prob), ("mixup_switch_prob", mixup_switch_prob)
        ):  # fmt: skip
            if not 0 <= value <= 1:
                raise ValueError(f"model.{name}={value}: expected a number from 0 to 1")
        for name, size in (("lr_batch_size", lr_batch_size), ("global_batch_size", global_batch_size)):
            if size is not None and size < 1:
                raise ValueError(f"model.{name}={size}: expected a positive number of images, or null")

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.seed = seed
        self.pretrained = pretrained
        self.lr, self.min_lr, self.warmup_lr, self.warmup_epochs = lr, min_lr, warmup_lr, warmup_epochs
        self.lr_batch_size, self.global_batch_size = lr_batch_size, global_batch_size
        self.weight_decay, self.betas, self.eps = weight_decay, betas, eps
        self.label_smoothing = label_smoothing
        self.mixup, self.cutmix = mixup, cutmix
        self.mixup_prob, self.mixup_switch_prob = mixup_prob, mixup_switch_prob

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = network(in_chans, num_classes)
        self.network_factory = network
        self.head_left_out = pretrained is not None and load_pretrained(self.network, pretrained, drop_head)
        if compile:  # in place, so that the module and its names stay
            self.network.compile(mode="reduce-overhead" if cuda_graphs else None)
        self.compiled, self.cuda_graphs = compile, cuda_graphs
        self._captured: list[bool] | None = None  # which parameters are trained in what was captured
        self.mix = self.configure_mixup()
        self.train_loss = self.configure_loss()
        self.eval_loss = nn.CrossEntropyLoss()
        metrics = self.configure_metrics()
        self.val_metrics = metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_")
        self.latch = FiniteLatch()
        self._accumulate: int | None = None  # batches of one step, where this task chose it
        self._loss = self._loss_sum = torch.zeros(())
        self._images = 0

    # What a task of another kind would replace.

    def configure_mixup(self) -> Mixup | None:
        """Mixup and cutmix of a batch, or None when both are off."""
        if (self.mixup == 0 and self.cutmix == 0) or self.mixup_prob == 0:
            return None
        return Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.mixup_prob,
            switch_prob=self.mixup_switch_prob,
            label_smoothing=self.label_smoothing,
            num_classes=self.num_classes,
        )

    def configure_loss(self) -> nn.Module:
        """The training loss: soft targets when batches are mixed, smoothed labels or plain cross-entropy otherwise."""
        if self.mix is not None:
            return SoftTargetCrossEntropy()
        return LabelSmoothingCrossEntropy(self.label_smoothing) if self.label_smoothing else nn.CrossEntropyLoss()

    def configure_metrics(self) -> MetricCollection:
        """Top-1 accuracy, and top-5 where there are more than 5 classes, over all images alike."""
        ks = [1, 5] if self.num_classes > 5 else [1]
        # Arguments are not validated, which would wait for the device at each batch: labels are checked on the host.
        # Compute groups would merge two metrics that happen to agree on the first batch.
        return MetricCollection(
            {f"top{k}": MulticlassAccuracy(self.num_classes, k, "micro", validate_args=False) for k in ks},
            compute_groups=False,
        )

    def configure_optimizers(self) -> Any:
        """AdamW over the published parameter groups, and a cosine a step after linear warm-up."""
        scale = self.actual_lr() / self.lr
        optimizer = adamw(
            self.network, self.actual_lr(), self.weight_decay, self.betas, self.eps, fused=self._can_fuse()
        )
        scheduler = warmup_cosine(
            optimizer,
            steps=int(self.trainer.estimated_stepping_batches),
            epochs=check_epochs(self.trainer.max_epochs, self.warmup_epochs),
            warmup_epochs=self.warmup_epochs,
            warmup_lr=self.warmup_lr * scale,
            min_lr=self.min_lr * scale,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

    # Hooks of the loop.

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W)."""
        return self.network(images)

    def setup(self, stage: str) -> None:
        """Work out how many batches make one optimizer step."""
        self.latch.reset()
        if stage != "fit" or self.global_batch_size is None:
            return
        trainer = self.trainer
        data = trainer.datamodule  # type: ignore[attr-defined]
        check_accumulation_free(trainer.accumulate_grad_batches, self._accumulate, self.global_batch_size)
        count = accumulation(self.global_batch_size, data.batch_size, trainer.world_size)
        trainer.accumulate_grad_batches = self._accumulate = count
        batches = len(data.train_dataloader())
        if count > batches:
            raise ValueError(
                f"model.global_batch_size={self.global_batch_size}: an epoch has only {batches} batches "
                f"of {data.batch_size} images on each device; lower it"
            )
        if batches % count and isinstance(trainer.limit_train_batches, float) and trainer.limit_train_batches == 1.0:
            # The incomplete last global batch is dropped, as the incomplete batches of one device are.
            trainer.limit_train_batches = batches - batches % count

    def on_fit_start(self) -> None:
        """Give up what a training that failed may have captured."""
        self._release()

    def on_fit_end(self) -> None:
        """Give up what was captured."""
        self._release()

    def actual_batch_size(self) -> int:
        """Images of one optimizer step over all devices."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return data.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def actual_lr(self) -> float:
        """Learning rate after warm-up, for the actual global batch."""
        return self.lr * self.actual_batch_size() / self.lr_batch_size if self.lr_batch_size else self.lr

    def check(self, trainer: pl.Trainer, data: Any) -> None:
        """Raise a ValueError for what cannot be trained with this trainer and data, before anything is."""
        check_epochs(trainer.max_epochs, self.warmup_epochs)
        check_mixing(self.mix, data.batch_size)
        batches = trainer.accumulate_grad_batches
        if self.global_batch_size is not None:
            batches = accumulation(self.global_batch_size, data.batch_size, trainer.world_size)
            check_accumulation_free(trainer.accumulate_grad_batches, None, self.global_batch_size)
        self._check_capture(trainer, batches)

    def on_train_epoch_start(self) -> None:
        """Seed mixup, drop path and dropout from (seed, epoch, rank), so that a resumed run equals a straight one.

        The epoch's mean loss begins, too, which stays on the device. What callbacks have set of this epoch by now, such
        as the layers that are frozen, is captured anew.
        """
        self._check_capture(self.trainer, self.trainer.accumulate_grad_batches)
        if self._captured != self._trained():
            self._release()
        state = np.random.SeedSequence([self.seed, self.current_epoch, self.global_rank]).generate_state(3)
        random.seed(int(state[0]))
        np.random.seed(int(state[1]))
        torch.manual_seed(int(state[2]))
        self._loss_sum, self._images = torch.zeros((), device=self.device), 0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check labels while they are still on the host; on a GPU a bad one would only fail an assertion.

        Data that lies on the GPU has had its labels checked when it was read; to look at them now would wait for it.
        """
        if not self.trainer.predicting and len(batch) == 2 and batch[1].device.type == "cpu":
            labels = batch[1]
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"label {low if low < 0 else high} in a batch: expected 0 to {self.num_classes - 1}, "
                    "as the data module says num_classes; check the class folders of its root"
                )
        return batch

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch of images (B, C, H, W) and labels (B,)."""
        images, labels = batch
        targets = labels
        if self.mix is not None:
            check_mixing(self.mix, len(images))
            images, targets = self.mix(images, labels)
        if self.cuda_graphs and not self.compiled and self._captured is None:
            capture_training(self.network, images)
            self._captured = self._trained()
        loss = self.train_loss(self(images), targets)
        self.latch.update(self.global_step, loss, images)
        self._loss = loss.detach()
        self._loss_sum, self._images = self._loss_sum + self._loss * len(images), self._images + len(images)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read and log now and then, and before anything is made of an epoch's weights.

        At every step, to log takes the host as long as to launch a small network.
        """
        trainer = self.trainer
        ends = trainer.is_last_batch or trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not ends and (batch_idx + 1) % max(every, 1):
            return
        self.latch.check()
        if trainer.logger is not None:
            trainer.logger.log_metrics({"train_loss_step": self._loss.item()}, step=trainer.global_step - 1)
        if ends:
            mean = self._loss_sum / self._images
            self.log("train_loss", mean, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm without Lightning's check, which refuses a fused optimizer under bf16-mixed needlessly."""
        if self.trainer.precision == "bf16-mixed" and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(trained, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Schedulers of timm are functions of the number of steps taken."""
        scheduler.step_update(self.global_step)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy and plain cross-entropy of one batch of the validation split."""
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy and plain cross-entropy of one batch of the test split."""
        self._evaluate(batch, "test", self.test_metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities (B, num_classes), float32, of images (B, C, H, W)."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).float().softmax(dim=-1)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another architecture by name instead of by a page of tensors."""
        check_architecture(self.state_dict(), checkpoint.get("state_dict", {}), "the file to resume from or to load")

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str, metrics: MetricCollection) -> None:
        images, labels = batch
        logits = self(images)
        metrics.update(logits, labels)
        loss = self.eval_loss(logits, labels)
        self.log(f"{split}_loss", loss, on_epoch=True, batch_size=len(images), sync_dist=True)
        self.log_dict(dict(metrics.items()), on_epoch=True, batch_size=len(images), prog_bar=split == "val")

    def _trained(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self.network.parameters()]

    def _release(self) -> None:
        release(self.network)
        self._captured = None

    def _check_capture(self, trainer: pl.Trainer, batches: int) -> None:
        if not self.cuda_graphs:
            return
        if trainer.strategy.root_device.type != "cuda":
            raise ValueError(
                f"model.cuda_graphs=true: a {trainer.strategy.root_device.type} has no CUDA graphs; set it to false, "
                "or train on a GPU"
            )
        if self.compiled:
            return  # torch.compile makes its own, and knows what it cannot capture
        for what, number in (
            ("trainer.accumulate_grad_batches", batches), ("devices", trainer.world_size)
        ):  # fmt: skip
            if number > 1:
                raise ValueError(
                    f"model.cuda_graphs=true beside {what}={number}: expected 1, since a step's gradients lie where "
                    "those of the one before did; set model.cuda_graphs=false"
                )
        if any(getattr(module, "grad_checkpointing", False) for module in self.network.modules()):
            raise ValueError(
                "model.cuda_graphs=true beside grad_checkpointing=true, which cannot be captured; set one to false"
            )

    def _can_fuse(self) -> bool:
        """Whether AdamW can run as one kernel; with a loss scaler it would unscale the gradients after clipping."""
        if self.trainer.precision == "16-mixed" and self.trainer.gradient_clip_val:
            return False
        return self.device.type in ("cpu", "cuda") and all(p.is_floating_point() for p in self.network.parameters())
