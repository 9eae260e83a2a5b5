"""Records: frozen dataclasses as JSON files, with a version; the one way in which they are written, read and described.

A record's file may have been edited, or hold what a site said, so nothing in it is taken before its shape is looked at:
size, types and names. Names that a record does not know are passed over; a file without a version is from before there
were any. A field's name in the file is its own unless it has another `key`.
Enters: a record, or a file's bytes. Leaves: a JSON value, or the record. Errors: Unfit, which says what was found where
and whether a newer version wrote it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from app import text

MOST = 2**26  # bytes of a record's file
Record = TypeVar("Record")


class Unfit(ValueError):
    """What is there is no such record; `newer`: a newer version of this program wrote it."""

    def __init__(self, found: str, newer: bool = False) -> None:
        super().__init__(found)
        self.newer = newer


def entry(
    meaning: str, unit: str = "", *, key: str = "", choices: tuple[str, ...] = (), default: Any = dataclasses.MISSING
) -> Any:
    """A record's field. Without a default its file must have it; None and "" by default are left out of the file."""
    notes = {"meaning": meaning, "unit": unit, "key": key, "choices": choices}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=notes)
    return dataclasses.field(default=default, metadata=notes)


def name(field: dataclasses.Field[Any]) -> str:
    """The field's name in the file."""
    return str(field.metadata.get("key") or field.name)


def read(kind: type[Record], path: Path, longest: int = text.LONGEST) -> Record:
    """The record in a file, of which no text is longer than `longest`. Errors: Unfit, OSError."""
    with path.open("rb") as file:
        return parse(kind, file.read(MOST + 1), longest)


def parse(kind: type[Record], content: bytes, longest: int = text.LONGEST) -> Record:
    """The record in a file's bytes. Errors: Unfit."""
    if len(content) > MOST:
        raise Unfit(f"it is larger than {MOST} bytes")
    try:
        value = text.tidy(json.loads(content), longest)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"it is no JSON ({type(error).__name__})") from None
    return of(kind, value)


def of(kind: type[Record], value: Any) -> Record:
    """The record that a JSON value is. Errors: Unfit."""
    if not isinstance(value, dict):
        raise Unfit("it is no JSON object")
    version, known = value.get("version", 0), getattr(kind, "version", 0)
    if type(version) is not int or version < 0:
        raise Unfit("its version is no number")
    if version > known:
        raise Unfit(f"it is of version {version}, and this program reads up to {known}", newer=True)
    return typing.cast(Record, _taken(kind, value, ""))


def told(record: Any) -> Any:
    """The JSON value that a record, or a part of one, is in a file."""
    if own := getattr(record, "told", None):
        return own()
    if dataclasses.is_dataclass(record):
        pairs = [(field, getattr(record, field.name)) for field in dataclasses.fields(record)]
        return {name(field): told(value) for field, value in pairs if value is not None and value != ""}
    if isinstance(record, Mapping):
        return {key: told(value) for key, value in record.items()}
    return [told(value) for value in record] if isinstance(record, (list, tuple)) else record


@functools.cache
def _fields(kind: type) -> tuple[tuple[dataclasses.Field[Any], Any], ...]:
    """A record's fields, each with its type."""
    hints = typing.get_type_hints(kind)
    return tuple((field, hints[field.name]) for field in dataclasses.fields(kind))


def _taken(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as that type. Errors: Unfit."""
    of_what, args = typing.get_origin(kind), typing.get_args(kind)
    if of_what in (types.UnionType, typing.Union):
        return None if value is None else _taken(args[0], value, where)
    if of_what is dict and isinstance(value, dict):
        return {key: _taken(args[1], held, f"{where}.{key}") for key, held in value.items()}
    if of_what is tuple and isinstance(value, list):
        return tuple(_taken(args[0], held, f"{where}.{number}") for number, held in enumerate(value))
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        if own := getattr(kind, "taken", None):
            return own(value)
        return _dataclass(typing.cast(type, kind), value, where)
    if kind is Any or type(value) is kind or (kind is float and type(value) is int):
        return value
    raise Unfit(f"{where.lstrip('.') or 'it'} is of another type than it must be")


def _dataclass(kind: type, value: dict[str, Any], where: str) -> Any:
    found = {}
    for field, hint in _fields(kind):
        if (key := name(field)) in value:
            found[field.name] = held = _taken(hint, value[key], f"{where}.{key}")
            if field.metadata.get("choices") and held not in field.metadata["choices"]:
                raise Unfit(f"{f'{where}.{key}'.lstrip('.')} is none of {', '.join(field.metadata['choices'])}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise Unfit(f"{f'{where}.{key}'.lstrip('.')} is not there")
    if "version" in found:
        found["version"] = getattr(kind, "version", 0)  # what it is now, not what it was in the file
    return kind(**found)
