import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import DeviceType

import msv.kernels as kernels
from msv.profiling import trace as module
from msv.profiling.steps import training_step
from msv.profiling.trace import FAMILIES, Kernel, Trace, family, trace

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["scan_2d_forward", "msv::selective_scan_2d"], "scan"),
        (["aten::mul", "msv::selective_scan_backward"], "scan"),
        (["vectorized_elementwise_kernel", "aten::_fused_adamw_", "Optimizer.step#AdamW.step"], "optimizer"),
        (["aten::copy_", "Optimizer.step#AdamW.step"], "optimizer"),
        (["conv_depthwise2d_forward_kernel", "aten::conv2d"], "depthwise convolution"),
        (["cudnn::engines_precompiled::dgrad", "aten::convolution_backward"], "other convolution"),
        (["sm90_xmma_gemm_bf16bf16_bf16f32", "aten::mm", "autograd::engine::evaluate_function: MmBackward0"],
         "matrix products"),
        (["nvjet_tst_128x256"], "matrix products"),
        (["void at::native::vectorized_layer_norm_kernel", "aten::native_layer_norm"], "normalisation"),
        (["elementwise_kernel", "aten::copy_", "aten::_to_copy", "aten::linear"], "copies and casts"),
        (["Memcpy DtoD (Device -> Device)"], "copies and casts"),
        (["elementwise_kernel", "aten::gelu"], "other elementwise"),
        (["triton_red_fused_native_layer_norm_native_layer_norm_backward_7"], "normalisation"),
        (["triton_poi_fused__to_copy_permute_clone_3"], "copies and casts"),
        (["triton_poi_fused__to_copy_gelu_mul_3"], "other elementwise"),
        (["triton_poi_fused_add_convolution_silu_12"], "other elementwise"),
        (["triton_tem_fused_mm_2"], "matrix products"),
        (["void implicit_convolve", "aten::cudnn_convolution"], "other convolution"),
    ],
)  # fmt: skip
def test_families(names, expected):
    assert expected in FAMILIES
    assert family(names) == expected


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("triton_1d", "scan"), ("triton_2d", "scan"), ("triton_merge", "merge and gate"),
        ("triton_depthwise", "depthwise convolution"), ("triton_norm", "normalisation"),
    ],
)  # fmt: skip
def test_every_kernel_of_ours_has_its_family(file, expected):
    source = Path(kernels.__file__).with_name(f"{file}.py").read_text()
    launched = set(re.findall(r"^ +(\w+)\[.*\]\(", source, re.MULTILINE))
    assert len(launched) >= 2
    for name in launched:
        assert family([name]) == expected


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("selective_scan", "scan"), ("selective_scan_2d", "scan"), ("merge_routes", "merge and gate"),
        ("gate", "merge and gate"), ("depthwise_conv", "depthwise convolution"), ("add_norm", "normalisation"),
    ],
)  # fmt: skip
def test_what_goes_on_inside_of_our_operators_is_theirs(operator, expected):
    for name in (f"msv::{operator}", f"msv::{operator}_backward"):
        assert hasattr(torch.ops.msv, name.removeprefix("msv::"))
        assert family([name]) == family(["reduce_kernel", "aten::sum", name]) == expected


def test_a_depthwise_convolution_is_told_by_its_weight():
    assert family(["cudnn::dgrad", "aten::convolution_backward"], depthwise=True) == "depthwise convolution"
    assert family(["copy_kernel", "aten::copy_", "aten::conv2d"], depthwise=True) == "copies and casts"
    assert module._is_depthwise([[2, 8, 5, 5], [8, 1, 3, 3], [8]])
    assert module._is_depthwise([[2, 8, 5, 5], [2, 8, 5, 5], [8, 1, 3, 3], [8]])  # its backward
    assert not module._is_depthwise([[2, 3, 8, 8], [8, 3, 4, 4], [8]])
    assert not module._is_depthwise([[2, 8, 2, 2], [2, 1, 8, 8], [8, 1, 4, 4]])  # a stem of grey images
    assert not module._is_depthwise([])


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 10)

    def forward(self, x):
        x = F.gelu(self.depthwise(self.stem(x)))
        return self.head(self.norm(x.permute(0, 2, 3, 1).contiguous()).mean(dim=(1, 2)))


def test_a_training_step_on_a_cpu(tmp_path):
    step = training_step(Small(), torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
    path = tmp_path / "new" / "step.json.gz"
    found = trace(step.work, CPU, path, steps=2, warmup=1)
    shares = found.shares()
    assert list(shares) == [name for name in FAMILIES if name not in ("scan", "merge and gate")]
    assert sum(share for _, share, _ in shares.values()) == pytest.approx(1)
    assert sum(seconds for seconds, *_ in shares.values()) == pytest.approx(found.seconds / 2)
    by_name = {(kernel.name, kernel.family): kernel.calls for kernel in found.kernels}
    # Each step: a depthwise convolution and the stem's, forward and backward.
    assert by_name["aten::convolution_backward", "depthwise convolution"] == 2
    assert by_name["aten::convolution_backward", "other convolution"] == 2
    assert by_name["aten::native_layer_norm", "normalisation"] == 2
    assert [kernel.seconds for kernel in found.kernels] == sorted((k.seconds for k in found.kernels), reverse=True)
    with gzip.open(path) as file:
        assert any(event.get("name") == "aten::native_layer_norm" for event in json.load(file)["traceEvents"])


def test_shares_leave_the_rest_idle():
    kernels = (Kernel("a", "scan", 0.4, 8), Kernel("b", "scan", 0.2, 2), Kernel("c", "matrix products", 0.2, 2))
    assert Trace(1.0, 2, kernels).shares() == {
        "scan": (pytest.approx(0.3), pytest.approx(0.6), 5),
        "matrix products": (pytest.approx(0.1), pytest.approx(0.2), 1),
        "idle": (pytest.approx(0.1), pytest.approx(0.2), 0),
    }


def event(name, device=DeviceType.CPU, kernels=(), parent=None, microseconds=0.0, note=False):
    times = SimpleNamespace(start=100.0, end=100.0 + microseconds)
    return SimpleNamespace(
        name=name, device_type=device, kernels=kernels, cpu_parent=parent, input_shapes=[], time_range=times,
        is_user_annotation=note,
    )  # fmt: skip


def test_every_kernel_of_a_gpu_counts_once():
    launched = SimpleNamespace(name="elementwise_kernel", duration=3.0)
    parent = event("aten::contiguous")
    events = [
        parent,
        event("aten::copy_", kernels=[launched], parent=parent),
        event("elementwise_kernel", DeviceType.CUDA, microseconds=3.0),
        event("triton_poi_fused_gelu_0", DeviceType.CUDA, microseconds=5.0),  # launched by no operator
        event("Optimizer.step#AdamW.step", DeviceType.CUDA, microseconds=9.0, note=True),  # no kernel, a mark
    ]
    assert list(module._on_gpu(events)) == [
        ("elementwise_kernel", "copies and casts", pytest.approx(3e-6)),
        ("triton_poi_fused_gelu_0", "other elementwise", pytest.approx(5e-6)),
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_training_step_on_a_gpu(tmp_path):
    cuda = torch.device("cuda")
    step = training_step(Small().to(cuda), torch.randn(64, 3, 64, 64, device=cuda), torch.ones(64, device=cuda).long())
    shares = trace(step.work, cuda, tmp_path / "step.json").shares()
    assert {"depthwise convolution", "other convolution", "normalisation", "optimizer", "idle"} <= shares.keys()
    assert sum(share for _, share, _ in shares.values()) == pytest.approx(1, abs=0.2)
