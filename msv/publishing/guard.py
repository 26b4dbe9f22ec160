"""Which numbers may be published: those measured by the code at a commit that this repository has."""

from collections.abc import Mapping

from msv.provenance import in_history


def commit_problem(commit: str | None, verb: str) -> str | None:
    """Why what was measured at a commit is not to be published, None if it may be.

    Args:
        commit: as a record or a kept row has it.
        verb: how it is made again, for the message: "train" or "measure".
    """
    commit = commit or "unknown"
    if commit == "unknown":
        return f"its commit is unknown; {verb} in a git checkout, or with MSV_COMMIT set"
    if commit.endswith("+dirty"):
        return f"its commit is {commit}: files differed from it; commit them and {verb} again"
    if in_history(commit) is False:
        return f"its commit {commit} is not in this repository's history; check out a branch that has it"
    return None


def row_problem(row: Mapping[str, str]) -> str | None:
    """Why a measured row is not to be published, None if it may be."""
    return commit_problem(row.get("commit"), "measure")
