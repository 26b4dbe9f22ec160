"""The other commands, the shipped YAML, and what the command line says to bad input."""

import csv
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from msv.data.pathfinder import LEVELS
from msv.experiment import ExperimentCLI, with_default_recipe
from msv.files import shipped_grids
from msv.models import MSVMamba

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "configs"
TINY = ["--config", str(CONFIGS / "grid.yaml"), "--config", str(CONFIGS / "quick.yaml")]
RECIPES = sorted((ROOT / "experiments" / "recipes").glob("*.yaml"))
GRIDS = shipped_grids()

spec = importlib.util.spec_from_file_location("cli", ROOT / "cli.py")
assert spec is not None
assert spec.loader is not None
cli = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cli)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process; returns its exit status, what it printed, and its errors."""

    def call(*words: str):
        monkeypatch.setattr(sys, "argv", ["cli.py", *words])
        monkeypatch.setenv("COLUMNS", "200")
        status = cli.main(list(words))
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


# What is shipped.

CELLS = {
    "ablate_scans": {
        "full_scans=0": 5_068_600, "full_scans=1": 4_790_200, "full_scans=2": 5_039_800, "full_scans=3": 5_289_400,
        "full_scans=4": 5_068_600,
    },
    "ablate_components": {
        "vmamba_nano": 4_435_288, "ms2d": 4_790_200, "ms2d_se": 5_329_336, "ms2d_se_ffn": 6_556_552,
        "msvmamba_nano": 6_864_136,
    },
    "compare_baseline": {
        "vmamba_nano": 4_435_288, "ms2d_paper_depth": 4_790_200, "ms2d_equal_depth": 4_196_632,
        "vmamba_deeper": 5_068_600,
    },
    "controls_components": {
        "vmamba_nano": 4_435_288, "ms2d": 4_790_200, "ms2d_se": 5_329_336, "ms2d_se_ffn": 6_556_552,
        "msvmamba_nano": 6_864_136, "ms2d_equal_depth": 4_196_632, "vmamba_deeper": 5_068_600,
        "ms2d_se_equal_depth": 4_659_736, "ms2d_ffn_equal_depth": 6_093_448, "ms2d_n1_equal_depth": 4_047_448,
        "msvmamba_equal_depth": 6_407_368,
        "vmamba_se": 4_898_392, "vmamba_ffn": 6_332_104, "vmamba_n1": 4_136_920,
    },
    "controls_scans": {
        "full_scans=0": 5_068_600, "full_scans=1": 4_790_200, "full_scans=2": 5_039_800, "full_scans=3": 5_289_400,
        "full_scans=4": 5_068_600, "full_scans=1,reset": 4_790_200, "full_scans=1,separate": 5_289_400,
        "full_scans=2,reset": 5_039_800, "full_scans=2,separate": 5_289_400,
        "full_scans=1,d_state=1": 4_604_728, "full_scans=1,d_state=4": 4_684_216, "full_scans=1,d_state=16": 5_002_168,
    },
    "pathfinder_scans": {
        "full_scans=0": 5_068_600, "full_scans=1": 4_790_200, "full_scans=2": 5_039_800, "full_scans=3": 5_289_400,
        "full_scans=4": 5_068_600, "vmamba_nano": 4_435_288, "vmamba_nano,no_recurrence": 3_616_984,
        "full_scans=1,no_recurrence": 4_299_832,
    },
}  # fmt: skip


class ResolvedError(Exception):
    """Carries the runs of a grid out of the command line."""


def runs_of(*configs: Path):
    from dataclasses import replace

    from msv.ablation.check import resolve_all

    def take(parsed: ExperimentCLI) -> int:
        raise ResolvedError(resolve_all(parsed, replace(parsed.grid, recipe=parsed.grid.recipe or parsed.recipe)))

    words = [word for path in configs for word in ("--config", str(path))]
    with pytest.raises(ResolvedError) as caught:
        ExperimentCLI(args=["fit", *words], run_grid=take)
    return caught.value.args[0]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda path: path.stem)
def test_every_cell_of_every_grid_is_the_papers(grid):
    runs = runs_of(grid)
    assert {run.recipe for run in runs} == {"digits"}
    sizes = {}
    for run in runs:
        config = run.config["model"]["init_args"]["network"]
        module, _, name = config["class_path"].rpartition(".")
        with torch.device("meta"):
            network = getattr(sys.modules[module], name)(3, 1000, **config["init_args"])
        sizes[run.cell.name] = sum(p.numel() for p in network.parameters())
    assert sizes == CELLS[grid.stem]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("grid", GRIDS[:1], ids=lambda path: path.stem)
def test_every_recipe_leaves_the_architecture_alone(grid, recipe):
    plain = {run.cell.name: run.config["model"]["init_args"]["network"] for run in runs_of(grid)}
    runs = runs_of(grid, recipe)
    assert {run.recipe for run in runs} == {recipe.stem}
    for run in runs:
        network = run.config["model"]["init_args"]["network"]
        free = {"drop_path_rate", "ffn_drop_rate"}
        same = {key: value for key, value in network["init_args"].items() if key not in free}
        assert same == {key: plain[run.cell.name]["init_args"][key] for key in same}
    assert "model" in yaml.safe_load(recipe.read_text())
    assert "grid" not in yaml.safe_load(recipe.read_text())


def test_the_recipe_is_searched_for_around_itself_without_a_test():
    search, recipe = (ROOT / "experiments" / name for name in ("search_recipe.yaml", "recipes/fashion_mnist.yaml"))
    runs = runs_of(search)
    assert {(run.recipe, run.tested) for run in runs} == {("fashion_mnist", False)}
    assert len(runs) == 12 * 2
    (base, *_) = (run.config for run in runs if run.cell.name == "lr=0.001,batch_size=128")
    (frozen,) = (run.config for run in runs_of(ROOT / "experiments" / "compare_baseline.yaml", recipe)
                 if run.cell.name == "vmamba_nano")  # fmt: skip
    # What is searched around is the recipe, but for its length.
    assert dict(flat(base)).items() ^ dict(flat(frozen)).items() == {
        ("trainer.max_epochs", 8), ("trainer.max_epochs", 30),
        ("model.init_args.warmup_epochs", 1), ("model.init_args.warmup_epochs", 3),
    }  # fmt: skip
    searched = {"lr", "weight_decay", "drop_path_rate", "max_shift", "mixup", "cutmix", "batch_size"}
    assert set(runs[0].cell.toggles) == searched


def flat(config, prefix=""):
    """The leaves of a config by dotted key."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value) if isinstance(value, list) else value


