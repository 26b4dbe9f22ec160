"""Batches, epochs and learning rates: the arithmetic of a schedule, and what is wrong with one."""

from timm.data.mixup import Mixup
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch.optim import Optimizer


def warmup_cosine(
    optimizer: Optimizer, steps: int, epochs: int, warmup_epochs: int, warmup_lr: float, min_lr: float
) -> CosineLRScheduler:
    """The published schedule, a function of the optimizer steps taken.

    Linear from ``warmup_lr`` over the W steps of the warm-up epochs, then a cosine from the optimizer's learning rate
    to ``min_lr`` over the steps - W that are left.

    Args:
        optimizer: with the learning rate after warm-up.
        steps: optimizer steps of all epochs.
        epochs: number of epochs.
        warmup_epochs: how many of them warm up.
        warmup_lr: learning rate of the first step, if there is a warm-up.
        min_lr: learning rate after the last step.
    """
    warmup = warmup_epochs * steps // epochs
    return CosineLRScheduler(
        optimizer,
        t_initial=steps - warmup,
        lr_min=min_lr,
        warmup_t=warmup,
        warmup_lr_init=warmup_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def check_epochs(epochs: int | None, warmup_epochs: int) -> int:
    """The number of epochs; ValueError if there is none, or none after warm-up."""
    if epochs is None or epochs < 1:
        raise ValueError(f"trainer.max_epochs={epochs}: the cosine schedule needs a number of epochs from 1 up")
    if warmup_epochs >= epochs:
        raise ValueError(
            f"model.warmup_epochs={warmup_epochs} leaves none of trainer.max_epochs={epochs} for the cosine; lower the "
            "first or raise the second"
        )
    return epochs


def check_mixing(mix: Mixup | None, batch_size: int) -> None:
    """Raise a ValueError if batches of this size cannot be mixed."""
    if mix is not None and batch_size % 2:
        raise ValueError(
            f"data.batch_size={batch_size}: mixup and cutmix pair the images of a batch, which takes an even number; "
            "change it, or set model.mixup and model.cutmix to 0"
        )


def accumulation(global_batch_size: int, batch_size: int, devices: int) -> int:
    """Batches of one optimizer step.

    Args:
        global_batch_size: images of one optimizer step over all devices.
        batch_size: images of one batch on one device.
        devices: number of devices over all nodes.

    Raises:
        ValueError: The global batch is no multiple of batch_size x devices.
    """
    together = batch_size * devices
    if global_batch_size % together == 0:
        return global_batch_size // together
    fits = [size for size in range(1, batch_size + 1) if global_batch_size % (size * devices) == 0]
    fix = f"data.batch_size={fits[-1]}" if fits else f"a multiple of {devices} for model.global_batch_size"
    raise ValueError(
        f"model.global_batch_size={global_batch_size} is no multiple of data.batch_size={batch_size} x {devices} "
        f"device(s) = {together}; try {fix}"
    )


def check_accumulation_free(given: int, own: int | None, global_batch_size: int) -> None:
    """Raise a ValueError if accumulation is set by hand (``given``) where it is computed (``own``)."""
    if given not in (1, own):
        raise ValueError(
            f"trainer.accumulate_grad_batches={given} beside model.global_batch_size={global_batch_size}; leave the "
            "first out, it is computed from the second"
        )
