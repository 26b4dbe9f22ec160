import re

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

import msv.models  # its presets enter timm's registry
from msv.ablation.grid import resolve_runs, write_grid_file
from msv.ablation.records import write_record
from msv.grid_section import Grid
from msv.publishing import guard
from msv.publishing.keep import keep_grid, main
from msv.publishing.weights import WEIGHTS_NAME, half_weights
from msv.tasks.export import load_network

NETWORK = "model.init_args.network"
SMALL = {"dims": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}
CELLS = {
    "small": {"class_path": "msv.models.MSVMamba", "init_args": {**SMALL, "full_scans": 2, "drop_path_rate": 0.1}},
    "preset": {"class_path": "msv.models.TimmModel", "init_args": {"name": "vmamba_nano", "model_args": {**SMALL}}},
}


@pytest.fixture(autouse=True)
def history(monkeypatch):
    monkeypatch.setattr(guard, "in_history", lambda commit: True)


def network(cell):
    arguments = CELLS[cell]["init_args"]
    base = msv.models.PRESETS[arguments["name"]] if "name" in arguments else arguments
    return msv.models.MSVMamba(**{**base, **arguments.get("model_args", {})}, in_chans=1, num_classes=10).eval()


@pytest.fixture
def train(tmp_path):
    """Writes what a grid of two cells leaves, with random weights; returns its folder."""

    def write(seeds=(0,), change=lambda weights: None):
        grid = Grid("g", cells={name: {NETWORK: value} for name, value in CELLS.items()}, seeds=list(seeds),
                    results=str(tmp_path / "runs"), recipe="quick")  # fmt: skip
        runs = resolve_runs(grid, {"seed_everything": 0, "model": {"init_args": {"network": {}}}})
        write_grid_file(grid, runs, "python cli.py fit --config experiments/g.yaml")
        for run in runs:
            record = {
                "grid": "g", "recipe": "quick", "cell": run.cell.name, "seed": run.seed, "status": "done",
                "config_hash": run.config_hash, "metrics": {"test_top1": 0.5}, "history": [],
                "env": {"commit": "0123456789ab"}, "data": {"name": "digits"},
            }  # fmt: skip
            write_record(run.folder / "record.json", record)
            (run.folder / "config.yaml").write_text(yaml.safe_dump(run.config))
            torch.manual_seed(run.seed)
            weights = network(run.cell.name).state_dict()
            raw = {f"network.{name}": value + 1 for name, value in weights.items()}
            change(weights)
            averaged = {f"network.{name}": value for name, value in weights.items()}
            torch.save({"state_dict": averaged, "current_model_state": raw}, run.folder / "last.ckpt")
        return tmp_path / "runs/g/quick"

    return write


@pytest.mark.parametrize("cell", list(CELLS))
def test_timm_loads_what_is_kept(train, tmp_path, cell):
    kept = keep_grid(train(seeds=[0, 1]), tmp_path, weights=[cell])
    (path,) = tmp_path.glob(f"quick/g/*/*/{WEIGHTS_NAME}")
    assert path.parent.name.startswith("seed0-")
    (call,) = kept.weights
    found = eval(call, {"timm": timm}).eval()
    torch.manual_seed(0)
    expected, images = network(cell), torch.randn(2, 1, 64, 64)
    for name, value in found.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected.state_dict()[name].half().float()), name
    with torch.no_grad():
        torch.testing.assert_close(found(images), expected(images), rtol=1e-2, atol=1e-2)
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    # The commands that take weights take these.
    assert load_network(str(path)).num_classes == 10


def test_weights_stay_when_seeds_come_later(train, tmp_path):
    keep_grid(train(), tmp_path, weights=["small"])
    (path,) = tmp_path.glob(f"quick/g/*/*/{WEIGHTS_NAME}")
    before = path.read_bytes()
    folder = train(seeds=[1])
    assert len(keep_grid(folder, tmp_path).weights) == 1
    assert path.read_bytes() == before
    # Asked for again, they are those of the first seed that there is.
    keep_grid(train(seeds=[1]), tmp_path, weights=["small"])
    (path,) = tmp_path.glob(f"quick/g/*/*/{WEIGHTS_NAME}")
    assert path.parent.name.startswith("seed")


def too_large(weights):
    weights["head.fc.bias"] = weights["head.fc.bias"] + 1e6


def not_a_number(weights):
    weights["head.fc.bias"][0] = torch.nan


@pytest.mark.parametrize("change", [too_large, not_a_number])
def test_what_float16_cannot_hold_is_refused(train, change):
    run = next(train(change=change).glob("small/seed0-*"))
    with pytest.raises(ValueError, match=r"last\.ckpt: head\.fc\.bias has values up to .*, beyond float16"):
        half_weights(run)


def test_what_git_should_not_hold_is_refused_and_nothing_is_kept(train, tmp_path, monkeypatch):
    folder = train()
    monkeypatch.setattr("msv.publishing.weights.MOST_BYTES", 2**16)
    with pytest.raises(ValueError, match=r"its weights are 0\.\d MiB in float16, expected at most 0, which"):
        keep_grid(folder, tmp_path / "to", weights=["small"])
    assert not (tmp_path / "to").exists()


def test_command(train, tmp_path, capsys):
    folder = train()
    words = ["--results", str(folder.parents[1]), "--to", str(tmp_path / "to")]
    with pytest.raises(ValueError, match="--weights names cells of a grid; say which with --grid"):
        main([*words, "--weights", "small"])
    with pytest.raises(ValueError, match=r"--weights smal: no finished run of such a cell in .*; did you mean small\?"):
        main([*words, "--grid", "g", "--weights", "smal"])
    assert main([*words, "--grid", "g", "--weights", "small", "preset"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r'^  weights: timm\.create_model\("\w+", .*checkpoint_path=".*"\)$', out, re.MULTILINE)) == 2
    next(folder.glob("small/*/last.ckpt")).unlink()
    with pytest.raises(ValueError, match=r"last\.ckpt: no checkpoint, so there are no weights to keep"):
        main([*words, "--grid", "g", "--weights", "small"])
