"""The columns of a shard: names, Arrow types, units. docs/store-format.md says the same for readers in other languages."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from store.spans import SCORED

FORMAT_VERSION = 1
"""Version of the file layout. A reader refuses a store of another version."""

SUMS_ONLY = 0
"""The identity's scorer_version of an imported store: its sums are real, what each token contributes is not known and null."""

SCHEMA = pa.schema(
    [
        # which pair
        pa.field("pair_id", pa.string(), nullable=False),  # 128-bit content hash of the source row, 32 hex digits
        pa.field("row", pa.int64(), nullable=False),  # index in the source dataset
        # what was scored, after truncation; TRL's names
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("chosen_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("rejected_ids", pa.list_(pa.int32()), nullable=False),
        # sums over the completion's tokens, nats, accumulated in float64 from the float32 token values
        pa.field("ref_chosen_logps", pa.float64(), nullable=False),
        pa.field("ref_rejected_logps", pa.float64(), nullable=False),
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
        pa.field("num_chosen_tokens", pa.int32(), nullable=False),
        pa.field("num_rejected_tokens", pa.int32(), nullable=False),
        pa.field("chosen_truncated", pa.bool_(), nullable=False),
        pa.field("rejected_truncated", pa.bool_(), nullable=False),
        # natural-log probability of each completion token given everything before it, nats; as many nulls where SUMS_ONLY
        # and null for the tokens that SPANS leave out
        pa.field("chosen_token_logps", pa.list_(pa.float32()), nullable=False),
        pa.field("rejected_token_logps", pa.list_(pa.float32()), nullable=False),
    ]
)

SPANS = tuple(pa.field(name, pa.list_(pa.int32()), nullable=False) for name in SCORED.values())
"""Of a store of scored turns (identity.scored_turns): [start, stop, start, stop, …] in the completion, the tokens that were scored. The log-probs
of the others are null."""

DATASET = pa.field("dataset", pa.string(), nullable=False)
"""Last column of a store of several datasets: which one the pair is from, by the name it was asked for."""


SOURCE_TYPES = {
    "string": pa.string(),
    "int64": pa.int64(),
    "double": pa.float64(),
    "bool": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
}
"""What a column of the source may hold: one value per row."""

RESERVED = frozenset(
    [*SCHEMA.names, *SCORED.values(), DATASET.name]
    + ["side", "completion_ids", "ref_logps", "num_tokens", "truncated", "token_logps"]
    + ["position", "token_id", "token", "logp", "prompt", "chosen", "rejected"]
)
"""Names that the store and its SQL views use themselves."""


@dataclass(frozen=True)
class SourceColumn:
    """A column of the dataset that is not scored, kept beside the numbers: dataset_source, chosen_model, a score. Nullable. It is no part of the
    identity, for no number depends on it."""

    name: str
    type: str
    """A key of SOURCE_TYPES."""

    def __post_init__(self) -> None:
        if self.type not in SOURCE_TYPES:
            raise ValueError(f"type of {self.name!r} must be one of {', '.join(SOURCE_TYPES)}, is {self.type!r}")
        if self.name.lower() in RESERVED:
            raise ValueError(f"{self.name!r} is a column of the store's own")

    @property
    def field(self) -> pa.Field:
        """Of the store's table."""
        return pa.field(self.name, SOURCE_TYPES[self.type])


def schema_of(identity: Any, source: Iterable[SourceColumn] | None = None) -> pa.Schema:
    """The columns of a store: SCHEMA, SPANS where turns were scored, DATASET where it has several, and those of the source."""
    spans = () if identity.scored_turns is None else SPANS
    dataset = () if identity.datasets is None else (DATASET,)
    return pa.schema([*SCHEMA, *spans, *dataset, *(column.field for column in source or ())])


SUMS_ONLY_NOTE = "imported: sums only; the log-probs of its tokens are unknown (null)"
"""What every view of such a store says."""

TOKEN_LOGPS = ("chosen_token_logps", "rejected_token_logps")


def without_token_logps(table: pa.Table) -> pa.Table:
    """The same pairs with every log-prob of a single token null; the lists keep their lengths. Other columns are untouched."""
    for name in set(TOKEN_LOGPS) & set(table.column_names):
        lengths = table[name].combine_chunks().value_lengths().to_pylist()
        unknown = pa.array([[None] * length for length in lengths], SCHEMA.field(name).type)
        table = table.set_column(table.column_names.index(name), SCHEMA.field(name), unknown)
    return table


COUNTS = {
    "chosen_truncated": "chosen sides cut at max_length",
    "rejected_truncated": "rejected sides cut at max_length",
    "identical": "chosen and rejected are the same: no preference to learn",
    "prompt_not_prefix": "the prompt alone is tokenized differently from the prompt inside the conversation; the completion starts where they diverge",
    "empty_completion": "a completion without text: only the template's or end-of-text tokens are scored",
    "null_content": "a turn whose content is null",
    "turn_not_rendered": "the chat template drops or rewrites a turn",
    "doubled_end": "plain text that ends with two end-of-text tokens: the tokenizer appends its own to the one that TRL adds",
    "reused": "pairs whose log-probs were taken from another store (--reuse) instead of scored",
    "special_token_in_content": "text that contains a special token's spelling is tokenized as that token",
}
"""What happened to how many rows: shown after precompute and by `inspect`, kept in footers and manifest with one example each."""
