"""Parameters, FLOPs and activations, counted by running a network without data.

Two conventions stand beside each other, and every column says which it uses:

- `flops_fvcore`, the paper's: a multiply-accumulate of a convolution or matrix product is one; the projections of x
  count once a route, as the published code makes them; a scan is 9·B·L·D·N, and B·L·D for its skip; LayerNorm 5 an
  element; bilinear interpolation 4 and nearest 1 an output; average pooling 1 an input; activations, gates, sums 0.
- `flops`, plain: a multiply-accumulate is two, as `torch.utils.flop_counter` has it; a scan is the same 9·B·L·D·N, and
  2·B·L·D; nothing else counts.

`activations` is what timm's tables call so: the elements that convolutions, matrix products and scans put out (a scan
each of its routes), those of one image in evaluation.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from msv.kernels import flops_1d, flops_2d
from msv.models import S6
from msv.models.mixers import use_backend

PARTS = ("stem", "scans", "convolutions", "projections", "norms", "se", "ffn", "downsampling", "head", "other")
"""Where a network's costs are booked: a stem, S6 (scans, its own projections included), SE, ConvFFN, downsampling and
head whole, what lies outside them by kind: a map's mean is SE's; `other` is the interpolation of half maps."""

# Names of modules that are a part whatever they do, ours and timm's.
_PLACES = {"se": "se", "ffn": "ffn", "mlp": "ffn", "downsample": "downsampling"}
_aten, _msv = torch.ops.aten, torch.ops.msv
_CONVOLUTIONS = {_aten.convolution, _aten._convolution}
_SCANS = {_msv.selective_scan, _msv.selective_scan_2d}
_ELEMENTWISE: dict[Any, tuple[str, Callable[[tuple, Any], int]]] = {
    _aten.native_layer_norm: ("norms", lambda args, out: 5 * args[0].numel()),
    _aten.upsample_bilinear2d: ("other", lambda args, out: 4 * out.numel()),
    _aten.upsample_nearest2d: ("other", lambda args, out: out.numel()),
    _aten.mean: ("se", lambda args, out: args[0].numel()),
    _aten.avg_pool2d: ("other", lambda args, out: args[0].numel()),
    _aten._adaptive_avg_pool2d: ("other", lambda args, out: args[0].numel()),
}


@dataclass(frozen=True)
class Counts:
    """What a network costs for one image.

    Attributes:
        params: parameters.
        flops_fvcore: operations in the paper's convention.
        flops: operations, a multiply-accumulate being two.
        parts: for each of `PARTS` the same three numbers, which add up to those above.
        activations: elements put out by convolutions, matrix products and scans.
    """

    params: int
    flops_fvcore: int
    flops: int
    parts: dict[str, tuple[int, int, int]]
    activations: int


def count(network: nn.Module, in_chans: int = 3, image_size: int | tuple[int, int] = 224) -> Counts:
    """Counts a network's parameters, and its FLOPs and activations for one image in evaluation.

    The network itself is left alone.

    Args:
        network: any image model, on any device.
        in_chans: channels of the image.
        image_size: side of a square image in pixels, or its height and width.

    Raises:
        ValueError: the network does not take such an image.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    shadow = copy.deepcopy(network).to("meta").eval()
    use_backend(shadow, "auto")  # the registered operators are what is seen of scans, whatever computes them
    modules = dict(shadow.named_modules())
    with torch.no_grad(), _FlopCounter(modules) as counter:
        shadow(torch.empty(1, in_chans, height, width, device="meta"))
    params: Counter[str] = Counter()
    seen = set()
    for name, module in network.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                params[_place(name, modules) or _kind(module)] += parameter.numel()
    parts = {part: (params[part], counter.fvcore[part], counter.plain[part]) for part in PARTS}
    return Counts(params.total(), counter.fvcore.total(), counter.plain.total(), parts, counter.activations)


class _FlopCounter(TorchDispatchMode):
    """Books each operation that runs under it, in both conventions; `modules` by name, of the network that runs."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.fvcore: Counter[str] = Counter()
        self.plain: Counter[str] = Counter()
        self.activations = 0
        self._modules = modules
        self._tracker = ModuleTracker()

    def __enter__(self) -> "_FlopCounter":
        self._tracker.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._tracker.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        main = out[0] if isinstance(out, (tuple, list)) else out
        if packet in _SCANS or (packet in flop_registry and packet not in _ELEMENTWISE):
            self.activations += main.numel()
        if packet in _SCANS:
            self._book("scans", *_scan_flops(packet, args))
        elif packet in _ELEMENTWISE:
            kind, formula = _ELEMENTWISE[packet]
            self._book(kind, formula(args, main), 0)
        elif packet in flop_registry:
            doubled = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            self._book("convolutions" if packet in _CONVOLUTIONS else "projections", doubled // 2, doubled)
        return out

    def _book(self, kind: str, fvcore: int, plain: int) -> None:
        innermost = max(self._tracker.parents, key=len).partition(".")[2]
        part = _place(innermost, self._modules) or kind
        self.fvcore[part] += int(fvcore)
        self.plain[part] += int(plain)


def _scan_flops(packet: Any, args: tuple) -> tuple[int, int]:
    """FLOPs of a scan in the two conventions, which differ by the multiply-accumulates of the skip and of delta."""
    if packet is _msv.selective_scan:
        u, A, skip = args[0], args[2], args[5] is not None
        size = (u.shape[0], u.shape[2], u.shape[1], A.shape[1])
        fvcore = flops_1d(*size, skip)
        plain = 2 * fvcore - flops_1d(*size, False)
    else:
        x, dt_weight, A_log, routes = args[0], args[2], args[4], args[6]
        size = (x.shape[0], x.shape[1] * x.shape[2], x.shape[3], A_log.shape[2])
        rank, sharing = dt_weight.shape[2], len(routes) - len(set(args[7]))
        fvcore = flops_2d(*size, rank, len(routes))
        plain = 2 * fvcore - len(routes) * flops_1d(*size, False)
        # The published code projects the map once a route, ours once a weight set; the paper's figures count theirs.
        fvcore += sharing * math.prod(size[:3]) * (rank + 2 * size[3])
    return fvcore, plain


def _place(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The part that a module belongs to by where it stands, whatever it does, if any."""
    steps = name.split(".")
    if steps[0] in ("stem", "head"):
        return steps[0]
    for depth, step in enumerate(steps, start=1):
        if step in _PLACES:
            return _PLACES[step]
        if isinstance(modules.get(".".join(steps[:depth])), S6):
            return "scans"
    return None


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        return "convolutions"
    if isinstance(module, nn.Linear):
        return "projections"
    return "norms" if "Norm" in type(module).__name__ else "other"
