"""The processes of a run: how each joins the others, and what they must agree on."""

import os
import resource
import socket
import time
from pathlib import Path

import torch
import torch.distributed
from torch.utils.cpp_extension import get_default_build_root

from launch import Process
from store.errors import InputError
from store.select import Selection

BUILD_MINUTES = 15
"""DeepSpeed's CPU operator is compiled in one; on a crowded machine in some."""


def refuse_abandoned_build() -> None:
    """InputError where a process was killed while it compiled DeepSpeed's CPU operator: PyTorch would wait for its lock without end and without a word."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob("**/deepspeed_shm_comm/lock"):
        minutes = (time.time() - lock.parent.stat().st_mtime) / 60  # files come and go there while it is compiled
        if minutes > BUILD_MINUTES:
            raise InputError(
                "a process was killed while it compiled DeepSpeed's CPU operator, and its lock is left",
                where=lock,
                found=f"nothing was compiled there for {minutes:.0f} minutes",
                next=f"Remove it: rm {lock}",
            )


def join(process: Process) -> None:
    """Give torch.distributed the environment it reads, where the launcher is srun or nobody. DeepSpeed wants it even for one process.

    InputError where several machines do not know where rank 0 is.
    """
    environ = os.environ
    environ |= {"RANK": str(process.rank), "WORLD_SIZE": str(process.world), "LOCAL_RANK": str(process.local_rank)}
    if "MASTER_ADDR" in environ and "MASTER_PORT" in environ:
        return
    if process.world > 1 and environ.get("SLURM_STEP_NUM_NODES", "1") != "1":
        raise InputError(
            "several machines need to know where rank 0 is",
            where="environment",
            expected="MASTER_ADDR and MASTER_PORT",
            next="Start through torchrun or accelerate launch, or export both before srun.",
        )
    environ["MASTER_ADDR"] = "127.0.0.1"
    environ["MASTER_PORT"] = str(_free_port() if process.world == 1 else 20000 + int(environ.get("SLURM_JOB_ID", 0)) % 20000)


def agree(selection: Selection, device: torch.device) -> None:
    """InputError on every rank unless all chose the same pairs in the same order: else some would be trained twice, others never."""
    if not torch.distributed.is_initialized() or selection.everything:
        return
    mine = torch.tensor([int(selection.pair_ids_sha256[:15], 16), int(selection.eval_pair_ids_sha256[:15], 16)], device=device)
    of_first = mine.clone()
    torch.distributed.broadcast(of_first, src=0)
    differ = torch.tensor(int(not torch.equal(mine, of_first)), device=device)
    torch.distributed.all_reduce(differ)
    if differ:
        raise InputError(
            "the processes chose different pairs", where="--where, --order-by", next="Use SQL that gives the same answer each time."
        )


def peak_memory(device: torch.device) -> int:
    """Bytes, of the rank that needed most."""
    mine = (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    if not torch.distributed.is_initialized():
        return mine
    largest = torch.tensor(mine, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
