import pytest
import torch
from torch import nn

from msv.kept import FAILED
from msv.profiling import measuring, networks
from msv.profiling.commands import Outcome, measure_all, wide_console
from msv.profiling.measuring import Effort
from msv.profiling.networks import Case, measure_case, store
from msv.profiling.steps import PRECISIONS

CPU = torch.device("cpu")
QUICK = Effort(calls=2, turns=3, seconds=60.0, warmup=1)
TINY, NANO = (Case(model, "inference", "eager", "float32", 2, 32) for model in ("vmamba_tiny", "vmamba_nano"))


class Means(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        return nn.functional.pad(images.mean(dim=(2, 3)) * self.scale, (0, 997))


@pytest.fixture
def means(monkeypatch):
    network = Means()
    monkeypatch.setattr(networks, "create", lambda model, size: network)
    return network


def test_a_case_is_timed_and_its_memory_counted(means, monkeypatch):
    taken = []
    monkeypatch.setattr(measuring, "call_seconds", lambda work, device: taken.append(work()) or len(taken) / 10)
    found = measure_case(TINY, CPU, QUICK)
    # The first call says how many make a turn, and the first turn is not counted; the others took 0.3, 0.4 and 0.5 s
    # for two forwards of two images.
    assert found["images_per_s"] == pytest.approx(2 / 0.2)
    assert (found["step_ms"], found["step_min_ms"], found["turns"]) == (pytest.approx(200), pytest.approx(150), 3)
    images = 2 * 3 * 32 * 32 * 4
    assert images + 2 * 1000 * 4 <= found["peak_bytes"] < images + 3 * 2 * 1000 * 4


@pytest.mark.parametrize(("a_call", "calls"), [(0.001, 10), (0.05, 4), (0.15, 1), (5.0, 1)])
def test_long_steps_make_short_turns(monkeypatch, a_call, calls):
    made = []

    def call_seconds(work, device):
        made.clear()
        work()
        return a_call * len(made)

    monkeypatch.setattr(measuring, "call_seconds", call_seconds)
    found = measuring.time_calls({"work": lambda: made.append(1)}, CPU, networks.ON_GPU)["work"]
    assert len(made) == calls
    assert found.median == pytest.approx(a_call)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_weights_and_images_are_in_the_precision(means, precision):
    seen = []
    means.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0].dtype, module.scale.dtype)))
    measure_case(Case("vmamba_tiny", "inference", "eager", precision, 2, 32), CPU, networks.QUICK)
    assert set(seen) == {(PRECISIONS[precision],) * 2}


def run(cases, folder, capsys, again=False) -> tuple[Outcome, str]:
    found = measure_all(
        cases,
        lambda case: measure_case(case, CPU, networks.QUICK),
        CPU,
        store(folder, CPU),
        "a command",
        again,
        wide_console(),
        networks.speed,
    )
    return found, capsys.readouterr().out


def test_what_fails_is_kept_tried_again_and_last_and_costs_no_row(tmp_path, means, monkeypatch, capsys, clean_commit):
    def broken(model, size):
        if model == "vmamba_tiny":
            raise RuntimeError("no\nway")
        return means

    with monkeypatch.context() as patch:
        patch.setattr(networks, "create", broken)
        found, _ = run([TINY, NANO], tmp_path, capsys)
    assert (found.status, [row["status"] for row in found.rows]) == (1, [FAILED, "done"])
    assert found.rows[0]["error"] == "RuntimeError: no way"
    assert found.rows[0]["images_per_s"] == ""
    found, said = run([TINY, NANO], tmp_path, capsys)
    assert (found.status, [row["status"] for row in found.rows]) == (0, ["done", "done"])
    assert "1 rows are finished and skipped" in said and "1/1 vmamba_tiny" in said
    # What is done stays where another try fails, which is told.
    with monkeypatch.context() as patch:
        patch.setattr(networks, "create", broken)
        again, said = run([TINY, NANO], tmp_path, capsys, again=True)
    assert again.status == 1
    assert again.rows[0] == found.rows[0]
    assert "vmamba_tiny, inference, eager, float32, 2 of 32×32: failed: RuntimeError: no way; what was" in said


def test_rows_are_kept_one_by_one(tmp_path, means, monkeypatch, capsys, clean_commit):
    def stop(model, size):
        raise KeyboardInterrupt

    run([TINY], tmp_path, capsys)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(networks, "create", stop)
        run([TINY, NANO], tmp_path, capsys)
    assert len(store(tmp_path, CPU).read()) == 1


def test_a_network_of_any_size():
    with torch.device("meta"):
        swin = networks.create("swin_tiny_patch4_window7_224", 96)
        assert swin(torch.empty(1, 3, 96, 96)).shape == (1, 1000)


def test_training_in_fp16_is_refused(means):
    with pytest.raises(ValueError, match="fp16 would need its loss scaled"):
        measure_case(Case("vmamba_tiny", "training", "eager", "fp16", 2, 32), CPU, QUICK)
