import errno
import os
from pathlib import Path

import pytest

from msv.files import write_atomic


def test_text_and_bytes_into_a_new_folder(tmp_path):
    path = tmp_path / "run" / "table.csv"
    write_atomic(path, "Δ\n")
    assert path.read_bytes() == "Δ\n".encode()
    write_atomic(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert [file.name for file in path.parent.iterdir()] == ["table.csv"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_crash_in_the_middle_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "record.json"
    write_atomic(path, "before")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if moment == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match=r"could not write .*record\.json: No space left on device") as error:
        write_atomic(path, "after")
    assert "\n" not in str(error.value)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_into_a_file_s_place(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="could not write"):
        write_atomic(tmp_path / "taken" / "table.csv", "x")
