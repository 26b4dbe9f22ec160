import hashlib
import json
import zipfile

import pytest
import yaml

from msv.ablation.grid import read_grid_file, resolve_runs, write_grid_file
from msv.ablation.records import write_record
from msv.ablation.tables import make_table
from msv.grid_section import Grid
from msv.publishing import pack as packing
from msv.publishing.archive import LIST_NAME
from msv.publishing.pack import pack
from msv.publishing.unpack import main, unpack

LR = "model.init_args.lr"


def train(results, cells, seeds=(0,), top1=0.5, status="done", lr=1.0, test=True):
    """Write what a grid leaves: cells (name -> lr) with some seeds; returns its folder."""
    grid = Grid("g", cells={name: {LR: lr * value} for name, value in cells.items()}, seeds=list(seeds),
                results=str(results), recipe="quick", test=test)  # fmt: skip
    runs = resolve_runs(grid, {"seed_everything": 0, "model": {"init_args": {"lr": 0.0}}})
    write_grid_file(grid, runs, "python cli.py fit --config experiments/g.yaml")
    for run in runs:
        run.folder.mkdir(parents=True)
        (run.folder / "config.yaml").write_text(yaml.safe_dump(run.config))
        (run.folder / "last.ckpt").write_bytes(b"weights")
        (run.folder / "events.out.tfevents.1.host.2.0").write_bytes(b"events")
        record = {
            "grid": "g", "recipe": "quick", "cell": run.cell.name, "seed": run.seed, "config_hash": run.config_hash,
            "status": status, "metrics": {f"{'test' if test else 'val'}_top1": top1 + 0.01 * run.seed}, "history": [],
            "toggles": {}, **({} if test else {"tested": False}),
        }  # fmt: skip
        write_record(run.folder / "record.json", record)
    return results / "g" / "quick"


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


@pytest.fixture
def packed(tmp_path):
    """A results folder with two finished runs, and an archive of them."""
    folder = train(tmp_path / "there", {"a": 1.0, "b": 2.0})
    pack([folder], tmp_path / "there", tmp_path / "study.zip")
    return folder, tmp_path / "study.zip"


