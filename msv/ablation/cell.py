"""One run, in a process of its own: train, test or validate, and leave a record."""

import logging
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from datetime import datetime, timezone
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from msv.ablation.records import RECORD_NAME, read_record, write_record
from msv.experiment import LAST, ExperimentCLI
from msv.models.checkpoint_file import read_checkpoint
from msv.profiling import count
from msv.provenance import environment

log = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
ERROR_LOG = "error.log"
# Exit statuses of a run's process.
DONE, FAILED, LOCKED, STOPPED = 0, 1, 75, 130


def run_lock(folder: Path) -> FileLock:
    """The lock that whoever works on a run's folder holds; it lies beside the folder, which may be moved."""
    return FileLock(folder.parent / f".{folder.name}.lock")


def update_record(folder: Path, **fields: Any) -> dict[str, Any]:
    """Change fields of a run's record; returns the whole of it."""
    record = {**read_record(folder / RECORD_NAME), **fields}
    write_record(folder / RECORD_NAME, record)
    return record


def one_line(error: BaseException) -> str:
    """An error as one line for a record or a report."""
    text = str(error).strip()
    if "Original Traceback" in text:  # of a data loader's process: its last line is the error itself
        return text.splitlines()[-1][:1000]
    text = " ".join(text.split())
    return (text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}")[:1000]


