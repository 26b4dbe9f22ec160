"""The published model's numbers, on its weights: logits, maps between stages, gradients."""

import importlib.util
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import torch

from msv.models import MSVMamba, load_published
from msv.models.published import infer_arguments, published_name

FOLDER = Path(__file__).parents[1] / "goldens"
NAMES = ("small_ss2d", "small_split13", "small_full_n1")

spec = importlib.util.spec_from_file_location("published_twin", Path(__file__).with_name("published_twin.py"))
assert spec is not None
assert spec.loader is not None
twin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(twin)


@cache
def golden(name):
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)


def network(name, backend="auto"):
    config = golden(name)["config"]
    model = MSVMamba(
        num_classes=config["num_classes"],
        dims=tuple(config["dims"] * 2**i for i in range(4)),
        depths=tuple(config["depths"]),
        d_state=config["ssm_d_state"],
        full_scans=4 if config["scan"] == "ss2d" else config["ms_split"][0],
        se=config["add_se"],
        conv_ffn=config["convFFN"],
        backend=backend,
    )
    report = load_published(model, golden(name)["state_dict"])
    assert report.tensors == len(golden(name)["state_dict"])
    return model.eval()


def published_gradients(model):
    """Gradients by published name: those of a mixer's weight sets in one tensor, the half branch first."""
    parts = defaultdict(dict)
    for name, parameter in model.named_parameters():
        parts[published_name(name)][".s6_full." in name] = parameter.grad
    return {name: torch.cat([found[key] for key in sorted(found)]) for name, found in parts.items()}


def test_the_goldens_are_all_there():
    assert sorted(path.stem for path in FOLDER.glob("*.pt")) == sorted(NAMES)


@pytest.mark.parametrize("backend", ["reference", "parallel", "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_golden(name, backend, relative_norm):
    model, case = network(name, backend), golden(name)["cases"]["64x64"]
    modules = {"patch_embed": model.stem, "norm": model.norm, "pooled": model.head.global_pool}
    modules |= {f"stage{i}": stage for i, stage in enumerate(model.stages)}
    modules |= {f"down{i}": stage.downsample for i, stage in enumerate(model.stages[1:])}
    assert modules.keys() == case["stages"].keys()
    found = {}
    for key, module in modules.items():
        module.register_forward_hook(lambda _, inputs, output, key=key: found.__setitem__(key, output.detach()))

    images = case["input"].clone().requires_grad_()
    logits = model(images)
    assert (logits - case["logits"]).abs().max() <= 3e-6
    for key, expected in case["stages"].items():
        assert found[key].shape == expected.shape
        assert (found[key] - expected).abs().max() <= 5e-5, key

    (logits * case["weight"]).sum().backward()
    assert relative_norm(images.grad, case["grad_input"]) <= 4e-6
    gradients = published_gradients(model)
    assert gradients.keys() == case["grad_norms"].keys()
    for key, norm in case["grad_norms"].items():
        assert gradients[key].norm().item() == pytest.approx(norm, rel=2e-5), key
    for key, expected in case["grads"].items():
        assert relative_norm(gradients[key].reshape(expected.shape), expected) <= 1e-5, key


@pytest.fixture
def relative_norm():
    return lambda found, expected: ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("change", [{"carry_state": False}, {"order": ("col", "rowR", "colR")}], ids=["reset", "order"])
def test_another_reading_of_the_half_branch_is_told_apart(change):
    """The tolerances are narrow enough: the nearest wrong models leave them."""
    model, case = network("small_split13"), golden("small_split13")["cases"]["64x64"]
    for block in (block for stage in model.stages for block in stage.blocks):
        s6 = block.mixer.s6_half
        s6.carry_state = change.get("carry_state", True)
        s6.routes = tuple((route, 0) for route in change.get("order", ("rowR", "col", "colR")))
    assert (model(case["input"]) - case["logits"]).abs().max() > 3e-6


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_is_the_published_model(name):
    """The twin stands for the published code below, at shapes and splits that no golden has: it is held to them."""
    data = golden(name)
    full_scans = 4 if data["config"]["scan"] == "ss2d" else data["config"]["ms_split"][0]
    logits = twin.forward(data["state_dict"], data["cases"]["64x64"]["input"], full_scans)
    assert (logits - data["cases"]["64x64"]["logits"]).abs().max() <= 3e-6


SIZES = [(64, 64), (64, 96), (50, 64), (33, 47), (45, 102)]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("parts", [False, True], ids=["plain", "SE-FFN"])
@pytest.mark.parametrize("full_scans", [1, 2, 3, 4], ids=lambda n: f"{n}-{4 - n}")
def test_every_split_at_every_size(make_small, to_published, full_scans, parts, size):
    """Published weights of each split that the published code has, square or not, odd or even; in float64."""
    arguments = {"full_scans": full_scans, "se": parts, "conv_ffn": parts, "d_state": 1 if parts else 3}
    published = to_published(make_small(**arguments).double())
    assert infer_arguments(published)["full_scans"] == full_scans
    model = make_small(**arguments, perturbed=False).double()
    load_published(model, published)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), twin.forward(published, images, full_scans), rtol=1e-7, atol=1e-9)
