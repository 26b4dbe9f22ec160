"""Exported programs and ONNX files: every preset, sizes and batches not seen by the export, and what is refused."""

import copy
import io
from functools import cache
from pathlib import Path
from typing import NamedTuple

import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from msv.models import PRESETS
from msv.models.export import LEAST_SIDE, check_size, export_onnx, export_program, export_pt2
from msv.models.mixers import use_backend

UNSEEN = ((1, 96, 96), (3, 96, 160), (2, 128, 128))
SMALLER = ((1, 32, 32), (2, 64, 96))
TOLERANCE = {"rtol": 0, "atol": 1e-5}  # of outputs near 1; float32 was seen to differ by 2e-6 at most
SHARED = "msvmamba_nano"
OPSETS = {"vmamba_nano": 20}  # of others 18
DISTINCT = [name for name in PRESETS if name != "vmamba_small"]  # with one block a stage it is vmamba_tiny
KINDS = ("msvmamba_nano", "vmamba_nano", "vmamba_tiny")  # of others, whose widths differ alone, there is no file


def in_onnxruntime(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def assert_same_outputs(exported, network, sizes):
    for batch, *size in sizes:
        images = torch.randn(batch, 3, *size)
        torch.testing.assert_close(exported(images), network(images), **TOLERANCE)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Export(NamedTuple):
    """A network, and what was made of it.

    Attributes:
        given: as it was exported: in training, and to be run by Triton, which an export does without.
        network: a copy that runs as the export should.
        program: of `export_program`.
        onnx: the file, of `KINDS`.
    """

    given: nn.Module
    network: nn.Module
    program: torch.export.ExportedProgram
    onnx: Path | None


@pytest.fixture(scope="module")
def export_of(tmp_path_factory):
    """Exports a preset, once, with one block a stage: blocks of a stage are alike, and each takes seconds."""

    @cache
    def export(preset):
        torch.manual_seed(0)
        given = timm.create_model(preset, depths=(1, 1, 1, 1), num_classes=10, backend="triton").train()
        path = tmp_path_factory.mktemp("onnx") / f"{preset}.onnx" if preset in KINDS else None
        with torch.no_grad():
            for parameter in given.parameters():  # initial values make nothing of some
                parameter.add_(0.02 * torch.randn_like(parameter))
            program = export_program(given)
            if path is not None:
                export_onnx(program, path, OPSETS.get(preset, 18))
        network = copy.deepcopy(given).eval()
        use_backend(network, "parallel")
        return Export(given, network, program, path)

    return export


@pytest.mark.parametrize("preset", DISTINCT)
def test_every_preset_at_sizes_not_seen(export_of, preset):
    _, network, program, path = export_of(preset)
    assert_same_outputs(program.module(), network, UNSEEN)
    if path is None:
        return
    assert_same_outputs(in_onnxruntime(path), network, UNSEEN + SMALLER)
    opsets = {entry.version for entry in onnx.load(path).opset_import if not entry.domain}
    assert opsets == {OPSETS.get(preset, 18)}


def test_presets_that_are_left_out_differ_in_size_alone():
    def structure(name, *sizes):
        return {key: value for key, value in PRESETS[name].items() if key not in ("depths", "drop_path_rate", *sizes)}

    assert structure("vmamba_small") == structure("vmamba_tiny")
    kinds = [structure(name, "dims") for name in KINDS]
    assert all(structure(name, "dims") in kinds for name in PRESETS)
    assert all(kinds.count(kind) == 1 for kind in kinds)


@pytest.fixture
def program(export_of):
    return export_of(SHARED).program


@pytest.fixture
def onnx_file(export_of):
    return export_of(SHARED).onnx


def test_a_program_is_the_same_saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
    images = torch.randn(3, 3, 96, 160)
    assert torch.equal(loaded(images), program.module()(images))
    with pytest.raises(RuntimeError, match=r"height to be divisible by .* is not divisible by 32"):
        loaded(torch.randn(1, 3, 100, 96))


def test_a_program_holds_torch_s_own_operators(program):
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    called = {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}
    operators = {t.namespace for t in called if isinstance(t, torch._ops.OperatorBase)}
    assert torch.ops.higher_order.scan in called
    assert operators == {"aten", "higher_order"}


def test_programs_refuse_other_sizes(program):
    module = program.module()
    with pytest.raises(RuntimeError, match=r"height to be divisible by .* is not divisible by 32"):
        module(torch.randn(1, 3, 100, 96))
    with pytest.raises(RuntimeError, match=r"width to be divisible by .* is not divisible by 32"):
        module(torch.randn(1, 3, 96, 130))
    with pytest.raises((AssertionError, RuntimeError), match="96"):
        module(torch.randn(1, 3, 64, 96))
    with pytest.raises((AssertionError, RuntimeError), match="3"):
        module(torch.randn(1, 1, 96, 96))


@pytest.mark.parametrize("size", [(100, 96), (96, 98), (33, 32), (16, 32)], ids="{0[0]}x{0[1]}".format)
def test_onnxruntime_refuses_other_sizes(onnx_file, size):
    with pytest.raises(Exception, match="sides_must_be_multiples_of_32"):
        in_onnxruntime(onnx_file)(torch.randn(1, 3, *size))


def test_what_an_onnx_file_says_of_itself(onnx_file):
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]
    (images,), (logits,) = model.graph.input, model.graph.output
    sizes = {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
             for value in (images, logits)}  # fmt: skip
    assert sizes == {"images": ["batch", 3, "32*height", "32*width"], "logits": ["batch", 10]}
    assert {node.domain for node in model.graph.node} == {""}


