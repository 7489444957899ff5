"""RMS norms as one operator: the same numbers and gradients as the model's own, only where they are the same, and only inside the block."""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GemmaConfig, PreTrainedModel

from precompute.scorer import kernels
from precompute.scorer.norms import fused_norms, use_fused_norms

IDS = torch.arange(2, 60)[None]


def norms_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [module for module in model.base_model.modules() if "RMSNorm" in type(module).__name__]


def num_fused(model: PreTrainedModel) -> int:
    """How many norms of one forward ran as one operator."""
    calls = []
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        for place in (kernels, F):  # float32 on a CPU, and everything else
            own = place.rms_norm
            patch.setattr(place, "rms_norm", lambda *arguments, own=own: calls.append(1) or own(*arguments))
        model(input_ids=IDS)
    return len(calls)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_every_norm_is_fused_and_computes_the_same(kind):
    model = tiny.make_model(kind)
    for norm in norms_of(model):
        norm.weight.normal_(1, 0.3)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(input_ids=IDS).logits
        own = (model(input_ids=IDS).logits - exact).abs().mean()
        with fused_norms(model):
            fused = (model(input_ids=IDS).logits - exact).abs().mean()
            assert num_fused(model) == len(norms_of(model))
    assert fused < 1.5 * own  # both are sums of roundings, in another order
    assert num_fused(model) == 0
    assert not any("forward" in vars(norm) for norm in norms_of(model))


@pytest.mark.parametrize("different", [1, 3])
def test_two_norms_of_a_class_that_differ_are_tried_each(different, monkeypatch):
    """Only one of them multiplies by more than its weight."""
    model = tiny.make_model("llama")
    kind = type(model.model.norm)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: own(self, x) * getattr(self, "gain", 1.0))
    norms_of(model)[different].gain = 1.5
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits
        with fused_norms(model):
            assert num_fused(model) == len(norms_of(model)) - 1
            torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_gradients_are_those_of_the_models_own_norms(kind, checkpointing):
    """In float32 and, rounding for rounding, in bfloat16: each parameter's against float64, as far off as the module's own code is."""
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.make_model(kind).to(dtype).requires_grad_(True).train()
        for norm in norms_of(model):
            torch.nn.init.normal_(norm.weight, 1, 0.3)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        exact, _ = tiny.gradients(copy.deepcopy(model).double(), IDS)
        own, own_kept = tiny.gradients(model, IDS)
        replaced = use_fused_norms(model)
        assert len(replaced) == len(norms_of(model))
        fused, kept = tiny.gradients(model, IDS)

        def off(found, exact=exact):
            return {name: ((found[name].double() - each).norm() / each.norm()).item() for name, each in exact.items()}

        for (name, ours), theirs in zip(off(fused).items(), off(own).values(), strict=True):
            assert ours <= 2 * theirs + 1e-6, f"{name}: {ours:.2g}, the module's own code {theirs:.2g}"
        assert dtype != torch.float32 or kept < own_kept


def test_norms_that_compute_something_else_are_left_alone():
    """Gemma's multiply by 1 + weight; Gemma's own weights are zero at first, OLMo's 1, so both are tried with others."""
    gemma = GemmaConfig(**tiny.SMALL, head_dim=16)
    model = AutoModelForCausalLM.from_config(gemma).eval().requires_grad_(False)
    for norm in norms_of(model):
        norm.weight.normal_(1, 0.3)
    with fused_norms(model):
        assert num_fused(model) == 0


class EpsilonOutsideRMSNorm(torch.nn.Module):
    def __init__(self, own: torch.nn.Module):
        super().__init__()
        self.weight, self.eps = own.weight, own.variance_epsilon

    def forward(self, hidden_states):
        return self.weight * hidden_states / (hidden_states.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


def test_a_norm_that_differs_in_its_epsilon_alone_is_left_alone():
    model = tiny.make_model("llama")
    model.model.norm = EpsilonOutsideRMSNorm(model.model.norm)
    with fused_norms(model):
        assert num_fused(model) == len(norms_of(model)) - 1


def test_in_bfloat16_the_norm_is_no_further_from_the_exact_one():
    model = tiny.make_model("llama").to(torch.bfloat16)
    norm = model.model.norm
    norm.weight.normal_(1, 0.3)
    x = torch.randn(1, 200, 64).bfloat16()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight.double()
    own = (norm(x) - exact).abs().mean()
    with fused_norms(model):
        fused = norm(x)
        assert num_fused(model) == len(norms_of(model))
    assert fused.dtype == torch.bfloat16
    assert 0 < (fused - exact).abs().mean() <= own


def test_the_norms_come_back_after_an_exception():
    model = tiny.make_model("llama")
    with pytest.raises(RuntimeError, match="inside"), fused_norms(model):
        raise RuntimeError("inside")
    assert num_fused(model) == 0
