"""The selective scan and nothing else: reference, parallel in torch, and the operators that others import.

Knows torch (and triton), nothing of the rest of msv. Start reading at `reference.py`.
"""

from .ops import Backend, flops_1d, flops_2d, selective_scan, selective_scan_2d
from .routes import ROUTES

__all__ = ["ROUTES", "Backend", "flops_1d", "flops_2d", "selective_scan", "selective_scan_2d"]
