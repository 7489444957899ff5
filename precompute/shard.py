"""Tokenized rows and their log-probs -> what a shard holds: the table, and the report of what became of every row."""

import numpy as np
import pyarrow as pa

from precompute.pairs import Pair, TokenizedRows
from precompute.scorer.packing import spans_of
from store.manifest import Identity, ShardReport, Unscorable
from store.schema import DATASET, SCHEMA, SPANS, SourceColumn


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
    """`chosen`, `rejected`: float32 [scored tokens] in nats for each of `tokens.pairs`; `model_tokens`: positions that the model computed;
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
    if identity.scored_turns is not None:
        for field, masks in zip(SPANS, _masks(tokens.pairs), strict=True):
            table = table.append_column(field, pa.array([spans_of(mask) for mask in masks], field.type))
    if identity.datasets is not None:
        table = table.append_column(DATASET, pa.array([identity.dataset_of(pair.row) for pair in tokens.pairs], DATASET.type))
    for column in source_columns:
        table = table.append_column(column.field, source[column.name])
    return report, table


def _masks(pairs: list[Pair]) -> tuple[list[np.ndarray | None], list[np.ndarray | None]]:
    """Of the chosen and the rejected sides."""
    return [pair.chosen_mask for pair in pairs], [pair.rejected_mask for pair in pairs]


def _token_logps(scored: list[np.ndarray], masks: list[np.ndarray | None]) -> pa.Array:
    """A value per token of each completion: null where it was not scored."""
    places = [np.ones(len(logps), bool) if mask is None else mask for logps, mask in zip(scored, masks, strict=True)]
    known = np.concatenate(places) if places else np.empty(0, bool)
    values = np.zeros(len(known), np.float32)
    values[known] = np.concatenate(scored) if scored else []
    offsets = np.cumsum([0, *map(len, places)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, mask=None if known.all() else ~known))


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
        "chosen_token_logps": _token_logps(chosen, _masks(pairs)[0]),
        "rejected_token_logps": _token_logps(rejected, _masks(pairs)[1]),
    }
    return pa.table(
        [
            pa.array(values, field.type) if isinstance(values, list) else values
            for field, values in zip(SCHEMA, columns.values(), strict=True)
        ],
        schema=SCHEMA,
    )
