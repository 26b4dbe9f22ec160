"""The profile command: what it prints for machines and for readers, and what it refuses."""

import json

import pytest

from msv.profiling import main


def test_json_of_one_model(capsys):
    assert main(["--model", "msvmamba_nano", "--image_size", "224", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "msvmamba_nano"
    assert (found["image_size"], found["in_chans"], found["num_classes"]) == (224, 3, 1000)
    assert found["params"] == 6_864_136
    assert round(found["gflops_fvcore"], 3) == 0.883
    assert found["gflops"] > found["gflops_fvcore"]
    for key in ("params", "gflops_fvcore", "gflops"):
        assert sum(part[key] for part in found["parts"].values()) == pytest.approx(found[key])


def test_json_of_several_models_as_asked(capsys):
    options = ["--image_size", "64", "--in_chans", "1", "--num_classes", "10", "--json"]
    assert main(["--model", "vmamba_nano", "msvmamba_nano", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["model"] for entry in found] == ["vmamba_nano", "msvmamba_nano"]
    for entry, params in zip(found, (4_435_288, 6_864_136), strict=True):
        assert (entry["image_size"], entry["in_chans"], entry["num_classes"]) == (64, 1, 10)
        assert entry["params"] == params - 990 * 385 - 2 * 16 * 48  # a smaller head and stem


def test_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["--model", "msvmamba_nano"]) == 0
    text = capsys.readouterr().out
    for shown in ("msvmamba_nano", "6,864,136", "0.883", "GFLOPs (paper)", "GFLOPs (plain)", "224×224", "1000 classes"):
        assert shown in text
    for part in ("stem", "scans", "convolutions", "projections", "norms", "downsampling", "head"):
        assert part in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "msvmamba_nan"], "no model 'msvmamba_nan' in timm's registry; the nearest are msvmamba_nano"),
        (["--model", "msvmamba_nano", "--image_size", "31"], "--image_size is 31; expected 32 or more"),
        (["--model", "msvmamba_nano", "--in_chans", "0"], "in_chans is 0; expected 1 or more"),
        (["--model", "msvmamba_nano", "--num_classes", "-1"], "num_classes is -1; expected 0 or more"),
    ],
    ids=["model", "image_size", "in_chans", "num_classes"],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(arguments)


def test_a_size_that_is_no_number_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--image_size", "big"])
    assert stopped.value.code == 2
    assert "--image_size" in capsys.readouterr().err
