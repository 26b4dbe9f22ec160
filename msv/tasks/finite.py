"""Watching the loss without waiting for it."""

import torch
from torch import Tensor


class NonFiniteLossError(ValueError):
    """The training loss became infinite or not a number."""


class FiniteLatch:
    """Remembers, on the device, the first step whose loss was not finite.

    `update` only queues kernels; `check` is the one place that waits for the device.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None  # [step, loss, smallest input, largest input], step -1: none so far

    def reset(self) -> None:
        """Forget what was seen."""
        self._first = None

    @torch.no_grad()
    def update(self, step: int, loss: Tensor, images: Tensor) -> None:
        """Note the loss of ``step`` (scalar) and the range of its ``images`` (B, C, H, W)."""
        low, high = torch.aminmax(images)
        # float32 counts steps exactly up to 2**24.
        step_tensor = torch.full((), float(step), device=loss.device)
        now = torch.stack([step_tensor, loss.detach().float(), low.float(), high.float()])
        if self._first is None:
            self._first = torch.full_like(now, -1.0)
        new = ~torch.isfinite(now[1]) & (self._first[0] < 0)
        self._first = torch.where(new, now, self._first)

    def check(self) -> None:
        """Raise if a loss since the last `reset` was not finite.

        Raises:
            NonFiniteLossError: names the step, the loss and the range of that step's images.
        """
        if self._first is None:
            return
        step, loss, low, high = self._first.tolist()
        if step >= 0:
            raise NonFiniteLossError(
                f"the loss is {loss} at step {int(step)}; the images of that batch range from {low:.4g} to {high:.4g}. "
                "If they are finite, lower model.lr or lengthen model.warmup_epochs, or set trainer.precision to "
                "bf16-mixed or 32-true; if they are not, look at the data"
            )
