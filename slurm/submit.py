"""Both phases as two Slurm jobs, the second waiting for the first: the sbatch commands, printed or run.

sbatch … slurm/precompute.sbatch --dataset think --ref-store store/think                      -> 101
sbatch … --dependency=afterok:101 slurm/train.sbatch --ref-store store/think                  -> 102
"""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from options import Option
from store.command import VARIABLE, again
from store.errors import InputError, RefdpoError

ROOT = Path(__file__).resolve().parents[1]
"""The jobs start here, where the scripts find each other; they then work in the folder they were submitted from."""

PRECOMPUTE, TRAIN = "slurm/precompute.sbatch", "slurm/train.sbatch"
LOGS = "logs"

RESOURCES, MORE = "Resources", "Further options"

OF_THE_SITE = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_UMASK", "SLURM_DEBUG_FLAGS", "SLURM_EXIT_ERROR"}
"""Variables that sbatch itself reads, and that say nothing about a job."""

KIND_AND_NUMBER = re.compile(r"(?!gpu:)(?:[\w.-]+:)?\d+(?:,[\w.-]+:\d+)*")
"""gpu:4 is what --gres takes; to --gpus-per-node it is a kind of that name."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one phase asks for; GPUs, CPUs and memory are per node."""

    nodes: int = 1
    gpus: Annotated[
        str,
        Option("GPUs per node, with their kind where a cluster has several: 4, h100:4. One worker or rank for each.", RESOURCES),
    ] = "4"
    """As sbatch writes them: 4, h100:4, a100:2,h100:2."""
    cpus: Annotated[int, Option("CPUs per node.", RESOURCES)] = 32
    mem: Annotated[str, Option("Memory per node.", RESOURCES)] = "500G"
    time: Annotated[str, Option("Limit per job. A job is requeued some minutes before, and goes on.", RESOURCES)] = "24:00:00"
    partition: Annotated[str | None, Option("As for sbatch.", RESOURCES)] = None
    account: Annotated[str | None, Option("As for sbatch.", RESOURCES)] = None
    qos: Annotated[str | None, Option("As for sbatch.", RESOURCES)] = None
    sbatch_args: tuple[str, ...] = ()
    """Further options of sbatch; they come last and win."""

    def __post_init__(self):
        if not KIND_AND_NUMBER.fullmatch(self.gpus):
            raise InputError("no number of GPUs", where=f"--gpus {self.gpus}", expected="4, or with the kind: h100:4")
        if self.cpus < max(1, self.num_gpus):
            raise InputError("fewer CPUs than GPUs", where=f"--cpus {self.cpus}", expected=f"at least {max(1, self.num_gpus)}")

    @property
    def num_gpus(self) -> int:
        """Per node, of whatever kind."""
        return sum(int(part.rpartition(":")[2]) for part in self.gpus.split(","))

    def options(self) -> list[str]:
        """One task per node for sbatch; the scripts start a worker or rank for each of the node's GPUs."""
        named = {"partition": self.partition, "account": self.account, "qos": self.qos}
        return [
            f"--nodes={self.nodes}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={self.cpus}",
            f"--gpus-per-node={self.gpus}",
            f"--mem={self.mem}",
            f"--time={self.time}",
            *(f"--{name}={value}" for name, value in named.items() if value is not None),
        ]


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """`submit`: both phases. Beside these fields are those of Resources, for both phases and for each: cli.py."""

    dataset: Annotated[
        tuple[str, ...], Option("As for precompute: think | instruct | demo, a hub id, a file or a folder.", "Store")
    ]
    ref_store: Annotated[Path | None, Option("Folder of the store.", "Store", default="store/<dataset>")] = None
    array: Annotated[
        int | None,
        Option("Phase 1 as an array of N jobs, each with the resources below.", RESOURCES, default="one job", at_least=1),
    ] = None
    precompute_nodes: Annotated[int, Option("Nodes of (each job of) phase 1.", RESOURCES, at_least=1)] = 1
    train_nodes: Annotated[int, Option("Nodes of phase 2.", RESOURCES, at_least=1)] = 1
    sbatch_args: Annotated[str, Option("Further options of sbatch, for both jobs, quoted as one word.", MORE)] = ""
    precompute_sbatch_args: Annotated[str, Option("--sbatch-args of precompute alone.", hidden=True)] = ""
    train_sbatch_args: Annotated[str, Option("--sbatch-args of train alone.", hidden=True)] = ""
    precompute_args: Annotated[str, Option("Further options of precompute, quoted as one word.", MORE)] = ""
    train_args: Annotated[str, Option("Further options of train, quoted as one word.", MORE)] = ""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What to run, where, and on what. Options are those of `cli.py precompute` and `cli.py train`; paths are seen from `folder`."""

    folder: Path
    ref_store: Path
    precompute_options: tuple[str, ...]
    train_options: tuple[str, ...]
    precompute: Resources
    train: Resources
    array: int | None = None
    """Phase 1 as an array of so many independent jobs instead of one; each has the resources of `precompute`."""

    def precompute_command(self) -> list[str]:
        """sbatch for phase 1."""
        array = [] if self.array is None else [f"--array=0-{self.array - 1}"]
        return self._sbatch(array, self.precompute, PRECOMPUTE, self.precompute_options)

    def train_command(self, after: str) -> list[str]:
        """sbatch for phase 2, once the job `after` ended well. Should that fail, this job is cancelled instead of waiting without end."""
        chain = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
        return self._sbatch(chain, self.train, TRAIN, self.train_options)

    def _sbatch(self, first: list[str], resources: Resources, script: str, options: tuple[str, ...]) -> list[str]:
        logs = str(self.folder / LOGS).replace("%", "%%")
        places = [f"--chdir={ROOT}", f"--output={logs}/%x-%j.out"]
        script = str(ROOT / script)
        return ["sbatch", "--parsable", *first, *resources.options(), *places, *resources.sbatch_args, script, *options]


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
    # Slurm does not make it, and a job without its log fails without a word.
    (submission.folder / LOGS).mkdir(exist_ok=True)
    first = _sbatch(submission.precompute_command(), submission.folder)
    try:
        return first, _sbatch(submission.train_command(first), submission.folder)
    except RefdpoError as error:
        raise RefdpoError(
            f"phase 2 was not submitted: {error.what}", next=f"Phase 1 is job {first}: scancel {first} takes it back."
        ) from error


def _without_the_shells_job(environ: Mapping[str, str]) -> dict[str, str]:
    """Within a job, as in the shell of `srun --pty`, Slurm's variables describe that job. sbatch would hand them on, and srun in the new job reads
    them as options: "SLURM_MEM_PER_CPU, … and SLURM_MEM_PER_NODE are mutually exclusive", or CPUs that are not there."""
    if "SLURM_JOB_ID" not in environ:
        return dict(environ)
    return {name: value for name, value in environ.items() if not name.startswith("SLURM_") or name in OF_THE_SITE}


def _sbatch(command: list[str], folder: Path) -> str:
    environ = _without_the_shells_job(os.environ) | {VARIABLE: again()}  # what the jobs' own messages tell to type again
    try:
        done = subprocess.run(command, check=False, cwd=folder, env=environ, capture_output=True, text=True)
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
