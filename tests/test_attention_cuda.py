"""The path of a GPU, run on the CPU: PyTorch's own `varlen_attn`, over flash attention kernels written here from their documentation.

What this shows: that offsets, gathering, windows, scaling, grouped heads and gradients are handed over right. What only a GPU shows is that
its kernels do what their documentation says.
"""

import numpy as np
import pytest
import tiny
import torch
from test_scoring import TOLERANCE, pairs, plain

from precompute import attention
from precompute.attention import packed_attention, packed_hidden
from precompute.packing import MIN_SHARED, Sequence, pack
from precompute.scoring import score


def masked_scores(query, key, cu_queries, cu_keys, max_queries, max_keys, is_causal, scale, left, right):
    """query [Tq, H, D], key [Tk, Hkv, D] -> for each sequence where its queries and keys lie, and its scores [H, n, m], -inf where unseen.

    Query i of n stands at key m - n + i of m (bottom-right) and sees the keys from `left` before it to `right` after it, -1 for all.
    """
    assert is_causal == (left == -1 and right == 0)
    for sequence in range(len(cu_queries) - 1):
        queries, keys = (slice(*each[sequence : sequence + 2].tolist()) for each in (cu_queries, cu_keys))
        num_queries, num_keys = queries.stop - queries.start, keys.stop - keys.start
        assert 0 < num_queries <= max_queries
        assert 0 < num_keys <= max_keys
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool)
        for row in range(num_queries):
            own = num_keys - num_queries + row
            if left >= 0:
                visible[row, : max(own - left, 0)] = False
            if right >= 0:
                visible[row, own + right + 1 :] = False
        scores = torch.einsum("qhd,khd->hqk", query[queries], for_each_query_head(key[keys], query)) * scale
        yield queries, keys, scores.masked_fill(~visible, -torch.inf)


def for_each_query_head(keys_or_values, query):
    """[m, Hkv, D] -> [m, H, D]: neighbouring query heads share one."""
    return keys_or_values.repeat_interleave(query.shape[1] // keys_or_values.shape[1], dim=1)


def flash_forward(query, key, value, *arguments, scale, window_size_left, window_size_right, **unused):
    *lengths, dropout, is_causal, _ = arguments
    assert dropout == 0
    assert not any(each is not None for each in unused.values())
    outs, sums = [], []
    for _, keys, scores in masked_scores(query, key, *lengths, is_causal, scale, window_size_left, window_size_right):
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), for_each_query_head(value[keys], query)))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(sums, dim=1), torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def flash_backward(grad, query, key, value, out, log_sums, *arguments, scale, window_size_left, window_size_right):
    """The gradients of arXiv 2205.14135, appendix B.4: probabilities from the log-sum-exps, the softmax's sum from the output."""
    *lengths, dropout, is_causal, _, _ = arguments
    assert dropout == 0
    grads = [torch.zeros_like(each) for each in (query, key, value)]
    for queries, keys, scores in masked_scores(query, key, *lengths, is_causal, scale, window_size_left, window_size_right):
        probabilities = (scores - log_sums[:, queries, None]).exp()
        for_probabilities = torch.einsum("qhd,khd->hqk", grad[queries], for_each_query_head(value[keys], query))
        weighted = (grad[queries] * out[queries]).sum(-1).T[..., None]
        for_scores = probabilities * (for_probabilities - weighted) * scale
        grads[0][queries] = torch.einsum("hqk,khd->qhd", for_scores, for_each_query_head(key[keys], query))
        for_keys = torch.einsum("hqk,qhd->khd", for_scores, query[queries])
        for_values = torch.einsum("hqk,qhd->khd", probabilities, grad[queries])
        num_keys, heads, width = key[keys].shape
        grads[1][keys], grads[2][keys] = (each.view(num_keys, heads, -1, width).sum(2) for each in (for_keys, for_values))
    return tuple(grads)


@pytest.fixture(autouse=True)
def gpu_path(monkeypatch):
    """How many calls reached the kernels; the packed layout takes the GPU's path inside."""
    calls = {"forward": 0, "backward": 0}

    def forward(*arguments, **options):
        calls["forward"] += 1
        return flash_forward(*arguments, **options)

    def backward(*arguments, **options):
        calls["backward"] += 1
        return flash_backward(*arguments, **options)

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


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_gradients_equal_the_plain_forward(kind, gpu_path):
    """Of a randomly weighed sum of the completions' log-probs, for every parameter; both responses and a third one share their prompts."""
    model = tiny.make_model(kind).requires_grad_(True)
    rng = np.random.default_rng(2)
    sequences = []
    for num_prompt in (1, 5, MIN_SHARED + 40):
        prompt = rng.integers(2, 384, num_prompt)
        for num_scored in (3, 30, 45):
            ids = np.concatenate([prompt, rng.integers(2, 384, num_scored)]).astype(np.int32)
            sequences.append(Sequence(ids, num_prompt))
    weights = [torch.from_numpy(rng.normal(size=each.num_scored).astype(np.float32)) for each in sequences]

    (batch,) = pack(sequences, 100_000)
    assert any(branch.context for branch in batch.branches)
    with packed_attention(model):
        hidden = packed_hidden(model, batch)[torch.from_numpy(batch.predictors)]
        logps = model.get_output_embeddings()(hidden).log_softmax(-1).gather(1, torch.from_numpy(batch.targets)[:, None])[:, 0]
        members = zip(batch.members, batch.slots, strict=True)
        sum(weights[member] @ logps[torch.from_numpy(slots)] for member, slots in members).backward()
    packed = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gpu_path["backward"] == model.config.num_hidden_layers

    model.zero_grad()
    for sequence, weight in zip(sequences, weights, strict=True):
        ids = torch.from_numpy(sequence.ids.astype(np.int64))[None]
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[sequence.num_prompt - 1 :, 0]
        (weight @ logps).backward()
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(
            packed[name], parameter.grad, atol=1e-4 * scale, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