@pytest.mark.parametrize("size", [64, 128])
def test_the_difficulty_is_searched_for_without_a_test(size):
    recipe = ROOT / "experiments" / "recipes" / f"pathfinder_{size}.yaml"
    runs = runs_of(ROOT / "experiments" / "search_difficulty.yaml", recipe)
    assert {run.recipe for run in runs} == {recipe.stem}
    assert {run.config["data"]["init_args"]["image_size"] for run in runs} == {size}
    assert not any(run.tested for run in runs)
    found = {}
    for run in runs:
        network = run.config["model"]["init_args"]["network"]["init_args"]
        found.setdefault(run.config["data"]["init_args"]["difficulty"], []).append(network)
    assert sorted(found) == list(LEVELS)
    # The very networks that the grid compares afterwards.
    compared = {run.cell.name: run.config for run in runs_of(ROOT / "experiments" / "pathfinder_scans.yaml", recipe)}
    names = ("vmamba_nano", "vmamba_nano,no_recurrence")
    networks = [compared[name]["model"]["init_args"]["network"]["init_args"] for name in names]
    assert all(pair == networks for pair in found.values())


def test_a_difficulty_has_results_of_its_own_by_the_recipes_name(run):
    files = [ROOT / "experiments" / name for name in ("pathfinder_scans.yaml", "recipes/pathfinder_64.yaml")]
    words = ["fit", *(word for file in files for word in ("--config", str(file)))]
    words += ["--grid.dry_run", "true", "--grid.only", "[full_scans=1]"]
    seen = []
    for more in ([], ["--data.difficulty", "4", "--grid.recipe", "pathfinder_64_d4"]):
        status, out, _ = run(*words, *more)
        assert status == 0
        seen.append(re.search(r"results/pathfinder_scans/(\w+)/full_scans=1/", out)[1])
    assert seen == ["pathfinder_64", "pathfinder_64_d4"]


