"""MSVMamba: stem, four stages of blocks, head; and its presets in timm's registry.

`MSVMamba` is the whole design space of the paper's ablations. Its signature is its configuration: Table 4 varies
`se`, `conv_ffn` and `d_state`, Table 5 `full_scans`; SS2D of VMamba is `full_scans=4`. The presets are points in it.

Names: C channels of a map, D = 2·C channels inside a token mixer, N = d_state.
"""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import timm
import torch
from timm.layers import ClassifierHead, DropPath
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from msv.kernels import Backend, add_branch
from msv.toggles import idle_toggles

from .checkpoint_file import is_published, read_checkpoint, warn_not_finite
from .layers import AddNorm, ConvDownsample, ConvFFN, PatchMerging, Stem, init_weights
from .mixers import MS2D, SS2D, TokenMixer

MIN_SIZE = 32


class Residual(NamedTuple):
    """A map x + factors ∘ branch, whose sum is left to the LayerNorm that reads it, which does both in one visit.

    Attributes:
        x: (B, H, W, C).
        branch: (B, H, W, C); None where there is nothing to add.
        factors: of the branch, one an image, (B,), drawn by stochastic depth; None for 1.
    """

    x: Tensor
    branch: Tensor | None = None
    factors: Tensor | None = None


class Block(nn.Module):
    """x + DropPath(mixer(LN(x))), and with a channel mixer x + DropPath(ffn(LN(x))): VSS or MS3 block (Fig. 5).

    It takes the parts of a `Residual`, and returns one.
    """

    def __init__(
        self, dim: int, mixer: TokenMixer, ffn: ConvFFN | None, drop_path_rate: float, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        self.norm1 = AddNorm(dim, backend)
        self.mixer = mixer
        self.norm2 = None if ffn is None else AddNorm(dim, backend)
        self.ffn = ffn
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, branch: Tensor | None = None, factors: Tensor | None = None) -> Residual:
        x, normed = self.norm1(x, branch, factors)
        found = Residual(x, self.mixer(normed), self.draw_factors(x))
        if self.ffn is not None and self.norm2 is not None:
            x, normed = self.norm2(*found)
            found = Residual(x, self.ffn(normed), self.draw_factors(x))
        return found

    def draw_factors(self, x: Tensor) -> Tensor | None:
        """Stochastic depth's factors of a branch, (B,): 0 where an image leaves it out; None where there are none."""
        if not self.training or self.drop_path.drop_prob == 0:
            return None
        return self.drop_path(x.new_ones(x.shape[0], dtype=torch.float32))


