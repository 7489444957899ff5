"""Frozen dataclasses to JSON and back, strictly: a missing field, an unknown one or a wrong type is an error, never a default."""

import functools
import json
import stat
import types
import typing
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

from store.errors import StoreError

T = typing.TypeVar("T")

OPTIONAL = {"optional": True}
"""Metadata of a field that files made before it existed lack: absent means None, and None is not written."""


def plain(record: typing.Any) -> dict[str, typing.Any]:
    """A dataclass as JSON objects and lists, without its optional fields that are None."""
    return typing.cast(dict[str, typing.Any], _without_absent(record, asdict(record)))


def _without_absent(record: typing.Any, value: typing.Any) -> typing.Any:
    if is_dataclass(record):
        absent = {field.name for field in fields(record) if field.metadata.get("optional") and getattr(record, field.name) is None}
        return {name: _without_absent(getattr(record, name), item) for name, item in value.items() if name not in absent}
    if isinstance(record, tuple):
        return [_without_absent(each, item) for each, item in zip(record, value, strict=True)]
    return value


def canonical(record: object) -> bytes:
    """One dataclass (or plain JSON value) as UTF-8 JSON whose bytes depend on the content alone: sorted keys, no spaces, no NaN."""
    value = plain(record) if is_dataclass(record) else record
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def parse(data: bytes, where: object) -> object:
    """The JSON value in `data`. StoreError, naming `where`, if it is none, or has what we never write: NaN, half characters."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\ud" in data.lower():  # an escaped surrogate; alone it is no character and could not even be printed
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
        raise StoreError("not valid JSON", where=where, expected="what refdpo wrote", found=error, next=_ALTERED) from error


def read(path: Path) -> bytes:
    """The bytes of a file. StoreError if it cannot be read or is no file: a pipe or device of that name would be read without end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise StoreError("not a file", where=path, next=_ALTERED)
        return path.read_bytes()
    except OSError as error:
        raise StoreError("cannot be read", where=path, found=(error.strerror or str(error)).lower()) from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def build(cls: type[T], value: object, where: object) -> T:
    """An instance of the dataclass `cls` from a parsed JSON object. StoreError, naming the field, unless it fits exactly."""
    try:
        return typing.cast(T, _convert(cls, value, ""))
    except _Misfit as misfit:
        raise StoreError(f"malformed {cls.__name__.lower()}: {misfit}", where=where, next=_ALTERED) from misfit


_ALTERED = "The file was altered or made by another version of refdpo."


class _Misfit(ValueError):
    pass


def _convert(hint: typing.Any, value: object, name: str) -> object:
    """`value` as the type `hint`; containers and nested dataclasses are followed. `name` is the path of the field in messages."""
    if isinstance(hint, type) and is_dataclass(hint):
        return _convert_record(hint, value, name)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # only `X | None` occurs
        return None if value is None else _convert(inner[0], value, name)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(inner[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _convert(inner[1], item, f"{name}.{key}") for key, item in value.items()}
    if hint is typing.Any:
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:  # exactly: a bool is no int
        raise _Misfit(f"field {name} should be {getattr(hint, '__name__', hint)}, is {json.dumps(value)[:80]}")
    return value


@functools.cache
def _hints(cls: type) -> dict[str, object]:
    """The type of each field. Kept: working them out takes longer than everything else about a record, and a store has thousands."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


@functools.cache
def _optional(cls: type) -> frozenset[str]:
    return frozenset(field.name for field in fields(cls) if field.metadata.get("optional"))


def _convert_record(cls: type, value: object, name: str) -> object:
    if not isinstance(value, dict):
        raise _Misfit(f"{name or 'the whole'} should be an object, is {json.dumps(value)[:80]}")
    hints = _hints(cls)
    for problem, differing in (("missing", hints.keys() - value.keys() - _optional(cls)), ("unknown", value.keys() - hints.keys())):
        if differing:
            raise _Misfit(f"{problem} {', '.join(f'{name}.{d}'.lstrip('.') for d in sorted(differing))}")
    try:
        return cls(**{key: _convert(hints[key], item, f"{name}.{key}".lstrip(".")) for key, item in value.items()})
    except _Misfit:
        raise
    except ValueError as error:  # refused by the class itself, in __post_init__
        raise _Misfit(str(error)) from error
