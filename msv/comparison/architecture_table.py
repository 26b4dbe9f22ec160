"""Table 7: the architectures, read from the networks themselves, beside the table that the paper printed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from msv.ablation.markdown import pipe_table
from msv.ablation.paper import TABLE_7, TABLE_7_COLUMNS
from msv.models import MS2D, PRESETS, S6, MSVMamba
from msv.models.layers import PatchMerging
from msv.profiling.devices import without_weights

from .pages import COMMAND, as_csv, page
from .systems import MODELS, counts, create

IMAGE_SIZE = 224
OURS = tuple(name for name in PRESETS if name in MODELS)
"""The presets that the comparison has, MSVMamba's first."""


@dataclass(frozen=True)
class Layer:
    """A row of the architecture table.

    Attributes:
        name: `stem`, `stage 1` to `stage 4`, `head`; then `block`, `params, M` and `GFLOPs`.
        output: height and width of the map it leaves, as `56×56`; empty where it is no layer.
        models: model -> what it is there.
    """

    name: str
    output: str
    models: Mapping[str, str]


def table_7(models: Sequence[str] = OURS) -> list[Layer]:
    """The architecture table of presets for a 224×224 image.

    As in the paper, a stage has its blocks and then the downsampling that leads to the next.

    Args:
        models: presets of this project.
    """
    columns = {model: _describe(model) for model in models}
    first = next(iter(columns.values()))
    return [
        Layer(name, output, {model: column[name][1] for model, column in columns.items()})
        for name, (output, _) in first.items()
    ]


def _describe(model: str) -> dict[str, tuple[str, str]]:
    """Row's name -> output size and what stands there."""
    network = without_weights(lambda: create(model))
    if not isinstance(network, MSVMamba):
        raise ValueError(f"{model} is no network of this project; expected one of {', '.join(PRESETS)}")
    sizes: dict[nn.Module, str] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes[module] = f"{output.shape[1]}×{output.shape[2]}"

    stages: list[Any] = list(network.stages)
    for module in (network.stem, *stages, *(stage.downsample for stage in stages[1:])):
        module.register_forward_hook(note)
    with torch.no_grad():
        network.eval()(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE, device="meta"))

    stem = network.stem.proj
    side, stride = stem.kernel_size[0], stem.stride[0]
    rows = {"stem": (sizes[network.stem], f"conv {side}×{side}, {stem.out_channels}, stride {stride}; LayerNorm")}
    block = stages[0].blocks[0]
    name = "MS3" if isinstance(block.mixer, MS2D) and block.ffn is not None else "VSS" if block.ffn is None else "block"
    for number, stage in enumerate(stages, start=1):
        text = f"{name}×{len(stage.blocks)}"
        if number == len(stages):
            rows[f"stage {number}"] = sizes[stage], text
        else:
            following = stages[number].downsample
            rows[f"stage {number}"] = sizes[following], f"{text}; {_downsampling(following)}"
    classes = network.head.fc.out_features
    rows["head"] = "1×1", f"LayerNorm; average pool, {classes}-d fc"
    rows["block"] = "", f"{name}: {_mixer(block.mixer)}" + ("; ConvFFN, expansion 2" if block.ffn is not None else "")
    found = counts(model)
    rows["params, M"] = "", f"{found.params / 1e6:.3f}"
    rows["GFLOPs"] = "", f"{found.flops_fvcore / 1e9:.3f}"
    return rows


def _downsampling(module: Any) -> str:
    if isinstance(module, PatchMerging):
        return f"patch merging 2×2, {module.reduction.out_features}"
    return f"conv 2×2, {module.proj.out_channels}, stride 2"


def _mixer(mixer: Any) -> str:
    if isinstance(mixer, MS2D):
        full, half = len(mixer.s6_full.routes), len(mixer.s6_half.routes)
        text, s6 = f"MS2D {full}/{half}", mixer.s6_full
    else:
        text, s6 = "SS2D", mixer.s6
    states = f"N={s6.A_log.shape[-1]}" if isinstance(s6, S6) else "no recurrence"
    return f"{text}, {states}" + ("" if isinstance(mixer.se, nn.Identity) else ", SE")


def render_csv(layers: Sequence[Layer]) -> str:
    """A row a layer, a column a model, then the paper's columns."""
    printed = {row[0]: row for row in TABLE_7}
    return as_csv(
        [
            {
                "layer": layer.name,
                "output": layer.output,
                **layer.models,
                **{
                    f"paper_{model}": printed[layer.name][place] if layer.name in printed else ""
                    for model, place in TABLE_7_COLUMNS.items()
                },
            }
            for layer in layers
        ]
    )


def render_markdown(layers: Sequence[Layer]) -> str:
    """The page: the paper's three models as they are here, as the paper printed them, and VMamba's the same way."""
    models = list(layers[0].models)
    own = [model for model in models if model in TABLE_7_COLUMNS]
    rest = [model for model in models if model not in TABLE_7_COLUMNS]
    head = [
        (
            "here",
            f"read from the networks as built, sizes from a 1×3×{IMAGE_SIZE}×{IMAGE_SIZE} image that went through "
            "them; a stage has its blocks, then the downsampling that leads to the next, and the output is the size "
            "after it",
        ),
        ("GFLOPs", "in the paper's convention: a multiply-accumulate counts once"),
        (
            "paper",
            "printed in Table 7 of arXiv 2405.14174. It has a 2×2 convolution between stages where the published "
            "weights, and the networks here, have patch merging (LayerNorm and a linear layer over each 2×2 patch): "
            "with `downsample: conv` a network here has the convolution",
        ),
    ]
    parts = []
    for names in (own, rest):
        if names:
            titles = ["layer", "output", *(f"`{name}`" for name in names)]
            lines = [[layer.name, layer.output, *(layer.models[name] for name in names)] for layer in layers]
            title = "As they are here" if names is own else "VMamba, the baseline, as it is here"
            parts.append(f"## {title}\n\n{pipe_table(titles, lines, len(titles))}")
        if names is own and own:
            titles = ["*layer*", "*output*", *(f"*{MODELS[name].name}*" for name in TABLE_7_COLUMNS)]
            lines = [[f"*{cell}*" if cell else "" for cell in row] for row in TABLE_7]
            parts.append(f"## As the paper prints them\n\n{pipe_table(titles, lines, len(titles))}")
    return page("Table 7: architectures", head, *parts, f"Made by `{COMMAND}`.")
