"""The parser's errors, which show every branch it tried, made short: the key, the value, what was expected."""

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module

from jsonargparse import ArgumentError

_KEY = re.compile(r'Parser key "([^"]+)":')
_CLASS = re.compile(r"class_path='?([\w.]+)'|class_path '([\w.]+)'")
_NOISE = re.compile(
    r"^(Does not validate against|Subtypes:|Errors:|Given value|Import path .* does not correspond|"
    r"Expected a path but .* not accessible)"
)
_UNKNOWN = re.compile(
    r"Option '([^']+)' is not accepted|does not accept option '([^']+)'|Key '([^']+)' is not expected"
)


@contextmanager
def readable_errors(options: Iterable[str] = ()) -> Iterator[None]:
    """Turn an error of the parser into a ValueError of one line.

    Args:
        options: the options there are (``--trainer.max_epochs``), to name the nearest to an unknown one.
    """
    try:
        yield
    except ArgumentError as error:
        raise ValueError(readable(str(error), options)) from error


@contextmanager
def original_errors() -> Iterator[None]:
    """Let through what a class raises on being built, without the parser's page round it."""
    try:
        yield
    except ValueError as error:
        original: BaseException = error
        branches: list[str] = []
        while str(original).startswith("Does not validate") and original.__cause__ is not None:
            branches = [line[4:] for line in str(original).splitlines() if line.startswith("  - ")]
            original = original.__cause__
        if "to be a subclass of" in str(original) and len(branches) > 1:
            # A class that is no network, such as TimmModel, fails at the first branch; what it raised is the last.
            original = ValueError(branches[-1])
        raise original from None


@dataclass
class _Place:
    """Where in the nested text we are: its indent, the key, and the class that the keys below belong to."""

    indent: int
    key: str = ""
    class_path: str = ""


@dataclass
class _Leaf:
    path: list[_Place]
    messages: list[str] = field(default_factory=list)


def readable(text: str, options: Iterable[str] = ()) -> str:
    """One line for an error of the parser; the text as it is where its shape is not known."""
    leaves: list[_Leaf] = []
    stack: list[_Place] = []
    given = ""
    callable_depth = 0
    for line in filter(str.strip, text.splitlines()):
        indent = len(line) - len(line.lstrip(" -"))
        message = line.strip(" -")
        while stack and indent <= stack[-1].indent:
            stack.pop()
        if not given and message.startswith("Given value:"):
            given = message.removeprefix("Given value:").strip()
        if "expects a function or a callable class: " in message:
            # The class whose keys follow is named at the very end of this branch.
            callable_depth = len(stack)
            message = message.rpartition("expects a function or a callable class: ")[2]
        found = _CLASS.search(message)
        if found:
            at = callable_depth if "Got value: Namespace(" in message else len(stack)
            stack.insert(at, _Place(indent - 1 if at < len(stack) else indent, class_path=found[1] or found[2]))
        stack += [_Place(indent, name) for name in _KEY.findall(message)]
        message = _KEY.sub("", message).strip()
        message = re.sub(r"\.? Got value: Namespace\(.*$", "", message)
        if not message or _NOISE.match(message) or message.startswith("Problem with given class_path"):
            continue
        if leaves and [id(place) for place in leaves[-1].path] == [id(place) for place in stack]:
            leaves[-1].messages.append(message)
        else:
            leaves.append(_Leaf(list(stack), [message]))
    if not leaves:
        return " ".join(text.split())
    # The branch that got furthest is the one that was meant.
    leaf = max(leaves, key=lambda leaf: len(leaf.path))
    return _describe(leaf, given, options)


def _describe(leaf: _Leaf, given: str, options: Iterable[str]) -> str:
    path = _path(leaf.path)
    first = leaf.messages[0]
    unknown = _UNKNOWN.search(first)
    if unknown:
        name = next(part for part in unknown.groups() if part)
        class_path = next((place.class_path for place in reversed(leaf.path) if place.class_path), "")
        full = f"{path}.{name}" if path else name
        known = _arguments(class_path) if class_path else [option.removeprefix("--") for option in options]
        return f"unknown key {full}; {_nearest(name, known)}"
    if "arguments are required" in first:
        return f"{first}; give --config with an experiment, such as experiments/ablate_scans.yaml"
    if first.startswith("unrecognized arguments:"):
        word = first.removeprefix("unrecognized arguments:").split()[0]
        return f"unknown option {word}; {_nearest(word.partition('=')[0], options)}"
    expected = [_type(message) for message in leaf.messages if message.startswith("Expected a")]
    if expected and path:
        value = re.search(r"Got value: (.*)$", first)
        shown = value[1] if value else given
        return f"{path}: {shown!r} given, expected {' or '.join(dict.fromkeys(expected))}"
    if "no attribute" in first and leaf.path and leaf.path[-1].class_path:
        class_path = leaf.path[-1].class_path
        module, _, name = class_path.rpartition(".")
        near = _nearest(name, _classes(module), prefix=f"{module}.")
        return f"{path.removesuffix('.init_args')}: there is no {class_path}; {near}"
    message = "; ".join(dict.fromkeys(leaf.messages))
    message = message.rpartition(" failed: ")[2] if message.startswith("Call to compute_fn") else message
    return f"{path}: {message}" if path else message


def _path(places: list[_Place]) -> str:
    parts: list[str] = []
    in_class = False
    for place in places:
        if place.key:
            # The grid and the moving average are no classes to choose from, so their keys have no init_args.
            parts += ["init_args", place.key] if in_class and parts and parts[0] != "grid" else [place.key]
            in_class = False
        if place.class_path:
            in_class = True
    if in_class and parts and parts[0] != "grid" and places[-1].class_path:
        parts.append("init_args")
    return ".".join(parts)


def _type(message: str) -> str:
    text = message.partition("Expected a")[2].removeprefix("n").partition(". Got value")[0].strip()
    text = text.removeprefix("<class '").removesuffix("'>").removeprefix("typing.")
    text = re.sub(r"^Literal\[(.*)\]$", r"one of \1", text)
    return "null" if text == "NoneType" else text


def _arguments(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        target = getattr(import_module(module), name)
        return [parameter for parameter in inspect.signature(target).parameters if parameter != "self"]
    except (ImportError, AttributeError, ValueError, TypeError):
        return []


def _classes(module: str) -> list[str]:
    try:
        content = import_module(module)
    except (ImportError, ValueError):
        return []
    return [name for name in getattr(content, "__all__", []) if isinstance(getattr(content, name, None), type)]


def _nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    names = list(dict.fromkeys(names))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(prefix + match for match in close)}?"
    if names and len(names) <= 30:
        return f"there are: {', '.join(names)}"
    return "--help lists what there is"
