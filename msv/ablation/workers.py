"""Processes that train runs side by side: started, listened to, waited for, and ended together.

Each run has a fresh process out of a server that has imported what all of them need and never touches a GPU.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from msv.ablation import cell as cell_process
from msv.ablation.grid import Run

# Seconds that the processes get to end by themselves; checkpoints are written atomically, so no harm if they do not.
GRACE = 5.0


@dataclass(frozen=True)
class Job:
    """A run whose process has been started.

    Args:
        run: the run.
        number: its place in the grid, from 1.
        process: trains it.
        begun: when that was, by the monotonic clock.
        listener: passes on what the process prints; None where it prints by itself.
    """

    run: Run
    number: int
    process: ForkServerProcess
    begun: float
    listener: threading.Thread | None

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.begun


class Workers:
    """Up to ``count`` processes at a time, one for each run.

    Args:
        count: how many; alone, a process prints for itself, with a progress bar on a terminal. Several share torch's
            threads out, unless OMP_NUM_THREADS or MKL_NUM_THREADS says how many each has, and every line of theirs
            goes through ``say``.
        say: gets a run and a line that its process has printed; called from other threads.
    """

    def __init__(self, count: int, say: Callable[[Run, str], None]) -> None:
        self.count = count
        self.say = say
        self.jobs: list[Job] = []

    @staticmethod
    def prepare() -> None:
        """Start the server, which imports while the grid is checked."""
        # Asking whether there is a GPU must not start CUDA in the process that all runs are forked from.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["msv.ablation.cell"])
        from multiprocessing import forkserver

        forkserver.ensure_running()

    @property
    def full(self) -> bool:
        """Whether as many processes run as may."""
        return len(self.jobs) >= self.count

    def start(self, run: Run, number: int) -> None:
        """Start the process of a run, whose ``config.yaml`` and ``record.json`` are there."""
        context = multiprocessing.get_context("forkserver")
        script = Path(cell_process.__file__).parents[2] / "cli.py"
        reader, writer = context.Pipe(duplex=False) if self.count > 1 else (None, None)
        process = context.Process(
            target=cell_process.child_main, args=(str(run.folder), str(script), writer, self.count)
        )
        process.start()
        listener = None
        if reader is not None and writer is not None:
            writer.close()  # so that the end of the process is the end of what it prints
            listener = threading.Thread(target=self._listen, args=(run, reader), daemon=True)
            listener.start()
        self.jobs.append(Job(run, number, process, time.monotonic(), listener))

    def next_ended(self) -> Job:
        """Wait for a process to end; the job, which is no longer among ``jobs``."""
        ended = wait([job.process.sentinel for job in self.jobs])
        job = next(job for job in self.jobs if job.process.sentinel in ended)
        self._reap(job)
        return job

    def stop(self) -> list[Job]:
        """End all processes, by force where they take longer than `GRACE` seconds; the jobs."""
        for job in self.jobs:
            job.process.terminate()
        deadline = time.monotonic() + GRACE
        stopped = list(self.jobs)
        for job in stopped:
            job.process.join(max(0.0, deadline - time.monotonic()))
            if job.process.is_alive():
                job.process.kill()
            self._reap(job)
        return stopped

    def _reap(self, job: Job) -> None:
        job.process.join()
        if job.listener is not None:
            job.listener.join(GRACE)  # a process of its own that it left behind may hold the pipe open
        self.jobs.remove(job)

    def _listen(self, run: Run, reader: Connection) -> None:
        with suppress(OSError), os.fdopen(os.dup(reader.fileno()), errors="replace") as lines:
            for line in lines:
                if line.strip():
                    self.say(run, line.rstrip())
        reader.close()
