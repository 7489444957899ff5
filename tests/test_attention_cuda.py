"""The path of a GPU on CPU tensors, in float32: PyTorch's own `varlen_attn`, over flash attention written from its documentation
(made_up_gpu/flash.py).

What this shows: that offsets, gathering, windows, scaling, grouped heads and gradients are handed over right, exactly. In the dtypes that the
kernels take, on "cuda" tensors: tests/on_gpu. What only a real GPU shows is that its kernels do what their documentation says.
"""

import numpy as np
import pytest
import tiny
import torch
from made_up_gpu import flash
from test_scoring import TOLERANCE, pairs, plain
from torch.nn.attention import varlen

from precompute.scorer import attention
from precompute.scorer.attention import packed_attention, packed_hidden
from precompute.scorer.packing import MIN_SHARED, Sequence, pack
from precompute.scorer.scoring import score


@pytest.fixture(autouse=True)
def gpu_path(monkeypatch):
    """How many calls reached the kernels; the packed layout takes the GPU's path inside."""
    calls = {"forward": 0, "backward": 0}

    def forward(*arguments, **options):
        calls["forward"] += 1
        return flash.forward(*arguments, **options)

    def backward(*arguments, **options):
        calls["backward"] += 1
        return flash.backward(*arguments, **options)

    monkeypatch.setattr(attention, "_attend_cpu", attention._attend_cuda)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield calls


@pytest.mark.parametrize("kind", tiny.CONFIGS)
@pytest.mark.parametrize("tokens_per_batch", [1, 150, 100_000])
def test_scores_equal_the_plain_forward(kind, tokens_per_batch, gpu_path):
    """One sequence a batch (nothing gathered), a few, and all at once."""
    model = tiny.make_model(kind)
    sequences = pairs(seed=tokens_per_batch)
    scored = score(model, sequences, layout="packed", tokens_per_batch=tokens_per_batch)
    for sequence, logps in zip(sequences, scored, strict=True):
        np.testing.assert_allclose(logps, plain(model, sequence), atol=TOLERANCE, rtol=0)
    num_batches = len(list(pack(sequences, tokens_per_batch)))
    assert gpu_path["forward"] == num_batches * model.config.num_hidden_layers


