"""A config dataclass's fields are the options: what stands in their annotation is the command line, --help and docs/settings.md.

    max_steps: Annotated[int | None, Option("Stop after N optimizer steps.", at_least=1)] = None

is `--max-steps INTEGER`. The parameters of a function are read in the same way: commands that need no config take their options so. A field
that is itself a dataclass stands for its fields. A field without an Option is none, and is set by code alone.
"""

import inspect
import json
import math
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from store.errors import InputError


@dataclass(frozen=True)
class Option:
    """What the type and the default of a field do not say about its option."""

    help: str = ""
    group: str = ""
    """Heading under which docs/settings.md has it."""
    default: str | None = None
    """In words, where a preset or the code decides: the command line then passes None, or () where values are collected."""
    flags: tuple[str, ...] = ()
    """None: the field's name with dashes."""
    at_least: int | float | None = None
    choices: tuple[str, ...] = ()
    """Where the type is str."""
    type: click.ParamType | None = None
    """Where Python's type does not say how the text is read."""
    values: tuple[tuple[str, str, str | None], ...] = ()
    """One switch for each value instead of one option: (flag, value, help; None: not shown)."""
    hidden: bool = False
    positional: bool = False
    """May be given as a word of its own, without the flag."""
    instead_of: tuple[str, ...] = ()
    """Fields that it is another way to, or that belong to another value of it: typed, it sets aside what a --config file says of these."""


def check_choices(config: Any) -> None:
    """InputError for the first field of this dataclass that is none of its Option's `choices`, or of its Literal's words. The parser says the same
    in its own words; this is for values that come another way. None is left to whoever completes it."""
    for name, (kind, mark) in _marks_of(type(config)).items():
        choices = mark.choices or (get_args(kind) if get_origin(kind) is Literal else ())
        given = getattr(config, name)
        for value in given if isinstance(given, tuple) else (given,):
            if choices and value is not None and value not in choices:
                flag = mark.flags[0] if mark.flags else f"--{name.replace('_', '-')}"
                raise InputError("unknown value", where=flag, expected=f"one of {', '.join(choices)}", found=value)


@lru_cache
def _marks_of(config: type) -> dict[str, tuple[Any, Option]]:
    hints = {name: get_args(hint) for name, hint in get_type_hints(config, include_extras=True).items()}
    return {name: words[:2] for name, words in hints.items() if len(words) > 1 and isinstance(words[1], Option)}


@dataclass(frozen=True)
class Argument:
    """A word that needs no option before it."""


class StorePath(click.Path):
    """The folder of a store; a URL becomes a checked local copy."""

    def __init__(self):
        super().__init__(path_type=Path)

    def convert(self, value, param, ctx):
        if isinstance(value, str) and "://" in value:
            from store.bar import bar
            from store.remote import local_copy

            with bar("copying", "shards") as progress:
                return local_copy(value, progress)
        return super().convert(value, param, ctx)


class NamedStore(StorePath):
    """The same as text, with or without a name: `PATH` or `NAME=PATH`."""

    name = "[NAME=]PATH"
    repeatable = True

    def convert(self, value, param, ctx):
        name, path = named(str(value))
        path = super().convert(path, param, ctx)
        return f"{name}={path}" if name else str(path)

    def get_metavar(self, param, ctx):
        return self.name


def named(text: str) -> tuple[str, str]:
    """`NAME=PATH` -> both; the name is empty where there is none."""
    found = re.fullmatch(r"([\w.-]+)=(.+)", text)
    return (found[1], found[2]) if found else ("", text)


class LocalStorePath(click.Path):
    """The folder of a store on this machine."""

    def __init__(self):
        super().__init__(path_type=Path)

    def convert(self, value, param, ctx):
        if isinstance(value, str) and "://" in value:
            raise InputError("must be a folder of this machine", where=f"{param.opts[0]} {value}", next="pull copies a store here.")
        return super().convert(value, param, ctx)


class Rate(click.FloatRange):
    """A number above zero; nan and inf, which pass every range, are none."""

    def __init__(self):
        super().__init__(min=0, min_open=True)

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        return number if math.isfinite(number) else self.fail(f"{value} is not a finite number.", param, ctx)


class IntegerOrAuto(click.IntRange):
    """A positive number, or the word auto."""

    name = "INTEGER|auto"

    def __init__(self):
        super().__init__(min=1)

    def convert(self, value, param, ctx):
        return value if value == "auto" else super().convert(value, param, ctx)

    def get_metavar(self, param, ctx):
        return self.name


class Numbers(click.ParamType):
    """Numbers with commas between them."""

    name = "TEXT"

    def convert(self, value, param, ctx):
        try:
            return tuple(float(each) for each in (value.split(",") if isinstance(value, str) else value))
        except (TypeError, ValueError) as error:
            raise InputError("not comma-separated numbers", where=f"{param.opts[0]} {value}") from error


