"""Any model of timm's registry, ours included, as a network of an experiment."""

import difflib
from typing import Any

import timm
from torch import nn


class TimmModel:
    """Makes a model of timm's registry for the images and classes of a data set; use it as `network` in YAML.

    Args:
        name: the model's name, e.g. `msvmamba_nano` or `swin_tiny_patch4_window7_224`.
        drop_path_rate: stochastic depth; the model's own if None.
        model_args: further arguments of the model.

    Raises:
        ValueError: the registry has no model of that name.
    """

    def __init__(self, name: str, drop_path_rate: float | None = None, model_args: dict[str, Any] | None = None):
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.4)
            hint = f"; the nearest are {', '.join(near)}" if near else ""
            raise ValueError(f"no model {name!r} in timm's registry{hint}")
        self.name = name
        self.model_args = dict(model_args or {})
        if drop_path_rate is not None:
            self.model_args["drop_path_rate"] = drop_path_rate

    def __call__(self, in_chans: int, num_classes: int) -> nn.Module:
        return timm.create_model(self.name, in_chans=in_chans, num_classes=num_classes, **self.model_args)
