import csv

import pytest
import torch

from msv.benchmarks import command, network, network_bars
from msv.benchmarks.network import SWIN, markdown, table
from msv.benchmarks.network_bars import verdicts
from msv.comparison.command import main as compare
from msv.comparison.throughput import ratio_to_reference
from msv.kept import ENVIRONMENT
from msv.profiling import measuring, networks, steps
from msv.profiling.networks import COLUMNS


def row(model, task="training", mode="eager", speed=100.0, **columns):
    found = dict.fromkeys((*COLUMNS, *ENVIRONMENT), "")
    found |= {"model": model, "task": task, "mode": mode, "precision": "bf16", "batch": "128", "size": "224"}
    found |= {"status": "done", "images_per_s": str(speed), "step_ms": "1", "peak_bytes": str(2**30), "device": "H100"}
    return found | columns


def bars(*rows):
    return [line.partition(" (")[0] for line in verdicts(rows)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmarks")


def run(folder, *options):
    words = ["network", "--quick", "--device", "cpu", "--threads", "1", "--size", "32", "--batch", "1"]
    status = command.main([*words, "--out", str(folder), *options])
    with (folder / "network_cpu_quick.csv").open(newline="") as file:
        return status, list(csv.DictReader(file))


def test_rows_are_kept_and_not_measured_again(folder, capsys, clean_commit):
    status, rows = run(folder, "--only", "msvmamba_nano", "--task", "inference")
    assert (status, len(rows)) == (0, 1)
    status, rows = run(folder, "--only", "msvmamba_nano")
    assert [(row["model"], row["task"], row["mode"], row["precision"]) for row in rows] == [
        ("msvmamba_nano", "inference", "eager", "float32"),
        ("msvmamba_nano", "training", "eager", "float32"),
    ]
    printed = capsys.readouterr().out
    assert "1 rows are finished and skipped" in printed
    assert "met" not in printed and "MISSED" not in printed  # bars are of the real sizes
    for row in rows:
        assert tuple(row) == (*COLUMNS, *ENVIRONMENT)
        assert (row["status"], row["error"]) == ("done", "")
        assert float(row["images_per_s"]) == pytest.approx(1e3 / float(row["step_ms"]), rel=1e-3)
        assert row["torch"] and row["device"] and row["commit"]
        assert "--only msvmamba_nano" in row["command"] and str(folder) not in row["command"]
    # Weights, images and gradients, and AdamW's two averages.
    inference, training = (int(row["peak_bytes"]) for row in rows)
    assert inference > 4 * 6_864_136
    assert training > 16 * 6_864_136
    assert rows[0]["rival"] == "regnety_008"
    assert float(rows[0]["ratio"]) > 0
    assert rows[1]["rival"] == ""
    page = (folder / "network_cpu_quick.md").read_text()
    assert "`msvmamba_nano`, inference, eager, float32, batch 1, 32×32: " in page
    assert f"`{rows[1]['command']}`" in page


def test_a_failing_row_stops_no_other(tmp_path, monkeypatch):
    def fail(case, device, effort):
        raise RuntimeError("no\nway")

    monkeypatch.setattr(networks, "measure_case", fail)
    status, rows = run(tmp_path, "--only", "swin_tiny", "convnext_tiny", "--task", "training")
    assert status == 1
    assert [(row["model"], row["status"], row["error"]) for row in rows] == [
        (SWIN, "failed", "RuntimeError: no way"),
        ("convnext_tiny", "failed", "RuntimeError: no way"),
    ]
    assert bars(*rows) == [
        f"MISSED: {row['model']}, training, eager: not measured: RuntimeError: no way" for row in rows
    ]


def test_the_plan_of_a_gpu():
    cases = network.plan(torch.device("cuda"), network._parser().parse_args([]))
    assert len(cases) == 6 * 2 * 2
    assert {(case.precision, case.batch, case.size) for case in cases} == {("bf16", 128, 224)}
    assert {case.model for case in cases} == set(network.NETWORKS)


def test_the_plan_of_a_cpu():
    (case,) = network.plan(torch.device("cpu"), network._parser().parse_args([]))
    assert str(case) == "msvmamba_nano, inference, eager, float32, 8 of 224×224"


def test_bars_are_of_the_faster_mode_and_of_swin_on_this_machine():
    ours = (row("msvmamba_tiny", speed=1500), row("msvmamba_tiny", mode="compiled", speed=2000))
    swin = (row(SWIN, speed=1900, peak_bytes=str(2**31)), row(SWIN, mode="compiled", speed=3000))
    assert verdicts([*ours, *swin]) == [
        "met: msvmamba_tiny, training, compiled: 2,000 img/s (at least 1,900, Swin-T eager on this machine)",
        "moonshot open: msvmamba_tiny, training, compiled: 2,000 img/s (at least 3,000, Swin-T compiled on this "
        "machine)",
        "met: msvmamba_tiny, training, compiled: 1.00 GiB at the peak (under 10 GiB)",
        "moonshot met: msvmamba_tiny, training, compiled: 1.00 GiB at the peak (under 2.00 GiB, Swin-T eager on this "
        "machine)",
    ]
    assert "1,833, Swin-T eager as measured before on an H100" in verdicts(ours)[0]


def test_memory_is_that_of_a_row_whose_memory_is_known():
    """CUDA graphs keep their tensors in a pool, of which only what is not in it would be seen."""
    ours = [row("msvmamba_tiny", mode="graphs", speed=3000, peak_bytes="")]
    assert [line for line in verdicts(ours) if "GiB" in line] == []
    ours.append(row("msvmamba_tiny", mode="compiled", speed=2000, peak_bytes=str(11 * 2**30)))
    assert next(line for line in verdicts(ours) if "GiB" in line) == (
        "MISSED: msvmamba_tiny, training, compiled: 11.00 GiB at the peak (under 10 GiB)"
    )
    assert verdicts(ours)[0].startswith("met: msvmamba_tiny, training, graphs: 3,000 img/s")


def test_graphs_have_no_peak(monkeypatch):
    monkeypatch.setattr(networks, "make_step", lambda case, device: steps.Step(lambda: None, 0))  # a CPU has no graphs
    for mode in steps.MODES:
        case = networks.Case("convnext_tiny", "inference", mode, "float32", 2, 32)
        found = networks.measure_case(case, torch.device("cpu"), networks.QUICK)
        assert ("peak_bytes" in found) == (mode in ("eager", "compiled"))


class Means(torch.nn.Module):
    """A network that costs nothing."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, networks.CLASSES)

    def forward(self, images):
        return self.linear(images.mean(dim=(2, 3)))


def test_what_compare_has_measured_is_not_measured_again(tmp_path, monkeypatch, clean_commit, capsys):
    def make_step(case, device):
        return steps.random_step(Means(), (case.batch, 3, 32, 32), 1000, case.task, case.mode, case.precision)

    monkeypatch.setattr(networks, "make_step", make_step)
    monkeypatch.setattr(networks, "ON_CPU", networks.QUICK)
    setting = ["--batch", "1", "--size", "32", "--device", "cpu"]
    folders = ["--out", str(tmp_path / "tables"), "--timed", str(tmp_path)]
    assert compare(["--measure", "throughput", "--only", "msvmamba_nano", "vmamba_tiny", *setting, *folders]) == 0
    words = ["network", "--task", "inference", "--only", "vmamba_tiny", "convnext_tiny", *setting]
    threads = ["--threads", str(torch.get_num_threads())]
    assert command.main([*words, *threads, "--out", str(tmp_path)]) == 0
    assert "1 rows are finished and skipped" in capsys.readouterr().out
    with (tmp_path / "network_cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["rival"]) for row in rows] == [
        ("vmamba_tiny", ""), ("msvmamba_nano", "regnety_008"), ("convnext_tiny", "")
    ]  # fmt: skip
    assert compare(["--measure", "throughput", "--only", "convnext_tiny", *setting, *folders]) == 0
    assert "1 rows are finished and skipped" in capsys.readouterr().out
    assert "ConvNeXt-T" in (tmp_path / "tables" / "table_6.md").read_text()


def test_the_page():
    ours = [row("msvmamba_tiny", "inference", "compiled", speed=3118, commit="abc"), row("vmamba_tiny", "inference")]
    ours.append(row("vmamba_tiny", "inference", "compiled", speed=1559, commit="abc"))
    ours += [row(SWIN, mode="graphs", peak_bytes="", commit="abc"), row("convnext_tiny", status="failed", error="no")]
    found = markdown(ours)
    assert found.count("\n## H100, commit ") == 2  # that of the last two has no name
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines() if line.startswith("| `")]
    assert lines[1] == [
        *("`msvmamba_tiny`", "inference", "compiled", "bf16", "128, 224×224", "3,118.0", "1", "1.00"),
        *("1,559", "2.00", "–", "2.00", "1.93"),
    ]
    assert lines[0][:1] + lines[0][5:10] == ["`vmamba_tiny`", "1,559.0", "1", "1.00", "850", "1.83"]
    assert lines[2][5:8] == ["100.0", "1", "–"]
    assert lines[4][5:7] == ["failed", "–"]
    # Beside Swin-T of the same place alone, which was not measured in inference.
    assert "- MISSED: msvmamba_tiny, inference, compiled: 3,118 img/s (at least 5,203, Swin-T eager as" in found
    assert "- MISSED: vmamba_tiny, inference, compiled: 1,559 img/s (at least 3,000)" in found
    assert "Failed rows:\n\n- `convnext_tiny`, training, eager, bf16: no" in found


def test_bars_in_images_a_second():
    assert bars(row("msvmamba_nano", speed=4999)) == [
        "MISSED: msvmamba_nano, training, eager: 4,999 img/s",
        "moonshot open: msvmamba_nano, training, eager: 4,999 img/s",
    ]
    found = verdicts([row("vmamba_tiny", "inference", speed=6000, device="another")])
    assert found == [
        "met: vmamba_tiny, inference, eager: 6,000 img/s (at least 3,000, on an H100)",
        "moonshot met: vmamba_tiny, inference, eager: 6,000 img/s (at least 5,000, on an H100)",
    ]


@pytest.mark.parametrize("other", [{"batch": "64"}, {"size": "192"}, {"precision": "float32"}])
def test_no_bar_for_another_setting(other):
    assert verdicts([row("msvmamba_nano", speed=1, **other)]) == []


def test_the_bar_of_a_cpu():
    about = {"precision": "float32", "batch": "8", "rival": "regnety_008", "threads": "2"}
    for other in ({"threads": "1"}, {"precision": "bf16"}, {"batch": "4"}):
        assert verdicts([row("msvmamba_nano", "inference", ratio="1.5", **(about | other))]) == []
    assert verdicts([row("msvmamba_nano", "inference", mode="compiled", ratio="1.5", **about)]) == []
    assert verdicts([row("msvmamba_nano", "inference", ratio="1.5", **about)]) == [
        "met: msvmamba_nano, inference, eager: 1.50 times the time of regnety_008 in the same turns, 2 threads "
        "(at most 1.5)"
    ]
    assert bars(row("msvmamba_nano", "inference", ratio="1.51", **about))[0].startswith("MISSED")


def test_anchors_are_of_the_setting_they_were_measured_in():
    assert network_bars.anchor(row("msvmamba_tiny", mode="compiled")).images_per_s == 525
    assert network_bars.anchor(row(SWIN, mode="compiled")).images_per_s == 3286
    assert network_bars.anchor(row(SWIN, batch="64")) is None


def test_ratios_to_vmamba_tiny_are_of_one_setting():
    reference, other = row("vmamba_tiny", speed=50), row("vmamba_tiny", mode="compiled", speed=80)
    rows = [reference, other, row("msvmamba_nano", speed=200), row("msvmamba_nano", "inference", speed=200)]
    assert [ratio_to_reference(row, rows) for row in rows] == [1.0, 1.0, 4.0, None]
    assert table(rows, reference).row_count == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "0"], "--batch is 0; expected 1 or more"),
        (["--size", "16"], "--size is 16; expected 32 or more"),
        (["--only", "resnet"], "--only: 'resnet' is no model"),
    ],
)
def test_options_that_do_not_fit(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        command.main(["network", "--device", "cpu", "--out", str(tmp_path), *words])


def test_a_training_step_trains():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4, 10))
    before = net[1].weight.detach().clone()
    step = steps.training_step(net, torch.randn(5, 3, 2, 2), torch.arange(5), autocast=torch.bfloat16)
    step.work()
    assert net.training
    assert not torch.equal(net[1].weight, before)
    assert net[1].weight.grad is None
    assert step.held_bytes == 3 * 4 * (120 + 10) + 4 * 60 + 8 * 5


def test_an_inference_step_keeps_no_graph():
    net = torch.nn.Linear(4, 2)
    out = steps.inference_step(net, torch.randn(3, 4)).work()
    assert out.is_inference()
    assert not net.training


def test_out_of_memory_is_told_from_other_errors():
    assert measuring.is_out_of_memory(torch.OutOfMemoryError("x"))
    assert measuring.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not measuring.is_out_of_memory(RuntimeError("no"))
