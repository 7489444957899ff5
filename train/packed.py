"""The policy's forward without padding: a micro-batch as one packed row in which each prompt stands once.

TRL's loss asks the model for per-token values of a padded batch: `model(input_ids, attention_mask, labels=, fused_lm_head=True)`. Here that
call is answered from one packed row (precompute/scorer/packing.py, precompute/scorer/attention.py: the same as in phase 1, with gradients) and the values are
put where TRL expects them. Its loss types, weights and metrics run unchanged on top.
"""

import types
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput

from precompute.scorer.api import (
    NAME,
    compiler_wanted,
    head_of,
    head_values,
    packed_attention,
    refuse_unpackable,
    replaced,
    row_outputs,
    set_attention,
    use_compiled_layers,
    use_fast_linears,
    use_fused_norms,
    use_gated_kernel,
)
from precompute.scorer.packing import Sequence
from store.errors import InputError
from train.metrics import OfTokens
from train.rows import Arranged, Row, arrange

VOCABULARY_TILE = {"cpu": 2048, "cuda": 32768}
"""Vocabulary entries whose logits exist at a time in TRL's head: what stays in a CPU's cache (bfloat16), and TRL's own choice."""

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""What TRL's head computes per completion token, in the order its kernel returns them."""

ON_GRID = ("log_probs", "log_sum_sq_probs")
"""Those that its loss reads."""


def refuse_unpackable_policy(model: PreTrainedModel) -> None:
    """InputError for an architecture that cannot be packed."""
    refuse_unpackable(model)
    head_of(model)


def pack_policy(model: PreTrainedModel, outputs: tuple[str, ...], sums: torch.dtype = torch.float32) -> None:
    """Replace the forward that TRL gave `model` by the packed one, for good: gradient checkpointing runs layers again during backward.

    `outputs` names the PER_TOKEN values that TRL's loss and metrics need. What the loss reads, ON_GRID, has the dtype `sums`: a completion's
    log-prob is a sum of hundreds of nats, of which a loss takes small differences, and in float32 the rounding of that sum is larger than
    that of all its tokens. Raises InputError for an architecture that cannot be packed.
    """
    refuse_unpackable_policy(model)
    set_attention(model, NAME)
    _use_fast_modules(model)
    padded_forward = model.forward

    def forward(self, input_ids=None, attention_mask=None, labels=None, fused_lm_head=False, row=None, **kwargs):
        if not fused_lm_head:
            raise InputError(
                "with the packed layout the policy only computes DPO's loss",
                where=padded_forward.__qualname__,
                next="Use --layout padded for what needs logits.",
            )
        if row is not None:
            return row_forward(self, row, outputs, sums)
        with_routers = bool(kwargs.get("output_router_logits"))
        return packed_forward(self, input_ids, attention_mask, labels, outputs, sums, with_routers=with_routers)

    model.forward = types.MethodType(forward, model)


@contextmanager
def ready_to_train(model: PreTrainedModel):
    """Inside the block `packed_forward(model, ...)` runs as after `pack_policy`; at its end the model is as before. For the self-test."""
    refuse_unpackable_policy(model)
    with replaced(_use_fast_modules(model)), packed_attention(model):
        yield


