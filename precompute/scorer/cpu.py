"""A float32 model on a CPU: products by the faster of PyTorch's two libraries, and memory that stays.

PyTorch computes float32 products on x86 with MKL, which has no AVX-512 for AMD's cores. On these oneDNN, which PyTorch ships as well, is 1.2 to
1.5 times as fast at the shapes of a language model; on cores without AVX-512 MKL is 1.1 to 1.3 times as fast as oneDNN (docs/notebook/linear_layers_cpu.md).
With oneDNN an MLP's wide intermediate values, taken for all tokens of a packed row, leave the cache between its products; in tiles they stay.
Same products, rounded elsewhere in the last bits.
"""

import ctypes
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from precompute.scorer.forwards import replaced

MLP_TILE = 256
"""Tokens per core that pass through an MLP together: their intermediate values and a slice of the weights fit a core's L2 cache."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3), from malloc.h."""


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, for good. glibc gives blocks of megabytes back to the kernel, and every layer's next one arrives
    fresh, a page fault and 4 kB of zeros at a time: a tenth of the time of scoring (docs/notebook/memory.md). Other C libraries are left as they are."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_MAX, 0)  # no block by mmap, which would go back when freed
        mallopt(M_TRIM_THRESHOLD, -1)  # and never give back the heap's end


def give_back_freed_memory() -> None:
    """Return to the kernel, once, the memory that this process has freed and kept. For what comes after the model's last forward."""
    if (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        malloc_trim(0)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear, differentiable: x [..., in], weight [out, in], bias [out] or None -> [..., out], in their dtype."""
    if not _onednn_is_faster(x):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _product(x, weight, bias)
    # Rows and columns only: the operator's result is a view otherwise, which autograd lets nobody change in place, as Gemma 3n does.
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def _onednn_is_faster(x: torch.Tensor) -> bool:
    """Measured on AMD's cores of both kinds; on Intel's both libraries have AVX-512, and which one is faster was not measured."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    # The operator that torch.compile emits for such a layer; PyTorch has no public name for it, and no gradient.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """x [T, in] -> y [T, out]; y = x W^T + b; dx = dy W, dW = dy^T x, db = the sum of dy over tokens."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t()) if for_x else None,
            _product(grad.t(), x.t()) if for_weight else None,
            grad.sum(dim=0) if for_bias else None,
        )


def use_fast_linears(model: PreTrainedModel) -> list[torch.nn.Linear]:
    """Give the linear layers of the model's body `linear` as their forward where that differs from PyTorch's; return those that were changed."""
    if not _onednn_is_faster(model.get_input_embeddings().weight):
        return []
    # Not subclasses, for an adapter's forward does more; not what somebody else replaced.
    layers = [each for each in model.base_model.modules() if type(each) is torch.nn.Linear and "forward" not in vars(each)]
    for layer in layers:
        layer.forward = _forward_of(layer)
    return layers


def _forward_of(layer: torch.nn.Linear):
    return lambda x: linear(x, layer.weight, layer.bias)


@contextmanager
def fast_on_cpu(model: PreTrainedModel):
    """For scoring: inside the block linear layers and gated MLPs run as described above. At the end the modules have their own forwards again."""
    modules = use_fast_linears(model)
    with replaced(modules):
        for module in model.base_model.modules() if modules else ():
            layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
            if all(type(layer) is torch.nn.Linear for layer in layers) and "forward" not in vars(module):
                module.forward = _in_tiles(module.forward)
                modules.append(module)
        yield


def _in_tiles(forward):
    """`forward`, which treats every token by itself, over [1, T, hidden] in tiles along T."""

    def tiled(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([forward(tile) for tile in x.split(MLP_TILE * torch.get_num_threads(), dim=-2)], dim=-2)

    return tiled
