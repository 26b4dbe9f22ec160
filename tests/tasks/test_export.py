"""`python cli.py export`: which network a word stands for, the files made of it, and what is refused."""

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from msv.models import MSVMamba
from msv.models.convert import convert
from msv.tasks.export import load_network, main, run

SMALL = {"dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "d_state": 2, "num_classes": 7, "in_chans": 1}


@pytest.fixture
def network():
    return MSVMamba(**SMALL).eval()


@pytest.fixture
def published(network, to_published, tmp_path):
    torch.save({"model": to_published(network)}, tmp_path / "published.pth")
    return tmp_path / "published.pth"


def same(network, other):
    images = torch.randn(1, network.in_chans, 32, 64)
    with torch.no_grad():
        return torch.equal(network(images), other(images))


def write_run(folder, network, class_path, arguments):
    """What `fit` leaves of a run: weights under `network.`, and the config."""
    folder.mkdir()
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": weights}, folder / "last.ckpt")
    config = {"network": {"class_path": class_path, "init_args": arguments}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": config}}))
    return folder / "last.ckpt"


# Which network.


def test_of_published_weights(network, published, tmp_path):
    assert same(load_network(str(published)), network)
    convert(published, tmp_path / "converted.safetensors")
    assert same(load_network(str(tmp_path / "converted.safetensors")), network)


def test_of_a_run(tmp_path):
    arguments = {**SMALL, "full_scans": 2, "carry_state": False}  # no tensor shows these
    network = MSVMamba(**arguments).eval()
    shown = {name: list(v) if isinstance(v, tuple) else v for name, v in arguments.items()}
    written = {**shown, "backend": "triton"}
    del written["num_classes"], written["in_chans"]
    assert same(load_network(str(write_run(tmp_path / "run", network, "msv.models.MSVMamba", written))), network)


def test_of_a_run_of_a_preset(tmp_path, network):
    rest = {"dims": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "d_state": 2}
    arguments = {"name": "msvmamba_nano", "model_args": rest}
    assert same(load_network(str(write_run(tmp_path / "run", network, "msv.models.TimmModel", arguments))), network)


def test_of_weights_with_a_preset(tmp_path):
    network = MSVMamba(num_classes=3).eval()
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    assert same(load_network(str(tmp_path / "own.safetensors"), "msvmamba_nano"), network)


def test_of_a_preset(caplog):
    assert sum(p.numel() for p in load_network("msvmamba_nano").parameters()) == 6_864_136
    assert "msvmamba_nano has untrained weights: give a file of weights" in caplog.text


def test_networks_that_are_refused(tmp_path, published, network):
    with pytest.raises(FileNotFoundError, match=r"msvmamba_nan is neither .* did you mean msvmamba_nano"):
        load_network("msvmamba_nan")
    with pytest.raises(FileNotFoundError, match=r"nothing.pth is neither a file of weights nor a preset; the presets"):
        load_network("nothing.pth")
    with pytest.raises(ValueError, match=r"--model msvmamba: no such preset; did you mean msvmamba_"):
        load_network(str(published), "msvmamba")
    with pytest.raises(ValueError, match=r"--model vmamba_nano: msvmamba_nano is a preset itself"):
        load_network("msvmamba_nano", "vmamba_nano")
    with pytest.raises(ValueError, match=r"published.pth does not fit this network"):
        load_network(str(published), "vmamba_tiny")
    torch.save(network.state_dict(), tmp_path / "alone.pth")
    with pytest.raises(ValueError, match=r"alone.pth does not say which network .*config.yaml beside it: give --model"):
        load_network(str(tmp_path / "alone.pth"))
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth holds weights of another network: it has fc.weight"):
        load_network(str(tmp_path / "other.pth"))
    run = write_run(tmp_path / "run", network, "msv.models.TimmModel", {"name": "swin_tiny_patch4_window7_224"})
    with pytest.raises(ValueError, match=r"its network is swin_tiny_patch4_window7_224; only MSVMamba"):
        load_network(str(run))


FOREIGN = {
    "empty": "",
    "text": "nothing of ours",
    "list": "- model",
    "no-yaml": "model: [",
    "no-network": "model: {init_args: {lr: 0.1}}",
    "no-class": "model: {init_args: {network: {init_args: {}}}}",
    "null": "model:",
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_a_config_of_something_else_is_refused(tmp_path, network, text):
    torch.save(network.state_dict(), tmp_path / "alone.pth")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config.yaml is not what `fit` writes: .* give --model with one of msvmamba"):
        load_network(str(tmp_path / "alone.pth"))


def test_a_config_with_other_arguments_is_refused(tmp_path, network):
    run = write_run(tmp_path / "run", network, "theirs.MSVMamba", {"dims": [8, 16, 32, 64], "width": 3})
    with pytest.raises(ValueError, match=r"config.yaml: MSVMamba has no width; .* give --model with one of msvmamba"):
        load_network(str(run))


# The files.


@pytest.fixture
def run_without_scans(tmp_path):
    """A run whose network is exported in a second or two; what becomes of scans, tests/models/test_export.py tells."""
    arguments = {**SMALL, "d_state": 1, "recurrence": False}
    torch.manual_seed(0)
    network = MSVMamba(**arguments).eval()
    written = {name: list(v) if isinstance(v, tuple) else v for name, v in arguments.items()}
    return write_run(tmp_path / "run", network, "msv.models.MSVMamba", written), network


@pytest.mark.parametrize("name", ["net.onnx", "net.pt2"])
def test_files(run_without_scans, tmp_path, capsys, name):
    checkpoint, network = run_without_scans
    assert main([str(checkpoint), str(tmp_path / name), "--size", "128", "96"]) == 0
    printed = capsys.readouterr().out
    assert f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters" in printed
    assert "images (B, 1, H, W), sides in multiples of 32" in printed
    assert "run with (2, 1, 128, 96): off by " in printed
    images = torch.randn(3, 1, 96, 160)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / name, images), network(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("factor", [1.01, torch.nan])
def test_a_file_that_is_off_is_an_error(run_without_scans, tmp_path, monkeypatch, factor):
    checkpoint, network = run_without_scans
    monkeypatch.setattr("msv.tasks.export.run", lambda path, images: network(images).detach() * factor)
    monkeypatch.setattr("msv.tasks.export.export_pt2", lambda *_: None)
    with pytest.raises(ValueError, match=r"net.pt2 is off by .*, more than 0.001 of the largest output: do not use it"):
        main([str(checkpoint), str(tmp_path / "net.pt2")])


def test_outputs_that_are_not_finite_are_not_exported(tmp_path):
    network = MSVMamba(**SMALL)
    with torch.no_grad():
        network.head.fc.bias[2] = torch.inf
    save_file(network.state_dict(), tmp_path / "infinite.safetensors", {"arguments": json.dumps(SMALL)})
    with pytest.raises(ValueError, match=r"infinite.safetensors: outputs of its network are not finite"):
        main([str(tmp_path / "infinite.safetensors"), str(tmp_path / "net.pt2")])
    assert not (tmp_path / "net.pt2").exists()


REFUSED = {
    "suffix": (["net.pt"], r"net.pt: expected a name that ends in .pt2 or .onnx"),
    "no-multiple": (["net.onnx", "--size", "100", "96"], r"height is 100; .* multiples of 32, from 32 up"),
    "too-small": (["net.pt2", "--size", "96", "64"], r"width is 64; .* multiples of 32, from 96 up"),
    "opset": (["net.onnx", "--opset", "17"], r"opset is 17; expected 18 or later"),
}


@pytest.mark.parametrize("words, message", REFUSED.values(), ids=REFUSED)
def test_files_that_are_refused(published, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        main([str(published), str(tmp_path / words[0]), *words[1:]])
    assert [path.name for path in tmp_path.iterdir()] == ["published.pth"]


def test_what_is_there_is_kept_unless_forced(published, tmp_path):
    (tmp_path / "net.pt2").write_text("mine")
    with pytest.raises(FileExistsError, match=r"net.pt2 exists; .*--force"):
        main([str(published), str(tmp_path / "net.pt2")])
    assert (tmp_path / "net.pt2").read_text() == "mine"
