"""The command that a person typed: found out, kept with the store that it makes, and printed again so that following it works."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from store import record

VARIABLE = "REFDPO_COMMAND"
"""Environment variable with the whole command where no process can find it out: slurm/submit.py and slurm/job.sh set it for their jobs."""


INSTALLED = "refdpo"
"""What `pip install` calls cli.py."""

called_with: list[str] | None = None
"""Arguments of a command line that runs inside another program, a notebook or a test: then the process's own say nothing."""


@dataclass(frozen=True)
class Command:
    """What makes a store, as it was asked for. Recorded for people, never compared: `store.manifest.Identity` is what counts."""

    words: tuple[str, ...]
    """As typed, launcher included: `typed()`."""
    folder: str
    """Where it was typed; relative paths begin there."""
    ref_store: str
    limit: int | None
    chat_template: str | None
    shard_size: int | None
    """None: the default, which follows from the number of rows."""
    columns: str | None = field(default=None, metadata=record.OPTIONAL)
    """The options that say what the dataset's columns mean, as words; None: none were given."""

    @classmethod
    def now(
        cls,
        ref_store: Path,
        *,
        limit: int | None = None,
        chat_template: Path | None = None,
        shard_size: int | None = None,
        columns: str = "",
    ) -> "Command":
        """The command that runs now, with those of its options that decide which rows and template a store is made of."""
        template = None if chat_template is None else str(chat_template)
        return cls(typed(), os.getcwd(), str(ref_store), limit, template, shard_size, columns or None)

    def to_json(self) -> dict:
        """For the records of a store."""
        return asdict(self) | {"words": list(self.words)}

    def line(self, store: Path) -> str | None:
        """To type it here and now for `store`; None where it would not work: on another machine, or for a store that was moved."""
        try:
            here = os.path.samefile(os.path.join(self.folder, self.ref_store), store)
        except OSError:
            here = False
        return self.text() if here else None

    def text(self) -> str:
        """For the shell, with the folder it belongs to unless that is this one. Control characters come out as `?`."""
        text = shlex.join(self.words)
        if Path(self.folder) != Path.cwd():
            text = f"cd {shlex.quote(self.folder)} && {text}"
        return "".join(each if each.isprintable() else "?" for each in text)


def again(*more: str) -> str:
    """The command that runs now, to be typed again in the same folder, with the options `more` added where it has not got them."""
    return shlex.join([*(words := typed()), *(option for option in more if option not in words)])


def cli(*words: object) -> str:
    """A command of this project, `python cli.py train …` or `refdpo train …`, to be typed in this folder: by the program that a person named."""
    return shlex.join([*_program(), *map(str, words)])


def _program() -> list[str]:
    if called_with is not None:
        return ["python", "cli.py"]
    number = len(sys.argv) - 1
    started = [*sys.orig_argv[: len(sys.orig_argv) - number]]
    if line := os.environ.get(VARIABLE):
        words = shlex.split(line)
        heads = [words[: place + 1] for place in range(len(words))]
    else:
        words = _typed()
        heads = [words[: len(words) - number]]
    script = [INSTALLED] if Path(sys.argv[0]).name == INSTALLED else None
    found = (program for head in (*heads, started) if (program := _started_by(head)) is not None)
    return next(found, script or ["python", "cli.py"])


def _started_by(head: list[str]) -> list[str] | None:
    """What of a command line up to this project's name starts it: `refdpo`; or cli.py, with the Python that stands before it, or beside the
    launcher. None where it does not end in that name."""
    name, as_module = head[-1] if head else "", head[-2:] == ["-m", "cli"]
    uv = head[:2] if head[:2] == ["uv", "run"] else []
    if Path(name).name == INSTALLED:
        return [*uv, _short(name)]
    if not as_module and Path(name).name != "cli.py":
        return None
    pythons = [each for each in head if re.fullmatch(r"python[\d.]*", Path(each).name)]
    beside = [str(Path(each).with_name("python")) for each in head[:-1] if os.path.dirname(each)]
    python = next((each for each in (*reversed(pythons), *beside) if shutil.which(each)), "python")
    return [*uv, _short(python), *(["-m", name] if as_module else [_short(name)])]


def _short(path: str) -> str:
    """As a person would type it here."""
    if not os.path.isabs(path):
        return path
    if shutil.which(Path(path).name) == path:
        return Path(path).name
    inside = os.path.relpath(path)
    return path if inside.startswith(os.pardir) else inside


def typed() -> tuple[str, ...]:
    """The command that runs now, as a person typed it, with the launcher that started this process (torchrun, accelerate, srun, uv run, …)."""
    return tuple(word.encode(errors="surrogateescape").decode(errors="replace") for word in _typed())


def _typed() -> list[str]:
    if line := os.environ.get(VARIABLE):
        return shlex.split(line)
    if called_with is not None:
        return ["python", "cli.py", *called_with]
    arguments = sys.argv[1:]
    words, process = list(sys.orig_argv), os.getpid()
    # A launcher's command line ends with that of what it launches, and so does that of the process that started this one as a worker.
    while arguments and (process := _parent(process)) and (above := _command_line(process))[-len(arguments) :] == arguments:
        words = above
    words = _without_interpreter(words)
    if in_step() and Path(words[0]).name != "srun":
        words = [*_srun(), *words]  # not among the ancestors: Slurm's daemon starts the tasks
    return words


def in_step() -> bool:
    """Whether srun started this process, or what did: a batch script is a step without a number."""
    return os.environ.get("SLURM_STEP_ID", "").isdigit()


def _parent(process: int) -> int:
    """0 where it cannot be seen (no /proc, another user's)."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _command_line(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _without_interpreter(words: Sequence[str]) -> list[str]:
    """`/…/bin/python /…/bin/torchrun …` was typed as `torchrun …`."""
    words = list(words)
    script = words[1] if len(words) > 1 else ""
    if (
        Path(words[0]).name.startswith("python")
        and os.path.dirname(script)
        and not Path(script).suffix
        and os.access(script, os.X_OK)
    ):
        words = words[1:]
        if shutil.which(Path(words[0]).name) == words[0]:
            words[0] = Path(words[0]).name
    return words


def _srun() -> list[str]:
    """The options of srun that lay this step out, from the environment it gives its tasks."""
    options = {
        "partition": "SLURM_JOB_PARTITION",
        "account": "SLURM_JOB_ACCOUNT",
        "nodes": "SLURM_STEP_NUM_NODES",
        "ntasks": "SLURM_STEP_NUM_TASKS",
        "cpus-per-task": "SLURM_CPUS_PER_TASK",
        "gpus-per-node": "SLURM_GPUS_PER_NODE",
        "gpus-per-task": "SLURM_GPUS_PER_TASK",
        "gpus": "SLURM_GPUS",
        "mem": "SLURM_MEM_PER_NODE",
    }
    if not any(os.environ.get(f"SLURM_{name}") for name in ("GPUS_PER_NODE", "GPUS_PER_TASK", "GPUS")):
        options["gpus-per-node"] = "SLURM_GPUS_ON_NODE"  # what srun was asked for is not always told
    return ["srun", *(f"--{option}={os.environ[name]}" for option, name in options.items() if os.environ.get(name))]
