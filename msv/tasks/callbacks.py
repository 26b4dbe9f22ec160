"""What a run leaves an epoch: its row of the history, a line or a progress bar for whoever watches."""

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from rich.console import Console


class History(Callback):
    """One row an epoch, kept in the checkpoint so that a resumed run has all of them.

    `rows` holds dicts of epoch, train_loss, val_loss, val_top1, lr (of the epoch's last step), seconds (training and
    validation) and images_per_second (training alone, all devices together). Where the output is no terminal, each
    row is printed as one line.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._start = self._trained = self._ticked = 0.0
        self._images = self._since_tick = 0
        self._lr = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The rows."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the rows of the run that goes on."""
        self.rows = list(state_dict["rows"])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks."""
        self._start = self._ticked = time.perf_counter()
        self._trained = 0.0
        self._images = self._since_tick = 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, idx: int) -> None:
        """Note the learning rate before the scheduler moves it."""
        self._lr = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images; log throughput and learning rate now and then, and stop the clock after the last batch."""
        images = len(batch[0]) * trainer.world_size
        self._images += images
        self._since_tick += images
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.is_last_batch or (batch_idx + 1) % max(every, 1) == 0:
            _wait(pl_module.device)
            now = time.perf_counter()
            speed = self._since_tick / max(now - self._ticked, 1e-9)
            if trainer.logger is not None:
                trainer.logger.log_metrics({"images_per_second": speed, "lr": self._lr}, step=trainer.global_step - 1)
            self._ticked, self._since_tick = now, 0
            if trainer.is_last_batch:
                self._trained = now - self._start

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch's row; checkpoints are written after this."""
        now = time.perf_counter()
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        row = {
            "epoch": trainer.current_epoch,
            "train_loss": metrics.get("train_loss"),
            "val_loss": metrics.get("val_loss"),
            "val_top1": metrics.get("val_top1"),
            "lr": self._lr,
            "seconds": round(now - self._start, 3),
            "images_per_second": round(self._images / max(self._trained or now - self._start, 1e-9), 2),
        }
        self.rows.append(row)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Progress(RichProgressBar):
    """A bar on a terminal; elsewhere one plain line an epoch, so that logs hold no control codes.

    Args:
        refresh_rate: Refreshes of the bar a second.
    """

    def __init__(self, refresh_rate: int = 4) -> None:
        self.plain = not Console().is_terminal
        super().__init__(refresh_rate=0 if self.plain else refresh_rate)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the line, from the history of the run."""
        super().on_train_epoch_end(trainer, pl_module)
        history = next((c for c in trainer.callbacks if isinstance(c, History)), None)  # type: ignore[attr-defined]
        if self.plain and trainer.is_global_zero and history is not None and history.rows:
            print(describe(history.rows[-1], trainer.max_epochs or 0), flush=True)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The bar's metrics without the logger's version number, which says nothing here."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items


def describe(row: dict[str, Any], epochs: int) -> str:
    """One row of the history as a line to read."""
    parts = [f"epoch {row['epoch'] + 1}/{epochs}"]
    if row["train_loss"] is not None:
        parts.append(f"train loss {row['train_loss']:.4f}")
    if row["val_loss"] is not None:
        parts.append(f"val loss {row['val_loss']:.4f}")
    if row["val_top1"] is not None:
        parts.append(f"val top-1 {100 * row['val_top1']:.2f}%")
    parts += [f"lr {row['lr']:.2e}", f"{row['images_per_second']:.0f} images/s", f"{row['seconds']:.1f} s"]
    return ", ".join(parts)
