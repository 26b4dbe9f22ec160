"""The selective scan and the depthwise convolution, and nothing else: as defined, in torch, in Triton, as operators.

Knows torch (and triton), nothing of the rest of msv. Start reading at `reference.py`.
"""

from .depthwise import Activation, depthwise_conv
from .ops import Backend, flops_1d, flops_2d, selective_scan, selective_scan_2d
from .routes import ROUTES

__all__ = [
    "ROUTES",
    "Activation",
    "Backend",
    "depthwise_conv",
    "flops_1d",
    "flops_2d",
    "selective_scan",
    "selective_scan_2d",
]