def test_grouped_heads_where_varlen_attention_does_not_take_them(gpu_path, monkeypatch):
    """torch 2.11 has `scale` and `window_size` and no `enable_gqa`; it wants as many key heads as query heads."""
    newer = varlen.varlen_attn

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        assert query.shape[1:] == key.shape[1:] == value.shape[1:]
        return newer(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    model = tiny.make_model("olmo3")
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    sequences = pairs(seed=3)
    for sequence, logps in zip(sequences, score(model, sequences, layout="packed", tokens_per_batch=100_000), strict=True):
        np.testing.assert_allclose(logps, plain(model, sequence), atol=TOLERANCE, rtol=0)
    assert gpu_path["forward"] == model.config.num_hidden_layers
    packed, alone = gradients(model)
    for name, expected in alone.items():
        torch.testing.assert_close(packed[name], expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_lengths_are_one_tensor_where_nothing_is_shared(shared):
    ids = np.arange(2, 2 + MIN_SHARED + 40, dtype=np.int32)
    sequences = [Sequence(np.concatenate([ids if shared else ids + 99 * i, [200 + i] * 9]).astype(np.int32), 5) for i in range(3)]
    (batch,) = pack(sequences, 100_000)
    layout = attention.PackedLayout(batch.branches, torch.device("cpu"))
    assert (layout.cu_keys is layout.cu_queries) == (layout.gather is None) == (not shared)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_gradients_equal_the_plain_forward(kind, gpu_path):
    model = tiny.make_model(kind)
    packed, alone = gradients(model)
    assert gpu_path["backward"] == model.config.num_hidden_layers
    for name, expected in alone.items():
        scale = expected.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(packed[name], expected, atol=1e-4 * scale, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_sinks_stay_with_flash_attention(gpu_path, monkeypatch):
    """torch 2.15 computes rows of which nothing is shared by cuDNN, where that is allowed."""
    newer, allowed = varlen.varlen_attn, []

    def varlen_attn(*arguments, **options):
        allowed.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()))
        return newer(*arguments, **options)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    (batch,) = pack(pairs(seed=1), 100_000)
    layout = attention.PackedLayout(batch.branches, torch.device("cpu"))
    query, key, value = (torch.randn(1, heads, layout.num_tokens, 16) for heads in (4, 2, 2))
    attention._attend_cuda(query, key, value, 0.3, None, layout, sinks=torch.zeros(4))
    attention._attend_cuda(query, key, value, 0.3, None, layout)
    assert allowed == [(True, False), (True, True)]


@pytest.mark.parametrize("window", [None, 24])
def test_sinks_by_log_sum_exps_are_one_more_entry_of_the_softmax(window, gpu_path):
    """Flash attention's output made smaller, and its gradient given the whole's log-sum-exps, against the softmax written out."""
    generator = torch.Generator().manual_seed(0)
    (batch,) = pack(pairs(seed=1), 100_000)
    layout = attention.PackedLayout(batch.branches, torch.device("cpu"))
    results = {}
    for attend in (attention._attend_cuda, attention._attend_in_blocks):
        generator.manual_seed(0)
        shapes = [(1, heads, layout.num_tokens, 16) for heads in (4, 2, 2)]
        given = [torch.randn(shape, generator=generator).requires_grad_() for shape in (*shapes, (4,))]
        out = attend(*given[:3], 0.3, window, layout, sinks=given[3])
        (out * torch.randn(out.shape, generator=generator)).sum().backward()
        results[attend] = [out.detach(), *(each.grad for each in given)]
    assert gpu_path == {"forward": 1, "backward": 1}
    for by_flash, written_out in zip(*results.values(), strict=True):
        assert written_out.abs().max() > 0.1
        torch.testing.assert_close(by_flash, written_out, atol=1e-5 * written_out.abs().max().item(), rtol=1e-4)


def gradients(model):
    """Of a randomly weighed sum of the completions' log-probs, for every parameter: from one packed row, and from a plain forward of each
    sequence alone. Two responses and a third one share each prompt."""
    model.requires_grad_(True)
    device = model.device
    rng = np.random.default_rng(2)
    sequences = []
    for num_prompt in (1, 5, MIN_SHARED + 40):
        prompt = rng.integers(2, 384, num_prompt)
        for num_scored in (3, 30, 45):
            ids = np.concatenate([prompt, rng.integers(2, 384, num_scored)]).astype(np.int32)
            sequences.append(Sequence(ids, num_prompt))
    weights = [torch.from_numpy(rng.normal(size=each.num_scored).astype(np.float32)).to(device) for each in sequences]

    (batch,) = pack(sequences, 100_000)
    assert any(branch.context for branch in batch.branches)
    with packed_attention(model):
        hidden = packed_hidden(model, batch)[torch.from_numpy(batch.predictors).to(device)]
        logits = model.get_output_embeddings()(hidden).float()
        logps = logits.log_softmax(-1).gather(1, torch.from_numpy(batch.targets)[:, None].to(device))[:, 0]
        members = zip(batch.members, batch.slots, strict=True)
        sum(weights[member] @ logps[torch.from_numpy(slots).to(device)] for member, slots in members).backward()
    packed = {name: parameter.grad for name, parameter in model.named_parameters()}

    model.zero_grad()
    for sequence, weight in zip(sequences, weights, strict=True):
        ids = torch.from_numpy(sequence.ids.astype(np.int64))[None].to(device)
        logits = model(input_ids=ids).logits[0, :-1].float()
        logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[sequence.num_prompt - 1 :, 0]
        (weight @ logps).backward()
    return packed, {name: parameter.grad for name, parameter in model.named_parameters()}
