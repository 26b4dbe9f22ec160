"""The profile command: every number of the paper's models, the forms it prints, and what it refuses."""

import csv
import json
from decimal import Decimal

import pytest

from msv.ablation.paper import PAPER_ROWS
from msv.ablation.profiles import main

# Parameters to the unit, GFLOPs of the paper's convention to 0.001, what the paper prints, and which of it is alike.
PRESETS = {
    "msvmamba_nano": (6_864_136, "0.883", "6.9", True, "0.88", True, "Table 4: + N=1"),
    "msvmamba_micro": (11_879_272, "1.532", "11.9", True, "1.5", True, "Table 7"),
    "msvmamba_tiny": (33_046_312, "4.613", "33.0", True, "4.6", True, "Table 7"),
    "vmamba_nano": (4_435_288, "0.873", "4.4", True, "0.87", True, "Table 4: VMamba-Nano"),
    "vmamba_tiny": (22_893_448, "5.627", "22", False, "5.6", True, "Table 1: VMamba-T"),
    "vmamba_small": (44_417_416, "11.232", "44", True, "11.2", True, "Table 1: VMamba-B"),
    "vmamba_base": (76_254_056, "18.020", "", None, "", None, ""),
}
ROWS = {
    ("ablate_components", "VMamba-Nano"): (4_435_288, "0.873", "4.4", "0.87"),
    ("ablate_components", "+ MS2D (1/3)"): (4_790_200, "0.889", "4.8", "0.89"),
    ("ablate_components", "+ SE"): (5_329_336, "0.891", "5.3", "0.89"),
    ("ablate_components", "+ ConvFFN"): (6_556_552, "0.935", "6.6", "0.94"),
    ("ablate_components", "+ N=1"): (6_864_136, "0.883", "6.9", "0.88"),
    ("ablate_scans", "0/4"): (5_068_600, "0.740", "5.1", "0.74"),
    ("ablate_scans", "+ MS2D (1/3)"): (4_790_200, "0.889", "4.8", "0.89"),
    ("ablate_scans", "2/2"): (5_039_800, "0.998", "5.0", "1.00"),
    ("ablate_scans", "3/1"): (5_289_400, "1.107", "5.3", "1.11"),
    ("ablate_scans", "4/0"): (5_068_600, "1.193", "5.1", "1.19"),
}
NANO = ["msvmamba_nano", "--image_size", "64"]


