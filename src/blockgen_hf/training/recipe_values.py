"""Values of a recipe: read from YAML, overridden, and brought to the types that they are to have."""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]


class _Loader(yaml.SafeLoader):
    """SafeLoader, which would silently take the last of two values of one key."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key `{name}` is there twice", key.start_mark)
            seen.add(name)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read_yaml(path: Path) -> dict[str, Any]:
    """
    The mapping in a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or no mapping; names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe {str(path)!r}.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}{_place(error)}: not YAML: {_problem(error)}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8, byte {error.start}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping with sections, not {_name_of(values)}.")
    return values


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error)


def parse_override(text: str) -> tuple[list[str], Any]:
    """
    `section.key=value`, the value as in YAML, as the path of keys and the value.

    Raises:
        ValueError: not of this form, or no YAML.
    """
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise ValueError(f"{text!r} is no override: write section.key=value, for instance training.max_steps=100.")
    try:
        return keys, yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"The override {text!r} has a value that is not YAML: {_problem(error)}.") from error


def override(values: dict[str, Any], keys: list[str], value: Any) -> None:
    """Sets a value in nested mappings, which are made where there are none."""
    for key in keys[:-1]:
        inner = values.get(key)
        if not isinstance(inner, dict):
            inner = values[key] = {}
        values = inner
    values[keys[-1]] = value


def check_keys(given: Iterable[Any], accepted: Iterable[str], where: str, what: str = "key") -> None:
    """
    Raises:
        ValueError: a key that is not accepted; names the likeliest one, or all if they are few.
    """
    accepted = list(accepted)
    for key in given:
        if key in accepted:
            continue
        close = difflib.get_close_matches(str(key), accepted, 1)
        hint = f" Did you mean `{close[0]}`?" if close else ""
        names = f" Accepted: {', '.join(sorted(accepted))}." if len(accepted) <= 40 else ""
        raise ValueError(f"{where}: there is no {what} `{key}`.{hint}{names}")


def convert(value: Any, hint: Any, where: str) -> Any:
    """
    The value as the type asks for it. Numbers may be texts, since YAML takes `3e-4` for one, and whole numbers may be
    written `1e6`; what YAML makes of `no` is the choice "no".

    Raises:
        ValueError: of another type.
    """
    kinds = _kinds(hint)
    choices = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    if value is False and bool not in kinds and (choices or where.endswith("_strategy`")):
        value = "no"
    if choices and isinstance(value, str):
        accepted = [member.value for member in choices[0]]
        if value not in accepted:
            raise ValueError(f"{where} must be one of {', '.join(accepted)}, but is {value!r}.")
        return value
    for kind in kinds:
        try:
            return _as(value, kind)
        except TypeError:
            pass
    wanted = dict.fromkeys(_describe(kind) for kind in kinds if kind is not Any)
    raise ValueError(f"{where} must be {' or '.join(wanted)}, but is {value!r}.")


def _kinds(hint: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(hint)
    return typing.get_args(hint) if origin in (typing.Union, types.UnionType) else (hint,)


def _as(value: Any, kind: Any) -> Any:
    origin = typing.get_origin(kind) or kind
    if kind is Any:
        return value
    if origin is typing.Literal:
        if any(value is accepted or value == accepted for accepted in typing.get_args(kind)):
            return value
    elif origin is list:
        (inner,) = typing.get_args(kind) or (Any,)
        if isinstance(value, list):
            return [_as(entry, inner) for entry in value]
    elif origin is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif origin in (int, float):
        return _number(value, origin)
    elif isinstance(origin, type) and isinstance(value, origin):
        return value
    raise TypeError


def _number(value: Any, kind: type) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    try:
        number = float(value)
    except ValueError as error:
        raise TypeError from error
    if kind is float:
        return number
    if isinstance(value, int):
        return value
    if not number.is_integer():
        raise TypeError
    return int(number)


_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "a mapping",
    type(None): "null",
}


def _describe(kind: Any) -> str:
    origin = typing.get_origin(kind) or kind
    if origin is list:
        inner = typing.get_args(kind) or (Any,)
        return f"a list of {_describe(inner[0]).removeprefix('a ')}s" if inner[0] is not Any else "a list"
    if origin is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return _NAMES.get(origin, getattr(origin, "__name__", str(origin)))


def _name_of(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


__all__ = ["check_keys", "convert", "override", "parse_override", "read_yaml"]