class JsonObject(click.ParamType):
    """A JSON object, or the mapping that a file has."""

    name = "JSON"

    def convert(self, value, param, ctx):
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(f"{value!r} is not JSON: {error}.", param, ctx)
        if not isinstance(value, dict):
            self.fail(f'{value!r} is not a JSON object such as {{"power": 2}}.', param, ctx)
        return {name: self._number(each) for name, each in value.items()}

    def _number(self, value):
        """What a YAML file says is text."""
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError:
            return value


class Day(click.DateTime):
    """A date, as the text YYYY-MM-DD."""

    def __init__(self):
        super().__init__(["%Y-%m-%d"])

    def convert(self, value, param, ctx):
        return super().convert(value, param, ctx).date().isoformat()


STORE_TO_READ = Option(
    "Folder of the store, such as store/think, or a URL (s3://, hf://datasets/, file://).", type=StorePath(), positional=True
)
LOCAL_STORE = Option("Folder of the store, such as store/think.", type=LocalStorePath(), positional=True)

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


def options_of(source: Callable) -> list[click.Parameter]:
    """The options of a dataclass's fields, or of a function's parameters, in their order."""
    return [option for field in _fields(source) for option in field.options]


def collected(source: Callable, values: dict[str, Any]) -> dict[str, Any]:
    """`values` of options, those of each field that is a dataclass gathered into one. What is not of `source` is left as it is."""
    values = dict(values)
    for field in _fields(source):
        if field.nested is not None:
            of_field = zip(_fields(field.nested, inside=True), field.options, strict=True)
            values[field.name] = field.nested(**{each.name: values.pop(option.name) for each, option in of_field})
    return values


@dataclass(frozen=True)
class _Field:
    name: str
    options: list[click.Parameter]
    nested: type | None = None


def _fields(source: Callable, inside: bool = False) -> Iterator[_Field]:
    """Those that are options. `inside`: of another dataclass, where two may have fields of the same name."""
    hints = get_type_hints(source, include_extras=True)
    for name, parameter in inspect.signature(source).parameters.items():
        hint = hints.get(name)
        if is_dataclass(hint):
            yield _Field(name, [option for field in _fields(hint, inside=True) for option in field.options], hint)
        elif get_origin(hint) is Annotated:
            kind, mark, *_ = get_args(hint)
            if isinstance(mark, Argument):
                yield _Field(name, [click.Argument([name], type=_click_type(kind, Option()))])
            elif isinstance(mark, Option):
                flags = mark.flags or (f"--{name.replace('_', '-')}",)
                called = flags[0].lstrip("-").replace("-", "_") if inside else name
                made = _options(called, flags, kind, mark, parameter.default)
                for option in made:
                    option.group, option.positional, option.instead_of = mark.group, mark.positional, mark.instead_of
                yield _Field(name, made)


def _options(name: str, flags: tuple[str, ...], kind: Any, mark: Option, default: Any) -> list[click.Parameter]:
    if mark.values:
        switches = []
        for flag, value, text in mark.values:
            chosen = {"default": value} if value == default else {}
            switches.append(click.Option([name, flag], flag_value=value, help=text, hidden=text is None, **chosen))
        return switches
    kinds = [
        each for each in (get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)) if each is not type(None)
    ]
    text = mark.help if mark.default is None else f"{mark.help}  [default: {mark.default}]".strip()
    decided = default is not inspect.Parameter.empty
    more: dict[str, Any] = {"help": text or None, "hidden": mark.hidden, "required": not decided and mark.default is None}
    if decided and mark.default is None:
        more["default"] = default
    if bool in kinds:
        if mark.default is None:
            return [click.Option([name, *flags], is_flag=True, **more)]
        return [click.Option([name, f"{flags[0]}/--no-{flags[0].lstrip('-')}", *flags[1:]], default=None, **more)]
    multiple = get_origin(kinds[0]) is tuple and (mark.type is None or getattr(mark.type, "repeatable", False))
    if multiple:
        kinds = [get_args(kinds[0])[0]]
        more.pop("default", None)
    more["show_default"] = more.get("default") not in (None, "")
    return [click.Option([name, *flags], type=mark.type or _click_type(kinds[0], mark), multiple=multiple, **more)]


def _click_type(kind: Any, mark: Option) -> click.ParamType:
    if get_origin(kind) is Literal or mark.choices:
        return click.Choice(mark.choices or get_args(kind))
    if mark.at_least is not None:
        return click.IntRange(min=mark.at_least) if kind is int else click.FloatRange(min=mark.at_least)
    simple = {int: click.INT, float: click.FLOAT, str: click.STRING, Path: click.Path(path_type=Path)}
    return simple[kind]
