"""What another store already knows: the log-probs of rows that did not change when the dataset was mended, extended or cut.

A pair is taken over if the other store has one of the same content (`pair_id`) and the same token ids, and was made with the same model,
tokenizer, template, length and dtype: then scoring it again would give the same numbers, up to the noise of other batches.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from precompute.pairs import Pair
from store.errors import InputError
from store.folder import refuse_non_store, stored_identity
from store.manifest import Identity, check_same
from store.shard import finished_shards, part_name

ROWS_ALONE = ("dataset_fingerprint", "num_rows", "shard_size")
"""Fields of the identity that may differ."""

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
LOGPS = ("chosen_token_logps", "rejected_token_logps")


class Known:
    """The pairs of a store, sealed or not, by their content."""

    def __init__(self, store: Path, identity: Identity, ref_store: Path):
        """InputError if `store` is none or is the one being made; StoreError if its numbers are not those of `identity`, or a shard is damaged."""
        refuse_non_store(store)
        if ref_store.exists() and store.samefile(ref_store):
            raise InputError(
                "is the store that is being made",
                where=f"--reuse {store}",
                next="Choose another --ref-store, and keep this one until then.",
            )
        stored = stored_identity(store)
        check_same(stored, _with(identity, stored), f"--reuse {store}")
        self.store, self.num_found = store, 0
        self._places: dict[str, tuple[int, int]] = {}  # pair_id -> shard, position in it
        for shard in sorted(finished_shards(store, stored)):
            ids = pq.read_table(store / part_name(shard), columns=["pair_id"]).column(0).to_pylist()
            self._places |= {pair_id: (shard, position) for position, pair_id in enumerate(ids)}
        self._opened: tuple[int, pa.Table] | None = None

    def find(self, pairs: list[Pair]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Position in `pairs` -> (chosen, rejected) log-probs, float32 [completion tokens], nats; only of those that are known."""
        found = {}
        for place, pair in enumerate(pairs):
            if pair.pair_id not in self._places:
                continue
            shard, position = self._places[pair.pair_id]
            table = self._table(shard)
            if all(np.array_equal(table[name][position].values, getattr(pair, name)) for name in IDS):
                found[place] = tuple(table[name][position].values.to_numpy() for name in LOGPS)
        self.num_found += len(found)
        return found

    def _table(self, shard: int) -> pa.Table:
        """Neighbours stay neighbours in most mended files: the last shard is kept open."""
        if self._opened is None or self._opened[0] != shard:
            self._opened = shard, pq.read_table(self.store / part_name(shard), columns=[*IDS, *LOGPS])
        return self._opened[1]


def _with(identity: Identity, stored: Identity) -> Identity:
    return replace(identity, datasets=None, **{name: getattr(stored, name) for name in ROWS_ALONE})
