import pytest

from msv.kept import Kept, number, place


@pytest.fixture
def kept(tmp_path):
    return Kept(tmp_path / "new" / "rows.csv", ("name", "value", "error"), ("name", "device"))


def test_a_new_row_takes_the_place_of_the_old_one(kept, where):
    assert kept.read() == []
    kept.put({"name": "a", "value": 1.5}, where)
    kept.put({"name": "b", "value": 2, "error": 'one, "two"\nthree'}, where)
    kept.put({"name": "a", "value": 1 / 3}, where | {"commit": "another"})
    kept.put({"name": "a", "value": 4.0}, where | {"device": "another"})
    rows = kept.read()
    assert [(row["name"], row["value"]) for row in rows] == [("a", "0.333333"), ("b", "2"), ("a", "4")]
    assert rows[1]["error"] == 'one, "two"\nthree'
    assert rows[0]["commit"] == "another"
    assert place(rows[1]) == tuple(where.values())
    assert not list(kept.path.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    "content, message",
    [("", "columns of an empty file; expected name"), ("a,b\n1,2\n", "has the columns a, b"), (b"\xff\xfe", "no CSV")],
)
def test_another_file_in_its_place(kept, content, message, where):
    kept.path.parent.mkdir()
    kept.path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        kept.put({"name": "a"}, where)
    assert kept.path.read_bytes() == (content if isinstance(content, bytes) else content.encode())


def test_a_row_cut_short(kept, where):
    kept.put({"name": "a"}, where)
    kept.path.write_text(kept.path.read_text() + "b,2\n")
    with pytest.raises(ValueError, match="row 3: expected 13 values"):
        kept.read()


@pytest.mark.parametrize("status", ["failed", "does not fit"])
def test_what_failed_takes_no_place_of_what_is_done_here(tmp_path, where, status):
    kept = Kept(tmp_path / "rows.csv", ("name", "status", "ms"), ("name", "device"))
    done = kept.put({"name": "a", "status": "done", "ms": 1}, where)
    assert kept.put({"name": "a", "status": status}, where)["status"] == status
    assert kept.read() == [done]
    assert kept.put({"name": "a", "status": "done", "ms": 2}, where)["ms"] == "2"
    kept.put({"name": "a", "status": status}, where | {"commit": "another"})
    assert [row["status"] for row in kept.read()] == [status]


def test_threads_tell_a_cpu_s_rows_apart(tmp_path, where):
    kept = Kept(tmp_path / "rows.csv", ("name",), ("name", "device", "threads"))
    for cuda, rows in (("", 2), ("13.0", 3)):
        for threads in ("1", "8"):
            kept.put({"name": "a"}, where | {"cuda": cuda, "threads": threads, "device": f"a device, {cuda}"})
        assert len(kept.read()) == rows


def test_an_older_file_has_fewer_columns(kept, where):
    kept.path.parent.mkdir()
    kept.path.write_text("device,name,value\na GPU,a,1\n")
    (row,) = kept.read()
    assert tuple(row) == (*kept.columns, *where)
    assert (row["name"], row["value"], row["device"], row["error"], row["commit"]) == ("a", "1", "a GPU", "", "")
    kept.put({"name": "b"}, where)
    assert [row["name"] for row in kept.read()] == ["a", "b"]
    kept.path.write_text("device,value\na GPU,1\n")
    with pytest.raises(ValueError, match="expected name"):
        kept.read()


def test_numbers():
    assert number({"x": ""}, "x") is None
    assert number({"x": "2.5"}, "x") == 2.5
    with pytest.raises(ValueError, match="x is 'fast' in a kept row"):
        number({"x": "fast"}, "x")
