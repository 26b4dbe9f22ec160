"""Options that the benchmarks of whole networks share."""

import argparse

from msv.profiling.steps import MODES, MODES_TOLD

PRECISIONS = ("float32", "bf16")
"""In which networks are trained and run alike."""


def add_ways(parser: argparse.ArgumentParser) -> None:
    """How a network runs: `--mode` and `--precision`."""
    parser.add_argument("--mode", nargs="+", choices=MODES, help=MODES_TOLD)
    parser.add_argument("--precision", choices=PRECISIONS, help="default: bf16; on a CPU float32")
