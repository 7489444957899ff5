"""The store as SQL tables, in a DuckDB connection that can read the store and do nothing else.

    pairs          one row per pair: the columns of store/schema.py
    completions    one row per side: pair_id, row, side, prompt_ids, completion_ids, ref_logps, num_tokens, truncated, token_logps
    tokens         one row per scored token: pair_id, row, side, position, token_id, logp

DuckDB never opens a file here: Arrow reads the shards and hands them over, so that external access can be off altogether. (Its own
`allowed_paths` would let `COPY … TO 'part-00000.parquet'` overwrite what it allows to be read.)
"""

import contextlib
import csv
import io
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Literal

import duckdb
import pyarrow.dataset
import pyarrow.fs

from store.errors import InputError
from store.folder import refuse_non_store, stored_identity
from store.manifest import manifest_path
from store.reader import open_store
from store.schema import SCHEMA, SUMS_ONLY
from store.shard import finished_shards, part_name

Format = Literal["table", "csv", "json"]

SUMS_ONLY_PAIRS = """
create view pairs as
    select * replace ([null::float for logp in chosen_token_logps] as chosen_token_logps,
        [null::float for logp in rejected_token_logps] as rejected_token_logps)
    from stored;
"""
"""Earlier versions made up token log-probs for imported stores."""

VIEWS = """
create view completions as
    select pair_id, row, 'chosen' as side, prompt_ids, chosen_ids as completion_ids, ref_chosen_logps as ref_logps,
        num_chosen_tokens as num_tokens, chosen_truncated as truncated, chosen_token_logps as token_logps
    from pairs
    union all
    select pair_id, row, 'rejected', prompt_ids, rejected_ids, ref_rejected_logps,
        num_rejected_tokens, rejected_truncated, rejected_token_logps
    from pairs;

create view tokens as
    select pair_id, row, side,
        unnest(range(num_tokens)) as position, unnest(completion_ids) as token_id, unnest(token_logps) as logp
    from completions;
"""

LOCK = """
set autoinstall_known_extensions = false;
set autoload_known_extensions = false;
set temp_directory = '';
set enable_external_access = false;
set lock_configuration = true;
"""


def connect(path: Path, threads: int | None = None) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the three views over the store at `path`, locked against everything outside it.

    An unsealed store is served as far as it goes: the finished shards. InputError for a path that is no store, StoreError for one
    with damaged or foreign shards.
    """
    files = [str(file) for file in readable_shards(path)]
    connection = duckdb.connect(config={"threads": threads} if threads else {})
    if files:
        pairs = pyarrow.dataset.dataset(files, schema=SCHEMA, format="parquet", filesystem=pyarrow.fs.LocalFileSystem())
    else:
        pairs = SCHEMA.empty_table()
    if sums_only(path):
        connection.register("stored", pairs)
        connection.execute(SUMS_ONLY_PAIRS)
    else:
        connection.register("pairs", pairs)
    connection.execute(VIEWS)
    connection.execute(LOCK)
    return connection


def sums_only(path: Path) -> bool:
    """Is this an imported store, whose token log-probs are not known?"""
    return stored_identity(Path(path)).scorer_version == SUMS_ONLY


def readable_shards(path: Path) -> list[Path]:
    """The shards a reader may look at: all of a sealed store, those finished so far of an unsealed one."""
    path = Path(path)
    refuse_non_store(path)
    if manifest_path(path).exists():
        return [path / shard.name for shard in open_store(path, check="none").manifest.shards]
    return [path / part_name(index) for index in sorted(finished_shards(path, stored_identity(path)))]


def run(connection: duckdb.DuckDBPyConnection, sql: str, format: Format = "table") -> str:
    """The answer to `sql` as text without a final newline; empty if there is none.

    table: for people, long answers abridged. csv: with a header; lists are JSON, null is empty. json: a list with one row per line.
    InputError, with DuckDB's explanation, if the query fails or reaches outside the store.
    """
    try:
        sql.encode()
    except UnicodeEncodeError as error:
        raise InputError("the query is not valid Unicode", where="--sql", found=ascii(sql[:80])) from error
    try:
        if format == "table":
            relation = connection.sql(sql)
            return "" if relation is None else str(relation).rstrip("\n")
        connection.execute(sql)
        names = [column[0] for column in connection.description or ()]
        rows = connection.fetchall() if names else []
    except duckdb.PermissionException as error:
        raise InputError(_message(error), next="Only the store can be read here, and nothing can be written.") from error
    except duckdb.Error as error:
        raise InputError(_message(error), next="Views: pairs, completions, tokens; `describe pairs` lists columns.") from error
    if format == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([names, *([_cell(value) for value in row] for row in rows)])
        return text.getvalue().rstrip("\n")
    lines = [_json({name: _finite(value) for name, value in zip(names, row, strict=True)}) for row in rows]
    return "[" + ",\n ".join(lines) + "]"


def fetch(connection: duckdb.DuckDBPyConnection, sql: str, where: object) -> list[tuple]:
    """The rows that one select gives. InputError, naming `where` (the option it came from), if it fails or is anything else."""
    try:
        statements = connection.extract_statements(sql)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise InputError("not one SQL expression", where=where)
        return connection.execute(statements[0]).fetchall()
    except duckdb.Error as error:
        raise InputError(
            _message(error), where=where, next="Views: pairs, completions, tokens; `inspect --sql 'describe pairs'` lists columns."
        ) from error


def prompt(path: Path, format: Format = "table") -> None:
    """Read queries from the terminal (or standard input) until its end; a query ends with a semicolon and may span lines."""
    connection = connect(path)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (line editing and history for input())
    print("Views: pairs, completions, tokens. End a query with ; and leave with Ctrl-D.")
    query = ""
    while True:
        try:
            query += input("   ...> " if query else "refdpo> ") + "\n"
        except EOFError:
            return print()
        except KeyboardInterrupt:
            query = ""
            print()
            continue
        if not query.strip().rstrip(";"):
            query = ""
        elif query.rstrip().endswith(";"):
            try:
                print(run(connection, query, format))
            except InputError as error:
                print(f"Error: {error}")
            except KeyboardInterrupt:
                print("interrupted")
            query = ""


def _message(error: duckdb.Error) -> str:
    """DuckDB's message in one line, without its picture of the query."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith("LINE ") and line.strip("^")).rstrip(".")


def _cell(value: object) -> object:
    return _json(_finite(value)) if isinstance(value, list | dict) else value


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=lambda other: float(other) if isinstance(other, Decimal) else str(other))


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity: they become strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
