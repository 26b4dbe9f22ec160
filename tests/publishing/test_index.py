import json
import re
from pathlib import Path

import pytest

from msv.benchmarks.command import BENCHMARKS
from msv.comparison import accuracy
from msv.files import shipped_grids
from msv.kept import ENVIRONMENT
from msv.publishing.index import write_index
from msv.publishing.write import write_all

ROOT = Path(__file__).parents[2]


def test_index(results):
    text = write_index(results).read_text()
    rows = [[value.strip() for value in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert rows[2] == [
        "[g](measured/quick/g/table.md)", "quick", "digits; 9 train, 5 test images of 1×32×32; 10 classes", "1 of 2",
        "0", "A CPU, 1 thread", "`0123456789ab`",
    ]  # fmt: skip
    assert rows[-1] == ["[scan_cpu](benchmarks/scan_cpu.csv)", "2", "A CPU", "2.15.0", "abc, def"]
    for phrase in (
        "- torch 2.15.0\n- 5 images\n",
        "```sh\npython cli.py fit --config experiments/g.yaml\n```",
        "Timed by\n\n```sh\npython cli.py benchmark scan\n```",
        "no column holds both",
        "No network has been trained on ImageNet here",
    ):
        assert phrase in text
    # A page that was not made is not linked.
    assert "Counted here" not in text
    assert "comparison" not in text


def test_the_introduction_lists_the_grids_that_there_are(tmp_path):
    introduction = write_index(tmp_path).read_text().partition("\n## ")[0]
    grids = re.findall(r"^- \[`(\w+)`\]\(\.\./experiments/\1\.yaml\): \S", introduction, re.MULTILINE)
    assert grids == [path.stem for path in shipped_grids()]


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


# Timed tables.


def timed(results, name, *rows, columns="status,error,command,device,torch,commit"):
    path = results / "benchmarks" / f"{name}.csv"
    path.write_text("\n".join([columns, *rows]) + "\n")
    return path


def timed_section(results):
    return write_index(results).read_text().partition("## Timed here")[2].partition("\n## ")[0]


@pytest.mark.parametrize("name", ["network_cpu_quick", "scan_cuda_part", "scan_interpreter_quick", "scan_interpreter"])
def test_dry_runs_and_parts_are_not_listed(results, name):
    timed(results, name, "done,,,A CPU,2.15.0,abc")
    section = timed_section(results)
    assert name not in section
    assert re.findall("cli.py benchmark .*", section) == ["cli.py benchmark scan"]


def test_a_timed_row_is_listed_if_it_is_finished_and_of_a_known_commit(results, monkeypatch):
    monkeypatch.setattr("msv.publishing.guard.in_history", lambda commit: commit in ("abc", "def"))
    monkeypatch.setattr("msv.publishing.write.shipped_grids", lambda: [])
    monkeypatch.setattr("msv.comparison.write_all", lambda out, timed, takes: [])
    command = "python cli.py benchmark depthwise --only ffn"
    path = timed(
        results, "depthwise_cuda", f"done,,{command},A GPU,2.11.0,abc", f"does not fit,,{command},A GPU,2.11.0,abc",
        "failed,no memory,c,B GPU,2.11.0,abc", ",no kernel,c,B GPU,2.11.0,abc", "done,,c,B GPU,2.11.0,abc+dirty",
        "done,,c,B GPU,2.11.0,unknown", "done,,c,B GPU,2.11.0,elsewhere",
    )  # fmt: skip
    timed(results, "loop_cuda", "done,,c,B GPU,2.11.0,abc+dirty")
    section = timed_section(results)
    assert re.search(
        r"\| \[depthwise_cuda\]\(benchmarks/depthwise_cuda.csv\) +\| 2 of 7 \| +A GPU \| 2.11.0 \| +abc \|", section
    )
    assert f"```sh\n{command}\npython cli.py benchmark scan\n```" in section
    assert "B GPU" not in section
    assert "loop_cuda" not in section
    left_out = write_all(results).left_out
    assert len(left_out) == 6
    assert f"{path}, row 4: it failed: no memory" in left_out
    assert any(line.startswith(f"{path}, row 6: its commit is abc+dirty") for line in left_out)


def test_the_page_and_the_plot_of_a_timed_table_are_linked(results):
    path = timed(results, "scaling_cuda", "done,,c,A GPU,2.11.0,abc")
    path.with_suffix(".png").write_bytes(b"")
    assert "| [scaling_cuda](benchmarks/scaling_cuda.csv) ([plot](benchmarks/scaling_cuda.png)) |" in timed_section(
        results
    )
    path.with_suffix(".md").write_text("")
    links = "([CSV](benchmarks/scaling_cuda.csv), [plot](benchmarks/scaling_cuda.png))"
    assert f"| [scaling_cuda](benchmarks/scaling_cuda.md) {links} |" in timed_section(results)


def test_the_published_index_names_commands_that_there_are():
    named = re.findall(r"python cli.py benchmark (\w+)", (ROOT / "results" / "README.md").read_text())
    assert named
    assert set(named) <= set(BENCHMARKS)
