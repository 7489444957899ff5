"""The dataset's other columns, one value per row (dataset_source, chosen_model, a score): what the store keeps of them, and under which name.

source column   dataset_source    row           messages
in the store    dataset_source    source_row    left out: it is a list
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from precompute.rows.columns import source_type
from precompute.rows.dataset import JoinedRows, Rows
from store.schema import RESERVED, SourceColumn

PREFIX = "source_"
"""Of a column whose name the store, or another column, has already. Case does not count: in SQL it does not either."""


@dataclass(frozen=True)
class SourceColumns:
    """What a dataset offers."""

    columns: tuple[SourceColumn, ...]
    renamed: dict[str, str]
    """Name in the store -> in the source, of all columns."""
    left_out: tuple[str, ...]
    """Columns of the source that are lists, objects, or not of one kind in all rows."""

    @classmethod
    def of(cls, rows: Rows | JoinedRows) -> "SourceColumns":
        """Of one dataset, or of several: a column that only some of them have is null in the rows of the others."""
        found: dict[str, str | None] = {}
        left_out: dict[str, None] = {}
        for part in rows.parts if isinstance(rows, JoinedRows) else (rows,):
            left_out |= dict.fromkeys(part.left_out)
            for field in part.beside.data.schema if part.beside is not None else ():
                kind = source_type(field.type)
                found[field.name] = _common(found.get(field.name, kind), kind)
        left_out |= {name: None for name, kind in found.items() if kind is None}
        columns, renamed, taken = [], {}, set(RESERVED)
        for source, kind in found.items():
            if source in left_out:
                continue
            name = source
            while name.lower() in taken or not name:
                name = PREFIX + name
            taken.add(name.lower())
            renamed[name] = source
            columns.append(SourceColumn(name, kind))
        return cls(tuple(columns), renamed, tuple(left_out))

    def notice(self, kept: Sequence[SourceColumn]) -> str:
        """One line for the user; empty where there is nothing to say."""
        names = [
            each.name if (source := self.renamed[each.name]) == each.name else f"{each.name} (there: {source})" for each in kept
        ]
        others = [source for name, source in self.renamed.items() if name not in {each.name for each in kept}]
        parts = [
            f"kept beside the numbers: {', '.join(names)}" if names else "",
            f"left out, as they are not single values of one kind: {', '.join(self.left_out)}" if self.left_out else "",
            f"left out, as the store began without: {', '.join(others)}" if others else "",
        ]
        return f"other columns of the dataset, {'; '.join(part for part in parts if part)}" if any(parts) else ""

    def values(self, rows: Rows | JoinedRows, indices: Sequence[int], kept: Sequence[SourceColumn]) -> pa.Table:
        """The `kept` columns of some rows, rising, in the store's names and types."""
        parts, first = [], 0
        for part in rows.parts if isinstance(rows, JoinedRows) else (rows,):
            own = [index - first for index in indices if first <= index < first + len(part)]
            first += len(part)
            names = part.beside.column_names if part.beside is not None else []
            table = part.beside.select(own).with_format("arrow")[:] if own and names else None
            arrays = [
                table[self.renamed[column.name]].combine_chunks()
                if table is not None and self.renamed[column.name] in names
                else pa.nulls(len(own), column.field.type)
                for column in kept
            ]
            parts.append(
                pa.table(
                    [_cast(array, column.field.type) for array, column in zip(arrays, kept, strict=True)],
                    schema=pa.schema([column.field for column in kept]),
                )
            )
        return pa.concat_tables(parts).combine_chunks()


def _common(one: str | None, other: str | None) -> str | None:
    return one if one == other else "double" if {one, other} == {"int64", "double"} else None


def _cast(array: pa.Array, type_: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return pc.cast(array, type_, safe=False)  # a time beyond microseconds, an integer beyond 2**53


@dataclass(frozen=True)
class Beside:
    """What a store keeps of a dataset beside the numbers."""

    rows: Rows | JoinedRows
    offered: SourceColumns
    kept: tuple[SourceColumn, ...]

    def of(self, indices: Sequence[int]) -> tuple[tuple[SourceColumn, ...], pa.Table | None]:
        """The columns, and their values of some rows, rising; no table where nothing is kept."""
        if not self.kept:
            return (), None
        return self.kept, self.offered.values(self.rows, indices, self.kept)
