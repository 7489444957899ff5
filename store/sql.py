"""The store as SQL tables, in a DuckDB connection that can read the store and do nothing else.

    pairs          one row per pair: the columns of store/schema.py
    completions    one row per side: pair_id, row, side, prompt_ids, completion_ids, ref_logps, num_tokens, truncated, token_logps
    tokens         one row per scored token: pair_id, row, side, position, token_id, token, logp
    texts          one row per pair: pair_id, row, and the texts prompt, chosen, rejected

`token` and `texts` are there where the caller brings a function that decodes ids. It is called for the values that a query asks for, and for
none that it does not.

DuckDB never opens a file here: Arrow reads the shards and hands them over, so that external access can be off altogether. (Its own
`allowed_paths` would let `COPY … TO 'part-00000.parquet'` overwrite what it allows to be read.)
"""

import contextlib
import csv
import io
import json
import math
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TextIO
from weakref import WeakKeyDictionary

import duckdb
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet

from store import disk
from store.errors import InputError, RefdpoError
from store.folder import identity_of, refuse_non_store, stored_identity, stored_source_columns
from store.manifest import manifest_path
from store.reader import open_store
from store.schema import SCHEMA, schema_of
from store.shard import finished_shards, part_name
from store.text import Decode, Vocabulary

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
        num_chosen_tokens as num_tokens, chosen_truncated as truncated, chosen_token_logps as token_logps{which}
    from pairs
    union all
    select pair_id, row, 'rejected', prompt_ids, rejected_ids, ref_rejected_logps,
        num_rejected_tokens, rejected_truncated, rejected_token_logps{which}
    from pairs;

create view tokens as{before}
    select pair_id, row, side,
        unnest(range(num_tokens)) as position, unnest(completion_ids) as token_id, {token}unnest(token_logps) as logp{which}
    from completions{after};
"""
"""`which`: what a store of several datasets, and of a dataset with columns of its own, has more; `token`: the text of one, where it can be decoded;
`before`, `after`: what leaves out the tokens that were not scored, where turns were."""

SCORED_ALONE = {"before": " select * from (", "after": ") where logp is not null"}

TOKEN = "text_of_token(unnest(completion_ids)) as token, "

TEXTS = """
create view texts as
    select pair_id, row, text_of(prompt_ids) as prompt, text_of(chosen_ids) as chosen, text_of(rejected_ids) as rejected{which}
    from pairs;
"""

ROWS_AT_A_TIME = 10_000
"""Of a streamed answer: it may be larger than memory."""

LOCK = """
set autoinstall_known_extensions = false;
set autoload_known_extensions = false;
set temp_directory = '';
set enable_external_access = false;
set lock_configuration = true;
"""


_decoding: WeakKeyDictionary[duckdb.DuckDBPyConnection, "_Decoding"] = WeakKeyDictionary()
"""Of the connections that can decode."""


def connect(path: Path, threads: int | None = None, decode: Decode | None = None) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the views over the store at `path`, locked against everything outside it.

    With `decode` there are texts too. It is not called before a query asks for one; a RefdpoError of its own ends that query.

    An unsealed store is served as far as it goes: the finished shards. InputError for a path that is no store, StoreError for one
    with damaged or foreign shards.
    """
    files = [str(file) for file in readable_shards(path)]
    schema = schema_of(stored_identity(Path(path)), stored_source_columns(Path(path))) if files else SCHEMA
    connection = duckdb.connect(config={"threads": threads} if threads else {})
    if files:
        pairs = pyarrow.dataset.dataset(files, schema=schema, format="parquet", filesystem=pyarrow.fs.LocalFileSystem())
    else:
        pairs = schema.empty_table()
    if sums_only(path):
        connection.register("stored", pairs)
        connection.execute(SUMS_ONLY_PAIRS)
    else:
        connection.register("pairs", pairs)
    which = "".join(f", {quoted(name)}" for name in schema.names if name not in SCHEMA.names)
    if decode is not None:
        _decoding[connection] = _Decoding(decode)
        _decoding[connection].register(connection)
    around = SCORED_ALONE if identity_of(Path(path)).scored_turns else dict.fromkeys(SCORED_ALONE, "")
    connection.execute(VIEWS.format(which=which, token="" if decode is None else TOKEN, **around))
    if decode is not None:
        connection.execute(TEXTS.format(which=which))
    connection.execute(LOCK)
    return connection


