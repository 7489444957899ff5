"""What TRL logs of training, as sums on the device: nothing is read back in a micro-step, and ranks meet once per logged step.

TRL's `_compute_loss` gathers some fifteen values from all ranks and reads each, in every micro-step. Its code runs here as it is, with an
`accelerator` that keeps what it is asked to gather. A logged value is the mean over all pairs, or all tokens, since the last one: what TRL
logs of the same pairs in one micro-batch.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Literal

import torch
import torch.distributed
from trl import DPOTrainer

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
    """Sums and weights of this rank since the last `means`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.kept: dict[str, tuple[torch.Tensor | float, torch.Tensor | float]] = {}

    def add(self, name: str, total: torch.Tensor | float, weight: torch.Tensor | float) -> None:
        """`total`: a sum over `weight` pairs or tokens, a number or a scalar tensor, on the device if it was computed there."""
        before = self.kept.get(name, (0.0, 0.0))
        total, weight = (each.detach().double() if torch.is_tensor(each) else each for each in (total, weight))
        self.kept[name] = before[0] + total, before[1] + weight

    def means(self) -> dict[str, tuple[float, float]]:
        """(mean, sum) by name, over all ranks, each of which calls it at once with the same names; then they are empty."""
        names = sorted(self.kept)
        if not names:
            return {}
        values = [torch.as_tensor(each, dtype=torch.float64, device=self.device) for name in names for each in self.kept[name]]
        both = torch.stack(values)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(both)
        self.kept = {}
        return {name: (total / weight, total) for name, (total, weight) in zip(names, both.view(-1, 2).tolist(), strict=True)}


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
