"""Global batches as a plain seeded shuffle makes them; inside each, pairs are dealt so that the ranks compute evenly.

Under ZeRO every micro-step ends with all ranks waiting for the one with the most tokens. Which pairs share an optimizer step is not
touched: the gradient is their mean in any order. Which rank and micro-step gets a pair is. Some losses relate the pairs of a micro-batch to
each other; for those micro-batches stay whole, and only which rank gets which is chosen.

    shuffled      [ 9 1 8 2 | 7 3 6 4 ]      2 ranks x 2 pairs x 2 micro-steps, by tokens
    dealt         [ 9 6 | 8 7 ] [ 4 1 | 3 2 ]   step 1: 15 against 15, step 2: 5 against 5
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Sampler

RELATE_PAIRS = frozenset({"aot", "aot_unpaired", "sft"})
"""Losses that are not a mean over pairs: two sort the pairs of a micro-batch, one is a mean over its tokens."""


@dataclass(frozen=True)
class Shape:
    """How one optimizer step is divided: pairs per micro-batch, ranks, micro-steps."""

    micro_batch: int
    world: int
    steps: int

    @property
    def pairs(self) -> int:
        """Of one optimizer step, over all ranks."""
        return self.micro_batch * self.world * self.steps


class BalancedSampler(Sampler[int]):
    """Indices in the order in which accelerate hands micro-batches out: micro-batch k goes to rank k mod world.

    `tokens`: int [pairs], what each pair costs. The order depends on (seed, epoch) and the shape alone, so a resumed run that skips what
    was done sees the same pairs. A last incomplete global batch is left as shuffled. `keep_micro_batches` for losses in RELATE_PAIRS.
    """

    def __init__(self, tokens: np.ndarray, shape: Shape, seed: int, keep_micro_batches: bool = False):
        self.tokens, self.shape, self.seed, self.epoch = tokens, shape, seed, 0
        self.keep_micro_batches = keep_micro_batches

    def __len__(self) -> int:
        return len(self.tokens)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch, from 0 on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = shuffled(len(self.tokens), self.seed, self.epoch)
        for start in range(0, len(order), self.shape.pairs):
            batch = order[start : start + self.shape.pairs]
            if len(batch) == self.shape.pairs:
                batch = (deal_whole if self.keep_micro_batches else deal)(batch, self.tokens[batch], self.shape)
            yield from batch.tolist()


def shuffled(num_pairs: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, int64 [num_pairs]: the one that transformers and accelerate shuffle into with this seed."""
    return torch.randperm(num_pairs, generator=torch.Generator().manual_seed(seed + epoch)).numpy()


def pairs_of_steps(num_steps: int, num_pairs: int, pairs_per_step: int) -> int:
    """Pairs of the first so many optimizer steps, over all ranks: the last step of each epoch has what is left of `num_pairs`."""
    epochs, rest = divmod(num_steps, math.ceil(num_pairs / pairs_per_step))
    return epochs * num_pairs + rest * pairs_per_step


def deal(pairs: np.ndarray, tokens: np.ndarray, shape: Shape) -> np.ndarray:
    """The same `pairs`, int64 [pairs], in the order micro-step, rank, pair: similar ones share a micro-step, and its ranks get even sums of `tokens`,
    int [pairs].

    Largest first to the rank with the least so far that has room (Graham's LPT with a capacity).
    """
    largest_first = np.argsort(-tokens, kind="stable")
    dealt = []
    for step in largest_first.reshape(shape.steps, shape.world * shape.micro_batch):
        hands: list[list[int]] = [[] for _ in range(shape.world)]
        sums = [0] * shape.world
        for index in step:
            rank = min((r for r in range(shape.world) if len(hands[r]) < shape.micro_batch), key=lambda r: (sums[r], r))
            hands[rank].append(index)
            sums[rank] += int(tokens[index])
        dealt += [index for hand in hands for index in hand]
    return pairs[dealt]


def deal_whole(pairs: np.ndarray, tokens: np.ndarray, shape: Shape) -> np.ndarray:
    """As `deal`, with the micro-batches of `pairs` as they are: those of like sums share a micro-step. int64 [pairs]."""
    micro_batches = pairs.reshape(-1, shape.micro_batch)
    sums = tokens.reshape(micro_batches.shape).sum(axis=1)
    return micro_batches[deal(np.arange(len(sums)), sums, Shape(1, shape.world, shape.steps))].reshape(-1)


def imbalance(order: np.ndarray, tokens: np.ndarray, shape: Shape) -> float:
    """Share of the ranks' time lost to waiting: 1 - (mean tokens of a rank) / (tokens of the slowest), over all complete micro-steps.

    `order`: int64 [pairs], as `deal` gives them; `tokens`: int [pairs of the dataset].
    """
    together = shape.world * shape.micro_batch
    complete = order[: len(order) // together * together]
    if not len(complete):
        return 0.0
    sums = tokens[complete].reshape(-1, shape.world, shape.micro_batch).sum(axis=2)
    return 1.0 - float(sums.mean(axis=1).sum() / sums.max(axis=1).sum())
