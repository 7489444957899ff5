"""Attention over a packed row, as a transformers attention implementation named `refdpo_packed`.

Each branch sees its context and itself, causally, and within the layer's sliding window if it has one. Which of these a layer has is read from
the mask that the model asks transformers for, as its plain forward does, and never from an argument that the plain forward ignores.
On a GPU this is one `torch.nn.attention.varlen.varlen_attn` call per layer: flash attention that ships with PyTorch, bottom-right causal, which
is what a branch over [context | branch] needs. On a CPU it is a kernel of this project (kernels.py), which computes in float32.
What these kernels lack (soft-capped scores, sinks on a CPU, float32 or wide heads on a GPU) is computed block by block. No mask matrix of a
whole row exists.
"""

import copy
import inspect
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from precompute.scorer import kernels
from precompute.scorer.packing import Branch, PackedBatch
from store.errors import InputError, RefdpoError

NAME = "refdpo_packed"

BLOCK = 256
"""Queries per call where attention is computed block by block; bounds what exists at a time to 256 x (256 + window), or 256 x keys."""

WIDEST_FLASH_HEAD = 256
"""Channels per head that a GPU's flash attention takes at most; it takes multiples of 8 only."""

HARMLESS = {"position_ids", "cache_position", "position_embeddings", "output_attentions", "use_cache", "sliding_window"}
"""Arguments of the attention interface that say nothing about the scores or the mask; a window is read from the mask."""

KERNELS: dict[str, Any] = {
    "default": None,
    "FA3": ("FlashAttention 3 (module flash_attn_interface)", (9,)),
    "FA4": ("FlashAttention 4 (package flash-attn-4)", (9, 10)),
}
"""What computes packed rows on a GPU: PyTorch's own kernel, or one that PyTorch activates: its package, and the major compute capabilities
for which PyTorch does."""


class PackedLayout:
    """What attention needs to know of one packed row: its branches, and for `varlen_attn` where each one's queries and keys lie."""

    def __init__(self, branches: tuple[Branch, ...], device: torch.device):
        num_queries = [branch.stop - branch.start for branch in branches]
        num_keys = [branch.num_context + queries for branch, queries in zip(branches, num_queries, strict=True)]
        stretches = [(*branch.context, (branch.start, branch.stop)) for branch in branches]
        gather = np.concatenate([np.arange(start, stop) for parts in stretches for start, stop in parts])
        self.branches = branches
        self.num_tokens = sum(num_queries)
        self.max_queries, self.max_keys = max(num_queries), max(num_keys)
        self.cu_queries = torch.tensor(np.cumsum([0, *num_queries]), dtype=torch.int32, device=device)
        # Without sharing the keys already lie in this order, and one tensor says both, for kernels that ask for it to be one.
        shared = len(gather) != sum(num_queries)
        self.cu_keys = torch.tensor(np.cumsum([0, *num_keys]), dtype=torch.int32, device=device) if shared else self.cu_queries
        self.gather = torch.from_numpy(gather).to(device) if shared else None
        self._elsewhere: dict[torch.device, PackedLayout] = {}

    @cached_property
    def paths(self) -> kernels.Paths:
        return kernels.Paths(self.branches)

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "PackedLayout":
        """Every index tensor (int32 and int64) as `move` gives it: pinned, or on another device."""
        other = copy.copy(self)
        other.cu_queries = move(self.cu_queries)
        other.cu_keys = other.cu_queries if self.cu_keys is self.cu_queries else move(self.cu_keys)
        other.gather = None if self.gather is None else move(self.gather)
        other._elsewhere = {}
        return other

    def on(self, device: torch.device) -> "PackedLayout":
        """The same on `device`, copied there once, however many layers ask."""
        if self.cu_queries.device == device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = self.moved(lambda tensor: tensor.to(device))
        return self._elsewhere[device]