class Stage(nn.Module):
    """A downsampling, except in the first stage, and blocks at one resolution."""

    def __init__(self, downsample: nn.Module, blocks: list[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        found = Residual(self.downsample(x))
        for block in self.blocks:
            recompute = self.grad_checkpointing and self.training and torch.is_grad_enabled()
            found = checkpoint(block, *found) if recompute else block(*found)
        return add_branch(*found)


class MSVMamba(nn.Module):
    """Multi-Scale VMamba for images (B, in_chans, H, W) of any height and width from 32 on; returns logits.

    Args:
        in_chans: channels of the images.
        num_classes: classes; 0 for no classifier.
        dims: channels of the four stages.
        depths: blocks of the four stages.
        d_state: N, states a channel (paper: 8 in the ablations, 1 in the final models).
        full_scans: routes scanned at full resolution, 0 to 4; the other 4 - n run at half resolution (Table 5).
        se: whether squeeze-excitation follows the scan (Table 4).
        conv_ffn: whether each block has a ConvFFN (Table 4).
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 over all blocks.
        drop_rate: dropout before the classifier.
        ffn_drop_rate: dropout inside the ConvFFN.
        carry_state: whether the state runs on over the seams between the half routes (published) or starts anew;
            False needs 2 or 3 half routes that share their weights.
        share_half: whether the half routes share one S6 weight set (published) or have one each; False needs 2 or 3
            half routes.
        separate_norms: whether the half branch has an output norm of its own; the published code has one for both.
        recurrence: whether routes are scanned. False is a control: y = D_skip ∘ x instead of S6, so that only
            convolutions, and SE's mean, mix positions; needs the defaults of d_state, carry_state, ssm_weight_decay.
        downsample: `merge`, patch merging as in the published weights, or `conv`, the 2x2 convolution of Table 7.
        ssm_weight_decay: whether weight decay acts on A_log and dt_bias, as in the published code.
        grad_checkpointing: whether blocks are recomputed in the backward to save memory.
        global_pool: `avg`, or an empty string for none.
        backend: of the scans, the depthwise convolutions, the merge of routes, the gate and the blocks' norms: `auto`,
            `triton`, `parallel` or `reference`.

    Raises:
        ValueError: a value out of its range, or a toggle that cannot act beside the others.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        dims: tuple[int, int, int, int] = (48, 96, 192, 384),
        depths: tuple[int, int, int, int] = (1, 2, 5, 2),
        d_state: int = 1,
        full_scans: int = 1,
        se: bool = True,
        conv_ffn: bool = True,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        ffn_drop_rate: float = 0.0,
        carry_state: bool = True,
        share_half: bool = True,
        separate_norms: bool = False,
        recurrence: bool = True,
        downsample: Literal["merge", "conv"] = "merge",
        ssm_weight_decay: bool = True,
        grad_checkpointing: bool = False,
        global_pool: str = "avg",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _check(in_chans, num_classes, dims, depths, d_state, conv_ffn, drop_path_rate, drop_rate, ffn_drop_rate)
        _check_toggles(full_scans, carry_state, share_half, separate_norms, downsample)
        if not recurrence:
            _check_no_states(d_state, carry_state, ssm_weight_decay)
        if backend not in get_args(Backend):
            raise ValueError(f"backend {backend!r} is unknown; expected one of {', '.join(get_args(Backend))}")
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.ssm_weight_decay = ssm_weight_decay
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]

        def mixer(dim: int) -> TokenMixer:
            if full_scans in (0, 4):
                return SS2D(dim, d_state, 1 if full_scans == 4 else 2, se, backend, recurrence)
            return MS2D(dim, d_state, full_scans, carry_state, share_half, separate_norms, se, backend, recurrence)

        def ffn(dim: int) -> ConvFFN | None:
            return ConvFFN(dim, drop_rate=ffn_drop_rate, backend=backend) if conv_ffn else None

        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        downsampling = partial(PatchMerging, backend=backend) if downsample == "merge" else ConvDownsample
        self.stem = Stem(in_chans, dims[0])
        self.stages = nn.ModuleList(
            Stage(
                downsampling(dims[i - 1], dim) if i else nn.Identity(),
                [Block(dim, mixer(dim), ffn(dim), next(rates), backend) for _ in range(depth)],
            )
            for i, (dim, depth) in enumerate(zip(dims, depths, strict=True))
        )
        self.norm: nn.Module = nn.LayerNorm(dims[-1], eps=1e-5)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC")
        self.apply(init_weights)
        self.set_grad_checkpointing(grad_checkpointing)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the normalised map of the last stage, (B, H/32, W/32, C), sides rounded up."""
        self._check_images(x)
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of `forward_features` to logits (B, num_classes), or to the pooled features with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps that stages leave, as timm's `features_only` asks for them.

        Args:
            x: images, (B, in_chans, H, W).
            indices: the last n stages if an int, all if None, else those listed.
            norm: whether the last stage's map is normalised.
            stop_early: whether stages after the last one asked for are left out.
            output_fmt: `NCHW` or `NHWC`.
            intermediates_only: whether to return the list alone, not the final map before it.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; expected 'NCHW' or 'NHWC'")
        self._check_images(x)
        wanted, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        found = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in wanted:
                y = self.norm(x) if norm and i == len(self.stages) - 1 else x
                found.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        return found if intermediates_only else (self.norm(x), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages after the last one in `indices`, and the norm and head that come after; timm's contract."""
        wanted, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def get_classifier(self) -> nn.Module:
        """The classifier, timm's contract."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Gives the head another number of classes, 0 for none, and optionally another pooling."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)
        self.head.apply(init_weights)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone, beside vectors and biases.

        D_skip always, a vector a weight set; A_log and dt_bias unless `ssm_weight_decay`, the published code's way.
        """
        kept = ("D_skip",) if self.ssm_weight_decay else ("D_skip", "A_log", "dt_bias")
        return {name for name, _ in self.named_parameters() if name.endswith(kept)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for timm's layer-wise learning rates."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turns the recomputation of blocks in the backward on or off."""
        for stage in self.stages:
            if isinstance(stage, Stage):
                stage.grad_checkpointing = enable

    def _check_images(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"images have shape {tuple(x.shape)}; expected (B, {self.in_chans}, H, W)")
        if x.shape[2] < MIN_SIZE or x.shape[3] < MIN_SIZE:
            raise ValueError(
                f"images are {x.shape[2]}×{x.shape[3]}; expected both sides {MIN_SIZE} or more: resize them first"
            )


def _check(
    in_chans: int,
    num_classes: int,
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    d_state: int,
    conv_ffn: bool,
    drop_path_rate: float,
    drop_rate: float,
    ffn_drop_rate: float,
) -> None:
    for name, value, least in (("in_chans", in_chans, 1), ("num_classes", num_classes, 0), ("d_state", d_state, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; expected {least} or more")
    for name, values in (("dims", dims), ("depths", depths)):
        if len(values) != 4 or min(values) < 1:
            raise ValueError(f"{name} is {list(values)}; expected four numbers, one a stage, each 1 or more")
    if min(dims) < 4:
        raise ValueError(f"dims is {list(dims)}; expected 4 or more, so that squeeze-excitation keeps a channel")
    rates = (("drop_path_rate", drop_path_rate), ("drop_rate", drop_rate), ("ffn_drop_rate", ffn_drop_rate))
    for name, rate in rates:
        if not 0 <= rate < 1:
            raise ValueError(f"{name} is {rate}; expected 0 or more and less than 1")
    if ffn_drop_rate and not conv_ffn:
        raise ValueError(f"ffn_drop_rate is {ffn_drop_rate}, but there is no ConvFFN: set conv_ffn to true, or it to 0")


def _check_toggles(full_scans: int, carry_state: bool, share_half: bool, separate_norms: bool, downsample: str) -> None:
    """Refuses toggles that would change nothing, so that a grid has no twin cells."""
    if full_scans not in range(5):
        raise ValueError(f"full_scans is {full_scans}; expected 0 to 4, the routes at full resolution")
    if downsample not in ("merge", "conv"):
        raise ValueError(f"downsample is {downsample!r}; expected 'merge' or 'conv'")
    split = f"{full_scans}/{4 - full_scans}"
    idle = idle_toggles(full_scans)
    if not share_half and "share_half" in idle:
        raise ValueError(
            f"share_half is false, but the split {split} has no two half routes: expected full_scans 1 or 2"
        )
    if not carry_state and "carry_state" in idle:
        raise ValueError(
            f"carry_state is false, but the split {split} has no seams between half routes: expected full_scans 1 or 2"
        )
    if not carry_state and "carry_state" in idle_toggles(full_scans, share_half):
        raise ValueError(
            "carry_state is false and share_half is false, but separate weight sets never carry a state: set "
            "carry_state to true or share_half to true"
        )
    if separate_norms and "separate_norms" in idle:
        raise ValueError(f"separate_norms is true, but the split {split} has one branch: expected full_scans 1, 2 or 3")


def _check_no_states(d_state: int, carry_state: bool, ssm_weight_decay: bool) -> None:
    """Refuses settings of the states where there are none, so that a grid has no twin cells."""
    settings = (
        ("d_state", d_state, 1),
        ("carry_state", carry_state, True),
        ("ssm_weight_decay", ssm_weight_decay, True),
    )
    for name, value, default in settings:
        if value != default:
            raise ValueError(
                f"{name} is {str(value).lower()}, but recurrence is false and there are no states: set {name} to "
                f"{str(default).lower()}"
            )


# Presets (Table 7, and VMamba's own models).

_TRAINED_AS = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "fixed_input_size": False,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "stem.proj",
    "classifier": "head.fc",
    "paper_ids": "arXiv:2405.14174",
    "license": "mit",
}
_VMAMBA = {"full_scans": 4, "se": False, "conv_ffn": False}

PRESETS: dict[str, dict[str, Any]] = {
    "msvmamba_nano": {"dims": (48, 96, 192, 384), "depths": (1, 2, 5, 2), "drop_path_rate": 0.2},
    "msvmamba_micro": {"dims": (64, 128, 256, 512), "depths": (1, 2, 5, 2), "drop_path_rate": 0.2},
    "msvmamba_tiny": {"dims": (96, 192, 384, 768), "depths": (1, 2, 9, 2), "drop_path_rate": 0.2},
    "vmamba_nano": {**_VMAMBA, "d_state": 8, "depths": (1, 2, 4, 2), "drop_path_rate": 0.2},
    "vmamba_tiny": {
        **_VMAMBA, "d_state": 16, "dims": (96, 192, 384, 768), "depths": (2, 2, 9, 2), "drop_path_rate": 0.2
    },
    "vmamba_small": {
        **_VMAMBA, "d_state": 16, "dims": (96, 192, 384, 768), "depths": (2, 2, 27, 2), "drop_path_rate": 0.3
    },
    "vmamba_base": {
        **_VMAMBA, "d_state": 16, "dims": (128, 256, 512, 1024), "depths": (2, 2, 27, 2), "drop_path_rate": 0.5
    },
}  # fmt: skip
"""What each preset sets of `MSVMamba`'s arguments."""

default_cfgs = generate_default_cfgs(dict.fromkeys(PRESETS, _TRAINED_AS))


def _check_checkpoint(variant: str) -> None:
    """Says what is wrong with the file of timm's `checkpoint_path`, and what to do with it, before timm fails at it."""
    # timm reads the file itself and keeps its path from the model: nothing of a model is asked before load_state_dict,
    # which comes too late for a file that cannot be read. The call under way is the one place that has the path.
    frame = sys._getframe(1)
    while frame.f_code is not timm.create_model.__code__:
        if frame.f_back is None:
            return
        frame = frame.f_back
    path = frame.f_locals.get("checkpoint_path")
    if not path or Path(path).suffix.lower() in (".npz", ".npy"):  # timm has its own word for those of NumPy
        return
    content = read_checkpoint(path)
    if is_published(content):
        raise ValueError(
            f"{path} is a published checkpoint, with names and shapes of its own: make a file for timm of it with "
            f"`python cli.py convert {path} {variant}.safetensors`, or load it with msv.models.load_published"
        )
    held = (content.get(key) for key in ("state_dict_ema", "model_ema", "state_dict", "model"))  # in timm's order
    weights = next((value for value in held if isinstance(value, Mapping)), content)
    warn_not_finite({name: value for name, value in weights.items() if isinstance(value, Tensor)}, str(path))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> MSVMamba:
    _check_checkpoint(variant)
    return build_model_with_cfg(
        MSVMamba,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**PRESETS[variant], **kwargs},
    )


@register_model
def msvmamba_nano(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """MSVMamba-Nano: 6.9M parameters, 0.88 GFLOPs."""
    return _create("msvmamba_nano", pretrained, **kwargs)


@register_model
def msvmamba_micro(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """MSVMamba-Micro: 11.9M parameters, 1.5 GFLOPs."""
    return _create("msvmamba_micro", pretrained, **kwargs)


@register_model
def msvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """MSVMamba-Tiny: 33.0M parameters, 4.6 GFLOPs."""
    return _create("msvmamba_tiny", pretrained, **kwargs)


@register_model
def vmamba_nano(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """VMamba-Nano, the baseline of the ablations: 4.4M parameters, 0.87 GFLOPs."""
    return _create("vmamba_nano", pretrained, **kwargs)


@register_model
def vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """VMamba-Tiny: 22.9M parameters, 5.6 GFLOPs."""
    return _create("vmamba_tiny", pretrained, **kwargs)


@register_model
def vmamba_small(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """VMamba-Small, printed as "VMamba-B" in Table 1: 44.4M parameters, 11.2 GFLOPs."""
    return _create("vmamba_small", pretrained, **kwargs)


@register_model
def vmamba_base(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """VMamba-Base: 76.3M parameters, 18.0 GFLOPs."""
    return _create("vmamba_base", pretrained, **kwargs)
