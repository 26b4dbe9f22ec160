"""SS2D, MS2D, the networks built of them, and the importer of published weights."""

from .mixers import MS2D, S6, SS2D, SkipOnly
from .network import PRESETS, MSVMamba
from .published import load_published
from .registry import TimmModel

__all__ = ["MS2D", "PRESETS", "S6", "SS2D", "MSVMamba", "SkipOnly", "TimmModel", "load_published"]
