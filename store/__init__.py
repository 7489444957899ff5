"""The reference store: sharded, resumable, identified, readable with plain SQL.

This folder is code and shelf at once: files are code, directories are data (`store/think/` is a dataset, `store.reader` a module).
Needs pyarrow, duckdb and the standard library only, so that a store opens on a login node in well under a second.
"""

from typing import Literal, get_args

DTYPES = ("float32", "bfloat16", "float16")
"""In which a model may score and be trained."""

ScoredTurns = Literal["last", "all"]
"""Of a conversation: the assistant's last turn of each side, or all of the assistant's."""

SCORED_TURNS = get_args(ScoredTurns)