def quoted(name: str) -> str:
    """A column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


class _Decoding:
    """The two functions that SQL calls for texts. DuckDB turns what they raise into its own error, so they remember it."""

    def __init__(self, decode: Decode):
        self._decode = decode
        self._vocabulary: Vocabulary | None = None
        self.refused: RefdpoError | None = None

    def register(self, connection: duckdb.DuckDBPyConnection) -> None:
        text = {"return_type": "VARCHAR", "type": "arrow"}
        connection.create_function("text_of", self._texts, parameters=["INTEGER[]"], **text)
        connection.create_function("text_of_token", self._tokens, parameters=["INTEGER"], **text)

    def _texts(self, ids: pyarrow.ChunkedArray) -> pyarrow.Array:
        return self._of_each(ids, lambda: self._decode)

    def _tokens(self, ids: pyarrow.ChunkedArray) -> pyarrow.Array:
        return self._of_each(ids, self._token)

    def _token(self) -> Callable[[int], str]:
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self._decode)
        return self._vocabulary.__getitem__

    def _of_each(self, ids: pyarrow.ChunkedArray, text: Callable[[], Callable]) -> pyarrow.Array:
        try:
            return pyarrow.array([None if each is None else text()(each) for each in ids.to_pylist()], pyarrow.string())
        except RefdpoError as error:
            self.refused = error
            raise


def sums_only(path: Path) -> bool:
    """Of the store at `path`: Identity.sums_only."""
    return identity_of(Path(path)).sums_only


def readable_shards(path: Path) -> list[Path]:
    """The shards a reader may look at: all of a sealed store, those finished so far of an unsealed one."""
    path = Path(path)
    refuse_non_store(path)
    if manifest_path(path).exists():
        return [path / shard.name for shard in open_store(path, check="none").manifest.shards]
    return [path / part_name(index) for index in sorted(finished_shards(path, identity_of(path)))]


def run(connection: duckdb.DuckDBPyConnection, sql: str, format: Format = "table") -> str:
    """What `write` writes, as text without a final newline; empty if there is no answer."""
    text = io.StringIO()
    write(connection, sql, format, text)
    return text.getvalue().rstrip("\n")


def write(connection: duckdb.DuckDBPyConnection, sql: str, format: Format, out: TextIO) -> None:
    """The answers to `sql` (queries separated by semicolons) as text, one after the other, each row as soon as it is known.

    table: for people, long answers abridged. csv: with a header; lists are JSON, null is empty. json: a list with one row per line.
    InputError, with DuckDB's explanation, if a query fails or reaches outside the store. Ctrl-C ends the query at hand.
    """
    with _asking(connection) as ask:
        for statement in ask(lambda: _statements(connection, sql)):
            if format == "table":
                answer = ask(lambda statement=statement: _as_table(connection, statement))
                out.write(answer + "\n" if answer else "")
            else:
                ask(lambda statement=statement: connection.execute(statement))
                if _answers(statement):
                    blocks = iter(lambda: ask(lambda: connection.fetchmany(ROWS_AT_A_TIME)), [])
                    _WRITERS[format]([column[0] for column in connection.description], blocks, out)


def write_parquet(connection: duckdb.DuckDBPyConnection, sql: str, path: Path, overwrite: bool = False) -> int:
    """Write the answer to `sql`, which must be one query, into the new file `path`; returns its rows.

    InputError if the query fails, is not one, or has a column that Parquet cannot hold; StoreError where `path` cannot be written.
    """
    with _asking(connection) as ask, new_file(path, overwrite) as staged:
        statements = ask(lambda: _statements(connection, sql))
        if [_answers(statement) for statement in statements] != [True]:
            found = f"{len(statements)} statements"
            raise InputError("not one query", where="--sql", found=found, next="A Parquet file holds one answer.")
        blocks = ask(lambda: connection.sql(statements[0]).to_arrow_reader(ROWS_AT_A_TIME))
        _refuse_equal_names(blocks.schema.names)
        num_rows = 0
        try:
            with pyarrow.parquet.ParquetWriter(staged, blocks.schema, compression="zstd") as file:
                while (block := ask(lambda: _next_block(connection, blocks))) is not None:
                    file.write_batch(block)
                    num_rows += block.num_rows
        except pyarrow.ArrowException as error:
            reason = str(error).splitlines()[0][:160]
            raise InputError(
                "cannot be written as Parquet", where="--sql", found=reason, next="Cast the column in the query."
            ) from error
    return num_rows


def _next_block(connection: duckdb.DuckDBPyConnection, blocks: pyarrow.RecordBatchReader) -> pyarrow.RecordBatch | None:
    """None after the last one. A query that fails half-way comes out of Arrow as an OSError."""
    try:
        return next(blocks, None)
    except OSError as error:
        raise _refusal(connection, error) from error


@contextlib.contextmanager
def new_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A name to write to beside `path`, which becomes `path` if all goes well and is removed if not. InputError if `path` exists,
    unless it is a file and `overwrite`; StoreError if it cannot be written."""
    if path.exists() and not (overwrite and path.is_file()):
        raise InputError("exists already", where=f"--output {path}", next="Choose another --output, or add --overwrite for a file.")
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield staged
        os.replace(staged, path)
    except OSError as error:
        raise disk.refusal(error, path, "--output") from error
    finally:
        disk.drop(staged)