def test_train_is_a_grid_of_one_run():
    (run,) = runs_of(ROOT / "experiments" / "train.yaml")
    assert (run.grid, run.cell.name) == ("train", "run")


@pytest.mark.parametrize(
    ("words", "names", "recipe"),
    [
        (["a.yaml"], ["a.yaml", "recipes/digits.yaml"], "digits"),
        (["a.yaml", "b.yaml"], ["a.yaml", "recipes/digits.yaml", "b.yaml"], "digits+b"),
        (["a.yaml", "data.yaml"], ["a.yaml", "data.yaml"], "data"),
        (["a.yaml", "data.yaml", "b.yaml"], ["a.yaml", "data.yaml", "b.yaml"], "data+b"),
    ],
)
def test_default_recipe(tmp_path, words, names, recipe):
    (tmp_path / "recipes").mkdir()
    for name in ("a.yaml", "b.yaml", "data.yaml", "recipes/digits.yaml"):
        (tmp_path / name).write_text("data: {}" if name in ("data.yaml", "recipes/digits.yaml") else "model: {}")
    typed = ["fit"] + [word for name in words for word in ("--config", str(tmp_path / name))]
    completed, found = with_default_recipe(typed)
    assert [str(Path(word).relative_to(tmp_path)) for word in completed[2::2]] == names
    assert found == recipe


def test_no_recipe_is_added_where_data_is_typed():
    words = ["fit", "--config", str(CONFIGS / "grid.yaml"), "--data", "msv.data.Digits"]
    assert with_default_recipe(words) == (words, None)


# validate, test, predict.


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Folder of a plain fit, without a grid: its config and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    config = yaml.safe_load((CONFIGS / "grid.yaml").read_text())
    del config["grid"]
    (folder / "plain.yaml").write_text(yaml.safe_dump(config))
    words = ["fit", "--config", str(folder / "plain.yaml"), "--config", str(CONFIGS / "quick.yaml"),
             "--trainer.default_root_dir", str(folder), "--trainer.max_epochs", "2"]  # fmt: skip
    assert cli.main(words) == 0
    (checkpoint,) = folder.rglob("*.ckpt")
    checkpoint.rename(folder / "last.ckpt")
    return folder


def with_weights(trained: Path, command: str, *words: str) -> list[str]:
    return [command, "--config", str(trained / "plain.yaml"), "--config", str(CONFIGS / "quick.yaml"),
            "--trainer.logger", "false", "--ckpt_path", str(trained / "last.ckpt"), *words]  # fmt: skip


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluate(run, trained, command):
    status, out, err = run(*with_weights(trained, command))
    assert status == 0, err
    assert re.search(rf"{command[:3] if command == 'validate' else 'test'}_top1", out)


def test_hyperparameters_in_a_checkpoint_do_not_override_the_yaml(run, trained, tmp_path):
    content = torch.load(trained / "last.ckpt", weights_only=True)
    content["hyper_parameters"] = {"lr": 123.0, "_class_path": "msv.tasks.Classification"}
    torch.save(content, tmp_path / "last.ckpt")
    words = ["test", *TINY, "--ckpt_path", str(tmp_path / "last.ckpt"), "--trainer.logger", "false"]
    parsed = ExperimentCLI(args=words)
    assert parsed.model.lr == 1e-3


