"""Gated MLPs in training on a CPU: silu(gate) * up as one operator, that of kernels.py.

PyTorch's two read and write the widest values of a model more often, and keep silu(gate) for the backward beside what they and the products need.
On a GPU `--torch-compile` does the same.
"""

import inspect

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from precompute.scorer import kernels

PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def use_gated_kernel(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Give every MLP of the model's body that computes down(silu(gate(x)) * up(x)), and nothing else, in float32 on a CPU, that kernel; return
    those. Others stay as they are."""
    changed = []
    for module in model.base_model.modules():
        if {name for name, _ in module.named_children()} != PARTS or "forward" in vars(module):  # not what somebody else replaced
            continue
        weight = getattr(module.gate_proj, "weight", None)
        if weight is not None and weight.device.type == "cpu" and weight.dtype == torch.float32 and _is_plain(module):
            module.forward = _forward_of(module)
            changed.append(module)
    return changed


def _is_plain(module: torch.nn.Module) -> bool:
    """Tried, without dropout: an adapter's would differ from one call to the next."""
    if len(inspect.signature(module.forward).parameters) != 1:
        return False
    weight = module.gate_proj.weight
    wave = torch.arange(1.0, 2 * weight.shape[-1] + 1).sin().view(2, -1) * 5
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        with torch.inference_mode():
            expected = module.down_proj(F.silu(module.gate_proj(wave)) * module.up_proj(wave))
            return torch.allclose(module(wave), expected, rtol=1e-5, atol=1e-6)
    finally:
        for each, training in modes:
            each.training = training


def _forward_of(module: torch.nn.Module):
    def forward(x: torch.Tensor) -> torch.Tensor:
        return module.down_proj(kernels.gated_silu(module.gate_proj(x), module.up_proj(x)))

    return forward
