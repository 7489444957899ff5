"""A gated MLP's activation as one operator in training: the same numbers and gradients, and only where an MLP computes that."""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from precompute.scorer import kernels
from precompute.scorer.forwards import replaced
from precompute.scorer.gated import use_gated_kernel

IDS = torch.arange(2, 60)[None]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1,), (7, 5), (1, 37, 33), (0, 4), (300, 500)])
def test_values_and_gradients_are_as_exact_as_pytorchs(shape, threads):
    """Against float64; from where silu is 0 in float32 to where it is its argument, and lengths that are no multiple of a register."""
    torch.manual_seed(0)
    gate, up, weigh = torch.randn(shape) * 10, torch.randn(shape), torch.randn(shape)
    if gate.numel() > 4:
        gate.view(-1)[:4] = torch.tensor([-200.0, -88.0, 0.0, 200.0])

    def computed(product, dtype=torch.float32):
        leaves = [each.to(dtype).requires_grad_() for each in (gate, up)]
        out = product(*leaves)
        return [out.detach(), *torch.autograd.grad((out * weigh.to(dtype)).sum(), leaves)]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = computed(kernels.gated_silu)
        with torch.no_grad():
            assert torch.equal(kernels.gated_silu(gate, up), ours[0])
    finally:
        torch.set_num_threads(before)
    theirs, exact = computed(lambda a, b: F.silu(a) * b), computed(lambda a, b: F.silu(a) * b, torch.float64)
    for mine, pytorchs, right in zip(ours, theirs, exact, strict=True):
        assert mine.isfinite().all()
        off, allowed = (mine - right).abs(), (pytorchs - right).abs()
        assert off.sum() <= 2 * allowed.sum() + 1e-7 and (off <= 1e-6 * right.abs() + 1e-7).all()


def test_rows_that_lie_apart_and_shapes_that_differ():
    gate, up = torch.randn(2, 6, 8).unbind(0)
    torch.testing.assert_close(kernels.gated_silu(gate[:, ::2], up.t()[:4].t()), F.silu(gate[:, ::2]) * up[:, :4])
    with pytest.raises(ValueError, match=r"gate \(6, 8\), up \(6, 4\)"):
        kernels.gated_silu(gate, up[:, :4])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_gradients_are_those_of_the_models_own_mlps(kind, checkpointing):
    model = tiny.make_model(kind).requires_grad_(True).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    exact, _ = tiny.gradients(copy.deepcopy(model).double(), IDS)
    own, own_kept = tiny.gradients(model, IDS)
    changed = use_gated_kernel(model)
    assert len(changed) == model.config.num_hidden_layers
    with replaced(changed):
        ours, kept = tiny.gradients(model, IDS)
    for name, right in exact.items():
        off, allowed = (((found[name] - right).norm() / right.norm()).item() for found in (ours, own))
        assert off <= 2 * allowed + 1e-6, name
    assert checkpointing or kept < own_kept
    assert not any("forward" in vars(module) for module in model.modules())


def test_mlps_that_compute_something_else_are_left_alone():
    kinds = {
        "gemma": {"head_dim": 16},  # GELU
        "phi3": {},  # gate and up in one product
        "gpt_neox": {},  # no gate
        "apertus": {},  # no gate, an activation of its own
    }
    for kind, options in kinds.items():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(tiny.SMALL | options)))
        assert use_gated_kernel(model) == [], kind
    model = tiny.make_model("llama")
    first, second, third, fourth = (layer.mlp for layer in model.model.layers)
    second.act_fn = torch.nn.GELU()
    third.dropout = torch.nn.Dropout(0.1)
    fourth.forward = lambda x: x
    assert use_gated_kernel(model) == [first]
    assert use_gated_kernel(tiny.make_model("llama").bfloat16()) == []


def test_an_mlp_under_an_adapter_with_dropout_keeps_its_mode_and_is_taken():
    peft = pytest.importorskip("peft")
    model = tiny.make_model("llama")
    settings = peft.LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings).train()
    modes = [module.training for module in adapted.modules()]
    assert len(use_gated_kernel(adapted)) == 4
    assert [module.training for module in adapted.modules()] == modes
