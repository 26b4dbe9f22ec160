"""One YAML is one experiment: the command line of fit, validate, test and predict."""

import csv
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

# Lightning calls jsonargparse by names that its version 5 will drop; that is not our users' concern.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table

from msv.files import EXPERIMENTS
from msv.grid_section import Grid
from msv.models.checkpoint_file import read_checkpoint
from msv.parse_errors import original_errors, readable_errors
from msv.tasks import EMA, History, Progress
from msv.tasks.checkpoint import AtomicCheckpointIO

log = logging.getLogger(__name__)

LAST = "last.ckpt"
DEFAULT_RECIPE = Path("recipes/digits.yaml")
DESCRIPTION = "One YAML is one experiment: fit carries out its grid, validate, test and predict use what was trained."
FROM_DATA = {f"--model.{part}{name}" for part in ("", "init_args.") for name in ("in_chans", "num_classes")}
# What is trained; the rest of a command's options say what to do with it.
SECTIONS = ("seed_everything", "trainer", "model", "data", "ema")


class SaveConfig(SaveConfigCallback):
    """Saves the config beside the logs of a training; other commands leave no file behind."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save at the start of ``fit``."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class ExperimentCLI(LightningCLI):
    """LightningCLI in subclass mode for model and data, with the links, defaults and callbacks of an experiment.

    Attributes:
        status: exit status of the command.
        words: the words of the command line as they were typed.
        recipe: name of the overlays, None without one.
        grid: the ``grid:`` section of a ``fit``, or None.
        history: the callback that holds a row an epoch.

    Args:
        args: arguments of the command line, or a config as a dict.
        run: whether the first argument is a command to carry out; False builds the objects only.
        run_grid: what ``fit`` calls when there is a ``grid:`` section, for an exit status.
        beside: commands that stand beside these, and what they do, for ``--help``.
        folder: a run's folder, which takes its logs and ``last.ckpt``; None leaves both to Lightning.
    """

    def __init__(
        self,
        args: ArgsType = None,
        run: bool = True,
        run_grid: "Callable[[ExperimentCLI], int] | None" = None,
        folder: Path | None = None,
        beside: Mapping[str, str] | None = None,
    ) -> None:
        self.status = 0
        self.grid: Grid | None = None
        self.run_grid = run_grid
        self.folder = folder
        self.words: list[str] = []
        self.recipe: str | None = None
        quiet()
        self.history = History()
        callbacks: list[pl.Callback] = [self.history, Progress()]
        if folder is not None:
            # Saved after validation and after the epoch's row of the history.
            callbacks.append(
                ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
            )
        strict: dict[str, Any] = {"exit_on_error": False}
        others = ", ".join(f"{name} ({what})" for name, what in (beside or {}).items())
        description = f"{DESCRIPTION} Beside these: {others}; each has its own --help." if others else DESCRIPTION
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig if run else None,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"devices": 1, "enable_model_summary": False, "callbacks": callbacks},
            seed_everything_default=0,
            parser_kwargs=(
                {**strict, "description": description, **{name: dict(strict) for name in self.subcommands()}}
                if run
                else strict
            ),
            args=args,
            run=run,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    # The parser.

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the grid and the moving average, and let data and seed flow to where they are needed."""
        parser.add_argument("--grid", type=Grid | None, default=None, help="A grid of runs; `fit` carries it out.")
        parser.add_lightning_class_args(EMA, "ema")
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        parser.link_arguments("data.in_chans", "model.init_args.in_chans", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_seed)
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=_seed)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument(
                "--output", type=str | None, default=None, help="CSV file for the predictions; without it, a table."
            )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments; without data in any config, the digits recipe beside the first one is the data."""
        options = [
            option for sub in getattr(self, "_subcommand_parsers", {}).values() for option in sub._option_string_actions
        ]
        with readable_errors(options):
            if args is not None and not isinstance(args, list):
                self.config = parser.parse_object(args)
                return
            self.words = list(sys.argv[1:] if args is None else args)
            words, self.recipe = with_default_recipe(self.words)
            for file in _config_files(words):
                refuse_duplicate_keys(file)
            for word in words:
                if word.partition("=")[0] in FROM_DATA:
                    raise ValueError(f"{word}: the channels and classes of the network follow the data; leave it out")
            self.config = parser.parse_args(words)

    def _parse_ckpt_path(self) -> None:
        """Never let hyperparameters inside a checkpoint override the YAML."""

    def resolved(self) -> dict[str, Any]:
        """The parsed experiment, defaults included, as plain dicts and lists."""
        parser = self._parser(self.subcommand)
        return plain(parser, self.config[self.subcommand] if self.subcommand else self.config)

    # The objects.

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; a grid builds them in its cells instead."""
        self.grid = self._grid()
        if self.grid is None:
            try:
                with original_errors():
                    super().instantiate_classes()
            except MisconfigurationException as error:  # Lightning's word for a wrong value
                raise ValueError(str(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer, with checkpoints that are written atomically and, in a run's folder, its own logger."""
        config = self._get(self.config_init, "trainer")
        plugins = config.get("plugins") or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        if self.folder is not None:
            kwargs["default_root_dir"] = str(self.folder)
            if config.get("logger") in (None, True):
                kwargs["logger"] = TensorBoardLogger(self.folder.parent, self.folder.name, version="")
        return super().instantiate_trainer(**kwargs)

    def _grid(self) -> Grid | None:
        section = self._get(self.config, "grid") if self.subcommand == "fit" else None
        if section is None or isinstance(section, Grid):
            return section
        return Grid(**{key: section[key] for key in Grid.__dataclass_fields__})

    # The commands.

    def _run_subcommand(self, subcommand: str) -> None:
        checkpoint = self._get(self.config, "ckpt_path")
        if self.grid is not None and checkpoint is not None:
            raise ValueError(
                f"--ckpt_path {checkpoint}: the runs of a grid go on from their own {LAST}; to start from weights give "
                "--model.pretrained"
            )
        is_file = checkpoint is not None and checkpoint not in ("last", "best", "hpc", "registry")
        if is_file and "state_dict" not in read_checkpoint(checkpoint, map_location="meta"):
            raise ValueError(
                f"--ckpt_path {checkpoint}: weights alone, not a {LAST} of `fit`; give them to --model.pretrained"
            )
        if self.grid is None:
            # A checkpoint brings a head that `fit` trained, also where the config of that run once left one out.
            if subcommand != "fit" and checkpoint is None and getattr(self.model, "head_left_out", False):
                raise ValueError(
                    f"--model.pretrained {self.model.pretrained}: its classifier is for other classes than the data's, "
                    f"and model.drop_head leaves it out, so {subcommand} has none that is trained; give data of its "
                    f"classes, or train one with `fit` and give that run's {LAST} to --ckpt_path"
                )
            if subcommand != "fit" and checkpoint is None and getattr(self.model, "pretrained", None) is None:
                log.warning("%s uses untrained weights: give --ckpt_path results/.../last.ckpt", subcommand)
            super()._run_subcommand(subcommand)
        elif self.run_grid is None:
            raise ValueError("this config has a grid: section; run it with `python cli.py fit`")
        else:
            self.status = self.run_grid(self)

    def predict(self, model: pl.LightningModule, datamodule: pl.LightningDataModule, **kwargs: Any) -> None:
        """Write or print the classes of images."""
        kwargs["return_predictions"] = True
        batches = self.trainer.predict(model, datamodule=datamodule, **kwargs) or []
        probabilities = torch.cat([batch for batch in batches if isinstance(batch, torch.Tensor)])
        paths = [str(path) for path in datamodule.predict_dataset(datamodule.predict_paths).paths]  # type: ignore[attr-defined]
        names: list[str] = datamodule.class_names  # type: ignore[attr-defined]
        write_predictions(paths, probabilities, names, self._get(self.config, "output"))


def parse_experiment(cli: ExperimentCLI, config: dict[str, Any]) -> dict[str, Any]:
    """Parse a config of the sections that say what is trained, and return it with every default filled in.

    Args:
        cli: gives the parser.
        config: plain dicts and lists.

    Raises:
        ValueError: an unknown key, or a value of a wrong type.
    """
    parser = cli._parser(cli.subcommand)
    with readable_errors():
        return plain(parser, parser.parse_object(config))


def plain(parser: LightningArgumentParser, config: Namespace) -> dict[str, Any]:
    """The sections of a parsed config that say what is trained, defaults included, as plain dicts and lists."""
    text = parser.dump(config, format="yaml", skip_none=False, skip_link_targets=True, skip_validation=True)
    content = yaml.safe_load(text)
    return {key: content[key] for key in SECTIONS if key in content}


def with_default_recipe(args: list[str]) -> tuple[list[str], str | None]:
    """Complete the words of a command line by the digits recipe if no config has data.

    Args:
        args: the words after ``cli.py``.

    Returns:
        The words to parse, and the recipe's name: the stems of the config files after the first, joined by ``+``;
        None if there is no such file.
    """
    configs = [
        (index, word.partition("=")[2] if word.startswith("--config=") else args[index + 1])
        for index, word in enumerate(args)
        if word.startswith("--config=") or (word in ("--config", "-c") and index + 1 < len(args))
    ]
    files = [Path(value) for _, value in configs if _is_file(value)]
    with_data = [file for file in files if _has_data(file)]
    typed = [word for word in args if word == "--data" or word.startswith(("--data=", "--data.class_path"))]
    if files and not with_data and not typed:
        recipe = files[0].parent / DEFAULT_RECIPE
        if not recipe.is_file():  # a grid of one's own, somewhere else
            recipe = EXPERIMENTS / DEFAULT_RECIPE
        if recipe.is_file():
            log.info("no config has data: %s is added", recipe)
            first = configs[0][0]
            end = first + (1 if args[first].startswith("--config=") else 2)
            args = [*args[:end], "--config", str(recipe), *args[end:]]
            files.insert(1, recipe)
    return args, "+".join(file.stem for file in files[1:]) or None


def _config_files(args: list[str]) -> list[Path]:
    values = [word.partition("=")[2] for word in args if word.startswith("--config=")]
    values += [value for word, value in pairwise(args) if word in ("--config", "-c")]
    return [Path(value) for value in values if _is_file(value)]


def refuse_duplicate_keys(file: Path) -> None:
    """Raise a ValueError for a key given twice in one mapping, of which YAML would silently keep the last.

    Raises:
        ValueError: names the file, the line and the key.
    """
    try:
        nodes = [yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)]
    except yaml.YAMLError:
        return  # the parser says what is wrong
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise ValueError(f"{file}, line {line}: {key.value!r} stands twice; rename or remove one of them")
                seen.add(str(key.value))
                nodes.append(value)


def write_predictions(paths: list[str], probabilities: torch.Tensor, names: list[str], output: str | None) -> None:
    """Write (CSV) or print (table) the likeliest class of each image with its probability, and the five likeliest.

    Args:
        paths: of the images.
        probabilities: (images, classes).
        names: of the classes.
        output: the CSV file, or None to print.
    """
    top, classes = probabilities.topk(min(5, probabilities.shape[1]))
    rows = []
    for path, values, indices in zip(paths, top.tolist(), classes.tolist(), strict=True):
        five = " ".join(f"{names[index]}:{value:.4f}" for index, value in zip(indices, values, strict=True))
        rows.append((path, names[indices[0]], f"{values[0]:.4f}", five))
    header = ("path", "class", "probability", "top5")
    if output is None:
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    file = Path(output)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([header, *rows])
    Console().print(f"{len(rows)} predictions in {file}")


def _seed(value: bool | int) -> int:
    if isinstance(value, bool):
        raise ValueError(f"seed_everything={value}: expected a whole number, such as 0; data and model follow it")
    return value


def _is_file(value: str) -> bool:
    try:
        return Path(value).is_file()
    except OSError:  # a whole config as one long word
        return False


def _has_data(file: Path) -> bool:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected sections such as model:, data: and trainer:, found {content!r}")
    return "data" in content


def quiet() -> None:
    """Silence what Lightning says on every start; warnings that a user can act on stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*exists and is not empty.*",
        ".*LeafSpec.*",
        ".*The dirpath has changed from.*",
        ".*have overridden `on_before_batch_transfer`.*",
    ):
        warnings.filterwarnings("ignore", message=message)
