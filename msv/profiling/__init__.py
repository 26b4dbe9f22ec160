"""What a network costs: parameters, FLOPs, activations and memory, counted or measured and never typed in."""

from .counts import Counts, count
from .profile import Memory, Profile, profile_model

__all__ = ["Counts", "Memory", "Profile", "count", "profile_model"]
