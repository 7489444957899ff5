"""The policy's forward without padding: a micro-batch as one packed row in which each prompt stands once.

TRL's loss asks the model for per-token values of a padded batch: `model(input_ids, attention_mask, labels=, fused_lm_head=True)`. Here that
call is answered from one packed row (precompute/packing.py, precompute/attention.py: the same as in phase 1, with gradients) and the values are
put where TRL expects them. Its loss types, weights and metrics run unchanged on top.
"""

import types

import numpy as np
import torch
from transformers import PreTrainedModel
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput

from precompute.attention import NAME, packed_hidden, refuse_unpackable
from precompute.cpu import use_fast_linears
from precompute.packing import Sequence, pack
from precompute.scoring import refuse_unusual_head
from store.errors import InputError

VOCABULARY_TILE = {"cpu": 2048, "cuda": 32768}
"""Vocabulary entries whose logits exist at a time in TRL's head: what stays in a CPU's cache, and TRL's own choice."""

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""What TRL's head computes per completion token, in the order its kernel returns them."""


def refuse_unpackable_policy(model: PreTrainedModel) -> None:
    """InputError for an architecture that cannot be packed."""
    refuse_unpackable(model)
    refuse_unusual_head(model)
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise InputError(
            "the packed layout does not compute the router's auxiliary loss",
            where=type(model).__name__,
            next="Use --layout padded.",
        )


def pack_policy(model: PreTrainedModel, outputs: tuple[str, ...]) -> None:
    """Replace the forward that TRL gave `model` by the packed one, for good: gradient checkpointing runs layers again during backward.

    `outputs` names the PER_TOKEN values that TRL's loss and metrics need. Raises InputError for an architecture that cannot be packed.
    """
    refuse_unpackable_policy(model)
    model.set_attn_implementation(NAME)
    use_fast_linears(model)
    padded_forward = model.forward

    def forward(self, input_ids=None, attention_mask=None, labels=None, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            raise InputError(
                "with the packed layout the policy only computes DPO's loss",
                where=padded_forward.__qualname__,
                next="Use --layout padded for what needs logits.",
            )
        return packed_forward(self, input_ids, attention_mask, labels, outputs)

    model.forward = types.MethodType(forward, model)


def packed_forward(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, outputs: tuple[str, ...]
) -> FusedCausalLMOutput:
    """input_ids, attention_mask, labels [B, L], right-padded, labels -100 outside the completion -> TRL's output with values [B, L - 1].

    Position i holds what predicts token i + 1, zero where nothing is predicted. Differentiable in the model's parameters.
    """
    device = input_ids.device
    ids = input_ids.cpu().numpy()
    lengths = attention_mask.sum(dim=1).tolist()
    num_prompts = (labels != -100).int().argmax(dim=1).tolist()
    sequences = [
        Sequence(row[:length].astype(np.int32), prompt) for row, length, prompt in zip(ids, lengths, num_prompts, strict=True)
    ]
    (batch,) = pack(sequences, tokens_per_batch=sum(lengths))
    hidden = packed_hidden(model, batch)
    head = model.get_output_embeddings()
    predicting, targets = hidden[torch.from_numpy(batch.predictors).to(device)], torch.from_numpy(batch.targets).to(device)
    temperature, softcapping, scale = 1.0, None, 1.0  # refuse_unusual_head
    values = ChunkedLogProbFunction.apply(
        predicting, head.weight, head.bias, targets, temperature, VOCABULARY_TILE[device.type], softcapping, scale, outputs
    )

    width = input_ids.shape[1] - 1
    places = [index * width + np.arange(sequences[index].num_prompt - 1, len(sequences[index].ids) - 1) for index in batch.members]
    places = torch.from_numpy(np.concatenate(places)).to(device)
    slots = torch.from_numpy(np.concatenate(batch.slots)).to(device)
    placed = {
        name: None if value is None else value.new_zeros(len(ids) * width).index_copy(0, places, value[slots]).view(len(ids), width)
        for name, value in zip(PER_TOKEN, values, strict=True)
    }
    mask = labels[:, 1:] != -100
    return FusedCausalLMOutput(loss=-placed["log_probs"].sum() / mask.sum().clamp(min=1), label_mask=mask, aux_loss=None, **placed)
