"""What TensorBoard compares runs by: a run's toggles and final metrics, as a file of events beside its curves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from msv.ablation.names import format_value

SUFFIX = ".hparams"
_COUNTS = ("params_trained", "gflops_fvcore_trained")


def write_hparams(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the events of a finished run that TensorBoard's HPARAMS page shows, in the place of earlier ones.

    Only the run itself is told of: which columns there are TensorBoard works out from all runs under its ``--logdir``,
    so that grids with other toggles can stand in one table.

    Args:
        folder: of the run.
        record: of the run: its toggles, metrics, counts and timing.

    Raises:
        OSError: the file cannot be written.
    """
    for old in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
        old.unlink()
    identity = {name: record[name] for name in ("grid", "recipe", "cell", "seed")}
    settings = {name: _setting(value) for name, value in (record.get("toggles") or {}).items()}
    counts, timing = record.get("counts") or {}, record.get("timing") or {}
    metrics = {
        **(record.get("metrics") or {}),
        **{name: counts.get(name) for name in _COUNTS},
        "train_seconds": timing.get("train_seconds"),
    }
    numbers = {name: float(value) for name, value in metrics.items() if value is not None}
    _, start, end = hparams({**identity, **settings}, numbers)
    with SummaryWriter(str(folder), filename_suffix=SUFFIX) as writer:
        for summary in (start, end):
            writer.file_writer.add_summary(summary)
        for name, value in numbers.items():
            writer.add_scalar(f"final/{name}", value, len(record.get("history") or []))


def _setting(value: Any) -> bool | int | float | str:
    return value if isinstance(value, (bool, int, float, str)) else format_value(value)
