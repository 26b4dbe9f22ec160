"""Options that the benchmarks of whole networks share."""

import argparse
from collections.abc import Sequence

from msv.profiling.steps import MODES

PRECISIONS = ("float32", "bf16")
"""In which networks are trained and run alike."""


def add_ways(parser: argparse.ArgumentParser, modes: Sequence[str] = tuple(MODES)) -> None:
    """How a network runs: `--mode` and `--precision`."""
    parser.add_argument("--mode", nargs="+", choices=tuple(modes), help="graphs: compiled, with CUDA graphs")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: bf16; on a CPU float32")
