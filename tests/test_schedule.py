"""Schedules of the learning rate are tried before anything is loaded."""

import pytest
from one_rank import one_rank
from train_setup import make_world, run_config
from trl import DPOConfig

from store.errors import InputError
from train.choices import SCHEDULES
from train.run import train
from train.schedule import tried


def args(folder, kind: str, given: dict | None = None, warmup: float = 0.1) -> DPOConfig:
    return DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        learning_rate=1e-6,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=given,
        warmup_steps=warmup,
    )


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("polynomial", {"lr_end": 1e-6}, ["lr_end (1e-06) must be smaller"]),
        ("polynomial", {"power": "two"}, ["--lr-scheduler-type polynomial --lr-scheduler-kwargs", "two"]),
        ("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "steep"}, ["steep", "1-sqrt"]),
        ("warmup_stable_decay", {"num_decay_steps": 19}, ["at most 20 steps, of which 2 are warm-up", "num_decay_steps 19"]),
        ("cosine", {"num_cycles": "many"}, ["--lr-scheduler-type cosine"]),
        ("inverse_sqrt", {"timescale": 0}, ["division by zero"]),
        ("polynomial", {"lr_end": -1e-6}, ["negative"]),
    ],
)
def test_arguments_that_give_no_rate_are_refused(tmp_path, kind, given, words):
    with pytest.raises(InputError) as refusal:
        tried(args(tmp_path, kind, given), num_steps=20)
    assert all(word in str(refusal.value) for word in words)


def test_a_warmup_that_leaves_no_step_to_a_polynomial_is_refused(tmp_path):
    """Its rate after the last step is a division by no steps, which ended a run that was done."""
    with pytest.raises(InputError, match="division by zero.* Shorten the warm-up, which takes 1 of 1 step"):
        tried(args(tmp_path, "polynomial", warmup=1), num_steps=1)


NEEDED = {"min_lr_rate": 0.1}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_that_reaches_its_rate_is_not_mentioned(tmp_path, kind):
    given = {"num_decay_steps": 5} if kind == "warmup_stable_decay" else NEEDED if "min_lr" in kind else None
    assert tried(args(tmp_path, kind, given), num_steps=12_345) is None


def test_a_warmup_as_long_as_the_run_is_said(tmp_path):
    said = tried(args(tmp_path, "linear", warmup=10), num_steps=5)
    assert said == "the learning rate does not reach 1e-06: at most 4e-07 in 5 step(s), as the warm-up takes 10"


def test_a_run_tries_it_before_its_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("train.run.load_model", lambda *args, **options: pytest.fail("a model was loaded"))
    make_world(tmp_path, 8)
    config = run_config(tmp_path, lr_scheduler_type="polynomial", lr_scheduler_kwargs={"lr_end": 1.0})
    with one_rank(), pytest.raises(InputError, match="no schedule can be made of these arguments"):
        train(config)