TOGGLES = {
    "2/2-own": {"full_scans": 2, "share_half": False, "separate_norms": True, "downsample": "conv"},
    "skip-only": {"recurrence": False, "d_state": 1},
}


@pytest.mark.parametrize("arguments", TOGGLES.values(), ids=TOGGLES)
def test_toggles(make_small, arguments):
    network = make_small(depths=(1, 1, 1, 1), **arguments)
    assert_same_outputs(export_program(network).module(), network, UNSEEN)


def test_the_network_stays_as_it_was(export_of):
    given = export_of(SHARED).given
    assert given.training
    assert all(parameter.requires_grad for parameter in given.parameters())
    assert {module.backend for module in given.modules() if hasattr(module, "backend")} == {"triton"}


def test_features_in_bf16():
    arguments = {"dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "full_scans": 0, "features_only": True}
    maps = timm.create_model("msvmamba_nano", **arguments).eval().bfloat16()
    images = torch.randn(2, 3, 96, 160, dtype=torch.bfloat16)
    for found, expected in zip(export_program(maps).module()(images), maps(images), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() < 2e-2 * expected.norm()


def test_what_cannot_be_exported(make_small, tmp_path, monkeypatch):
    network = make_small()
    with pytest.raises(ValueError, match=r"height is 100; .* multiples of 32, from 96 up: resize or pad .* to 96"):
        export_program(network, (100, 96))
    with pytest.raises(ValueError, match=r"width is 64; .* from 96 up"):
        export_pt2(network, tmp_path / "net.pt2", (96, 64))
    with pytest.raises(TypeError, match="cannot export a Linear: it has no token mixer; expected an MSVMamba"):
        export_program(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="opset is 17; expected 18 or later"):
        export_onnx(network, tmp_path / "net.onnx", opset=17)
    with pytest.raises(ValueError, match=r"net.pt: expected a name that ends in .onnx"):
        export_onnx(network, tmp_path / "net.pt")
    (tmp_path / "there.pt2").write_text("mine")
    with pytest.raises(FileExistsError, match=r"there.pt2 exists; .*--force"):
        export_pt2(network, tmp_path / "there.pt2")
    monkeypatch.setattr("msv.models.export.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ValueError, match=r"ONNX needs the package onnxscript, not installed .*pip install -e"):
        export_onnx(network, tmp_path / "net.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt2"]


def test_sizes_that_are_checked():
    for suffix, least in LEAST_SIDE.items():
        check_size(least, 224, LEAST_SIDE[suffix])
        with pytest.raises(ValueError, match=f"height is {least - 32}"):
            check_size(least - 32, 224, least)
    with pytest.raises(ValueError, match=r"width is 250; .* for instance to 256"):
        check_size(224, 250, 32)
