"""FLOPs that a pair needs in training, and what a GPU could do at best: their ratio is model FLOPs utilization (MFU).

forward   2 per weight of the linear layers and token, the prompt once; 2 per weight of the head and completion token;
          4 per query head, head dimension and (query, visible key): within the layer's sliding window
training  3 times that: one forward, twice as much backward. What gradient checkpointing computes again is not counted, and of a frozen
          weight (LoRA) the backward has one product, not two
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

PEAK_FLOPS = {
    "GB300": 2500e12,
    "B300": 2250e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A30": 165e12,
    "A40": 150e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bfloat16 or float16 with sums in float32, FLOPs per second, as the vendor states them; those of B200, GB200 and H100 were
looked up on other pages than the vendor's, the rest are from memory, and sources disagree on B300. Whole words of the GPU's name; the first
that it has holds. A GPU that is not here has no MFU: a peak that is guessed would be worse than none."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Of one device; None where it is not known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return peak_of_name(torch.cuda.get_device_name(device))


def peak_of_name(name: str) -> float | None:
    """Of a GPU as its driver calls it. A slice of one (MIG) and its other models, such as a laptop's, are not known."""
    if re.search(r"\b(MIG|Laptop|Max-Q|Ti|SUPER|D)\b", name):
        return None
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


@dataclass(frozen=True)
class PairFlops:
    """What a model needs for pairs of given lengths."""

    body: int
    """Weights of the linear layers below the head."""
    head: int
    widths: tuple[int, ...]
    """Query heads x head dimension of each layer."""
    windows: tuple[int | None, ...]
    """Of each layer: keys a query sees at most, its own included; None: all before it."""
    frozen_body: int = 0
    frozen_head: int = 0
    """Of the weights above, those that are not trained."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "PairFlops | None":
        """None for mixtures of experts, how many of whose weights a token meets is not written down in one way, for models without such layers, and for weights in 4 bits."""
        config = model.config.get_text_config()
        if not (hasattr(config, "num_hidden_layers") and hasattr(config, "num_attention_heads")):
            return None
        if getattr(model, "is_loaded_in_4bit", False):  # its weights are not kept one by one
            return None
        if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            return None
        linear = [module.weight for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]
        head = model.get_output_embeddings().weight
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
        return cls(
            body=sum(weight.numel() for weight in linear),
            head=head.numel(),
            widths=_widths(model),
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
            frozen_body=sum(weight.numel() for weight in linear if not weight.requires_grad),
            frozen_head=0 if head.requires_grad else head.numel(),
        )

    def of_pairs(self, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
        """Forward and backward of each pair: numbers of tokens [pairs] -> float64 [pairs]."""
        prompt, chosen, rejected = (np.asarray(counts, np.float64) for counts in (prompt, chosen, rejected))
        forward = 2 * self.body * (prompt + chosen + rejected) + 2 * self.head * (chosen + rejected)
        for window, width in zip(self.windows, self.widths, strict=True):
            visible = _visible(prompt + chosen, window) + _visible(prompt + rejected, window) - _visible(prompt, window)
            forward += 4 * width * visible
        frozen = 2 * self.frozen_body * (prompt + chosen + rejected) + 2 * self.frozen_head * (chosen + rejected)
        return 3 * forward - frozen


def _widths(model: PreTrainedModel) -> tuple[int, ...]:
    """What goes into each layer's output projection; where a model calls it otherwise, what its configuration says of all layers."""
    config = model.config.get_text_config()
    projections = [module for name, module in model.base_model.named_modules() if name.endswith((".o_proj", ".out_proj"))]
    found = [module.in_features for module in projections if isinstance(module, torch.nn.Linear)]
    if len(found) == config.num_hidden_layers:
        return tuple(found)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (config.num_attention_heads * head_dim,) * config.num_hidden_layers


def _visible(length: np.ndarray, window: int | None) -> np.ndarray:
    """(query, visible key) in causal attention over so many tokens."""
    full = length if window is None else np.minimum(length, window)
    return full * (full + 1) / 2 + (length - full) * full
