"""The parallel scan, called directly and through the registered operators, against the reference."""

from functools import partial

import pytest
import torch

from msv.kernels import lines, selective_scan, selective_scan_2d

BACKENDS = ("parallel", "auto")
LENGTHS = (1, 2, 7, 63, 64, 65, 196, 300, 785)
scan_and_last = partial(selective_scan, return_last_state=True)


def name_1d(case):
    return "-".join(f"{letter}{n}" for letter, n in zip("BDLNG", case, strict=True))


def name_2d(case):
    batch, height, width, *rest = case
    return f"B{batch}-{height}x{width}-" + "-".join(f"{letter}{n}" for letter, n in zip("DNR", rest, strict=True))


# Batch, channels, length, states, groups. The cuts of an implementation depend on the sizes, so these are unlike.
CASES_1D = [
    *((2, 5, length, 3, 1) for length in LENGTHS),
    *((1, 6, length, 8, 2) for length in (1, 63, 300)),
    *((1, 12, length, 1, 4) for length in (2, 65, 196)),
    (2, 4, 63, 16, 4),
    (1, 1, 300, 16, 1),
    (1, 7, 2500, 1, 1),  # one long sequence
    (1, 3, 1031, 8, 3),
    (70, 48, 9, 8, 1),  # many short ones
    (200, 48, 5, 8, 2),
    (9, 250, 7, 8, 1),
    (1, 770, 11, 16, 1),
    (67, 1, 13, 1, 1),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES_1D, ids=name_1d)
def test_1d_is_the_reference(make_1d, outputs_and_gradients, assert_agree, case, backend):
    batch, channels, length, d_state, groups = case
    arguments = make_1d(batch, channels, length, d_state, groups)
    expected = outputs_and_gradients(scan_and_last, arguments, backend="reference")
    found = outputs_and_gradients(scan_and_last, arguments, backend=backend)
    assert_agree(found, expected, torch.float64)


