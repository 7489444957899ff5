"""Run by test_train_end.py: kill a real run at points between its last step and its exit, requeue it, and say what became of it.

python tests/end_cases.py FOLDER CASE…    CASE: steps|epochs,RANKS,SIGNAL,POINTS    the world in FOLDER; prints a JSON object by case

A point is a moment at which rank 0 is about to open, make, rename or remove a file of its output folder (Python's audit events tell); POINTS is
how many of them are tried, spread evenly, or `all`. A run is the command itself, `train --resume-or-start`, in ranks
that are forked from this process after its imports. SIGKILL takes all ranks of a job at once, as the loss of a node does.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import cli
import train.run
from train.trainer import LogLastStep

FOLDER = Path(sys.argv[1])
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
LENGTHS = {"steps": ["--max-steps", "2"], "epochs": ["--num-train-epochs", "2"]}


class Fault(LogLastStep):
    """From the last step on counts what rank 0 does to the output folder, and sends this job `signal` before the event `at`."""

    folder, number, at = Path(), signal.SIGKILL, None
    seen, armed = 0, False

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step >= state.max_steps and not Fault.armed and os.environ["RANK"] == "0":
            Fault.armed = True
            sys.addaudithook(Fault.hear)

    @classmethod
    def hear(cls, event: str, arguments: tuple) -> None:
        if event not in EVENTS or not str(arguments[0]).startswith(str(cls.folder)):
            return
        if cls.seen == cls.at:
            os.killpg(0, cls.number)
        cls.seen += 1


def job(length: str, ranks: int, folder: Path, at: int | None, number: int = signal.SIGKILL) -> tuple[list[int], int]:
    """(exit code of each rank, events seen by rank 0)"""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    reading, writing = os.pipe()
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.setpgid(0, children[0] if children else 0)
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            Fault.folder, Fault.at, Fault.number = folder, at, number
            code = 1
            try:
                with (
                    open(folder.with_suffix(f".{rank}.log"), "a") as log,
                    contextlib.redirect_stdout(log),
                    contextlib.redirect_stderr(log),
                ):
                    code = command(length, folder)
            finally:
                if rank == 0:
                    os.write(writing, str(Fault.seen).encode())
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.close(writing)
    seen = os.read(reading, 100)
    os.close(reading)
    return codes, int(seen or -1)


def command(length: str, folder: Path) -> int:
    options = ["--ref-store", FOLDER / "store", "--output-dir", folder, "--resume-or-start", *LENGTHS[length]]
    options += ["--loss-type", "sigmoid", "--beta", "0.1", "--learning-rate", "1e-3", "--effective-batch-size", "8"]
    options += ["--lr-scheduler-type", "constant", "--warmup-ratio", "0"]  # a step too many would change the weights
    options += ["--eval-fraction", "0.2", "--save-steps", "1", "--no-gradient-checkpointing", "--save-total-limit", "1"]
    try:
        cli.main(["train", *map(str, options)])
    except SystemExit as ended:
        return ended.code or 0
    return 1


def outcome(folder: Path) -> dict:
    """What a run made, to be the same whatever happened on the way."""
    record = json.loads((folder / "run.json").read_text())
    names = ("step", "loss", "eval_loss", "eval_rewards/margins", "grad_norm")
    history = [{name: entry[name] for name in names if name in entry} for entry in record["log_history"]]
    return {
        "weights": (folder / "model.safetensors").read_bytes().hex(),
        "config": (folder / "config.json").read_text(),
        "status": record["status"],
        "steps": record["result"]["num_steps"],
        "history": [entry for entry in history if len(entry) > 1],
    }


def case(length: str, ranks: int, number: int, points: str) -> dict:
    work = FOLDER / f"{length}-{ranks}-{number}"
    work.mkdir()
    codes, events = job(length, ranks, work / "whole", at=None)
    assert codes == [0] * ranks and events > 0, (codes, events)
    expected = outcome(work / "whole")
    tried = range(events) if points == "all" else [int((each + 0.5) * events / int(points)) for each in range(int(points))]
    failures = []
    for at in tried:
        folder = work / str(at)
        codes, _ = job(length, ranks, folder, at, number)
        # Another rank may have come to its end before: the first one writes the record.
        killed = codes[0] == -signal.SIGKILL and set(codes) <= {0, -signal.SIGKILL}
        # Told to stop, a run drops its last evaluation, or finishes if that was done.
        ended = killed if number == signal.SIGKILL else codes in ([0] * ranks, [75] * ranks)
        left = sorted(path.name for path in folder.iterdir())
        again, _ = job(length, ranks, folder, at=None)
        found = outcome(folder) if (folder / "run.json").exists() else {}
        if not ended or again != [0] * ranks or found != expected:
            differing = [name for name in expected if found.get(name) != expected[name]]
            log = folder.with_suffix(".0.log").read_text()[-3000:]
            failures.append({"at": at, "codes": codes, "again": again, "differing": differing, "left": left, "log": log})
        else:
            shutil.rmtree(folder)
    return {"events": events, "tried": len(tried), "steps": expected["steps"], "history": expected["history"], "failures": failures}


if __name__ == "__main__":
    train.run.LogLastStep = Fault
    results = {}
    for each in sys.argv[2:]:
        length, ranks, number, points = each.split(",")
        results[each] = case(length, int(ranks), signal.Signals[number], points)
    print(json.dumps(results))
