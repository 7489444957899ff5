"""Kernels for float32 on a CPU, in C++ (kernels.cpp): attention over a packed row, RMS norm, a gated MLP's activation, a
head's softmax.

They are compiled at first use, for this machine's processor, and kept in the user's cache folder.
"""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from precompute.scorer.packing import Branch
from store.errors import InputError

SOURCE = Path(__file__).with_name("kernels.cpp")

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
"""No -ffast-math: it would remove the rounding that exp2 is made of, and NaN."""


class _Row(ctypes.Structure):
    """`Row` of kernels.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "log_sums")),
        *((f"{name}_{axis}", ctypes.c_int64) for name in ("query", "key", "value") for axis in ("token", "head")),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_kv_heads", "head_dim", "num_branches")),
        *((name, ctypes.c_void_p) for name in ("starts", "first_parts", "part_branch", "part_length")),
        ("window", ctypes.c_int64),
        ("scaling", ctypes.c_float),
    ]


class _Gradients(ctypes.Structure):
    """`Gradients` of kernels.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("grad_out", "grad_query", "grad_key", "grad_value")]


class Paths:
    """The branches of a packed row as `packed_attention` reads them: int64 arrays, kept here for as long as they are used."""

    def __init__(self, branches: tuple[Branch, ...]):
        number = {branch.start: index for index, branch in enumerate(branches)}  # a stretch begins where a branch does
        parts = [(*branch.context, (branch.start, branch.stop)) for branch in branches]
        self.starts = np.array([0, *(branch.stop for branch in branches)], dtype=np.int64)
        self.first_parts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        self.part_branch = np.array([number[start] for stretches in parts for start, _ in stretches], dtype=np.int64)
        self.part_length = np.array([stop - start for stretches in parts for start, stop in stretches], dtype=np.int64)


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, paths: Paths, *, scaling: float | None, window: int | None
) -> torch.Tensor:
    """query [1, H, T, D], key and value [1, Hkv, T, D], float32, channels side by side in memory -> [1, T, H, D]. Differentiable.

    A token of a branch sees its path up to itself: the branch's context and the branch; of these the last `window` at most.
    `scaling` is 1 / sqrt(D) unless given. ValueError for other shapes.
    """
    _, num_heads, num_tokens, head_dim = query.shape
    num_kv_heads = key.shape[1]
    if key.shape != value.shape or key.shape != (1, num_kv_heads, num_tokens, head_dim) or num_heads % num_kv_heads:
        raise ValueError(f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}")
    if paths.starts[-1] != num_tokens:
        raise ValueError(f"paths over {paths.starts[-1]} tokens for a row of {num_tokens}")
    seen = (paths, head_dim**-0.5 if scaling is None else scaling, num_tokens if window is None else window)
    if torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value)):
        return _PackedAttention.apply(query, key, value, *seen)
    query, key, value = map(_side_by_side, (query, key, value))
    out = query.new_empty(1, num_tokens, num_heads, head_dim)
    library().packed_attention(ctypes.byref(_row(query, key, value, out, None, *seen)), torch.get_num_threads())
    return out


class _PackedAttention(torch.autograd.Function):
    """Keeps queries, keys, values, the result and a number per token and head."""

    @staticmethod
    def forward(ctx, query, key, value, paths, scaling, window):
        query, key, value = map(_side_by_side, (query, key, value))
        _, num_heads, num_tokens, head_dim = query.shape
        out = query.new_empty(1, num_tokens, num_heads, head_dim)
        log_sums = query.new_empty(num_tokens, num_heads)
        row = _row(query, key, value, out, log_sums, paths, scaling, window)
        library().packed_attention(ctypes.byref(row), torch.get_num_threads())
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.seen = (paths, scaling, window)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, log_sums = ctx.saved_tensors
        grad = grad.contiguous()
        grads = [each.new_empty(1, each.shape[2], each.shape[1], each.shape[3]) for each in (query, key, value)]
        row = _row(query, key, value, out, log_sums, *ctx.seen)
        gradients = _Gradients(*map(_address, (grad, *grads)))
        library().packed_attention_backward(ctypes.byref(row), ctypes.byref(gradients), torch.get_num_threads())
        return *(each.transpose(1, 2) for each in grads), None, None, None