@dataclass(frozen=True)
class PackedRow:
    """A packed row as the model takes it: int64 [1, T] each, and how its tokens see each other."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: PackedLayout

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device | str = "cpu") -> "PackedRow":
        ids, positions = (torch.from_numpy(each)[None].to(device) for each in (batch.input_ids, batch.position_ids))
        return cls(ids, positions, PackedLayout(batch.branches, torch.device(device)))

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "PackedRow":
        """Every tensor as `move` gives it, dtypes and shapes as they are."""
        return PackedRow(move(self.input_ids), move(self.position_ids), self.layout.moved(move))


@dataclass(frozen=True)
class PackedMask:
    """Stands where a mask matrix would: the packed row, and how many keys a query of these layers sees at most, its own included (None: all).

    It reaches every layer as an argument, so gradient checkpointing keeps it, and layers that pass on nothing else pass on this.
    """

    layout: PackedLayout
    window: int | None

    def to(self, device: torch.device, non_blocking: bool = False) -> "PackedMask":
        """As a tensor's: for layers on `device` (spread.py)."""
        layout = self.layout.on(device)
        return self if layout is self.layout else PackedMask(layout, self.window)

    def __getitem__(self, part: object) -> "PackedMask":
        """Itself, for the whole of it, which Gemma 4 takes before some of its layers. Raises TypeError for less."""
        whole = part if isinstance(part, tuple) else (part,)
        if not all(isinstance(each, slice) and not each.start and each.stop is None and each.step is None for each in whole):
            raise TypeError(f"a part of a {type(self).__name__}: {part}")
        return self


_row: ContextVar[PackedLayout | None] = ContextVar("packed row", default=None)


def packed_mask(*, mask_function: Callable, local_size: int | None = None, **_) -> PackedMask:
    """transformers' mask interface: the mask of the packed row that is being computed, for the layers that `mask_function` is for.

    Raises InputError for a mask that is neither causal nor causal within a sliding window: chunks, blocks, bidirectional parts.
    """
    layout = _row.get()
    if layout is None:
        raise RuntimeError(f"{NAME} was called outside packed_hidden()")
    window = None if mask_function is causal_mask_function else local_size
    if mask_function is not causal_mask_function and not _is_causal_within(mask_function, window):
        raise InputError(
            "the packed layout cannot run this model: its mask is neither causal nor a sliding window",
            where="the mask that it asks transformers for",
            next="Use --layout padded.",
        )
    return PackedMask(layout, window)


