"""The page of all that is published, read back and held against the records."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from msv.ablation.config import config_hash
from msv.ablation.grid import resolve_runs, write_grid_file
from msv.ablation.records import write_record
from msv.ablation.statistics import paired_difference
from msv.grid_section import Grid
from msv.publishing import guard
from msv.publishing.keep import keep_grid
from msv.report.command import main
from msv.report.differences import ABSENT, differences, flat
from msv.report.html import Html, join, marked, tag
from msv.report.page import render_report

LR = "model.init_args.lr"
SCRIPTED = "<script>alert('x')</script> & \"b\""
KEPT = Path(__file__).parents[2] / "results"


class Page(HTMLParser):
    """Tables of a page as rows of texts; whatever it refers to; whether its elements close."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tables, self.links, self.open, self.names, self.scripts = [], [], [], [], 0
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.names.append(name)
        if name not in ("img", "meta"):
            self.open.append(name)
        self.links += [value for key, value in attributes if key in ("src", "href")]
        self.scripts += name == "script"
        if name == "table":
            self.tables.append([])
        if name == "tr":
            self.tables[-1].append([])
        if name in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


@pytest.fixture
def train(monkeypatch):
    """Publishes a grid as if trained: cell -> top-1 of its seeds."""
    monkeypatch.setattr(guard, "in_history", lambda commit: True)

    def write(results, cells, name="g", baseline="a", groups=None, **changes):
        seeds = list(range(max(map(len, cells.values()))))
        grid = Grid(name, cells={cell: {LR: 1.0 + n} for n, cell in enumerate(cells)}, seeds=seeds, baseline=baseline,
                    groups=groups or {}, results=str(results), recipe="quick")  # fmt: skip
        base = {"seed_everything": 0, "model": {"init_args": {"lr": 0.0, "note": SCRIPTED}}}
        runs = resolve_runs(grid, base)
        write_grid_file(grid, runs, f"python cli.py fit --config {name}.yaml")
        for run in runs:
            if run.seed >= len(cells[run.cell.name]):
                continue
            top1 = cells[run.cell.name][run.seed]
            record = {
                "grid": name, "recipe": "quick", "cell": run.cell.name, "seed": run.seed, "status": "done",
                "config_hash": run.config_hash, "toggles": run.cell.toggles, "metrics": {"test_top1": top1},
                "history": [{"epoch": e, "train_loss": 2.0 - e - top1, "val_top1": top1} for e in range(2)],
                "counts": {"params_trained": 4_500_000, "gflops_fvcore_trained": 0.0151},
                "data": {"name": "digits", "test_images": 5, "note": SCRIPTED},
                "timing": {"started": f"{run.cell.name}{run.seed}", "train_seconds": 61.0, "images_per_second": 123.4,
                           "workers": 2, "finished": "2026-01-02T03:04:05+00:00"},
                "env": {"commit": "0123456789ab", "device": "A GPU", "torch": "2.15.0", "triton": "3.9.0"},
            }  # fmt: skip
            write_record(run.folder / "record.json", {**record, **changes})
            (run.folder / "config.yaml").write_text(yaml.safe_dump(run.config))
        keep_grid(results / name / "quick", results / "measured")
        return results

    return write


ACCURACIES = {"a": [0.90, 0.91, 0.92], "b": [0.93, 0.95, 0.94], "c": [0.90]}


def test_the_numbers_are_those_of_the_records(tmp_path, train):
    page = Page(render_report(train(tmp_path, ACCURACIES)))
    overview, results, configs, runs = page.tables
    assert overview[1] == ["g", "quick", "digits", "3", "7 of 9", "3", "a", "91.00", "1 of 1", "7 min 7 s"]

    rows = {row[0]: row for row in results[2:]}
    assert list(rows) == ["a (baseline)", "b", "c: 1 done, 2 missing"]
    titles = results[1]
    assert titles[:7] == ["cell", "lr", "test top-1, %", "n", "Δ with 95% interval", "", "p (Holm)"]
    found = dict(zip(titles, rows["b"], strict=True))
    top1 = [{seed: 100 * value for seed, value in enumerate(ACCURACIES[cell])} for cell in "ba"]
    expected = paired_difference(*top1)
    assert found["test top-1, %"] == "94.00 ± 1.00"
    assert found["Δ with 95% interval"] == f"+{expected.mean:.2f} [+{expected.low:.2f}, +{expected.high:.2f}]"
    assert float(found["p (Holm)"]) == pytest.approx(expected.p, abs=5e-5)
    assert found["differs"] == "yes"
    assert found["params, M"] == "–"
    assert rows["c: 1 done, 2 missing"][2:5] == ["90.00", "1", "0.00"]

    assert configs == [["cell", "lr"], ["a (baseline)", "1.0"], ["b", "2.0"], ["c", "3.0"]]
    records = sorted((tmp_path / "measured").glob("*/*/*/*/record.json"))
    assert len(runs) == 1 + len(records) == 8
    for path in records:
        record = json.loads(path.read_text())
        line = next(row for row in runs if row[:2] == [record["cell"], str(record["seed"])])
        assert line[2:5] == [record["config_hash"], "done", f"{100 * record['metrics']['test_top1']:.2f}"]
        assert line[6:] == [
            f"{100 * record['history'][-1]['val_top1']:.2f}", f"{record['history'][-1]['train_loss']:.4f}", "2",
            "1 min 1 s", "123", "2", "A GPU", "2.15.0", "3.9.0", "0123456789ab", "2026-01-02 03:04:05", "–",
        ]  # fmt: skip


