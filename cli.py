"""The door: ``python cli.py fit --config experiments/ablate_scans.yaml``; ``python cli.py --help`` lists the rest."""

import sys
from importlib import import_module

COMMANDS = {
    "tables": "msv.publishing.command",
    "keep": "msv.publishing.keep",
    "pack": "msv.publishing.pack",
    "unpack": "msv.publishing.unpack",
    "report": "msv.report.command",
    "profile": "msv.ablation.profiles",
    "compare": "msv.comparison.command",
    "benchmark": "msv.benchmarks.command",
    "convert": "msv.models.convert",
    "export": "msv.tasks.export",
    "pathfinder": "msv.data.pathfinder_sheet",
    "cell": "msv.ablation.cell",
}
"""What stands beside LightningCLI's fit, validate, test and predict: modules whose `main` takes the arguments."""


def experiment(argv: list[str]) -> int:
    """fit, validate, test, predict."""
    from msv.experiment import ExperimentCLI

    def run_grid(cli: ExperimentCLI) -> int:
        from msv.ablation import runner

        return runner.run_grid(cli)

    return ExperimentCLI(args=argv, run_grid=run_grid).status


def main(argv: list[str]) -> int:
    """Run one command; what is wrong with its input is one line on stderr and exit status 2."""
    name, *rest = argv or ["--help"]
    try:
        if name in COMMANDS:
            return import_module(COMMANDS[name]).main(rest) or 0
        return experiment(argv or ["--help"])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
