"""Operations on one resolved config, a plain nested dict: dotted overrides, and the hash that names a run's folder."""

import copy
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

# Where and how a run is carried out, which leaves what is trained as it is.
_TOP_LEFT_OUT = frozenset({"config", "print_config", "grid", "ckpt_path", "weights_only"})
_TRAINER_LEFT_OUT = frozenset(
    {
        "accelerator",
        "devices",
        "num_nodes",
        "strategy",
        "plugins",
        "logger",
        "default_root_dir",
        "enable_progress_bar",
        "enable_model_summary",
        "enable_checkpointing",
        "enable_autolog_hparams",
        "profiler",
        "log_every_n_steps",
        "barebones",
    }
)
_DATA_LEFT_OUT = frozenset(
    {"root", "download", "num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "predict_paths"}
)
_MODEL_LEFT_OUT = frozenset({"compile", "cuda_graphs"})
# Options of the network that came later, with what it did before: runs from then are still the same.
_CAME_LATER = {"recurrence": True}
# Callbacks that watch a run or save it; any other may change what is trained, and counts.
_WATCHING_CALLBACKS = frozenset(
    {
        "DeviceStatsMonitor",
        "LearningRateMonitor",
        "ModelCheckpoint",
        "ModelSummary",
        "ProgressBar",
        "RichModelSummary",
        "RichProgressBar",
        "ThroughputMonitor",
        "Timer",
        "TQDMProgressBar",
    }
)


def apply_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config with values set by dotted key.

    A key must exist in the config, so that a typo is not a silent no-op. New keys are taken only inside a free dict:
    an empty or null one, or one named ``*_args`` or ``*_kwargs`` (``init_args`` apart, whose keys are a signature).
    A whole subtree may be replaced; shorter keys are applied before longer ones, so a cell may replace a subtree and
    set a value inside it.

    Args:
        config: resolved, as plain dicts and lists; left as it is.
        overrides: full dotted path -> value.

    Raises:
        ValueError: a key matches nothing in the config; names the nearest paths that exist.
    """
    result = _copy(config)
    for key in sorted(overrides, key=lambda key: key.count(".")):
        parts = key.split(".")
        node: Any = result
        for depth, part in enumerate(parts[:-1]):
            if not isinstance(node, dict) or part not in node:
                raise _no_such_key(key, result)
            if node[part] is None and depth > 0 and part != "init_args":
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict) or (parts[-1] not in node and not _is_free(node, parts[-2:-1])):
            raise _no_such_key(key, result)
        node[parts[-1]] = _copy(overrides[key])
    return result


def get_path(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted path; KeyError where there is none."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            raise KeyError(key)
        node = node[part]
    return node


def config_hash(config: Mapping[str, Any], tested: bool = True) -> str:
    """Eight hex digits of what a run trains, and is judged by: the resolved config in canonical JSON.

    Left out are paths and the settings of devices, processes, compilation, logs and progress bars: the same training
    elsewhere has the same hash. The seed counts as ``seed_everything``, not as the copies that follow it in the data
    and the model. Of ``model.init_args.pretrained`` the file's name counts, not its folder. An option of the network
    that came later counts where it is not what the network did before. Key order, tuple or list, and 1 or 1.0 make no
    difference.

    Args:
        config: resolved, as plain dicts and lists.
        tested: whether the run ends with the test split; one that does not is another run.
    """
    counted = {key: _copy(value) for key, value in config.items() if key not in _TOP_LEFT_OUT}
    trainer = counted.get("trainer")
    if isinstance(trainer, dict):
        callbacks = trainer.get("callbacks")
        if isinstance(callbacks, dict):
            callbacks = [callbacks]
        if isinstance(callbacks, list):
            trainer["callbacks"] = [item for item in callbacks if _class_name(item) not in _WATCHING_CALLBACKS] or None
        counted["trainer"] = {
            key: value for key, value in trainer.items() if key not in _TRAINER_LEFT_OUT and value is not None
        }
    for section, left_out in (("data", _DATA_LEFT_OUT | {"seed"}), ("model", _MODEL_LEFT_OUT | {"seed"})):
        part = counted.get(section)
        if isinstance(part, dict) and isinstance(part.get("init_args"), dict):
            part["init_args"] = {key: value for key, value in part["init_args"].items() if key not in left_out}
            pretrained = part["init_args"].get("pretrained")
            if isinstance(pretrained, str):
                part["init_args"]["pretrained"] = PurePath(pretrained).name
            network = part["init_args"].get("network")
            if isinstance(network, dict) and isinstance(network.get("init_args"), dict):
                options = network["init_args"]
                for name, before in _CAME_LATER.items():
                    if options.get(name) == before:
                        del options[name]
    if not tested:
        counted["tested"] = False
    return hashlib.sha256(canonical(counted).encode()).hexdigest()[:8]


def canonical(value: Any) -> str:
    """JSON text that is the same for values that mean the same: sorted keys, lists for tuples, 1 for 1.0."""
    return json.dumps(_normal(value), sort_keys=True, separators=(",", ":"), default=str)


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """A clause that names the nearest of some names, or lists them where none is near."""
    names = list(dict.fromkeys(names))
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"there are: {shown}" if shown else "there are none"


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return copy.deepcopy(value)


def _normal(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _normal(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_normal(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _class_name(item: Any) -> str:
    path = item.get("class_path", "") if isinstance(item, dict) else item
    return str(path).rpartition(".")[2]


def _is_free(node: Mapping[str, Any], name: list[str]) -> bool:
    if not name or name[0] == "init_args":
        return False
    return not node or name[0].endswith(("_args", "_kwargs"))


def _paths(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every dotted path of a config, subtrees before their leaves."""
    paths = []
    for key, value in config.items():
        paths.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            paths.extend(_paths(value, f"{prefix}{key}."))
    return paths


def _without_init_args(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != "init_args")


def _no_such_key(key: str, config: Mapping[str, Any]) -> ValueError:
    by_short = {_without_init_args(path): path for path in _paths(config)}
    short = _without_init_args(key)
    # First the same path but for `init_args`, then paths that end as the key does, then those that read alike.
    same = [path for other, path in by_short.items() if other == short or other.endswith(f".{short}")]
    close = [by_short[other] for other in difflib.get_close_matches(short, by_short, n=3, cutoff=0.6)]
    if not same and not close:
        ends = {path.rpartition(".")[2]: path for path in reversed(by_short.values())}
        close = [ends[end] for end in difflib.get_close_matches(short.rpartition(".")[2], ends, n=1, cutoff=0.8)]
    found = list(dict.fromkeys([*same, *close]))[:3]
    hint = "did you mean " + " or ".join(found) + "?" if found else "`--print_config` shows every key there is"
    return ValueError(f"grid key {key!r} matches nothing in the config; expected a full dotted path; {hint}")
