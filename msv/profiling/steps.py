"""What is timed of a network: a step of training as the trainer makes it, or a forward, without the trainer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .timing import Work, nbytes

TASKS = ("inference", "training")
PRECISIONS = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MODES: dict[str, dict[str, Any] | None] = {"eager": None, "compiled": {}, "graphs": {"mode": "reduce-overhead"}}
"""Ways to run a network: as it is, by `torch.compile` with its defaults, and that with CUDA graphs."""


@dataclass(frozen=True)
class Step:
    """A step to time.

    Attributes:
        work: makes one.
        held_bytes: of the tensors that it needs and that are there before it: weights, their gradients' averages,
            the batch.
    """

    work: Work
    held_bytes: int


def random_step(
    network: nn.Module, shape: tuple[int, int, int, int], num_classes: int, task: str, mode: str, precision: str
) -> Step:
    """A step of a network on random images, and labels, that lie where its weights do.

    Args:
        network: with weights in float32.
        shape: of the images, (B, C, H, W).
        num_classes: of the labels.
        task: of `TASKS`.
        mode: of `MODES`.
        precision: of `PRECISIONS`: of weights and images in inference; in training that of autocast.

    Raises:
        ValueError: training in fp16, whose gradients vanish unless the loss is scaled.
    """
    device, dtype = next(network.parameters()).device, PRECISIONS[precision]
    if task == "inference":
        return inference_step(network.to(dtype), torch.randn(shape, device=device, dtype=dtype), mode)
    if dtype is torch.float16:
        raise ValueError("a training step in fp16 would need its loss scaled; use bf16 or float32")
    images, labels = torch.randn(shape, device=device), torch.randint(num_classes, shape[:1], device=device)
    return training_step(network, images, labels, mode, None if dtype is torch.float32 else dtype)


def inference_step(network: nn.Module, images: Tensor, mode: str = "eager") -> Step:
    """A forward in evaluation mode, which keeps nothing for a backward.

    Args:
        network: with weights in the precision to run in; it is put into evaluation mode.
        images: (B, C, H, W), in the same.
        mode: of `MODES`.
    """
    forward = _run_as(network.eval(), mode)

    @torch.inference_mode()
    def work() -> object:
        return forward(images)

    return Step(work, nbytes(*network.parameters(), *network.buffers(), images))


def training_step(
    network: nn.Module, images: Tensor, labels: Tensor, mode: str = "eager", autocast: torch.dtype | None = None
) -> Step:
    """A step as the trainer makes it: forward and cross-entropy, backward, AdamW; weights in float32.

    Args:
        network: with weights in float32; it is put into training mode, and trained.
        images: (B, C, H, W), in float32.
        labels: (B,), int64.
        mode: of `MODES`.
        autocast: dtype of automatic mixed precision, as `bf16-mixed` has it; None for float32 alone.
    """
    from msv.tasks.optimizer import adamw  # brings Lightning, which is heavy and of which inference needs nothing

    forward = _run_as(network.train(), mode)
    optimizer = adamw(network)

    def work() -> None:
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    averages = 2 * nbytes(*(p for p in network.parameters() if p.requires_grad))
    return Step(work, nbytes(*network.parameters(), *network.buffers(), images, labels) + averages)


def _run_as(network: nn.Module, mode: str) -> Callable[..., Any]:
    options = MODES[mode]
    return network if options is None else torch.compile(network, **options)
