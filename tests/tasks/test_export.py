"""`python cli.py export`: which network a word stands for, the files made of it, and what is refused."""

import onnxruntime
import pytest
import torch
import yaml
from safetensors.torch import save_file

from msv.models import MSVMamba
from msv.models.convert import convert
from msv.tasks.export import load_network, main

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


# The files.


def test_both_files(published, network, tmp_path, capsys):
    images = torch.randn(3, 1, 96, 160)
    with torch.no_grad():
        expected = network(images)
    for name in ("net.onnx", "net.pt2"):
        assert main([str(published), str(tmp_path / name), "--size", "128", "96"]) == 0
        printed = capsys.readouterr().out
        assert f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters" in printed
        assert "images (B, 1, H, W), sides in multiples of 32" in printed
        assert "run with (2, 1, 128, 96): off by " in printed
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (logits,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-5)
    program = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(program(images), expected, rtol=0, atol=1e-5)


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
