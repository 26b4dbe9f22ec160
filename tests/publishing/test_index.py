import json
import re

from msv.comparison import accuracy
from msv.kept import ENVIRONMENT
from msv.publishing.index import write_index


def test_index(results):
    text = write_index(results).read_text()
    rows = [[value.strip() for value in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert rows[2] == [
        "[g](measured/quick/g/table.md)", "quick", "digits; 9 train, 5 test images of 1×32×32; 10 classes", "1 of 2",
        "0", "A CPU, 1 thread", "`0123456789ab`",
    ]  # fmt: skip
    assert rows[-1] == ["[scan](benchmarks/scan.csv)", "2", "A CPU", "2.15.0", "abc, def"]
    for phrase in (
        "- torch 2.15.0\n- 5 images\n",
        "```sh\npython cli.py fit --config experiments/g.yaml\n```",
        "no column holds both",
        "No network has been trained on ImageNet here",
    ):
        assert phrase in text
    # A page that was not made is not linked.
    assert "Counted here" not in text
    assert "comparison" not in text


def test_an_empty_folder_has_an_index_too(tmp_path):
    assert "Nothing yet: train a grid" in write_index(tmp_path).read_text()


def test_runs_taken_over_are_not_counted_as_trained_twice(results):
    (path,) = (results / "measured/quick/g").glob("*/*/record.json")
    record = json.loads(path.read_text())
    command = "python cli.py fit --config experiments/h.yaml --grid.only '[\"a\"]' --grid.seeds '[0]'"
    path.write_text(json.dumps({**record, "trained_as": "h/quick/a", "command": command}))
    text = write_index(results).read_text()
    assert "| 1 of 2, taken over from h |" in text
    assert f"Trained by\n\n```sh\n{command}\n```" in text


def test_measured_accuracies_name_device_commit_and_command(results):
    where = dict.fromkeys(ENVIRONMENT, "1") | {"device": "A GPU", "commit": "abc"}
    row = {"file": "w.pth", "top1": 82.2, "images": 9, "command": "c"}
    accuracy.store(results / "comparison").put({"model": "vmamba_tiny", **row}, where)
    accuracy.store(results / "comparison").put({"model": "vmamba_base", **row}, where | {"commit": "abc+dirty"})
    text = write_index(results).read_text()
    section = text.partition("## Measured here, of weights at hand")[2].partition("\n## ")[0]
    assert re.search(r"\| `vmamba_tiny` \| w.pth +\| +82.2 \| +9 \| +A GPU \| +`abc` \|", section)
    assert "By `c`." in section
    assert "vmamba_base" not in section
