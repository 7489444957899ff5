"""What `--dataset` names -> preference rows, checked as a whole before anything is scored, and their content fingerprint.

Checking first matters: a malformed row found after hours would have to be corrected in the source, which changes the dataset's fingerprint and
with it the identity of everything scored so far.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetNotFoundError

from precompute.rows.columns import (
    BESIDE_SUFFIX,
    CONTEXT,
    JSON_SUFFIX,
    LEFT_OUT_SUFFIX,
    NOTICED_SUFFIX,
    ROLES,
    SPEAKERS,
    TURN_FIELDS,
    ColumnOptions,
    beside,
    canonical,
    has_content,
    noticed,
    refuse_unused,
    scored,
    source_type,
)
from precompute.rows.files import check_complete, find_files, local_files, one_kind
from precompute.rows.reading import read_files
from store.errors import InputError

# Stretches of a table that are hashed and checked at a time: memory stays flat whatever the dataset's size.
ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class Rows:
    """Preference rows, memory-mapped: their number costs no memory. Columns are the source's, named as they are scored."""

    table: datasets.Dataset
    options: ColumnOptions = field(default_factory=ColumnOptions)
    beside: datasets.Dataset | None = None
    """The source's columns of one value per row that are not scored, under its own names."""
    left_out: tuple[str, ...] = ()
    """Its other columns."""

    def __len__(self) -> int:
        return len(self.table)

    @property
    def column_names(self) -> list[str]:
        return self.table.column_names

    def select(self, indices: Iterable[int]) -> "Selected":
        """Some rows, to read with `to_list`."""
        return Selected(self, indices if isinstance(indices, range) else [int(index) for index in indices])

    def to_list(self) -> list[dict]:
        """All rows as `canonical` has them: prompt (where there is one), chosen, rejected, tools, chat_template_kwargs."""
        return self.select(range(len(self))).to_list()

    def tables(self, rows_at_a_time: int) -> Iterator[pa.Table]:
        """The columns as they are stored, in stretches."""
        yield from self.table.with_format("arrow").iter(batch_size=rows_at_a_time)


@dataclass(frozen=True)
class Selected:
    """Some of the rows."""

    rows: Rows
    indices: Sequence[int]
    first: int = 0
    """What the first row of `rows` is called in messages."""

    def to_list(self) -> list[dict]:
        """See Rows.to_list."""
        found = self.rows.table.select(self.indices).to_list()
        numbered = zip(self.indices, found, strict=True)
        return [canonical(_decoded(row), self.rows.options, self.first + index) for index, row in numbered]


