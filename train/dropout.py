"""DPO compares log-probs, the reference's among them, that were computed in evaluation mode: the policy's are too, also while it trains.

In training mode a model drops values, lets its routers draw their experts, or clamps weights. Some of the numbers that say how much stand in
modules, some in the configuration, and some count in evaluation too (Phi-MoE's `router_jitter_noise` is also the distance at which experts are
compared). So no number is trusted: what computes is in evaluation mode.
"""

import functools
import re
import types
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

DROPPED = re.compile("drop")
"""Names of the shares that a model's modules keep as plain numbers: attention_dropout, resid_pdrop, layerdrop, …"""

NOISE = re.compile("drop|jitter")


def turn_off(model: nn.Module, *, keep_adapters: bool = False) -> tuple[str, ...]:
    """From now on `model.train()` leaves all that computes in evaluation mode, and every share of dropout is zero; returns those that were not, as
    `attention_dropout 0.1`. `keep_adapters`: but for LoRA's own.

    TRL does so for `nn.Dropout` only. The model's configuration stays as it is, and is saved so.
    """
    done_before = "train" in vars(model)
    found = {}
    for place, module in model.named_modules():
        if keep_adapters and _is_adapters(place):
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
            found[type(module).__name__] = module.p
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and value and NOISE.search(name):
                if DROPPED.search(name):
                    setattr(module, name, 0.0)
                elif done_before:
                    continue
                found[name] = value
    if not done_before:
        model.train = types.MethodType(_train, model)
        model.train(model.training)
    return tuple(f"{name} {value:g}" for name, value in sorted(found.items()))


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    """Instead of `model.train`: its bodies and what an adapter drops are in training mode, and a layer until its checkpoint runs it."""
    type(model).train(model, mode)
    if not mode:
        return model
    for place, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            checkpoint = module._gradient_checkpointing_func
            if getattr(checkpoint, "func", None) is not _evaluated:
                module._gradient_checkpointing_func = functools.partial(_evaluated, checkpoint)
        elif module is not model and not isinstance(module, PreTrainedModel) and not _is_adapters(place):
            module.training = False
    return model


def _evaluated(checkpoint: Callable, function: functools.partial, *args: Any) -> Any:
    """`checkpoint(function, *args)`, where `function` is a layer's forward, its layer in evaluation mode, when it is run again too."""
    layer = function.args[0]

    def forward(*given: Any) -> Any:
        layer.training = False
        try:
            return function(*given)
        finally:
            layer.training = True

    return checkpoint(forward, *args)


def _is_adapters(place: str) -> bool:
    return "lora_dropout" in place.split(".")
