from dataclasses import dataclass

import pytest

from msv.kept import Kept
from msv.profiling.measuring import missing


@dataclass(frozen=True)
class Case:
    name: str

    @property
    def columns(self):
        return {"name": self.name}


A, B = Case("a"), Case("b")


@pytest.fixture
def kept(tmp_path):
    return Kept(tmp_path / "rows.csv", ("name", "ms", "status", "error", "command"), ("name", "device"))


def test_what_is_finished_here_is_not_missing(kept, where):
    kept.put({"name": "a", "status": "done"}, where)
    assert missing([A, B], kept, where) == [B]
    assert missing([A, B], kept, where, again=True) == [A, B]
    for column in ("device", "torch", "commit"):
        assert missing([A, B], kept, where | {column: "another"}) == [A, B]


def test_what_failed_is_tried_again_and_last(kept, where):
    kept.put({"name": "a", "status": "failed", "error": "x"}, where)
    assert missing([A, B], kept, where) == [B, A]


@pytest.mark.parametrize("commit", ["unknown", "0123456789ab+dirty"])
def test_nothing_is_finished_of_a_commit_that_does_not_say_what_ran(kept, where, commit):
    where = where | {"commit": commit}
    kept.put({"name": "a", "status": "done"}, where)
    assert missing([A, B], kept, where) == [A, B]
