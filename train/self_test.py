"""Before training: does the policy's forward, packed or padded, give the log-probs and gradients of each sequence alone?

The gate (gate.py) compares the plain forward with the store. This compares what is trained with the plain forward: the model as precompute's
self-test does, and on its small twin the gradients too.
"""

from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from precompute.scorer import Layout
from precompute.scorer.api import (
    SelfTest,
    active_kernel,
    advice,
    alone_logps,
    attempt,
    compare,
    compiler_wanted,
    made_up,
    together,
    twin_of,
)
from precompute.scorer.packing import Sequence
from store.errors import InputError
from train import dropout
from train.packed import packed_forward, ready_to_train, refuse_unpackable_policy

GRADIENT_TOLERANCE = 1e-3
"""Largest |difference| of a gradient's entry on the twin in float32, as a share of the tensor's largest. Measured where it is right: 1e-5."""

KERNEL_TOLERANCE = 0.3
"""Largest norm of the difference of all gradients on the twin in bfloat16 or float16, as a share of theirs: 0.001 to 0.035 where it is right."""

GRADIENT_FLOOR = 1e-3
"""A tensor's largest entry counts as at least this share of the model's. A bias of keys that are not rotated has no gradient but rounding."""

ADVICE = {
    "packed": "Use --layout padded for this model.",
    "padded": "Its padded batches mix their rows, so no batch of pairs gives it the log-probs that its reference has.",
}

FOR_ROOM = "Free memory (other processes?), or train on GPUs that have more: gradients and the optimizer come on top."


def self_test_policy(
    model: PreTrainedModel, dtype: str, layout: Layout, adapt: Callable[[PreTrainedModel], PreTrainedModel] | None = None
) -> SelfTest:
    """Raises InputError where the forward that will be trained disagrees with the plain one of each sequence alone.

    `adapt` puts an adapter that adds something, which alone will be trained, into a small twin of `model`.
    """
    forward = _packed if layout == "packed" else _padded
    if layout == "packed":
        refuse_unpackable_policy(model)

    def compute(any_model: PreTrainedModel, sequences: list[Sequence]) -> list[np.ndarray]:
        with torch.no_grad():
            return [each.float().cpu().numpy() for each in forward(any_model, sequences)]

    what = f"{layout} training" + (", compiled," if compiler_wanted() else "")
    seen = compare(model, dtype, compute, what=what, advice=advice(ADVICE[layout]), for_room=FOR_ROOM)
    if (twin := twin_of(model)) is not None:
        sequences = made_up([7, 40, *(edge + 9 for edge in twin.lengths)], twin.model)
        trained = twin.model.requires_grad_(True) if adapt is None else adapt(twin.model)
        difference = attempt(
            lambda any_model, each: _gradients_differ(any_model, each, forward), trained, sequences, what, advice(ADVICE[layout])
        )
        if not difference <= GRADIENT_TOLERANCE:
            raise InputError(
                f"the gradients of {what} differ from this architecture's own by {difference:.2g} of their size, in float32 on a"
                " small random model of its kind",
                where=type(model).__name__,
                expected=f"at most {GRADIENT_TOLERANCE:g}",
                next=advice(ADVICE[layout]),
            )
        if (kernel := active_kernel()) is not None:
            _refuse_other_gradients(kernel, trained.to(model.dtype), sequences, forward)
    return seen


def _refuse_other_gradients(kernel: str, model: PreTrainedModel, sequences: list[Sequence], forward: Callable) -> None:
    """InputError where this kernel's gradients are not the plain forward's; float32, in which others are compared, is not computed by it."""
    ours, theirs = _gradients(model, sequences, forward)
    pairs = [(each, other) for each, other in zip(ours, theirs, strict=True) if each is not None and other is not None]
    apart, size = (
        torch.cat([each.float().flatten() for each in side]) for side in zip(*((a - b, b) for a, b in pairs), strict=True)
    )
    difference = float(apart.norm() / size.norm())
    if not difference <= KERNEL_TOLERANCE:
        raise InputError(
            f"the kernel's gradients differ from this architecture's own by {difference:.2g} of their size, in {model.dtype} on a small"
            " random model of its kind",
            where=f"--attention-kernel {kernel}",
            expected=f"at most {KERNEL_TOLERANCE:g}",
            next="Leave it out.",
        )


def _gradients_differ(model: PreTrainedModel, sequences: list[Sequence], forward: Callable) -> float:
    """Of a randomly weighted sum of all log-probs, in every parameter that is trained: the largest difference as a share of the tensor's largest entry."""
    found = _gradients(model, sequences, forward)
    floor = GRADIENT_FLOOR * max(float(theirs.abs().max()) for theirs in found[1] if theirs is not None)
    shares = [
        float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=floor))
        for ours, theirs in zip(*found, strict=True)
        if theirs is not None and ours is not None
    ]
    missing = any((ours is None) != (theirs is None) for ours, theirs in zip(*found, strict=True))
    return float("nan") if missing else max(shares)


def _gradients(
    model: PreTrainedModel, sequences: list[Sequence], forward: Callable
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Of a randomly weighted sum of all log-probs, for each parameter: by `forward`, and by the plain forward of each sequence alone."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(sequence.num_scored, generator=generator).to(model.device) for sequence in sequences]
    found = []
    dropout.turn_off(model)
    plain = lambda any_model, each: [alone_logps(any_model, sequence) for sequence in each]
    for compute, training in ((forward, True), (plain, False)):
        model.zero_grad()
        model.train(training)  # as it is trained, against as it is scored
        sum((weight * logps).sum() for weight, logps in zip(weights, compute(model, sequences), strict=True)).backward()
        found.append([None if each.grad is None else each.grad.clone() for each in model.parameters()])
    return found[0], found[1]


def _packed(model: PreTrainedModel, sequences: list[Sequence]) -> list[torch.Tensor]:
    with ready_to_train(model):
        values = packed_forward(model, *as_trl_pads(model, sequences), ("log_probs",)).log_probs
    return [value[_scored(sequence)] for value, sequence in zip(values, sequences, strict=True)]


def _padded(model: PreTrainedModel, sequences: list[Sequence]) -> list[torch.Tensor]:
    """By TRL's own fused head, on sequences that may share a batch."""
    results: list[torch.Tensor | None] = [None] * len(sequences)
    kept = vars(model).get("forward")
    add_fused_lm_head(model, outputs=("log_probs",))
    try:
        for group in together(model, sequences):
            members = [sequences[index] for index in group.members]
            input_ids, attention_mask, labels = as_trl_pads(model, members)
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
            values = model(**given, use_cache=False, fused_lm_head=True).log_probs
            for index, value in zip(group.members, values, strict=True):
                results[index] = value[_scored(sequences[index])]
    finally:
        del model.forward
        if kept is not None:
            model.forward = kept
    return results


def _scored(sequence: Sequence) -> slice:
    return slice(sequence.num_prompt - 1, len(sequence.ids) - 1)


def as_trl_pads(model: PreTrainedModel, sequences: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask, labels [B, L] on the model's device."""
    longest = max(len(sequence.ids) for sequence in sequences)
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for row, sequence in enumerate(sequences):
        length = len(sequence.ids)
        input_ids[row, :length] = torch.from_numpy(sequence.ids.astype(np.int64))
        attention_mask[row, :length] = 1
        labels[row, sequence.num_prompt : length] = input_ids[row, sequence.num_prompt : length]
    return input_ids.to(model.device), attention_mask.to(model.device), labels.to(model.device)