def _use_fast_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Those that have another forward from now on."""
    # The compiler makes operators of its own, of the model's code as it stands; those of a CPU it does not know.
    if compiler_wanted():
        return use_compiled_layers(model)
    return [*use_fast_linears(model), *use_fused_norms(model), *use_gated_kernel(model)]


def packed_forward(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    outputs: tuple[str, ...],
    sums: torch.dtype = torch.float32,
    *,
    with_routers: bool = False,
) -> FusedCausalLMOutput:
    """input_ids, attention_mask, labels [B, L], right-padded, labels -100 where nothing is scored -> TRL's output with values [B, L - 1].

    Position i holds what predicts token i + 1, zero where nothing is predicted; `sums` as in `pack_policy`. Differentiable in the model's parameters.
    `with_routers`: also the auxiliary loss of a mixture of experts, as TRL computes it: over every token of every sequence.
    """
    device = input_ids.device
    ids = input_ids.cpu().numpy()
    lengths = attention_mask.sum(dim=1).tolist()
    scored = (labels != -100).cpu().numpy()
    sequences = [
        Sequence(row[:length].astype(np.int32), prompt, mask[prompt:length])
        for row, mask, length, prompt in zip(ids, scored, lengths, scored.argmax(axis=1).tolist(), strict=True)
    ]
    width = input_ids.shape[1] - 1
    places = [index * width + each.scored - 1 for index, each in enumerate(sequences)]
    at = torch.from_numpy(np.concatenate(places)).to(device)
    arranged, batches = arrange(model.config, sequences, whole=with_routers)
    options = {"output_router_logits": True} if with_routers else {}
    bodies, values = _of_tokens(model, arranged.moved(lambda tensor: tensor.to(device)), outputs, **options)
    placed = {name: _on_grid(value, at, (len(ids), width), sums if name in ON_GRID else None) for name, value in values.items()}
    aux_loss = None
    if with_routers:
        config, routers = model.config.get_text_config(), []
        for body, batch in zip(bodies, batches, strict=True):
            every = torch.from_numpy(np.concatenate(batch.places)).to(device)  # a shared token counts for each sequence that has it
            routers.append([logits.view(-1, logits.shape[-1])[every] for logits in body.router_logits])
        layers = tuple(torch.cat(layer) for layer in zip(*routers, strict=True))
        aux_loss = load_balancing_loss_func(layers, config.num_experts, config.num_experts_per_tok)
    mask = labels[:, 1:] != -100
    return FusedCausalLMOutput(
        loss=-placed["log_probs"].sum() / mask.sum().clamp(min=1), label_mask=mask, aux_loss=aux_loss, **placed
    )


def row_forward(model: PreTrainedModel, row: Row, outputs: tuple[str, ...], sums: torch.dtype) -> FusedCausalLMOutput:
    """As `packed_forward`, of a row that was made where the data was read: nothing is arranged here, and nothing read back from the device.

    TRL's loss reads grids [2 pairs, longest completion]; its metrics read completion tokens alone (train/metrics.py).
    """
    _, values = _of_tokens(model, row.arranged, outputs)
    for name, value in values.items():
        if value is not None:
            values[name] = _on_grid(value, row.places, row.grid, sums) if name in ON_GRID else OfTokens(value, row.num_chosen)
    return FusedCausalLMOutput(loss=None, label_mask=None, aux_loss=None, **values)


def _of_tokens(model: PreTrainedModel, arranged: Arranged, outputs: tuple[str, ...], **options) -> tuple[list, dict]:
    """What the model's body returns for each row, and PER_TOKEN values of each completion token, [K] or None for those not in `outputs`."""
    bodies = [row_outputs(model, row, **options) for row in arranged.rows]
    hidden = [body.last_hidden_state[0][predictors] for body, predictors in zip(bodies, arranged.predictors, strict=True)]
    values = _head_values(model, hidden[0] if len(hidden) == 1 else torch.cat(hidden), arranged.targets, outputs)
    return bodies, {name: None if value is None else value[arranged.taken] for name, value in zip(PER_TOKEN, values, strict=True)}


def _on_grid(
    values: torch.Tensor | None, places: torch.Tensor, grid: tuple[int, int], dtype: torch.dtype | None
) -> torch.Tensor | None:
    """values [K], in `dtype` if one is given, at `places` of a flattened grid of zeros."""
    if values is None:
        return None
    values = values if dtype is None else values.to(dtype)
    return values.new_zeros(grid[0] * grid[1]).index_copy(0, places, values).view(grid)


def _head_values(model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor, outputs: tuple[str, ...]) -> tuple:
    """hidden [N, D], targets int64 [N] -> PER_TOKEN values [N] each, None for those not in `outputs`: TRL's own kernel, but for float32 on a CPU,
    where one pass over the logits does (precompute/scorer/cpu_head.py)."""
    head, after = model.get_output_embeddings(), head_of(model)
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32:
        values = dict(zip(PER_TOKEN, head_values(hidden, head, after, targets), strict=True))
        return tuple(values[name] if name == "log_probs" or name in outputs else None for name in PER_TOKEN)
    temperature = 1.0
    tile = VOCABULARY_TILE[hidden.device.type]
    return ChunkedLogProbFunction.apply(
        hidden, head.weight, head.bias, targets, temperature, tile, after.softcap, after.scale, outputs
    )
