"""What a grid's runs will cost, told before they train: operations by count, seconds by records of the same place."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from msv.ablation.config import canonical, get_path
from msv.ablation.grid import Run
from msv.ablation.records import RECORD_NAME, read_record
from msv.experiment import ExperimentCLI
from msv.profiling import count
from msv.profiling.devices import without_weights
from msv.provenance import device_name

# A training step runs the network forward, and backward through activations and weights.
PASSES = 3
# What a run's speed depends on, of its config, beside the network and the data.
_SPEED = (
    "trainer.precision",
    *(f"model.init_args.{name}" for name in ("global_batch_size", "compile", "cuda_graphs")),
)
_LIMITS = ("trainer.limit_train_batches", "trainer.limit_val_batches")
# Of the data's settings, those that a run's speed does not depend on.
_ELSEWHERE = frozenset({"root", "download", "seed", "predict_paths"})


@dataclass(frozen=True)
class Cost:
    """What one run of a cell costs.

    Args:
        epochs: of training.
        images: trained on in an epoch.
        gflops: 10^9 operations of one image forward, a multiply-accumulate being one.
        seconds: of training and validation, as finished records of this place have it; None where there is none.
    """

    epochs: int
    images: int
    gflops: float
    seconds: float | None

    @property
    def operations(self) -> float:
        """Operations of the whole training, forward and backward."""
        return PASSES * self.gflops * 1e9 * self.images * self.epochs


def estimate(runs: Sequence[Run], workers: int) -> dict[str, Cost]:
    """What one run of each cell costs, as far as that can be told without training.

    Args:
        runs: of one grid; the seeds of a cell cost the same.
        workers: how many train side by side: a record says how fast a run is among as many.

    Returns:
        Cell -> cost. A cell is left out whose data or network cannot be had now, or that ends by other than epochs.
    """
    first = {run.cell.name: run for run in reversed(runs)}
    speeds: dict[str, dict[str, list[float]]] = {}  # of each accelerator
    images: dict[str, int] = {}  # of each data section: some take a while to make
    costs = {}
    for name in dict.fromkeys(run.cell.name for run in runs):
        run = first[name]
        accelerator = run.config["trainer"]["accelerator"]
        if accelerator not in speeds:
            speeds[accelerator] = _known_speeds(run.folder.parents[3], workers, device_name(accelerator))
        cost = _cost(run.config, images, speeds[accelerator].get(_speed_key(run.config), []))
        if cost is not None:
            costs[name] = cost
    return costs


def _cost(config: Mapping[str, Any], known: dict[str, int], seconds_an_epoch: Sequence[float]) -> Cost | None:
    try:
        args = {**config, "trainer": {**config["trainer"], "logger": False}}
        cli = ExperimentCLI(args=args, run=False)
        trainer, model, data = cli.trainer, cli.model, cli.datamodule
        section = canonical(config["data"])
        if section not in known:
            known[section] = len(data.splits.train)
        images = known[section]
        network = without_weights(partial(model.network_factory, data.in_chans, data.num_classes))
        counts = count(network, data.in_chans, data.image_size)
    except Exception:  # what is wrong with a cell is told by the checks before it trains, with its name
        return None
    if (
        trainer.max_steps >= 0
        or config["trainer"].get("overfit_batches")
        or not trainer.max_epochs
        or trainer.max_epochs < 0
    ):
        return None
    batches, limit = images // data.batch_size, trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    seconds = None
    if seconds_an_epoch:
        seconds = trainer.max_epochs * math.fsum(seconds_an_epoch) / len(seconds_an_epoch)
    return Cost(trainer.max_epochs, batches * data.batch_size, counts.flops_fvcore / 1e9, seconds)


def _known_speeds(results: Path, workers: int, device: str | None) -> dict[str, list[float]]:
    """What runs that trained here took: key of a config -> seconds an epoch of each finished run."""
    speeds: dict[str, list[float]] = {}
    for path in sorted(results.glob(f"*/*/*/seed*/{RECORD_NAME}")) if device else []:
        try:
            record = read_record(path)
            config = yaml.safe_load((path.parent / "config.yaml").read_text(encoding="utf-8"))
            key = _speed_key(config)
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            continue  # its own grid says what is wrong with it
        timing, env = record.get("timing") or {}, record.get("env") or {}
        here = env.get("device") == device and timing.get("workers", 1) == workers
        if record["status"] == "done" and here and timing.get("train_seconds") and record["history"]:
            speeds.setdefault(key, []).append(timing["train_seconds"] / len(record["history"]))
    return speeds


def _speed_key(config: Mapping[str, Any]) -> str:
    """What two runs agree in that take as long an epoch on one device."""
    data = config["data"]
    settings = {key: value for key, value in (data.get("init_args") or {}).items() if key not in _ELSEWHERE}
    told = {key: _value(config, key) for key in (*_SPEED, *_LIMITS)}
    return canonical([config["model"]["init_args"]["network"], data["class_path"], settings, told])


def _value(config: Mapping[str, Any], key: str) -> Any:
    try:
        return get_path(config, key) or None
    except KeyError:  # a run of before there was such a setting
        return None


def told(costs: Mapping[str, Cost], runs: Iterable[Run], workers: int) -> list[str]:
    """What the runs of a grid will cost, in lines to print.

    Args:
        costs: of `estimate`.
        runs: those to come.
        workers: how many train side by side.
    """
    number: dict[str, int] = {}
    for run in runs:
        number[run.cell.name] = number.get(run.cell.name, 0) + 1
    lines = []
    for name, n in number.items():
        cost = costs.get(name)
        if cost is None:
            lines.append(f"cost of {name}: not known beforehand")
            continue
        seconds = "time not known here"
        if cost.seconds:
            speed = cost.images * cost.epochs / cost.seconds
            seconds = f"about {duration(cost.seconds)} a run by finished runs of this place ({speed:.0f} images/s)"
        lines.append(
            f"cost of {name}: {_runs(n)} of {operations(cost.operations)} ({PASSES} × {cost.gflops:.4g} GFLOPs × "
            f"{cost.images:,} images × {cost.epochs} epochs), {seconds}"
        )
    known = {name: cost for name, cost in costs.items() if name in number}
    if len(number) > 1 and known:
        total = operations(math.fsum(number[name] * cost.operations for name, cost in known.items()))
        timed = {name: cost.seconds for name, cost in known.items() if cost.seconds}
        whole = math.fsum(number[name] * seconds for name, seconds in timed.items()) / workers
        counted, measured = sum(number[name] for name in known), sum(number[name] for name in timed)
        spent = f"; {measured} of them about {duration(whole)}, {workers} at a time" if timed else ""
        lines.append(f"cost in all: {_runs(counted)}, {total}{spent}")
    return lines


def operations(count: float) -> str:
    """A number of operations to read."""
    for unit, size in (("EFLOPs", 1e18), ("PFLOPs", 1e15), ("TFLOPs", 1e12)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e9:.3g} GFLOPs"


def duration(seconds: float) -> str:
    """A time span to read."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _runs(number: int) -> str:
    return f"{number} run{'s'[: number != 1]}"
