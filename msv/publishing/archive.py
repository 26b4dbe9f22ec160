"""One file that carries finished runs from machine to machine: a ZIP of their folders and a list of what is in it.

What comes out of one was whole when it went in, belongs to the run whose folder it lies in, and lies under the folder
that it is put in: `unpack` says of any other file what is wrong with it.
"""

import hashlib
import json
import re
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import yaml

from msv.ablation.cell import CONFIG_NAME
from msv.ablation.config import config_hash
from msv.ablation.grid import GRID_FILE, RESERVED_CELLS, RESERVED_GRIDS, read_grid_file
from msv.ablation.names import check_name
from msv.ablation.records import RECORD_NAME, read_record
from msv.experiment import LAST

LIST_NAME = "archive.json"
FORMAT = {"format": "runs of msv", "version": 1}
EVENTS = "events.out.tfevents.*"
"""TensorBoard's files of a run."""

_RUN = re.compile(r"seed(?P<seed>0|[1-9][0-9]{0,9})-(?P<digest>[0-9a-f]{8})")
_RUN_FILE = re.compile(r"events\.out\.tfevents\.[A-Za-z0-9._-]+")
_MOST_LISTED = 50_000_000
_CHUNK = 1 << 20


def write_archive(path: Path, files: Mapping[str, Path]) -> None:
    """Write files into an archive; the same files give the same bytes.

    Args:
        path: the archive; the whole of it is there in the end, or what was there before.
        files: name in the archive -> file.

    Raises:
        OSError: a file cannot be read, or the archive not be written.
    """
    listed = {name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for name, file in sorted(files.items())}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            archive.writestr(_entry(LIST_NAME), json.dumps({**FORMAT, "files": listed}, indent=1))
            for name in listed:
                with files[name].open("rb") as source, archive.open(_entry(name), "w") as target:
                    shutil.copyfileobj(source, target, _CHUNK)
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"could not write {path}: {error.strerror or error}; free some space or name another") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_archive(path: Path, folder: Path) -> list[PurePosixPath]:
    """Put the files of an archive into a folder, and check that each is what was packed and lies where it belongs.

    Args:
        path: the archive.
        folder: an empty one; it holds anything in case of an error.

    Returns:
        The runs, as ``<grid>/<recipe>/<cell>/seed<k>-<hash>``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no archive of `pack`, it is damaged, or it holds something that is not what it is called.
        OSError: it cannot be read, or the files not be written.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no archive at {path}; give a file that `python cli.py pack` has written")
    again = "pack the runs again, or copy the archive again"
    try:
        with zipfile.ZipFile(path) as archive:
            listed = _listed(path, archive)
            space, needed = shutil.disk_usage(folder).free, sum(entry["bytes"] for entry in listed.values())
            if needed > space:
                raise OSError(f"{path} holds {needed / 1e6:.0f} MB, and {folder} has {space / 1e6:.0f} MB free")
            for name, entry in listed.items():
                _extract(path, archive, name, entry, folder / name)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or no archive of runs ({error}); {again}") from error
    runs = {PurePosixPath(name).parent for name in listed if PurePosixPath(name).name != GRID_FILE}
    for run in sorted(runs):
        _check_run(path, folder, run)
    for name in listed:
        if PurePosixPath(name).name == GRID_FILE:
            _check_grid(path, folder, PurePosixPath(name).parent)
    return sorted(runs)


def run_files(folder: Path, checkpoint: bool) -> list[Path]:
    """The files of a finished run that travel: its record, config and TensorBoard events, its checkpoint if asked."""
    found = [folder / RECORD_NAME, folder / CONFIG_NAME, *sorted(folder.glob(EVENTS))]
    return [*found, folder / LAST] if checkpoint else found


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))  # of no day, so that bytes depend on contents alone
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    return entry


def _listed(path: Path, archive: zipfile.ZipFile) -> dict[str, dict]:
    """The files that an archive lists, after a look at their names."""
    names = archive.namelist()
    foreign = f"{path} is no archive of runs: expected a file that `python cli.py pack` has written"
    if LIST_NAME not in names or archive.getinfo(LIST_NAME).file_size > _MOST_LISTED:
        raise ValueError(f"{foreign}, with {LIST_NAME} in it")
    try:
        content = json.loads(archive.read(LIST_NAME))
        found, files = {key: content[key] for key in FORMAT}, dict(content["files"])
        whole = all(isinstance(e["bytes"], int) and e["bytes"] >= 0 and len(e["sha256"]) == 64 for e in files.values())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{foreign}; its {LIST_NAME} is none") from error
    if found != FORMAT or not whole:
        raise ValueError(f"{foreign} of version {FORMAT['version']}; its {LIST_NAME} says {found}")
    if sorted(names) != sorted([LIST_NAME, *files]):
        odd = sorted(set(names) ^ {LIST_NAME, *files}) or [n for n in names if names.count(n) > 1]
        raise ValueError(f"{path} does not hold what it lists: {', '.join(odd[:3])}; pack the runs again")
    for name in files:
        _check_path(path, name)
    return files


def _check_path(path: Path, name: str) -> None:
    """Raise a ValueError for the name of a file that has no place in a results folder."""
    parts = name.split("/")
    try:
        if len(parts) == 3 and parts[2] == GRID_FILE:
            known = True
        else:
            known = len(parts) == 5 and _RUN.fullmatch(parts[3]) is not None
            known = known and (parts[4] in (RECORD_NAME, CONFIG_NAME, LAST) or bool(_RUN_FILE.fullmatch(parts[4])))
        if not known:
            raise ValueError("expected <grid>/<recipe>/<cell>/seed<k>-<hash>/<file of a run>")
        check_name("grid", parts[0], RESERVED_GRIDS)
        check_name("recipe", parts[1])
        if len(parts) == 5:
            check_name("cell", parts[2], RESERVED_CELLS)
    except ValueError as error:
        raise ValueError(f"{path}: {name!r} has no place among results: {error}") from error


def _extract(path: Path, archive: zipfile.ZipFile, name: str, entry: Mapping, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, left = hashlib.sha256(), entry["bytes"]
    with archive.open(name) as source, target.open("xb") as file:
        while chunk := source.read(min(_CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                break
            digest.update(chunk)
            file.write(chunk)
    if left or digest.hexdigest() != entry["sha256"]:
        raise ValueError(f"{path}: {name} is not what was packed; copy the archive again, or pack the runs again")


def _check_run(path: Path, folder: Path, run: PurePosixPath) -> None:
    """Raise a ValueError where a run's record or config is not of the run that its folder names."""
    missing = [name for name in (RECORD_NAME, CONFIG_NAME) if not (folder / run / name).is_file()]
    if missing:
        raise ValueError(f"{path}: {run} has no {' and no '.join(missing)}; pack the run again")
    try:
        record = read_record(folder / run / RECORD_NAME)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).replace(f'{folder}/', '')}") from error
    grid, recipe, cell, name = run.parts
    match = _RUN.fullmatch(name)
    seed, digest = (int(match["seed"]), match["digest"]) if match else (None, None)
    found = tuple(record[key] for key in ("grid", "recipe", "cell", "seed", "config_hash"))
    if found != (grid, recipe, cell, seed, digest):
        raise ValueError(f"{path}: {run}/{RECORD_NAME} is the record of another run, {found}; pack the runs again")
    if record["status"] != "done":
        raise ValueError(f"{path}: {run} is {record['status']}, expected a finished run; finish it, then pack again")
    try:
        config = yaml.safe_load((folder / run / CONFIG_NAME).read_text(encoding="utf-8"))
        counted = config_hash(config, record.get("tested", True))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: {run}/{CONFIG_NAME} is no config of a run; pack the run again") from error
    if counted != digest:
        raise ValueError(
            f"{path}: {run}/{CONFIG_NAME} has the hash {counted}, its folder {digest}: it is the config of another "
            "run, or of another version of msv; unpack it with the version that packed it"
        )


def _check_grid(path: Path, folder: Path, grid: PurePosixPath) -> None:
    """Raise a ValueError where a grid's list of runs is another grid's, or names a cell that cannot be a folder."""
    try:
        content = read_grid_file(folder / grid)
        for cell in content["cells"]:
            check_name("cell", str(cell), RESERVED_CELLS)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).replace(f'{folder}/', '')}") from error
    if (content["name"], content["recipe"]) != grid.parts:
        raise ValueError(f"{path}: {grid}/{GRID_FILE} is that of {content['name']}/{content['recipe']}; pack again")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as source:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
