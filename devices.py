"""Which device is this process's, and can it be used? GPUs that are there and do not work are an error: nobody wants 7B on a CPU in silence."""

import ctypes
import os
import re
import warnings
from pathlib import Path

from store.command import in_step
from store.errors import InputError

DEVICE_FILES, DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")
"""Where NVIDIA's driver shows its GPUs and its version."""

ON_PURPOSE = 'To run on the CPU on purpose: export CUDA_VISIBLE_DEVICES=""'

NOT_STARTED = {
    "Error 802": "GPUs with NVSwitch need NVIDIA's fabric manager: sudo systemctl start nvidia-fabricmanager.",
    "Error 803": "The driver was updated while the machine ran: restart it.",
    "Error 804": "Take the folder of cuda-compat's libraries out of LD_LIBRARY_PATH: this GPU cannot use them.",
}
"""What to do where the driver is new enough and CUDA does not start all the same: cudaError_t 802 to 804, as PyTorch prints them."""


def num_gpus() -> int:
    """GPUs that this process sees; 0 where there are none, or CUDA_VISIBLE_DEVICES asks for none.

    Raises InputError where GPUs are there and CUDA cannot use them: a PyTorch for CPUs, a driver older than PyTorch's CUDA, and so on. Also
    where CUDA_VISIBLE_DEVICES names more GPUs than can be used: CUDA would go on without them, and without a word.
    """
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
        counted = torch.cuda.device_count()  # by the driver's own library, which needs no CUDA that works
    if hidden():
        return usable
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if usable:
        _refuse_fewer_than_named(usable)
        return usable
    there = max(counted, len(_openable_gpus()))
    if not there and chosen is None:
        return 0
    if not there:
        raise InputError(
            "names a GPU, and there is none here",
            where=f"CUDA_VISIBLE_DEVICES={chosen}",
            next=f"A container must be given the GPUs: docker run --gpus all, apptainer exec --nv. {ON_PURPOSE}",
        )
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
    elif said and "too old" not in found[-1] and _driver_is_enough():
        expected = "CUDA that starts"
        remedy = next((each for error, each in NOT_STARTED.items() if error in found[-1]), "Look at the driver with nvidia-smi.")
    else:
        expected = f"a driver for CUDA {torch.version.cuda} or newer"
        remedy = "Install PyTorch for the driver's CUDA (uv pip install --reinstall torch --torch-backend=auto), or a newer driver."
    raise InputError(
        f"{there} GPU{'s are' if there > 1 else ' is'} here, but PyTorch cannot use {'them' if there > 1 else 'it'}",
        expected=expected,
        found=", ".join(found),
        next=f"{remedy} {ON_PURPOSE}",
    )


def _refuse_fewer_than_named(usable: int) -> None:
    named = named_gpus()
    if named is None or usable >= len(named):
        return
    if any(each.startswith("MIG-") for each in named):
        expected, remedy = "one part of a GPU (MIG) for a process", "With srun, --gpus-per-task=1 gives each task its own."
    else:
        expected, remedy = "GPUs of this machine, each once", "nvidia-smi -L lists them."
    raise InputError(
        f"names {len(named)} GPUs, of which PyTorch can use {usable}",
        where=f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}",
        expected=expected,
        next=remedy,
    )