def test_predict_writes_csv_and_prints(run, trained, tmp_path):
    for index in range(3):
        Image.new("L", (40, 32), color=index * 80).save(tmp_path / f"{index}.png")
    paths = f"[{tmp_path / '2.png'}, {tmp_path}]"
    words = with_weights(trained, "predict", "--data.predict_paths", paths)
    status, _, err = run(*words, "--output", str(tmp_path / "out" / "classes.csv"))
    assert status == 0, err
    rows = list(csv.DictReader((tmp_path / "out" / "classes.csv").open()))
    assert {Path(row["path"]).name for row in rows} == {"0.png", "1.png", "2.png"}
    for row in rows:
        five = dict(pair.rsplit(":", 1) for pair in row["top5"].split(" "))
        assert len(five) == 5
        assert max(five, key=lambda name: float(five[name])) == row["class"]
        assert float(row["probability"]) == float(five[row["class"]])
    status, out, _ = run(*words)
    assert status == 0
    assert "probability" in out
    assert "1.png" in out


def test_checkpoint_of_another_architecture(run, trained):
    status, _, err = run(*with_weights(trained, "test", "--model.network.depths", "[1,1,2,1]"))
    assert status == 2
    assert re.search(r"another architecture: \d+ missing: network.stages.2.blocks.1", err)


@pytest.fixture
def published(trained, tmp_path, to_published, save_as_published):
    """The averaged weights of the trained run in a file as published."""
    network = MSVMamba(1, 10, dims=(8, 16, 32, 64), depths=(1, 1, 1, 1))
    state = torch.load(trained / "last.ckpt", weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("network."): value for name, value in state.items()})
    return save_as_published(tmp_path / "published.pth", model_ema=to_published(network))


def from_weights(trained: Path, command: str, file: Path, *words: str) -> list[str]:
    return [command, "--config", str(trained / "plain.yaml"), "--config", str(CONFIGS / "quick.yaml"),
            "--trainer.logger", "false", "--model.pretrained", str(file), *words]  # fmt: skip


def test_published_and_converted_weights_give_the_same_numbers(run, trained, published, tmp_path):
    converted = tmp_path / "converted.safetensors"
    assert run("convert", str(published), str(converted))[0] == 0
    image = tmp_path / "image.png"
    Image.new("L", (40, 32), color=90).save(image)
    for command, words in (("validate", []), ("test", []), ("predict", ["--data.predict_paths", f"[{image}]"])):
        answers = [run(*with_weights(trained, command, *words))]
        answers += [run(*from_weights(trained, command, file, *words)) for file in (published, converted)]
        assert [status for status, _, _ in answers] == [0, 0, 0], answers
        assert answers[0][1] == answers[1][1] == answers[2][1]


