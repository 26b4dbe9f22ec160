import json
from pathlib import Path

import numpy as np
import pytest

from msv.ablation.records import read_record, write_record


def a_record(**changes):
    identity = {"grid": "g", "recipe": "digits", "cell": "a", "seed": 0, "config_hash": "0123abcd", "status": "done"}
    return {**identity, "metrics": {"test_top1": 0.5}, **changes}


def test_round_trip_as_plain_json(tmp_path):
    path = tmp_path / "run" / "record.json"
    history = [{"epoch": 0, "train_loss": float("nan"), "lr": np.float32(0.5)}]
    write_record(path, a_record(toggles={"depths": (1, 2)}, history=history, data={"root": Path("x")}))
    record = read_record(path)
    assert record["schema"] == 1
    assert record["toggles"] == {"depths": [1, 2]}
    assert record["history"] == [{"epoch": 0, "train_loss": None, "lr": 0.5}]
    assert record["data"] == {"root": "x"}
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "finished"}, "'status' is 'finished', expected one of running, done, failed, unfinished"),
        ({"seed": "0"}, "'seed' is '0', expected int"),
        ({"cell": None}, "'cell' is None, expected str"),
        ({"metrics": {}}, "metrics.test_top1 is None"),
        ({"metrics": {"test_top1": 98.5}}, "metrics.test_top1 is 98.5, expected a fraction"),
        ({"env": "laptop"}, "'env' is 'laptop', expected an object"),
        ({"metrics": {"val_top1": 0.5}}, "metrics.test_top1 is None"),
        ({"tested": False}, "metrics.val_top1 is None"),
        ({"tested": "no"}, "'tested' is 'no', expected true or false"),
        (
            {"tested": False, "metrics": {"val_top1": 0.5, "test_loss": 0.1}},
            "'tested' is False, and there are test_loss; expected nothing of the test split",
        ),
    ],
)
def test_a_wrong_record_is_neither_written_nor_read(tmp_path, changes, message):
    path = tmp_path / "record.json"
    with pytest.raises(ValueError, match="cannot be written") as error:
        write_record(path, a_record(**changes))
    assert message in str(error.value)
    assert not path.exists()
    path.write_text(json.dumps({"schema": 1, **a_record(**changes)}))
    with pytest.raises(ValueError, match="run the grid again") as error:
        read_record(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_run_that_is_not_done_needs_no_metrics(tmp_path):
    write_record(tmp_path / "record.json", a_record(status="running", metrics=None))
    assert read_record(tmp_path / "record.json")["status"] == "running"


def test_a_run_without_a_test_has_metrics_of_validation(tmp_path):
    write_record(tmp_path / "record.json", a_record(tested=False, metrics={"val_top1": 0.5}))
    assert read_record(tmp_path / "record.json")["metrics"] == {"val_top1": 0.5}


def test_values_without_json_form(tmp_path):
    with pytest.raises(TypeError, match="has no JSON form"):
        write_record(tmp_path / "record.json", a_record(toggles={"x": object()}))


@pytest.mark.parametrize("keep", [0, 1, 40, -2])
def test_truncated(tmp_path, keep):
    path = tmp_path / "record.json"
    write_record(path, a_record())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated or damaged") as error:
        read_record(path)
    assert str(path) in str(error.value)
    assert f"move {tmp_path} aside and run the grid again" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "no record of a run"),
        (b'{"status": "done"}', "no record of a run"),
        (b'{"schema": 2}', "has schema 2; this version of msv reads schema 1"),
        (b"\xff\xfe\x00", "truncated or damaged"),
    ],
)
def test_foreign(tmp_path, content, message):
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"expected|reads schema") as error:
        read_record(tmp_path / "record.json")
    assert message in str(error.value)


def test_no_record(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "record.json")
