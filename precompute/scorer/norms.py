"""RMS norms as one operator, in scoring and in training: PyTorch's, or for float32 on a CPU the one of kernels.py.

transformers writes a norm as seven operators, most of which read and write every token's values in float32, and keep them for the backward. On a
GPU that is memory traffic: counted for OLMo 3's 7B, half of what all element-wise work moves and a third of what training keeps of a token
(docs/benchmarks.md), which `F.rms_norm` does in one kernel and keeps a number per token of. On a CPU it does not; there kernels.py does. In
bfloat16 `F.rms_norm` rounds once, where Llama's and Qwen's own norms round before the weight's product as well.
"""

import inspect
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from precompute.scorer import kernels
from precompute.scorer.forwards import replaced


@contextmanager
def fused_norms(model: PreTrainedModel):
    """Inside the block the norms are as `use_fused_norms` makes them; at its end each is its own again."""
    with replaced(use_fused_norms(model)):
        yield


def use_fused_norms(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Make one operator, with gradients, of every RMS norm of the model's body that computes what `F.rms_norm` computes; return those. Others
    stay as they are."""
    fused: list[torch.nn.Module] = []
    same: dict[tuple, bool] = {}
    for module in model.base_model.modules():
        kind = type(module)
        if not kind.__name__.endswith("RMSNorm") or "forward" in vars(module):  # not what somebody else replaced
            continue
        if getattr(module, "weight", None) is None:  # a class may make some with a weight and some without
            continue
        # Two of a class may differ in what the class reads from them: epsilon, a factor, whether one is added to the weight.
        settings = (kind, *sorted((name, value) for name, value in vars(module).items() if isinstance(value, (int, float, str))))
        if settings not in same:
            same[settings] = _is_plain(module)
        if same[settings]:
            module.forward = _forward_of(module)
            fused.append(module)
    return fused


def _epsilon(module: torch.nn.Module) -> Any:
    """A number, or None where a norm has none that we know."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether it computes weight * x / sqrt(mean(x^2) + epsilon) and nothing else; some architectures multiply by 1 + weight. Tried, in float32."""
    weight = module.weight
    if weight.dim() != 1 or _epsilon(module) is None or len(inspect.signature(module.forward).parameters) != 1:
        return False
    with torch.inference_mode():
        wave = torch.arange(1.0, len(weight) + 1, device=weight.device).sin()
        x = torch.stack([wave, wave * _epsilon(module) ** 0.5])  # the second row is as small as epsilon, so that its place counts
        return torch.allclose(
            module(x).float(), F.rms_norm(x, weight.shape, weight.float(), _epsilon(module)), rtol=1e-5, atol=1e-6
        )


def _forward_of(module: torch.nn.Module):
    if module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
        return lambda x: kernels.rms_norm(x, module.weight, _epsilon(module))
    return lambda x: F.rms_norm(x, module.weight.shape, module.weight, _epsilon(module))