def test_each_number_of_the_kept_tables_is_on_the_page():
    """The page of what this repository holds, against the tables beside the records."""
    page = Page(render_report(KEPT))
    shown = [set(row) for table in page.tables for row in table]
    for table in (KEPT / "measured").glob("*/*/table.csv"):
        titles, *lines = [line.split(",") for line in re.sub(r'"[^"]*"', "x", table.read_text()).splitlines()]
        assert lines
        for line in lines:
            row = dict(zip(titles, line, strict=True))
            wanted = [row[key] for key in ("gflops_fvcore", "gflops_trained", "params_m", "paper_top1", "n")]
            assert any(set(filter(None, wanted)) <= found for found in shown), row
            assert any(any(text.startswith(row["top1_mean"]) for text in found) for found in shown), row


def test_the_same_records_are_the_same_bytes(tmp_path, train):
    results = train(tmp_path / "here", ACCURACIES)
    train(results, {"a": [0.5, 0.6]}, name="h")
    assert main(["--results", str(results)]) == 0
    before = (results / "report.html").read_bytes()
    shutil.copytree(results / "measured", tmp_path / "there" / "measured")
    assert main(["--results", str(tmp_path / "there"), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes() == before
    path = next((tmp_path / "there").glob("measured/quick/g/b/*/record.json"))
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"metrics": {"test_top1": 0.931}}))
    main(["--results", str(tmp_path / "there"), "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_bytes() != before


def test_nothing_is_fetched_and_nothing_of_a_record_is_markup(tmp_path, train):
    text = render_report(train(tmp_path, {"a": [0.9], "b": [0.8]}, groups={SCRIPTED: {"b": f"why? {SCRIPTED}"}}))
    page = Page(text)
    assert page.open == []
    assert page.scripts == 1
    assert SCRIPTED not in text
    assert text.count("alert(") == text.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;b&quot;")
    assert text.count("alert(") >= 4  # the note, the group, what its row answers, the configuration
    assert [link.partition(",")[0] for link in page.links] == ["#quick/g", *["data:image/svg+xml;base64"] * 2]
    assert "default-src &#x27;none&#x27;" in text
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert str(tmp_path) not in text


def test_parts_of_a_table_stay_apart(tmp_path, train):
    page = Page(render_report(train(tmp_path, ACCURACIES, groups={"Controls": {"c": "is it so?"}})))
    assert [row[0] for row in page.tables[1][2:]] == ["a (baseline)", "b", "Controls", "c: 1 done, 2 missing"]


def test_a_run_of_two_grids_took_its_time_once(tmp_path, train):
    train(tmp_path, {"a": [0.9], "b": [0.8]})
    text = render_report(train(tmp_path, {"a": [0.9], "b": [0.8]}, name="h", trained_as="g/quick/a"))
    assert "from 4 records in 2 grids, 2 min 2 s of training in all." in text


def test_no_records(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no records in .*measured: there is nothing to report; train a grid"):
        main(["--results", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(tmp_path, train):
    results = train(tmp_path, {"a": [0.9]})
    config = next(results.glob("measured/*/*/*/*/config.yaml"))
    config.write_text("a: [")
    with pytest.raises(ValueError, match=rf"{config} is damaged"):
        main(["--results", str(results)])
    config.write_text("text")
    with pytest.raises(ValueError, match=rf"{config} holds no config"):
        main(["--results", str(results)])
    assert not (results / "report.html").exists()


def test_differences():
    one = {"seed_everything": 0, "m": {"lr": 1, "n": {"k": [1, 2], "same": 3}}}
    two = {"seed_everything": 1, "m": {"lr": 1.0, "n": {"k": [1, 3], "same": 3}, "new": None}}
    assert flat(one) == {"seed_everything": 0, "m.lr": 1, "m.n.k": [1, 2], "m.n.same": 3}
    assert differences({"a": one, "b": two}) == {
        "m.n.k": {"a": [1, 2], "b": [1, 3]},
        "m.new": {"a": ABSENT, "b": None},
    }
    assert config_hash(one) == config_hash({**one, "m": {**one["m"], "lr": 1.0}})


def test_html():
    assert tag("td", "<a>", class_="x", data_key=1.5, hidden=None) == '<td class="x" data-key="1.5">&lt;a&gt;</td>'
    assert tag("td", Html("<b>"), title='"') == '<td title="&quot;"><b></td>'
    assert tag("img", alt="x") == '<img alt="x">'
    assert join("a<", None, Html("<b>")) == "a&lt;<b>"
    assert marked("`a<b` and **c** but 2 * 3 * 4") == "<code>a&lt;b</code> and <strong>c</strong> but 2 * 3 * 4"
