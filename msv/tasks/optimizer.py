"""The optimizer of the published recipe."""

import torch
from timm.optim import param_groups_weight_decay
from torch import nn


def adamw(
    network: nn.Module,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    fused: bool = True,
) -> torch.optim.AdamW:
    """AdamW whose weight decay spares biases, vectors and the network's no_weight_decay().

    Args:
        network: what is trained.
        lr: learning rate.
        weight_decay: of all other parameters.
        betas: coefficients of the running averages.
        eps: added to the denominator.
        fused: whether all parameters are updated by one kernel, which takes floating-point ones on a CPU or GPU.
    """
    spared: set[str] = getattr(network, "no_weight_decay", set)()
    groups = param_groups_weight_decay(network, weight_decay, no_weight_decay_list=spared)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
