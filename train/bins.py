"""Micro-batches by tokens: the pairs of each optimizer step, dealt to micro-steps and ranks so that all compute evenly.

Which pairs share an optimizer step is the plain seeded shuffle, as for micro-batches of a fixed number of pairs (train/balance.py). Each step has
the same number of micro-steps M, for DeepSpeed asks for it: the least with which no bin of the run has more tokens than the budget.

    shuffled   [ 9 1 8 2 7 3 6 4 ]      one step, 2 ranks, budget 12
    dealt      [ 9 1 | 8 2 ] [ 7 3 | 6 4 ]   M = 2 micro-steps: 10 against 10, twice

The gradient of the step is the mean over its N pairs. A bin's loss is a mean over its own n; DeepSpeed takes the mean over ranks and the Trainer
over micro-steps: times n x M x ranks / N it adds up. A step with fewer pairs than bins fills the empty ones with a pair of weight 0, as every
rank must join every collective.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from store.errors import InputError
from train.balance import shuffled

MOST_EPOCHS = 10_000
"""Each is dealt before the first step: a tenth of a second for 150,000 pairs."""


@dataclass(frozen=True)
class MicroBatch:
    """The pairs that one rank computes in one micro-step."""

    pairs: tuple[int, ...]
    """Indices into the dataset."""
    weight: float
    """Of its loss, which is a mean over its pairs; 0: the pair is there for the collectives alone, and counts nowhere."""
    token_weight: float
    """Of a loss that is a mean over its chosen completions' tokens (sft)."""


def deal_into_bins(tokens: np.ndarray, num_bins: int) -> list[list[int]]:
    """Indices of `tokens` (int [pairs]) in `num_bins` lists with even sums: the largest first, to the one with the least (Graham's LPT)."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    least = [(0, number) for number in range(num_bins)]  # a heap
    for index in np.argsort(-tokens, kind="stable").tolist():
        used, number = heapq.heappop(least)
        bins[number].append(index)
        heapq.heappush(least, (used + int(tokens[index]), number))
    return bins


def num_micro_steps(tokens: np.ndarray, world: int, budget: int) -> int:
    """The least with which these pairs, of `tokens` int [pairs], dealt to `world` ranks, exceed `budget` tokens in no bin but those of a single pair."""
    # A pair beyond the budget fills one bin, not as many as it has budgets: what fewer steps could not hold.
    steps = max(1, math.ceil(int(np.minimum(tokens, min(budget, tokens.max())).sum()) / (budget * world)))
    while any(
        len(each) > 1 and sum(int(tokens[index]) for index in each) > budget for each in deal_into_bins(tokens, steps * world)
    ):
        steps += 1
    return steps


def refuse_endless(num_steps: int, steps_per_epoch: int, where: str) -> None:
    """InputError, which names the option `where`, for a run of more than MOST_EPOCHS."""
    if num_steps > MOST_EPOCHS * steps_per_epoch:
        raise InputError(
            "more epochs than can be planned",
            where=where,
            expected=f"at most {MOST_EPOCHS:,} epochs, of {steps_per_epoch:,} step(s) each",
            found=f"{num_steps:,} steps",
        )


def within(tokens: np.ndarray, budget: int) -> list[list[int]]:
    """Consecutive indices of `tokens`, int [pairs], in lists of at most `budget` tokens; one with more is alone."""
    lists: list[list[int]] = []
    used = budget
    for index, of_pair in enumerate(tokens.tolist()):
        if used + of_pair > budget:
            lists.append([])
            used = 0
        lists[-1].append(index)
        used += of_pair
    return lists


class Bins(Sampler[list[MicroBatch]]):
    """The micro-batches of one rank, for a DataLoader's `batch_sampler`: lists of one.

    `tokens`, `chosen`: int [pairs], what a pair costs in a packed row, and the tokens of its chosen completion. `epochs`: of the whole run,
    of all of which `num_micro_steps` holds. The order depends on the arguments and the epoch alone, so a resumed run that skips what was
    done sees the same pairs.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        chosen: np.ndarray,
        *,
        pairs_per_step: int,
        world: int,
        rank: int,
        budget: int,
        seed: int,
        shuffle: bool = True,
        epochs: int = 1,
    ):
        self.tokens, self.chosen, self.pairs_per_step = tokens, chosen, pairs_per_step
        self.world, self.rank, self.budget, self.seed, self.shuffle = world, rank, budget, seed, shuffle
        self.epoch = 0
        of_epochs = range(epochs if shuffle else 1)
        self.num_micro_steps = max(
            num_micro_steps(tokens[pairs], world, budget) for epoch in of_epochs for pairs in self.steps(epoch)
        )

    def steps(self, epoch: int) -> Iterator[np.ndarray]:
        """The pairs of each optimizer step, int64; the last may have fewer than `pairs_per_step`."""
        order = shuffled(len(self.tokens), self.seed, epoch) if self.shuffle else np.arange(len(self.tokens))
        for start in range(0, len(order), self.pairs_per_step):
            yield order[start : start + self.pairs_per_step]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.tokens) / self.pairs_per_step) * self.num_micro_steps

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for pairs in self.steps(self.epoch):
            for micro_step in self.dealt(pairs):
                yield [micro_step[self.rank]]

    def dealt(self, pairs: np.ndarray) -> list[list[MicroBatch]]:
        """The micro-batches of one optimizer step: [micro-steps][ranks], those with most tokens first, similar ones together."""
        tokens, chosen = self.tokens[pairs], self.chosen[pairs]
        num_bins = self.num_micro_steps * self.world
        bins = deal_into_bins(tokens, num_bins)
        bins.sort(key=lambda each: -sum(int(tokens[index]) for index in each))
        smallest, all_chosen = int(pairs[tokens.argmin()]), int(chosen.sum())
        micro_batches = [
            MicroBatch(
                tuple(pairs[each].tolist()),
                weight=len(each) * num_bins / len(pairs),
                token_weight=int(chosen[each].sum()) * num_bins / all_chosen,
            )
            if each
            else MicroBatch((smallest,), weight=0.0, token_weight=0.0)
            for each in bins
        ]
        return [micro_batches[start : start + self.world] for start in range(0, num_bins, self.world)]

    def imbalance(self, epoch: int = 0) -> float:
        """Share of the ranks' time lost to waiting for the one with the most tokens in each micro-step."""
        mean, most = 0.0, 0
        for pairs in self.steps(epoch):
            for micro_step in self.dealt(pairs):
                sums = [int(self.tokens[list(each.pairs)].sum()) if each.weight else 0 for each in micro_step]
                mean, most = mean + sum(sums) / self.world, most + max(sums)
        return 1.0 - mean / most

    def describe(self) -> str:
        """`micro-batches of at most 16,384 tokens: 4 per optimizer step on each of 4 ranks, 8 pairs each on average`"""
        bins = self.num_micro_steps * self.world
        pairs = min(self.pairs_per_step, len(self.tokens)) / bins
        ranks = f" on each of {self.world} ranks" if self.world > 1 else ""
        longer = int((self.tokens > self.budget).sum())
        alone = (
            f" but for {longer:,} of {len(self.tokens):,} pairs, which have up to {int(self.tokens.max()):,} and go alone"
            if longer
            else ""
        )
        return f"micro-batches of at most {self.budget:,} tokens{alone}: {self.num_micro_steps} per optimizer step{ranks}, {pairs:.3g} pairs each on average"
