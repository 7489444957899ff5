"""Micro-batches by tokens in the command itself: a part of the pairs in an order of its own, on two ranks, killed between two checkpoints and
resumed on as many ranks or on one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from held import held_training
from train_setup import make_world

from train.checkpoint import last_checkpoint

ROOT = Path(__file__).parents[1]
ENVIRON = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
BUDGET = 160
"""Tokens of a micro-batch: several for a step of 10 pairs, and no pair is longer."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    make_world(folder, num_rows=40)
    return folder


def start(folder: Path, output: str, ranks: int, budget: int = BUDGET, **environment: str) -> list[subprocess.Popen]:
    """One process per rank, so that each can be killed."""
    words = [
        "train",
        "--ref-store",
        folder / "store",
        "--output-dir",
        folder / output,
        "--resume-or-start",
        "--tokens-per-batch",
        budget,
    ]
    words += ["--where", "num_chosen_tokens > 3", "--order-by", "num_rejected_tokens, pair_id", "--eval-fraction", "0.15"]
    words += ["--eval-steps", 2, "--save-steps", 2, "--effective-batch-size", 10, "--num-train-epochs", 2, "--logging-steps", 1]
    words += [
        "--loss-type",
        "sigmoid",
        "--beta",
        "0.1",
        "--learning-rate",
        "1e-3",
        "--lr-scheduler-type",
        "constant",
        "--warmup-ratio",
        0,
    ]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = ENVIRON | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | environment
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, words)]
    started = []
    for rank in range(ranks):
        environ = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(folder / f"{output}.{rank}.log", "a") as log:
            started.append(subprocess.Popen(command, env=environ, cwd=ROOT, stdout=log, stderr=log))
    return started


def run(folder: Path, output: str, ranks: int, **changes) -> dict:
    """Weights (bytes) and what was logged, by step."""
    codes = [process.wait(timeout=1200) for process in start(folder, output, ranks, **changes)]
    assert codes == [0] * ranks, (folder / f"{output}.0.log").read_text()[-4000:]
    record = json.loads((folder / output / "run.json").read_text())
    logged: dict[int, dict] = {}
    for entry in record["log_history"]:
        logged.setdefault(entry["step"], {}).update(entry)
    return {
        "weights": (folder / output / "model.safetensors").read_bytes(),
        "logged": logged,
        "steps": record["result"]["num_steps"],
    }


def killed(folder: Path, output: str) -> None:
    """A run on two ranks, held at the end of its third step, loses both once the checkpoint of the second is there."""
    ranks = start(folder, output, 2, **held_training("killed"))
    deadline = time.monotonic() + 1200
    while last_checkpoint(folder / output) is None:
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks), (folder / f"{output}.0.log").read_text()
        time.sleep(0.1)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2


NAMES = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "eval_loss",
    "eval_rewards/accuracies",
    "eval_rewards/margins",
)


def close(one: dict, other: dict, names: tuple[str, ...] = NAMES) -> None:
    assert one.keys() == other.keys()
    for step, entry in one.items():
        for name in [name for name in names if name in entry]:
            assert other[step][name] == pytest.approx(entry[name], rel=2e-4, abs=2e-5), (step, name)


def test_killed_and_resumed_it_ends_as_the_undisturbed_run_and_the_ranks_and_the_budget_do_not_matter(folder):
    whole = run(folder, "whole", 2)
    assert whole["steps"] > 4 and {"loss", "eval_loss"} <= whole["logged"][2].keys()
    killed(folder, "killed")
    shutil.copytree(folder / "killed", folder / "alone")
    again = run(folder, "killed", 2)
    assert again["weights"] == whole["weights"]
    assert [again["logged"][step].get("loss") for step in whole["logged"]] == [
        entry.get("loss") for entry in whole["logged"].values()
    ]
    assert "2 of the steps before this start" in (folder / "killed.0.log").read_text()

    alone = run(folder, "alone", 1, budget=4 * BUDGET)  # the rest of the run by another number of ranks, in fewer micro-steps
    close(whole["logged"], alone["logged"])
    assert max(entry["loss"] for entry in whole["logged"].values() if "loss" in entry) > 0.5
    assert len({entry["loss"] for entry in whole["logged"].values() if "loss" in entry}) == whole["steps"]
