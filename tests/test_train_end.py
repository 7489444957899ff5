"""The end of a run: killed or told to stop at any point and started again, it ends as the undisturbed one, with no step too many."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from held import HELD, held_training
from one_rank import one_rank
from train_setup import make_world

import cli
from train import record
from train.interrupt import evaluation_is_due

ROOT = Path(__file__).parents[1]
ENVIRON = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    make_world(tmp_path, num_rows=24)
    return tmp_path


def end(folder: Path, *cases: str) -> dict:
    command = [sys.executable, ROOT / "tests" / "end_cases.py", folder, *cases]
    done = subprocess.run([str(word) for word in command], env=ENVIRON, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    results = json.loads(done.stdout.splitlines()[-1])
    for name, result in results.items():
        assert result["failures"] == [], name
        evaluated = [entry["step"] for entry in result["history"] if "eval_loss" in entry]
        steps = [entry["step"] for entry in result["history"] if "loss" in entry]
        assert steps == list(range(1, result["steps"] + 1)) and evaluated[-1] == result["steps"], name
    return results


def test_killed_after_the_last_step_it_ends_as_the_undisturbed_run(folder):
    (result,) = end(folder, "steps,1,SIGKILL,2").values()
    assert (result["steps"], result["tried"]) == (2, 2) and result["events"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("length", ["steps", "epochs"])
def test_killed_or_told_to_stop_at_points_all_over_it_ends_as_the_undisturbed_run(folder, length, ranks):
    end(folder, f"{length},{ranks},SIGKILL,5", f"{length},{ranks},SIGTERM,1")


def entry(step: int, **values: float) -> dict:
    return {"step": step, **values}


@pytest.mark.parametrize(
    ("strategy", "step", "epoch", "log", "due"),
    [
        ("epoch", 4, 1.0, [entry(4, loss=1.0)], True),
        ("epoch", 4, 1.0, [entry(4, loss=1.0), entry(4, eval_loss=1.0)], False),
        ("epoch", 3, 0.75, [], False),
        ("epoch", 7, 1.75, [entry(4, eval_loss=1.0)], True),  # the last step ends the last, unfinished epoch
        ("steps", 4, 1.0, [entry(2, eval_loss=1.0)], True),
        ("steps", 3, 0.75, [], False),
        ("steps", 7, 1.75, [], True),
        ("no", 7, 1.75, [], False),
    ],
)
def test_an_evaluation_that_a_kill_cost_is_made_up_for(strategy, step, epoch, log, due):
    state = {"global_step": step, "epoch": epoch, "max_steps": 7, "log_history": log}
    assert evaluation_is_due(state, SimpleNamespace(eval_strategy=strategy, eval_steps=2)) is due


def command_of(folder: Path, *more: str, ranks: int = 1, epochs: int = 2) -> list[str]:
    words = ["train", "--ref-store", folder / "store", "--output-dir", folder / "run", "--num-processes", ranks, *more]
    words += ["--loss-type", "sigmoid", "--effective-batch-size", 4, "--num-train-epochs", epochs, "--eval-fraction", "0.2"]
    return [str(word) for word in words]


def train(folder: Path, held_until: str, **changes: int) -> subprocess.Popen:
    # As from a terminal: a shell's background job would ignore Ctrl-C.
    command = ["env", "--default-signal=INT", sys.executable, str(ROOT / "cli.py"), *command_of(folder, **changes)]
    environ = ENVIRON | held_training(held_until)
    return subprocess.Popen(command, env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_told_to_stop_it_writes_a_checkpoint_and_the_command_that_it_prints_goes_on(folder, number):
    run = train(folder, held_until="told")
    for line in run.stdout:
        if line.startswith("step 2/"):
            run.send_signal(number)
            break
    output = run.communicate(timeout=600)[0]
    assert run.returncode == 75, output
    (error,) = (line for line in output.splitlines() if line.startswith("Error:"))
    assert "accumulation steps mismatch" not in output  # accelerate's, which is false
    assert "Traceback" not in output and f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}: a checkpoint" in error
    assert record.read(folder / "run")["status"] == "stopped"
    stopped_at = int(error.split("at step ")[1].split()[0])
    assert stopped_at == 3
    command = error.split(" to go on: ")[1]
    again = subprocess.run(command, shell=True, env=ENVIRON, cwd=ROOT, check=False, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{stopped_at} of the steps before this start" in again.stdout
    assert record.finished(folder / "run")["result"]["num_steps"] > stopped_at

    # What is finished stays as it is, and another run is not taken for it.
    for more, code, words in (((), 0, "trained already"), (("--seed", "7"), 2, "expected seed 42; found seed 7")):
        with one_rank():  # in this process: start-up is most of what it costs
            rerun = CliRunner().invoke(cli.main, command_of(folder, "--resume", *more))
        assert rerun.exit_code == code and words in rerun.output, rerun.output


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_and_leaves_no_process_behind(folder):
    run = train(folder, held_until="killed", ranks=2)
    for line in run.stdout:
        if line.startswith("step 2/"):
            os.kill(run.pid, signal.SIGINT)
        if line.startswith(HELD):  # the first was heard: two at the same instant are one to the kernel
            os.kill(run.pid, signal.SIGINT)
            break
    output = run.communicate(timeout=600)[0]  # until everyone who holds the pipe is gone
    assert run.returncode == 75 and "ended at once by a second Ctrl-C" in output and "--resume-or-start" in output, output
