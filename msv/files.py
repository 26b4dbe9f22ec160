"""Where the shipped files lie, and files that are either whole or not there."""

import contextlib
import os
import uuid
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def shipped_grids() -> list[Path]:
    """The YAML files of `experiments/` that compare networks; not the one that trains one, nor those that search."""
    return sorted(path for path in EXPERIMENTS.glob("*.yaml") if not path.stem.startswith(("train", "search_")))


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Args:
        path: the file; its folder is made where it is missing.
        content: text (written as UTF-8) or bytes.

    Raises:
        OSError: the file cannot be written; the old file, if any, is untouched.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"could not write {path}: {reason}; free some space or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
