"""`convert`: published files made into what timm's checkpoint_path loads, and everything it refuses."""

from argparse import Namespace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from msv.models import PRESETS, MSVMamba, load_published
from msv.models.convert import _preset, convert, main
from msv.models.published import infer_arguments

SMALL = {"dims": (8, 16, 32, 64), "depths": (1, 1, 2, 1), "d_state": 2, "num_classes": 10}


@pytest.fixture
def nano(tmp_path, to_published, save_as_published):
    """A published file of msvmamba_nano whose `model` and `model_ema` differ, and the network of `model_ema`."""
    network = timm.create_model("msvmamba_nano").eval()
    averaged = to_published(network)
    raw = {name: value + 1 for name, value in averaged.items()}
    return save_as_published(tmp_path / "nano.pth", model=raw, model_ema=averaged), network


@pytest.fixture
def small(tmp_path, make_small, to_published):
    """A file of small published weights, which are no preset's."""
    torch.save({"model": to_published(make_small())}, tmp_path / "small.pth")
    return tmp_path / "small.pth"


def test_from_the_published_file_to_timm(nano, tmp_path, capsys):
    file, network = nano
    out = tmp_path / "new" / "out.safetensors"
    assert main([str(file), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "6,864,136 parameters from 267 tensors of model_ema" in printed
    assert f'timm.create_model("msvmamba_nano", checkpoint_path="{out}")' in printed
    loaded = timm.create_model("msvmamba_nano", checkpoint_path=str(out)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in network.state_dict().items())
    again = timm.create_model("msvmamba_nano")
    load_published(again, file)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in loaded.items())
    with safe_open(out, "pt") as opened:
        assert opened.metadata()["model"] == "msvmamba_nano"
        assert opened.metadata()["weights"] == "model_ema"
    assert [path.name for path in out.parent.iterdir()] == ["out.safetensors"]


def test_which_weights(nano, tmp_path):
    file, network = nano
    assert convert(file, tmp_path / "out.safetensors", "msvmamba_nano", "model").weights == "model"
    loaded = timm.create_model("msvmamba_nano", checkpoint_path=str(tmp_path / "out.safetensors"))
    assert torch.equal(loaded.norm.weight, network.norm.weight + 1)


def test_what_is_there_is_kept_unless_forced(small, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match=r"out.safetensors exists; .*--force"):
        main([str(small), str(out)])
    assert out.read_text() == "mine"
    assert main([str(small), str(out), "--force"]) == 0
    assert timm.create_model("msvmamba_nano", checkpoint_path=str(out), **SMALL).num_classes == 10


def test_a_failed_write_leaves_the_old_file(small, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    out.write_text("mine")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"could not write .*No space left"):
        convert(small, out, force=True)
    assert out.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"small.pth", "out.safetensors"}


def test_an_architecture_that_is_no_preset(small, tmp_path, capsys):
    assert main([str(small), str(tmp_path / "out.safetensors")]) == 0
    assert "no preset has this architecture: MSVMamba(in_chans=3, num_classes=10, dims=(8, 16, 32, 64)" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_is_known_by_its_shapes(preset, tmp_path, to_published):
    with torch.device("meta"):
        published = to_published(timm.create_model(preset, num_classes=7, in_chans=1))
    arguments = infer_arguments(published)
    assert _preset(arguments) == preset
    assert (arguments["num_classes"], arguments["in_chans"]) == (7, 1)


def test_the_head_of_a_fine_tuned_file(tmp_path, to_published, capsys):
    network = timm.create_model("msvmamba_nano", num_classes=7)
    torch.save(to_published(network), tmp_path / "seven.pth")
    main([str(tmp_path / "seven.pth"), str(tmp_path / "out.safetensors"), "--model", "msvmamba_nano"])
    assert 'timm.create_model("msvmamba_nano", num_classes=7, checkpoint_path=' in capsys.readouterr().out


def test_weights_that_are_not_finite_are_named(small, tmp_path, caplog):
    content = torch.load(small, weights_only=True)
    content["model"]["classifier.head.bias"][3] = torch.nan
    torch.save(content, small)
    assert convert(small, tmp_path / "out.safetensors").not_finite == ("classifier.head.bias",)
    assert "classifier.head.bias (1 of 10)" in caplog.text


REFUSED = {
    "unknown-preset": (
        ["--model", "msvmamba_nan"],
        r"--model msvmamba_nan: no such preset; did you mean msvmamba_nano",
    ),
    "no-preset-near": (["--model", "%%%"], r"--model %%%: no such preset; expected one of msvmamba_nano, "),
    "other-preset": (["--model", "vmamba_tiny"], r"does not fit this network: .*layers.0.blocks.0.*the weights look"),
    "no-such-weights": (["--weights", "model_ema"], r"has no 'model_ema'; expected one of model"),
}


