"""`--tokens-per-batch auto`: the largest token budget whose batches fit the memory that is free on the device.

1. measure  the peak memory of two forwards of made-up batches, one four times the other: bytes per token, and a constant
2. choose   the budget that takes SHARE of what is free, at most MOST
3. try      a forward of that size, on a GPU: what does not fit is made smaller until it does

The made-up batches have as many keys per token as a real one may have (packing.KEYS_PER_TOKEN), one sequence that nearly fills them, and every
token is scored: none needs more.
"""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from precompute.scorer import Layout
from precompute.scorer.cpu import give_back_freed_memory
from precompute.scorer.packing import Sequence
from precompute.scorer.scoring import score_batches
from precompute.scorer.spread import devices_of
from store.errors import InputError

PROBES = (1024, 4096)
"""Tokens of the two measured forwards."""

SHARE = {"cuda": 0.9, "cpu": 0.5}
"""Of the free memory. A host has other users, and its allocator gives memory back late."""

MOST = 65536
"""More tokens gain nothing: throughput is flat long before, and what sharing still wins is under 1 % (docs/notebook/tokens_per_batch.md)."""


@contextmanager
def enough_memory(what: str, advice: str | Callable[[], str]) -> Iterator[None]:
    """Around what needs a GPU's memory: too little is an InputError that says `what` ran out, and with `advice` which option helps. Callable: where
    no GPU was asked yet."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"out of memory {what}",
            found=" ".join(str(error).split())[:300].rstrip("."),
            next=advice() if callable(advice) else advice,
        ) from error


def largest_budget(model: PreTrainedModel, *, layout: Layout, max_length: int, num_workers: int) -> int:
    """Tokens per batch, a multiple of 1,024 or `max_length`, for this model on its device; `num_workers` share a host's memory.

    InputError where not even one sequence of `max_length` tokens fits, or where memory cannot be measured.
    """
    kind = model.device.type
    share = SHARE[kind] / (num_workers if kind == "cpu" else 1)
    free = share * np.array([free_memory(device) for device in devices_of(model)])
    try:
        small, large = (_peak(model, layout, tokens) for tokens in PROBES)
    except torch.cuda.OutOfMemoryError as error:
        raise InputError(
            "the measured batch itself does not fit the memory",
            where="--tokens-per-batch auto",
            expected=f"room for {PROBES[1]:,} tokens",
            found=f"{free.min() / 2**30:.2f} GiB, {SHARE[kind]:.0%} of what is free",
            next="Free memory (other processes?), or give --tokens-per-batch a number.",
        ) from error
    per_token = np.maximum(1.0, (large - small) / (PROBES[1] - PROBES[0]))
    constant = np.maximum(0.0, small - per_token * PROBES[0])
    tightest = int(np.argmin((free - constant) / per_token))  # of several devices
    room, per_token, constant = (float(each[tightest]) for each in np.broadcast_arrays(free, per_token, constant))
    fitting = math.floor((room - constant) / per_token)
    while fitting >= max_length:
        budget = max(max_length, min(MOST, fitting) // 1024 * 1024)
        if kind == "cpu" or _fits(model, layout, budget):
            return budget
        fitting = int(0.8 * budget)
    raise InputError(
        "a batch of one sequence of --max-length tokens does not fit the memory",
        where="--tokens-per-batch auto",
        expected=f"{(constant + per_token * max_length) / 2**30:.1f} GiB for {max_length:,} tokens",
        found=f"{room / 2**30:.1f} GiB, {SHARE[kind]:.0%} of what is free",
        next="Free memory (other processes?), lower --max-length, or give --tokens-per-batch a number.",
    )


def _probe(model: PreTrainedModel, layout: Layout, num_tokens: int) -> None:
    """Score a batch of about `num_tokens` tokens that takes what the greediest of that many may take: every token is scored, so a head's logits
    are there for each. Packed: nearly one sequence, whose end four have, each their own: as long as a sequence can be, and nearly KEYS_PER_TOKEN
    keys per token. Padded: four rows."""
    end = num_tokens // 64 if layout == "packed" else num_tokens // 4 - 1
    num_shared = num_tokens - 4 * end if layout == "packed" else 1
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = np.random.default_rng(0)
    shared = generator.integers(0, vocabulary, num_shared)
    ends = [generator.integers(0, vocabulary, end) for _ in range(4)]
    sequences = [Sequence(np.concatenate([shared, each]).astype(np.int32), 1) for each in ends]
    for _ in score_batches(model, sequences, layout=layout, tokens_per_batch=num_tokens):
        pass


def _peak(model: PreTrainedModel, layout: Layout, num_tokens: int) -> np.ndarray:
    """Bytes that a forward of `num_tokens` takes beyond what is held before it, at their most: float64, one for each of the model's devices."""
    _probe(model, layout, 128)  # libraries allocate workspace at first use
    watches = [MemoryWatch(device) for device in devices_of(model)]
    for watch in watches:
        watch.start()
    _probe(model, layout, num_tokens)
    return np.array([watch.most_since() for watch in watches], dtype=np.float64)


class MemoryWatch:
    """Bytes on a device beyond those that are held when it is made: of a GPU by PyTorch's count, of the host by what is resident."""

    def __init__(self, device: torch.device):
        self.device = device
        # What is garbage, or freed and still resident, would hide as much of what comes.
        gc.collect()
        give_back_freed_memory()
        self.mapped = 0 if device.type == "cuda" else _status("RssFile")
        self.before = torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS") - self.mapped

    def most(self, work: Callable[[], object]) -> int:
        """The most of them while `work()` runs. Raises InputError where a host does not tell."""
        self.start()
        work()
        return self.most_since()

    def start(self) -> None:
        """Let the peak begin with what is held now. Raises InputError where a host does not tell."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        give_back_freed_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak (VmHWM) back to what is resident now
        except OSError as error:
            raise InputError(
                f"memory cannot be measured here: {error}", where="--tokens-per-batch auto", next="Give a number, such as 16384."
            ) from error

    def most_since(self) -> int:
        """The most of them since `start`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        # The kernel may drop pages of a mapped file, such as a library's code, at any time: of the two counts the lower, to plan too little rather
        # than too much.
        return _status("VmHWM") - min(self.mapped, _status("RssFile")) - self.before


def _fits(model: PreTrainedModel, layout: Layout, num_tokens: int) -> bool:
    try:
        _probe(model, layout, num_tokens)
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def free_memory(device: torch.device) -> int:
    """Bytes free on the device: a GPU's, with what PyTorch keeps for itself; or the host's, within this process's control groups."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = [1024 * int(_field(Path("/proc/meminfo"), "MemAvailable"))]
    group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
    for folder in (group, *group.parents):  # a Slurm job's limit stands on one of them
        if (folder / "memory.max").is_file() and (limit := (folder / "memory.max").read_text().strip()) != "max":
            free.append(int(limit) - int((folder / "memory.current").read_text()))
    return min(free)


def _status(name: str) -> int:
    return 1024 * int(_field(Path("/proc/self/status"), name))


def _field(path: Path, name: str) -> str:
    return next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:")).split()[1]
