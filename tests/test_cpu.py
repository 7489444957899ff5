"""The fast forward on a CPU: same numbers as the model's own, tiles that do not divide the row, and the model as it was afterwards."""

import resource
import subprocess
import sys

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile

from precompute.scorer.cpu import fast_on_cpu, linear


@pytest.fixture(params=["AVX512", "AVX2"])
def capability(request, monkeypatch):
    """Whatever this machine's cores have."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: request.param)
    return request.param


def forward(model, ids):
    with torch.inference_mode():
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_same_numbers_in_tiles_of_any_size(kind, monkeypatch, capability):
    model = tiny.make_model(kind)
    ids = torch.randint(2, 384, (1, 53))
    plain = forward(model, ids)
    monkeypatch.setattr("precompute.scorer.cpu.MLP_TILE", 10)
    with fast_on_cpu(model):
        fast = forward(model, ids)
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)
    assert not any("forward" in vars(module) for module in model.modules())  # given back


def test_with_avx512_every_linear_layer_takes_onednns_product_and_mlps_run_in_tiles(monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    model = tiny.make_model("qwen2")
    monkeypatch.setattr("precompute.scorer.cpu.MLP_TILE", 10)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    with fast_on_cpu(model), profile(activities=[ProfilerActivity.CPU]) as profiled:
        forward(model, torch.randint(2, 384, (1, 53)))
    calls = {event.key: event.count for event in profiled.key_averages()}
    assert calls["mkldnn::_linear_pointwise"] == model.config.num_hidden_layers * (
        4 + 3 * 3
    )  # q k v o; gate up down in 3 tiles of 20
    assert "aten::linear" not in calls


def test_without_avx512_every_product_is_pytorchs_own(monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    model = tiny.make_model("qwen2")
    with fast_on_cpu(model), profile(activities=[ProfilerActivity.CPU]) as profiled:
        assert not any("forward" in vars(module) for module in model.modules())
        forward(model, torch.randint(2, 384, (1, 53)))
        linear(torch.ones(2, 3), torch.ones(5, 3), None)
    assert not any("mkldnn" in event.key for event in profiled.key_averages())


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_are_those_of_pytorchs_own_product(with_bias, capability):
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((2, 7, 8), (5, 8), (5,)))
    leaves = (x, weight, bias) if with_bias else (x, weight)
    weigh = torch.randn(2, 7, 5)
    mine, theirs = (
        torch.autograd.grad((product(x, weight, bias if with_bias else None).sin() * weigh).sum(), leaves)
        for product in (linear, torch.nn.functional.linear)
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_other_dtypes_keep_pytorchs_own_product(capability):
    model = tiny.make_model("llama").to(torch.bfloat16)
    with fast_on_cpu(model):
        assert not any("forward" in vars(module) for module in model.modules())


def test_freed_memory_is_used_again_without_page_faults_until_it_is_given_back():
    """In a process of its own, for it is for good: page faults of blocks of 64 MB, written, freed and allocated again."""
    program = """
import ctypes, platform, resource, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages come only where there is enough free memory in one piece
import torch
from precompute.scorer.cpu import give_back_freed_memory, keep_freed_memory
if platform.libc_ver()[0] != "glibc": sys.exit(77)
def faults():
    for _ in range(20): torch.ones(16 << 20)  # glibc places the first few anew: small pieces between them are not joined at once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
keep_freed_memory()
print(faults())
give_back_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("not glibc")
    as_it_is, kept, given_back = map(int, done.stdout.split())
    pages = (64 << 20) // resource.getpagesize()
    assert min(as_it_is, given_back) > 0.9 * pages and kept < as_it_is // 10, done.stdout


@pytest.mark.parametrize("shape", [(3,), (4, 3), (1, 4, 3)])
def test_a_product_may_be_changed_in_place_as_gemma_3n_does(shape, monkeypatch):
    monkeypatch.setattr("precompute.scorer.cpu._onednn_is_faster", lambda x: True)
    found = []
    for product in (linear, torch.nn.functional.linear):
        torch.manual_seed(0)
        given = [torch.randn(each, requires_grad=True) for each in (shape, (5, 3), (5,))]
        result = product(*given)
        result *= 2
        result.sin().sum().backward()
        found.append([result, *(each.grad for each in given)])
    torch.testing.assert_close(*found)
