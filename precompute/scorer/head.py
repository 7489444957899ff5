"""What a model does with the product of its last hidden states and its head: nothing, a factor, a soft cap.

Architectures name and use these numbers differently (Granite divides by `logits_scaling`, HyperCLOVA X multiplies by it), so no name is read:
known values are put in place of the head's product, and what comes out as logits is looked at.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from store.errors import InputError

SMALL, LARGE = 2.0**-10, 2.0**30
"""In a soft cap of 5 or more the first changes by less than 2e-8 of itself; the second is cut to the cap."""


@dataclass(frozen=True)
class Head:
    """logits = softcap tanh(scale x / softcap), x the linear head's product; softcap None: scale x."""

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, products: torch.Tensor) -> torch.Tensor:
        """products [..., V] -> logits [..., V], in place, in their dtype."""
        if self.scale != 1.0:
            products *= self.scale
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """d(logits) / d(products) at these logits."""
        return self.scale if self.softcap is None else self.scale * (1 - (logits / self.softcap).square())


_heads: WeakKeyDictionary[PreTrainedModel, Head] = WeakKeyDictionary()


def head_of(model: PreTrainedModel) -> Head:
    """Measured once per model, by a plain forward of two tokens. Raises InputError for a model whose logits are no such function of its body's
    last hidden states: a head that is not linear, layers between body and head, logits that are cut or mixed."""
    if model not in _heads:
        _heads[model] = _measured(model)
    return _heads[model]


@torch.inference_mode()
def _measured(model: PreTrainedModel) -> Head:
    linear, body = model.get_output_embeddings(), model.base_model
    if not isinstance(linear, torch.nn.Linear):
        raise _unusual(model, "the packed layout needs a linear head", found=type(linear).__name__)
    if body is model:
        raise _unusual(model, "the packed layout needs a model with a body and a head")
    values = torch.tensor([0.0, SMALL, -SMALL, 0.5, -3.0, 20.0, -LARGE, LARGE])
    num_entries = linear.weight.shape[0]
    ramp = values.repeat(-(-num_entries // len(values)))[:num_entries]
    seen: dict[str, torch.Tensor] = {}

    def after_body(module, given, outputs):
        seen["hidden"] = outputs[0]

    def before_logits(module, given, product):
        seen["input"] = given[0]
        return ramp.to(product.device).expand(*product.shape).clone()

    hooks = [body.register_forward_hook(after_body), linear.register_forward_hook(before_logits)]
    training = model.training
    try:
        tokens = torch.tensor([[1, 2]], device=model.device) % num_entries
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
        logits = model.eval()(**given).logits
        if "hidden" not in seen:  # its forward calls a part of the body, as OPT's does
            body(**given)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    at_head = seen.get("input")
    if at_head is None or at_head.shape != seen["hidden"].shape or not torch.equal(at_head, seen["hidden"].to(at_head.device)):
        raise _unusual(model, "the packed layout does not compute what lies between this model's body and its head")
    if logits.shape[-1] != num_entries:
        raise _unusual(
            model, "the packed layout does not cut logits", expected=f"{num_entries} logits", found=f"{logits.shape[-1]}"
        )
    found = logits[0, 0].double().cpu()
    ramp = ramp.double()
    scale = float(found[1] / SMALL)
    for head in (Head(scale), Head(scale, float(found[7]))):
        expected = scale * ramp if head.softcap is None else head.softcap * torch.tanh(scale * ramp / head.softcap)
        if torch.allclose(found, expected, rtol=1e-5, atol=1e-7 * abs(scale)):
            return Head(_rounded(head.scale), None if head.softcap is None else _rounded(head.softcap))
    raise _unusual(
        model, "the packed layout does not compute this model's logits: more than a factor and a soft cap is done to them"
    )


def _rounded(number: float) -> float:
    """Without what float32 left in the last digits: 0.0625, 30.0."""
    return float(f"{number:.7g}")


def _unusual(model: PreTrainedModel, what: str, **details) -> InputError:
    return InputError(what, where=type(model).__name__, next="Use --layout padded for this model.", **details)
