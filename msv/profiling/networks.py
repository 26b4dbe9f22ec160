"""What a whole network costs on this machine: images a second and memory, in inference and in training.

Rows lie in one file for a kind of device. `benchmark network` and Table 6 show them, and what one of the two has
measured the other does not measure again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from msv.kept import Kept

from .commands import kept_file
from .measuring import Effort, time_calls
from .steps import Step, random_step
from .timing import peak_memory

CLASSES = 1000
CPU_RIVALS = {"msvmamba_nano": "regnety_008"}
"""Networks whose inference on a CPU takes turns with another's, since a CPU's speed changes with what else it does."""

MEASURED = ("images_per_s", "step_ms", "step_min_ms", "turns", "peak_bytes")
"""Columns: times of one step, the median and the least of `turns` turns; the most bytes of tensors alive at once in a
step, weights, AdamW's averages and images included; of CUDA graphs, whose tensors live in a pool of theirs, none.
"""


@dataclass(frozen=True)
class Case:
    """What one row measures.

    Attributes:
        model: in timm's registry.
        task: of `msv.profiling.steps.TASKS`.
        mode: of `msv.profiling.steps.MODES`.
        precision: of `msv.profiling.steps.PRECISIONS`: of weights and images in inference, as timm's own benchmark has
            them; in training that of autocast, over weights in float32. The scan keeps its states in float32 in any.
        batch: images of a step.
        size: their side in pixels.
    """

    model: str
    task: str
    mode: str
    precision: str
    batch: int
    size: int

    @property
    def columns(self) -> dict[str, str]:
        """As a row has it."""
        return {field.name: str(getattr(self, field.name)) for field in fields(self)}

    def __str__(self) -> str:
        return f"{self.model}, {self.task}, {self.mode}, {self.precision}, {self.batch} of {self.size}×{self.size}"


KEY = tuple(field.name for field in fields(Case))
COLUMNS = (*KEY, "status", *MEASURED, "rival", "rival_ms", "ratio", "error", "command")
"""Of the CSV, beside where a row was measured; empty where there is nothing to tell. `rival` took turns with the model,
in the same mode and precision; `rival_ms` is its median, `ratio` the model's time over it.
"""

# With what comes before and after, a row takes some three seconds beside its compilation, unless a step takes half one.
ON_GPU = Effort(calls=10, turns=10, seconds=2.0, warmup=3)
ON_CPU = Effort(calls=1, turns=15, seconds=15.0, warmup=1)
QUICK = Effort(calls=1, turns=1, seconds=0.0, warmup=1)


def store(folder: Path, device: torch.device | str, quick: bool = False) -> Kept:
    """The rows kept in a folder of a kind of device; tiny sizes must not take the place of the real ones."""
    kind = torch.device(device).type
    return kept_file(folder, f"network_{kind}{'_quick' * quick}", COLUMNS, KEY)


def usual_effort(device: torch.device, quick: bool = False) -> Effort:
    """How long a row is measured."""
    return QUICK if quick else ON_GPU if device.type == "cuda" else ON_CPU


def measure_case(case: Case, device: torch.device, effort: Effort) -> dict[str, Any]:
    """Measures a case, on a CPU in turns with its rival if it has one; returns its columns."""
    on_cpu = (device.type, case.task) == ("cpu", "inference")
    return measure_step(case, device, effort, CPU_RIVALS.get(case.model) if on_cpu else None)


def measure_step(case: Case, device: torch.device, effort: Effort, rival: str | None = None) -> dict[str, Any]:
    """Times a case, and a rival if one is named, and measures its memory; returns those columns."""
    step = make_step(case, device)
    works = {case.model: step.work}
    if rival is not None:
        works[rival] = make_step(replace(case, model=rival), device).work
    times = time_calls(works, device, effort)
    own = times[case.model]
    row: dict[str, Any] = {
        "images_per_s": case.batch / own.median,
        "step_ms": 1e3 * own.median,
        "step_min_ms": 1e3 * own.minimum,
        "turns": own.turns,
    }
    if "graphs" not in case.mode:
        row["peak_bytes"] = step.held_bytes + peak_memory(step.work, device)
    if rival is not None:
        row |= {"rival": rival, "rival_ms": 1e3 * times[rival].median, "ratio": own.median / times[rival].median}
    return row


def make_step(case: Case, device: torch.device) -> Step:
    """The step of a case, on random weights and a random batch that lies on the device already.

    Raises:
        ValueError: training in fp16.
    """
    with device:  # where weights are drawn many times as fast as on a CPU, if it is a GPU
        network = create(case.model, case.size)
    shape = (case.batch, 3, case.size, case.size)
    return random_step(network.to(device), shape, CLASSES, case.task, case.mode, case.precision)


def create(model: str, image_size: int = 224) -> nn.Module:
    """A network of timm's registry for 1000 classes and square images, with random weights."""
    config = timm.get_pretrained_cfg(model)
    # Some of timm's build tables for one size; those of others take any.
    sized: dict[str, Any] = {"img_size": image_size} if config is not None and config.fixed_input_size else {}
    return timm.create_model(model, num_classes=CLASSES, **sized)


def speed(row: Mapping[str, str]) -> str:
    """What is said of a row that did not fail."""
    return f"{float(row['images_per_s']):,.1f} img/s"
