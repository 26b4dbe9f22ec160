"""Measurements made case by case: each is kept as soon as it is there, and what is finished is not made again."""

import gc
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from msv.kept import DONE, FAILED, Kept, Row, place
from msv.provenance import names_code

from .batches import turns
from .timing import Work, call_seconds


class Case(Protocol):
    """What one row measures; as text, its name in messages."""

    @property
    def columns(self) -> dict[str, str]:
        """As a row has it."""


C = TypeVar("C", bound=Case)


class NamedCase(ABC):
    """A case whose name tells it apart."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The row in words; no two cases share it."""

    @abstractmethod
    def about(self) -> Mapping[str, object]:
        """The columns that tell the case, beside its name."""

    @property
    def columns(self) -> dict[str, str]:
        """As a row has it."""
        return {name: str(value) for name, value in {"name": self.name, **self.about()}.items()}

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Effort:
    """How long a row is measured.

    Attributes:
        calls: of a turn at most, one after another, so that the host can run ahead of a GPU as it does in use; fewer
            where they would take longer than the turn's part of the seconds, but one.
        turns: at most; three at least, or as many as there are.
        seconds: after which no further turn begins.
        warmup: calls before anything is timed, in which kernels are compiled and loaded.
    """

    calls: int
    turns: int
    seconds: float
    warmup: int


@dataclass(frozen=True)
class Timed:
    """The times of one call in seconds, over some turns."""

    median: float
    minimum: float
    turns: int


def time_calls(works: Mapping[str, Work], device: torch.device, effort: Effort) -> dict[str, Timed]:
    """Times calls against each other, in turns, after some to warm up."""
    counts = {}
    for name, work in works.items():
        _repeat(work, effort.warmup)
        seconds = call_seconds(work, device)
        counts[name] = max(1, min(effort.calls, int(effort.seconds / effort.turns / seconds)))
    found = turns(
        {name: partial(_repeat, work, counts[name]) for name, work in works.items()},
        lambda batches: {name: call_seconds(batch, device) for name, batch in batches.items()},
        effort.turns,
        effort.seconds,
    )
    times = {name: [value / counts[name] for value in values] for name, values in found.items()}
    return {name: Timed(statistics.median(one), min(one), len(one)) for name, one in times.items()}


def missing(cases: Sequence[C], kept: Kept, where: Mapping[str, str], again: bool = False) -> list[C]:
    """The cases that have no finished row from this very place; those that failed here come last.

    A case that takes the whole process with it must not keep the others from being measured. Where the commit does not
    say which code ran, nothing is finished: that code may have been changed since.
    """
    anew = again or not names_code(where["commit"])
    at_hand = [row for row in kept.read() if place(row) == tuple(where.values())]

    def state(case: C) -> str | None:
        return next((row["status"] for row in at_hand if case.columns.items() <= row.items()), None)

    states = [(case, state(case)) for case in cases]
    left = [(case, found) for case, found in states if anew or found in (None, FAILED)]
    return [case for case, _ in sorted(left, key=lambda entry: entry[1] == FAILED)]


def measure(
    cases: Sequence[C],
    measure_case: Callable[[C], Mapping[str, Any]],
    device: torch.device,
    kept: Kept,
    where: Mapping[str, str],
    command: str,
) -> Iterator[Row]:
    """Measures one case after another and yields its row, which is kept by then; a failing one has its error there.

    Args:
        cases: what to measure.
        measure_case: gives the columns of one case; `status` is done where it does not say otherwise.
        device: where.
        kept: takes the rows; its columns have `status`, `error` and `command`.
        where: `msv.kept.here` of the device.
        command: what measures these rows again.

    Raises:
        OSError: a row cannot be written; or the GPU is of no use to this process any more.
    """
    for case in cases:
        found: dict[str, Any] = {"status": DONE, "error": None}
        try:
            found |= measure_case(case)
        except Exception as error:  # compilers and drivers raise dozens of kinds, and none may stop the other rows
            found |= {"status": FAILED, "error": one_line(error)}
        yield kept.put({**case.columns, **found, "command": command}, where)
        _forget(device, case)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice, of a GPU or of the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def one_line(error: BaseException) -> str:
    """An error as one line for a row."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _repeat(work: Work, calls: int) -> None:
    for _ in range(calls):
        work()


def _forget(device: torch.device, case: Case) -> None:
    """Give back what a case left: compiled code, memory."""
    torch.compiler.reset()
    gc.collect()
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise OSError(
            f"after {case} the GPU is of no use to this process ({one_line(error)}); run the same command again: it "
            "skips what is finished and tries that row last"
        ) from error
