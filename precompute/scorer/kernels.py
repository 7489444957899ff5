"""Kernels for float32 on a CPU, in C++ (kernels.cpp): attention over a packed row, RMS norm, log-sum-exp.

They are compiled at first use, for this machine's processor, and kept in the user's cache folder. Of these, RMS norm has a gradient.
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
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out")),
        *((f"{name}_{axis}", ctypes.c_int64) for name in ("query", "key", "value") for axis in ("token", "head")),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_kv_heads", "head_dim", "num_branches")),
        *((name, ctypes.c_void_p) for name in ("starts", "first_parts", "part_branch", "part_length")),
        ("window", ctypes.c_int64),
        ("scaling", ctypes.c_float),
    ]


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
    """query [1, H, T, D], key and value [1, Hkv, T, D], float32, channels side by side in memory -> [1, T, H, D].

    A token of a branch sees its path up to itself: the branch's context and the branch; of these the last `window` at most.
    `scaling` is 1 / sqrt(D) unless given. ValueError for other shapes.
    """
    _, num_heads, num_tokens, head_dim = query.shape
    num_kv_heads = key.shape[1]
    if key.shape != value.shape or key.shape != (1, num_kv_heads, num_tokens, head_dim) or num_heads % num_kv_heads:
        raise ValueError(f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}")
    if paths.starts[-1] != num_tokens:
        raise ValueError(f"paths over {paths.starts[-1]} tokens for a row of {num_tokens}")
    query, key, value = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (query, key, value))
    out = query.new_empty(1, num_tokens, num_heads, head_dim)
    row = _Row(
        *(_address(tensor) for tensor in (query, key, value, out)),
        *(tensor.stride(axis) for tensor in (query, key, value) for axis in (2, 1)),
        *(num_heads, num_kv_heads, head_dim, len(paths.starts) - 1),
        *(array.ctypes.data for array in (paths.starts, paths.first_parts, paths.part_branch, paths.part_length)),
        num_tokens if window is None else window,
        head_dim**-0.5 if scaling is None else scaling,
    )
    library().packed_attention(ctypes.byref(row), torch.get_num_threads())
    return out


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


def log_sum_exp(x: torch.Tensor) -> torch.Tensor:
    """x [N, D], float32 -> log(sum(exp(x))) over D, float32 [N]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(len(x))
    library().log_sum_exp(_address(x), x.stride(0), _address(out), len(x), x.shape[1], torch.get_num_threads())
    return out


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
    loaded.rms_norm.argtypes = [pointer, pointer, pointer, integer, integer, ctypes.c_float, ctypes.c_int]
    loaded.rms_norm_backward.argtypes = [*[pointer] * 5, integer, integer, ctypes.c_float, ctypes.c_int]
    loaded.log_sum_exp.argtypes = [pointer, integer, pointer, integer, integer, ctypes.c_int]
    for function in (loaded.packed_attention, loaded.rms_norm, loaded.rms_norm_backward, loaded.log_sum_exp):
        function.restype = None
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
