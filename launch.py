"""Which process am I, and starting one process per GPU where no launcher did.

Follows torchrun and accelerate launch (RANK, WORLD_SIZE, LOCAL_RANK) and srun (SLURM_PROCID, ...). A Slurm array task without srun is a machine
of its own: it starts its local processes itself, like a laptop.
"""

import os
import subprocess
import sys
import threading
from dataclasses import dataclass

from devices import num_gpus
from stop import SIGNALS, STOP_TRAINING, Stopped, passing_on
from store.command import again, in_step
from store.errors import InputError

SIGNALS_TO_HANDLE = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What torchrun hands on to its ranks before it ends; without SIGUSR1 that would kill it and leave them behind."""


@dataclass(frozen=True)
class Process:
    """This process among those that do the same work: `rank` of `world`, and `local_rank` on this machine."""

    rank: int
    world: int
    local_rank: int


def launched() -> Process | None:
    """This process as its launcher numbered it, or None when it was started by hand."""
    environ = os.environ
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return Process(int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", 0)))
    # The batch script itself also has SLURM_PROCID; only inside a step did srun number the processes.
    if in_step() and "SLURM_PROCID" in environ:
        task = Process(int(environ["SLURM_PROCID"]), int(environ["SLURM_NTASKS"]), int(environ["SLURM_LOCALID"]))
        # The only task of a step is a machine of its own, too: it starts a process for each of its GPUs.
        return None if task == Process(rank=0, world=1, local_rank=0) else task
    return None


def place_among_all(process: Process) -> tuple[int, int]:
    """(this worker's number, how many workers there are), counted over the tasks of a Slurm array as over ranks. Only saves workers
    from asking for the same shard at once; any number is right."""
    environ = os.environ
    task, tasks = int(environ.get("SLURM_ARRAY_TASK_ID", 0)), int(environ.get("SLURM_ARRAY_TASK_COUNT", 1))
    first = int(environ.get("SLURM_ARRAY_TASK_MIN", 0))
    return (task - first) % tasks * process.world + process.rank, tasks * process.world


def num_local_processes(requested: int | None, default_without_gpu: int, gpus_per_process: int = 1) -> int:
    """One per GPU, or per `gpus_per_process` of them, else `default_without_gpu`; or what was requested. Raises InputError for more than there are
    GPUs, for GPUs that would be left over, and for GPUs that do not work."""
    gpus = num_gpus()
    most = gpus // gpus_per_process
    if gpus and (most == 0 or (requested is None and gpus % gpus_per_process)):
        raise InputError(
            "more GPUs than there are" if most == 0 else "some GPUs would do nothing",
            where=f"--gpus-per-worker {gpus_per_process}",
            expected=f"a divisor of {gpus}, the number of GPUs here",
            next="Use one that is." if most == 0 else f"Use one that is, or --num-workers {most}.",
        )
    if requested is None:
        # A task of srun without a GPU is one process, as Slurm was told; a machine that nobody divided may be two.
        return most or (1 if in_step() else default_without_gpu)
    if requested < 1 or (gpus and requested > most):
        raise InputError("no such number of processes", expected=f"1 to {most if gpus else 'the number of cores'}", found=requested)
    return requested


def run_workers(num_workers: int) -> int:
    """Run this command again as `num_workers` local processes; return the first failure's exit code, or 0.

    Workers do not talk to each other. Each distinct `Error:` line is shown once, at once, and again at the end where others went on after it.
    A worker that ends does not stop the others: its shards are taken over. SIGUSR1 and SIGTERM are passed on.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    errors: dict[str, int] = {}
    workers, readers = [], []
    with passing_on(workers):
        for index in range(num_workers):
            env = os.environ | {"RANK": str(index), "WORLD_SIZE": str(num_workers), "LOCAL_RANK": str(index)}
            env.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_workers)))
            worker = subprocess.Popen([sys.executable, *sys.argv], env=env, stderr=subprocess.PIPE)
            reader = threading.Thread(target=_relay, args=(worker.stderr, index, errors, True), daemon=True)
            reader.start()
            workers.append(worker)
            readers.append(reader)
        try:
            codes = [worker.wait() for worker in workers]
        except KeyboardInterrupt:
            for worker in workers:
                worker.terminate()
            raise
    for reader in readers:
        reader.join()
    for line in errors if 0 in codes else ():
        print(line, file=sys.stderr)
    for index, code in enumerate(codes):
        if code < 0:
            print(f"worker {index} was killed by signal {-code}", file=sys.stderr)
    if any(-code in SIGNALS for code in codes):  # told to stop before it had begun to listen
        return Stopped.exit_code
    return next((code for code in codes if code > 0), 0)


def _relay(stream, index: int, errors: dict[str, int], show_errors: bool) -> None:
    """Pass a process's stderr on as it comes: that of number 0 as it is, the others' with their number. An `Error:` line is kept in `errors`, with
    the number of the process that said it first; the first of its kind is shown with `show_errors`, and otherwise what comes after it is not shown either."""
    prefix = b"" if index == 0 else f"[worker {index}] ".encode()
    line = b""

    def take(whole: bytes) -> None:
        if whole.startswith(b"Error:"):
            text = whole.decode(errors="replace").rstrip()
            if errors.setdefault(text, index) == index and show_errors:
                print(text, file=sys.stderr, flush=True)
        elif show_errors or not errors:
            sys.stderr.buffer.write(prefix + whole)
            sys.stderr.buffer.flush()

    while chunk := stream.read1():
        line += chunk
        while (end := max(line.find(b"\n"), line.find(b"\r"))) >= 0:
            take(line[: end + 1])
            line = line[end + 1 :]
    if line:
        take(line)


def run_torchrun(num_processes: int) -> int:
    """Run this command again as `num_processes` ranks of one distributed job on this machine; return its exit code.

    Where ranks stop with an `Error:` line it is shown once, without torchrun's own account of it. Signals reach torchrun from here
    alone: in a session of its own it does not hear a Ctrl-C a second time from the terminal.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        SIGNALS_TO_HANDLE,
        f"--nproc_per_node={num_processes}",
        *sys.argv,
    ]
    # The ranks get the time to write a checkpoint before torchrun kills them; a batch system kills earlier if it must.
    env = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600"} | os.environ
    agent, errors = [], {}
    with passing_on(agent, STOP_TRAINING) as told:
        agent.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, start_new_session=True))
        _relay(agent[0].stderr, 0, errors, show_errors=False)
        code = agent[0].wait()
    for line in errors:
        print(line, file=sys.stderr)
    if told.insisted:
        raise Stopped(
            "ended at once by a second Ctrl-C; steps after the last checkpoint are lost",
            next=f"To go on from there: {again('--resume-or-start')}",
        )
    return Stopped.exit_code if code and told.soon else code  # torchrun itself has one exit code for all that can happen
