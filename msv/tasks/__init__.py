"""What a network is trained for: LightningModules, and the callbacks that go with them."""

from msv.tasks.callbacks import History, Progress
from msv.tasks.classification import Classification
from msv.tasks.ema import EMA

__all__ = ["EMA", "Classification", "History", "Progress"]
