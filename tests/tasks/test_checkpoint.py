"""Pretrained weights from published files, and what is wrong with files that are given as such."""

import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from msv.models import MSVMamba
from msv.tasks.checkpoint import load_pretrained

TINY = {"dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1)}


@pytest.fixture
def source():
    return MSVMamba(1, 10, **TINY)


def test_published_weights(tmp_path, source, to_published, save_as_published):
    file = save_as_published(tmp_path / "weights.pth", model_ema=to_published(source))
    network = MSVMamba(1, 10, **TINY)
    load_pretrained(network, file)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in network.state_dict().items())


def test_a_published_state_dict(tmp_path, source, to_published):
    torch.save(to_published(source), tmp_path / "weights.pth")
    network = MSVMamba(1, 10, **TINY)
    load_pretrained(network, tmp_path / "weights.pth")
    assert torch.equal(network.norm.weight, source.norm.weight)


def test_a_published_head_is_left_out_on_request(tmp_path, source, to_published, caplog):
    torch.save({"model": to_published(source)}, tmp_path / "weights.pth")
    network = MSVMamba(1, 5, **TINY)
    with pytest.raises(ValueError, match=r"misshapen classifier.head.weight \(10, 64\).*--model.drop_head true"):
        load_pretrained(network, tmp_path / "weights.pth")
    load_pretrained(network, tmp_path / "weights.pth", drop_head=True)
    assert "classifier.head.weight (10, 64) is left out" in caplog.text


def test_published_weights_in_another_network(tmp_path, source, to_published):
    torch.save({"model": to_published(source)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"published checkpoint of MSVMamba or VMamba, and the network is ResNet"):
        load_pretrained(timm.create_model("resnet10t"), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"does not fit this network: missing layers.2.blocks.1.*choose the preset"):
        load_pretrained(MSVMamba(1, 10, dims=TINY["dims"], depths=(1, 1, 2, 1)), tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_weights_of_another_model(tmp_path, source, name):
    other = timm.create_model("resnet10t").state_dict()
    (save_file if name.endswith("safetensors") else torch.save)(other, tmp_path / name)
    with pytest.raises(
        ValueError, match=r"another architecture: \d+ missing: stem.proj.weight.*unexpected: (bn1|conv1)"
    ):
        load_pretrained(source, tmp_path / name)


def test_another_projects_checkpoint_of_its_own_model(tmp_path):
    network = timm.create_model("resnet10t", num_classes=4)
    torch.save({"model": network.state_dict(), "epoch": 3}, tmp_path / "weights.pt")
    again = timm.create_model("resnet10t", num_classes=4)
    load_pretrained(again, tmp_path / "weights.pt")
    assert torch.equal(again.fc.weight, network.fc.weight)


@pytest.mark.parametrize("kind", ["own", "published"])
def test_weights_that_are_not_finite_are_named(tmp_path, source, to_published, caplog, kind):
    with torch.no_grad():
        source.norm.weight[2] = torch.nan
    torch.save(source.state_dict() if kind == "own" else to_published(source), tmp_path / "weights.pt")
    load_pretrained(MSVMamba(1, 10, **TINY), tmp_path / "weights.pt")
    assert ("norm.weight" if kind == "own" else "classifier.norm.weight") + " (1 of 64)" in caplog.text


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 torn", b"\x80\x02 torn"], ids=str)
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_files_that_are_no_checkpoints(tmp_path, source, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as a checkpoint"):
        load_pretrained(source, tmp_path / name)


class Calls:
    """Pickled, a call of a function, which a reader that trusts the file would make."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function, argument, name",
    [(os.system, "touch ran", r"(posix|nt)\.system"), (Path, "ran", r"pathlib\.\w+"), (eval, "1", r"eval")],
    ids=["blocked", "unknown", "builtin"],
)
def test_files_that_hold_code(tmp_path, monkeypatch, source, function, argument, name):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": source.state_dict(), "extra": Calls(function, argument)}, "weights.pth")
    with pytest.raises(ValueError, match=rf"weights.pth cannot be read .* it holds a {name} beside weights.*run code"):
        load_pretrained(source, "weights.pth")
    assert not Path("ran").exists()
