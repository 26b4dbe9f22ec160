"""Networks of this project as `torch.export` programs and ONNX files, for any batch and any sides in multiples of 32.

Both are for inference and hold plain operators: the scan is `kernels/traced.py`, whatever backend the network was built
with. The weights keep their dtype, and images must have it.
"""

import copy
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from msv.files import write_atomic

from .layers import Stem
from .mixers import TokenMixer, use_backend

SIDE = 32
"""What the sides of images are multiples of: 4 by the stem, and 2 between stages three times."""

LEAST_SIDE = {".pt2": 96, ".onnx": 32}
"""The least side in a file of each kind. torch makes a size of 1 part of a program, which half the last map of 64×64
has, so that its programs start above; ONNX knows no such thing."""

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_CHECK = "sides_must_be_multiples_of_32"


class _OfTiles(nn.Module):
    """The network of images in tiles, (B, C · 32², H/32, W/32), so that the sizes free to change have no divisor."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        return self.network(F.pixel_shuffle(images, SIDE))


def export_program(network: nn.Module, size: tuple[int, int] = (224, 224)) -> ExportedProgram:
    """Exports a network in evaluation mode; the network itself stays as it is.

    Args:
        network: an `MSVMamba`, or timm's wrapper of one with `features_only`.
        size: height and width of the example images that the program keeps.

    Returns:
        A program of images (B, in_chans, H, W), B from 1 and both sides multiples of 32 from 96 up. Its `module()`
        refuses others: `Guard failed: images.size()[2] >= 96`, or `expects height to be divisible by ...`.

    Raises:
        TypeError: the network has no token mixer of this project.
        ValueError: the size is none of those.

    Example:
        >>> program = export_program(timm.create_model("msvmamba_nano"))
        >>> program.module()(torch.randn(3, 3, 96, 160)).shape
        torch.Size([3, 1000])
    """
    check_size(*size, LEAST_SIDE[".pt2"])
    copied = _in_torch(network)
    stem = next(module for module in copied.modules() if isinstance(module, Stem)).proj
    tiles = torch.zeros(2, stem.in_channels * SIDE**2, 3, 4, dtype=stem.weight.dtype)
    least = LEAST_SIDE[".pt2"] // SIDE
    free = {0: Dim("batch"), 2: Dim("height", min=least), 3: Dim("width", min=least)}
    program = torch.export.export(_OfTiles(copied), (tiles,), dynamic_shapes=(free,))
    return _of_images(program, torch.zeros(2, stem.in_channels, *size, dtype=stem.weight.dtype))


def export_onnx(network: nn.Module | ExportedProgram, path: str | Path, opset: int = 18, force: bool = False) -> None:
    """Writes a network in evaluation mode to an ONNX file; the network itself stays as it is.

    The file takes `images` (B, in_chans, H, W), B from 1 and both sides multiples of 32 from 32 up, and gives `logits`
    (B, num_classes). onnxruntime refuses other sides: a node fails whose name is `sides_must_be_multiples_of_32`.

    Args:
        network: an `MSVMamba`, or what `export_program` made of one.
        path: the .onnx file; either the whole of it is there in the end, or what was there before.
        opset: of ONNX, 18 or later.
        force: whether an existing file is overwritten.

    Raises:
        FileExistsError: the file exists, and `force` is not given.
        TypeError: the network has no token mixer of this project.
        ValueError: a package that is missing, an opset before 18, or a name that does not end in .onnx.
    """
    path = check_target(path, (".onnx",), force)
    if opset < 18:
        raise ValueError(f"opset is {opset}; expected 18 or later")
    program = network if isinstance(network, ExportedProgram) else export_program(network)
    made = torch.onnx.export(
        program, input_names=["images"], output_names=["logits"], opset_version=opset, dynamo=True, verbose=False
    )
    model: Any = made.model_proto  # type: ignore[union-attr]
    for value in (*model.graph.input, *model.graph.output):
        sizes = value.type.tensor_type.shape.dim
        for size, name in zip(sizes, ("batch", None, f"{SIDE}*height", f"{SIDE}*width"), strict=False):
            if size.dim_param and name:
                size.dim_param = name
    cut = "images"
    for node in model.graph.node:  # those that cut images into tiles fail where there is no whole number of them
        if node.op_type == "Reshape" and node.input[0] == cut:
            node.name, cut = ONNX_CHECK + "_" * (cut != "images"), node.output[0]
    write_atomic(path, model.SerializeToString())


def export_pt2(network: nn.Module, path: str | Path, size: tuple[int, int] = (224, 224), force: bool = False) -> None:
    """Writes the program of `export_program` to a .pt2 file, for `torch.export.load`.

    Args:
        network: an `MSVMamba`, or timm's wrapper of one with `features_only`.
        path: the .pt2 file; either the whole of it is there in the end, or what was there before.
        size: height and width of the example images that the program keeps.
        force: whether an existing file is overwritten.

    Raises:
        FileExistsError: the file exists, and `force` is not given.
        TypeError: the network has no token mixer of this project.
        ValueError: a size that the program would refuse, or a name that does not end in .pt2.
    """
    path = check_target(path, (".pt2",), force)
    content = io.BytesIO()
    torch.export.save(export_program(network, size), content)
    write_atomic(path, content.getvalue())


def check_size(height: int, width: int, least: int) -> None:
    """Checks the sides of images for an exported network.

    Args:
        height: of the images.
        width: of the images.
        least: the least side, of `LEAST_SIDE`.

    Raises:
        ValueError: a side is no multiple of 32, or is less than the least.
    """
    for name, side in (("height", height), ("width", width)):
        if side % SIDE or side < least:
            near = max(least, round(side / SIDE) * SIDE)
            raise ValueError(
                f"{name} is {side}; an exported network takes sides that are multiples of {SIDE}, from {least} up: "
                f"resize or pad the images, for instance to {near}"
            )


def check_target(path: str | Path, suffixes: tuple[str, ...], force: bool) -> Path:
    """Checks that a file can be made, before anything is computed.

    Raises:
        FileExistsError: the file exists, and `force` is not given.
        ValueError: another suffix, or a package for it is missing.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(suffixes)}, which says what it holds")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; give another name, or --force (force=True) to overwrite it")
    missing = [name for name in PACKAGES if path.suffix == ".onnx" and find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{path}: ONNX needs the package{'s' * (len(missing) > 1)} {', '.join(missing)}, not installed here; get "
            'all it takes with `pip install -e ".[export]"`'
        )
    return path


