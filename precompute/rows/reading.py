"""Data files -> the columns that are scored, as an Arrow file in the cache of `datasets`, which keeps it until a file changes.

Text stays text: nothing is guessed from how a value looks, so dates remain words and "NA" remains an answer. Columns that are not scored are
not even typed. JSON values that differ in shape from row to row (the arguments of tool calls) are kept as JSON text, in the column
`chosen.json` instead of `chosen`, because Arrow would round their numbers, change their order or fill them with nulls.
"""

import bz2
import codecs
import contextlib
import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
from datasets.builder import Key

from precompute.rows.columns import (
    BESIDE_SUFFIX,
    JSON_SUFFIX,
    LEFT_OUT_SUFFIX,
    NOTICED_SUFFIX,
    ColumnOptions,
    beside,
    has_content,
    noticed,
    says_something,
    scored,
    source_type,
)
from precompute.rows.files import COMPRESSIONS, kind_of
from store.errors import InputError

BYTES_PER_TABLE = 16 << 20

MOST_FIELDS = 100
"""Of a column stored as typed values. Tool schemas of a large dataset would make thousands, null in nearly every row."""


@dataclass
class FilesConfig(datasets.BuilderConfig):
    """What the cached table depends on, beside the files."""

    options: ColumnOptions = field(default_factory=ColumnOptions)
    sizes: tuple[int, ...] = ()
    """Of the files, bytes: the cache knows them by path and time alone."""
    source: str = ""
    """The dataset as it was asked for, for messages."""


class Files(datasets.ArrowBasedBuilder):
    """The builder that `datasets` runs, once, under a lock: other workers wait and then map its result."""

    BUILDER_CONFIG_CLASS = FilesConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager) -> list:
        files = [Path(name) for name in self.config.data_files["rows"]]
        read = {"parquet": _Parquet, "json": _Json, "csv": _Csv}[kind_of(files[0])](files, self.config.options, self.config.source)
        self.info.features = datasets.Features.from_arrow_schema(read.schema)
        return [datasets.SplitGenerator("rows", {"read": read})]

    def _generate_tables(self, read) -> Iterator[tuple[Key, pa.Table]]:
        index = -1
        for index, table in enumerate(read.tables()):
            yield Key(0, index), table
        if index < 0:
            raise InputError("the dataset has no rows", where=f"--dataset {self.config.source}")


def read_files(files: list[Path], options: ColumnOptions, source: str) -> datasets.Dataset:
    """The rows of all `files`, which are of one kind, in order. InputError names the file and line that cannot be read."""
    # Under a name of its own: the cache must not serve what another version read differently.
    builder = Files(
        dataset_name="refdpo-rows-4",
        data_files={"rows": [glob.escape(str(file.absolute())) for file in files]},  # they are patterns to `datasets`
        options=options,
        sizes=tuple(file.stat().st_size for file in files),
        source=source,
    )
    builder.download_and_prepare()
    return builder.as_dataset("rows")


class _Parquet:
    def __init__(self, files: list[Path], options: ColumnOptions, source: str):
        where = f"--dataset {source}"
        schemas = [pq.read_schema(file) for file in files]
        names = list(dict.fromkeys(name for schema in schemas for name in schema.names))
        if not any(pq.read_metadata(file).num_rows for file in files):
            raise InputError("the dataset has no rows", where=where)
        self.kept = scored(names, options, where)
        for file, schema in zip(files, schemas, strict=True):
            if twice := [name for name in self.kept if schema.names.count(name) > 1]:
                raise InputError(f"the column {', '.join(twice)} is there twice", where=file)
            absent = [name for name, kind in self.kept.items() if kind in ("chosen", "rejected") and name not in schema.names]
            if absent:
                raise InputError(f"no column {' and '.join(absent)}", where=file, found=", ".join(schema.names))
        parts = [pa.schema([_plain(schema.field(name)) for name in self.kept if name in schema.names]) for schema in schemas]
        try:
            found = pa.unify_schemas(parts, promote_options="permissive")
        except pa.ArrowException as error:
            odd = next(file for file, part in zip(files, parts, strict=True) if not _agree(parts[0], part))
            raise InputError(
                f"a column is of another type than in {files[0].name}: {str(error).splitlines()[0]}", where=odd
            ) from error
        self.files, self.noticed = files, noticed(names, self.kept, options)
        others = {name: _common_type(schemas, name) for name in beside(names, self.kept, options)}
        beside_them = {name: type_ for name, type_ in others.items() if type_ is not None}
        self.left_out = [name for name, type_ in others.items() if type_ is None]
        self.read = pa.schema([*(found.field(name) for name in self.kept), *beside_them.items()])
        self.schema = pa.schema(
            [pa.field(self.kept.get(each.name, each.name + BESIDE_SUFFIX), each.type) for each in self.read]
            + [pa.field(name + NOTICED_SUFFIX, pa.bool_()) for name in self.noticed]
            + [pa.field(name + LEFT_OUT_SUFFIX, pa.null()) for name in self.left_out]
        )

    def tables(self) -> Iterator[pa.Table]:
        holds = [_column_says_something(self.files, name) for name in self.noticed]
        for file in self.files:
            rows = pyarrow.dataset.dataset([str(file)], schema=self.read, format="parquet")
            for batch in rows.to_batches(batch_size=1024, batch_readahead=2, fragment_readahead=1):
                more = [pa.repeat(each, len(batch)) for each in holds] + [pa.nulls(len(batch))] * len(self.left_out)
                yield pa.table([*batch.columns, *more], schema=self.schema)


