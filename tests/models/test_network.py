"""The network: sizes, toggles, what it refuses, and the promises of training code (drop path, decay, autocast)."""

import copy
import io
import itertools
import pickle

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from msv.kernels import add_branch, selective_scan_2d
from msv.models import PRESETS, S6, MSVMamba
from msv.models.mixers import use_backend

EXACT = {
    "msvmamba_nano": 6_864_136,
    "msvmamba_micro": 11_879_272,
    "msvmamba_tiny": 33_046_312,
    "vmamba_nano": 4_435_288,
    "vmamba_tiny": 22_893_448,
    "vmamba_small": 44_417_416,
    "vmamba_base": 76_254_056,
}
PLAIN = {"d_state": 8, "se": False, "conv_ffn": False}
ROWS = {
    "table4-vmamba": (4_435_288, {**PLAIN, "full_scans": 4, "depths": (1, 2, 4, 2)}),
    "table4-ms2d": (4_790_200, {**PLAIN, "depths": (2, 2, 6, 2)}),
    "table4-se": (5_329_336, {"d_state": 8, "conv_ffn": False, "depths": (2, 2, 6, 2)}),
    "table4-ffn": (6_556_552, {"d_state": 8, "depths": (1, 2, 4, 2)}),
    "table4-n1": (6_864_136, {}),
    "equal-depth-ms2d": (4_196_632, {**PLAIN, "depths": (1, 2, 4, 2)}),
    **{
        f"table5-{n}/{4 - n}": (params, {**PLAIN, "full_scans": n, "depths": (2, 2, 6, 2)})
        for n, params in enumerate((5_068_600, 4_790_200, 5_039_800, 5_289_400, 5_068_600))
    },
}


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_every_preset_has_a_number():
    assert EXACT.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_presets(name):
    with torch.device("meta"):
        network = timm.create_model(name)
    assert parameters(network) == EXACT[name]


@pytest.mark.parametrize("params, arguments", ROWS.values(), ids=ROWS)
def test_parameters_of_the_papers_rows(params, arguments):
    with torch.device("meta"):
        assert parameters(MSVMamba(**arguments)) == params


@pytest.mark.parametrize("threads", [1, 2])  # of which torch chooses its convolutions
@pytest.mark.parametrize("toggles", [{}, {"full_scans": 4, "se": False}, {"downsample": "conv"}], ids=str)
def test_inference_on_a_cpu_finds_what_training_does(make_small, toggles, threads):
    network, images = make_small(**toggles).eval(), torch.randn(2, 3, 64, 96)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = network(images)
        with torch.inference_mode():
            found = network(images)
    finally:
        torch.set_num_threads(before)
    assert expected.requires_grad and not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (65, 97), (32, 128), (70, 40)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("full_scans", range(5))
