"""Which device is this process's, and can it be used? GPUs that are there and do not work are an error: nobody wants 7B on a CPU in silence."""

import ctypes
import os
import re
import warnings
from pathlib import Path

from store.errors import InputError

DEVICE_FILES, DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")
"""Where NVIDIA's driver shows its GPUs and its version."""

NO_GPU = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that mean "none": by hand, and Slurm's for a job without GPUs."""

ON_PURPOSE = 'To run on the CPU on purpose: export CUDA_VISIBLE_DEVICES=""'


def num_gpus() -> int:
    """GPUs that this process sees; 0 where there are none, or CUDA_VISIBLE_DEVICES asks for none.

    Raises InputError where GPUs are there and CUDA cannot use them: a PyTorch for CPUs, a driver older than PyTorch's CUDA, and so on.
    """
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
        counted = torch.cuda.device_count()  # by the driver's own library, which needs no CUDA that works
    if usable or hidden():
        return usable
    there = max(counted, len(_openable_gpus()))
    if not there:
        return 0
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = [f"a driver for {driver()}", f"torch {torch.__version__} {_built_for()}"]
    if chosen is not None:
        found.append(f"CUDA_VISIBLE_DEVICES={chosen}")
    found += [" ".join(str(each.message).split())[:300] for each in said][-1:]
    # Slurm sets CUDA_VISIBLE_DEVICES for every job. It is to blame where the driver counts no GPU behind it and has nothing else to say.
    masked = chosen is not None and not counted and not said
    if torch.version.cuda is None:
        expected, remedy = (
            "a PyTorch built for CUDA",
            "Install PyTorch for CUDA: uv pip install --reinstall torch --torch-backend=auto.",
        )
    elif masked:
        expected = f"GPUs of this machine in CUDA_VISIBLE_DEVICES, and a driver for CUDA {torch.version.cuda} or newer"
        remedy = "Name GPUs that this machine has: nvidia-smi -L lists them."
    else:
        expected = f"a driver for CUDA {torch.version.cuda} or newer"
        remedy = "Install PyTorch for the driver's CUDA (uv pip install --reinstall torch --torch-backend=auto), or a newer driver."
    raise InputError(
        f"{there} GPU{'s are' if there > 1 else ' is'} here, but PyTorch cannot use {'them' if there > 1 else 'it'}",
        expected=expected,
        found=", ".join(found),
        next=f"{remedy} {ON_PURPOSE}",
    )


def hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES asks for no GPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in NO_GPU


def device(local_rank: int):
    """The GPU of this local rank, or the CPU of a machine that has none. Raises InputError when there are GPUs but not this one, or when
    it does not compute."""
    return devices(local_rank, 1)[0]


def devices(local_rank: int, number: int) -> tuple:
    """The `number` GPUs of this local rank, next to each other; one: or the CPU. Raises InputError as `device`, and where there is no GPU for
    several."""
    import torch

    gpus = num_gpus()
    if gpus == 0 and number > 1:
        raise InputError("there are no GPUs", where=f"--gpus-per-worker {number}", next="Leave it out on the CPU.")
    if gpus == 0:
        return (torch.device("cpu"),)
    if gpus == number and not _shares_its_gpus(number):
        local_rank = 0  # srun --gpus-per-task=1: of each task's GPUs, the only one is number 0
    if (local_rank + 1) * number > gpus:
        most = gpus // number
        raise InputError(
            f"no GPU for local rank {local_rank}" if number == 1 else f"no {number} GPUs for local rank {local_rank}",
            where=None if number == 1 else f"--gpus-per-worker {number}",
            expected=f"at most {most} process{'' if most == 1 else 'es'} on this machine",
            found=None if number == 1 else f"{gpus} GPUs",
            next="Lower --num-workers or the launcher's count.",
        )
    mine = tuple(torch.device("cuda", index) for index in range(local_rank * number, (local_rank + 1) * number))
    for each in mine:
        _refuse_unusable(each)
    return mine


def _refuse_unusable(where) -> None:
    import torch

    try:
        torch.zeros(1, device=where).add_(1).item()
    except RuntimeError as error:  # no kernels for this GPU, taken by another process, in error, …
        major, minor = torch.cuda.get_device_capability(where)
        raise InputError(
            f"{torch.cuda.get_device_name(where)} cannot be used: {' '.join(str(error).split())[:200]}",
            where=where,
            expected=f"a GPU of {', '.join(torch.cuda.get_arch_list())}, free and in order",
            found=f"sm_{major}{minor}, a driver for {driver()}, torch {torch.__version__} {_built_for()}",
            next=f"Look at it with nvidia-smi; for another PyTorch: uv pip install --reinstall torch --torch-backend=auto. {ON_PURPOSE}",
        ) from error


def describe(where, num_processes: int, per_process: int = 1) -> str:
    """`device: 4 x NVIDIA B200 (torch 2.13.0+cu130)`: what a command prints first."""
    import torch

    number = num_processes * per_process
    several = f"{number} x " if number > 1 else ""
    if where.type == "cuda":
        name = torch.cuda.get_device_name(where)
    else:
        name = (
            f"CPU with {torch.get_num_threads()} threads, {'CUDA_VISIBLE_DEVICES hides all GPUs' if hidden() else 'no GPU found'}"
        )
    each = f", {per_process} to a worker" if per_process > 1 else ""
    return f"device: {several}{name}{each} (torch {torch.__version__})"


def _shares_its_gpus(number: int) -> bool:
    """Whether the GPUs that this process sees are those of other local processes as well, each of which wants `number`. A launcher's processes
    all see the same; a task of srun may have its own."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    tasks = int(re.match(r"\d*", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))[0] or 1)
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "").strip()
    return gpus.isdigit() and tasks * number > int(gpus)


def _openable_gpus() -> list[Path]:
    """Those that this process may use: a job's control group closes the others, and a container does not show them."""
    return [path for path in DEVICE_FILES.glob("nvidia[0-9]*") if os.access(path, os.R_OK | os.W_OK) and _opens(path)]


def _opens(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


def driver() -> str:
    """`CUDA 12.8 (570.86.10)`, as far as the driver says."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        pass
    try:
        number = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text())
    except OSError:
        number = None
    cuda = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}" if version.value else "an unknown CUDA"
    return f"{cuda} ({number[0]})" if number else cuda


def _built_for() -> str:
    import torch

    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
