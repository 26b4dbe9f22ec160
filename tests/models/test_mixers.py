"""SS2D and MS2D against the paper's equations, written out for one map; and their initial values."""

import math

import pytest
import torch
import torch.nn.functional as F

from msv.kernels import selective_scan
from msv.models import MS2D, S6, SS2D
from msv.models.layers import ConvFFN
from msv.models.mixers import dt_rank, half_routes


def cells(route, height, width):
    if route.startswith("row"):
        found = [(i, j) for i in range(height) for j in range(width)]
    else:
        found = [(i, j) for j in range(width) for i in range(height)]
    return found[::-1] if route.endswith("R") else found


def conv(x, weights, name, stride):
    weight = weights[f"{name}.weight"]
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, weights[f"{name}.bias"], stride, weight.shape[-1] // 2, 1, len(weight))
    return F.silu(y).permute(0, 2, 3, 1)


def s6(tokens, weights, name, s):
    """tokens (B, L, D) through weight set s: Eqs. 1-4."""
    x_proj, dt_weight, dt_bias, A_log, D_skip = (
        weights[f"{name}.{part}"][s] for part in ("x_proj", "dt_weight", "dt_bias", "A_log", "D_skip")
    )
    rank, d_state = dt_weight.shape[1], A_log.shape[1]
    dt_low, B, C = (tokens @ x_proj.T).split([rank, d_state, d_state], dim=-1)
    y = selective_scan(
        tokens.mT, (dt_low @ dt_weight.T).mT, -A_log.exp(), B.mT, C.mT, D_skip,
        delta_bias=dt_bias, delta_softplus=True, backend="reference",
    )  # fmt: skip
    return y.mT


def walk(x, weights, name, sequences):
    """Each route's output on the map, for sequences of routes with a weight set each."""
    height, width = x.shape[1:3]
    found = []
    for s, routes in enumerate(sequences):
        order = [cell for route in routes for cell in cells(route, height, width)]
        y = s6(torch.stack([x[:, i, j] for i, j in order], dim=1), weights, name, s if len(sequences) > 1 else 0)
        for piece, route in zip(y.split(height * width, dim=1), routes, strict=True):
            on_map = torch.full_like(x, torch.nan)
            for t, (i, j) in enumerate(cells(route, height, width)):
                on_map[:, i, j] = piece[:, t]
            found.append(on_map)
    return found


def interpolation(out, size):
    """Rows of weights of linear interpolation from `size` to `out` points, pixel centres at halves."""
    weights = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        at = max((i + 0.5) * size / out - 0.5, 0)
        low = min(int(at), size - 1)
        weights[i, low] += 1 - (at - low)
        weights[i, min(low + 1, size - 1)] += at - low
    return weights


def bilinear(x, height, width):
    return torch.einsum("ih,jw,bhwd->bijd", interpolation(height, x.shape[1]), interpolation(width, x.shape[2]), x)


def skip(x, weights, name, routes):
    """Each route's output without recurrence: y = D_skip ∘ x, with a weight set a route or one for all."""
    sets = weights[f"{name}.D_skip"]
    return [x * sets[s if len(sets) > 1 else 0] for s in range(routes)]


def norm(x, weights, name="norm"):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


FULL = {0: (), 1: ("row",), 2: ("row", "col"), 3: ("row", "col", "rowR"), 4: ("row", "col", "rowR", "colR")}
HALF = {1: ("rowR", "col", "colR"), 2: ("rowR", "colR"), 3: ("colR",)}


def by_hand(x, weights, full_scans, carry_state=True, share_half=True, separate_norms=False):
    """A token mixer, as Eqs. 6-11 and the published code have it."""
    height, width = x.shape[1:3]
    x, z = (x @ weights["in_proj.weight"].T).chunk(2, dim=-1)
    if full_scans in (0, 4):
        mapped = conv(x, weights, "dwconv", 1 if full_scans == 4 else 2)
        y = norm(sum(walk(mapped, weights, "s6", [(route,) for route in FULL[4]])), weights)
        y = bilinear(y, height, width) if full_scans == 0 else y
    else:
        full = walk(conv(x, weights, "dwconv_full", 1), weights, "s6_full", [(route,) for route in FULL[full_scans]])
        mapped, routes = conv(x, weights, "dwconv_half", 2), HALF[full_scans]
        if not share_half:
            half = walk(mapped, weights, "s6_half", [(route,) for route in routes])
        elif carry_state:
            half = walk(mapped, weights, "s6_half", [routes])
        else:
            half = [walk(mapped, weights, "s6_half", [(route,)])[0] for route in routes]
        half = sum(norm(y, weights, "norm_half" if separate_norms else "norm") for y in half)
        y = norm(sum(full), weights) + bilinear(half, height, width)
    if "se.reduce.weight" in weights:
        gate = F.relu(y.mean(dim=(1, 2)) @ weights["se.reduce.weight"].T) @ weights["se.expand.weight"].T
        y = y * torch.sigmoid(gate)[:, None, None]
    return (y * z * torch.sigmoid(z)) @ weights["out_proj.weight"].T


