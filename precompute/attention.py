"""Attention over a packed row, as a transformers attention implementation named `refdpo_packed`.

Each branch sees its context and itself, causally, and within the layer's sliding window if it has one. On a GPU this is one
`torch.nn.attention.varlen.varlen_attn` call per layer: flash attention that ships with PyTorch, bottom-right causal, which is what a branch
over [context | branch] needs. On a CPU it is a kernel of this project (kernels.py) when scoring in float32; with gradients, or in another dtype,
PyTorch's flash kernel per branch: once over the context, once causally over the branch itself, merged by their log-sum-exps. No mask matrix exists.
"""

import inspect
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from precompute import kernels
from precompute.packing import Branch, PackedBatch
from store.errors import InputError

NAME = "refdpo_packed"

WINDOWED_BLOCK = 256
"""Queries per call where attention needs a mask (a sliding window on the CPU, float32 on a GPU); bounds the mask to 256 x (256 + window), or 256 x keys."""

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class PackedLayout:
    """What attention needs to know of one packed row: its branches, and for `varlen_attn` where each one's queries and keys lie."""

    def __init__(self, branches: tuple[Branch, ...], device: torch.device):
        num_queries = [branch.stop - branch.start for branch in branches]
        num_keys = [branch.num_context + queries for branch, queries in zip(branches, num_queries, strict=True)]
        stretches = [(*branch.context, (branch.start, branch.stop)) for branch in branches]
        gather = np.concatenate([np.arange(start, stop) for parts in stretches for start, stop in parts])
        self.branches = branches
        self.paths = kernels.Paths(branches)
        self.max_queries, self.max_keys = max(num_queries), max(num_keys)
        self.cu_queries = torch.tensor(np.cumsum([0, *num_queries]), dtype=torch.int32, device=device)
        self.cu_keys = torch.tensor(np.cumsum([0, *num_keys]), dtype=torch.int32, device=device)
        # Without sharing the keys already lie in this order.
        self.gather = None if len(gather) == sum(num_queries) else torch.from_numpy(gather).to(device)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packed_layout: PackedLayout | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, Hkv, T, D] -> [1, T, H, D], in their dtype.

    Raises InputError for attention that this function does not compute (soft-capping, sinks, biases, dropout): never approximates it.
    """
    if packed_layout is None:
        raise RuntimeError(f"{NAME} was called without packed_layout: use packed_attention() around the forward and pass it")
    foreign = sorted(name for name in ("softcap", "s_aux", "position_bias", "alibi") if kwargs.get(name) is not None)
    if foreign or dropout:
        raise InputError(
            f"the packed layout does not compute {', '.join(foreign) or 'attention dropout'}",
            where=type(module).__name__,
            next="Use --layout padded for this model.",
        )
    if query.device.type == "cpu":
        return _attend_cpu(query, key, value, scaling, sliding_window, packed_layout), None
    if query.dtype == torch.float32:
        return _attend_masked(query, key, value, scaling, sliding_window, packed_layout), None
    return _attend_cuda(query, key, value, scaling, sliding_window, packed_layout), None


def _attend_cuda(query, key, value, scaling, sliding_window, layout: PackedLayout) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # [1, H, T, D] -> [T, H, D]; a window of W keys, the query's own included, is W - 1 to the left.
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if layout.gather is not None:
        key, value = key.index_select(0, layout.gather), value.index_select(0, layout.gather)
    out = varlen_attn(
        query,
        key,
        value,
        layout.cu_queries,
        layout.cu_keys,
        layout.max_queries,
        layout.max_keys,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None]


def _attend_cpu(query, key, value, scaling, sliding_window, layout: PackedLayout) -> torch.Tensor:
    if query.dtype == torch.float32 and torch.is_inference_mode_enabled():
        return kernels.packed_attention(query, key, value, layout.paths, scaling=scaling, window=sliding_window)
    results = []
    for branch in layout.branches:
        own = slice(branch.start, branch.stop)
        q, k, v = query[:, :, own], key[:, :, own], value[:, :, own]
        context_k, context_v = (_stretches(tensor, branch.context) for tensor in (key, value))
        if sliding_window is not None and branch.num_context + branch.stop - branch.start > sliding_window:
            path_k, path_v = torch.cat([context_k, k], dim=2), torch.cat([context_v, v], dim=2)
            result = _attend_windowed(q, path_k, path_v, scaling, sliding_window)
        elif branch.context:
            result = _ContextAndBranch.apply(q, context_k, context_v, k, v, scaling)
        else:
            result = _flash_cpu(q, k, v, 0.0, True, scale=scaling)[0]
        results.append(result.transpose(1, 2))
    return torch.cat(results, dim=1)  # branches cover the row in order


class _ContextAndBranch(torch.autograd.Function):
    """Attention of a branch over [context | branch], from one kernel call over each; q [1, H, L, D], context [1, Hkv, C, D].

    Forward: softmax over both stretches weighs them exp(lse) / (exp(lse) + exp(lse_context)). Backward: the kernel's gradient for a part of
    the keys is right when it is given the whole's output and log-sum-exp, for then its probabilities are those of the whole softmax.
    """

    @staticmethod
    def forward(ctx, q, context_k, context_v, k, v, scaling):
        result, lse = _flash_cpu(q, k, v, 0.0, True, scale=scaling)
        over_context, lse_context = _flash_cpu(q, context_k, context_v, 0.0, False, scale=scaling)
        result = torch.lerp(over_context, result, torch.sigmoid(lse - lse_context)[..., None].to(result.dtype))
        ctx.save_for_backward(q, context_k, context_v, k, v, result, torch.logaddexp(lse, lse_context))
        ctx.scaling = scaling
        return result

    @staticmethod
    def backward(ctx, grad):
        q, context_k, context_v, k, v, result, lse = ctx.saved_tensors
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad_q, grad_k, grad_v = backward(grad, q, k, v, result, lse, 0.0, True, scale=ctx.scaling)
        grad_q_context, *grad_context = backward(grad, q, context_k, context_v, result, lse, 0.0, False, scale=ctx.scaling)
        return grad_q + grad_q_context, *grad_context, grad_k, grad_v, None


def _stretches(tensor: torch.Tensor, stretches: tuple[tuple[int, int], ...]) -> torch.Tensor:
    parts = [tensor[:, :, start:stop] for start, stop in stretches]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2) if parts else tensor[:, :, :0]


def _attend_windowed(q, k, v, scaling, window: int | None) -> torch.Tensor:
    """q: the last positions of the path whose keys are k; each sees itself and the window - 1 keys before it, or all (None)."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    window = num_keys if window is None else window
    results = []
    for start in range(0, num_queries, WINDOWED_BLOCK):
        stop = min(start + WINDOWED_BLOCK, num_queries)
        first, last = num_keys - num_queries + start, num_keys - num_queries + stop  # the block's place among the keys
        oldest = max(0, first - window + 1)
        distance = torch.arange(first, last, device=q.device)[:, None] - torch.arange(oldest, last, device=q.device)[None, :]
        visible = (distance >= 0) & (distance < window)
        block = (q[:, :, start:stop], k[:, :, oldest:last], v[:, :, oldest:last])
        results.append(
            F.scaled_dot_product_attention(*block, attn_mask=visible, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        )
    return torch.cat(results, dim=2)


def _attend_masked(query, key, value, scaling, sliding_window, layout: PackedLayout) -> torch.Tensor:
    """For float32 on a GPU, which its flash attention does not take: masked attention per branch, right and slow."""
    results = []
    for branch in layout.branches:
        stretches = (*branch.context, (branch.start, branch.stop))
        path_k, path_v = (_stretches(tensor, stretches) for tensor in (key, value))
        own = query[:, :, branch.start : branch.stop]
        results.append(_attend_windowed(own, path_k, path_v, scaling, sliding_window).transpose(1, 2))
    return torch.cat(results, dim=1)


# transformers makes no mask for a name without one of its own (AttentionMaskInterface), nor looks, at the cost of a wait, for packed positions.
AttentionInterface.register(NAME, attend)


def refuse_unpackable(model: PreTrainedModel) -> None:
    """InputError where the architecture does not go through transformers' attention interface, or has layers that are not attention over a
    causal prefix: what it computes for one sequence would depend on what shares the row."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    reason = None
    if not model._supports_attention_backend:
        reason = "its attention does not go through transformers' attention interface"
    elif kinds:
        reason = f"it has {', '.join(sorted(kinds))} layers"
    if reason is not None:
        raise InputError(
            f"the packed layout cannot run this model: {reason}", where=type(model).__name__, next="Use --layout padded."
        )


def refuse_without_kernels(device: torch.device, dtype: str) -> None:
    """InputError where a GPU or this PyTorch lacks the flash attention that a packed row needs; to be asked before a model is loaded."""
    if device.type != "cuda" or dtype == "float32":
        return
    found = f"torch {torch.__version__}"
    try:
        from torch.nn.attention.varlen import varlen_attn

        enough = "window_size" in inspect.signature(varlen_attn).parameters
    except ImportError:
        enough = False
    if enough and torch.cuda.get_device_capability(device) < (8, 0):
        found, enough = f"{torch.cuda.get_device_name(device)}, which has no flash attention", False
    if not enough:
        raise InputError(
            "the packed layout cannot run here",
            where=device,
            expected="torch 2.11 or newer (torch.nn.attention.varlen with windows) and a GPU of compute capability 8.0 or newer",
            found=found,
            next="Install a newer PyTorch (uv pip install --upgrade torch --torch-backend=auto), or use --layout padded.",
        )


@contextmanager
def packed_attention(model: PreTrainedModel):
    """Let `model` attend with `attend` inside the block; its forward then needs `packed_layout=`. Restores what it had.

    Raises InputError for an architecture that cannot be packed.
    """
    refuse_unpackable(model)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def packed_hidden(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """Last hidden states [T, D] of a packed row, on the model's device and in its dtype. The model must attend with `attend` (packed_attention)."""
    device = model.device
    return model.base_model(
        input_ids=torch.from_numpy(batch.input_ids)[None].to(device),
        position_ids=torch.from_numpy(batch.position_ids)[None].to(device),
        packed_layout=PackedLayout(batch.branches, device),
        use_cache=False,
    ).last_hidden_state[0]
