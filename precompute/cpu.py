"""A frozen float32 model on a CPU: linear layers by oneDNN, and gated MLPs a few hundred tokens at a time.

PyTorch computes float32 products on x86 with MKL. On the AMD cores measured (docs/benchmarks.md) oneDNN, which PyTorch ships as well, is 1.2
to 1.5 times as fast at the shapes of a language model. An MLP's wide intermediate values, taken for all tokens of a packed row, leave the cache
between its products; in tiles they stay. Together 1.2 times the whole forward. Same products, rounded elsewhere in the last bits; no gradients.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

MLP_TILE = 256
"""Tokens per core that pass through an MLP together: their intermediate values and a slice of the weights fit a core's L2 cache."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear: x [..., in], weight [out, in], bias [out] or None -> [..., out], in their dtype. By oneDNN where no gradient is wanted."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    if on_cpu and not torch.is_grad_enabled() and torch.backends.mkldnn.is_available():
        # The operator that torch.compile emits for such a layer; PyTorch has no public name for it.
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@contextmanager
def fast_on_cpu(model: PreTrainedModel):
    """Inside the block the model's linear layers and gated MLPs run as described above; a no-op off the CPU or in another dtype.

    The forwards are replaced on the modules themselves and given back at the end.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32:
        yield
        return
    replaced = []
    try:
        for module in model.base_model.modules():
            if "forward" in vars(module):  # somebody else replaced it
                continue
            if type(module) is torch.nn.Linear:  # not a subclass: an adapter's forward does more
                replaced.append(module)
                module.forward = _linear_forward(module)
            elif all(type(getattr(module, name, None)) is torch.nn.Linear for name in ("gate_proj", "up_proj", "down_proj")):
                replaced.append(module)
                module.forward = _in_tiles(module.forward)
        yield
    finally:
        for module in replaced:
            del module.forward  # the class's own shows again


def _linear_forward(module: torch.nn.Linear):
    return lambda x: linear(x, module.weight, module.bias)


def _in_tiles(forward):
    """`forward`, which treats every token by itself, over [1, T, hidden] in tiles along T."""

    def tiled(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([forward(tile) for tile in x.split(MLP_TILE * torch.get_num_threads(), dim=-2)], dim=-2)

    return tiled
