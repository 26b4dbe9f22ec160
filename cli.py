"""The door: ``python cli.py fit --config experiments/ablate_scans.yaml``; ``python cli.py --help`` lists the rest."""

import sys
from importlib import import_module

COMMANDS = {
    "tables": ("msv.publishing.command", "make tables again from records"),
    "keep": ("msv.publishing.keep", "publish finished runs"),
    "profile": ("msv.ablation.profiles", "parameters and FLOPs"),
    "compare": ("msv.comparison.command", "the paper's systems side by side"),
    "goldens": ("msv.publishing.goldens", "differences from the published model's numbers"),
    "benchmark": ("msv.benchmarks.command", "time the scan and networks"),
    "convert": ("msv.models.convert", "published weights for timm"),
    "export": ("msv.tasks.export", "a network for torch.export or ONNX"),
    "pathfinder": ("msv.data.pathfinder_sheet", "a sheet of Pathfinder's pictures"),
    "cell": ("msv.ablation.cell", "one run of a grid, by hand"),
}
"""What stands beside LightningCLI's fit, validate, test and predict: modules whose `main` takes the arguments, and what
they do.
"""


def experiment(argv: list[str]) -> int:
    """fit, validate, test, predict."""
    from msv.experiment import ExperimentCLI

    def run_grid(cli: ExperimentCLI) -> int:
        from msv.ablation import runner

        return runner.run_grid(cli)

    beside = {name: what for name, (_, what) in COMMANDS.items()}
    return ExperimentCLI(args=argv, run_grid=run_grid, beside=beside).status


def main(argv: list[str]) -> int:
    """Run one command; what is wrong with its input is one line on stderr and exit status 2."""
    name, *rest = argv or ["--help"]
    try:
        if name in COMMANDS:
            return import_module(COMMANDS[name][0]).main(rest) or 0
        return experiment(argv or ["--help"])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