def test_any_size_from_32_up(make_small, full_scans, size):
    network = make_small(full_scans=full_scans)
    images = torch.randn(2, 3, *size)
    features = network.forward_features(images)
    stem = [side // 4 for side in size]
    assert features.shape == (2, *(-(-side // 8) for side in stem), 64)
    logits = network(images)
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    torch.testing.assert_close(network(images[:1]), logits[:1])  # a batch of one, and no mixing within the batch


TOGGLES = {
    "full_scans": 2,
    "se": False,
    "conv_ffn": False,
    "d_state": 3,
    "carry_state": False,
    "share_half": False,
    "separate_norms": True,
    "downsample": "conv",
    "depths": (1, 1, 1, 1),
}
SAME_PARAMETERS = {"carry_state"}


@pytest.mark.parametrize("name", TOGGLES)
def test_a_toggle_acts(make_small, name):
    base, toggled = make_small(), make_small(**{name: TOGGLES[name]})
    assert (parameters(base) == parameters(toggled)) == (name in SAME_PARAMETERS)
    images = torch.randn(1, 3, 64, 64)
    assert (base(images) - toggled(images)).abs().max() > 1e-5


@pytest.mark.parametrize("share_half", [True, False])
def test_shapes_of_the_half_branch(make_small, share_half):
    mixer = make_small(share_half=share_half, separate_norms=True).stages[0].blocks[0].mixer
    assert mixer.s6_half.A_log.shape == (1 if share_half else 3, 16, 2)
    assert mixer.s6_half.carry_state == share_half
    assert mixer.norm_half.weight is not mixer.norm.weight


@pytest.mark.parametrize("full_scans", range(5))
def test_without_recurrence_only_convolutions_mix_positions(make_small, full_scans):
    plain = {"full_scans": full_scans, "se": False, "conv_ffn": False, "d_state": 1}
    network = make_small(**plain, recurrence=False)
    assert not any(isinstance(m, S6) for m in network.modules())
    assert {name.rpartition(".")[2] for name, _ in network.named_parameters() if ".s6" in name} == {"D_skip"}
    block = network.stages[0].blocks[0]
    x = torch.randn(1, 40, 40, 8)
    other = x.clone()
    other[:, 20, 20] = torch.randn(8)
    changed = (add_branch(*block(x)) - add_branch(*block(other))).detach().abs().amax(dim=(0, 3)) > 0
    rows, columns = changed.nonzero().T
    # A 7×7 convolution of stride 2, and interpolation, reach 6 pixels at most; the scan reaches everywhere.
    assert changed[20, 20]
    assert max((rows - 20).abs().max(), (columns - 20).abs().max()) <= 6
    scanned = make_small(**plain).stages[0]
    assert ((scanned(x) - scanned(other)).abs().amax(dim=(0, 3)) > 0).float().mean() > 0.4


@pytest.mark.parametrize("backend", ["reference", "parallel"])
def test_backends_agree(make_small, backend):
    images = torch.randn(1, 3, 40, 56)
    network = make_small(backend=backend)
    torch.testing.assert_close(network(images), make_small()(images), rtol=1e-5, atol=1e-5)


class Kernels(TorchDispatchMode):
    """Notes the registered operators that are called below it."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "msv":
            self.found.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recurrence", [True, False], ids=["S6", "skip-only"])
@pytest.mark.parametrize("backend", ["auto", "triton", "parallel", "reference"])
def test_which_kernels_run_on_a_gpu(make_small, backend, recurrence):
    network = make_small(depths=(1, 1, 1, 1), d_state=1, backend=backend, recurrence=recurrence)
    with FakeTensorMode(), Kernels() as kernels:
        on_gpu = {name: torch.empty(p.shape, device="cuda") for name, p in network.named_parameters()}
        torch.func.functional_call(network, on_gpu, torch.empty(1, 3, 64, 64, device="cuda"))
    of_triton = {"add_norm", "depthwise_conv", "merge_routes", "gate", *(["selective_scan_2d"] if recurrence else [])}
    assert kernels.found == (of_triton if backend in ("auto", "triton") else set())


def test_another_backend_for_a_whole_network(make_small):
    network = make_small(backend="triton")
    use_backend(network, "parallel")
    with Kernels() as kernels:
        network(torch.randn(1, 3, 32, 32))
    assert not kernels.found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_through_triton(make_small, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for backend, precision in (("triton", dtype), ("reference", torch.float64)):
        network = make_small(depths=(1, 1, 1, 1), backend=backend).to(device, precision)
        logits = network(torch.linspace(-2, 2, 3 * 64 * 32, device=device, dtype=precision).view(1, 3, 64, 32).sin())
        logits.square().sum().backward()
        assert all(parameter.grad.dtype == logits.dtype == precision for parameter in network.parameters())
        found.append((logits, torch.cat([parameter.grad.flatten() for parameter in network.parameters()])))
    for t, exact in zip(*found, strict=True):
        assert (t - exact).norm() < 0.05 * exact.norm()


REFUSED = {
    "full_scans-5": ({"full_scans": 5}, "full_scans is 5; expected 0 to 4"),
    "full_scans-negative": ({"full_scans": -1}, "full_scans is -1; expected 0 to 4"),
    "d_state-0": ({"d_state": 0}, "d_state is 0; expected 1 or more"),
    "in_chans-0": ({"in_chans": 0}, "in_chans is 0; expected 1 or more"),
    "num_classes-negative": ({"num_classes": -1}, "num_classes is -1; expected 0 or more"),
    "dims-three": ({"dims": (8, 16, 32)}, r"dims is \[8, 16, 32\]; expected four numbers"),
    "dims-0": ({"dims": (0, 16, 32, 64)}, r"dims is \[0, 16, 32, 64\]"),
    "dims-2": ({"dims": (2, 4, 8, 16)}, r"dims is \[2, 4, 8, 16\]; expected 4 or more"),
    "depths-five": ({"depths": (1, 1, 1, 1, 1)}, r"depths is \[1, 1, 1, 1, 1\]; expected four numbers"),
    "depths-0": ({"depths": (1, 0, 1, 1)}, r"depths is \[1, 0, 1, 1\]"),
    "drop_path_rate-1": ({"drop_path_rate": 1.0}, r"drop_path_rate is 1.0; expected 0 or more and less than 1"),
    "drop_rate-negative": ({"drop_rate": -0.1}, "drop_rate is -0.1"),
    "ffn_drop_rate-2": ({"ffn_drop_rate": 2}, "ffn_drop_rate is 2"),
    "ffn_drop_rate-without-ffn": ({"ffn_drop_rate": 0.1, "conv_ffn": False}, "there is no ConvFFN"),
    "downsample": ({"downsample": "pool"}, "downsample is 'pool'; expected 'merge' or 'conv'"),
    **{
        f"carry-{n}": ({"carry_state": False, "full_scans": n}, f"carry_state is false, but the split {n}/{4 - n}")
        for n in (0, 3, 4)
    },
    **{
        f"share-{n}": ({"share_half": False, "full_scans": n}, f"share_half is false, but the split {n}/{4 - n}")
        for n in (0, 3, 4)
    },
    **{
        f"norms-{n}": ({"separate_norms": True, "full_scans": n}, f"separate_norms is true, but the split {n}/{4 - n}")
        for n in (0, 4)
    },
    **{
        f"no-recurrence-{name}": (
            {"recurrence": False, name: value},
            f"{name} is {str(value).lower()}, but recurrence is false.*set {name} to {default}",
        )
        for name, value, default in (
            ("d_state", 8, 1),
            ("carry_state", False, "true"),
            ("ssm_weight_decay", False, "true"),
        )
    },
    "carry-with-own-sets": ({"carry_state": False, "share_half": False}, "separate weight sets never carry a state"),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MSVMamba(**arguments)


def test_an_unknown_backend_is_refused(make_small):
    with pytest.raises(ValueError, match="backend 'cuda' is unknown"):
        make_small(backend="cuda")(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 3, 31, 32), "images are 31×32; expected both sides 32 or more"),
        ((1, 3, 64, 8), "images are 64×8; expected both sides 32 or more"),
        ((1, 1, 32, 32), r"images have shape \(1, 1, 32, 32\); expected \(B, 3, H, W\)"),
        ((3, 32, 32), r"images have shape \(3, 32, 32\); expected \(B, 3, H, W\)"),
        ((1, 32, 32, 3), r"images have shape \(1, 32, 32, 3\)"),
    ],
    ids=str,
)
def test_images_refused(make_small, shape, message):
    network = make_small()
    for run in (network, network.forward_features, network.forward_intermediates):
        with pytest.raises(ValueError, match=message):
            run(torch.randn(shape))


def test_drop_path_rises_linearly_over_all_blocks():
    network = MSVMamba(dims=(8, 16, 32, 64), depths=(1, 2, 5, 2), drop_path_rate=0.2)
    blocks = [block for stage in network.stages for block in stage.blocks]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    torch.testing.assert_close(rates, [0.2 * i / 9 for i in range(10)])


def test_drop_path_acts_in_both_halves_of_a_block_and_in_training_only(make_small):
    network = make_small(drop_path_rate=0.9)
    images = torch.randn(4, 3, 32, 32)
    block, x = network.stages[3].blocks[0], torch.randn(64, 1, 1, 64)
    assert isinstance(block.drop_path, DropPath)
    unchanged = (add_branch(*block.train()(x)) == x).all(dim=-1).float().mean().item()
    assert 0.6 < unchanged < 0.98  # 0.81 where both halves are dropped with probability 0.9 each
    torch.testing.assert_close(network.eval()(images), make_small()(images))


@pytest.mark.parametrize("rates", [{"drop_rate": 0.5}, {"ffn_drop_rate": 0.5}, {"drop_path_rate": 0.5}], ids=str)
def test_dropout_draws_from_the_seed_in_training_only(make_small, rates):
    network, images = make_small(**rates), torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(network(images), make_small()(images))
    network.train()

    def run(seed):
        torch.manual_seed(seed)
        return network(images)

    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2))


def test_evaluation_has_no_chance_in_it(make_small):
    network, images = make_small(drop_path_rate=0.5, drop_rate=0.5, ffn_drop_rate=0.5), torch.randn(2, 3, 32, 32)
    assert torch.equal(network(images), network(images))
    assert torch.equal(network.train().eval()(images), network(images))


def gradients(network, images):
    torch.manual_seed(3)
    network.zero_grad()
    network(images).square().sum().backward()
    return {name: p.grad for name, p in network.named_parameters()}


def test_grad_checkpointing_gives_the_same_gradients(make_small):
    images = torch.randn(2, 3, 40, 40)
    runs = []
    for network in (make_small(drop_path_rate=0.3), make_small(drop_path_rate=0.3, grad_checkpointing=True)):
        calls = []
        network.stages[2].blocks[1].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        runs.append((gradients(network.train(), images), len(calls)))
    (plain, once), (recomputed, twice) = runs
    assert (once, twice) == (1, 2)
    assert plain.keys() == recomputed.keys()
    for name in plain:
        assert torch.equal(plain[name], recomputed[name]), name


def test_every_parameter_gets_a_gradient(make_small):
    for full_scans, separate in ((0, False), (1, True), (2, True), (3, True), (4, False)):
        # Wide enough for every squeeze-excitation to have a hidden channel alive.
        network = make_small(full_scans=full_scans, separate_norms=separate, dims=(32, 64, 96, 128))
        for name, gradient in gradients(network, torch.randn(4, 3, 96, 96)).items():
            assert gradient is not None, name
            assert gradient.any(), name


def decay_groups(network):
    """timm's two parameter groups: without weight decay, and with."""
    return timm.optim.param_groups_weight_decay(network, 0.05, no_weight_decay_list=network.no_weight_decay())


def test_weight_decay_as_published():
    with torch.device("meta"):
        network = timm.create_model("msvmamba_nano")
    plain, decayed = decay_groups(network)
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    assert sum(p.numel() for p in plain["params"]) == 45_928
    assert sum(p.numel() for p in decayed["params"]) == 6_818_208


def test_weight_decay_without_the_ssm():
    with torch.device("meta"):
        network = timm.create_model("msvmamba_nano", ssm_weight_decay=False)
    kept = network.no_weight_decay()
    ssm = {n: p.numel() for n, p in network.named_parameters() if n.endswith((".A_log", ".dt_bias"))}
    skips = {n for n, _ in network.named_parameters() if n.endswith(".D_skip")}
    assert len(ssm) == 2 * len(skips) == 40
    assert kept == ssm.keys() | skips
    _, decayed = decay_groups(network)
    assert sum(p.numel() for p in decayed["params"]) == 6_818_208 - sum(ssm.values())


@pytest.mark.parametrize("full_scans", [0, 1, 4])
def test_autocast_runs_and_keeps_float32_states(make_small, full_scans):
    network, images = make_small(full_scans=full_scans), torch.randn(2, 3, 40, 48)
    seen = []
    for module in network.modules():
        if isinstance(module, S6):
            module.register_forward_hook(lambda s6, inputs, y: seen.append((s6, inputs[0].detach(), y.detach())))
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(images)
    assert logits.isfinite().all()
    assert (logits.float() - make_small(full_scans=full_scans)(images)).norm() < 0.05 * logits.float().norm()
    logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in network.parameters())
    assert seen
    for s6, x, y in seen:  # only inputs and outputs are rounded: float64 states give the same within one rounding
        assert x.dtype == y.dtype == torch.bfloat16
        x_dbl = F.linear(x, s6.x_proj.detach().bfloat16().flatten(0, 1)).unflatten(-1, s6.x_proj.shape[:2])
        tensors = (x, x_dbl, s6.dt_weight, s6.dt_bias, s6.A_log, s6.D_skip)
        exact = selective_scan_2d(
            *(t.detach().double() for t in tensors), s6.routes, s6.carry_state, backend="reference"
        )
        assert ((y - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()


def test_state_dict_round_trip(make_small):
    network, images = make_small(share_half=False, separate_norms=True, downsample="conv"), torch.randn(1, 3, 32, 32)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    other = make_small(perturbed=False, share_half=False, separate_norms=True, downsample="conv")
    assert not torch.allclose(other(images), network(images))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(images), network(images))


def test_copies_are_independent(make_small):
    network, images = make_small(), torch.randn(1, 3, 32, 32)
    expected = network(images)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(images), expected)
        with torch.no_grad():
            next(twin.parameters()).zero_()
        assert not torch.equal(twin(images), expected)
    assert torch.equal(network(images), expected)


def test_initial_values_follow_the_seed():
    def state(seed):
        torch.manual_seed(seed)
        return MSVMamba(dims=(8, 16, 32, 64), depths=(1, 1, 1, 1)).state_dict()

    first, again, other = state(5), state(5), state(6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if name.endswith((".x_proj", ".dt_weight", ".dt_bias", "proj.weight"))]
    assert drawn
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_downsampling_pads_odd_maps_with_zeros_at_the_end(make_small):
    for downsample, side in itertools.product(("merge", "conv"), (5, 6)):
        layer = make_small(downsample=downsample).stages[1].downsample
        x = torch.randn(1, side, 7, 8)
        padded = torch.zeros(1, 6, 8, 8)
        padded[:, :side, :7] = x
        assert layer(x).shape == (1, 3, 4, 16)
        torch.testing.assert_close(layer(x), layer(padded))


def test_patch_merging_order(make_small):
    layer = make_small().stages[1].downsample
    x = torch.randn(1, 4, 6, 8)
    y = layer(x)
    for i, j in itertools.product(range(2), range(3)):
        patch = x[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        joined = torch.cat([patch[0, 0], patch[1, 0], patch[0, 1], patch[1, 1]])
        joined = F.layer_norm(joined, (32,), layer.norm.weight, layer.norm.bias)
        torch.testing.assert_close(y[0, i, j], layer.reduction.weight @ joined)


def test_conv_ffn_by_hand(make_small):
    ffn = make_small().stages[0].blocks[0].ffn
    x = torch.randn(2, 5, 3, 8)
    u = F.conv2d(x.permute(0, 3, 1, 2), ffn.expand.weight[:, :, None, None], ffn.expand.bias)
    u = F.gelu(u + F.conv2d(u, ffn.dwconv.weight, ffn.dwconv.bias, padding=1, groups=16))
    expected = F.conv2d(u, ffn.reduce.weight[:, :, None, None], ffn.reduce.bias).permute(0, 2, 3, 1)
    torch.testing.assert_close(ffn(x), expected)
