"""A run that goes on from an epoch's end equals the straight run, bit for bit."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml

from msv.experiment import LAST, ExperimentCLI

CONFIGS = Path(__file__).parents[1] / "configs"


class Interrupt(pl.Callback):
    """Raises in the middle of an epoch."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.at = (epoch, batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            raise RuntimeError("power cut")


def config(workers: int = 0, **trainer) -> dict:
    made = yaml.safe_load((CONFIGS / "grid.yaml").read_text())
    quick = yaml.safe_load((CONFIGS / "quick.yaml").read_text())
    del made["grid"]
    network = made["model"]["init_args"]["network"]
    network["init_args"] |= quick["model"]["init_args"].pop("network")["init_args"]
    made["model"]["init_args"] |= quick["model"]["init_args"]
    made |= {key: quick[key] for key in ("data", "ema", "trainer")}
    made["data"]["init_args"]["num_workers"] = workers
    made["trainer"] |= {"logger": False, **trainer}
    return made


def fit(folder: Path, given: dict, interrupt: Interrupt | None = None) -> ExperimentCLI:
    cli = ExperimentCLI(args=given, run=False, folder=folder)
    if interrupt is not None:
        cli.trainer.callbacks.append(interrupt)
    last = folder / LAST
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=str(last) if last.exists() else None)
    return cli


def same(one, two) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_equals_straight(tmp_path, workers):
    straight = fit(tmp_path / "straight", config(workers))
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path / "cut", config(workers), Interrupt(epoch=1, batch=2))
    resumed = fit(tmp_path / "cut", config(workers))

    one = torch.load(tmp_path / "straight" / LAST, weights_only=True)
    two = torch.load(tmp_path / "cut" / LAST, weights_only=True)
    for key in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert same(one[key], two[key]), key
    # The averaged weights differ from the raw ones, so both were compared.
    assert not same(one["state_dict"], one["current_model_state"])

    measured = ("seconds", "images_per_second")
    rows = [
        [{key: value for key, value in row.items() if key not in measured} for row in cli.history.rows]
        for cli in (straight, resumed)
    ]
    assert rows[0] == rows[1]
    assert [row["epoch"] for row in rows[0]] == [0, 1, 2]


def test_training_is_random_in_seed_and_epoch(tmp_path):
    """Another seed and another epoch see other numbers: the test above does not compare constants."""
    one = fit(tmp_path / "one", config())
    two = fit(tmp_path / "two", {**config(), "seed_everything": 1})
    assert one.history.rows[0]["train_loss"] != two.history.rows[0]["train_loss"]
    assert not same(one.model.state_dict(), two.model.state_dict())


def test_a_finished_run_keeps_its_history_when_fit_again(tmp_path):
    fit(tmp_path, config())
    again = fit(tmp_path, config())
    assert [row["epoch"] for row in again.history.rows] == [0, 1, 2]


def test_a_step_that_goes_wrong_leaves_the_last_epochs_checkpoint(tmp_path):
    fit(tmp_path, config(max_epochs=2))
    before = (tmp_path / LAST).read_bytes()
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, config(), Interrupt(epoch=2, batch=3))
    assert (tmp_path / LAST).read_bytes() == before
    assert [path.name for path in tmp_path.glob(".*")] == []