OPTIONS = ("D", "z", "delta_bias", "delta_softplus")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 3], ids="G{}".format)
@pytest.mark.parametrize("options", [(), *((name,) for name in OPTIONS), OPTIONS[:2], OPTIONS[2:]], ids="+".join)
def test_1d_options(make_1d, outputs_and_gradients, assert_agree, options, groups, backend):
    arguments = make_1d(length=40, groups=groups)
    arguments["delta_softplus"] = "delta_softplus" in options
    arguments = {k: v for k, v in arguments.items() if k not in OPTIONS[:3] or k in options}
    for scan in (selective_scan, scan_and_last):
        expected = outputs_and_gradients(scan, arguments, backend="reference")
        assert_agree(outputs_and_gradients(scan, arguments, backend=backend), expected, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_1d_gradients_through_the_last_state_alone(make_1d, outputs_and_gradients, assert_agree, backend):
    arguments = make_1d(length=70, options=False)

    def last_only(**arguments):
        return selective_scan(**arguments, return_last_state=True)[1]

    expected = outputs_and_gradients(last_only, arguments, backend="reference")
    assert expected[1].pop("dC") is None  # the last state does not know C
    found = outputs_and_gradients(last_only, arguments, backend=backend)
    dC = found[1].pop("dC")
    assert dC is None or not dC.any()
    assert_agree(found, expected, torch.float64)


FOUR_OWN = (("row", 0), ("col", 1), ("rowR", 2), ("colR", 3))
ROUTE_SETS = {
    **{name: ((name, 0),) for name in ("row", "col", "rowR", "colR")},
    "4/0": FOUR_OWN,
    "3/1-full": FOUR_OWN[:3],
    "2/2-full": FOUR_OWN[:2],
    "1/3-half": (("rowR", 0), ("col", 0), ("colR", 0)),
    "1/3-half-separate": (("rowR", 0), ("col", 1), ("colR", 2)),
    "2/2-half": (("rowR", 0), ("colR", 0)),
    "sets-0011": (("row", 0), ("colR", 0), ("col", 1), ("rowR", 1)),
    "sets-0100": (("row", 0), ("colR", 1), ("col", 0), ("rowR", 0)),
    "sets-0010": (("row", 0), ("colR", 0), ("col", 1), ("rowR", 0)),
    "a-route-twice": (("col", 1), ("col", 0), ("col", 0)),
}


def sets_of(routes):
    return 1 + max(weight_set for _, weight_set in routes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("carry_state", [True, False], ids=["carry", "reset"])
@pytest.mark.parametrize("routes", ROUTE_SETS.values(), ids=ROUTE_SETS)
def test_2d_routes(make_2d, outputs_and_gradients, assert_agree, routes, carry_state, backend):
    arguments = make_2d(height=7, width=5, sets=sets_of(routes))
    scan = partial(selective_scan_2d, routes=routes, carry_state=carry_state)
    expected = outputs_and_gradients(scan, arguments, backend="reference")
    assert_agree(outputs_and_gradients(scan, arguments, backend=backend), expected, torch.float64)


# Batch, height, width, channels, states, rank.
CASES_2D = [
    *((2, height, width, 5, 3, 2) for height, width in ((1, 1), (1, 6), (6, 1), (9, 8), (2, 3))),
    (1, 21, 17, 6, 1, 1),  # one big map
    (1, 9, 40, 3, 16, 4),
    (70, 3, 4, 48, 8, 3),  # many small ones
    (150, 2, 2, 50, 8, 3),
    (33, 2, 3, 110, 1, 7),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routes", ["4/0", "1/3-half"])
@pytest.mark.parametrize("case", CASES_2D, ids=name_2d)
def test_2d_sizes(make_2d, outputs_and_gradients, assert_agree, case, routes, backend):
    arguments = make_2d(*case, sets=sets_of(ROUTE_SETS[routes]))
    scan = partial(selective_scan_2d, routes=ROUTE_SETS[routes], carry_state=True)
    expected = outputs_and_gradients(scan, arguments, backend="reference")
    assert_agree(outputs_and_gradients(scan, arguments, backend=backend), expected, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_2d_weight_sets_that_no_route_names_have_no_gradient(make_2d, outputs_and_gradients, assert_agree, backend):
    arguments = make_2d(sets=4)
    scan = partial(selective_scan_2d, routes=(("col", 3), ("row", 1)), carry_state=True)
    expected = outputs_and_gradients(scan, arguments, backend="reference")
    found = outputs_and_gradients(scan, arguments, backend=backend)
    assert_agree(found, expected, torch.float64)
    for name in ("ddt_weight", "ddt_bias", "dA_log", "dD_skip"):
        assert not found[1][name][[0, 2]].any()
    assert not found[1]["dx_dbl"][:, :, :, [0, 2]].any()


@pytest.mark.parametrize("carry_state", [True, False], ids=["carry", "reset"])
def test_2d_carry_and_reset_differ_only_after_the_first_seam(make_2d, carry_state):
    arguments = make_2d(height=4, width=4, grad=False)
    routes = ROUTE_SETS["1/3-half"]
    y = selective_scan_2d(**arguments, routes=routes, carry_state=carry_state)
    other = selective_scan_2d(**arguments, routes=routes, carry_state=not carry_state)
    torch.testing.assert_close(y[:, 0], other[:, 0])
    assert not torch.allclose(y[:, 1, 0, 0], other[:, 1, 0, 0])  # col's first cell is the top left
    assert not torch.allclose(y[:, 2, -1, -1], other[:, 2, -1, -1])  # colR's the bottom right


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [True, False], ids=["all-options", "no-options"])
def test_1d_gradcheck(make_1d, options, backend):
    arguments = make_1d(batch=2, channels=2, length=5, d_state=2, options=options)
    softplus = arguments.pop("delta_softplus")

    def scan(*tensors):
        named = dict(zip(arguments, tensors, strict=True))
        return selective_scan(**named, delta_softplus=softplus, return_last_state=True, backend=backend)

    assert torch.autograd.gradcheck(scan, tuple(arguments.values()), fast_mode=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routes", ["2/2-half", "sets-0011"])
def test_2d_gradcheck(make_2d, routes, backend):
    arguments = make_2d(batch=1, height=3, width=2, channels=2, d_state=2, sets=sets_of(ROUTE_SETS[routes]))

    def scan(*tensors):
        return selective_scan_2d(*tensors, routes=ROUTE_SETS[routes], carry_state=True, backend=backend)

    assert torch.autograd.gradcheck(scan, tuple(arguments.values()), fast_mode=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_1d_gradient_of_one_argument_alone(make_1d, wanted, backend):
    arguments = make_1d(length=20, grad=False)
    arguments[wanted].requires_grad_()

    def gradient(backend):
        return torch.autograd.grad(selective_scan(**arguments, backend=backend).sum(), arguments[wanted])[0]

    torch.testing.assert_close(gradient(backend), gradient("reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_second_derivative_is_refused(make_1d, make_2d, backend):
    arguments = make_1d()
    arguments_2d = make_2d()
    for y, x in (
        (selective_scan(**arguments, backend=backend), arguments["u"]),
        (selective_scan_2d(**arguments_2d, routes=(("row", 0),), carry_state=True, backend=backend), arguments_2d["x"]),
    ):
        with pytest.raises(RuntimeError):
            (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            gradient.square().sum().backward()


def strided(t):
    """The same numbers, laid out as the slice of something larger, its dimensions in reverse."""
    wide = torch.cat([t, t], dim=-1).permute(*reversed(range(t.dim()))).contiguous()
    return wide.permute(*reversed(range(t.dim())))[..., : t.shape[-1]]


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_strides_do_not_matter(make_1d, make_2d, outputs_and_gradients, assert_agree, backend):
    def strided_arguments(scan):
        return lambda **a: scan(**{k: strided(v) if isinstance(v, torch.Tensor) else v for k, v in a.items()})

    for scan, arguments in (
        (partial(scan_and_last, backend=backend), make_1d(length=70, groups=2)),
        (partial(selective_scan_2d, routes=FOUR_OWN, carry_state=True, backend=backend), make_2d(sets=4)),
    ):
        expected = outputs_and_gradients(scan, arguments)
        assert_agree(outputs_and_gradients(strided_arguments(scan), arguments), expected, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_gradient_of_the_output(make_1d, make_2d, backend):
    arguments, arguments_2d = make_1d(length=70, options=False), make_2d(sets=4)
    for scan, x in (
        (partial(selective_scan, **arguments), arguments["B"]),
        (partial(selective_scan_2d, **arguments_2d, routes=FOUR_OWN, carry_state=True), arguments_2d["x_dbl"]),
    ):
        found, expected = (torch.autograd.grad(scan(backend=b).sum(), x)[0] for b in (backend, "reference"))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_the_values_are_the_same_and_inputs_are_kept(make_1d, make_2d, backend):
    arguments, arguments_2d = make_1d(length=70), make_2d(sets=4)
    routes = {"routes": FOUR_OWN, "carry_state": True}
    for scan, tensors in (
        (partial(selective_scan, **arguments), arguments),
        (partial(selective_scan_2d, **arguments_2d, **routes), arguments_2d),
    ):
        before = {k: v.detach().clone() for k, v in tensors.items() if isinstance(v, torch.Tensor)}
        expected = scan(backend=backend)
        expected.sum().backward()
        with torch.no_grad():
            assert torch.equal(scan(backend=backend), expected)
        with torch.inference_mode():
            assert torch.equal(scan(backend=backend), expected)
        assert all(torch.equal(tensors[k], v) for k, v in before.items())


@pytest.mark.parametrize("threads", [1, 2], ids="threads{}".format)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_inputs_give_the_same_bits(make_1d, make_2d, outputs_and_gradients, backend, threads):
    torch.use_deterministic_algorithms(False)  # as users run it
    torch.set_num_threads(threads)
    try:
        for scan, arguments in (
            (scan_and_last, make_1d(batch=30, channels=192, length=4, d_state=8, dtype=torch.float32)),
            (
                partial(selective_scan_2d, routes=FOUR_OWN, carry_state=True),
                make_2d(30, 1, 2, 48, 8, sets=4, dtype=torch.float32),
            ),
        ):
            first, second = (outputs_and_gradients(scan, arguments, backend=backend) for _ in range(2))
            for a, b in zip(first, second, strict=True):
                assert all(torch.equal(a[name], b[name]) for name in a)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("case", [(70, 48, 9, 8, 1), (2, 5, 300, 3, 1), (1, 6, 300, 8, 2)], ids=name_1d)
def test_1d_cut_as_on_a_gpu(monkeypatch, make_1d, outputs_and_gradients, assert_agree, case):
    monkeypatch.setattr(lines, "CPU", lines.GPU)
    batch, channels, length, d_state, groups = case
    arguments = make_1d(batch, channels, length, d_state, groups)
    expected = outputs_and_gradients(scan_and_last, arguments, backend="reference")
    assert_agree(outputs_and_gradients(scan_and_last, arguments, backend="auto"), expected, torch.float64)


@pytest.mark.parametrize("size", [(7, 5), (9, 20), (1, 6), (6, 1)], ids="{0[0]}x{0[1]}".format)
def test_2d_cut_as_on_a_gpu(monkeypatch, make_2d, outputs_and_gradients, assert_agree, size):
    monkeypatch.setattr(lines, "CPU", lines.GPU)
    routes = ROUTE_SETS["sets-0010"]
    arguments = make_2d(batch=40, height=size[0], width=size[1], channels=40, d_state=8, sets=sets_of(routes))
    scan = partial(selective_scan_2d, routes=routes, carry_state=True)
    expected = outputs_and_gradients(scan, arguments, backend="reference")
    assert_agree(outputs_and_gradients(scan, arguments, backend="auto"), expected, torch.float64)
