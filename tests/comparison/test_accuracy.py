import csv
import io

import pytest
import timm
import torch
from safetensors.torch import save_file

from msv.comparison import accuracy
from msv.comparison.accuracy import Weights, data_config, evaluate, find_weights, load, store, validation_images
from msv.comparison.accuracy_plot import figure_1
from msv.comparison.accuracy_table import render_csv, render_markdown, table_1

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def regnety(tmp_path_factory):
    """A file of weights for timm's smallest network here."""
    path = tmp_path_factory.mktemp("weights") / "regnety_008.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("regnety_008").state_dict(), path)
    return path


def test_find_weights(tmp_path):
    folder = tmp_path / "more"
    folder.mkdir()
    for name in ("vmamba_tiny.pth", "swin_tiny.safetensors", "notes.txt", "mine", "more/msvmamba_nano.ckpt"):
        (tmp_path / name).touch()
    found = find_weights([str(tmp_path), str(folder), f"vmamba_base={tmp_path / 'mine'}"])
    assert [(entry.model, entry.path.name) for entry in found] == [
        ("vmamba_tiny", "vmamba_tiny.pth"), ("msvmamba_nano", "msvmamba_nano.ckpt"),
        ("swin_tiny_patch4_window7_224", "swin_tiny.safetensors"), ("vmamba_base", "mine"),
    ]  # fmt: skip
    assert [entry.model for entry in find_weights([str(tmp_path)], ["vmamba_tiny"])] == ["vmamba_tiny"]
    with pytest.raises(ValueError, match=r"--only vmamba_base: --weights has only swin_tiny_patch.*, vmamba_tiny;"):
        find_weights([str(tmp_path)], ["vmamba_base"])


@pytest.mark.parametrize(
    "files, word, error, message",
    [
        ([], "{}/nowhere", FileNotFoundError, "nowhere does not exist; give a folder or NAME=FILE"),
        ([], "vmamba_tiny={}/nowhere.pth", FileNotFoundError, "there is no file .*nowhere.pth"),
        ([], "{}", FileNotFoundError, "has no weights; expected files called by a model's name"),
        (["vmamba_tiny.pth"], "{}/vmamba_tiny.pth", FileNotFoundError, "is a file; say whose, as NAME=FILE"),
        (["vmamba-tiny.pth"], "{}", ValueError, "'vmamba-tiny' is no model .*did you mean vmamba_tiny"),
        (["convnext_tiny.pth"], "{}", ValueError, "'convnext_tiny' is no model of the comparison"),
        (["a.pth"], "vmamba_tine={}/a.pth", ValueError, "'vmamba_tine' is no model .*did you mean vmamba_tiny"),
        (["swin_tiny.pth", "swin_tiny.pt"], "{}", ValueError, "are both for swin_tiny_patch4_window7_224"),
    ],
)
def test_bad_weights(tmp_path, files, word, error, message):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(error, match=message):
        find_weights([word.format(tmp_path)])


def test_load_reads_every_form_of_a_file(regnety, tmp_path):
    state = torch.load(regnety, weights_only=True)
    own = {f"network.{name}": value for name, value in state.items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "author.pth")
    torch.save({"state_dict": own}, tmp_path / "ours.ckpt")
    save_file(state, tmp_path / "safe.safetensors")
    for path in (regnety, *sorted(tmp_path.iterdir())):
        found = load(Weights("regnety_008", path))
        assert not found.training
        assert all(value.equal(state[name]) for name, value in found.state_dict().items())