def read(path):
    return list(csv.DictReader(path.open(encoding="utf-8")))


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The CSV of what the command shows unasked, with parts: total and parts of each model."""
    path = tmp_path_factory.mktemp("profile") / "all.csv"
    assert main(["--parts", "--out", str(path)]) == 0
    return read(path)


def test_every_preset_beside_the_paper(everything):
    found = {row["model"]: row for row in everything if (row["group"], row["part"]) == ("presets", "total")}
    assert found.keys() == PRESETS.keys()
    for name, (params, gflops, params_m, params_alike, paper, alike, source) in PRESETS.items():
        row = found[name]
        assert (int(row["params"]), f"{float(row['gflops_fvcore']):.3f}") == (params, gflops)
        assert (row["paper_params_m"], row["paper_gflops"], row["paper_source"]) == (params_m, paper, source)
        spoken = {True: "true", False: "false", None: ""}
        assert (row["paper_params_alike"], row["paper_gflops_alike"]) == (spoken[params_alike], spoken[alike])


@pytest.mark.parametrize("key", ROWS, ids=[" ".join(key) for key in ROWS])
def test_every_row_of_tables_4_and_5_beside_the_paper(everything, key):
    grid, name = key
    params, gflops, params_m, paper = ROWS[key]
    (row,) = [row for row in everything if row["group"] == grid and row["paper_source"].endswith(f": {name}")]
    assert (int(row["params"]), f"{float(row['gflops_fvcore']):.3f}") == (params, gflops)
    assert (row["paper_params_m"], row["paper_gflops"]) == (params_m, paper)
    assert (row["paper_params_alike"], row["paper_gflops_alike"]) == ("true", "true")


def test_no_row_of_the_paper_is_left_out():
    assert {name for _, name in ROWS} == {row.name for row in PAPER_ROWS}


def test_parts_add_up_to_the_unit(everything):
    for total in (row for row in everything if row["part"] == "total"):
        parts = [
            row for row in everything
            if (row["group"], row["model"]) == (total["group"], total["model"]) and row["part"] != "total"
        ]  # fmt: skip
        assert len(parts) == 10
        for column in ("params", "gflops_fvcore", "gflops"):
            assert sum(Decimal(row[column]) for row in parts) == Decimal(total[column])
        assert all(row["activations"] == row["paper_params_m"] == "" for row in parts)


def test_plain_flops_and_activations(everything):
    for row in (row for row in everything if row["part"] == "total"):
        assert float(row["gflops_fvcore"]) < float(row["gflops"]) < 2 * float(row["gflops_fvcore"])
        assert int(row["activations"]) > 0
        assert row["memory_bytes"] == ""


def test_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    assert main(["msvmamba_nano", "vmamba_tiny", "ablate_scans/full_scans=2"]) == 0
    text = capsys.readouterr().out
    for shown in ("6,864,136", "6.9 ✓", "0.883", "0.88 ✓", "22 ≠", "1.00 ✓", "Table 5: 2/2", "3×224×224, 1000 classes",
                  "Table 5: the rows of ablate_scans", "msvmamba_nano (presets) by part", "paper's way",
                  "plain", "activations,"):  # fmt: skip
        assert shown in text
    for part in ("stem", "scans", "convolutions", "projections", "norms", "se", "ffn", "downsampling", "head"):
        assert f"│ {part} " in text
    assert "training memory" not in text
    assert "vmamba_tiny: printed with 22M parameters, which is 22.9M cut short, not rounded." in text
    assert main(["msvmamba_nano", "--no-parts"]) == 0
    text = capsys.readouterr().out
    assert "by part" not in text
    assert "cut short" not in text


def test_names_and_numbers_stay_whole_on_a_narrow_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["msvmamba_micro", "vmamba_nano", "--no-parts"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) < 110
    for whole in ("msvmamba_micro", "11,879,272", "11.9 ✓", "VMamba-Nano"):
        assert f" {whole} │" in text


def test_models_by_option_as_by_name(capsys):
    assert main(["--model", *NANO]) == 0
    by_option = capsys.readouterr().out
    assert main(NANO) == 0
    assert capsys.readouterr().out == by_option


def test_the_papers_figures_stand_beside_its_own_setting_only(capsys):
    for words in (["--image_size", "64"], ["--size", "224", "256"], ["--num_classes", "10"], ["--in_chans", "1"]):
        assert main(["msvmamba_nano", *words]) == 0
        text = capsys.readouterr().out
        assert "paper: " not in text
        assert "arXiv" not in text


def test_markdown(capsys):
    assert main(["msvmamba_nano", "vmamba_base", "resnet18", "--format", "markdown", "--parts"]) == 0
    lines = capsys.readouterr().out.splitlines()
    presets, timm = lines.index("## Presets"), lines.index("## Models of timm")
    assert "*paper: params, M*" in lines[presets + 2]
    nano = next(line for line in lines if line.startswith("| msvmamba_nano "))
    assert [cell.strip() for cell in nano.strip("|").split("|")][1:5] == ["6,864,136", "*6.9 ✓*", "0.883", "*0.88 ✓*"]
    base = next(line for line in lines if line.startswith("| vmamba_base "))
    assert [cell.strip() for cell in base.strip("|").split("|")][2] == "–"
    assert "paper: " not in lines[timm + 2]
    assert "## resnet18 (timm) by part" in lines


def test_json_of_one_model(capsys):
    assert main(["--model", "msvmamba_nano", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "msvmamba_nano"
    assert (found["in_chans"], found["height"], found["width"], found["num_classes"]) == (3, 224, 224, 1000)
    assert found["params"] == 6_864_136
    assert round(found["gflops_fvcore"], 3) == 0.883
    assert found["gflops"] > found["gflops_fvcore"]
    assert (found["paper_gflops"], found["paper_gflops_alike"]) == ("0.88", True)
    for key in ("params", "gflops_fvcore", "gflops"):
        assert sum(part[key] for part in found["parts"].values()) == pytest.approx(found[key])


def test_json_of_several_models_as_asked(capsys):
    options = ["--size", "64", "96", "--in_chans", "1", "--num_classes", "10", "--format", "json"]
    assert main(["vmamba_nano", "msvmamba_nano", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["model"] for entry in found] == ["vmamba_nano", "msvmamba_nano"]
    for entry, params in zip(found, (4_435_288, 6_864_136), strict=True):
        assert (entry["height"], entry["width"], entry["in_chans"], entry["num_classes"]) == (64, 96, 1, 10)
        assert entry["params"] == params - 990 * 385 - 2 * 16 * 48  # a smaller head and stem
        assert entry["paper_source"] is None


def test_memory(tmp_path, capsys):
    assert (
        main(["test_resnet", "--size", "32", "48", "--memory", "--batch_size", "2", "--out", str(tmp_path / "a.csv")])
        == 0
    )
    (row,) = read(tmp_path / "a.csv")
    assert int(row["memory_bytes"]) > 2 * 4 * int(row["params"])
    assert row["memory_batch_size"] == "2"
    assert row["memory_device"]
    capsys.readouterr()
    assert main(["test_resnet", "--image_size", "64", "--memory"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "training memory," in text
    assert "backward pass of one image in float32 on" in text


@pytest.mark.parametrize("suffix, start", [(".csv", "group,model"), (".md", "# "), (".json", "{"), (".txt", "Presets")])
def test_out(tmp_path, capsys, suffix, start):
    path = tmp_path / "new" / f"profile{suffix}"
    assert main([*NANO, "--out", str(path)]) == 0
    assert path.read_text(encoding="utf-8").startswith(start)
    assert capsys.readouterr().out.split() == ["written", "to", str(path)]


def test_a_file_stays_whole_where_something_is_wrong(tmp_path):
    path = tmp_path / "profile.csv"
    path.write_text("mine")
    with pytest.raises(ValueError, match="did you mean"):
        main(["msvmamba_nano", "msvmamba_nan", "--out", str(path)])
    assert path.read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["profile.csv"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["msvmamba_nan"], "no model, grid or row 'msvmamba_nan'; did you mean msvmamba_nano"),
        (["--model", "msvmamba_nan"], "no model, grid or row 'msvmamba_nan'; did you mean msvmamba_nano"),
        (["msvmamba_nano", "--image_size", "31"], "--image_size is 31; expected 32 or more"),
        (["msvmamba_nano", "--size", "64", "31"], "--size is 64 31; expected both sides 32 or more"),
        (["msvmamba_nano", "--in_chans", "0"], "msvmamba_nano: in_chans is 0; expected 1 or more"),
        (["msvmamba_nano", "--num_classes", "-1"], "num_classes is -1; expected 0 or more"),
        (["msvmamba_nano", "--memory", "--batch_size", "0"], "--batch_size is 0; expected 1 or more"),
        (["deit_tiny_patch16_224", "--image_size", "256"], "deit_tiny_patch16_224: no image of 3×256×256 fits"),
        (["msvmamba_nano", "--inference"], "--inference belongs to --trace FILE; add that"),
        (["msvmamba_nano", "--mode", "eager"], "--mode belongs to --trace FILE"),
        (["msvmamba_nano", "--precision", "bf16"], "--precision belongs to --trace FILE"),
        (["msvmamba_nano", "--device", "cpu"], "--device belongs to --trace FILE"),
        (["msvmamba_nano", "--steps", "0"], "--steps belongs to --trace FILE"),
        (["msvmamba_nano", "--batch_size", "4"], "--batch_size belongs to --memory or --trace FILE"),
        (["msvmamba_nano", "--out", "a.xlsx"], "--out a.xlsx: the name tells no format; end it in .csv"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(arguments)


@pytest.mark.parametrize(
    "words", [["--image_size", "big"], ["--size", "64"], ["--size", "64", "64", "--image_size", "64"]]
)
def test_usage_errors(capsys, words):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "size" in capsys.readouterr().err


def test_trace(tmp_path, capsys):
    words = ["vmamba_nano", "--image_size", "32", "--batch_size", "1", "--steps", "1", "--device", "cpu"]
    assert main([*words, "--trace", str(tmp_path / "step.json"), "--out", str(tmp_path / "step.csv")]) == 0
    assert "trace in" in capsys.readouterr().out
    rows = read(tmp_path / "step.csv")
    families = {row["family"]: float(row["share"]) for row in rows if not row["kernel"]}
    assert families["scan"] > 0 and families["optimizer"] > 0
    assert sum(families.values()) == pytest.approx(1)
    assert any(row["kernel"].startswith("msv::selective_scan_2d") for row in rows)
    assert json.loads((tmp_path / "step.json").read_text())["traceEvents"]


def test_trace_of_a_forward(tmp_path, capsys):
    words = ["msvmamba_nano", "--image_size", "32", "--batch_size", "1", "--steps", "1", "--device", "cpu"]
    assert main([*words, "--inference", "--trace", str(tmp_path / "step.json.gz")]) == 0
    printed = capsys.readouterr().out
    assert "msvmamba_nano, forward, eager, float32, 1 images of 32×32, CPU" in printed
    assert "depthwise convolution" in printed
    assert "optimizer" not in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trace", "a.json"], "--trace takes one model, and 0 are named"),
        (["vmamba_nano", "msvmamba_nano", "--trace", "a.json"], "and 2 are named"),
        (["vmamba_nano", "--trace", "a.txt"], r"--trace a\.txt: expected a file that ends in \.json"),
        (["vmamba_nano", "--trace", "a.json", "--steps", "0"], "--steps is 0; expected 1 or more"),
        (["vmamba_nano", "--trace", "a.json", "--memory"], "--memory belongs to counting; give it without --trace"),
        (["vmamba_nano", "--trace", "a.json", "--no-parts"], "--parts belongs to counting; give it without --trace"),
        (
            ["vmamba_nano", "--trace", "a.json", "--precision", "fp16", "--device", "cpu", "--image_size", "32"],
            "a training step in fp16 would need its loss scaled",
        ),
    ],
)
def test_what_cannot_be_traced(words, message):
    with pytest.raises(ValueError, match=message):
        main(words)