def rewrite(path, change):
    """Write an archive again with its files changed, and its list with them."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    listed = json.loads(files.pop(LIST_NAME))
    change(files)
    listed["files"] = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(LIST_NAME, json.dumps(listed))
        for name, content in files.items():
            archive.writestr(name, content)


def test_finished_runs_travel_whole(packed, tmp_path):
    folder, path = packed
    results = tmp_path / "here"
    done = unpack(path, results)
    assert len(done.new) == 2
    assert (done.there, done.unlisted) == ([], [])
    here, there = tree(results / "g/quick"), tree(folder)
    assert {name for name in there if name not in here} == {name for name in there if name.endswith("last.ckpt")}
    assert all(here[name] == there[name] for name in here if name != "grid.yaml")
    assert read_grid_file(results / "g/quick") == read_grid_file(folder) | {"results": results.as_posix()}
    assert make_table(results / "g/quick").csv.read_bytes() == make_table(folder).csv.read_bytes()
    # Nothing but results, and again it changes nothing.
    before = tree(results)
    again = unpack(path, results)
    assert (again.new, len(again.there)) == ([], 2)
    assert tree(results) == before
    assert [child.name for child in results.iterdir()] == ["g"]


def test_validated_runs_travel_too(tmp_path):
    folder = train(tmp_path / "there", {"a": 1.0}, test=False)
    pack([folder], tmp_path / "there", tmp_path / "study.zip")
    train(tmp_path / "here", {"a": 1.0}, seeds=(1,), test=False)
    done = unpack(tmp_path / "study.zip", tmp_path / "here")
    assert (len(done.new), done.unlisted) == (1, [])
    assert make_table(tmp_path / "here/g/quick").csv.read_text().count("\n") == 2


def test_checkpoints_are_added_to_runs_that_are_there(packed, tmp_path, capsys):
    folder, path = packed
    unpack(path, tmp_path / "here")
    pack([folder], tmp_path / "there", tmp_path / "whole.zip", checkpoints=True)
    assert main([str(tmp_path / "whole.zip"), "--results", str(tmp_path / "here")]) == 0
    assert "checkpoints added to 2 of those there" in capsys.readouterr().out
    assert {name for name in tree(folder) if name not in tree(tmp_path / "here/g/quick")} == set()


def test_the_same_runs_are_the_same_bytes_and_checkpoints_go_if_asked(packed, tmp_path):
    folder, path = packed
    pack([folder], tmp_path / "there", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == path.read_bytes()
    pack([folder], tmp_path / "there", tmp_path / "all.zip", checkpoints=True)
    unpack(tmp_path / "all.zip", tmp_path / "here")
    assert len(list((tmp_path / "here").glob("*/*/*/*/last.ckpt"))) == 2
    next(folder.glob("a/*/last.ckpt")).unlink()
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt: a finished run lacks it; leave out --checkpoints"):
        pack([folder], tmp_path / "there", tmp_path / "none.zip", checkpoints=True)
    assert not list(tmp_path.glob("*none*"))


def test_seeds_of_two_machines_make_one_table(packed, tmp_path):
    _, path = packed
    results = tmp_path / "here"
    folder = train(results, {"a": 1.0, "b": 2.0}, seeds=[1, 2])
    assert unpack(path, results).unlisted == []
    assert {tuple(cell["runs"]) for cell in read_grid_file(folder)["cells"].values()} == {(0, 1, 2)}
    assert (make_table(folder).csv.read_text()).count("done,") == 2


def test_runs_of_another_configuration_are_not_mixed_into_a_row(packed, tmp_path):
    _, path = packed
    folder = train(tmp_path / "here", {"a": 1.5}, seeds=[1])
    before = read_grid_file(folder)
    done = unpack(path, tmp_path / "here")
    assert len(done.new) == len(done.unlisted) == 2
    assert read_grid_file(folder) == before


@pytest.mark.parametrize(("top1", "status"), [(0.7, "done"), (0.5, "unfinished")])
def test_another_record_is_never_overwritten(packed, tmp_path, top1, status):
    _, path = packed
    results = tmp_path / "here"
    train(results, {"b": 2.0}, top1=top1, status=status)
    before = tree(results)
    with pytest.raises(ValueError, match=rf"study\.zip: another run of the same name is in .*b/seed0.* \({status}\)"):
        unpack(path, results)
    assert tree(results) == before


def test_only_finished_runs_are_packed(tmp_path, capsys):
    folder = train(tmp_path / "there", {"a": 1.0})
    record = next(folder.glob("a/*/record.json"))
    train(tmp_path / "there", {"a": 1.0, "b": 2.0}, seeds=[1], status="failed")
    words = ["--results", str(tmp_path / "there"), "--out", str(tmp_path / "s.zip")]
    assert packing.main(words) == 0
    out = capsys.readouterr().out
    assert "s.zip: 1 runs, " in out
    assert "  not finished: g/quick: a seed 1 (failed)" in out
    assert "  not finished: g/quick: b seed 1 (failed)" in out
    with pytest.raises(FileExistsError, match=r"s\.zip exists; give another name, or --force"):
        packing.main(words)
    record.unlink()
    with pytest.raises(ValueError, match=r"no run to pack: g/quick: a seed 0 \(missing\)"):
        packing.main([*words, "--force"])


def test_command(packed, tmp_path, capsys):
    _, path = packed
    assert main([str(path), "--results", str(tmp_path / "here")]) == 0
    assert f"study.zip: 2 runs unpacked to {tmp_path}/here, 0 there already" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"no archive at .*nothing\.zip; give a file that"):
        main([str(tmp_path / "nothing.zip")])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"", "damaged or no archive"),
        (lambda raw: b"no zip at all", "damaged or no archive"),
        (lambda raw: raw[: len(raw) // 2], "damaged or no archive"),
        (lambda raw: raw[:1500] + bytes([raw[1500] ^ 255]) + raw[1501:], "damaged or no archive|not what was packed"),
    ],
    ids=["empty", "text", "cut", "a byte"],
)
def test_a_damaged_archive_is_named(packed, tmp_path, damage, message):
    _, path = packed
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path}.*({message})"):
        unpack(path, tmp_path / "here")
    assert tree(tmp_path / "here") == {}


def climbs(files):
    files["../evil/record.json"] = b"{}"


def climbs_by_a_cell(files):
    files["g/quick/../seed0-00000000/record.json"] = b"{}"


def absolute(files):
    files["/tmp/quick/a/seed0-00000000/record.json"] = b"{}"


def backslash(files):
    files["g\\..\\..\\evil"] = b"{}"


def published(files):
    files["measured/quick/a/seed0-00000000/record.json"] = b"{}"


def code(files):
    files["g/quick/a/seed0-00000000/sitecustomize.py"] = b""


def other_config(files):
    name = next(name for name in files if "/a/" in name and name.endswith("config.yaml"))
    files[name] = b"seed_everything: 0\nmodel: {init_args: {lr: 9.0}}\n"


def other_record(files):
    one, two = (name for name in files if name.endswith("record.json"))
    files[one] = files[two]


def unfinished(files):
    name = next(name for name in files if name.endswith("record.json"))
    files[name] = json.dumps(json.loads(files[name]) | {"status": "unfinished"}).encode()


def no_record(files):
    del files[next(name for name in files if name.endswith("record.json"))]


def no_json(files):
    files[next(name for name in files if name.endswith("record.json"))] = b"{"


def climbing_grid(files):
    content = yaml.safe_load(files["g/quick/grid.yaml"])
    content["cells"]["../../x"] = content["cells"].pop("a")
    files["g/quick/grid.yaml"] = yaml.safe_dump(content).encode()


def other_grid(files):
    files["g/quick/grid.yaml"] = files["g/quick/grid.yaml"].replace(b"name: g", b"name: h")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (climbs, "'../evil/record.json' has no place among results"),
        (climbs_by_a_cell, "has no place among results: cell '..' is no safe folder name"),
        (absolute, "has no place among results"),
        (backslash, "has no place among results"),
        (published, "has no place among results: grid 'measured' is kept for something else"),
        (code, "sitecustomize.py' has no place among results"),
        (other_config, "config.yaml has the hash [0-9a-f]{8}, its folder [0-9a-f]{8}"),
        (other_record, "record.json is the record of another run"),
        (unfinished, "is unfinished, expected a finished run"),
        (no_record, "has no record.json; pack the run again"),
        (no_json, r"record.json is truncated or damaged"),
        (climbing_grid, "cell '../../x' is no safe folder name"),
        (other_grid, "g/quick/grid.yaml is that of h/quick"),
    ],
)
def test_what_is_no_run_is_refused(packed, tmp_path, change, message):
    _, path = packed
    rewrite(path, change)
    with pytest.raises(ValueError, match=rf"{path}: .*{message}"):
        unpack(path, tmp_path / "here")
    assert tree(tmp_path / "here") == {}
    assert {child.name for child in tmp_path.iterdir()} == {"there", "here", "study.zip"}


def test_an_archive_of_somebody_else_is_named(tmp_path):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat.png", b"")
    with pytest.raises(ValueError, match=r"photos\.zip is no archive of runs: expected a file that `python cli\.py pa"):
        unpack(path, tmp_path / "here")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(LIST_NAME, json.dumps({"format": "runs of msv", "version": 2, "files": {}}))
    with pytest.raises(ValueError, match=r"of version 1; its archive\.json says .*'version': 2"):
        unpack(path, tmp_path / "here")


def test_a_list_that_says_too_little_or_too_much(packed, tmp_path):
    _, path = packed
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("g/quick/a/more", b"")
    with pytest.raises(ValueError, match=r"does not hold what it lists: g/quick/a/more"):
        unpack(path, tmp_path / "here")
