"""Compile and load device.cpp, then let torch.cuda speak of its devices. Import this before torch."""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

SOURCE = Path(__file__).with_name("device.cpp")
FLAGS = ("-std=c++20", "-O1", "-shared", "-fPIC")
NAME = "NVIDIA B200 (made up)"


def compiled(torch_folder: Path) -> Path:
    """The library, made again when the source, the flags, PyTorch or the compiler's name change."""
    compiler = os.environ.get("CXX", "g++")
    version = (torch_folder / "version.py").read_text(encoding="utf-8")
    digest = hashlib.sha256("\0".join((SOURCE.read_text(encoding="utf-8"), version, compiler, *FLAGS)).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refdpo"
    path = folder / f"made-up-gpu-{digest[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        include = torch_folder / "include"
        includes = [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
        with tempfile.TemporaryDirectory(dir=folder) as temporary:  # other processes may compile at the same moment
            made = Path(temporary) / path.name
            subprocess.run([compiler, *FLAGS, *includes, "-o", made, SOURCE], check=True)
            os.replace(made, path)
    return path


assert "torch" not in sys.modules, "made_up_gpu.load must be imported before torch"
_folder = Path(importlib.util.find_spec("torch").origin).parent
for _name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
    ctypes.CDLL(str(_folder / "lib" / _name), ctypes.RTLD_GLOBAL)
library = ctypes.CDLL(str(compiled(_folder)))
for _name in ("gpu_held", "gpu_most_held", "gpu_counts"):
    getattr(library, _name).restype = ctypes.c_int64
library.gpu_counts.argtypes = [ctypes.c_char_p, ctypes.c_int64]
library.gpu_make.argtypes = [ctypes.c_int, ctypes.c_int64]


def visible_gpus() -> int:
    """As CUDA reads CUDA_VISIBLE_DEVICES: the first entry that is no GPU ends the list."""
    existing = int(os.environ["MADE_UP_GPUS"])
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return existing
    entries = [entry.strip() for entry in chosen.split(",")]
    good = [entry.isdigit() and int(entry) < existing for entry in entries]
    return (good + [False]).index(False)


NUM = visible_gpus()
MEMORY = int(float(os.environ.get("MADE_UP_GIB", "4")) * 2**30)
library.gpu_make(max(NUM, 1), MEMORY)

import torch
import torch.cuda
import torch.distributed

cuda = torch.cuda


def counts() -> dict[str, int]:
    """Since clear_counts(): operators by name, and `launches`, `waits`, `to device`."""
    text = ctypes.create_string_buffer(1 << 20)
    assert library.gpu_counts(text, len(text)) < len(text)
    return {name: int(number) for name, number in (line.split("\t") for line in text.value.decode().splitlines())}


def clear_counts() -> None:
    library.gpu_clear_counts()


def _index(device=None) -> int:
    if device is None or (isinstance(device, int) and device < 0):
        return library.gpu_current()
    index = device if isinstance(device, int) else torch.device(device).index
    return library.gpu_current() if index is None else index


def _set_device(device) -> None:
    if _index(device) >= NUM:
        raise RuntimeError("CUDA error: invalid device ordinal")
    library.gpu_set_current(_index(device))


def _exchange_device(index: int) -> int:
    before = library.gpu_current()
    library.gpu_set_current(index)
    return before


def _lazy_init() -> None:
    if not NUM:
        raise RuntimeError("No CUDA GPUs are available")


def _synchronize(device=None) -> None:
    library.gpu_count(b"waits")


class Stream(torch.Stream):
    """There is one, and it is never behind."""

    cuda_stream = 0

    def __new__(cls, device=None, priority=0, **kwargs):
        return torch.Stream.__new__(cls, stream_id=0, device_index=_index(device), device_type=1)

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def wait_stream(self, other) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _synchronize()

    def record_event(self, event=None):
        event = event or Event()
        event.record()
        return event


class Event:
    def __init__(self, *args, **kwargs):
        self.time = 0.0

    def record(self, stream=None) -> None:
        self.time = time.perf_counter()

    def wait(self, stream=None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _synchronize()

    def elapsed_time(self, later) -> float:
        return (later.time - self.time) * 1e3


def _random_state() -> torch.Tensor:
    return torch.zeros(16, dtype=torch.uint8)


vars(cuda).update(
    # which devices there are; each a function of its own, or torch.compile's tables of torch.cuda's functions clash
    is_available=lambda: NUM > 0,
    device_count=lambda: NUM,
    init=lambda: _lazy_init(),
    is_initialized=lambda: True,
    _lazy_init=_lazy_init,
    _lazy_call=lambda call, **kwargs: call(),
    current_device=lambda: library.gpu_current(),
    set_device=_set_device,
    _exchange_device=lambda index: _exchange_device(index),
    _maybe_exchange_device=lambda index: _exchange_device(index),
    get_device_name=lambda device=None: NAME,
    get_device_capability=lambda device=None: (10, 0),
    get_device_properties=lambda device=None: SimpleNamespace(
        name=NAME, major=10, minor=0, total_memory=MEMORY, multi_processor_count=148, warp_size=32, gcnArchName=""
    ),
    get_arch_list=lambda: ["sm_100"],
    is_bf16_supported=lambda *args, **kwargs: True,
    can_device_access_peer=lambda one, other: True,
    # memory
    mem_get_info=lambda device=None: (MEMORY - library.gpu_held(_index(device)), MEMORY),
    memory_allocated=lambda device=None: library.gpu_held(_index(device)),
    memory_reserved=lambda device=None: library.gpu_held(_index(device)),
    max_memory_allocated=lambda device=None: library.gpu_most_held(_index(device)),
    max_memory_reserved=lambda device=None: library.gpu_most_held(_index(device)),
    reset_peak_memory_stats=lambda device=None: library.gpu_reset_most_held(_index(device)),
    memory_stats=lambda device=None: {},
    empty_cache=lambda *args, **kwargs: None,
    ipc_collect=lambda *args, **kwargs: None,
    # streams
    synchronize=_synchronize,
    Stream=Stream,
    Event=Event,
    stream=lambda stream: contextlib.nullcontext(),
    current_stream=lambda device=None: Stream(device),
    default_stream=lambda device=None: Stream(device),
    set_stream=lambda *args, **kwargs: None,
    is_current_stream_capturing=lambda: False,
    nvtx=SimpleNamespace(
        range_push=lambda *args, **kwargs: None,
        range_pop=lambda *args, **kwargs: None,
        mark=lambda *args, **kwargs: None,
        range=lambda *args, **kwargs: contextlib.nullcontext(),
    ),
    # random numbers come from the CPU's generator
    manual_seed=lambda *args, **kwargs: None,
    manual_seed_all=lambda *args, **kwargs: None,
    get_rng_state=lambda device=None: _random_state(),
    get_rng_state_all=lambda: [_random_state() for _ in range(NUM)],
    set_rng_state=lambda *args, **kwargs: None,
    set_rng_state_all=lambda *args, **kwargs: None,
)
torch.version.cuda = "13.0"


# ---- NCCL: gloo, on the same memory

library.gpu_take_collectives()
_c10d = torch.distributed.distributed_c10d
_init_process_group, _new_group = _c10d.init_process_group, _c10d.new_group


def _init(backend=None, *args, device_id=None, pg_options=None, **kwargs):
    return _init_process_group("gloo" if backend is None or "nccl" in backend else backend, *args, **kwargs)


def _group(ranks=None, timeout=None, backend=None, pg_options=None, *args, device_id=None, **kwargs):
    return _new_group(ranks, timeout, "gloo" if backend is not None and "nccl" in backend else backend, None, *args, **kwargs)


for _module in (torch.distributed, _c10d):
    _module.init_process_group, _module.new_group = _init, _group
    _module.is_nccl_available = lambda: True


# ---- kernels that the CPU does not have

from made_up_gpu import flash

flash.take_the_place_of_cudas()
