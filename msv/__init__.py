"""msv: Multi-Scale VMamba (arXiv 2405.14174) as an experiment and ablation suite.

Importing the package puts the presets into timm's registry::

    import msv, timm
    model = timm.create_model("msvmamba_nano", num_classes=10)
"""

from msv import models

__version__ = "0.1.0"
__all__ = ["__version__", "models"]