def _side_by_side(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _row(query, key, value, out, log_sums, paths: Paths, scaling: float, window: int) -> _Row:
    return _Row(
        *(_address(tensor) for tensor in (query, key, value, out)),
        None if log_sums is None else _address(log_sums),
        *(tensor.stride(axis) for tensor in (query, key, value) for axis in (2, 1)),
        *(query.shape[1], key.shape[1], query.shape[3], len(paths.starts) - 1),
        *(array.ctypes.data for array in (paths.starts, paths.first_parts, paths.part_branch, paths.part_length)),
        *(window, scaling),
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x [..., D], weight [D], float32 -> weight x / sqrt(mean(x^2) + epsilon), the mean over D (arXiv 1910.07467, equation 4). Differentiable."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} for x {tuple(x.shape)}")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, epsilon)
    return _rms_norm(x, weight, epsilon)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    library().rms_norm(
        _address(x), _address(weight), _address(out), x[..., 0].numel(), x.shape[-1], epsilon, torch.get_num_threads()
    )
    return out


class _RMSNorm(torch.autograd.Function):
    """Keeps x and the weight for the backward, nothing else: a row's factor is a sum over what is read anyway."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return _rms_norm(x, weight, epsilon)

    @staticmethod
    def backward(ctx, grad):
        x, weight = (tensor.contiguous() for tensor in ctx.saved_tensors)
        grad = grad.contiguous()
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        addresses = (_address(tensor) for tensor in (grad, x, weight, grad_x, grad_weight))
        library().rms_norm_backward(*addresses, x[..., 0].numel(), x.shape[-1], ctx.epsilon, torch.get_num_threads())
        return grad_x, grad_weight, None


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up [...], float32 -> silu(gate) up, silu(x) = x / (1 + exp(-x)) (SwiGLU: arXiv 2002.05202, equation 6). Differentiable."""
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)}, up {tuple(up.shape)}")
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _GatedSilu.apply(gate, up)
    return _gated_silu(gate, up)


def _gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    library().gated_silu(*map(_address, (gate, up, out)), gate.numel(), torch.get_num_threads())
    return out


class _GatedSilu(torch.autograd.Function):
    """Keeps gate and up; PyTorch's two operators keep silu(gate) as well."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _gated_silu(gate, up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = (tensor.contiguous() for tensor in ctx.saved_tensors)
        grad = grad.contiguous()
        grads = torch.empty_like(gate), torch.empty_like(up)
        library().gated_silu_backward(*map(_address, (grad, gate, up, *grads)), gate.numel(), torch.get_num_threads())
        return grads


def log_sum_exp(x: torch.Tensor) -> torch.Tensor:
    """x [N, D], float32 -> log(sum(exp(x))) over D, float32 [N]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(len(x))
    library().log_sum_exp(_address(x), x.stride(0), _address(out), len(x), x.shape[1], torch.get_num_threads())
    return out


