"""Exponential moving average of the weights."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging


class EMA(WeightAveraging):
    """Keep an exponential moving average of the weights, which validation, test and prediction use.

    The average starts at the initial weights and follows every optimizer step:
    ``average += (1 - decay_t) * (weights - average)``, t = 0 for the first step.

    Args:
        decay: The decay d of one step, in [0, 1]; the published recipe has 0.9999; 0 gives the raw weights.
        warmup: Whether decay_t is min(d, (1 + t) / (10 + t)), for schedules of few steps, instead of the constant d.

    Raises:
        ValueError: ``decay`` is outside [0, 1].
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = False) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"ema.decay={decay}: expected a number from 0 to 1, such as 0.9999")
        super().__init__(use_buffers=True)
        self.decay = decay
        self.warmup = warmup
        self._floats: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._others: list[tuple[torch.Tensor, torch.Tensor]] = []

    def decay_at(self, step: int) -> float:
        """The decay of the update after optimizer step ``step`` (from 0)."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the average, on the device of the training: the weights themselves are moved there only after this."""
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pair averages and weights once: to walk through the modules at each step takes the host a millisecond."""
        super().on_train_start(trainer, pl_module)
        if self._average_model is None:
            return
        pairs = list(zip(_tensors(self._average_model.module), _tensors(pl_module), strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._floats = [average for average, _ in averaged], [current for _, current in averaged]
        self._others = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average if the optimizer has taken a step.

        The step is counted on the host: torch's own update reads a counter on the device, and so waits for it, twice.
        """
        if trainer.global_step <= self._latest_update_step or self._average_model is None:
            return
        torch._foreach_lerp_(*self._floats, 1.0 - self.decay_at(trainer.global_step - 1))
        for average, current in self._others:
            average.copy_(current)
        self._latest_update_step = trainer.global_step

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore both sets of weights when training goes on; elsewhere the averaged ones are what is loaded."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the averaged weights in the module, and drop the second copy, so that nothing swaps them again."""
        super().on_train_end(trainer, pl_module)
        self._average_model = None
        self._floats, self._others = ([], []), []


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