def test_fit_starts_from_published_weights(run, trained, published, tmp_path):
    words = ["--trainer.max_epochs", "2", "--trainer.default_root_dir", str(tmp_path), "--ema.decay", "1"]
    status, _, err = run(*from_weights(trained, "fit", published, *words, "--ema.warmup", "false"))
    assert status == 0, err
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    found, expected = (torch.load(p, weights_only=True)["state_dict"] for p in (checkpoint, trained / "last.ckpt"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)  # decay 1: the average never moves


def test_an_unknown_preset_gives_the_nearest(run, trained):
    words = ["--model.network", "msv.models.TimmModel", "--model.network.name", "msvmamba_nan"]
    message = r"error: no model 'msvmamba_nan' in timm's registry; the nearest are msvmamba_nano"
    one_error(run(*with_weights(trained, "test", *words)), message)


def test_weights_alone_are_no_checkpoint_to_go_on_from(run, trained, published):
    words = ["--config", str(trained / "plain.yaml"), "--config", str(CONFIGS / "quick.yaml")]
    one_error(run("test", *words, "--ckpt_path", str(published)), r"weights alone.*give them to --model.pretrained")


def test_a_published_head_of_another_size(run, trained, tmp_path, to_published, save_as_published, caplog):
    network = MSVMamba(1, 7, dims=(8, 16, 32, 64), depths=(1, 1, 1, 1))
    file = save_as_published(tmp_path / "seven.pth", model=to_published(network))
    one_error(run(*from_weights(trained, "test", file)), r"misshapen classifier.head.weight .*--model.drop_head true")
    drop = ["--model.drop_head", "true"]
    words = ["--trainer.max_epochs", "1", "--model.warmup_epochs", "0", "--trainer.default_root_dir", str(tmp_path)]
    assert run(*from_weights(trained, "fit", file, *drop, *words))[0] == 0
    assert "classifier.head.weight (7, 64) is left out" in caplog.text
    image = tmp_path / "image.png"
    Image.new("L", (40, 32), color=90).save(image)
    for command, more in (("validate", []), ("test", []), ("predict", ["--data.predict_paths", f"[{image}]"])):
        message = rf"seven.pth: its classifier is for other classes than the data's.* so {command} has none .* `fit`"
        one_error(run(*from_weights(trained, command, file, *drop, *more)), message)
        with_head = ["--ckpt_path", str(trained / "last.ckpt")]  # as with the config of a run that was fine-tuned
        assert run(*from_weights(trained, command, file, *drop, *more, *with_head))[0] == 0


def test_validating_weights_of_as_many_classes_may_name_drop_head(run, trained, published):
    assert run(*from_weights(trained, "validate", published, "--model.drop_head", "true"))[0] == 0


def test_print_config_is_the_whole_experiment(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["fit", *TINY, "--print_config"])
    assert not left.value.code
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["init_args"]["network"]["init_args"]["full_scans"] == 1
    assert config["grid"]["axes"] == {"model.init_args.network.init_args.full_scans": [0, 1, 4]}


@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"]])
def test_help_is_quiet(words):
    done = subprocess.run([sys.executable, str(ROOT / "cli.py"), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "eprecat" not in done.stdout
    assert "usage" in done.stdout


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for name, (module, what) in cli.COMMANDS.items():
        assert f"{name} ({what})" in told
        assert callable(importlib.import_module(module).main)


@pytest.mark.parametrize("command", ["tables", "keep"])
def test_there_is_nothing_to_make_tables_of_or_to_keep(run, tmp_path, command):
    one_error(run(command, "--results", str(tmp_path)), r"no grid has results in .*run one first")
    assert list(tmp_path.iterdir()) == []


# Bad input.

NETWORK = "model.init_args.network.init_args"
BAD_WORDS = [
    (["--model.lr", "fast"], r"model.init_args.lr: 'fast' given, expected float"),
    (["--trainer.max_epochz", "3"], r"unknown option --trainer.max_epochz; did you mean --trainer.max_epochs"),
    (["--data", "Digitz"], r"Digitz"),
    (["--config", "nope.yaml"], r"nope.yaml"),
    (["--grid.rerun", "maybe"], r"grid.rerun: 'maybe' given, expected one of 'failed', 'all', 'none'"),
    (["--grid.seeds", "[0, 0]"], r"seeds.* 0 twice"),
    (["--grid.baseline", "full_scans=2"], r"baseline 'full_scans=2' is no cell"),
    (["--grid.only", '["full_scans=9"]'], r"only names 'full_scans=9'"),
    (["--trainer.max_epochs", "0"], r"max_epochs=0.*from 1 up"),
    (["--model.warmup_epochs", "9"], r"warmup_epochs=9 leaves none of trainer.max_epochs=3"),
    (["--model.global_batch_size", "100"], r"global_batch_size=100 is no multiple of data.batch_size=32"),
    (["--data.batch_size", "2000"], r"batch_size=2000 is more than the 1077 training images"),
    (["--data.image_size", "16"], r"image_size"),
    (["--trainer.accelerator", "nothing"], r"nothing"),
    (["--data", "msv.data.ImageFolder", "--data.root", "/nowhere"], r"/nowhere"),
    (["--model.pretrained", "nope.pth"], r"nope.pth: no such"),
]  # fmt: skip
BAD_YAML = [
    ({"trainer": {"max_epochz": 3}}, r"unknown key trainer.max_epochz; did you mean trainer.max_epochs"),
    ({"trainer": {"max_epochs": "many"}}, r"trainer.max_epochs: 'many' given, expected int or null"),
    ({"model": {"init_args": {"network": {"init_args": {"fullscans": 3}}}}},
     rf"unknown key {NETWORK}.fullscans; did you mean full_scans"),
    ({"model": {"init_args": {"network": {"init_args": {"full_scans": "two"}}}}},
     rf"{NETWORK}.full_scans: 'two' given, expected int"),
    ({"model": {"init_args": {"network": {"class_path": "msv.models.MSVMambo"}}}}, r"there is no msv.models.MSVMambo; "
     "did you mean msv.models.MSVMamba"),
    ({"grid": {"axes": {f"{NETWORK}.full_scan": [1]}, "baseline": None}},
     rf"{NETWORK}.full_scan' matches nothing .*{NETWORK}.full_scans"),
    ({"grid": {"axes": {f"{NETWORK}.full_scans": [1, 5]}}}, r"cell full_scans=5: .*full_scans"),
    ({"grid": {"axes": {f"{NETWORK}.d_state": [0, 8]}, "baseline": None}}, r"cell d_state=0: .*d_state"),
    ({"grid": {"axes": {f"{NETWORK}.full_scans": []}}}, r"axis .*is empty"),
    ({"grid": {"axes": {}}}, r"grid 'tiny' is empty"),
    ({"grid": {"cells": {"full_scans=1": {}}}}, r"two cells are named 'full_scans=1'"),
    ({"ema": {"decay": 2}}, r"ema.decay=2.*from 0 to 1"),
    ("just text", r"expected sections such as model:, data: and trainer:, found 'just text'"),
    ("a: [1", r"is no valid YAML"),
]  # fmt: skip


def one_error(answer: tuple[int, str, str], message: str) -> None:
    status, _, err = answer
    assert status == 2, answer
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert re.search(message, err), err


@pytest.mark.parametrize(("words", "message"), BAD_WORDS, ids=[words[0].strip("-") for words, _ in BAD_WORDS])
def test_bad_words(run, tmp_path, words, message):
    one_error(run("fit", *TINY, "--grid.results", str(tmp_path / "results"), *words), message)
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not list(tmp_path.rglob("record.json"))


@pytest.mark.parametrize(("content", "message"), BAD_YAML, ids=[str(index) for index in range(len(BAD_YAML))])
def test_bad_yaml(run, tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    words = ["--config", str(path), "--grid.results", str(tmp_path / "results")]
    one_error(run("fit", *TINY, *words), message)
    assert not list(tmp_path.rglob("record.json"))


def test_all_bad_cells_are_named_together(run, tmp_path):
    path = tmp_path / "bad.yaml"
    cells = {"one": {f"{NETWORK}.d_state": 0}, "two": {f"{NETWORK}.dims": "wide"}, "three": {f"{NETWORK}.se": "maybe"}}
    path.write_text(yaml.safe_dump({"grid": {"cells": cells}}))
    status, _, err = run("fit", *TINY, "--config", str(path), "--grid.results", str(tmp_path / "results"))
    assert status == 2
    assert "2 cells of grid 'tiny' cannot run" in err
    assert re.search(r"two: .*dims: 'wide' given", err)
    assert re.search(r"three: .*se: 'maybe' given, expected bool", err)


def test_a_file_in_the_place_of_the_results(run, tmp_path):
    (tmp_path / "results").write_text("mine")
    one_error(run("fit", *TINY, "--grid.results", str(tmp_path / "results")), r"results is a file, expected a folder")


def test_no_space_for_results(run, tmp_path, monkeypatch):
    from types import SimpleNamespace

    import msv.ablation.grid

    monkeypatch.setattr(msv.ablation.grid, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    one_error(run("fit", *TINY, "--grid.results", str(tmp_path / "results")), r"no space for results .*1 MB free")


@pytest.mark.parametrize("words", [["cell"], ["cell", "/nowhere"], ["nonsense"], ["tables", "--results", "/nowhere"],
                                   ["compare", "--weights", "/nowhere", "--data-root", "/nowhere"]])  # fmt: skip
def test_bad_commands(run, words):
    try:
        status, _, err = run(*words)
    except SystemExit as left:  # argparse, for the commands that have their own
        assert left.code == 2
    else:
        assert status == 2
        assert err.startswith("error: ")


def test_profile(run):
    status, out, _ = run("profile", "--model", "msvmamba_nano", "--image_size", "64", "--json")
    assert status == 0
    assert json.loads(out)["params"] == 6_864_136
