"""Sequences -> packed batches in which every shared prefix stands once; pure, numpy only.

1. sort     the sequences lexicographically: those that share a prefix become neighbours
2. share    each keeps only the tokens after its longest common prefix with its predecessor (its *branch*)
3. cut      walk the sorted list and close a batch when the next branch would exceed the budget of tokens, or of keys

    chosen   p0 p1 p2 c0 c1 c2          packed row   p0 p1 p2 c0 c1 | r0 r1
    rejected p0 p1 p2 r0 r1 r2          positions     0  1  2  3  4 |  3  4
                                        branch 2 sees p0 p1 p2 (its context) and itself

This serves more than the pair: rows that share a prompt or a whole response, and a system prompt that all rows share, are computed once.
The last token of a sequence predicts nothing and is left out. Scores belong to distinct (context, token), so shared completion tokens are
scored once as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from store.spans import pairs_of

MIN_SHARED = 8
"""Shorter common prefixes are not shared: one more attention call costs more than a few tokens."""

KEYS_PER_TOKEN = 4
"""A batch has at most so many keys per token of the budget. On a GPU each branch has its own copy of its context's keys and values: a long
prompt under many short branches would take memory that the number of tokens does not show."""


@dataclass(frozen=True)
class Sequence:
    """Token ids of prompt + completion (int32 [length]) of which the first `num_prompt` (>= 1) are not scored."""

    ids: np.ndarray
    num_prompt: int
    mask: np.ndarray | None = None
    """bool [length - num_prompt]: which tokens of the completion are scored; None: all."""

    @property
    def scored(self) -> np.ndarray:
        """int64 [num_scored]: where in `ids` the tokens stand that are scored."""
        offsets = np.arange(len(self.ids) - self.num_prompt) if self.mask is None else np.flatnonzero(self.mask)
        return offsets + self.num_prompt

    @property
    def num_scored(self) -> int:
        """Tokens that get a log-prob."""
        return len(self.ids) - self.num_prompt if self.mask is None else int(np.count_nonzero(self.mask))


def spans_of(mask: np.ndarray) -> list[int]:
    """bool [tokens] -> [start, stop, start, stop, …] of what is true in it: how a store keeps it (store/spans.py)."""
    return np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))).tolist()


def mask_of(spans: list[int], length: int) -> np.ndarray:
    """The other way: bool [length]."""
    mask = np.zeros(length, bool)
    for start, stop in pairs_of(spans):
        mask[start:stop] = True
    return mask


@dataclass(frozen=True)
class Branch:
    """Consecutive tokens of a packed row, and the earlier stretches of that row they continue, in order: ((start, stop), ...)."""

    start: int
    stop: int
    context: tuple[tuple[int, int], ...]

    @property
    def num_context(self) -> int:
        """Tokens that each token of the branch sees before the branch."""
        return sum(stop - start for start, stop in self.context)


@dataclass(frozen=True)
class PackedBatch:
    """One packed row of T tokens in which N distinct (context, token) are scored.

    `slots[k]` places them: the log-probs of sequence `members[k]` are scores[slots[k]], one per token that is scored.
    """

    input_ids: np.ndarray  # int64 [T]
    position_ids: np.ndarray  # int64 [T]
    branches: tuple[Branch, ...]
    predictors: np.ndarray  # int64 [N], the packed position whose hidden state predicts ...
    targets: np.ndarray  # int64 [N], ... this token
    members: np.ndarray  # int64 [K], indices into the list of sequences that was packed
    slots: tuple[np.ndarray, ...]  # K times int64 [num_scored]
    places: tuple[np.ndarray, ...]  # K times int64, where each of the sequence's computed tokens lies in the row


def pack(sequences: list[Sequence], tokens_per_batch: int, *, whole: bool = False) -> Iterator[PackedBatch]:
    """Yield batches of at most `tokens_per_batch` model tokens that together hold every sequence once.

    `whole`: with the last token of each sequence too, for a model in which it changes what the others give (its RoPE follows the length).
    A sequence longer than the budget gets a batch of its own: it cannot be split. Raises ValueError for a sequence without
    a prompt token (its first token has no context) or without a completion.
    """
    for sequence in sequences:
        if not 1 <= sequence.num_prompt < len(sequence.ids) or not sequence.num_scored:
            raise ValueError(
                f"a sequence needs a prompt and a completion, not {sequence.num_prompt} + {sequence.num_scored} tokens"
            )
    computed = [sequence.ids if whole else sequence.ids[:-1] for sequence in sequences]
    for batch in _plan(computed, tokens_per_batch):
        yield _batch(sequences, computed, batch)


def plan(ids: list[np.ndarray], tokens_per_batch: int) -> Iterator[list[tuple[int, int]]]:
    """Steps 1 to 3: batches of (index, tokens shared with the predecessor). The model computes len(ids[index]) - 1 - shared for each."""
    yield from _plan([each[:-1] for each in ids], tokens_per_batch)


def _plan(ids: list[np.ndarray], tokens_per_batch: int) -> Iterator[list[tuple[int, int]]]:
    """Steps 1 to 3 for the tokens that the model computes."""
    order = sorted(range(len(ids)), key=lambda i: ids[i].astype(">u4").tobytes())
    batch: list[tuple[int, int]] = []
    used = keys = 0
    for previous, index in zip([None, *order], order, strict=False):
        shared = 0 if previous is None else common_prefix(ids[previous], ids[index])
        shared = shared if shared >= MIN_SHARED else 0
        length = len(ids[index])
        if batch and (used + length - shared > tokens_per_batch or keys + length > KEYS_PER_TOKEN * tokens_per_batch):
            yield batch
            batch, used, keys, shared = [], 0, 0, 0
        batch.append((index, shared))
        used += length - shared
        keys += length if length > shared else 0
    if batch:
        yield batch


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading tokens that two id arrays, int [tokens] each, have in common."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def _batch(sequences: list[Sequence], computed: list[np.ndarray], batch: list[tuple[int, int]]) -> PackedBatch:
    input_ids, position_ids, branches, predictors, targets, places = [], [], [], [], [], []
    path: list[tuple[int, int]] = []  # stretches of the packed row that hold the current sequence, from its first token on
    used = 0
    for index, shared in batch:
        sequence = sequences[index]
        length = len(computed[index])
        path = _first(path, shared)
        if length > shared:
            branches.append(Branch(used, used + length - shared, tuple(path)))
            path = [*path, (used, used + length - shared)]
        input_ids.append(computed[index][shared:])
        position_ids.append(np.arange(shared, length))
        used += length - shared
        places.append(np.concatenate([np.arange(start, stop) for start, stop in path]))
        predictors.append(places[-1][sequence.scored - 1])
        targets.append(sequence.ids[sequence.scored])

    # One score per distinct (predictor, target): branches that share completion tokens share their scores.
    keys = np.concatenate(predictors) << 32 | np.concatenate(targets).astype(np.int64)
    keys, inverse = np.unique(keys, return_inverse=True)
    ends = np.cumsum([len(part) for part in predictors])
    return PackedBatch(
        input_ids=np.concatenate(input_ids).astype(np.int64),
        position_ids=np.concatenate(position_ids).astype(np.int64),
        branches=tuple(branches),
        predictors=keys >> 32,
        targets=keys & 0xFFFFFFFF,
        members=np.array([index for index, _ in batch]),
        slots=tuple(np.split(inverse, ends[:-1])),
        places=tuple(places),
    )


def _first(path: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """The part of a path that holds its first `length` tokens."""
    kept = []
    for start, stop in path:
        if length <= 0:
            break
        kept.append((start, min(stop, start + length)))
        length -= stop - start
    return kept
