"""A sealed store as the `datasets.Dataset` that TRL trains on, without a copy of it.

The dataset holds one number per pair, its position in the store: a million pairs are 4 MB. Token ids and reference sums are read from the
Parquet files when a batch is asked for, in whichever process asks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from precompute.scorer.packing import mask_of
from store.derive import derive, fits
from store.errors import InputError
from store.reader import TOKEN_COUNTS, Store
from store.spans import SCORED

if TYPE_CHECKING:
    from datasets import Dataset

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
"""Columns and batch entries with the reference sums, in nats."""

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
"""What TRL's collator gets for each pair: lists of int and two floats (nats)."""

FOR_DERIVING = (
    *("num_prompt_tokens", "num_chosen_tokens", "num_rejected_tokens", "chosen_truncated", "rejected_truncated"),
    *("chosen_token_logps", "rejected_token_logps"),
)
"""What `derive` needs besides, where sums other than the stored ones are asked for."""

POSITION = "position"


@dataclass(frozen=True)
class ReadPairs:
    """Positions in a store -> COLUMNS. Holds no open file: workers may fork or unpickle it."""

    store: Store
    max_length: int
    ld_alpha: float | None

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list]:
        columns = COLUMNS + (tuple(SCORED.values()) if self.store.identity.scored_turns else ())
        if self.max_length == self.store.identity.max_length and self.ld_alpha is None:
            table = self.store.read(batch[POSITION], columns)
        else:
            table = derive(self.store.read(batch[POSITION], columns + FOR_DERIVING), self.max_length, self.ld_alpha)
        return {name: table[name].to_pylist() for name in columns}


@dataclass(frozen=True)
class CollateTurns:
    """TRL's collator, whose mask of the completions leaves out what was not scored."""

    collate: Callable[[list[dict]], dict]

    def __call__(self, pairs: list[dict]) -> dict:
        batch = self.collate(pairs)
        if SCORED["chosen"] not in pairs[0]:
            return batch
        sides = [(pair, side) for side in SCORED for pair in pairs]
        for row, (pair, side) in zip(batch["completion_mask"], sides, strict=True):
            scored = mask_of(pair[SCORED[side]], len(pair[f"{side}_ids"]))
            first = len(pair["prompt_ids"])
            row[first : first + len(scored)] *= row.new_tensor(scored)
        return batch


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens of the pairs of a dataset, in its order: int32 [pairs] each."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def packed(self) -> np.ndarray:
        """Tokens that the packed layout computes of each pair, int32 [pairs]: the prompt once."""
        return self.prompt + self.chosen + self.rejected

    @property
    def both(self) -> np.ndarray:
        """Tokens of both sequences, int32 [pairs]: the prompt twice."""
        return self.packed + self.prompt

    @property
    def longer(self) -> np.ndarray:
        """Tokens of the longer side, prompt included, int32 [pairs]."""
        return self.prompt + np.maximum(self.chosen, self.rejected)

    @property
    def padded(self) -> int:
        """What all of them as one padded batch have: two rows per pair, as long as the longest."""
        return 2 * len(self.longer) * int(self.longer.max(initial=0))


def lengths_of(dataset: Dataset, store: Store, max_length: int) -> Lengths:
    """Of a dataset that `dataset_of` made from `store` for `max_length`. Reads the counts only."""
    positions = dataset.data.column(POSITION).chunk(0).to_numpy()  # as `dataset_of` made it; its formats would copy it twice
    prompt, chosen, rejected = (store.token_counts[name].to_numpy()[positions] for name in TOKEN_COUNTS)
    if max_length < store.identity.max_length:
        for completion in (chosen, rejected):  # in place: at a million pairs every copy is 4 MB
            completion += prompt
            np.minimum(completion, max_length, out=completion)
            completion -= prompt
    return Lengths(prompt, chosen, rejected)


def lengths_in(dataset: Dataset) -> Lengths:
    """Of a dataset that `dataset_of` made, from the store that it reads."""
    read: ReadPairs = dataset.format["format_kwargs"]["transform"]
    return lengths_of(dataset, read.store, read.max_length)


def fitting(store: Store, max_length: int, ld_alpha: float | None = None, positions: Sequence[int] | None = None) -> np.ndarray:
    """Positions, int32, of those of the pairs at `positions` (None: all) that can be trained on at `max_length`, in the same order.

    A pair of which `max_length` leaves nothing that was scored is left out, as TRL leaves it out. Raises InputError for a `max_length` above the
    store's, for one that leaves no pair, and where the store lacks the token values that the sums asked for are made of.
    """
    if max_length > store.identity.max_length:
        raise InputError(
            "the store was scored for shorter sequences",
            where=f"--max-length {max_length}",
            expected=f"at most {store.identity.max_length} ({store.path})",
            found=max_length,
            next="Lower --max-length, or make a store with a longer one.",
        )
    if store.identity.scored_turns is not None and ld_alpha is not None:
        raise InputError(
            "LD-DPO is about completions as a whole, and the store has the log-probs of some turns",
            where=f"{store.path}, --ld-alpha {ld_alpha:g}",
            next="Leave it out, or make a store with --score-turns completion.",
        )
    if store.identity.sums_only and (max_length < store.identity.max_length or ld_alpha is not None):
        raise InputError(
            "the store was imported and has sums only, no token values",
            where=f"{store.path}, {'--ld-alpha' if ld_alpha is not None else '--max-length'}",
            next=f"Train with --max-length {store.identity.max_length} and without --ld-alpha, or score the rows with precompute.",
        )
    positions = np.arange(store.num_pairs, dtype=np.int32) if positions is None else np.asarray(positions, np.int32)
    if max_length < store.identity.max_length:
        turns = store.identity.scored_turns is not None
        lengths = store.columns(("num_prompt_tokens", *SCORED.values())) if turns else store.token_counts
        positions = positions[fits(lengths, max_length).to_numpy(zero_copy_only=False)[positions]]
    if not len(positions):
        raise InputError(
            "no pair is left",
            where=f"{store.path}, --max-length {max_length}",
            found=f"{store.num_pairs} pairs in the store",
        )
    return positions


def dataset_of(store: Store, max_length: int, ld_alpha: float | None = None, positions: Sequence[int] | None = None) -> Dataset:
    """The pairs of `store` as a store of `max_length` would hold them; sums are LD-DPO's if `ld_alpha` is given.

    `positions` says which pairs and in which order (store/select.py); None: all, in the store's order. Leaves out and refuses what
    `fitting` does.
    """
    from datasets import Dataset

    positions = fitting(store, max_length, ld_alpha, positions)
    # datasets would pickle the table to hash it. The transform, and with it the store, goes into the fingerprint when it is set.
    fingerprint = hashlib.sha256(positions).hexdigest()[:16]
    dataset = Dataset(pa.table({POSITION: positions}), fingerprint=fingerprint)
    dataset.set_transform(ReadPairs(store, max_length, ld_alpha))
    return dataset
