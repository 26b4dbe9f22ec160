"""What a network costs: parameters and FLOPs, counted and never typed in."""

from .counts import Counts, count
from .profile import main

__all__ = ["Counts", "count", "main"]