@contextlib.contextmanager
def _asking(connection: duckdb.DuckDBPyConnection) -> Iterator[Callable]:
    """Yields `ask(work)`: runs `work` in a thread, for this one must be free to hear Ctrl-C, which then stops the query. DuckDB's errors
    become InputErrors."""
    with ThreadPoolExecutor(1) as thread:

        def ask(work: Callable) -> Any:
            asked = thread.submit(work)
            try:
                return asked.result()
            except KeyboardInterrupt:
                while not asked.done():  # again and again: an interrupt that comes before the query began is forgotten
                    connection.interrupt()
                    wait([asked], timeout=0.1)
                raise
            except duckdb.PermissionException as error:
                raise InputError(_message(error), next="Only the store can be read here, and nothing can be written.") from error
            except duckdb.Error as error:
                raise _refusal(connection, error) from error

        yield ask


def _refusal(connection: duckdb.DuckDBPyConnection, error: Exception) -> RefdpoError:
    """What to raise for an error that a query ended with: that of decoding, if it was that."""
    decoding = _decoding.get(connection)
    if decoding is not None and decoding.refused is not None:
        refused, decoding.refused = decoding.refused, None
        return refused
    return InputError(_message(error), next=f"{_views(connection)}; `describe pairs` lists columns.")


def _view_names(connection: duckdb.DuckDBPyConnection) -> tuple[str, ...]:
    return ("pairs", "completions", "tokens", *(["texts"] if connection in _decoding else []))


def _views(connection: duckdb.DuckDBPyConnection) -> str:
    return f"Views: {', '.join(_view_names(connection))}"


def _statements(connection: duckdb.DuckDBPyConnection, sql: str) -> list[duckdb.Statement]:
    try:
        sql.encode()
    except UnicodeEncodeError as error:
        raise InputError("the query is not valid Unicode", where="--sql", found=ascii(sql[:80])) from error
    return connection.extract_statements(sql)


def _answers(statement: duckdb.Statement) -> bool:
    """Does it give rows, as `select`, `describe` and `explain` do?"""
    return statement.expected_result_type == [duckdb.ExpectedResultType.QUERY_RESULT]


def _as_table(connection: duckdb.DuckDBPyConnection, statement: duckdb.Statement) -> str:
    if not _answers(statement):
        connection.execute(statement)
        return ""
    return str(connection.sql(statement)).rstrip("\n")


