"""A frozen causal language model + sequences -> the natural-log probability of every completion token.

Two layouts compute the same numbers. `packed` puts many sequences in one row without padding and computes shared prefixes once; `padded` is
the plain Hugging Face forward of right-padded rows: the independent implementation that tests compare with, and the explicit choice for
architectures that `packed` refuses.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from precompute.scorer import Layout
from precompute.scorer.attention import packed_attention, packed_hidden, refuse_unpackable
from precompute.scorer.compiled import compiled_layers, compiler_wanted
from precompute.scorer.cpu import fast_on_cpu, linear
from precompute.scorer.head import Head, head_of
from precompute.scorer.kernels import log_sum_exp
from precompute.scorer.norms import fused_norms
from precompute.scorer.packing import PackedBatch, Sequence, pack
from precompute.scorer.rope import together

SCORER_VERSION = 1
"""Part of a store's identity: raised when a change here or in pairs.py changes what is scored or in what precision. Kernels differ in the last
bits anyway (docs/store-format.md); another one is no new version."""

HEAD_TILE = {"cpu": (1024, 2048)}
"""Completion positions x vocabulary entries whose logits exist at a time. A CPU's tile stays in cache between the product and its
log-sum-exp (1.1 times the speed of whole rows). On a GPU they are those of TRL's kernel: 4,096 x GPU_ENTRIES."""

GPU_ENTRIES = 32768
"""At most; TRL's own choice."""


def score(model: PreTrainedModel, sequences: list[Sequence], *, layout: Layout, tokens_per_batch: int) -> list[np.ndarray]:
    """Log-probs of the tokens of each sequence that are scored, in the order given: float32 [num_scored] each, in nats.

    Logits are computed in the model's dtype; the softmax over the vocabulary in float32. Results do not depend on what else is in the
    list beyond the rounding of the model's dtype. Raises InputError when `layout` cannot score this architecture.
    """
    results: list[Any] = [None] * len(sequences)
    for batch in score_batches(model, sequences, layout=layout, tokens_per_batch=tokens_per_batch):
        for index, logps in zip(batch.members, batch.token_logps, strict=True):
            results[index] = logps
    return results


@dataclass(frozen=True)
class ScoredBatch:
    """Indices of the sequences of one batch, their log-probs (float32 [num_scored] each), and how many positions the model computed."""

    members: np.ndarray
    token_logps: list[np.ndarray]
    num_model_tokens: int


def score_batches(
    model: PreTrainedModel, sequences: list[Sequence], *, layout: Layout, tokens_per_batch: int
) -> Iterator[ScoredBatch]:
    """As `score`, batch by batch in an order of its own, so that a caller can show progress."""
    for group in together(model, sequences):
        members = [sequences[index] for index in group.members]
        scored = (
            _packed(model, members, tokens_per_batch, group.whole)
            if layout == "packed"
            else _padded(model, members, tokens_per_batch)
        )
        for batch in scored:
            yield replace(batch, members=group.members[batch.members])


def _packed(model: PreTrainedModel, sequences: list[Sequence], tokens_per_batch: int, whole: bool) -> Iterator[ScoredBatch]:
    with ready_to_score(model):
        batches = pack(sequences, tokens_per_batch, whole=whole)
        batch = next(batches, None)
        while batch is not None:
            scores = score_packed(model, batch)
            following = next(batches, None)  # packed while a GPU computes
            scores = scores.cpu().numpy()
            yield ScoredBatch(batch.members, [scores[slots] for slots in batch.slots], len(batch.input_ids))
            batch = following


def _padded(model: PreTrainedModel, sequences: list[Sequence], tokens_per_batch: int) -> Iterator[ScoredBatch]:
    for indices in _padded_batches(sequences, tokens_per_batch):
        members = [sequences[index] for index in indices]
        num_model_tokens = len(members) * max(len(each.ids) for each in members)
        yield ScoredBatch(np.array(indices), score_padded(model, members), num_model_tokens)


