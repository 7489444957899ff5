"""Tokenized rows and their log-probs -> what a shard holds: the table, and the report of what became of every row."""

import numpy as np
import pyarrow as pa

from precompute.pairs import Pair, TokenizedRows
from store.manifest import Identity, ShardReport, Unscorable
from store.schema import DATASET, SCHEMA, SourceColumn


def shard_of(
    identity: Identity,
    index: int,
    tokens: TokenizedRows,
    chosen: list[np.ndarray],
    rejected: list[np.ndarray],
    model_tokens: int,
    source_columns: tuple[SourceColumn, ...] = (),
    source: pa.Table | None = None,
) -> tuple[ShardReport, pa.Table]:
    """`chosen`, `rejected`: float32 [completion tokens] in nats for each of `tokens.pairs`; `model_tokens`: positions that the model computed;
    `source`: what the source has in `source_columns`, a row for each pair."""
    rows = identity.rows_of(index)
    report = ShardReport(
        index=index,
        first_row=rows.start,
        num_rows=len(rows),
        num_pairs=len(tokens.pairs),
        unscorable=tuple(Unscorable(**each) for each in tokens.unscorable),
        counts=dict(tokens.counts),
        examples=tokens.examples,
        num_prompt_tokens=sum(len(pair.prompt_ids) for pair in tokens.pairs),
        num_completion_tokens=sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in tokens.pairs),
        model_tokens=model_tokens,
        source_columns=source_columns or None,
    )
    table = _table(tokens.pairs, chosen, rejected)
    if identity.datasets is not None:
        table = table.append_column(DATASET, pa.array([identity.dataset_of(pair.row) for pair in tokens.pairs], DATASET.type))
    for column in source_columns:
        table = table.append_column(column.field, source[column.name])
    return report, table


def _table(pairs: list[Pair], chosen: list[np.ndarray], rejected: list[np.ndarray]) -> pa.Table:
    def lists(arrays: list[np.ndarray], dtype) -> pa.Array:
        offsets = np.cumsum([0, *map(len, arrays)])
        values = np.concatenate(arrays).astype(dtype) if arrays else np.empty(0, dtype)
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))

    columns = {
        "pair_id": [pair.pair_id for pair in pairs],
        "row": [pair.row for pair in pairs],
        "prompt_ids": lists([pair.prompt_ids for pair in pairs], np.int32),
        "chosen_ids": lists([pair.chosen_ids for pair in pairs], np.int32),
        "rejected_ids": lists([pair.rejected_ids for pair in pairs], np.int32),
        "ref_chosen_logps": [float(logps.sum(dtype=np.float64)) for logps in chosen],
        "ref_rejected_logps": [float(logps.sum(dtype=np.float64)) for logps in rejected],
        "num_prompt_tokens": [len(pair.prompt_ids) for pair in pairs],
        "num_chosen_tokens": [len(pair.chosen_ids) for pair in pairs],
        "num_rejected_tokens": [len(pair.rejected_ids) for pair in pairs],
        "chosen_truncated": [pair.chosen_truncated for pair in pairs],
        "rejected_truncated": [pair.rejected_truncated for pair in pairs],
        "chosen_token_logps": lists(chosen, np.float32),
        "rejected_token_logps": lists(rejected, np.float32),
    }
    return pa.table(
        [
            pa.array(values, field.type) if isinstance(values, list) else values
            for field, values in zip(SCHEMA, columns.values(), strict=True)
        ],
        schema=SCHEMA,
    )
