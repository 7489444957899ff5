"""Told to stop while it evaluates, a run drops the evaluation and writes a checkpoint; gone on with, it ends as the undisturbed run."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from one_rank import one_rank
from train_setup import make_rows, make_store, make_world, run_config

import train.evaluate
from stop import Stopped
from store.errors import InputError
from train.checkpoint import state_of
from train.run import train as train_run

pytestmark = pytest.mark.slow


def logged(folder) -> list[dict]:
    history = json.loads((folder / "run.json").read_text())["log_history"]
    measured = ("_runtime", "_per_second")
    return [
        {name: value for name, value in entry.items() if not name.startswith("speed/") and not name.endswith(measured)}
        for entry in history[:-1]  # the last is of the whole: its seconds
    ]


def test_told_to_stop_in_an_evaluation_it_ends_as_the_undisturbed_run(tmp_path, monkeypatch, capsys):
    """In the second store's evaluation after step 1, where no checkpoint is due and the first store was logged; in the one that makes up for it,
    when the run starts; and after the last step, whose checkpoint turns out to be the best."""
    world = make_world(tmp_path, 16)
    make_store(tmp_path / "other", world.model, make_rows(5, seed=1))
    config = run_config(
        tmp_path,
        max_steps=3,
        eval_steps=1,
        save_steps=3,
        load_best_model_at_end=True,
        eval_ref_store=(f"same={world.store}", tmp_path / "other"),
        per_device_train_batch_size=4,
    )
    batches = {"same": 4, "other": 2}
    watch, seen = train.evaluate.watch, []

    def run(output: str, told_at: int | None = None, **changes) -> None:
        """`told_at`: SIGTERM while that batch of all evaluations is computed."""

        def watched(*args):
            seen.append(None)
            if len(seen) == told_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return watch(*args)

        seen.clear()
        monkeypatch.setattr(train.evaluate, "watch", watched)
        with one_rank():
            train_run(replace(config, output_dir=tmp_path / output, **changes))

    run("whole")
    each = sum(batches.values())
    assert len(seen) == 3 * each

    for attempt, told_at, evaluated in ((1, batches["same"] + 1, 1), (2, 2, 1), (3, 2 * each + 3, 3)):
        with pytest.raises(Stopped, match=f"stopped by SIGTERM: a checkpoint is written at step {evaluated} of 3"):
            run("stopped", told_at, resume=attempt > 1)
        assert len(seen) == told_at, attempt  # the batch at hand was finished, and none begun
        state = state_of(tmp_path / "stopped" / f"checkpoint-{evaluated}")
        assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(1, evaluated + 1))
        assert not any(entry["step"] == evaluated and "eval_same_loss" in entry for entry in state["log_history"]), attempt
        assert json.loads((tmp_path / "stopped" / "run.json").read_text())["status"] == "stopped"
    run("stopped", resume=True)
    assert len(seen) == each
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]
    assert logged(tmp_path / "whole") == logged(tmp_path / "stopped")
    best = [json.loads((tmp_path / name / "run.json").read_text())["best"] for name in ("whole", "stopped")]
    assert best[0] == best[1] and best[0]["step"] == 3


def test_a_best_checkpoint_that_is_lost_while_the_run_goes_on_is_an_error_at_its_end(tmp_path, monkeypatch):
    """transformers would warn, and save the last model in its place."""
    make_world(tmp_path, 16)
    config = run_config(
        tmp_path,
        max_steps=2,
        learning_rate=1e-30,  # no step evaluates better than the first
        eval_fraction=0.2,
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
    )
    watch, best = train.evaluate.watch, config.output_dir / "checkpoint-1"

    def lost(*args):
        if best.is_dir():
            shutil.rmtree(best)
        return watch(*args)

    monkeypatch.setattr(train.evaluate, "watch", lost)
    with one_rank(), pytest.raises(InputError, match=f"{best}: the checkpoint that evaluated best so far is not there"):
        train_run(config)
    last = config.output_dir / "checkpoint-2"
    assert state_of(last) is not None
    # As a start on two ranks leaves it that is killed while it converts the optimizer's states.
    (last / "global_step2_universal" / "zero").mkdir(parents=True)
    (last / "latest_universal").write_text("global_step2_universal")
    with one_rank():
        train_run(replace(config, resume=True, load_best_model_at_end=False))
    assert json.loads((config.output_dir / "run.json").read_text())["status"] == "finished"
    assert not list(last.glob("*universal*"))


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (
            {"tokens_per_batch": 2001, "per_device_train_batch_size": None},
            "Use --tokens-per-batch 1000, which holds for evaluations",
        ),
        ({"tokens_per_batch": 100, "per_device_train_batch_size": None}, r"Lower --max-length.* the longest has \d+ tokens"),
        ({}, "Lower --per-device-train-batch-size"),
    ],
)
def test_memory_that_runs_out_in_an_evaluation_is_said_to_be_its(tmp_path, monkeypatch, options, advice):
    """Gradient checkpointing, which a training step is told to use, saves nothing there."""
    make_world(tmp_path, 8)
    config = run_config(tmp_path, max_steps=1, eval_steps=1, eval_fraction=0.3, save_strategy="no", effective_batch_size=4)
    config = replace(config, gradient_checkpointing=False, **options)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 5 GiB.")

    monkeypatch.setattr(train.evaluate, "watch", full)
    with one_rank(), pytest.raises(InputError, match=f"out of memory in an evaluation; found CUDA out.*{advice}"):
        train_run(config)
