"""What one model costs: parameters, FLOPs and activations without data, and peak training memory on this machine."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from msv.models import TimmModel
from msv.provenance import environment

from .counts import Counts, count
from .devices import without_weights
from .measuring import is_out_of_memory
from .timing import nbytes, peak_memory

Factory = Callable[[int, int], nn.Module]
"""Makes a network from the channels of an image and the number of classes."""


@dataclass(frozen=True)
class Memory:
    """Peak memory of training.

    Attributes:
        nbytes: bytes at the worst moment of a forward and backward pass in training mode and float32: weights, images,
            gradients, and all that the passes keep or need meanwhile; no optimizer.
        batch_size: images of the batch.
        device: name of the GPU or CPU.
    """

    nbytes: int
    batch_size: int
    device: str


@dataclass(frozen=True)
class Profile:
    """What a model costs.

    Attributes:
        name: of the model.
        in_chans: channels of the image.
        size: its height and width in pixels.
        num_classes: classes of the head.
        counts: parameters, FLOPs of one image in two conventions, both by part, and activations.
        memory: of training; None where it was not measured.
    """

    name: str
    in_chans: int
    size: tuple[int, int]
    num_classes: int
    counts: Counts
    memory: Memory | None = None


def profile_model(
    model: str | Factory,
    size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    *,
    name: str | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> Profile:
    """Profiles a model; without `batch_size` no weight is made and nothing is computed.

    Args:
        model: a name in timm's registry, ours included, or what makes the network from `in_chans` and `num_classes`.
        size: side of a square image in pixels, or its height and width.
        in_chans: channels of the image.
        num_classes: classes of the head.
        name: what to call the model; by default its name in the registry, or its class.
        batch_size: images of the batch whose peak training memory is measured; None measures none.
        device: where it is measured; by default a GPU where there is one.

    Raises:
        ValueError: an unknown model, an image that it does not take, or a batch that does not fit into memory.

    Example:
        >>> profile_model("msvmamba_nano").counts.params
        6864136
    """
    factory = TimmModel(model) if isinstance(model, str) else model
    height, width = (size, size) if isinstance(size, int) else size
    network = without_weights(lambda: factory(in_chans, num_classes))
    try:
        counts = count(network, in_chans, (height, width))
    except (AssertionError, RuntimeError) as error:  # what other people's models say to an image they do not take
        raise ValueError(f"no image of {in_chans}×{height}×{width} fits the model: {_first_line(error)}") from error
    memory = None
    if batch_size is not None:
        memory = training_memory(factory(in_chans, num_classes), (batch_size, in_chans, height, width), device)
    name = name or (model if isinstance(model, str) else type(network).__name__)
    return Profile(name, in_chans, (height, width), num_classes, counts, memory)


def training_memory(
    network: nn.Module, shape: tuple[int, int, int, int], device: torch.device | str | None = None
) -> Memory:
    """Measures the peak memory of one forward and backward pass of a network, which runs twice for it.

    Args:
        network: it is moved to the device and put into training mode.
        shape: of the batch, (B, C, H, W).
        device: by default a GPU where there is one.

    Raises:
        ValueError: the batch is empty or does not fit into memory.
    """
    if shape[0] < 1:
        raise ValueError(f"batch_size is {shape[0]}; expected 1 or more")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        network = network.to(where).train()
        images = torch.randn(shape, device=where)
        parameters = [p for p in network.parameters() if p.requires_grad]

        def step() -> object:
            return torch.autograd.grad(network(images).sum(), parameters, allow_unused=True)

        peak = peak_memory(step, where)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"a batch of {shape[0]} images does not fit into the memory of this machine; use a smaller one"
        ) from error
    there = nbytes(*network.parameters(), *network.buffers(), images)
    return Memory(peak + there, shape[0], str(environment("cuda" if where.type == "cuda" else "cpu")["device"]))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
