"""What a GPU computes in one kernel and a CPU does not: flash attention for rows of sequences, as plain mathematics behind the argument checks of
PyTorch's CUDA kernels (flash_api.cpp), and RMS norm.

`forward` and `backward` are `aten::_flash_attention_forward` and `_backward` for sequences laid end to end, on host tensors of any
floating-point dtype; `take_the_place_of_cudas` puts them, with the checks, where a GPU's are called.
"""

import torch

BLOCK = 512
"""Queries at a time: of a long sequence, the scores of all would fill the host's memory."""


def masked_scores(query, key, cu_queries, cu_keys, is_causal, scale, left, right):
    """query [Tq, H, D], key [Tk, Hkv, D] -> for each block of a sequence's queries where they and its keys lie, and their scores [H, n, m],
    -inf where unseen.

    Query i of n stands at key m - n + i of m (bottom-right) and sees the keys from `left` before it to `right` after it, -1 for all.
    """
    assert is_causal == (left == -1 and right == 0)
    of_queries, of_keys = (cu.tolist() for cu in (cu_queries, cu_keys))
    for sequence in range(len(of_queries) - 1):
        first, last = of_queries[sequence : sequence + 2]
        keys = slice(*of_keys[sequence : sequence + 2])
        num_keys = keys.stop - keys.start
        for start in range(first, last, BLOCK):
            queries = slice(start, min(start + BLOCK, last))
            place = torch.arange(queries.start, queries.stop) - last + num_keys
            begin = max(0, int(place[0]) - left) if left >= 0 else 0
            end = min(num_keys, int(place[-1]) + 1 + right) if right >= 0 else num_keys
            seen = slice(keys.start + begin, keys.start + end)  # by any query of the block
            distance = torch.arange(begin, end) - place[:, None]
            unseen = torch.zeros_like(distance, dtype=torch.bool)
            if left >= 0:
                unseen |= distance < -left
            if right >= 0:
                unseen |= distance > right
            scores = torch.einsum("qhd,khd->hqk", query[queries], for_each_query_head(key[seen], query)) * scale
            yield queries, seen, scores.masked_fill(unseen, -torch.inf)


def for_each_query_head(keys_or_values, query):
    """[m, Hkv, D] -> [m, H, D]: neighbouring query heads share one."""
    return keys_or_values.repeat_interleave(query.shape[1] // keys_or_values.shape[1], dim=1)


def forward(query, key, value, *arguments, scale, window_size_left, window_size_right, **unused):
    """Output [Tq, H, D], log-sum-exps [H, Tq], and what stands for the state of dropout."""
    cu_queries, cu_keys, max_queries, max_keys, dropout, is_causal, _ = arguments
    check_lengths(query, key, cu_queries, cu_keys, max_queries, max_keys)
    assert dropout == 0
    assert not any(each is not None for each in unused.values())
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outs, sums = [], []
    window = (window_size_left, window_size_right)
    for _, keys, scores in masked_scores(query, key, cu_queries, cu_keys, is_causal, scale, *window):
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), for_each_query_head(value[keys], query)))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(sums, dim=1), torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def backward(grad, query, key, value, out, log_sums, *arguments, scale, window_size_left, window_size_right):
    """The gradients of arXiv 2205.14135, appendix B.4: probabilities from the log-sum-exps, the softmax's sum from the output."""
    cu_queries, cu_keys, max_queries, max_keys, dropout, is_causal, _, _ = arguments
    check_lengths(query, key, cu_queries, cu_keys, max_queries, max_keys)
    assert dropout == 0
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    grads = [torch.zeros_like(each) for each in (query, key, value)]
    window = (window_size_left, window_size_right)
    for queries, keys, scores in masked_scores(query, key, cu_queries, cu_keys, is_causal, scale, *window):
        probabilities = (scores - log_sums[:, queries, None]).exp()
        for_probabilities = torch.einsum("qhd,khd->hqk", grad[queries], for_each_query_head(value[keys], query))
        weighted = (grad[queries] * out[queries]).sum(-1).T[..., None]
        for_scores = probabilities * (for_probabilities - weighted) * scale
        grads[0][queries] = torch.einsum("hqk,khd->qhd", for_scores, for_each_query_head(key[keys], query))
        for_keys = torch.einsum("hqk,qhd->khd", for_scores, query[queries])
        for_values = torch.einsum("hqk,qhd->khd", probabilities, grad[queries])
        num_keys, heads, width = key[keys].shape
        for into, each in ((grads[1], for_keys), (grads[2], for_values)):
            into[keys] += each.view(num_keys, heads, -1, width).sum(2)
    return tuple(grads)


def check_lengths(query, key, cu_queries, cu_keys, max_queries, max_keys) -> None:
    """A GPU's kernel believes the lengths; wrong ones would read other memory or leave some unwritten."""
    for tensor, cu, most in ((query, cu_queries, max_queries), (key, cu_keys, max_keys)):
        lengths = cu.diff()
        assert cu[0] == 0 and cu[-1] == len(tensor) and lengths.min() > 0 and lengths.max() == most
    assert len(cu_queries) == len(cu_keys)


