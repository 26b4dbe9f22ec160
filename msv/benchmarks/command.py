"""`python cli.py benchmark`: what is timed on this machine, each by a command of its own."""

import argparse
from collections.abc import Sequence
from importlib import import_module

BENCHMARKS = {
    "scan": ("msv.profiling.benchmark", "the scan's time and memory"),
    "depthwise": ("msv.profiling.depthwise", "the depthwise convolutions, beside torch's and a copy"),
    "merge": ("msv.profiling.merge", "what follows the scans, beside torch's and a copy"),
    "norm": ("msv.profiling.norm", "residual sums and their LayerNorm, beside torch's and a copy"),
    "network": ("msv.benchmarks.network", "a training step and inference of whole networks, beside Swin and ConvNeXt"),
    "scaling": ("msv.benchmarks.scaling", "images a second against batch and image size, with a plot"),
    "loop": ("msv.benchmarks.loop", "what the training loop adds to a step"),
}
"""Modules whose `main` takes the arguments, and what they measure."""


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark that the first word names, with the arguments after it; returns its exit status."""
    listed = "\n".join(f"  {name:10}{what}" for name, (_, what) in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="cli.py benchmark",
        description="Measures what msv costs on this machine.",
        epilog=f"benchmarks, each with its own --help:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s {" + ",".join(BENCHMARKS) + "} ...",
    )
    parser.add_argument("benchmark", choices=tuple(BENCHMARKS), help=argparse.SUPPRESS)
    name = parser.parse_args(argv[:1]).benchmark
    return int(import_module(BENCHMARKS[name][0]).main(argv[1:]))
