"""What TRL logs of training, as sums on the device: nothing is read back in a micro-step, and ranks meet once per logged step.

TRL's `_compute_loss` gathers some fifteen values from all ranks and reads each, in every micro-step. Its code runs here as it is, with an
`accelerator` that keeps what it is asked to gather. A logged value is the mean over all optimizer steps since the last one, as the loss is, and
of each step over all its pairs, or all its tokens: what TRL logs where a step is one micro-batch.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.distributed
from trl import DPOTrainer

from train.balance import shuffled
from train.data import Lengths

NUM_TOKENS = "num_tokens"
"""TRL's name for the tokens of all sequences so far."""

OF_PAIRS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
"""What TRL 1.16 gathers of each pair, in its order."""

OF_TOKENS = (("entropy", 0, 1), ("logits/chosen", 3, 4), ("logits/rejected", 5, 6), ("mean_token_accuracy", 7, 8))
"""What it gathers of tokens: name, and which of the NUM_OF_TOKENS values in its order are the sum and the number of tokens."""

NUM_OF_TOKENS = 9


class OfTokens:
    """A per-token output of the policy's head where TRL's metrics expect a grid with a mask: it has the completion tokens alone."""

    def __init__(self, values: torch.Tensor, num_chosen: int):
        """`values` [K], chosen sides first."""
        self.values, self.num_chosen = values.detach(), num_chosen

    def __getitem__(self, masked: object) -> "OfTokens":
        return self

    __mul__ = __and__ = __getitem__

    def detach(self) -> "OfTokens":
        return self

    def chunk(self, parts: int, dim: int) -> tuple["OfTokens", "OfTokens"]:
        """Chosen and rejected."""
        return OfTokens(self.values[: self.num_chosen], self.num_chosen), OfTokens(self.values[self.num_chosen :], 0)

    def sum(self) -> torch.Tensor:
        """Of all values, a scalar in their dtype."""
        return self.values.sum()


class Sums:
    """Sums and weights of this rank since the last `means`, for each optimizer step."""

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[dict[str, tuple[torch.Tensor | float, torch.Tensor | float]]] = []

    def begin_step(self) -> None:
        """What is added from now on belongs to another optimizer step."""
        self.steps.append({})

    def add(self, name: str, total: torch.Tensor | float, weight: torch.Tensor | float) -> None:
        """`total`: a sum over `weight` pairs or tokens, a number or a scalar tensor, on the device if it was computed there."""
        before = self.steps[-1].get(name, (0.0, 0.0))
        total, weight = (each.detach().double() if torch.is_tensor(each) else each for each in (total, weight))
        self.steps[-1][name] = before[0] + total, before[1] + weight

    def means(self) -> dict[str, tuple[float, float]]:
        """(mean over the steps of each one's mean, sum) by name, over all ranks, each of which calls it at once with the same names; then they
        are empty."""
        if not self.steps:
            return {}
        names = sorted(self.steps[0])
        flat = [each for step in self.steps for name in names for each in step[name]]
        seen = torch.tensor([0.0 if torch.is_tensor(each) else each for each in flat], dtype=torch.float64).to(self.device)
        if on_device := [index for index, each in enumerate(flat) if torch.is_tensor(each)]:
            seen[torch.tensor(on_device, device=self.device)] = torch.stack([flat[index].to(self.device) for index in on_device])
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(seen)
        totals, weights = seen.view(len(self.steps), len(names), 2).cpu().unbind(-1)
        self.steps = []
        means, sums = (totals / weights).mean(0).tolist(), totals.sum(0).tolist()
        return dict(zip(names, zip(means, sums, strict=True), strict=True))


@contextmanager
def gathering(
    trainer: DPOTrainer,
    mode: Literal["train", "eval"],
    device: torch.device,
    gather: Callable[[torch.Tensor], torch.Tensor],
    gather_for_metrics: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[dict[str, list[float]]]:
    """Inside the block TRL's loss gathers by these functions, on `device`, and the metrics it logs are in the dict that is yielded; afterwards
    `trainer` has the metrics it had before."""
    together, logged = trainer.accelerator, trainer._metrics[mode]
    trainer.accelerator = SimpleNamespace(device=device, gather=gather, gather_for_metrics=gather_for_metrics)
    trainer._metrics[mode] = defaultdict(list)
    try:
        yield trainer._metrics[mode]
    finally:
        trainer.accelerator, trainer._metrics[mode] = together, logged


@contextmanager
def kept(trainer: DPOTrainer, sums: Sums, counted: bool) -> Iterator[None]:
    """Inside the block TRL's loss gathers and logs nothing; what it would is added to `sums`, unless the pairs are not `counted`."""
    of_pairs: list[torch.Tensor] = []
    of_tokens: list[torch.Tensor] = []

    def keep(values: torch.Tensor, where: list[torch.Tensor]) -> torch.Tensor:
        where.append(values if counted else values * 0)
        return torch.zeros(1)  # on the CPU: reading it waits for nothing

    num_tokens = trainer._total_train_tokens
    with gathering(
        trainer, "train", trainer.accelerator.device, lambda values: keep(values, of_pairs), lambda values: keep(values, of_tokens)
    ):
        try:
            yield
        finally:
            trainer._total_train_tokens = num_tokens
    if (len(of_pairs), len(of_tokens)) != (len(OF_PAIRS), NUM_OF_TOKENS):
        raise RuntimeError(f"TRL gathered {len(of_pairs)} values of pairs and {len(of_tokens)} of tokens: another version?")
    for name, values in zip(OF_PAIRS, of_pairs, strict=True):
        sums.add(name, values.sum(), float(len(values)) if counted else 0.0)
    for name, total, weight in OF_TOKENS:
        sums.add(name, of_tokens[total], of_tokens[weight])


def tokens_before(state: dict, lengths: Lengths, pairs_per_step: int, seed: int | None) -> int:
    """NUM_TOKENS of the steps before a checkpoint, of which TRL knows nothing when a run goes on: what was logged last, and the steps since.

    `state`: the checkpoint's (train/checkpoint.py); `lengths`: of the training pairs, in the order of the dataset; `seed` None: they are not shuffled.
    """
    logged = [(entry["step"], entry[NUM_TOKENS]) for entry in state["log_history"] if "loss" in entry and NUM_TOKENS in entry]
    last, num_tokens = logged[-1] if logged else (0, 0)
    num_pairs = len(lengths.both)
    steps_per_epoch, order, of_epoch = math.ceil(num_pairs / pairs_per_step), np.arange(num_pairs), None
    for step in range(last, state["global_step"]):
        epoch, number = divmod(step, steps_per_epoch)
        if seed is not None and epoch != of_epoch:
            order, of_epoch = shuffled(num_pairs, seed, epoch), epoch
        num_tokens += int(lengths.both[order[number * pairs_per_step : (number + 1) * pairs_per_step]].sum())
    return num_tokens