def _is_causal_within(mask_function: Callable, window: int | None) -> bool:
    """Whether a query sees itself and the `window` - 1 keys before it, or all of them (None): tried around and beyond the window."""
    edge = BLOCK if window is None else window
    queries = torch.tensor([0, 1, edge // 2, edge - 1, edge, edge + 1, edge + edge // 2, 2 * edge + 1])[:, None]
    keys = torch.arange(2 * edge + 4)[None]
    expected = (keys <= queries) & (queries - keys < (edge if window is not None else 2 * edge + 4))
    first = torch.zeros((), dtype=torch.long)
    try:
        found = mask_function(first, first, queries, keys)
    except (IndexError, RuntimeError):  # it looks things up for each token of the row
        return False
    return torch.is_tensor(found) and torch.equal(found.cpu().expand_as(expected), expected)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: PackedMask,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> [1, T, H, Dv], in their dtype.

    softcap: scores s become softcap tanh(s / softcap) (Gemma 2, arXiv 2408.00118, section 2). s_aux: a sink of each head [H], one more entry of
    the softmax that no value belongs to (gpt-oss, arXiv 2508.10925, section 2.2).
    Raises InputError for attention that this function does not compute (other arguments, masks or shapes): never approximates it.
    """
    foreign = sorted(name for name, given in kwargs.items() if name not in HARMLESS and _changes_scores(given))
    if dropout:
        foreign.append("attention dropout")
    if not isinstance(attention_mask, PackedMask):
        foreign.append("a mask that the model makes itself")
    elif query.shape[0] != 1 or key.shape[2] != query.shape[2] or query.shape[2] != attention_mask.layout.num_tokens:
        foreign.append("attention to anything but the row itself")
    if foreign:
        raise InputError(
            f"the packed layout does not compute {', '.join(foreign)}",
            where=type(module).__name__,
            next="Use --layout padded for this model.",
        )
    layout, window = attention_mask.layout, attention_mask.window
    width, value_width = query.shape[-1], value.shape[-1]
    scaling = width**-0.5 if scaling is None else scaling
    sinks = None if s_aux is None else s_aux.reshape(-1)
    on_gpu = query.device.type != "cpu"
    # Kernels want keys and values of one width, a GPU's in steps of 8. Zeros add nothing to a product; those of the result are cut off.
    common = max(width, value_width)
    common = -(-common // 8) * 8 if on_gpu else common
    query, key, value = (
        each if each.shape[-1] == common else F.pad(each, (0, common - each.shape[-1])) for each in (query, key, value)
    )
    if softcap is not None or (on_gpu and (query.dtype == torch.float32 or common > WIDEST_FLASH_HEAD)):
        if on_gpu and query.dtype != torch.float32 and (kernel := active_kernel()) is not None:
            raise InputError(
                "the kernel would not be used",
                where=f"--attention-kernel {kernel}",
                expected=f"scores that are not capped, heads of at most {WIDEST_FLASH_HEAD} channels",
                found=f"a {type(module).__name__} with " + (f"{width} channels" if softcap is None else f"a cap of {softcap:g}"),
                next="Leave it out.",
            )
        out = _attend_in_blocks(query, key, value, scaling, window, layout, softcap=softcap, sinks=sinks)
    elif on_gpu:
        out = _attend_cuda(query, key, value, scaling, window, layout, sinks)
    elif sinks is not None:
        out = _attend_in_blocks(query, key, value, scaling, window, layout, sinks=sinks)
    else:
        out = _attend_cpu(query, key, value, scaling, window, layout)
    return out[..., :value_width], None


def _changes_scores(given: object) -> bool:
    return torch.is_tensor(given) or (isinstance(given, (int, float)) and not isinstance(given, bool) and given != 0)


def _attend_cuda(query, key, value, scaling, window, layout: PackedLayout, sinks=None) -> torch.Tensor:
    # [1, H, T, D] -> [T, H, D]; a window of W keys, the query's own included, is W - 1 to the left.
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if layout.gather is not None:
        key, value = key.index_select(0, layout.gather), value.index_select(0, layout.gather)
    with torch.cuda.device(query.get_device()):  # kernels from other packages launch on the current device
        if sinks is not None:
            return _VarlenWithSinks.apply(query, key, value, sinks, scaling, window, layout)[None]
        return _varlen(query, key, value, scaling, window, layout)[None]


def _varlen(query, key, value, scaling, window, layout: PackedLayout, **options):
    from torch.nn.attention.varlen import varlen_attn

    lengths = (layout.cu_queries, layout.cu_keys, layout.max_queries, layout.max_keys)
    left = -1 if window is None else window - 1
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11: each query head gets a copy of its key head, in the same order
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return varlen_attn(query, key, value, *lengths, scale=scaling, window_size=(left, 0), **options)


class _VarlenWithSinks(torch.autograd.Function):
    """`varlen_attn` with a sink per head: query [T, H, D], key and value [K, Hkv, D], sinks [H] -> [T, H, D].

    Forward: with the log-sum-exp l of the scores and the sink s, every weight becomes smaller by exp(l) / (exp(l) + exp(s)). Backward: flash
    attention's gradient is right for the part of the softmax that has values when it is given the whole's output and log-sum-exp, for then its
    probabilities are those of the whole softmax; a sink's own gradient is its probability times (0 - the sum over channels of grad and out).
    """

    @staticmethod
    def forward(ctx, query, key, value, sinks, scaling, window, layout):
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.attention.varlen import AuxRequest

        # Not cuDNN's, which torch 2.15 takes where nothing is shared: the backward is flash attention's, and reads these log-sum-exps.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out, lse = _varlen(query, key, value, scaling, window, layout, return_aux=AuxRequest(lse=True))
        # The kernel's log-sum-exps are [H, T].
        out = out * torch.sigmoid(lse - sinks.float()[:, None]).T[..., None].to(out.dtype)
        whole = torch.logaddexp(lse, sinks.float()[:, None])
        ctx.save_for_backward(query, key, value, sinks, out, whole)
        ctx.scaling, ctx.window, ctx.layout = scaling, window, layout
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, sinks, out, whole = ctx.saved_tensors
        left = -1 if ctx.window is None else ctx.window - 1
        lengths = (ctx.layout.cu_queries, ctx.layout.cu_keys, ctx.layout.max_queries, ctx.layout.max_keys)
        unused = torch.zeros(2, dtype=torch.uint64, device=grad.device)  # the state of dropout
        grads = torch.ops.torch_attn._varlen_attn_backward(
            grad.contiguous(), query, key, value, out, whole, *lengths, left == -1, unused, ctx.scaling, [left, 0]
        )
        of_sinks = -(torch.exp(sinks.float()[:, None] - whole) * (grad.float() * out.float()).sum(dim=-1).T).sum(dim=1)
        return *grads, of_sinks.to(sinks.dtype), None, None, None


def _attend_cpu(query, key, value, scaling, window, layout: PackedLayout) -> torch.Tensor:
    # In other dtypes as flash attention computes: in float32, and what comes out is rounded once.
    dtype = query.dtype
    query, key, value = (tensor.float() for tensor in (query, key, value))
    return kernels.packed_attention(query, key, value, layout.paths, scaling=scaling, window=window).to(dtype)


def _stretches(tensor: torch.Tensor, stretches: tuple[tuple[int, int], ...]) -> torch.Tensor:
    parts = [tensor[:, :, start:stop] for start, stop in stretches]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2) if parts else tensor[:, :, :0]


def _attend_in_blocks(query, key, value, scaling, window, layout: PackedLayout, softcap=None, sinks=None) -> torch.Tensor:
    """What no kernel computes: branch by branch, block by block, right and slow."""
    results = []
    for branch in layout.branches:
        stretches = (*branch.context, (branch.start, branch.stop))
        path_k, path_v = (_stretches(tensor, stretches) for tensor in (key, value))
        own = query[:, :, branch.start : branch.stop]
        results.append(_in_blocks(own, path_k, path_v, scaling, window, softcap, sinks).transpose(1, 2))
    return torch.cat(results, dim=1)


def _in_blocks(q, k, v, scaling, window: int | None, softcap=None, sinks=None) -> torch.Tensor:
    """q: the last positions of the path whose keys are k; each sees itself and the window - 1 keys before it, or all (None)."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    window = num_keys if window is None else window
    results = []
    for start in range(0, num_queries, BLOCK):
        stop = min(start + BLOCK, num_queries)
        first, last = num_keys - num_queries + start, num_keys - num_queries + stop  # the block's place among the keys
        oldest = max(0, first - window + 1)
        distance = torch.arange(first, last, device=q.device)[:, None] - torch.arange(oldest, last, device=q.device)[None, :]
        visible = (distance >= 0) & (distance < window)
        block = (q[:, :, start:stop], k[:, :, oldest:last], v[:, :, oldest:last])
        if softcap is None and sinks is None:
            results.append(
                F.scaled_dot_product_attention(*block, attn_mask=visible, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
            )
        elif torch.is_grad_enabled():  # a block's scores exist for its own backward only
            results.append(checkpoint(_softmax_block, *block, visible, scaling, softcap, sinks, use_reentrant=False))
        else:
            results.append(_softmax_block(*block, visible, scaling, softcap, sinks))
    return torch.cat(results, dim=2)


def _softmax_block(q, k, v, visible, scaling, softcap, sinks) -> torch.Tensor:
    """Attention by its definition, the softmax in float32: q [1, H, n, D], k and v [1, Hkv, m, D], visible [n, m], sinks [H] -> [1, H, n, D]."""
    _, num_heads, num_queries, width = q.shape
    grouped = q.reshape(k.shape[1], -1, width)  # neighbouring query heads share a key head
    scores = (grouped @ k[0].transpose(1, 2)).view(num_heads, num_queries, -1).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, num_queries, 1)], dim=2)
    weights = scores.softmax(dim=-1)[..., : k.shape[2]].to(v.dtype)
    return (weights.reshape(k.shape[1], -1, k.shape[2]) @ v[0]).view(1, num_heads, num_queries, width)