def _write_csv(names: list[str], blocks: Iterable[list[tuple]], out: TextIO) -> None:
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for rows in blocks:
        writer.writerows([_cell(value) for value in row] for row in rows)
        out.flush()


def _refuse_equal_names(names: list[str]) -> None:
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise InputError(f"more than one column is called {twice[0]}", where="--sql", next="Name them apart: … as other_name.")


def _write_json(names: list[str], blocks: Iterable[list[tuple]], out: TextIO) -> None:
    _refuse_equal_names(names)
    separator = "["
    for rows in blocks:
        for row in rows:
            out.write(separator + _json({name: _finite(value) for name, value in zip(names, row, strict=True)}))
            separator = ",\n "
        out.flush()
    out.write("[]\n" if separator == "[" else "]\n")


_WRITERS = {"csv": _write_csv, "json": _write_json}


def fetch(connection: duckdb.DuckDBPyConnection, sql: str, where: object) -> list[tuple]:
    """The rows that one select gives. InputError, naming `where` (the option it came from), if it fails or is anything else."""
    try:
        with _asking(connection) as ask:
            statements = ask(lambda: connection.extract_statements(sql))
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise InputError("not one SQL expression", where=where)
            return ask(lambda: connection.execute(statements[0]).fetchall())
    except InputError as error:
        if error.where is not None:
            raise
        next_ = f"{_views(connection)}; `inspect --sql 'describe pairs'` lists columns."
        raise InputError(error.what, where=where, next=next_) from error


HELP = """Views: pairs (one row per pair), completions (one per side), tokens (one per scored token), texts (one per pair, decoded).
A query ends with ; and may span lines. Ctrl-C stops it.
.tables   the views              .schema   their columns
.help     this                   .exit     leave, as do exit, quit and Ctrl-D"""


def prompt(connection: duckdb.DuckDBPyConnection, format: Format = "table") -> None:
    """Read queries from the terminal (or standard input) until its end; a query ends with a semicolon and may span lines."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (line editing and history for input())
        print(f"{_views(connection)}. End a query with ; and leave with .exit or Ctrl-D; .help says more.")
    query = ""
    while True:
        try:
            query += input(("   ...> " if query else "refdpo> ") if terminal else "") + "\n"
        except EOFError:
            if query.strip():  # a script may end without a semicolon
                _answer(connection, query, format)
            return print() if terminal else None
        except KeyboardInterrupt:
            query = ""
            print()
            continue
        word = query.strip().rstrip(";").strip().lower()
        if not word:
            query = ""
        elif word in (".exit", ".quit", "exit", "quit"):
            return None
        elif word.startswith("."):
            _command(connection, word)
            query = ""
        elif _complete(query):
            _answer(connection, query, format)
            query = ""


def _answer(connection: duckdb.DuckDBPyConnection, query: str, format: Format) -> None:
    try:
        write(connection, query, format, sys.stdout)
    except InputError as error:
        print(f"Error: {error}")
    except KeyboardInterrupt:
        print("interrupted")
    sys.stdout.flush()


def _command(connection: duckdb.DuckDBPyConnection, word: str) -> None:
    if word == ".help":
        print(HELP)
    elif word == ".tables":
        print("\n".join(name for (name,) in connection.execute("select table_name from (show tables) t(table_name)").fetchall()))
    elif word == ".schema":
        for view in _view_names(connection):
            columns = connection.execute(f"describe {view}").fetchall()
            print(f"{view}: " + ", ".join(f"{name} {kind}" for name, kind, *_ in columns))
    else:
        print(f"Error: {word}: no such command. .help lists them.")


def _complete(query: str) -> bool:
    """Does it end with a semicolon that is none of a text or a comment?"""
    tokens = [start for start, kind in duckdb.tokenize(query) if kind != duckdb.token_type.comment]
    return bool(tokens) and query.encode()[tokens[-1] :].startswith(b";")


def _message(error: Exception) -> str:
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