def now() -> str:
    """The time in ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def run_cell(folder: Path) -> int:
    """Carry out, or go on with, the run whose ``config.yaml`` and ``record.json`` lie in ``folder``.

    Under DDP each process calls this; the first of them holds the lock and writes.

    Returns:
        Exit status: `DONE`, `FAILED` (the record says why), `LOCKED` (another process works on it) or `STOPPED`.
    """
    if _rank() != 0:
        _train(folder)
        return DONE
    try:
        with run_lock(folder).acquire(timeout=1):
            return _run_locked(folder)
    except Timeout:
        return LOCKED


def _run_locked(folder: Path) -> int:
    try:
        record = update_record(folder, status="running", error=None, env=_no_device_yet())
        results = _train(folder)
        timing = {**record["timing"], **results.pop("timing"), "finished": now()}
        update_record(folder, status="done", timing=timing, **results)
    except (KeyboardInterrupt, SystemExit):  # Lightning makes a SystemExit of both signals
        update_record(folder, status="unfinished")
        return STOPPED
    except Exception as error:  # whatever it was, the other cells go on and the table says so
        with (folder / ERROR_LOG).open("a", encoding="utf-8") as file:
            file.write(f"{now()}\n{traceback.format_exc()}\n")
        update_record(folder, status="failed", error=f"{one_line(error)}; traceback in {ERROR_LOG} beside it")
        return FAILED
    return DONE


def _rank() -> int:
    return int(getattr(rank_zero_only, "rank", 0))


def _no_device_yet() -> dict[str, Any]:
    return {**environment("cpu"), "device": None}


def _train(folder: Path) -> dict[str, Any]:
    """Fit, then test averaged and raw weights, or validate them where the run is not to be tested.

    Returns:
        The record's fields; nothing but in the first process of DDP.
    """
    config = yaml.safe_load((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    cli = ExperimentCLI(args=config, run=False, folder=folder)
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    if _rank() == 0:
        update_record(folder, data=data.summary())
    last = folder / LAST
    trainer.fit(model, datamodule=data, ckpt_path=str(last) if last.is_file() else None)

    schedule = {
        "epochs": trainer.max_epochs,
        "global_batch_size": model.actual_batch_size(),
        "lr": model.actual_lr(),
        "precision": str(trainer.precision),
        **_limits(trainer),
    }
    rank, device = trainer.global_rank, trainer.strategy.root_device
    if torch.distributed.is_initialized():
        # The evaluation below is of one process: samplers of several may pad the split with repeated images.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank != 0:
        return {}

    checkpoint = read_checkpoint(last)
    judge = pl.Trainer(
        accelerator="cpu" if device.type == "cpu" else "auto",
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision=trainer.precision,
        limit_val_batches=trainer.limit_val_batches,
        limit_test_batches=trainer.limit_test_batches,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    evaluate = judge.test if read_record(folder / RECORD_NAME).get("tested", True) else judge.validate
    metrics: dict[str, float] = {}
    for key, suffix in (("state_dict", ""), ("current_model_state", "_raw")):
        model.load_state_dict(checkpoint[key])
        evaluate(model, datamodule=data, verbose=False)
        metrics |= {name + suffix: float(value) for name, value in judge.callback_metrics.items()}

    rows = cli.history.rows
    return {
        "network": config["model"]["init_args"]["network"],
        "metrics": metrics,
        "history": rows,
        "counts": _counts(model, data),
        "data": data.summary(),
        "schedule": schedule,
        "timing": {
            "train_seconds": round(sum(row["seconds"] for row in rows), 3),
            "images_per_second": statistics.median(row["images_per_second"] for row in rows) if rows else None,
        },
        "env": environment("cuda" if device.type == "cuda" else "cpu"),
    }


def _limits(trainer: pl.Trainer) -> dict[str, Any]:
    """What cuts a run or its test short of whole epochs and splits; nothing where nothing does."""
    unlimited = {
        "max_steps": -1,
        "limit_train_batches": 1.0,
        "limit_val_batches": 1.0,
        "limit_test_batches": 1.0,
        "overfit_batches": 0.0,
    }
    found = {name: getattr(trainer, name) for name in unlimited}
    # Exactly: of batches, 1 is one batch and 1.0 all of them.
    cut = {name: value for name, value in found.items() if repr(value) != repr(unlimited[name])}
    return {"limits": cut} if cut else {}


def _counts(model: Any, data: Any) -> dict[str, Any]:
    """Parameters and FLOPs at 1x3x224x224 with 1000 classes (the paper's) and as trained."""
    counts: dict[str, Any] = {}
    for suffix, in_chans, classes, size in (
        ("", 3, 1000, 224),
        ("_trained", data.in_chans, data.num_classes, data.image_size),
    ):
        counted = count(model.network_factory(in_chans, classes), in_chans, size)
        counts |= {
            f"params{suffix}": counted.params,
            f"gflops_fvcore{suffix}": counted.flops_fvcore / 1e9,
            f"gflops{suffix}": counted.flops / 1e9,
        }
    return {**counts, "image_size": data.image_size, "in_chans": data.in_chans, "num_classes": data.num_classes}


def child_main(folder: str, cli_path: str) -> None:
    """What the runner starts: `run_cell`, ending with its parent and deaf to the Ctrl-C that the parent answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    # Lightning starts the other processes of DDP by running these words again.
    sys.argv = [cli_path, "cell", folder]
    sys.exit(run_cell(Path(folder)))


def main(argv: list[str]) -> int:
    """``python cli.py cell FOLDER``: one run by hand, or one more process of a run under DDP."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise ValueError(
            f"cell {' '.join(argv)}: expected one run's folder, results/<grid>/<recipe>/<cell>/seed<k>-<hash>"
        )
    folder = Path(argv[0])
    for name in (CONFIG_NAME, RECORD_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file; expected the folder of a run that `fit` has made")
    if _rank() != 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _end_with_parent()
    elif read_record(folder / RECORD_NAME)["status"] == "done":
        raise ValueError(f"{folder} holds a finished run; move the folder aside to train it again")
    status = run_cell(folder)
    if status == LOCKED:
        raise ValueError(f"{folder}: another process works on this run; wait for it or stop it")
    return status


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    pid = os.getppid()

    def watch() -> None:
        if parent is not None:
            wait([parent.sentinel])
        else:
            while os.getppid() == pid:
                time.sleep(0.5)
        os._exit(STOPPED)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