# `eager`, `sdpa` and so on build mask matrices; ours needs none.
AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, packed_mask)


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
    elif model._is_stateful:
        reason = "its layers carry a state from token to token"
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


def use_kernel(kernel: str, *, layout: str, device: torch.device, dtype: str) -> None:
    """Let packed rows attend with one of KERNELS from now on; to be called before a model is loaded.

    Raises InputError where the layout, the device, PyTorch or the kernel's package does not fit.
    """
    where = f"--attention-kernel {kernel}"
    if layout != "packed" and kernel != "default":
        raise InputError("belongs to the packed layout", where=where, next="Leave it out, or use --layout packed.")
    if layout == "packed":
        refuse_without_kernels(device, dtype)
    if kernel == "default":
        return
    package, capabilities = KERNELS[kernel]
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
    if capability not in capabilities or dtype == "float32":
        raise InputError(
            "the kernel cannot run here",
            where=where,
            expected=f"bfloat16 or float16 on a GPU of compute capability {' or '.join(f'{major}.0' for major in capabilities)}",
            found=f"{dtype} on {'the CPU' if capability is None else torch.cuda.get_device_name(device)}",
            next="Leave it out.",
        )
    try:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl(kernel)
    except (ImportError, RuntimeError, ValueError, AttributeError) as error:
        raise InputError(
            f"the kernel cannot be activated: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
            where=where,
            expected=f"{package}, and a PyTorch that knows {kernel}",
            found=f"torch {torch.__version__}",
            next="Install it, or leave the option out.",
        ) from error


