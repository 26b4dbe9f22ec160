"""A network's launches captured in CUDA graphs: a GPU then replays them, and waits for no host."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn


def capture_training(network: nn.Module, images: Tensor) -> None:
    """Has a network replay its forward and backward, in place, for training on batches of one shape.

    Other shapes, and evaluation, run as before. Autocast is captured as it is on here, and so is which parameters are
    trained. Neither random numbers nor buffers, such as the averages of a batch norm, are touched. A copy of a captured
    network would replay the original: `release` it first.

    Args:
        network: on a GPU, in training mode. Its parameters must stay where they are in memory, as optimizers and
            `load_state_dict` leave them. A step's gradients lie where those of the next will: set them to None before.
        images: a batch of that shape, (B, C, H, W), on the same GPU.
    """
    gc.collect()  # what earlier graphs held must not be freed while another is captured
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    plain, shape = network.forward, images.shape
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda")
    # A cache of casts would outlive its graph.
    uncached = torch.autocast("cuda", dtype, enabled=autocast, cache_enabled=False)
    with torch.random.fork_rng(devices=[images.device]), uncached, torch.cuda.device(images.device):
        torch.cuda.make_graphed_callables(network, (images.clone(),))
    for buffer, before in buffers:
        buffer.copy_(before)
    replay = network.forward

    def forward(images: Tensor) -> Tensor:
        # Images of another shape would be copied, or even spread, into those that were captured.
        return replay(images) if images.shape == shape else plain(images)

    network.forward = forward


def release(network: nn.Module) -> None:
    """Gives up what `capture_training` captured, and its memory."""
    vars(network).pop("forward", None)
    gc.collect()  # torch's graphs are part of a cycle


def capture_inference(network: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """The forward of a network for batches of one shape, replayed; what it returns is overwritten by the next call.

    Args:
        network: on a GPU, in evaluation mode.
        images: a batch of that shape, (B, C, H, W), on the same GPU.

    Raises:
        ValueError: what is returned is called with images of another shape.
    """
    gc.collect()
    held, graph = images.clone(), torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.device(images.device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # what is made once, at first, must not be captured
                network(held)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            found = network(held)

    def forward(images: Tensor) -> Tensor:
        if images.shape != held.shape:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected {tuple(held.shape)}, as captured")
        held.copy_(images)
        graph.replay()
        return found

    return forward