VARIANTS = {
    "0/4": {"full_scans": 0},
    "4/0": {"full_scans": 4},
    **{f"{n}/{4 - n}": {"full_scans": n} for n in (1, 2, 3)},
    **{f"{n}/{4 - n}-reset": {"full_scans": n, "carry_state": False} for n in (1, 2)},
    **{f"{n}/{4 - n}-own-sets": {"full_scans": n, "share_half": False} for n in (1, 2)},
    **{f"{n}/{4 - n}-own-norms": {"full_scans": n, "separate_norms": True} for n in (1, 2, 3)},
    "1/3-own-sets-own-norms": {"full_scans": 1, "share_half": False, "separate_norms": True},
}


def make_mixer(dim, d_state, se, full_scans, **toggles):
    if full_scans in (0, 4):
        return SS2D(dim, d_state, stride=1 if full_scans == 4 else 2, se=se, **toggles)
    return MS2D(dim, d_state, full_scans, se=se, **toggles)


@pytest.mark.parametrize("size", [(5, 7), (4, 6), (1, 2)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("se", [False, True], ids=["plain", "SE"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_mixer_is_the_equations(perturb, variant, se, size):
    mixer = perturb(make_mixer(24, 3, se, **variant).double(), scale=0.3)
    x = torch.randn(2, *size, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), by_hand(x, mixer.state_dict(), **variant), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("share_half", [True, False], ids=["shared", "own-sets"])
@pytest.mark.parametrize("full_scans", range(5))
def test_without_recurrence_each_route_is_d_skip_times_x(perturb, full_scans, share_half):
    options = {"share_half": share_half} if full_scans in (1, 2) else {}
    mixer = perturb(make_mixer(24, 1, False, full_scans, recurrence=False, **options).double(), scale=0.3)
    x, weights = torch.randn(2, 5, 7, 24, dtype=torch.float64), mixer.state_dict()
    u, z = (x @ weights["in_proj.weight"].T).chunk(2, dim=-1)
    if full_scans in (0, 4):
        y = norm(sum(skip(conv(u, weights, "dwconv", 1 if full_scans == 4 else 2), weights, "s6", 4)), weights)
        y = bilinear(y, 5, 7) if full_scans == 0 else y
    else:
        half = skip(conv(u, weights, "dwconv_half", 2), weights, "s6_half", 4 - full_scans)
        y = norm(sum(skip(conv(u, weights, "dwconv_full", 1), weights, "s6_full", full_scans)), weights)
        y = y + bilinear(sum(norm(route, weights) for route in half), 5, 7)
    with torch.no_grad():
        expected = (y * F.silu(z)) @ weights["out_proj.weight"].T
        torch.testing.assert_close(mixer(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("full_scans", [1, 2, 3])
def test_half_routes_follow_the_split(full_scans):
    assert half_routes(full_scans) == HALF[full_scans]
    mixer = MS2D(16, 1, full_scans)
    assert mixer.s6_full.routes == tuple((route, s) for s, route in enumerate(FULL[full_scans]))
    assert mixer.s6_half.routes == tuple((route, 0) for route in HALF[full_scans])
    assert mixer.s6_half.carry_state
    assert not mixer.s6_full.carry_state


def test_dt_rank_is_rounded_up():
    assert [dt_rank(dim) for dim in (8, 16, 17, 48, 96, 100)] == [1, 1, 2, 3, 6, 7]


@pytest.mark.parametrize("d_state", [1, 8], ids="N{}".format)
def test_s6_initial_values(d_state):
    channels, rank = 512, 4
    s6 = S6(channels, d_state, rank, ("row", "col", "rowR", "colR"))
    assert s6.x_proj.shape == (4, rank + 2 * d_state, channels)
    torch.testing.assert_close(s6.A_log, torch.arange(1.0, d_state + 1).log().expand(4, channels, d_state))
    assert (s6.D_skip == 1).all()
    delta = F.softplus(s6.dt_bias)
    assert 1e-3 * 0.999 <= delta.min() < 1.2e-3
    assert 0.085 < delta.max() <= 1e-1 * 1.001
    assert delta.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.1)  # log-uniform
    for weight, bound in ((s6.x_proj, channels**-0.5), (s6.dt_weight, rank**-0.5)):
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_linears_are_small_normals_and_convolutions_keep_their_own(make_small):
    network = make_small(perturbed=False, dims=(64, 128, 256, 512), depths=(1, 1, 1, 1))
    mixer = network.stages[3].blocks[0].mixer
    linears = [mixer.in_proj, mixer.out_proj, mixer.se.reduce, mixer.se.expand, network.stages[3].downsample.reduction]
    network.reset_classifier(300)
    for linear in (*linears, network.head.fc):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert linear.weight.abs().max() > 0.06
    assert not network.head.fc.bias.any()
    ffn = network.stages[3].blocks[0].ffn
    assert isinstance(ffn, ConvFFN)
    for layer, fan_in in (
        (ffn.expand, 512),
        (ffn.reduce, 1024),
        (ffn.dwconv, 9),
        (mixer.dwconv_full, 9),
        (mixer.dwconv_half, 49),
        (network.stem.proj, 48),
    ):
        for parameter in (layer.weight, layer.bias):
            assert 0.9 * fan_in**-0.5 < parameter.abs().max() <= fan_in**-0.5
