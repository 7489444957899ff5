"""`cli.py inspect`: a summary, the answer to a query in one of several formats, or a prompt."""

import sys
from pathlib import Path
from typing import Literal

from store import sql as store_sql
from store.errors import InputError
from store.schema import SUMS_ONLY_NOTE
from store.sql import Format
from store.summary import summary
from store.text import Decode


def inspect(
    ref_store: Path,
    sql: str | None,
    form: Format | Literal["parquet"] | None,
    output: Path | None,
    interactive: bool,
    decode: Decode | None = None,
    overwrite: bool = False,
) -> None:
    """Print it, or write it to `output`. `form`: table (None) | csv | json | parquet. `decode`: for texts, where a query asks for them.
    `overwrite`: an `output` that is there. InputError for options that contradict each other."""
    _refuse_contradictions(sql, form, output, interactive, overwrite)
    if output is not None and ref_store.resolve() in output.resolve().parents:
        raise InputError("is in the store, which holds its own files alone", where=f"--output {output}", next="Choose another.")
    if sql is None and not interactive:
        return print(summary(ref_store))
    connection = store_sql.connect(ref_store, decode=decode)
    if store_sql.sums_only(ref_store):
        print(f"{ref_store} was {SUMS_ONLY_NOTE}", file=sys.stderr)
    shown: Format = "table" if form is None or form == "parquet" else form
    if interactive or sql is None:
        store_sql.prompt(connection, shown)
    elif form == "parquet" and output is not None:
        print(f"{output}: {store_sql.write_parquet(connection, sql, output, overwrite):,} rows", file=sys.stderr)
    elif output is not None:
        with store_sql.new_file(output, overwrite) as staged, open(staged, "w", encoding="utf-8", newline="") as file:
            store_sql.write(connection, sql, shown, file)
    else:
        store_sql.write(connection, sql, shown, sys.stdout)


def _refuse_contradictions(
    sql: str | None, form: Format | Literal["parquet"] | None, output: Path | None, interactive: bool, overwrite: bool
) -> None:
    """Options that would be passed over in silence."""
    if interactive and sql is not None:
        raise InputError(
            "one of the two", where="--interactive, --sql", next="Type the query at the prompt, or leave --interactive out."
        )
    if interactive and (output is not None or form == "parquet"):
        raise InputError("belongs to --sql", where="--output" if output is not None else "--format parquet")
    if sql is None and not interactive and (form is not None or output is not None):
        raise InputError(
            "belongs to --sql", where="--format" if form is not None else "--output", next="Without it inspect shows a summary."
        )
    if overwrite and output is None:
        raise InputError("belongs to --output", where="--overwrite")
    if form == "parquet" and output is None:
        raise InputError("needs a file", where="--format parquet", next="Add --output answer.parquet.")
