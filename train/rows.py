"""A micro-batch as the device needs it, made where the data is read: in the loader's workers, in pinned memory where there is a GPU.

Nothing is read back from the device to arrange it: the packed row, where the head reads and what it should find, and where TRL's loss looks for
the log-prob of each completion token that is scored. That is a grid [2 pairs, 1 + most such tokens], chosen sides first: one place for the
prompt, which TRL's loss does not look at, and the tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers.configuration_utils import PreTrainedConfig

from precompute.scorer.api import PackedRow, together
from precompute.scorer.packing import PackedBatch, Sequence, mask_of, pack
from store.spans import SCORED
from train.bins import MicroBatch
from train.data import REFERENCE, Lengths

Move = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Arranged:
    """Sequences as packed rows, and where the head reads and what it should find."""

    rows: tuple[PackedRow, ...]
    """One, but for models whose RoPE follows the row (precompute/scorer/rope.py)."""
    predictors: tuple[torch.Tensor, ...]
    """int64, for each row: the positions whose hidden states predict."""
    targets: torch.Tensor
    """int64 [N], what they should predict."""
    taken: torch.Tensor
    """int64 [K], for each token that is scored, sequence by sequence, which of the N it is: shared tokens are computed once."""

    def moved(self, move: Move) -> "Arranged":
        """Every tensor as `move` gives it."""
        return Arranged(
            tuple(row.moved(move) for row in self.rows), tuple(map(move, self.predictors)), move(self.targets), move(self.taken)
        )


def arrange(config: PreTrainedConfig, sequences: list[Sequence], *, whole: bool = False) -> tuple[Arranged, list[PackedBatch]]:
    """On the CPU, for a model of this configuration; and the batches that the rows are made of. `whole`: as in `pack`."""
    rows, predictors, targets, batches, num_targets = [], [], [], [], 0
    taken: list[np.ndarray] = [np.empty(0, np.int64)] * len(sequences)
    for group in together(SimpleNamespace(config=config), sequences):
        members = [sequences[index] for index in group.members]
        (batch,) = pack(members, tokens_per_batch=sum(len(each.ids) for each in members), whole=group.whole or whole)
        batches.append(batch)
        rows.append(PackedRow.of(batch))
        predictors.append(torch.from_numpy(batch.predictors))
        targets.append(batch.targets)
        for index, slots in zip(group.members[batch.members], batch.slots, strict=True):
            taken[index] = slots + num_targets
        num_targets += len(batch.targets)
    of_all = (torch.from_numpy(np.concatenate(each)) for each in (targets, taken))
    return Arranged(tuple(rows), tuple(predictors), *of_all), batches


@dataclass(frozen=True)
class Row:
    """What the policy computes in one micro-step; of each pair the chosen and the rejected sequence, all chosen ones first."""

    arranged: Arranged
    places: torch.Tensor
    """int64 [K], where each token that is scored stands in TRL's grid, flattened and without its first column."""
    grid: tuple[int, int]
    """Rows and columns of that: 2 pairs x the most tokens of a completion that are scored."""
    num_chosen: int
    """Of the K tokens, those of chosen sides."""
    lengths: Lengths
    """Of the pairs."""
    micro_batch: MicroBatch

    @property
    def num_tokens(self) -> int:
        """Of all sequences of the pairs that count."""
        return int(self.lengths.both.sum()) if self.micro_batch.weight else 0

    def moved(self, move: Move) -> "Row":
        """Every tensor as `move` gives it."""
        return replace(self, arranged=self.arranged.moved(move), places=move(self.places))

    def pin_memory(self) -> "Row":
        """What PyTorch's loader asks of a value that it does not know."""
        return self.moved(lambda tensor: tensor.pin_memory())


@dataclass(frozen=True)
class MicroBatches(torch.utils.data.Dataset):
    """`dataset` (train/data.py) by micro-batches; an item is what TRL's loss gets, with the `row` that the model computes instead."""

    dataset: Dataset
    config: PreTrainedConfig
    """Of the policy."""

    def __getitem__(self, micro_batch: MicroBatch) -> dict[str, Any]:
        read = self.dataset[list(micro_batch.pairs)]
        return loss_inputs(read, self.config, micro_batch)


def only(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The one item of a loader's list."""
    (item,) = items
    return item


def loss_inputs(read: dict[str, list], config: PreTrainedConfig, micro_batch: MicroBatch) -> dict[str, Any]:
    """`read`: the columns of train/data.py for the pairs of `micro_batch`."""
    prompts = [np.asarray(ids, np.int32) for ids in read["prompt_ids"]]
    sides = [[np.asarray(ids, np.int32) for ids in read[name]] for name in ("chosen_ids", "rejected_ids")]
    completions = [ids for side in sides for ids in side]
    masks = [None] * len(completions)
    if SCORED["chosen"] in read:
        spans = [each for name in SCORED.values() for each in read[name]]
        masks = [mask_of(each, len(ids)) for each, ids in zip(spans, completions, strict=True)]
    sequences = [
        Sequence(np.concatenate([prompt, ids]), len(prompt), mask)
        for prompt, ids, mask in zip(prompts * 2, completions, masks, strict=True)
    ]
    counts = np.array([sequence.num_scored for sequence in sequences])
    half, width = len(prompts), int(counts.max())
    num_prompt, chosen, rejected = (np.array([len(ids) for ids in each]) for each in (prompts, *sides))
    row = Row(
        arranged=arrange(config, sequences)[0],
        places=torch.from_numpy(np.concatenate([index * width + np.arange(count) for index, count in enumerate(counts)])),
        grid=(len(sequences), width),
        num_chosen=int(counts[:half].sum()),
        lengths=Lengths(num_prompt, chosen, rejected),
        micro_batch=micro_batch,
    )
    mask = np.zeros((len(sequences), 1 + width), np.int64)
    mask[:, 1:] = np.arange(width) < counts[:, None]
    mask = torch.from_numpy(mask)
    return {
        "input_ids": torch.zeros_like(mask),  # TRL makes labels of them, which nobody reads
        "attention_mask": mask,
        "completion_mask": mask,
        **{name: torch.tensor(read[name], dtype=torch.float32) for name in REFERENCE},
        "row": row,
    }
