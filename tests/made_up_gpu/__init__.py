"""GPUs that are made up: whole commands and single tests run on "cuda" tensors on a machine that has no GPU.

`environment(...)` is what a process needs to find them: Python runs start/sitecustomize.py before anything else, and that loads device.cpp
(compiled at first use, kept in the user's cache folder) before torch is imported. From then on torch.cuda has devices. Their tensors lie in the
host's memory and every operator is the CPU's, so values are real.

seen      tensors of two devices in one operator, a wrong current device, memory that is read before it is written (it begins as NaN), arguments that
          flash attention refuses, memory that runs out, and how often the host launches, copies and waits (counts)
not seen  real kernels and their rounding, speed, NCCL (gloo moves the bytes), Triton, CUDA's streams, allocator and graphs

A build of PyTorch for CUDA brings its own devices: there the tests of tests/on_gpu run on a real GPU, or are skipped.
"""

import importlib.metadata
import os
from pathlib import Path

HERE = Path(__file__).parent


def possible() -> bool:
    """Whether this PyTorch leaves the place of CUDA free."""
    return importlib.metadata.version("torch").endswith("+cpu")


def environment(num_gpus: int = 1, gib: float = 4.0, **others: str) -> dict[str, str]:
    """The variables of a process with `num_gpus` GPUs of `gib` GiB each, on top of this process's own."""
    root = HERE.parent.parent
    paths = [str(HERE / "start"), str(HERE.parent), str(root)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "MADE_UP_GPUS": str(num_gpus),
        "MADE_UP_GIB": str(gib),
        "OMP_NUM_THREADS": "1",
        **others,
    }
