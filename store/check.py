"""Is a shard's table what it claims to be? The same checks guard every write and serve `verify`."""

from collections import Counter
from itertools import pairwise

import pyarrow as pa
import pyarrow.compute as pc

from store.manifest import Identity, ShardReport
from store.schema import TOKEN_LOGPS, schema_of
from store.spans import SCORED, num_scored, pairs_of

SUM_TOLERANCE = 1e-9
"""Difference allowed between a stored sum and the float64 sum of its token values, relative to the sum of their sizes (absolute
below one nat). Any float64 summation order is far inside it; a float32 sum is far outside."""


def problems(table: pa.Table, identity: Identity, report: ShardReport) -> list[str]:
    """What is wrong with a shard's table, in sentences that name row and column; empty when nothing is. One per column and kind."""
    expected = schema_of(identity, report.source_columns)
    if not table.schema.equals(expected):
        return [_schema_problem(table.schema, expected)]
    table = table.select(schema_of(identity).names).combine_chunks()  # the source's own may hold anything
    # Versions before this one filled an imported store with means; readers pass those off as unknown too.
    unknown = identity.sums_only and all(_all_unknown(_column(table, name)) for name in TOKEN_LOGPS)
    checked = [name for name in table.column_names if not (unknown and name in TOKEN_LOGPS)]
    some = TOKEN_LOGPS if identity.scored_turns else ()  # whose items may be null: `_spans` says where
    found = [f"column {name}: has nulls" for name in checked if _has_nulls(_column(table, name), items=name not in some)]
    if found:
        return found
    sums = (list) if unknown else (lambda: _sums(table))
    spans = _spans if identity.scored_turns else lambda table: []
    return [*_coverage(table, identity, report), *_values(table), *(_counts(table, identity) or spans(table) or sums())]


def _schema_problem(schema: pa.Schema, expected: pa.Schema) -> str:
    for name in expected.names:
        if name not in schema.names:
            return f"column {name} is missing"
        if not schema.field(name).equals(expected.field(name)):
            return f"column {name} should be {expected.field(name)}, is {schema.field(name)}"
    extra = [name for name in schema.names if name not in expected.names]
    return f"unknown column {extra[0]}" if extra else f"columns are in another order: {', '.join(schema.names)}"


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _has_nulls(column: pa.Array, items: bool) -> bool:
    return column.null_count > 0 or (items and pa.types.is_list(column.type) and column.flatten().null_count > 0)


def _all_unknown(column: pa.Array) -> bool:
    """Lists of the right length, every item null."""
    items = column.flatten()
    return column.null_count == 0 and items.null_count == len(items)


def _name_row(table: pa.Table, i: int) -> str:
    return f"row {table['row'][i]} (pair {table['pair_id'][i]})"


def _first(mask: pa.Array) -> int | None:
    """Position of the first true value."""
    position = pc.index(mask, True).as_py()
    return None if position < 0 else position


def _coverage(table: pa.Table, identity: Identity, report: ShardReport) -> list[str]:
    """Every source row of the block is a pair or listed unscorable, exactly once, in order."""
    block = identity.rows_of(report.index)
    if (report.first_row, report.num_rows) != (block.start, len(block)):
        says = f"{report.num_rows} from row {report.first_row}"
        return [f"shard {report.index} covers {len(block)} rows from row {block.start}, its report says {says}"]
    if report.num_pairs != table.num_rows:
        return [f"report says {report.num_pairs} pairs, the table has {table.num_rows}"]
    rows = table["row"].to_pylist()
    if rows != sorted(rows):
        return ["rows are not in ascending order"]
    covered = sorted(rows + [each.row for each in report.unscorable])
    if covered == list(block):
        return []
    missing = sorted(set(block) - set(covered))
    twice = [row for row, times in Counter(covered).items() if times > 1]
    outside = sorted(set(covered) - set(block))
    parts = (("neither scored nor listed as unscorable", missing), ("more than once", twice), ("outside the block", outside))
    return [f"rows {', '.join(map(str, rows[:10]))}{' …' if len(rows) > 10 else ''}: {what}" for what, rows in parts if rows]


