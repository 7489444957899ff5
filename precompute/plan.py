"""How large a shard is, and which one next: the order in which one worker asks for the shards of a store; pure, and a matter of speed only.

1. estimate  a shard's cost from the lengths of its rows' texts, which Arrow knows without reading a character
2. sort      the most expensive shards first: the last ones are cheap, and workers finish at nearly the same time (Graham's LPT)
3. deal      worker r of W takes the shards r, r + W, r + 2W, ... of that list, then whatever the others have not begun

    expensive first    7 2 5 0 | 4 6 1 3       4 workers
    worker 1 asks for  2 6, then 7 5 0 4 1 3

Dealing keeps hundreds of workers from asking for the same shard at the same moment. Any order gives the same store.
"""

from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from precompute.rows.columns import JSON_SUFFIX
from precompute.rows.dataset import ROWS_AT_A_TIME, JoinedRows, Rows

BYTES_PER_TOKEN = 4
"""Of a text, roughly. Only where max_length cuts depends on it."""


SHARDS = 2400
"""By default. 64 workers then have 37 each, and end within a 37th of each other; more would make opening the store slow."""

FEWEST_ROWS, MOST_ROWS = 16, 1024
"""Of a shard by default: enough to fill the model's batches; no more than a killed worker may lose."""


def default_shard_size(num_rows: int) -> int:
    """Rows per shard where none is given."""
    return min(MOST_ROWS, max(FEWEST_ROWS, -(-num_rows // SHARDS)))


def shard_costs(rows: Rows | JoinedRows, shard_size: int, max_length: int) -> np.ndarray:
    """Estimated cost of each shard, float64 [shards], in bytes of text. One pass over lengths; no text is read."""
    costs = np.zeros(-(-len(rows) // shard_size))
    first_row = 0
    for table in rows.tables(ROWS_AT_A_TIME):
        np.add.at(costs, np.arange(first_row, first_row + len(table)) // shard_size, row_costs(table, max_length))
        first_row += len(table)
    return costs


def row_costs(table: pa.Table, max_length: int) -> np.ndarray:
    """Estimated cost of each row, float64 [rows]: the text of the prompt and of both sides, each up to where max_length cuts it."""
    return sum(
        np.minimum(np.concatenate([_text_bytes(chunk) for chunk in table[name].chunks]), BYTES_PER_TOKEN * max_length)
        for name in table.column_names
        if name.removesuffix(JSON_SUFFIX) in ("prompt", "chosen", "rejected")
    )


def _text_bytes(values: pa.Array) -> np.ndarray:
    """Bytes of text in each value: a string, or a list of turns with all their strings. float64 [values]."""
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return pc.fill_null(pc.binary_length(values), 0).to_numpy(zero_copy_only=False).astype(np.float64)
    if isinstance(values.type, pa.BaseExtensionType):
        return _text_bytes(values.storage)
    if pa.types.is_struct(values.type):
        return sum((_text_bytes(child) for child in values.flatten()), np.zeros(len(values)))
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        ends = np.cumsum(pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False))
        up_to = np.concatenate([[0.0], np.cumsum(_text_bytes(values.flatten()))])
        return np.diff(up_to[ends], prepend=0.0)
    return np.zeros(len(values))


def claiming_order(costs: np.ndarray, missing: Collection[int], place: int, places: int) -> list[int]:
    """The missing shards in the order in which worker `place` of `places` asks for them. `costs`: float64 [shards]."""
    by_cost, wanted = np.argsort(-costs, kind="stable").tolist(), set(missing)
    return [shard for shard in dict.fromkeys(by_cost[place::places] + by_cost) if shard in wanted]
