"""Configuration from TOML into frozen dataclasses; an unknown key is an error."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from .errors import UsageError

T = TypeVar("T")


def load_toml(path: Path, cls: type[T]) -> T:
    """Read ``path`` into the dataclass ``cls``.

    Raises:
        UsageError: the file is missing, is not TOML, or does not fit ``cls``.
    """
    return from_mapping(read_toml(path), cls, where=str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of the TOML file ``path``.

    Raises:
        UsageError: the file is missing or is not TOML.
    """
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error


def from_mapping(data: Mapping[str, Any], cls: type[T], *, where: str) -> T:
    """Build the dataclass ``cls`` from ``data``, checking names and types.

    Args:
        where: what to call the source in an error message.

    Raises:
        UsageError: an unknown or missing key, or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise UsageError(
            f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(fields))}"
        )
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(data[name], hints[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UsageError(f"{where}: missing key {name!r}")
    return cls(**values)


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        hints = [option for option in options if option is not type(None)]
        fitting = [option for option in hints if type(value) is option]
        return _convert(value, (fitting or hints)[0], where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UsageError(f"{where}: expected a table")
        return from_mapping(value, hint, where=where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UsageError(f"{where}: expected a list")
        item = typing.get_args(hint)[0]
        return tuple(_convert(v, item, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UsageError(f"{where}: expected a table")
        item = typing.get_args(hint)[1]
        return {str(k): _convert(v, item, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UsageError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value