@contextmanager
def ready_to_score(model: PreTrainedModel):
    """Inside the block `model` runs packed rows, with what makes it fast. Raises InputError for an architecture that cannot be packed."""
    refuse_unpackable(model)
    head_of(model)  # measured by a plain forward
    with packed_attention(model), ExitStack() as stack:
        # The compiler makes operators of its own, of the model's code as it stands; those of a CPU it does not know.
        for way in (compiled_layers,) if compiler_wanted() else (fast_on_cpu, fused_norms):
            stack.enter_context(way(model))
        yield


@torch.inference_mode()
def score_packed(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """Float32 [N] on the head's device: log p(target | everything up to its predictor). Inside `ready_to_score(model)` only."""
    device = model.get_output_embeddings().weight.device
    predictors, targets = (torch.from_numpy(each).to(device) for each in (batch.predictors, batch.targets))
    return _head_logps(model, packed_hidden(model, batch).to(device), predictors, targets)


def _head_logps(model: PreTrainedModel, hidden: torch.Tensor, predictors: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """hidden [T, D], predictors and targets int64 [N] -> float32 [N]. Logits exist only for the completion, a tile at a time."""
    head, after = model.get_output_embeddings(), head_of(model)
    if hidden.device.type == "cuda":
        return _one_pass(hidden[predictors], head, after, targets)
    num_rows, num_entries = HEAD_TILE[hidden.device.type]
    logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(targets), num_rows):
        rows = slice(start, start + num_rows)
        predicting, target = hidden[predictors[rows]], targets[rows]
        target_logits = torch.empty(len(target), dtype=torch.float32, device=hidden.device)
        log_sums = []
        for first in range(0, head.weight.shape[0], num_entries):
            entries = slice(first, first + num_entries)
            products = linear(predicting, head.weight[entries], None if head.bias is None else head.bias[entries])
            logits = after.logits(products.float())
            log_sums.append(log_sum_exp(logits))
            place = target - first
            found = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
            target_logits = torch.where((place >= 0) & (place < logits.shape[1]), found, target_logits)
        logps[rows] = target_logits - torch.stack(log_sums).logsumexp(dim=0)
    return logps


def _one_pass(predicting: torch.Tensor, head: torch.nn.Linear, after: Head, targets: torch.Tensor) -> torch.Tensor:
    """predicting [N, D], targets int64 [N] -> float32 [N], by TRL's kernel for a GPU, which training uses as well: it reads a tile of logits once,
    as the product left it, and keeps the softmax's maximum and sum in float32. 4 bytes are moved per logit in bfloat16; `.float()` and
    `logsumexp` move 32 (docs/notebook/gpu_traffic.md)."""
    from trl.kernels import ChunkedLogProbFunction

    temperature, others = 1.0, ()
    num_slices = math.ceil(len(head.weight) / GPU_ENTRIES)
    num_entries = math.ceil(len(head.weight) / num_slices)
    with torch.cuda.device(predicting.device):  # Triton launches on the current device, whichever the tensors lie on
        return ChunkedLogProbFunction.apply(
            predicting, head.weight, head.bias, targets, temperature, num_entries, after.softcap, after.scale, others
        )[0]


def _padded_batches(sequences: list[Sequence], tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices by falling length, as many to a batch as fit the budget with the padding counted; a longer sequence goes alone."""
    batch: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids)):
        if batch and (len(batch) + 1) * len(sequences[batch[0]].ids) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def score_padded(model: PreTrainedModel, sequences: list[Sequence]) -> list[np.ndarray]:
    """Log-probs of the completions, in nats, float32 [num_scored] each, from one plain right-padded forward; nothing shared with `packed` but the
    model."""
    longest = max(len(sequence.ids) for sequence in sequences)
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence.ids)] = torch.from_numpy(sequence.ids.astype(np.int64))
        attention_mask[row, : len(sequence.ids)] = 1
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
    # A padded row's own length masks it, never its pad id: pad may equal eos.
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    results = []
    for row, sequence in enumerate(sequences):
        scored = torch.from_numpy(sequence.scored).to(logits.device)
        log_probs = logits[row, scored - 1].float().log_softmax(dim=-1)
        targets = input_ids[row].to(logits.device)[scored, None]
        results.append(log_probs.gather(1, targets)[:, 0].cpu().numpy())
    return results
