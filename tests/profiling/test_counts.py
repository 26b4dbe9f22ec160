"""Parameters to the unit and GFLOPs to the third decimal, of every model whose numbers the paper gives."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from msv.models import PRESETS, MSVMamba
from msv.profiling import count

PRESET_COUNTS = {
    "msvmamba_nano": (6_864_136, 0.883),
    "msvmamba_micro": (11_879_272, 1.532),
    "msvmamba_tiny": (33_046_312, 4.613),
    "vmamba_nano": (4_435_288, 0.873),
    "vmamba_tiny": (22_893_448, 5.627),
    "vmamba_small": (44_417_416, 11.232),
    "vmamba_base": (76_254_056, 18.020),
}
PLAIN = {"d_state": 8, "se": False, "conv_ffn": False}
TABLE_5 = ((5_068_600, 0.740), (4_790_200, 0.889), (5_039_800, 0.998), (5_289_400, 1.107), (5_068_600, 1.193))
ROWS = {
    "table4-vmamba": (4_435_288, 0.873, {**PLAIN, "full_scans": 4, "depths": (1, 2, 4, 2)}),
    "table4-ms2d": (4_790_200, 0.889, {**PLAIN, "depths": (2, 2, 6, 2)}),
    "table4-se": (5_329_336, 0.891, {"d_state": 8, "conv_ffn": False, "depths": (2, 2, 6, 2)}),
    "table4-ffn": (6_556_552, 0.935, {"d_state": 8, "depths": (1, 2, 4, 2)}),
    "table4-n1": (6_864_136, 0.883, {}),
    "equal-depth-ms2d": (4_196_632, 0.663, {**PLAIN, "depths": (1, 2, 4, 2)}),
    **{
        f"table5-{n}/{4 - n}": (*numbers, {**PLAIN, "full_scans": n, "depths": (2, 2, 6, 2)})
        for n, numbers in enumerate(TABLE_5)
    },
}
SMALL = {"num_classes": 10, "dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1)}


def on_meta(make, *args, **arguments):
    with torch.device("meta"):
        return make(*args, **arguments)


def assert_parts_add_up(counts):
    for i, total in enumerate((counts.params, counts.flops_fvcore, counts.flops)):
        assert sum(numbers[i] for numbers in counts.parts.values()) == total


def test_every_preset_has_numbers():
    assert PRESET_COUNTS.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESET_COUNTS)
def test_presets(name):
    counts = count(on_meta(timm.create_model, name))
    params, gflops = PRESET_COUNTS[name]
    assert counts.params == params
    assert round(counts.flops_fvcore / 1e9, 3) == gflops
    assert_parts_add_up(counts)


@pytest.mark.parametrize("params, gflops, arguments", ROWS.values(), ids=ROWS)
def test_rows_of_the_papers_tables(params, gflops, arguments):
    counts = count(on_meta(MSVMamba, **arguments), 3, 224)
    assert counts.params == params
    assert round(counts.flops_fvcore / 1e9, 3) == gflops
    assert_parts_add_up(counts)


def test_plain_flops_by_hand():
    """4/0 without extras, one block a stage, every term written out in both conventions."""
    dims, d_state, side = (8, 16, 32, 64), 2, 64
    counts = count(MSVMamba(**SMALL, d_state=d_state, full_scans=4, se=False, conv_ffn=False), 3, side)
    macs = norms = scans = pooled = 0
    for i, dim in enumerate(dims):
        cells, inner, rank = (side // 4 // 2**i) ** 2, 2 * dim, -(-dim // 16)
        if i == 0:
            macs += cells * 4 * 4 * 3 * dim
            norms += cells * dim
        else:
            macs += cells * 2 * dim * dim  # from 4·dim/2 channels
            norms += cells * 2 * dim
        macs += cells * dim * 2 * inner + cells * inner * dim + cells * inner * 9  # in, out, 3×3
        macs += 4 * cells * inner * (rank + 2 * d_state) + 4 * cells * inner * rank  # x_proj, delta
        scans += 4 * 9 * cells * inner * d_state
        macs += 4 * cells * inner  # the skip
        norms += cells * dim + cells * inner
    norms += cells * dims[-1]
    pooled += cells * dims[-1]
    macs += dims[-1] * 10
    assert counts.flops_fvcore == macs + scans + 5 * norms + pooled
    assert counts.flops == 2 * macs + scans


def test_sharing_and_carrying_do_not_change_the_papers_count():
    base = count(on_meta(MSVMamba, **SMALL), 3, 64)
    reset = count(on_meta(MSVMamba, **SMALL, carry_state=False), 3, 64)
    own_sets = count(on_meta(MSVMamba, **SMALL, share_half=False), 3, 64)
    assert reset == base
    assert own_sets.flops_fvcore == base.flops_fvcore
    assert own_sets.params > base.params
    assert own_sets.flops > base.flops  # ours projects the map once a weight set


def test_parts_hold_what_they_say():
    network = MSVMamba(**SMALL)
    parts = count(network, 3, 64).parts
    numel = {name: p.numel() for name, p in network.named_parameters()}
    assert parts["stem"][0] == sum(n for name, n in numel.items() if name.startswith("stem."))
    assert parts["head"][0] == sum(n for name, n in numel.items() if name.startswith("head."))
    assert parts["downsampling"][0] == sum(n for name, n in numel.items() if ".downsample." in name)
    assert parts["scans"][0] == sum(n for name, n in numel.items() if ".s6" in name)
    assert parts["se"][0] == sum(n for name, n in numel.items() if ".se." in name)
    assert parts["ffn"][0] == sum(n for name, n in numel.items() if ".ffn." in name)
    assert parts["convolutions"][0] == sum(n for name, n in numel.items() if "mixer.dwconv" in name)
    assert parts["projections"][0] == sum(n for name, n in numel.items() if "in_proj" in name or "out_proj" in name)
    assert parts["other"] == (0, parts["other"][1], 0)


def test_the_flops_of_a_part_are_those_of_its_modules():
    """One block a stage of 16×16, 8×8, 4×4 and 2×2 cells, the half map a quarter of each."""
    parts = count(MSVMamba(**SMALL), 3, 64).parts
    cells, dims = (256, 64, 16, 4), SMALL["dims"]
    sizes = list(zip(cells, dims, strict=True))
    assert parts["projections"][2] == 2 * parts["projections"][1] == 2 * sum(n * 6 * c * c for n, c in sizes)
    depthwise = sum((n * 9 + n // 4 * 49) * 2 * c for n, c in sizes)
    assert parts["convolutions"][1:] == (depthwise, 2 * depthwise)
    squeeze = sum(2 * 2 * c * (2 * c // 8) for _, c in sizes)
    assert parts["se"][1:] == (squeeze + sum(n * 2 * c for n, c in sizes), 2 * squeeze)
    channel_mixers = sum(n * (4 * c * c + 9 * 2 * c) for n, c in sizes)
    assert parts["ffn"][1:] == (channel_mixers, 2 * channel_mixers)
    assert parts["other"][1] == sum(4 * n * 2 * c for n, c in sizes)  # the half map, upsampled


def test_activations_by_hand():
    """The same network: what stem, blocks, downsampling and classifier put out; SE puts out vectors."""
    counts = count(MSVMamba(**SMALL), 3, 64)
    expected = 256 * 8 + sum(n * c for n, c in ((64, 16), (16, 32), (4, 64))) + 10
    for cells, dim in ((256, 8), (64, 16), (16, 32), (4, 64)):
        inner, half, rank = 2 * dim, cells // 4, -(-dim // 16)
        expected += cells * 2 * inner + cells * dim  # in, out
        expected += (cells + half) * (inner + rank + 2)  # 3×3 and 7×7, x_proj of one weight set each
        expected += (cells + 3 * half) * inner  # the scan of each route
        expected += inner // 8 + inner
        expected += 2 * cells * 2 * dim + cells * dim  # ConvFFN
    assert counts.activations == expected


@pytest.mark.parametrize("backend", ["auto", "reference", "parallel"])
def test_the_network_is_left_alone(backend):
    network = MSVMamba(**SMALL, drop_path_rate=0.3, backend=backend).train()
    network.stages[1].eval()
    training = [m.training for m in network.modules()]
    state = {name: t.clone() for name, t in network.state_dict().items()}
    random = torch.get_rng_state()
    counts = count(network, 3, 64)
    assert [m.training for m in network.modules()] == training
    assert all(torch.equal(t, state[name]) and t.device.type == "cpu" for name, t in network.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert counts == count(network, 3, 64) == count(network.eval(), 3, (64, 64))


def test_image_size_and_channels():
    network = MSVMamba(**SMALL, in_chans=1)
    square, wide = count(network, 1, 64), count(network, 1, (64, 128))
    assert square.params == wide.params
    assert square.parts["scans"][1] * 2 == wide.parts["scans"][1]
    color = count(MSVMamba(**SMALL), 3, 64)
    assert color.parts["stem"][0] - square.parts["stem"][0] == 2 * 16 * 8
    assert color.parts["stem"][2] == 3 * square.parts["stem"][2] > 0
    odd = count(network, 1, (33, 47))
    assert 0 < odd.flops < square.flops
    assert_parts_add_up(odd)


def test_images_that_do_not_fit():
    with pytest.raises(ValueError, match="images are 31×31; expected both sides 32 or more"):
        count(MSVMamba(**SMALL), 3, 31)
    with pytest.raises(ValueError, match=r"expected \(B, 1, H, W\)"):
        count(MSVMamba(**SMALL, in_chans=1), 3, 64)


def test_the_backend_does_not_change_the_count():
    counts = [count(MSVMamba(**SMALL, backend=backend), 3, 64) for backend in ("auto", "parallel", "reference")]
    assert counts[0] == counts[1] == counts[2]


def test_shared_parameters_count_once():
    linear = nn.Linear(4, 4)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4), linear, nn.ReLU(), linear)
    counts = count(network, 3, 32)
    assert counts.params == 3 * 32 * 32 * 4 + 4 + 20
    assert counts.flops == 2 * counts.flops_fvcore == 2 * (3 * 32 * 32 * 4 + 2 * 16)


@pytest.mark.parametrize(
    "name, published",
    [("resnet18", 2.48), ("deit_small_patch16_224", 11.95), ("swin_tiny_patch4_window7_224", 17.06)],
)
def test_activations_and_plain_flops_are_those_of_others(name, published):
    """Activations as in timm's table of results, in millions; FLOPs as torch's own counter has them."""
    network = on_meta(timm.create_model, name).eval()
    counts = count(network)
    assert round(counts.activations / 1e6, 2) == published
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 3, 224, 224, device="meta"))
    assert counts.flops == counter.get_total_flops()


def test_a_model_of_timms():
    counts = count(on_meta(timm.create_model, "resnet18"), 3, 224)
    assert counts.params == 11_689_512
    assert round(counts.flops_fvcore / 1e9, 2) == 1.81  # multiply-accumulates; batch norms and pooling by max count 0
    assert_parts_add_up(counts)
