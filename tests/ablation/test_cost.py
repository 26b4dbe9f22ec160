import json
from pathlib import Path

import pytest
import yaml

from msv.ablation.check import resolve_all
from msv.ablation.cost import Cost, estimate, operations, told
from msv.ablation.records import write_record
from msv.experiment import ExperimentCLI
from msv.provenance import device_name

CONFIGS = Path(__file__).parents[1] / "configs"


def resolved(results, *words):
    found = []
    configs = ["--config", str(CONFIGS / "grid.yaml"), "--config", str(CONFIGS / "quick.yaml")]

    def run_grid(cli):
        found.extend(resolve_all(cli, cli.grid))
        return 0

    ExperimentCLI(args=["fit", *configs, "--grid.results", str(results), *words], run_grid=run_grid)
    return found


def finish(run, seconds, device, epochs=3, workers=None, **changes):
    """Write the record of a finished run that took some seconds."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(yaml.safe_dump(run.config))
    timing = {"train_seconds": seconds} | ({"workers": workers} if workers else {})
    record = {
        "grid": run.grid, "recipe": run.recipe, "cell": run.cell.name, "seed": run.seed, "status": "done",
        "config_hash": run.config_hash, "metrics": {"test_top1": 0.5}, "history": [{}] * epochs, "timing": timing,
        "env": {"device": device},
    }  # fmt: skip
    write_record(run.folder / "record.json", {**record, **changes})


def test_operations_are_counted_for_images_and_epochs(tmp_path):
    costs = estimate(resolved(tmp_path), 1)
    assert list(costs) == ["full_scans=0", "full_scans=1", "full_scans=4"]
    # quick.yaml: four batches of 32 images an epoch, three epochs.
    assert {(cost.images, cost.epochs, cost.seconds) for cost in costs.values()} == {(128, 3, None)}
    # As table.md counts them of such runs.
    assert [round(cost.gflops, 4) for cost in costs.values()] == [0.0003, 0.0004, 0.0004]
    assert costs["full_scans=1"].operations == pytest.approx(3 * costs["full_scans=1"].gflops * 1e9 * 128 * 3)
    half = estimate(resolved(tmp_path, "--trainer.limit_train_batches", "0.5"), 1)["full_scans=1"]
    assert half.images == 16 * 32  # of the 33 whole batches of 1,077 images
    assert estimate(resolved(tmp_path, "--trainer.max_steps", "5"), 1) == {}


def test_seconds_are_those_of_like_runs_of_this_place(tmp_path):
    here = device_name("cpu")
    runs = resolved(tmp_path, "--grid.seeds", "[0, 1, 2, 3]")
    one = [run for run in runs if run.cell.name == "full_scans=1"]
    finish(one[0], 6.0, here)
    finish(one[1], 9.0, here, workers=1)
    finish(one[2], 100.0, "another device")
    finish(one[3], 100.0, here, status="failed")
    longer = resolved(tmp_path, "--trainer.max_epochs", "10")
    costs = estimate(longer, 1)
    assert costs["full_scans=1"].seconds == pytest.approx(10 * (6 + 9) / 2 / 3)
    assert costs["full_scans=0"].seconds is None
    # Side by side a run is slower, which a run alone does not tell.
    assert estimate(longer, 2)["full_scans=1"].seconds is None
    for change in (["--data.image_size", "64"], ["--data.batch_size", "16"], ["--trainer.limit_train_batches", "2"]):
        assert estimate(resolved(tmp_path, *change), 1)["full_scans=1"].seconds is None
    # A record that cannot be read does not keep a grid from starting.
    (one[0].folder / "record.json").write_text(json.dumps({}))
    assert estimate(longer, 1)["full_scans=1"].seconds == pytest.approx(30.0)


def test_what_is_told(tmp_path):
    runs = resolved(tmp_path, "--grid.seeds", "[0, 1]")
    costs = {"full_scans=0": Cost(10, 1000, 0.5, 120.0), "full_scans=1": Cost(10, 1000, 1.0, None)}
    assert told(costs, runs, 2) == [
        "cost of full_scans=0: 2 runs of 15 TFLOPs (3 × 0.5 GFLOPs × 1,000 images × 10 epochs), about 2 min 0 s a run "
        "by finished runs of this place (83 images/s)",
        "cost of full_scans=1: 2 runs of 30 TFLOPs (3 × 1 GFLOPs × 1,000 images × 10 epochs), time not known here",
        "cost of full_scans=4: not known beforehand",
        "cost in all: 4 runs, 90 TFLOPs; 2 of them about 2 min 0 s, 2 at a time",
    ]
    assert told({}, [], 1) == []


@pytest.mark.parametrize(("number", "text"), [(3e9, "3 GFLOPs"), (2.5e15, "2.5 PFLOPs"), (1e18, "1 EFLOPs")])
def test_operations(number, text):
    assert operations(number) == text