def named_gpus() -> list[str] | None:
    """The entries of CUDA_VISIBLE_DEVICES, up to a negative number, which ends the list by CUDA's rule; None where it is not set."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return None
    entries = [entry.strip() for entry in chosen.split(",")]
    end = next((place for place, entry in enumerate(entries) if re.fullmatch(r"-\d+", entry)), len(entries))
    return [entry for entry in entries[:end] if entry]


def hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES asks for no GPU: by hand, or as Slurm does for a job without any (NoDevFiles)."""
    return named_gpus() in ([], ["NoDevFiles"])


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
    own = not _shares_its_gpus(gpus, number)
    if own and gpus > number and _is_one_of_srun():
        of_each = f"one task for {'each GPU' if number == 1 else f'every {number} GPUs'}"
        raise InputError(
            f"each task has {gpus} GPUs and would use {number}",
            where="srun",
            expected=f"{of_each}: --ntasks-per-node={_tasks_here() * gpus // number}",
        )
    if own and gpus == number:
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

    # Where the devices themselves cannot be listed, PyTorch has an error of its own that is no RuntimeError.
    refusals = (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError)
    try:
        torch.zeros(1, device=where).add_(1).item()
    except refusals as error:  # no kernels for this GPU, taken by another process, in error, …
        try:
            name = torch.cuda.get_device_name(where)
            kind = "sm_{}{}".format(*torch.cuda.get_device_capability(where))
        except refusals:
            name, kind = "this GPU", "a GPU that does not answer"
        text = " ".join(str(error).split())
        if "kernel image" in text:
            remedy = "Install another PyTorch: uv pip install --reinstall torch --torch-backend=auto."
        else:
            remedy = "Look at it with nvidia-smi."
        if others := _all_but(where.index):
            remedy += f" To leave it out: export CUDA_VISIBLE_DEVICES={others}."
        raise InputError(
            f"{name} cannot be used: {text[:200]}",
            where=where,
            expected=f"a GPU of {', '.join(torch.cuda.get_arch_list())}, free and in order",
            found=f"{kind}, a driver for {driver()}, torch {torch.__version__} {_built_for()}",
            next=f"{remedy} {ON_PURPOSE}",
        ) from error


def _all_but(index: int) -> str:
    """A value of CUDA_VISIBLE_DEVICES without this one of the visible GPUs."""
    import torch

    visible = named_gpus() or [str(each) for each in range(torch.cuda.device_count())]
    return ",".join(visible[:index] + visible[index + 1 :])


def describe(where, num_processes: int, per_process: int = 1) -> str:
    """`device: 4 x NVIDIA B200 (torch 2.13.0+cu130)`: what a command prints first."""
    import torch

    number = num_processes * per_process
    if where.type == "cuda":
        here = torch.cuda.device_count()
        names = [torch.cuda.get_device_name(each) for each in (range(here) if here == number else (where,))]
        kinds = {name: names.count(name) if here == number else number for name in names}
    else:
        why = "CUDA_VISIBLE_DEVICES hides all GPUs" if hidden() else "no GPU found"
        kinds = {f"CPU with {torch.get_num_threads()} threads, {why}": number}
    all_of_them = ", ".join(f"{count} x {name}" if number > 1 else name for name, count in kinds.items())
    each = f", {per_process} to a worker" if per_process > 1 else ""
    return f"device: {all_of_them}{each} (torch {torch.__version__})"


def _shares_its_gpus(gpus: int, number: int) -> bool:
    """Whether the `gpus` GPUs that this process sees are those of other local processes as well, each of which wants `number`. A launcher's
    processes all see the same; a task of srun may have its own."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    here = os.environ.get("SLURM_GPUS_ON_NODE", "").strip()
    if gpus == number:
        return here.isdigit() and _tasks_here() * number > int(here)
    return not here.isdigit() or _tasks_here() * gpus != int(here)


def _is_one_of_srun() -> bool:
    """Whether srun started this process and others, and nobody between: a launcher numbers its processes by RANK."""
    return "RANK" not in os.environ and in_step() and os.environ.get("SLURM_NTASKS") != "1"


def _tasks_here() -> int:
    """Tasks of this Slurm step on this node: SLURM_STEP_TASKS_PER_NODE is `4(x2),3`, a number for each node; 1 without Slurm."""
    tasks = [
        int(number)
        for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        for _ in range(int(times or 1))
    ]
    node = os.environ.get("SLURM_NODEID", "0")
    return tasks[int(node)] if node.isdigit() and int(node) < len(tasks) else tasks[0] if tasks else 1


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
    try:
        number = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text())
    except OSError:
        number = None
    version = _cuda_of_driver()
    cuda = f"CUDA {version // 1000}.{version % 1000 // 10}" if version else "an unknown CUDA"
    return f"{cuda} ({number[0]})" if number else cuda


def _cuda_of_driver() -> int:
    """12080 for CUDA 12.8; 0 where it does not say."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        pass
    return version.value


def _driver_is_enough() -> bool:
    """Any of the same major version is, for PyTorch's CUDA."""
    import torch

    return _cuda_of_driver() // 1000 >= int(torch.version.cuda.split(".")[0])


def _built_for() -> str:
    import torch

    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    return f"built for ROCm {torch.version.hip}" if torch.version.hip else "built for CPUs"
