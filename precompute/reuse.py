"""What other stores already know: the log-probs of rows that did not change when the dataset was corrected, extended, mixed or cut.

A pair is taken over if another store has one of the same content (`pair_id`) whose token ids begin with those wanted now, and was made with the
same model, tokenizer, template and dtype: then scoring it again would give the same numbers, up to the noise of other batches. A token's log-prob
depends on nothing after it, so a store of a longer max_length has those of every shorter one; a shorter one has the pairs that it did not cut.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedModel

from precompute.pairs import Pair
from precompute.scorer import Layout
from precompute.scorer.api import TOLERANCE, score
from precompute.scorer.packing import Sequence as Scored
from store.errors import InputError, StoreError
from store.folder import refuse_non_store, stored_identity
from store.manifest import Identity, check_same
from store.shard import finished_shards, part_name

ROWS_ALONE = ("dataset_fingerprint", "num_rows", "shard_size", "max_length")
"""Fields of the identity that may differ."""

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
LOGPS = ("chosen_token_logps", "rejected_token_logps")

PAIRS_CHECKED = 8
"""Of each store, scored again before any of its pairs is taken."""

Logps = tuple[np.ndarray, np.ndarray]
"""Of the chosen and the rejected completion: float32 [completion tokens], nats."""


class Reused:
    """Several stores, asked in the order given."""

    def __init__(self, stores: Sequence[Path], identity: Identity, ref_store: Path):
        """InputError if one is no store or the one being made, or has sums only; StoreError if its numbers are not those of `identity`, or a shard
        is damaged."""
        self.stores = tuple(Known(store, identity, ref_store) for store in dict.fromkeys(stores))

    def check(self, model: PreTrainedModel, identity: Identity, *, layout: Layout, tokens_per_batch: int) -> list[dict]:
        """Score a few pairs of each store again. What was found, for the records; StoreError for a store whose numbers this model does not give."""
        return [store.check(model, identity, layout=layout, tokens_per_batch=tokens_per_batch) for store in self.stores]

    def find(self, pairs: list[Pair]) -> tuple[dict[int, Logps], dict[str, int]]:
        """(position in `pairs` -> what is known of it, store -> how many are from there)."""
        found: dict[int, Logps] = {}
        by_store: dict[str, int] = {}
        for store in self.stores:
            new = store.find(pairs, besides=found)
            found |= new
            if new:
                by_store[str(store.store)] = len(new)
        return found, by_store


class Known:
    """The pairs of a store, sealed or not, by their content."""

    def __init__(self, store: Path, identity: Identity, ref_store: Path):
        refuse_non_store(store)
        if ref_store.exists() and store.samefile(ref_store):
            raise InputError(
                "is the store that is being made",
                where=f"--reuse {store}",
                next="Choose another --ref-store, and keep this one until then.",
            )
        stored = stored_identity(store)
        if stored.sums_only:
            raise InputError(
                "was imported and has sums only; what is taken over are the log-probs of single tokens",
                where=f"--reuse {store}",
                next="Leave it out: its pairs are scored.",
            )
        check_same(stored, _with(identity, stored), f"--reuse {store}")
        self.store, self.num_found = store, 0
        self._places: dict[str, tuple[int, int]] = {}  # pair_id -> shard, position in it
        for shard in sorted(finished_shards(store, stored)):
            ids = pq.read_table(store / part_name(shard), columns=["pair_id"]).column(0).to_pylist()
            self._places |= {pair_id: (shard, position) for position, pair_id in enumerate(ids)}
        self._opened: tuple[int, pa.Table] | None = None

    def find(self, pairs: list[Pair], besides: Sequence[int] | dict = ()) -> dict[int, Logps]:
        """Position in `pairs` -> its log-probs; only of those that are known, and not in `besides`."""
        wanted = [
            (self._places[pair.pair_id], place)
            for place, pair in enumerate(pairs)
            if place not in besides and pair.pair_id in self._places
        ]
        found = {}
        for (shard, position), place in sorted(wanted):  # each shard is read once, however the rows were mixed
            table, pair = self._table(shard), pairs[place]
            ids = {name: table[name][position].values.to_numpy() for name in IDS}
            if np.array_equal(ids["prompt_ids"], pair.prompt_ids) and all(
                np.array_equal(ids[name][: len(getattr(pair, name))], getattr(pair, name)) for name in IDS[1:]
            ):
                sides = zip(LOGPS, (pair.chosen_ids, pair.rejected_ids), strict=True)
                logps = (table[name][position].values.slice(0, len(side)) for name, side in sides)
                found[place] = tuple(each.drop_null().to_numpy() for each in logps)  # null: not scored
        self.num_found += len(found)
        return found

    def check(self, model: PreTrainedModel, identity: Identity, *, layout: Layout, tokens_per_batch: int) -> dict:
        """See Reused.check."""
        sequences, stored, rows = [], [], []
        for row, sequence, logps in self._sample(identity.max_length):
            sequences.append(sequence)
            stored.append(logps)
            rows.append(row)
        if not sequences:
            return {"store": str(self.store), "num_pairs": 0}
        now = score(model, sequences, layout=layout, tokens_per_batch=tokens_per_batch)
        differences = [np.abs(new.astype(np.float64) - old) for new, old in zip(now, stored, strict=True)]
        mean, worst = float(np.concatenate(differences).mean()), int(np.argmax([each.mean() for each in differences]))
        if not mean <= TOLERANCE[identity.dtype]:  # also true for NaN
            raise StoreError(
                "the model gives other log-probs here than this store has, so none is taken from it",
                where=f"--reuse {self.store}",
                expected=f"at most {TOLERANCE[identity.dtype]:g} nats per token in {identity.dtype}, the mean of {len(rows) // 2} pairs",
                found=f"{mean:.2g}, most on row {rows[worst]} with {differences[worst].mean():.2g}",
                next="Leave it out. Which of the two is wrong: verify --model.",
            )
        largest = float(max(each.max() for each in differences))
        return {
            "store": str(self.store),
            "num_pairs": len(rows) // 2,
            "mean_token_difference": mean,
            "max_token_difference": largest,
        }

    def _sample(self, max_length: int) -> Iterator[tuple[int, Scored, np.ndarray]]:
        """(row there, sequence, its log-probs as stored) for both sides of some pairs, cut to `max_length`: the same ones in every run."""
        places = sorted(self._places.values())
        chosen = np.random.default_rng(0).choice(len(places), size=min(PAIRS_CHECKED, len(places)), replace=False)
        for shard, position in (places[index] for index in sorted(chosen.tolist())):
            pair = self._table(shard).slice(position, 1).to_pylist()[0]
            prompt = pair["prompt_ids"]
            room = max_length - len(prompt)
            sides = [(pair[f"{side}_ids"][:room], pair[f"{side}_token_logps"][:room]) for side in ("chosen", "rejected")]
            if room < 1 or any(set(logps) == {None} for _, logps in sides):
                continue
            for ids, logps in sides:
                mask = np.array([each is not None for each in logps])  # null: not scored
                known = np.array([each for each in logps if each is not None], dtype=np.float64)
                yield pair["row"], Scored(np.array(prompt + ids, dtype=np.int32), len(prompt), mask), known

    def _table(self, shard: int) -> pa.Table:
        """Neighbours stay neighbours in most corrected files: the last shard is kept open."""
        if self._opened is None or self._opened[0] != shard:
            self._opened = shard, pq.read_table(self.store / part_name(shard), columns=["row", *IDS, *LOGPS])
        return self._opened[1]


def noted(index: int, by_store: dict[str, int]) -> str:
    """What the report of shard `index` gives as an example."""
    return f"shard {index}: " + ", ".join(f"{count:,} from {Path(store).name}" for store, count in by_store.items())


def _with(identity: Identity, stored: Identity) -> Identity:
    return replace(identity, datasets=None, **{name: getattr(stored, name) for name in ROWS_ALONE})