@pytest.mark.parametrize("words, message", REFUSED.values(), ids=REFUSED)
def test_refused(small, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        main([str(small), str(tmp_path / "out.safetensors"), *words])
    assert not (tmp_path / "out.safetensors").exists()


def test_files_that_are_refused(small, tmp_path, make_small):
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"out.pth: expected a name that ends in .safetensors"):
        convert(small, tmp_path / "out.pth")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing.pth"):
        convert(tmp_path / "nothing.pth", out)
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    with pytest.raises(ValueError, match=r"page.pth cannot be read as a checkpoint"):
        convert(tmp_path / "page.pth", out)
    (tmp_path / "cut.pth").write_bytes(small.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut.pth cannot be read .*truncated"):
        convert(tmp_path / "cut.pth", out)
    content = torch.load(small, weights_only=True)
    del content["model"]["layers.1.blocks.0.op.Ds"]
    torch.save(content, tmp_path / "hole.pth")
    with pytest.raises(ValueError, match=r"missing layers.1.blocks.0.op.Ds"):
        convert(tmp_path / "hole.pth", out)
    convert(small, out)
    with pytest.raises(ValueError, match=r"this project's own naming"):
        convert(out, tmp_path / "again.safetensors")
    torch.save({"state_dict": {f"network.{k}": v for k, v in make_small().state_dict().items()}}, tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match=r"this project's own naming"):
        convert(tmp_path / "own.ckpt", tmp_path / "again.safetensors")


# What timm says of a file as published.


@pytest.mark.parametrize("kind", ["with-yacs", "plain", "state-dict"])
def test_timm_given_a_raw_file_names_convert(tmp_path, make_small, to_published, save_as_published, kind):
    file = tmp_path / "raw.pth"
    published = to_published(make_small())
    if kind == "with-yacs":
        save_as_published(file, model=published)
    else:
        torch.save({"model": published} if kind == "plain" else published, file)
    with pytest.raises(
        ValueError, match=r"raw.pth is a published checkpoint.*cli.py convert .*raw.pth msvmamba_nano.saf"
    ):
        timm.create_model("msvmamba_nano", checkpoint_path=file, **SMALL)


def test_timm_keeps_its_own_files_and_errors(tmp_path, make_small):
    torch.save({"state_dict": make_small().state_dict()}, tmp_path / "own.pth")
    loaded = timm.create_model("msvmamba_nano", checkpoint_path=tmp_path / "own.pth", **SMALL)
    assert isinstance(loaded, MSVMamba)
    torch.save({"state_dict": make_small().state_dict(), "args": Namespace(lr=1)}, tmp_path / "timms.pth")
    assert isinstance(timm.create_model("msvmamba_nano", checkpoint_path=tmp_path / "timms.pth", **SMALL), MSVMamba)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing.pth: no such file"):
        timm.create_model("msvmamba_nano", checkpoint_path=tmp_path / "nothing.pth", **SMALL)


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "text.pth",
            b"Not found",
            r"text.pth cannot be read as a checkpoint of weights: expected a file that torch",
        ),
        ("torn.pth", None, r"torn.pth cannot be read .* truncated or damaged \([\d,]+ bytes\); get it again"),
        ("torn.safetensors", b"PK", r"torn.safetensors cannot be read .* truncated or damaged \(2 bytes\)"),
    ],
)
def test_timm_given_a_damaged_file_names_it(tmp_path, make_small, name, content, message):
    if content is None:
        torch.save(make_small().state_dict(), tmp_path / name)
        content = (tmp_path / name).read_bytes()[:-3000]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        timm.create_model("msvmamba_nano", checkpoint_path=tmp_path / name, **SMALL)


@pytest.mark.parametrize("name", ["own.safetensors", "own.pth"])
def test_timm_given_weights_that_are_not_finite_warns(tmp_path, make_small, caplog, name):
    network = make_small()
    with torch.no_grad():
        network.norm.weight[2] = torch.nan
    (save_file if name.endswith("safetensors") else torch.save)(network.state_dict(), tmp_path / name)
    timm.create_model("msvmamba_nano", checkpoint_path=tmp_path / name, **SMALL)
    assert f"{name}: NaN or infinite weights in 1 tensor(s): norm.weight (1 of 64)" in caplog.text
