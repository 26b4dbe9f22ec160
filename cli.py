"""The door: ``python cli.py fit --config experiments/ablate_scans.yaml``; ``python cli.py --help`` lists the rest."""

import sys
from collections.abc import Callable


def tables(argv: list[str]) -> int:
    """Make tables again from records."""
    from msv.ablation.tables import main

    return main(argv) or 0


def profile(argv: list[str]) -> int:
    """Count parameters and FLOPs of a model."""
    from msv.profiling import main

    return main(argv) or 0


def benchmark(argv: list[str]) -> int:
    """Time the scans."""
    from msv.profiling.benchmark import main

    return main(argv) or 0


def convert(argv: list[str]) -> int:
    """Make a published checkpoint a file for timm."""
    from msv.models.convert import main

    return main(argv)


def cell(argv: list[str]) -> int:
    """Carry out one run of a grid in this process."""
    from msv.ablation.cell import main

    return main(argv)


def experiment(argv: list[str]) -> int:
    """fit, validate, test, predict."""
    from msv.experiment import ExperimentCLI

    def run_grid(cli: ExperimentCLI) -> int:
        from msv.ablation import runner

        return runner.run_grid(cli)

    return ExperimentCLI(args=argv, run_grid=run_grid).status


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "tables": tables,
    "profile": profile,
    "benchmark": benchmark,
    "convert": convert,
    "cell": cell,
}


def main(argv: list[str]) -> int:
    """Run one command; what is wrong with its input is one line on stderr and exit status 2."""
    name, *rest = argv or ["--help"]
    try:
        return COMMANDS[name](rest) if name in COMMANDS else experiment(argv or ["--help"])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