def _values(table: pa.Table) -> list[str]:
    """Every float is finite."""
    found = []
    for name in table.column_names:
        column = _column(table, name)
        values = column.flatten() if pa.types.is_list(column.type) else column
        if not pa.types.is_floating(values.type):
            continue
        bad = _first(pc.invert(pc.is_finite(values)))
        if bad is None:
            continue
        if values is column:
            found.append(f"{_name_row(table, bad)}, column {name}: {values[bad]}")
        else:
            i = pc.list_parent_indices(column)[bad].as_py()
            found.append(f"{_name_row(table, i)}, column {name}: {values[bad]} at token {bad - column.offsets[i].as_py()}")
    return found


def _counts(table: pa.Table, identity: Identity) -> list[str]:
    """Counts equal the lengths of what they count; no sequence is empty or longer than max_length; ids are no negative numbers."""
    found = []
    for side in ("prompt", "chosen", "rejected"):
        number = f"num_{side}_tokens"
        for name in (f"{side}_ids", *([] if side == "prompt" else [f"{side}_token_logps"])):
            lengths = pc.list_value_length(_column(table, name))
            bad = _first(pc.not_equal(lengths, _column(table, number)))
            if bad is not None:
                found.append(f"{_name_row(table, bad)}: {number} is {table[number][bad]}, {name} has {lengths[bad]}")
        ids = _column(table, f"{side}_ids")
        bad = _first(pc.less(ids.flatten(), 0))
        if bad is not None:
            found.append(f"{_name_row(table, pc.list_parent_indices(ids)[bad].as_py())}: {side}_ids has {ids.flatten()[bad]}")
        bad = _first(pc.less(_column(table, number), 1))
        if bad is not None:
            found.append(f"{_name_row(table, bad)}: {side} is empty")
    for side in ("chosen", "rejected"):
        total = pc.add(_column(table, "num_prompt_tokens"), _column(table, f"num_{side}_tokens"))
        bad = _first(pc.greater(total, identity.max_length))
        if bad is not None:
            found.append(f"{_name_row(table, bad)}: prompt and {side} are {total[bad]} tokens, max_length is {identity.max_length}")
    return found


def _spans(table: pa.Table) -> list[str]:
    """Spans rise within the completion and name a token; log-probs are null outside of them, and only there."""
    found = []
    for side, name in SCORED.items():
        spans, logps = _column(table, name).to_pylist(), _column(table, f"{side}_token_logps")
        for i, edges in enumerate(spans):
            length = len(logps[i].values)
            if not edges or len(edges) % 2 or edges[0] < 0 or edges[-1] > length or any(a >= b for a, b in pairwise(edges)):
                found.append(f"{_name_row(table, i)}: {name} is {edges} in a completion of {length} tokens")
                break
            missing = sum(logps[i].values.slice(start, stop - start).null_count for start, stop in pairs_of(edges))
            if missing or logps[i].values.null_count != length - num_scored(edges):
                what = "null within" if missing else "not null outside of"
                found.append(f"{_name_row(table, i)}: {side}_token_logps is {what} the tokens of {name}, {edges}")
                break
    return found


def _sums(table: pa.Table) -> list[str]:
    """Each stored sum is the float64 sum of its token values."""
    found = []
    for side in ("chosen", "rejected"):
        stored, tokens = _column(table, f"ref_{side}_logps"), _column(table, f"{side}_token_logps")
        for i in range(len(stored)):
            values = tokens[i].values
            summed, scale = pc.sum(values).as_py(), pc.sum(pc.abs(values)).as_py()
            if not abs(stored[i].as_py() - summed) <= SUM_TOLERANCE * max(1.0, scale):
                found.append(f"{_name_row(table, i)}: ref_{side}_logps is {stored[i]}, its tokens sum to {summed}")
                break
    return found
