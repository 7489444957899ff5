"""How fast a run is: tokens, pairs, FLOPs and seconds by phase, counted on every rank and put together when something is logged.

Counted are pairs as they arrive in the loss, so the numbers mean the same in both layouts:
- tokens    prompt + chosen and prompt + rejected, padding not counted (TRL's `num_tokens`)
- FLOPs     what the pairs need: each prompt once, no padding, nothing computed again for gradient checkpointing   train/flops.py
- padding   share of a padded batch that the packed layout leaves out: padding and the prompts' second copies
- imbalance share of the ranks' time lost to waiting for the one with the most tokens in each micro-step
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed

from train.data import Lengths
from train.flops import PairFlops, peak_flops

PREFIX = "speed/"

PHASES = ("data", "forward", "backward_and_step")
"""DeepSpeed steps its optimizer inside the last backward call, so the two are one phase."""


@dataclass
class Counted:
    """What one rank computed."""

    tokens: int = 0
    packed_tokens: int = 0
    """With each prompt once."""
    padded_tokens: int = 0
    pairs: int = 0
    flops: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By phase."""
    by_micro_step: list[int] = field(default_factory=list)
    """`packed_tokens` of each."""

    def add(self, other: "Counted") -> None:
        """`other` counts from now on as part of this."""
        for name in ("tokens", "packed_tokens", "padded_tokens", "pairs", "flops"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for phase, seconds in other.seconds.items():
            self.seconds[phase] += seconds
        self.by_micro_step += other.by_micro_step


class Speed:
    """Of this rank. `flops` and the GPU's peak, where both are known, give model FLOPs utilization."""

    def __init__(self, flops: PairFlops | None, device: torch.device, dtype: torch.dtype):
        self.flops, self.device, self.peak = flops, device, peak_flops(device, dtype)
        self.recent, self.all = Counted(), Counted()

    @contextmanager
    def phase(self, name: str, wait: bool = False) -> Iterator[None]:
        """Time that passes inside counts for `name`. `wait`: until the device has done all it was given, so that the sum of all phases is
        right whenever it is logged; what each of them takes on a GPU is then the host's share."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if wait and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.recent.seconds[name] += time.perf_counter() - started

    def count(self, lengths: Lengths, padded: int) -> None:
        """The pairs of one micro-batch, and the tokens of the padded batch that they make."""
        packed = int(lengths.packed.sum())
        counted = Counted(int(lengths.both.sum()), packed, padded, len(lengths.prompt), by_micro_step=[packed])
        if self.flops is not None:
            counted.flops = float(self.flops.of_pairs(lengths.prompt, lengths.chosen, lengths.rejected).sum())
        self.recent.add(counted)

    def count_nothing(self) -> None:
        """A micro-step in which this rank only waits for the others."""
        self.recent.add(Counted(by_micro_step=[0]))

    def recent_report(self) -> dict[str, float]:
        """Of all ranks since the last call; every rank calls it at once."""
        report = self._report(self.recent)
        self.all.add(self.recent)
        self.recent = Counted()
        return report

    def whole_report(self) -> dict[str, float]:
        """Of all ranks since the beginning; every rank calls it at once."""
        self.recent_report()
        return self._report(self.all)

    def _report(self, mine: Counted) -> dict[str, float]:
        of_rank = np.array(_from_all_ranks([*mine.by_micro_step], self.device))  # [ranks, micro-steps]
        sums = np.array([mine.tokens, mine.packed_tokens, mine.padded_tokens, mine.pairs, mine.flops])
        seconds = [mine.seconds[phase] for phase in PHASES]
        ranks = np.array(_from_all_ranks([*sums, *seconds], self.device))
        tokens, packed, padded, pairs, flops = ranks[:, : len(sums)].sum(axis=0)
        by_phase = ranks[:, len(sums) :].mean(axis=0)
        elapsed = by_phase.sum()
        if not pairs or not elapsed:
            return {}
        report = {"tokens_per_second": tokens / elapsed, "pairs_per_second": pairs / elapsed, "padding": 1 - packed / padded}
        report |= {f"{phase}_share": seconds / elapsed for phase, seconds in zip(PHASES, by_phase, strict=True)}
        if len(ranks) > 1:
            report["imbalance"] = 1 - of_rank.mean(axis=0).sum() / of_rank.max(axis=0).sum()
        if self.flops is not None and self.peak is not None:
            report["mfu"] = flops / elapsed / (self.peak * len(ranks))
        return {PREFIX + name: float(value) for name, value in report.items()}


def _from_all_ranks(values: list[float], device: torch.device) -> list[list[float]]:
    """`values` of each rank; as many on all."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [values]
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, mine)
    return [each.tolist() for each in gathered]
