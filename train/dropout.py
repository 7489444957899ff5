"""DPO compares log-probs, the reference's among them, that were computed without dropout: the policy's are too, also while it trains."""

import re

from torch import nn

RANDOM = re.compile("drop|jitter")
"""Names of the shares that a model's modules keep as plain numbers: attention_dropout, resid_pdrop, layerdrop, router_jitter_noise, …"""


def turn_off(model: nn.Module, *, keep_adapters: bool = False) -> tuple[str, ...]:
    """Set every such share of `model` to zero; returns those that were not, as `attention_dropout 0.1`. `keep_adapters`: but for LoRA's own.

    TRL does so for `nn.Dropout` only. The model's configuration stays as it is, and is saved so.
    """
    found = {}
    for place, module in model.named_modules():
        if keep_adapters and "lora_dropout" in place.split("."):
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
            found[type(module).__name__] = module.p
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and value and RANDOM.search(name):
                found[name] = value
                setattr(module, name, 0.0)
    return tuple(f"{name} {value:g}" for name, value in sorted(found.items()))
