"""Both phases as two Slurm jobs, the second waiting for the first: the sbatch commands, printed or run.

sbatch … slurm/precompute.sbatch --dataset think --ref-store store/think                      -> 101
sbatch … --dependency=afterok:101 slurm/train.sbatch --ref-store store/think                  -> 102
"""

import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from store.errors import InputError, RefdpoError

ROOT = Path(__file__).resolve().parents[1]
"""The jobs run here, whatever folder they are submitted from."""

PRECOMPUTE, TRAIN = "slurm/precompute.sbatch", "slurm/train.sbatch"
LOGS = "logs"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What to run, and on what. Resources are per node."""

    dataset: str
    ref_store: Path
    precompute_args: tuple[str, ...] = ()
    """Further options of `cli.py precompute`."""
    train_args: tuple[str, ...] = ()
    """Further options of `cli.py train`."""
    array: int | None = None
    """Phase 1 as an array of so many independent jobs instead of one; each has the resources below."""
    precompute_nodes: int = 1
    train_nodes: int = 1
    gpus: int = 4
    cpus: int = 32
    mem: str = "500G"
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    sbatch_args: tuple[str, ...] = ()
    """Further options of sbatch, for both jobs."""

    def __post_init__(self):
        if self.cpus < max(1, self.gpus):
            raise InputError("fewer CPUs than GPUs", where=f"--cpus {self.cpus}", expected=f"at least {max(1, self.gpus)}")

    def precompute_command(self) -> list[str]:
        """sbatch for phase 1: a worker per GPU, or one per node without GPUs."""
        workers = max(1, self.gpus)
        array = [] if self.array is None else [f"--array=0-{self.array - 1}"]
        layout = [f"--nodes={self.precompute_nodes}", f"--ntasks-per-node={workers}", f"--cpus-per-task={self.cpus // workers}"]
        options = ["--dataset", self.dataset, "--ref-store", str(self.ref_store), *self.precompute_args]
        return ["sbatch", "--parsable", *array, *layout, *self._resources(), PRECOMPUTE, *options]

    def train_command(self, after: str) -> list[str]:
        """sbatch for phase 2, once the job `after` ended well. Should that fail, this job is cancelled instead of waiting for ever."""
        chain = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
        layout = [f"--nodes={self.train_nodes}", "--ntasks-per-node=1", f"--cpus-per-task={self.cpus}"]
        return [
            "sbatch",
            "--parsable",
            *chain,
            *layout,
            *self._resources(),
            TRAIN,
            "--ref-store",
            str(self.ref_store),
            *self.train_args,
        ]

    def _resources(self) -> list[str]:
        named = {"partition": self.partition, "account": self.account, "qos": self.qos}
        options = [f"--gpus-per-node={self.gpus}", f"--mem={self.mem}", f"--time={self.time}", f"--chdir={ROOT}"]
        return [*options, *(f"--{name}={value}" for name, value in named.items() if value is not None), *self.sbatch_args]


def dry_run(submission: Submission) -> str:
    """The two commands and the scripts that they submit."""
    parts = [
        "# Would run:",
        shlex.join(submission.precompute_command()),
        shlex.join(submission.train_command("<job id of the first>")),
    ]
    for script in (PRECOMPUTE, TRAIN, "slurm/job.sh"):
        parts += ["", f"# ---- {script}", (ROOT / script).read_text().rstrip("\n")]
    return "\n".join(parts)


def submit(submission: Submission) -> tuple[str, str]:
    """Submit both jobs; return their ids. InputError where there is no Slurm, RefdpoError with sbatch's own words where it refuses."""
    (ROOT / LOGS).mkdir(exist_ok=True)  # Slurm does not make it, and a job without its log fails without a word
    first = _sbatch(submission.precompute_command())
    try:
        return first, _sbatch(submission.train_command(first))
    except RefdpoError as error:
        raise RefdpoError(
            f"phase 2 was not submitted: {error.what}", next=f"Phase 1 is job {first}: scancel {first} takes it back."
        ) from error


def _sbatch(command: list[str]) -> str:
    try:
        done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise InputError(
            "no sbatch here", where="submit", next="Run it on a Slurm login node; --dry-run shows what would be run."
        ) from error
    if done.returncode:
        reason = (
            "; ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.strip().splitlines())
            or f"exit code {done.returncode}"
        )
        raise RefdpoError(f"sbatch refused: {reason}", next=f"The command was: {shlex.join(command)}")
    return done.stdout.strip().split(";")[0]  # job id;cluster
