"""A micro-batch as the device needs it, made where the data is read: in the loader's workers, in pinned memory where there is a GPU.

Nothing is read back from the device to arrange it: the packed row, where the head reads and what it should find, and where TRL's loss looks for
the log-prob of each completion token. That is a grid [2 pairs, 1 + longest completion], chosen sides first: one place for the prompt, which
TRL's loss does not look at, and the completion.
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
from precompute.scorer.packing import Sequence, pack
from train.bins import MicroBatch
from train.data import REFERENCE

Move = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Counts:
    """Tokens of each pair of a micro-batch, int64 [pairs], and what a padded batch of them would have."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def padded(self) -> int:
        longest = (self.prompt + np.maximum(self.chosen, self.rejected)).max(initial=0)
        return 2 * len(self.prompt) * int(longest)


@dataclass(frozen=True)
class Row:
    """What the policy computes in one micro-step."""

    rows: tuple[PackedRow, ...]
    """One, but for models whose RoPE follows the row (precompute/scorer/rope.py)."""
    predictors: tuple[torch.Tensor, ...]
    """int64, for each row: the positions whose hidden states predict."""
    targets: torch.Tensor
    """int64 [N], what they should predict."""
    taken: torch.Tensor
    """int64 [K], for each completion token, chosen sides first, which of the N it is: shared tokens are computed once."""
    places: torch.Tensor
    """int64 [K], where it stands in TRL's grid, flattened and without its first column."""
    grid: tuple[int, int]
    """Rows and columns of that: 2 pairs x the longest completion."""
    num_chosen: int
    """Of the K tokens, those of chosen sides."""
    counts: Counts
    micro_batch: MicroBatch

    def moved(self, move: Move) -> "Row":
        """Every tensor as `move` gives it."""
        return replace(
            self,
            rows=tuple(row.moved(move) for row in self.rows),
            predictors=tuple(map(move, self.predictors)),
            targets=move(self.targets),
            taken=move(self.taken),
            places=move(self.places),
        )

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
    sequences = [Sequence(np.concatenate([prompt, ids]), len(prompt)) for prompt, ids in zip(prompts * 2, completions, strict=True)]
    lengths = np.array([len(ids) for ids in completions])
    row = _row(sequences, config, lengths, int(lengths[: len(prompts)].sum()), prompts, micro_batch)
    mask = np.zeros((len(completions), 1 + row.grid[1]), np.int64)
    mask[:, 1:] = np.arange(row.grid[1]) < lengths[:, None]
    mask = torch.from_numpy(mask)
    return {
        "input_ids": torch.zeros_like(mask),  # TRL makes labels of them, which nobody reads
        "attention_mask": mask,
        "completion_mask": mask,
        **{name: torch.tensor(read[name], dtype=torch.float32) for name in REFERENCE},
        "row": row,
    }


def _row(sequences, config, lengths: np.ndarray, num_chosen: int, prompts, micro_batch: MicroBatch) -> Row:
    width = int(lengths.max())
    rows, predictors, targets, num_targets = [], [], [], 0
    taken: list[np.ndarray] = [np.empty(0, np.int64)] * len(sequences)
    for group in together(SimpleNamespace(config=config), sequences):
        members = [sequences[index] for index in group.members]
        (batch,) = pack(members, tokens_per_batch=sum(len(each.ids) for each in members), whole=group.whole)
        rows.append(PackedRow.of(batch))
        predictors.append(torch.from_numpy(batch.predictors))
        targets.append(batch.targets)
        for index, slots in zip(group.members[batch.members], batch.slots, strict=True):
            taken[index] = slots + num_targets
        num_targets += len(batch.targets)
    places = np.concatenate([index * width + np.arange(length) for index, length in enumerate(lengths)])
    half = len(prompts)
    return Row(
        rows=tuple(rows),
        predictors=tuple(predictors),
        targets=torch.from_numpy(np.concatenate(targets)),
        taken=torch.from_numpy(np.concatenate(taken)),
        places=torch.from_numpy(places),
        grid=(len(sequences), width),
        num_chosen=num_chosen,
        counts=Counts(np.array([len(ids) for ids in prompts]), lengths[:half], lengths[half:]),
        micro_batch=micro_batch,
    )