def _in_torch(network: nn.Module) -> nn.Module:
    """A copy on the CPU, for inference alone, whose operators run in plain torch."""
    copied = copy.deepcopy(network).cpu().eval().requires_grad_(False)
    if not any(isinstance(module, TokenMixer) for module in copied.modules()):
        raise TypeError(f"cannot export a {type(network).__name__}: it has no token mixer; expected an MSVMamba")
    use_backend(copied, "parallel")
    return copied


def _of_images(program: ExportedProgram, example: Tensor) -> ExportedProgram:
    """Makes a program of tiles one of images, by an operator in front, which refuses what cannot be cut into tiles.

    Were it traced with images, every size in the graph would be a division of theirs, which makes it several times as
    slow to export, and has torch check these divisions in words that nobody can read.
    """
    graph, operators = program.graph, torch.ops.aten
    images = next(node for node in graph.nodes if node.name in program.graph_signature.user_inputs)
    whole = next(node for node in images.users if node.target is operators.pixel_shuffle.default)
    with graph.inserting_after(images):
        tiles = graph.call_function(operators.pixel_unshuffle.default, (images, SIDE))
    images.replace_all_uses_with(tiles, delete_user_cb=lambda user: user is not tiles)
    tiles.meta = dict(images.meta)
    images.meta = {**images.meta, "val": whole.meta["val"]}
    ranges = dict(program.range_constraints)
    for side in whole.meta["val"].shape[2:]:
        (tile,) = side.node.expr.free_symbols
        ranges[side.node.expr] = type(ranges[tile])(ranges[tile].lower * SIDE, ranges[tile].upper * SIDE)
    made = ExportedProgram(
        program.graph_module,
        graph,
        program.graph_signature,
        program.state_dict,
        ranges,
        program.module_call_graph,
        ((example,), {}),
        program.constants,
        verifiers=program.verifiers,
    )
    made._guards_code = []  # of tiles; what they say of images is that there is a whole number of tiles, 3 or more
    return made
