"""Inputs of the two scans, one table of tolerances, poisoned and free memory, and a compiler without a past."""

import gc

import pytest
import torch

ROUTES = ("row", "col", "rowR", "colR")

# Relative error in norm against the reference in float64: of outputs, of gradients.
TOLERANCES = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (1e-5, 1e-4),
}


@pytest.fixture(autouse=True)
def poisoned():
    """Fills uninitialised memory with NaN, so that an output nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        assert torch.empty(3, device=device).isnan().all()
        assert torch.zeros(1, device=device).new_empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(3, device=device)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def as_users_run(poisoned):
    """Without torch's deterministic algorithms: where they come from here, the same bits must come without them."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh_compiler():
    """Nothing compiled before or kept for what comes after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def free_memory():
    """A GPU with nothing left on it by other tests, as large as the largest tests need."""
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 70 * 2**30:
        pytest.skip("needs 70 GiB of free GPU memory")
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def make_1d():
    """Makes the arguments of `selective_scan` by name."""

    def make(batch=2, channels=6, length=9, d_state=3, groups=1, dtype=torch.float64, options=True, grad=True):
        arguments = {
            "u": torch.randn(batch, channels, length),
            "delta": torch.randn(batch, channels, length) - 1,
            "A": -torch.rand(channels, d_state) * d_state - 0.1,
            "B": torch.randn(batch, groups, d_state, length),
            "C": torch.randn(batch, groups, d_state, length),
        }
        if options:
            arguments["D"] = torch.randn(channels)
            arguments["z"] = torch.randn(batch, channels, length)
            arguments["delta_bias"] = torch.randn(channels)
        else:
            arguments["delta"] = torch.rand(batch, channels, length)
        arguments = {name: t.to(dtype).requires_grad_(grad) for name, t in arguments.items()}
        return {**arguments, "delta_softplus": options}

    return make


@pytest.fixture
def make_2d():
    """Makes the tensors of `selective_scan_2d` by name, for S weight sets."""

    def make(batch=2, height=3, width=4, channels=5, d_state=3, rank=2, sets=1, dtype=torch.float64, grad=True):
        arguments = {
            "x": torch.randn(batch, height, width, channels),
            "x_dbl": torch.randn(batch, height, width, sets, rank + 2 * d_state),
            "dt_weight": torch.randn(sets, channels, rank),
            "dt_bias": torch.randn(sets, channels) - 1,
            "A_log": torch.rand(sets, channels, d_state),
            "D_skip": torch.randn(sets, channels),
        }
        return {name: t.to(dtype).requires_grad_(grad) for name, t in arguments.items()}

    return make


@pytest.fixture
def outputs_and_gradients():
    """Runs an operator on its arguments, detached; returns outputs, and gradients of a weighted sum of them all."""

    def run(operator, arguments, dtype=None, **options):
        generator = torch.Generator().manual_seed(1)
        leaves = {}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                value = value.detach().to(dtype or value.dtype).requires_grad_()
            leaves[name] = value
        found = operator(**leaves, **options)
        outputs = dict(zip(("y", "last"), found if isinstance(found, tuple) else (found,), strict=False))
        weights = {
            name: torch.randn(y.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(y)
            for name, y in outputs.items()
        }
        torch.autograd.backward(list(outputs.values()), list(weights.values()))
        gradients = {f"d{name}": t.grad for name, t in leaves.items() if isinstance(t, torch.Tensor)}
        return {name: y.detach() for name, y in outputs.items()}, gradients

    return run


@pytest.fixture
def relative_error():
    """The norm of a difference over the norm of what was expected; nan never passes a comparison."""

    def error(found, expected):
        assert found.shape == expected.shape
        scale = expected.double().norm()
        difference = (found.double() - expected.double()).norm()
        return (difference / scale if scale > 0 else difference).item()

    return error


@pytest.fixture
def assert_agree(relative_error):
    """Compares outputs and gradients with those expected, by the table of tolerances."""

    def check(found, expected, dtype):
        for which, tolerance in enumerate(TOLERANCES[dtype]):
            assert found[which].keys() == expected[which].keys()
            errors = {name: relative_error(found[which][name], t) for name, t in expected[which].items()}
            assert all(error <= tolerance for error in errors.values()), errors

    return check