@dataclass(frozen=True)
class JoinedRows:
    """Several datasets, one after another, each in its own layout."""

    parts: tuple[Rows, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def select(self, indices: Iterable[int]) -> "SelectedOfSeveral":
        """Some rows, to read with `to_list`."""
        return SelectedOfSeveral(self, tuple(int(index) for index in indices))

    def to_list(self) -> list[dict]:
        """See Rows.to_list."""
        return self.select(range(len(self))).to_list()

    def tables(self, rows_at_a_time: int) -> Iterator[pa.Table]:
        """See Rows.tables."""
        for part in self.parts:
            yield from part.tables(rows_at_a_time)


@dataclass(frozen=True)
class SelectedOfSeveral:
    """Some of the rows of several datasets."""

    rows: JoinedRows
    indices: tuple[int, ...]

    def to_list(self) -> list[dict]:
        """See Rows.to_list; in the order of the indices."""
        found, first = {}, 0
        for part in self.rows.parts:
            own = [index - first for index in self.indices if first <= index < first + len(part)]
            found |= {first + index: row for index, row in zip(own, Selected(part, own, first).to_list(), strict=True)}
            first += len(part)
        return [found[index] for index in self.indices]


def _decoded(row: dict) -> dict:
    return {
        name.removesuffix(JSON_SUFFIX): json.loads(value) if name.endswith(JSON_SUFFIX) and value is not None else value
        for name, value in row.items()
    }


def load_rows(
    source: str,
    *,
    split: str,
    config: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    options: ColumnOptions | None = None,
) -> Rows:
    """The preference rows of `source`, only the columns that are scored.

    `source` is a Parquet, JSON, JSON lines, CSV or TSV file, a pattern of such files, a folder of them or one written by `save_to_disk`, or a
    hub id. `split` is a split's name, or part of one as `datasets` writes it (train[:100]). Raises InputError when it cannot be read, has no
    such split, or its columns are not those of a preference dataset.
    """
    datasets.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()  # a README without a header is no news
    options = options or ColumnOptions()
    where = f"--dataset {source}"
    try:
        table = _load(source, split, config, revision, options)
    except InputError:
        raise
    except Exception as error:  # datasets raises many kinds; whatever it is, this dataset cannot be read
        causes = list(_causes(error))
        if refused := next((cause for cause in causes if isinstance(cause, InputError)), None):
            raise refused from error
        cause = error.__cause__ or error
        first_line = next(iter(str(cause).splitlines()), "") or type(cause).__name__
        raise InputError(
            f"the dataset cannot be read: {type(cause).__name__}: {first_line}", where=where, next=_advice(error)
        ) from error
    said = [name for name in table.column_names if name.endswith(NOTICED_SUFFIX) and pc.any(table.data.column(name)).as_py()]
    table = table.remove_columns([name for name in table.column_names if name.endswith(NOTICED_SUFFIX)])
    if limit is not None:
        table = table.select(range(min(limit, len(table))))
    if not len(table):
        raise InputError("the dataset has no rows", where=where)
    names = table.column_names
    besides = {name: name.removesuffix(BESIDE_SUFFIX) for name in names if name.endswith(BESIDE_SUFFIX)}
    left_out = [name for name in names if name.endswith(LEFT_OUT_SUFFIX)]
    beside = table.select_columns(list(besides)).rename_columns(besides) if besides else None
    table = table.remove_columns([*besides, *left_out])
    rows = Rows(table, options, beside, tuple(name.removesuffix(LEFT_OUT_SUFFIX) for name in left_out))
    column_kinds(rows)
    first = _first_row(rows)
    if said:
        refuse_unused(rows.column_names, [name.removesuffix(NOTICED_SUFFIX) for name in said], first, where)
    if "prompt" not in first:  # answers that hold their prompt: the messages beside them are bookkeeping
        names = [name for name in table.column_names if name.removesuffix(JSON_SUFFIX) not in CONTEXT]
        rows = replace(rows, table=table.select_columns(names))
    pa.default_memory_pool().release_unused()  # converting a large file leaves tens of MB in Arrow's pool
    return rows


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _advice(error: Exception) -> str:
    if isinstance(error, DatasetNotFoundError | ConnectionError | OSError):
        return (
            "Check the name; a private or gated dataset needs HF_TOKEN. On a machine without internet, download it first on one that has "
            "it (hf download --repo-type dataset NAME) and set HF_HUB_OFFLINE=1; see docs/data.md."
        )
    return "Pass a preset (think, instruct, demo), a hub id, a UTF-8 file or folder that docs/data.md lists, or a folder from save_to_disk."


def _first_row(rows: Rows) -> dict:
    try:
        return rows.select([0]).to_list()[0]
    except InputError:  # said with its row's number when all rows are checked
        return {"chosen": "", "rejected": "", "prompt": ""}


def _load(source: str, split: str, config: str | None, revision: str | None, options: ColumnOptions) -> datasets.Dataset:
    path = Path(source).expanduser()
    if config is not None and path.is_file():
        raise InputError("a file has no configurations", where=f"--dataset-config {config}", next="Leave it away.")
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _named_columns(_saved(path, split), options, source)
    splits = find_files(source, config=config, revision=revision)
    if splits is None:
        return _named_columns(datasets.load_dataset(source, config, split=split, revision=revision), options, source)
    parts, split = {}, _all_named(split, splits)
    for name in _split_names(split):
        if name not in splits:
            raise _no_split(source, split, list(splits))
        files = local_files(splits[name])
        one_kind(files, source)
        check_complete(files, source)
        parts[name] = read_files(files, options, source)
    return _part_of(parts, split)


def _split_names(split: str) -> list[str]:
    """The names in `train`, `train[:100]`, `train+test[50%:]`."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def _all_named(split: str, splits: Iterable[str]) -> str:
    """`all` with the names of the splits, as `datasets` means it; another split as it is."""
    return "+".join(splits) if split == "all" and "all" not in splits else split


def _part_of(parts: dict[str, datasets.Dataset], split: str) -> datasets.Dataset:
    """What `split` asks for, as `datasets` reads it."""
    if split in parts:
        return parts[split]
    try:
        wanted = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(part) for name, part in parts.items()})
    except (ValueError, AssertionError) as error:
        raise InputError(f"not a split: {error}", where=f"--split {split}", expected="such as train or train[:1000]") from error
    found = [parts[each.splitname].select(range(each.from_, each.to)) for each in wanted if each.from_ < each.to]
    if not found:
        raise InputError("the split has no rows", where=f"--split {split}", found=f"{sum(map(len, parts.values())):,} rows in all")
    return datasets.concatenate_datasets(found)


def _no_split(source: str, split: str, names: list[str]) -> InputError:
    next_ = "A file or a pattern has one split, train: leave --split away." if names == ["train"] else None
    return InputError(
        "no such split", where=f"--dataset {source}", expected=f"--split {' or '.join(names)}", found=split, next=next_
    )


def _saved(path: Path, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        own = str(saved.split or "train")
        if not {"train", "all", own} & set(_split_names(split)):
            raise _no_split(str(path), split, [own])
        return _part_of({name: saved for name in _split_names(split)}, split)
    split = _all_named(split, saved)
    missing = [name for name in _split_names(split) if name not in saved]
    if missing:
        raise _no_split(str(path), split, list(saved))
    return _part_of({name: saved[name] for name in _split_names(split)}, split)


def _named_columns(rows: datasets.Dataset, options: ColumnOptions, source: str) -> datasets.Dataset:
    """A dataset that `datasets` read itself, with the columns that reading.py would give it."""
    kept = scored(rows.column_names, options, f"--dataset {source}")
    seen = noticed(rows.column_names, kept, options)
    says = {
        name: any(has_content(table.column(name)) for table in rows.select_columns([name]).with_format("arrow").iter(64))
        for name in seen
    }
    others = {name: source_type(rows.data.schema.field(name).type) for name in beside(rows.column_names, kept, options)}
    besides = [name for name, kind in others.items() if kind is not None]
    table = rows.select_columns([*kept, *besides]).rename_columns(kept | {name: name + BESIDE_SUFFIX for name in besides})
    for name in others.keys() - set(besides):
        table = table.add_column(name + LEFT_OUT_SUFFIX, pa.nulls(len(table)))
    for name, says_something in says.items():
        table = table.add_column(name + NOTICED_SUFFIX, pa.repeat(says_something, len(table)))
    return table


def check_and_fingerprint(rows: Rows | JoinedRows) -> str:
    """One pass over all rows: raise InputError for the first malformed one, return the sha256 (hex) of their content.

    The hash is over values, not files: it is the same whatever the file format, chunking or library version, and another for any edited,
    swapped or appended row. Columns that are not scored do not count. Where a value can be read in two ways (see `_readings`), the one that
    was chosen counts too.
    """
    if isinstance(rows, JoinedRows):
        return hashlib.sha256("".join(f"{_of_part(rows, index)}\n" for index in range(len(rows.parts))).encode()).hexdigest()
    hashes: dict[str, hashlib._Hash] = defaultdict(hashlib.sha256)
    kinds = column_kinds(rows)
    readings: set[str] = set()
    written: dict[str, bool] = {}
    first_row = 0
    for table in rows.tables(ROWS_AT_A_TIME):
        for name in table.column_names:
            column = table.column(name).combine_chunks()
            kind = kinds[name.removesuffix(JSON_SUFFIX)]
            _check_column(name.removesuffix(JSON_SUFFIX), kind, column, first_row)
            if kind == "text" and name in ("prompt", "chosen", "rejected"):
                written[name] = written.get(name, True) and _looks_like_turns(column)
            readings |= _readings(name, column)
            _hash_values(hashes, name, column)
        first_row += len(table)
    if name := next((name for name, holds in written.items() if holds), None):
        raise InputError(
            "conversations written as text",
            where=f"column {name}",
            next="Save them as Parquet or JSON lines, with a list of {role, content} in each row.",
        )
    whole = hashlib.sha256()
    for path, values in sorted(hashes.items()):
        whole.update(f"{path}={values.hexdigest()}\n".encode())
    for reading in sorted(readings | _meanings(rows)):
        whole.update(f"{reading}\n".encode())
    return whole.hexdigest()


def _of_part(rows: JoinedRows, index: int) -> str:
    try:
        return check_and_fingerprint(rows.parts[index])
    except InputError as error:  # rows are counted from the beginning of their own dataset
        where = f"--dataset number {index + 1}, {error.where}"
        raise InputError(error.what, where=where, expected=error.expected, found=error.found, next=error.next) from error


def _meanings(rows: Rows) -> set[str]:
    """What the options make of the columns, as far as their names do not say it."""
    as_turns = (rows.options.as_conversation or bool(rows.options.system)) and _kind(rows, "chosen") == "text"
    return {"texts are turns"} if as_turns else set()


WRITTEN_TURNS = rf"""(?s)^\s*(\[\s*\{{\s*['"](role|content|from|value)['"]\s*:|\[?\s*\{{.*['"](role|from)['"]\s*:\s*['"]({"|".join(sorted(ROLES | SPEAKERS.keys()))})['"])"""
"""A list whose first turn begins with a field of turns, or turns in any order of fields, in a list or one alone, that name a speaker."""


def _looks_like_turns(column: pa.Array) -> bool:
    """Whether every text is a list of turns or a single one, printed: what saving conversations as CSV makes of them."""
    return len(column) > 0 and bool(pc.all(pc.match_substring_regex(column, WRITTEN_TURNS)).as_py())


def _readings(name: str, column: pa.Array) -> set[str]:
    """Ways of reading that are not the only ones possible, where `column` needs them: each is part of the fingerprint.

    Nulls inside tools and calls are Parquet's padding and are dropped; lists of text parts are joined.
    """
    found = set()
    if name in ("tools", "chat_template_kwargs") and _has_null_fields(column):
        found.add(f"{name}: null fields are left out")
    if pa.types.is_list(column.type) and pa.types.is_struct(column.type.value_type):
        turns = column.flatten()
        for field_ in turns.type:
            values = pc.struct_field(turns, field_.name)
            if field_.name == "content" and pa.types.is_list(field_.type):
                found.add(f"{name}: text parts are joined")
            elif field_.name == "reasoning" and values.null_count < len(values):
                found.add(f"{name}: reasoning is read")
            elif field_.name in TURN_FIELDS and field_.name != "content" and _has_null_fields(values):
                found.add(f"{name}.{field_.name}: null fields are left out")
    return found


def _has_null_fields(values: pa.Array) -> bool:
    """Whether a struct inside `values` has a null field."""
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        return _has_null_fields(values.flatten())
    if not pa.types.is_struct(values.type):
        return False
    present = values.filter(values.is_valid()) if values.null_count else values
    children = [pc.struct_field(present, field_.name) for field_ in present.type] if len(present) else []
    return any(child.null_count for child in children) or any(_has_null_fields(child) for child in children)


def column_kinds(rows: Rows) -> dict[str, str]:
    """What each scored column holds: text, turns, null or other. Raises InputError for a combination that is no preference dataset."""
    names = [name.removesuffix(JSON_SUFFIX) for name in rows.column_names]
    kinds = {name: _kind(rows, name) for name in names}
    _check_kinds(kinds, rows.options)
    return kinds


def _kind(rows: Rows, name: str) -> str:
    """What a column holds: text, turns, null or other."""
    if name + JSON_SUFFIX in rows.column_names:
        return "turns"
    type_ = rows.table.data.schema.field(name).type
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return "text"
    item = type_.value_type if pa.types.is_list(type_) or pa.types.is_large_list(type_) else None
    if item is not None and (pa.types.is_struct(item) or _is_json(item)):
        return "turns"
    if _is_turn(type_) or _is_json(type_):
        return "turns"
    return "null" if pa.types.is_null(type_) else f"other ({type_})"


def _is_json(type_: pa.DataType) -> bool:
    """The type in which `datasets` keeps values that differ in shape."""
    return getattr(type_, "extension_name", None) == "arrow.json"


def _is_turn(type_: pa.DataType) -> bool:
    """One turn that is not in a list."""
    names = {type_.field(i).name for i in range(type_.num_fields)} if pa.types.is_struct(type_) else set()
    return {"role", "content"} <= names or {"from", "value"} <= names


def _check_kinds(kinds: dict[str, str], options: ColumnOptions) -> None:
    for side in ("chosen", "rejected"):
        if kinds[side] not in ("text", "turns"):
            raise InputError(
                "not a preference column",
                where=f"column {side}",
                expected="text, or a list of turns {role, content}",
                found={"null": "nothing but nulls"}.get(kinds[side], kinds[side]),
            )
    if kinds["chosen"] != kinds["rejected"]:
        raise InputError(
            "chosen and rejected differ in kind", expected=f"both {kinds['chosen']}", found=f"rejected is {kinds['rejected']}"
        )
    prompt = kinds.get("prompt", "text")
    turned = (options.as_conversation or options.system is not None) and kinds["chosen"] == "text"
    # A text prompt beside conversations is their first user turn: pairs.py checks that it is.
    if prompt not in ("text", "turns") or (prompt == "turns" and kinds["chosen"] == "text" and not turned):
        raise InputError("prompt and completions differ in kind", where="column prompt", expected=kinds["chosen"], found=prompt)


def _check_column(name: str, kind: str, column: pa.Array, first_row: int) -> None:
    if name not in ("prompt", "chosen", "rejected"):
        return
    if column.null_count:
        row = first_row + pc.index(pc.is_null(column), True).as_py()
        raise InputError(f"`{name}` is null", where=f"row {row}", next="Fill or drop the row.")
    if kind != "turns" or not pa.types.is_nested(column.type) or pa.types.is_struct(column.type):
        return
    lengths = pc.list_value_length(column)
    if pc.min(lengths).as_py() == 0:
        row = first_row + pc.index(lengths, pa.scalar(0, lengths.type)).as_py()
        raise InputError(f"`{name}` is an empty list of turns", where=f"row {row}", next="Fill or drop the row.")
    turns = column.flatten()
    if not pa.types.is_struct(turns.type):
        return
    fields = {turns.type.field(i).name: turns.type.field(i).type for i in range(turns.type.num_fields)}
    if {"from", "value"} <= fields.keys() and "role" not in fields:
        return
    if "role" not in fields:
        raise InputError("turns have no role", where=f"column {name}", expected="{role, content}", found=str(turns.type))
    _check_content_type(name, fields.get("content", pa.null()))
    roles = pc.struct_field(turns, "role")
    unknown = pc.invert(pc.is_in(roles, pa.array(sorted(ROLES), roles.type)))
    if pc.any(unknown).as_py():
        place = pc.index(unknown, True)
        row = first_row + pc.list_parent_indices(column)[place.as_py()].as_py()
        raise InputError(
            "a turn has an unknown role",
            where=f"row {row}, {name}",
            expected=f"one of {', '.join(sorted(ROLES))}",
            found=repr(roles[place.as_py()].as_py()),
            next="Mend or drop the row.",
        )


def _check_content_type(name: str, type_: pa.DataType) -> None:
    text = pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_null(type_)
    if not text and not pa.types.is_list(type_) and not pa.types.is_large_list(type_) and not _is_json(type_):
        raise InputError(
            "the content of turns is no text",
            where=f"column {name}",
            expected="text, or a list of parts {type: text, text}",
            found=str(type_),
            next="Write it as text.",
        )


def _hash_values(hashes: dict, path: str, values: pa.Array) -> None:
    """Feed the values to one hash per leaf buffer. Offsets become lengths, so that chunking does not show."""
    type_ = values.type
    hashes[path + "?"].update(values.is_valid().to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_struct(type_):
        for field_, child in zip(type_, values.flatten(), strict=True):
            _hash_values(hashes, f"{path}.{field_.name}", child)
    elif pa.types.is_list(type_) or pa.types.is_large_list(type_):
        hashes[path + "#"].update(
            pc.fill_null(pc.list_value_length(values), 0).cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes()
        )
        _hash_values(hashes, path + "[]", values.flatten())
    elif pa.types.is_string(type_) or pa.types.is_large_string(type_):
        values = pc.fill_null(values, "").cast(pa.large_string())
        lengths = pc.binary_length(values).cast(pa.int64()).to_numpy(zero_copy_only=False)
        hashes[path + "#"].update(lengths.tobytes())
        start = np.frombuffer(values.buffers()[1], dtype=np.int64)[values.offset] if len(values) else 0
        hashes[path].update(memoryview(values.buffers()[2] or b"")[start : start + int(lengths.sum())])
    elif not pa.types.is_null(type_):
        hashes[path].update(repr(values.to_pylist()).encode())
