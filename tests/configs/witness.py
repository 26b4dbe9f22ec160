"""A callback that reads a run's settings back from the objects that train, and ends it after a few steps."""

import json
from pathlib import Path

import lightning.pytorch as pl

from msv.tasks import EMA


class Witness(pl.Callback):
    """Writes what it saw to a JSON file.

    Args:
        path: the file.
        steps: optimizer steps after which the training ends.
        ask: steps at which the schedule is asked for the learning rate it would give.
    """

    def __init__(self, path: str, steps: int, ask: list[int]):
        self.path, self.steps, self.ask = Path(path), steps, ask
        self.seen: dict = {"lr": [], "batches": []}

    def on_train_start(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        (ema,) = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]
        schedule = trainer.lr_scheduler_configs[0]
        mix, loader = pl_module.mix, trainer.train_dataloader
        crop, flip, augment, _, normalise, erasing = loader.dataset.transform.transforms
        resize, centre, _, _ = trainer.datamodule.test_dataloader().dataset.transform.transforms
        self.seen |= {
            "optimizer": type(optimizer).__name__,
            "groups": [
                {
                    "parameters": sum(parameter.numel() for parameter in group["params"]),
                    **{key: group[key] for key in ("weight_decay", "betas", "eps", "initial_lr")},
                }
                for group in optimizer.param_groups
            ],
            "trained": sum(parameter.numel() for parameter in pl_module.network.parameters()),
            "schedule": {
                "interval": schedule.interval,
                "lr": [schedule.scheduler._get_lr(step)[0] for step in self.ask],
            },
            "epochs": trainer.max_epochs,
            "steps": trainer.estimated_stepping_batches,
            "accumulate": trainer.accumulate_grad_batches,
            "clip": [trainer.gradient_clip_val, trainer.gradient_clip_algorithm],
            "precision": trainer.precision,
            "ema": [ema.decay_at(step) for step in (0, 1, 100_000)],
            "ema_of": type(ema._average_model.module).__name__,
            "drop_path": pl_module.network.stages[3].blocks[-1].drop_path.drop_prob,
            "loss": type(pl_module.train_loss).__name__,
            "mix": {
                key: getattr(mix, key)
                for key in ("mixup_alpha", "cutmix_alpha", "mix_prob", "switch_prob", "label_smoothing", "mode")
            },
            "classes": mix.num_classes,
            "train": {
                "drop_last": loader.drop_last,
                "crop": [*crop.size, *crop.scale, crop.interpolation.value],
                "ratio": list(crop.ratio),
                "flip": flip.p,
                "policy": [type(augment).__name__, augment.num_layers, len(augment.ops)],
                "ops": sorted({(op.magnitude, op.magnitude_std, op.prob) for op in augment.ops}),
                "increasing": sum("Increasing" in op.name for op in augment.ops),
                "mean": normalise.mean.tolist(),
                "std": normalise.std.tolist(),
                "erasing": [erasing.probability, erasing.max_count, erasing.per_pixel, erasing.rand_color],
            },
            "test": {"resize": [resize.size, resize.interpolation.value], "crop": list(centre.size)},
        }

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen["batches"].append(list(batch[0].shape))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen["lr"].append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step >= self.steps:
            trainer.should_stop = True

    def on_train_end(self, trainer, pl_module):
        self.path.write_text(json.dumps(self.seen))