# ---- where a GPU's are called


def rms_norm(x, shape, weight, epsilon):
    """weight x / sqrt(mean(x^2) + epsilon) over the last axis, and the factors 1 / sqrt [..., 1]."""
    factor = (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return x * factor * weight, factor


def rms_norm_backward(grad, x, shape, factor, weight, wanted):
    """The gradients of x and of the weight."""
    weighted = grad * weight
    for_x = factor * (weighted - x * factor.square() * (weighted * x).mean(-1, keepdim=True))
    return for_x, (grad * x * factor).flatten(0, -2).sum(0)


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise RuntimeError(text)


def check_arguments(query, key, value, cu_queries, cu_keys) -> None:
    _require(query.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type")
    _require(query.dtype == key.dtype == value.dtype, "query and key must have the same dtype")
    heads, width = query.shape[1:]
    _require(width % 8 == 0 and width <= 256, f"FlashAttention: head dimension {width}")
    _require(heads % key.shape[1] == 0 and key.shape == value.shape and key.shape[2] == width, "FlashAttention: heads of keys")
    for tensor in (query, key, value):
        _require(tensor.device == query.device, "Expected all tensors to be on the same device")
        _require(tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension")
        aligned = all(step % 8 == 0 for step in (*tensor.stride()[:-1], tensor.storage_offset()))
        _require(aligned, "misaligned address")  # 16 bytes are loaded at a time
    for cu in (cu_queries, cu_keys):
        _require(cu.dtype == torch.int32 and cu.is_contiguous(), "cu_seqlens must have dtype int32 and be contiguous")
        _require(cu.device == query.device, "cu_seqlens must be on CUDA")


calls = {"forward": 0, "backward": 0}
"""How often the GPU's kernels were called in this process."""


def take_the_place_of_cudas() -> None:
    """Register the kernels for "cuda" tensors, RMS norm as one operator, and the product that accumulates bfloat16 into float32. For
    made_up_gpu.load."""
    on_host, on_device = torch.ops.made_up_gpu.on_host, torch.ops.made_up_gpu.on_device

    def host(value):
        if not isinstance(value, torch.Tensor):
            return value
        value = on_host(value) if value.is_cuda else value
        return value.float() if value.is_floating_point() else value

    def on_gpu(kernel, name: str, first: int):
        def run(*arguments, **options):
            query, key, value = arguments[first : first + 3]
            calls[name] += 1
            lengths = arguments[3:5] if first == 0 else arguments[6:8]
            check_arguments(query, key, value, *lengths)
            for tensor in arguments[:first] + arguments[first + 3 : first + 4] * first:  # the gradient and the output
                _require(tensor.dtype == query.dtype and tensor.device == query.device, "query and dout must have the same dtype")
            results = kernel(*map(host, arguments), **options)
            kept = range(3) if first else range(1)  # in the inputs' dtype; the log-sum-exps stay in float32
            return tuple(
                on_device(each.to(query.dtype) if index in kept else each, query.get_device()) for index, each in enumerate(results)
            )

        return run

    def product(self, a, b, out_dtype, *, beta=1, alpha=1, out):
        _require(a.dtype == b.dtype and a.dtype in (torch.float16, torch.bfloat16) and out_dtype == torch.float32, "addmm: dtype")
        _require(a.device == b.device == self.device == out.device, "Expected all tensors to be on the same device")
        host(out).copy_(beta * host(self) + alpha * host(a) @ host(b))
        return out

    def norm(kernel, kept: int):
        """The first `kept` results in the inputs' dtype; the factors stay in float32."""

        def run(x, *arguments):
            results = kernel(host(x), *map(host, arguments))
            dtypes = [x.dtype if index < kept else torch.float32 for index in range(len(results))]
            return tuple(on_device(each.to(dtype), x.get_device()) for each, dtype in zip(results, dtypes, strict=True))

        return run

    def histogram(x, *arguments, **options):
        """Of integers too, which a CPU does not count: how many tokens each expert of a mixture gets."""
        return on_device(host(x).double().histc(*arguments, **options).to(x.dtype), x.get_device())

    library = torch.library.Library("aten", "IMPL")
    library.impl("histc", histogram, "CUDA")
    library.impl("_fused_rms_norm", norm(rms_norm, 1), "CUDA")
    library.impl("_fused_rms_norm_backward", norm(rms_norm_backward, 2), "CUDA")
    library.impl("_flash_attention_forward", on_gpu(forward, "forward", 0), "CUDA")
    library.impl("_flash_attention_backward", on_gpu(backward, "backward", 1), "CUDA")
    library.impl("addmm.dtype_out", product, "CUDA")
    globals()["_registered"] = library  # its kernels go when it does
