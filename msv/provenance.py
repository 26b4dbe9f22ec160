"""Where a number comes from: the device, the versions of what it stands on, the commit."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

_VERSIONED = ("torch", "lightning", "triton", "timm", "msv")
# A hook or a rebase sets these, and they would point git at another repository than the one asked about.
_GIT_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")


def environment(device: Literal["auto", "cpu", "cuda"] = "auto") -> dict[str, str | int | None]:
    """Where a run takes place: the device's name, the versions of what it stands on, the commit.

    Looking for a GPU starts CUDA in this process: call it in the process that trains, with the device it trains on.

    Args:
        device: "cuda" or "cpu" name the device in use; "auto" takes a GPU where there is one.

    Returns:
        ``device, cpu, threads, torch, lightning, triton, timm, msv, python, commit``: ``device`` is the name of the
        GPU or CPU in use, ``cpu`` the CPU's in either case, ``threads`` how many torch uses in one operation; None for
        a package that is not installed.
    """
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else _cpu_name(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        **{package: _version(package) for package in _VERSIONED},
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit(repo_root: Path | None = None) -> str:
    """The commit that is running: from git, else from the variable ``MSV_COMMIT``, else "unknown".

    ``+dirty`` is appended where tracked files, or untracked ones that git does not ignore, differ outside ``results/``.

    Args:
        repo_root: the top folder of the repository; by default the folder that holds this package.
    """
    root = _repository(repo_root)
    if root is not None:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=normal", "--", ".", ":(exclude,top)results")
        if head and changes is not None:
            return f"{head}+dirty" if changes else head
    return os.environ.get("MSV_COMMIT") or "unknown"


def names_code(commit: str) -> bool:
    """Whether a commit says which code ran: it is known, and nothing differed from it."""
    return commit not in ("", "unknown") and not commit.endswith("+dirty")


def in_history(commit: str, repo_root: Path | None = None) -> bool | None:
    """Whether a commit is the one that is checked out or an ancestor of it; None where there is no repository to ask.

    Args:
        commit: its hash, whole or abbreviated.
        repo_root: the top folder of the repository; by default the folder that holds this package.
    """
    root = _repository(repo_root)
    if root is None or _git(root, "rev-parse", "HEAD") is None:
        return None
    return _git(root, "merge-base", "--is-ancestor", commit, "HEAD") is not None


def _repository(repo_root: Path | None) -> Path | None:
    """The repository's top folder; None where this package is in none of its own."""
    root = Path(repo_root or Path(__file__).parents[1]).resolve()
    top = _git(root, "rev-parse", "--show-toplevel")
    # An installed package may lie inside somebody else's repository, whose commit says nothing about this code.
    return root if top and Path(top).resolve() == root else None


def _git(root: Path, *arguments: str) -> str | None:
    variables = {key: value for key, value in os.environ.items() if key not in _GIT_VARIABLES}
    variables["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=60, env=variables, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = []
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        names = [line.partition(":")[2] for line in lines if line.lower().startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return " ".join(name.split())
