"""The fast forward on a CPU: same numbers as the model's own, tiles that do not divide the row, and the model as it was afterwards."""

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile

from precompute.cpu import fast_on_cpu, linear


def forward(model, ids):
    with torch.inference_mode():
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_same_numbers_in_tiles_of_any_size(kind, monkeypatch):
    model = tiny.make_model(kind)
    ids = torch.randint(2, 384, (1, 53))
    plain = forward(model, ids)
    monkeypatch.setattr("precompute.cpu.MLP_TILE", 10)
    with fast_on_cpu(model):
        fast = forward(model, ids)
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)
    assert not any("forward" in vars(module) for module in model.modules())  # given back


def test_every_linear_layer_takes_the_fast_product_and_mlps_run_in_tiles(monkeypatch):
    model = tiny.make_model("qwen2")
    monkeypatch.setattr("precompute.cpu.MLP_TILE", 10)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    with fast_on_cpu(model), profile(activities=[ProfilerActivity.CPU]) as profiled:
        forward(model, torch.randint(2, 384, (1, 53)))
    calls = {event.key: event.count for event in profiled.key_averages()}
    assert calls["mkldnn::_linear_pointwise"] == model.config.num_hidden_layers * (
        4 + 3 * 3
    )  # q k v o; gate up down in 3 tiles of 20
    assert "aten::linear" not in calls


def test_gradients_and_other_dtypes_keep_pytorchs_own_product():
    x, weight, bias = torch.randn(3, 8), torch.randn(5, 8, requires_grad=True), torch.randn(5)
    linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 8))
    model = tiny.make_model("llama").to(torch.bfloat16)
    with fast_on_cpu(model):
        assert not any("forward" in vars(module) for module in model.modules())