def _common_type(schemas: list[pa.Schema], name: str) -> pa.DataType | None:
    """The type of a column that is not scored; None if it cannot be kept, or the files do not agree."""
    types = [_plain_type(schema.field(name).type) for schema in schemas if schema.get_field_index(name) >= 0]
    if any(schema.names.count(name) > 1 for schema in schemas):
        return None
    try:
        found = pa.unify_schemas([pa.schema([(name, type_)]) for type_ in types], promote_options="permissive").field(name).type
    except pa.ArrowException:
        return None
    return found if source_type(found) is not None else None


def _agree(one: pa.Schema, other: pa.Schema) -> bool:
    try:
        pa.unify_schemas([one, other], promote_options="permissive")
    except pa.ArrowException:
        return False
    return True


def _column_says_something(files: list[Path], name: str) -> bool:
    for file in files:
        with pq.ParquetFile(file) as opened:
            if name in opened.schema_arrow.names and any(
                has_content(batch.column(0)) for batch in opened.iter_batches(64, columns=[name])
            ):
                return True
    return False


def _plain(field: pa.Field) -> pa.Field:
    """The field without what only saves space: dictionaries, views, fixed sizes; nullable, because another file may lack it."""
    return pa.field(field.name, _plain_type(field.type))


def _plain_type(type_: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(type_):
        return _plain_type(type_.value_type)
    if pa.types.is_struct(type_):
        return pa.struct([_plain(type_.field(i)) for i in range(type_.num_fields)])
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        return pa.list_(_plain_type(type_.value_type))
    if pa.types.is_string_view(type_) or pa.types.is_large_string(type_):
        return pa.string()
    return type_


class _Csv:
    def __init__(self, files: list[Path], options: ColumnOptions, source: str):
        self.files, self.headers = files, []
        for file in files:
            with _opened_text(file) as stream:
                self.headers.append(next(csv.reader(stream, delimiter=_delimiter(file)), []))
        for file, header in zip(files, self.headers, strict=True):
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise InputError(f"the column {', '.join(twice)} is there twice", where=file)
            if set(header) != set(self.headers[0]):
                raise InputError(f"other columns than in {files[0].name}", where=file, expected=self.headers[0], found=header)
        self.kept = scored(self.headers[0], options, f"--dataset {source}")
        self.noticed = noticed(self.headers[0], self.kept, options)
        self.beside = beside(self.headers[0], self.kept, options)
        self.schema = pa.schema(
            [pa.field(name, pa.string()) for name in self.kept.values()]
            + [pa.field(name + BESIDE_SUFFIX, pa.string()) for name in self.beside]
            + [pa.field(name + NOTICED_SUFFIX, pa.bool_()) for name in self.noticed]
        )

    def tables(self) -> Iterator[pa.Table]:
        for file, header in zip(self.files, self.headers, strict=True):
            for rows in _in_tables(self._rows(file, header), lambda row: sum(map(len, row.values()))):
                columns = {self.kept[name]: [row[name] for row in rows] for name in self.kept}
                columns |= {name + BESIDE_SUFFIX: [row[name] for row in rows] for name in self.beside}
                columns |= {name + NOTICED_SUFFIX: [bool(row[name].strip()) for row in rows] for name in self.noticed}
                yield pa.table(columns, schema=self.schema)

    def _rows(self, file: Path, header: list[str]) -> Iterator[dict]:
        csv.field_size_limit(1 << 30)
        with _opened_text(file) as stream:
            reader = csv.reader(stream, delimiter=_delimiter(file), strict=True)
            try:
                next(reader)
                for cells in reader:
                    if not cells:
                        continue  # an empty line
                    if len(cells) != len(header):
                        raise InputError(
                            "another number of cells than columns",
                            where=f"{file}, line {reader.line_num}",
                            expected=len(header),
                            found=len(cells),
                            next="Quote cells that contain the delimiter, quotes or line breaks.",
                        )
                    yield dict(zip(header, cells, strict=True))
            except (csv.Error, StopIteration) as error:
                raise InputError(f"not valid CSV: {error}", where=f"{file}, line {reader.line_num}") from error


def _delimiter(file: Path) -> str:
    return "\t" if ".tsv" in file.suffixes else ","


class _Json:
    """Read twice: for the shape of each column over all rows, and for the values."""

    def __init__(self, files: list[Path], options: ColumnOptions, source: str):
        self.files = files
        names: dict[str, None] = {}
        self.saying: set[str] = set()
        shapes: dict[str, object] = {}
        others: dict[str, set[type]] = {}
        for file in files:
            for line, row in _json_rows(file, unique=True):
                for name, value in row.items():
                    if name not in names:
                        names[name] = None
                    if name not in self.saying and says_something(value):
                        self.saying.add(name)
                    if name in _CANDIDATES or name in options.named():
                        shapes[name] = _widened(shapes.get(name), value, f"{file}, line {line}, {name}")
                    if value is not None:
                        others.setdefault(name, set()).add(_single(value))
        if not names:
            raise InputError("the dataset has no rows", where=f"--dataset {source}")
        self.kept = scored(names, options, f"--dataset {source}")
        self.noticed = noticed(names, self.kept, options)
        types = {name: _arrow_type(shapes.get(name), turns=kind != "tools") for name, kind in self.kept.items()}
        found = {name: _SINGLE.get(frozenset(others[name])) for name in beside(names, self.kept, options) if name in others}
        self.beside = {name: type_ for name, type_ in found.items() if type_ is not None}
        self.left_out = [name for name, type_ in found.items() if type_ is None]
        self.as_text = {name for name, type_ in types.items() if type_ is None}
        self.schema = pa.schema(
            [
                pa.field(kind + JSON_SUFFIX, pa.string()) if name in self.as_text else pa.field(kind, types[name])
                for name, kind in self.kept.items()
            ]
            + [pa.field(name + BESIDE_SUFFIX, type_) for name, type_ in self.beside.items()]
            + [pa.field(name + NOTICED_SUFFIX, pa.bool_()) for name in self.noticed]
            + [pa.field(name + LEFT_OUT_SUFFIX, pa.null()) for name in self.left_out]
        )

    def tables(self) -> Iterator[pa.Table]:
        rows = ((f"{file}, line {line}", row) for file in self.files for line, row in _json_rows(file))
        for block in _in_tables(rows, lambda each: _json_size(each[1])):
            columns = []
            for name, column in zip(self.kept, self.schema, strict=False):
                values = [row.get(name) for _, row in block]
                if name in self.as_text:
                    values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
                columns.append(_array(values, column.type, [where for where, _ in block]))
            for name, type_ in self.beside.items():
                values = [row.get(name) for _, row in block]
                if type_ == pa.float64():
                    values = [None if value is None else float(value) for value in values]
                columns.append(pa.array(values, type_))
            columns += [pa.repeat(name in self.saying, len(block)) for name in self.noticed]
            columns += [pa.nulls(len(block))] * len(self.left_out)
            yield pa.table(columns, schema=self.schema)


_SINGLE = {
    frozenset({str}): pa.string(),
    frozenset({int}): pa.int64(),
    frozenset({float}): pa.float64(),
    frozenset({int, float}): pa.float64(),
    frozenset({bool}): pa.bool_(),
}
"""Kinds that occur in a column that is not scored -> the type that it is kept in."""


def _single(value: object) -> type:
    """The kind of a single value; `object` for what Arrow has no place for as it is: lists, objects, half characters, huge numbers."""
    if isinstance(value, str):
        try:
            value.encode()
            return str
        except UnicodeEncodeError:
            return object
    if isinstance(value, int) and not isinstance(value, bool):
        return int if -(2**63) <= value < 2**63 else object
    return type(value) if isinstance(value, bool | float) else object


_CANDIDATES = frozenset({"prompt", "chosen", "rejected", "tools", "chat_template_kwargs", "messages", "conversations"})


def _array(values: list, type_: pa.DataType, where: list[str]) -> pa.Array:
    try:
        return pa.array(values, type_)
    except (UnicodeEncodeError, OverflowError, pa.ArrowException):
        for value, place in zip(values, where, strict=True):
            try:
                pa.array([value], type_)
            except (UnicodeEncodeError, OverflowError, pa.ArrowException) as error:
                raise InputError(f"a value cannot be stored: {str(error).splitlines()[0]}", where=place) from error
        raise


def _json_size(row: dict) -> int:
    return sum(len(value) if isinstance(value, str) else 200 for value in row.values())


def _in_tables(items: Iterable, size_of) -> Iterator[list]:
    block, size = [], 0
    for item in items:
        block.append(item)
        size += size_of(item)
        if size > BYTES_PER_TABLE or len(block) >= 1000:
            yield block
            block, size = [], 0
    if block:
        yield block


# --- the shape of JSON values: None (nothing but nulls), a Python type, [shape], {name: shape}, or MIXED

MIXED = object()


def _widened(shape: object, value: object, where: str) -> object:
    """The shape of a column that also holds `value`."""
    if value is None or shape is MIXED:
        return shape
    if isinstance(value, dict):
        if shape is None:
            shape = {}
        if not isinstance(shape, dict):
            return _mixed(shape, value, where)
        if shape.keys() != value.keys() and list(value) != [name for name in shape if name in value] and shape:
            new = [name for name in value if name not in shape]
            if [name for name in (*shape, *new) if name in value] != list(value):
                shape[_REORDERED] = None
        for name, item in value.items():
            shape[name] = _widened(shape.get(name), item, "")
        return shape
    if isinstance(value, list):
        if shape is None:
            shape = [None]
        if not isinstance(shape, list):
            return _mixed(shape, value, where)
        for item in value:
            shape[0] = _widened(shape[0], item, "")
        return shape
    if not where and isinstance(value, int) and not -(2**63) <= value < 2**63:
        return MIXED  # Arrow's integers end there
    if shape is None:
        return type(value)
    return shape if shape is type(value) else _mixed(shape, value, where)


_REORDERED = "\0reordered"
"""In the shape of an object whose keys do not always come in the same order: a chat template may print them in theirs."""


def _mixed(shape: object, value: object, where: str) -> object:
    if where and not where.endswith((", tools", ", chat_template_kwargs")):
        raise InputError(
            "the column changes its kind",
            where=where,
            expected=f"{_named(shape)}, as in the rows before",
            found=_named([None] if isinstance(value, list) else {} if isinstance(value, dict) else type(value)),
        )
    return MIXED


def _named(shape: object) -> str:
    if isinstance(shape, list | dict):
        return "a list" if isinstance(shape, list) else "an object"
    return {str: "text", int: "a number", float: "a number", bool: "true or false"}[shape]


def _arrow_type(shape: object, turns: bool) -> pa.DataType | None:
    """The type that holds every value unchanged but for nulls where a field is missing; None if only JSON text does."""
    if turns and isinstance(shape, list) and isinstance(shape[0], dict):
        # The order of a turn's own fields means nothing.
        shape = [{name: item for name, item in shape[0].items() if name != _REORDERED}]
    type_ = _typed(shape)
    return type_ if type_ is None or _num_fields(type_) <= MOST_FIELDS else None


def _typed(shape: object) -> pa.DataType | None:
    if shape is MIXED:
        return None
    if isinstance(shape, list):
        item = _typed(shape[0])
        return None if item is None else pa.list_(item)
    if isinstance(shape, dict):
        if _REORDERED in shape:
            return None
        fields = {name: _typed(item) for name, item in shape.items()}
        return None if any(type_ is None for type_ in fields.values()) else pa.struct(list(fields.items()))
    return {None: pa.null(), str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}[shape]


def _num_fields(type_: pa.DataType) -> int:
    if pa.types.is_struct(type_):
        return sum(1 + _num_fields(type_.field(i).type) for i in range(type_.num_fields))
    return _num_fields(type_.value_type) if pa.types.is_list(type_) else 0


# --- bytes -> JSON rows and text


def _opened(file: Path):
    compression = COMPRESSIONS.get(file.suffix)
    if compression == "gzip":
        return gzip.open(file, "rb")
    if compression == "bz2":
        return bz2.open(file, "rb")
    if compression == "zstd":
        return io.BufferedReader(pa.input_stream(str(file), compression="zstd"), 1 << 20)
    return open(file, "rb")


def _opened_text(file: Path) -> io.TextIOBase:
    _check_utf8(file)
    return io.TextIOWrapper(_opened(file), encoding="utf-8-sig", newline="")


def _check_utf8(file: Path) -> None:
    """Another encoding is never guessed: the text would be scored with wrong characters."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with _decompressing(file), _opened(file) as stream:
        while block := stream.read(1 << 20):
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                raise _not_utf8(file, line + error.object.count(b"\n", 0, error.start), error) from error
            line += block.count(b"\n")


def _not_utf8(file: Path, line: int, error: UnicodeDecodeError) -> InputError:
    found = repr(error.object[error.start : error.end])
    return InputError("not UTF-8", where=f"{file}, line {line}", found=found, next="Re-encode the file.")


def _json_rows(file: Path, *, unique: bool = False) -> Iterator[tuple[int, dict]]:
    """(line, object) for each row of a file of JSON lines or with one list. `unique`: refuse an object that has a key twice."""
    hook = _unique_keys if unique else None
    with _opened(file) as stream:
        for number, line in enumerate(_lines(stream, file), start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(line.decode(), object_pairs_hook=hook)
            except UnicodeDecodeError as error:
                raise _not_utf8(file, number, error) from error
            except _Twice as error:
                raise InputError(f"the key {error} is there twice in one object", where=where, next="Mend the row.") from error
            except ValueError as error:
                if line.lstrip()[:1] == b"[" and number == _first_line(file):
                    yield from _whole(file, hook)
                    return
                raise InputError(f"not valid JSON: {error}", where=where, next="Mend or drop the line.") from error
            except RecursionError as error:
                raise InputError("JSON nested too deeply", where=where, next="Mend or drop the line.") from error
            if isinstance(row, list) and number == _first_line(file):
                yield from _whole(file, hook)
                return
            if not isinstance(row, dict):
                raise InputError("a line is no JSON object", where=where, expected="{…} on each line", found=line[:40].decode())
            yield number, row


def _lines(stream, file: Path) -> Iterator[bytes]:
    """Lines as JSON lines have them: ended by a line feed and nothing else."""
    with _decompressing(file):
        yield from stream


@contextlib.contextmanager
def _decompressing(file: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        how = "decompressed" if file.suffix in COMPRESSIONS else "read"
        raise InputError(f"the file cannot be {how} to its end: {error}", where=file, next="Download or copy it again.") from error


def _first_line(file: Path) -> int:
    """Number of the first line that is not empty."""
    with _opened(file) as stream:
        return next((number for number, line in enumerate(stream, start=1) if line.removeprefix(codecs.BOM_UTF8).strip()), 1)


def _whole(file: Path, hook) -> Iterator[tuple[int, dict]]:
    """The rows of a file that is one JSON list, perhaps over many lines."""
    with _decompressing(file), _opened(file) as stream:
        data = stream.read()
    try:
        rows = json.loads(data.decode("utf-8-sig"), object_pairs_hook=hook)
    except UnicodeDecodeError as error:
        raise _not_utf8(file, 1 + error.object.count(b"\n", 0, error.start), error) from error
    except _Twice as error:
        raise InputError(f"the key {error} is there twice in one object", where=file, next="Mend the row.") from error
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}", where=file, next="Mend the file.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError("neither JSON lines nor a list of objects", where=file, expected="[{…}, {…}] or {…} on each line")
    yield from enumerate(rows, start=1)


class _Twice(Exception):
    pass


def _unique_keys(pairs: list[tuple]) -> dict:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen = set()
        raise _Twice(next(name for name, _ in pairs if name in seen or seen.add(name)))
    return value
