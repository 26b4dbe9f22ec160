"""What a block does between its projections: scans, depthwise convolutions, merge, gate, residual sums and norms.

As defined, in torch, and in Triton, as operators.

Knows torch (and triton), nothing of the rest of msv. Start reading at `reference.py`.
"""

from .checks import Backend
from .depthwise import Activation, depthwise_conv
from .merge import gate, merge_routes
from .norm import add_branch, add_norm
from .ops import flops_1d, flops_2d, selective_scan, selective_scan_2d
from .routes import ROUTES

__all__ = [
    "ROUTES",
    "Activation",
    "Backend",
    "add_branch",
    "add_norm",
    "depthwise_conv",
    "flops_1d",
    "flops_2d",
    "gate",
    "merge_routes",
    "selective_scan",
    "selective_scan_2d",
]
