"""What is timed of a network: a step of training as the trainer makes it, or a forward, without the trainer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msv.models.capture import capture_inference, capture_training

from .timing import Work, nbytes

TASKS = ("inference", "training")
PRECISIONS = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MODES = ("eager", "graphs", "compiled", "compiled-graphs")
"""Ways to run a network: as it is; captured in CUDA graphs; by `torch.compile` with its defaults; and both."""
MODES_TOLD = "graphs: captured in CUDA graphs; compiled: by torch.compile; compiled-graphs: both"
"""The same, for the help of options."""


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
        ValueError: training in fp16, whose gradients vanish unless the loss is scaled; or CUDA graphs without a GPU.
    """
    device, dtype = next(network.parameters()).device, PRECISIONS[precision]
    if "graphs" in mode and device.type != "cuda":
        raise ValueError(f"mode {mode}: a {device.type} has no CUDA graphs; expected eager or compiled there")
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
    network.eval()
    forward = capture_inference(network, images) if mode == "graphs" else _run_as(network, mode)

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
    precision = partial(torch.autocast, images.device.type, autocast, enabled=autocast is not None)
    if mode == "graphs":
        with precision():
            capture_training(network, images)

    def work() -> None:
        with precision():
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    averages = 2 * nbytes(*(p for p in network.parameters() if p.requires_grad))
    return Step(work, nbytes(*network.parameters(), *network.buffers(), images, labels) + averages)


def _run_as(network: nn.Module, mode: str) -> Callable[..., Any]:
    if mode in ("eager", "graphs"):
        return network
    return torch.compile(network, mode="reduce-overhead") if mode == "compiled-graphs" else torch.compile(network)
