"""A hub id, file or folder -> preference rows, checked as a whole before anything is scored, and their content fingerprint.

Checking first matters: a malformed row found after hours would have to be mended in the source, which changes the dataset's fingerprint and
with it the identity of everything scored so far.
"""

import codecs
import hashlib
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from precompute.pairs import COLUMNS, ROLES
from store.errors import InputError

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".ndjson": "json"}

# Stretches of a table that are hashed and checked at a time: memory stays flat whatever the dataset's size.
ROWS_AT_A_TIME = 4096


def load_rows(source: str, *, split: str, revision: str | None = None, limit: int | None = None) -> datasets.Dataset:
    """The preference rows of `source`, only the columns that are scored, memory-mapped: its size costs no memory.

    `source` is a Parquet, JSON or JSONL file, a folder written by `Dataset.save_to_disk`, a folder of such files, or a hub id. Raises
    InputError when it cannot be read or its columns are not those of a preference dataset.
    """
    datasets.disable_progress_bars()
    path = Path(source).expanduser()
    try:
        if path.is_file():
            rows = _load_files(FORMATS.get(path.suffix), [path], source)
        elif path.is_dir():
            rows = _load_folder(path, split)
        elif path.suffix in FORMATS or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise InputError("no such file or folder", where=f"--dataset {source}")
        else:
            rows = datasets.load_dataset(source, split=split, revision=revision)
    except InputError:
        raise
    except Exception as error:  # datasets raises many kinds; whatever it is, this dataset cannot be read
        cause = error.__cause__ or error
        first_line = next(iter(str(cause).splitlines()), "") or type(cause).__name__
        raise InputError(
            f"the dataset cannot be read: {type(cause).__name__}: {first_line}",
            where=f"--dataset {source}",
            next="Pass a preset (think, instruct, demo), a hub id, a UTF-8 .parquet/.jsonl file, or a folder from save_to_disk.",
        ) from error
    rows = rows.select_columns(_scored_columns(rows, source))
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if not len(rows):
        raise InputError("the dataset has no rows", where=f"--dataset {source}")
    pa.default_memory_pool().release_unused()  # converting a large file leaves tens of MB in Arrow's pool
    return rows


def _load_files(kind: str | None, files: list[Path], source: str) -> datasets.Dataset:
    if kind is None:
        raise InputError(
            "unknown kind of file", where=f"--dataset {source}", expected=" or ".join(FORMATS), found=files[0].suffix or "no ending"
        )
    if kind == "json":
        for file in files:
            _check_utf8(file)
    return datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train")


def _check_utf8(file: Path) -> None:
    """datasets guesses another encoding instead of failing: the text would be scored with wrong characters."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise InputError(
                    "not UTF-8",
                    where=f"{file}, line {line}",
                    found=repr(error.object[error.start : error.end]),
                    next="Re-encode the file.",
                ) from error
            line += block.count(b"\n")


def _load_folder(path: Path, split: str) -> datasets.Dataset:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise InputError("no such split", where=f"--dataset {path}", expected=f"--split {' or '.join(saved)}", found=split)
            return saved[split]
        return saved
    for kind, format_ in FORMATS.items():
        files = sorted(path.glob(f"*{kind}"))
        if files:
            return _load_files(format_, files, str(path))
    raise InputError(
        "the folder holds no dataset", where=f"--dataset {path}", expected=f"save_to_disk's files, or {', '.join(FORMATS)} files"
    )


def _scored_columns(rows: datasets.Dataset, source: str) -> list[str]:
    missing = [name for name in ("chosen", "rejected") if name not in rows.column_names]
    if missing:
        raise InputError(
            f"no column {' and '.join(missing)}",
            where=f"--dataset {source}",
            expected="chosen and rejected (prompt optional)",
            found=", ".join(rows.column_names),
            next="Rename the columns of the dataset.",
        )
    return [name for name in COLUMNS if name in rows.column_names]


def check_and_fingerprint(rows: datasets.Dataset) -> str:
    """One pass over all rows: raise InputError for the first malformed one, return the sha256 (hex) of their content.

    The hash is over values, not files: it is the same whatever the file format, chunking or library version, and another for any edited,
    swapped or appended row. Columns that are not scored do not count.
    """
    hashes: dict[str, hashlib._Hash] = defaultdict(hashlib.sha256)
    kinds = column_kinds(rows)
    first_row = 0
    for table in rows.with_format("arrow").iter(batch_size=ROWS_AT_A_TIME):
        for name in table.column_names:
            column = table.column(name).combine_chunks()
            _check_column(name, kinds[name], column, first_row)
            _hash_values(hashes, name, column)
        first_row += len(table)
    whole = hashlib.sha256()
    for path, values in sorted(hashes.items()):
        whole.update(f"{path}={values.hexdigest()}\n".encode())
    return whole.hexdigest()


def column_kinds(rows: datasets.Dataset) -> dict[str, str]:
    """What each scored column holds: text, turns, null or other. Raises InputError for a combination that is no preference dataset."""
    kinds = {name: _kind(rows, name) for name in COLUMNS if name in rows.column_names}
    _check_kinds(kinds)
    return kinds


def _kind(rows: datasets.Dataset, name: str) -> str:
    """What a column holds: text, turns, null or other."""
    type_ = rows.data.schema.field(name).type
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return "text"
    if (pa.types.is_list(type_) or pa.types.is_large_list(type_)) and pa.types.is_struct(type_.value_type):
        return "turns"
    return "null" if pa.types.is_null(type_) else f"other ({type_})"


def _check_kinds(kinds: dict[str, str]) -> None:
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
    # A text prompt beside conversations is Dolci-Think's format: pairs.py checks that it repeats the first user turn.
    if prompt not in ("text", "turns") or (prompt == "turns" and kinds["chosen"] == "text"):
        raise InputError("prompt and completions differ in kind", where="column prompt", expected=kinds["chosen"], found=prompt)


def _check_column(name: str, kind: str, column: pa.Array, first_row: int) -> None:
    if name not in ("prompt", "chosen", "rejected"):
        return
    if column.null_count:
        row = first_row + pc.index(pc.is_null(column), True).as_py()
        raise InputError(f"`{name}` is null", where=f"row {row}", next="Fill or drop the row.")
    if kind != "turns":
        return
    lengths = pc.list_value_length(column)
    if pc.min(lengths).as_py() == 0:
        row = first_row + pc.index(lengths, pa.scalar(0, lengths.type)).as_py()
        raise InputError(f"`{name}` is an empty list of turns", where=f"row {row}", next="Fill or drop the row.")
    turns = column.flatten()
    if "role" not in [turns.type.field(i).name for i in range(turns.type.num_fields)]:
        raise InputError("turns have no role", where=f"column {name}", expected="{role, content}", found=str(turns.type))
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


def _hash_values(hashes: dict, path: str, values: pa.Array) -> None:
    """Feed the values to one hash per leaf buffer. Offsets become lengths, so that chunking does not show."""
    type_ = values.type
    hashes[path + "?"].update(values.is_valid().to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_struct(type_):
        for field, child in zip(type_, values.flatten(), strict=True):
            _hash_values(hashes, f"{path}.{field.name}", child)
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