def fold_logits(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """x float32 [N, D], targets int64 [N] -> float32 [N, 6]: a row's largest x; with e = exp(x - largest) its sums of e, e x, e^2 and x; and the
    largest x before its target, the largest of all where that is D or more and -1e30 where it is 0 or less."""
    out = x.new_empty(len(x), 6)
    numbers = (len(x), x.shape[1], torch.get_num_threads())
    library().fold_logits(_address(x), _row_stride(x), _ids(targets), _address(out), *numbers)
    return out


def logits_gradient_(
    x: torch.Tensor,
    targets: torch.Tensor,
    log_sums: torch.Tensor,
    entropy: torch.Tensor,
    grad: torch.Tensor,
    grad_entropy: torch.Tensor,
) -> torch.Tensor:
    """Logits x float32 [N, D], changed in place to the gradient in them; targets int64 [N], of which those outside of 0 to D are in no entry.

    log_sums and entropy of the whole softmax, and the gradients in the target's log-prob and in the entropy, are float32 [N].
    With l = x - log_sums: -exp(l) (grad + grad_entropy (l + entropy)), and grad more at the target.
    """
    rows = (_address(each) for each in (log_sums, entropy, grad, grad_entropy))
    numbers = (len(x), x.shape[1], torch.get_num_threads())
    library().logits_gradient(_address(x), _row_stride(x), _ids(targets), *rows, *numbers)
    return x


def _row_stride(x: torch.Tensor) -> int:
    if x.stride(1) != 1:
        raise ValueError(f"a row's numbers lie {x.stride(1)} apart")
    return x.stride(0)


def _ids(tensor: torch.Tensor) -> int:
    if tensor.device.type != "cpu" or tensor.dtype != torch.int64 or not tensor.is_contiguous():
        raise ValueError(f"{tensor.dtype} on {tensor.device}, not int64 side by side on the CPU")
    return tensor.data_ptr()


def _address(tensor: torch.Tensor) -> int:
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        raise ValueError(f"{tensor.dtype} on {tensor.device}, not float32 on the CPU")
    return tensor.data_ptr()


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Raises InputError where they cannot be compiled or kept."""
    compiler = os.environ.get("CXX", "g++")
    processor = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))), ""
    )
    made_of = (SOURCE.read_text(encoding="utf-8"), compiler, *FLAGS, processor)
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refdpo"
    path = folder / f"kernels-{digest[:16]}.so"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Under its name it is whole: other workers may compile at the same moment.
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                _compile(compiler, Path(temporary) / path.name)
                os.replace(Path(temporary) / path.name, path)
        except OSError as error:
            raise InputError(
                f"the CPU's kernels cannot be kept: {error}",
                where=folder,
                next="Set XDG_CACHE_HOME to a folder that can be written.",
            ) from error
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise InputError(
            f"the compiled kernels cannot be loaded: {error}", where=path, next="Delete it: it will be made again."
        ) from error
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    loaded.packed_attention.argtypes = [pointer, ctypes.c_int]
    loaded.packed_attention_backward.argtypes = [pointer, pointer, ctypes.c_int]
    loaded.rms_norm.argtypes = [pointer, pointer, pointer, integer, integer, ctypes.c_float, ctypes.c_int]
    loaded.rms_norm_backward.argtypes = [*[pointer] * 5, integer, integer, ctypes.c_float, ctypes.c_int]
    loaded.gated_silu.argtypes = [*[pointer] * 3, integer, ctypes.c_int]
    loaded.gated_silu_backward.argtypes = [*[pointer] * 5, integer, ctypes.c_int]
    loaded.log_sum_exp.argtypes = [pointer, integer, pointer, integer, integer, ctypes.c_int]
    loaded.fold_logits.argtypes = [pointer, integer, pointer, pointer, integer, integer, ctypes.c_int]
    loaded.logits_gradient.argtypes = [pointer, integer, *[pointer] * 5, integer, integer, ctypes.c_int]
    for name in (
        "packed_attention",
        "packed_attention_backward",
        "rms_norm",
        "rms_norm_backward",
        "gated_silu",
        "gated_silu_backward",
        "log_sum_exp",
        "fold_logits",
        "logits_gradient",
    ):
        getattr(loaded, name).restype = None
    return loaded


def _compile(compiler: str, path: Path) -> None:
    advice = "Debian, Ubuntu: sudo apt-get install g++. Another one: CXX=/path/to/compiler. None at all: --layout padded."
    try:
        done = subprocess.run([compiler, *FLAGS, "-o", path, SOURCE], check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise InputError("packed scoring on a CPU needs a C++ compiler", where=compiler, found="none", next=advice) from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise InputError(f"the CPU's kernels do not compile: {said}", where=f"{compiler} {SOURCE}", next=advice)