def test_load_of_a_network_of_this_project(tmp_path):
    network = timm.create_model("msvmamba_nano")
    torch.save(network.state_dict(), tmp_path / "a.pth")
    found = load(Weights("msvmamba_nano", tmp_path / "a.pth")).state_dict()
    assert all(value.equal(found[name]) for name, value in network.state_dict().items())
    network.reset_classifier(10)
    torch.save(network.state_dict(), tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b.pth has no classifier of 1000 classes"):
        load(Weights("msvmamba_nano", tmp_path / "b.pth"))


def test_load_refuses(regnety, tmp_path):
    state = torch.load(regnety, weights_only=True)
    (tmp_path / "cut.pth").write_bytes(regnety.read_bytes()[:1000])
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": 1}, tmp_path / "numbers.pth")
    torch.save({name: value for name, value in state.items() if name != "head.fc.bias"}, tmp_path / "part.pth")
    torch.save({"model": timm.create_model}, tmp_path / "code.pth")
    for name, message in {
        "cut": "cannot be read as weights", "list": "cannot be read", "numbers": "holds no state dict",
        "code": "cannot be read",
        "part": "does not fit regnety_008: .*head.fc.bias",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load(Weights("regnety_008", tmp_path / f"{name}.pth"))


def test_data_is_prepared_as_the_weights_were_published():
    ours, theirs = data_config("msvmamba_nano"), data_config("swin_tiny_patch4_window7_224")
    assert (ours["input_size"], ours["crop_pct"], ours["interpolation"]) == ((3, 224, 224), 0.875, "bicubic")
    assert (theirs["input_size"], theirs["crop_pct"]) == ((3, 224, 224), 0.9)
    assert data_config("regnety_040")["crop_pct"] == 0.875


def test_classes_are_imagenets():
    classes = accuracy.imagenet_classes()
    assert (len(classes), classes[0], classes[-1]) == (1000, "n01440764", "n15075141")


def test_bad_roots(imagenet, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder; expected .*val/n01440764/\*.JPEG"):
        validation_images(tmp_path / "nowhere", lambda image: image)
    with pytest.raises(FileNotFoundError, match=r"val has no folder val"):
        validation_images(imagenet / "val", lambda image: image)
    (imagenet / "val" / "n01443537").rename(imagenet / "val" / "tench")
    with pytest.raises(ValueError, match="lacks 1 classes, such as n01443537 and has 1 others, such as tench"):
        validation_images(imagenet, lambda image: image)


def test_evaluate_keeps_and_skips(imagenet, tmp_path, means, monkeypatch, where):
    path = tmp_path / "vmamba_tiny.pth"
    path.write_bytes(b"weights")
    monkeypatch.setattr(accuracy, "load", lambda weights: means)
    kept = store(tmp_path)

    def run(place=where, again=False):
        seen = []
        means.register_forward_hook(lambda *_: seen.append(1))
        weights = [Weights("vmamba_tiny", path)]
        (row,) = evaluate(weights, imagenet, CPU, kept, place, "a command", 4, 0, again)
        return row, len(seen)

    row, batches = run()
    assert batches == 2
    assert (row["model"], row["file"], row["top1"], row["images"]) == ("vmamba_tiny", path.name, "83.333", "6")
    assert (row["image_size"], row["crop_pct"], row["sha256"]) == ("224", "0.875", Weights("", path).sha256)
    assert kept.read() == [row]
    assert run() == (row, 0)
    assert run(again=True)[1] == 2
    assert run(where | {"commit": "another"})[1] == 2
    path.write_bytes(b"others")
    assert run(where | {"commit": "another"})[1] == 2
    assert len(kept.read()) == 1
    for commit in ("unknown", "0123456789ab+dirty"):  # nobody knows what has been changed between the two
        assert [run(where | {"commit": commit})[1] for _ in range(2)] == [2, 2]


def test_outputs_that_are_not_finite(means):
    torch.nn.init.constant_(means.scale, float("nan"))
    with pytest.raises(ValueError, match="outputs are not finite"):
        accuracy.accuracy(means, [(torch.ones(2, 3, 4, 4), torch.zeros(2, dtype=torch.long))], CPU)


# The table and the figure.


def kept_top1(folder, where, **columns):
    row = {"model": "vmamba_small", "file": "a.pth", "sha256": "0", "top1": "83.456", "images": 50_000}
    row |= {"image_size": 224, "crop_pct": 0.875, "interpolation": "bicubic", "precision": "float32", "command": ""}
    store(folder).put(row | columns, where)


def test_table_1_without_weights(tmp_path, where):
    rows = table_1(tmp_path)
    assert len(rows) == 21
    assert all(row.top1 is None for row in rows)
    page = render_markdown(rows, where)
    assert "none yet, since no weights were given" in page
    for system in ("ViM-T", "LocalVMamba-S", "EffVMamba-B"):
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {system} ")]
        assert "not in this project" in line
        assert line.count(" – |") == 3
    assert "which is `vmamba_small` here" in page
    lines = {line["system"]: line for line in csv.DictReader(io.StringIO(render_csv(rows, where)))}
    assert (lines["Swin-T"]["params_m"], lines["Swin-T"]["paper_params_m"]) == ("28.288", "29")
    assert (lines["ViM-T"]["params_m"], lines["ViM-T"]["torch"]) == ("", "")
    assert (lines["VMamba-B"]["params_m"], lines["VMamba-B"]["paper_params_m"]) == ("76.254", "")


def test_table_1_with_weights(tmp_path, where):
    kept_top1(tmp_path, where)
    kept_top1(tmp_path, where, model="vmamba_base", images=600)
    rows = table_1(tmp_path)
    assert {row.system.key: row.top1 for row in rows if row.top1} == {"vmamba_small": 83.456, "vmamba_base": 83.456}
    page = render_markdown(rows, where)
    (line,) = [line for line in page.splitlines() if line.startswith("| VMamba-S")]
    assert [cell.strip() for cell in line.split("|")][5:9] == ["83.46", "*44*", "*11.2*", "*83.5*"]
    assert "600 of 50,000" in page
    assert "a.pth (0)" in page


def test_figure_1(tmp_path, where):
    plain = figure_1(table_1())
    assert plain[:4] == b"\x89PNG"
    assert plain == figure_1(table_1(tmp_path))
    kept_top1(tmp_path, where)
    assert figure_1(table_1(tmp_path)) != plain