def active_kernel() -> str | None:
    """The kernel that `use_kernel` activated; None: PyTorch's own."""
    return getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()


@contextmanager
def named_kernel(kernel: str):
    """Around the first use of a kernel that was asked for by name: what it does not compute is an InputError that names it, in whatever way its
    package says so."""
    try:
        yield
    except Exception as error:
        if kernel == "default" or isinstance(error, RefdpoError):
            raise
        kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
        raise InputError(
            f"the kernel does not run this model: {kind}{' '.join(str(error).split())[:300]}",
            where=f"--attention-kernel {kernel}",
            next="Leave it out.",
        ) from error


@contextmanager
def packed_attention(model: PreTrainedModel):
    """Let `model` attend with `attend` inside the block, by `packed_hidden`. Restores what it had.

    Raises InputError for an architecture that cannot be packed.
    """
    refuse_unpackable(model)
    before = model.config.get_text_config()._attn_implementation
    set_attention(model, NAME)
    try:
        yield
    finally:
        set_attention(model, before)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Let the text's layers attend with the implementation of that name; towers for pictures and sound keep their own."""
    text = model.config.get_text_config()
    parts = [key for key in model.config.sub_configs if getattr(model.config, key) is text]
    model.set_attn_implementation({parts[0]: name} if parts else name)


def packed_hidden(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """Last hidden states [T, D] of a packed row, on the model's device and in its dtype. The model must attend with `attend` (packed_attention)."""
    return row_outputs(model, PackedRow.of(batch, model.device)).last_hidden_state[0]


def row_outputs(model: PreTrainedModel, packed: PackedRow, **options):
    """What the model's body returns for a row on its device; `options` go to its forward."""
    row = _row.set(packed.layout)
    try:
        return model.base_model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            # Without it transformers would look for sequences in the positions, and wait for the device to do so.
            attention_mask=torch.ones_like(packed.input_ids),
            use_cache=False,
            **options,
        )
    except (AttributeError, TypeError) as error:
        if PackedMask.__name__ not in str(error):
            raise
        raise InputError(
            f"the packed layout cannot run this model: it computes with its attention mask ({error})",
            where=type(model).__name__,
            next="Use --layout padded.",
        ) from error
    finally:
        _row.reset(row)
