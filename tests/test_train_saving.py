"""Which model a run leaves behind: the best by an evaluation, checkpoints without optimizer states. Real runs under DeepSpeed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from one_rank import one_rank
from safetensors.torch import load_file
from train_setup import make_world

import cli


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), num_rows=12)


def words_of(world, folder: Path) -> list[object]:
    words = ["train", world.store, "--output-dir", folder, "--loss-type", "sigmoid", "--effective-batch-size", 4, "--max-steps", 4]
    return [*words, "--per-device-train-batch-size", 2, "--eval-fraction", 0.3, "--eval-steps", 1, "--warmup-steps", 0]


def train(world, folder: Path, *options: object, code: int = 0) -> str:
    words = [*words_of(world, folder), *options]
    with one_rank():
        result = CliRunner().invoke(cli.main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("metric", "save_steps"), [("loss", 1), ("rewards/margins", 1), pytest.param("loss", 2, marks=pytest.mark.slow)]
)
def test_the_best_checkpoint_is_what_is_saved(world, tmp_path, metric, save_steps):
    """A rate so high that training soon makes the model worse: the last step is not the best. Nor is one of which there is no checkpoint."""
    options = ["--learning-rate", 0.05, "--save-steps", save_steps, "--load-best-model-at-end", "--metric-for-best-model", metric]
    output = train(world, tmp_path / "run", *options)
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    found = {each["step"]: each[f"eval_{metric}"] for each in written["log_history"] if f"eval_{metric}" in each}
    assert sorted(found) == [1, 2, 3, 4]
    which = min if metric == "loss" else max
    best = which((step for step in found if step % save_steps == 0), key=found.get)
    assert save_steps == 1 or which(found, key=found.get) != best
    saved = weights(tmp_path / "run")
    assert same(saved, weights(tmp_path / "run" / f"checkpoint-{best}"))
    assert best == 4 or not same(saved, weights(tmp_path / "run" / "checkpoint-4"))
    assert written["best"] == {"step": best, "metric": metric, "value": found[best]}
    assert f"that of step {best} evaluated best, {metric} {found[best]:.4f}" in output


@pytest.mark.slow
def test_the_best_checkpoint_is_saved_by_a_run_that_went_on_in_another_place(world, tmp_path):
    """Killed after its last checkpoint, then moved: transformers knows the best one by its former path."""
    options = ["--learning-rate", 0.05, "--save-steps", 1, "--load-best-model-at-end", "--save-total-limit", 2]
    train(world, tmp_path / "run", *options)
    best = json.loads((tmp_path / "run" / "run.json").read_text())["best"]["step"]
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-4"} and best < 4
    saved = weights(tmp_path / "run")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    (moved / "run.json").write_text((moved / "run.json").read_text().replace('"finished"', '"running"'))
    (moved / "model.safetensors").unlink()
    train(world, moved, *options, "--resume")
    assert same(weights(moved), saved)


@pytest.mark.slow
def test_the_best_checkpoint_of_two_ranks_is_saved_by_one(world, tmp_path):
    """Killed after its last step on two ranks, gone on with on one: the optimizer's states of the best are those of two."""
    options = ["--learning-rate", 0.05, "--save-steps", 1, "--load-best-model-at-end"]
    words = [sys.executable, Path(cli.__file__), *words_of(world, tmp_path / "run"), *options, "--num-processes", 2]
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    subprocess.run([str(word) for word in words], env=environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    record = tmp_path / "run" / "run.json"
    assert json.loads(record.read_text())["best"]["step"] < 4
    saved = weights(tmp_path / "run")
    record.write_text(record.read_text().replace('"finished"', '"running"'))
    (tmp_path / "run" / "model.safetensors").unlink()
    output = train(world, tmp_path / "run", *options, "--resume")
    assert "another number of processes" in output and same(weights(tmp_path / "run"), saved)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_costs_nothing_that_was_stored(world, tmp_path):
    """Full in the states of the first checkpoint, and in the final model: the same command then goes on."""
    options = ["--learning-rate", 1e-3, "--save-steps", 2, "--resume-or-start"]
    train(world, tmp_path / "whole", *options)
    total = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*")) // 1024
    for share in (0.3, 0.95):
        disk = tmp_path / f"disk-{share}"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(share * total)}k", "none", str(disk)], check=True)
        try:
            refusal = train(world, disk / "run", *options, code=1)
            assert "disk full or quota reached" in refusal and refusal.count("Error:") == 1, refusal
            subprocess.run(["mount", "-o", f"remount,size={2 * total}k", str(disk)], check=True)
            train(world, disk / "run", *options)
            assert same(weights(disk / "run"), weights(tmp_path / "whole")), share
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)


def test_checkpoints_of_the_model_alone_are_kept_and_not_resumed(world, tmp_path):
    run = tmp_path / "run"
    train(world, run, "--learning-rate", 1e-3, "--save-steps", 2, "--save-only-model")
    assert same(weights(run), weights(run / "checkpoint-4")) and not same(weights(run), weights(run / "checkpoint-2"))
    assert not list(run.glob("checkpoint-*/global_step*"))
    (run / "run.json").write_text((run / "run.json").read_text().replace('"finished"', '"failed"'))
    for words in ([], ["--resume"]):
        refusal = train(world, run, "--learning-rate", 1e-3, *words, code=2)
        assert ("a checkpoint of the model alone" if words else "the output folder is not empty") in refusal, refusal
    assert "the model alone" in train(world, run, "--learning-rate", 1e-3, "--resume-or-start", code=2)


def test_another_optimizer_and_schedule_run(world, tmp_path):
    options = ["--optim", "sgd", "--learning-rate", 1e-2, "--run-name", "mine", "--save-strategy", "no"]
    options += ["--lr-scheduler-type", "cosine_with_min_lr", "--lr-scheduler-kwargs", '{"min_lr_rate": 0.5}']
    train(world, tmp_path / "run", *options)
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    rates = [each["learning_rate"] for each in written["log_history"] if "learning_rate" in each]
    assert rates[0] == pytest.approx(1e-2) and 5e-3 < rates[-1] < 7e-3
    assert written["config"]["run_name"] == "mine" and written["config"]["optim"] == "sgd"


def test_overwrite_removes_a_run_and_nothing_else(world, tmp_path, monkeypatch):
    """Where this command starts the ranks itself, which these do not: the folder is removed once the plan holds, before any rank starts."""
    started = []
    monkeypatch.setattr(
        "launch.run_torchrun", lambda num_processes: started.append(sorted(path.name for path in run.iterdir())) or 0
    )
    monkeypatch.setattr("launch.num_local_processes", lambda *args, **options: 1)
    run, words = tmp_path / "run", ["train", str(world.store), "--output-dir", str(tmp_path / "run"), "--loss-type", "sigmoid"]

    def start(*more: str) -> str:
        run.mkdir(exist_ok=True)
        return CliRunner().invoke(cli.main, [*words, *more], catch_exceptions=False).output

    run.mkdir()
    (run / "run.json").write_text('{"status": "finished"}')
    (run / "model.safetensors").touch()
    assert "remove this run with --overwrite" in start() and not started
    assert "one of the two" in start("--overwrite", "--resume")
    assert "scored for shorter" in start("--overwrite", "--max-length", "5000") and (run / "model.safetensors").exists()
    (run / "options.yaml").write_text("beta: 0.2\n")
    (run / "checkpoint-4").mkdir()
    (run / "checkpoint-4" / "config.json").touch()
    for option, path in (("--config", run / "options.yaml"), ("--policy", run / "checkpoint-4"), ("--policy", run)):
        assert f"would remove what the run starts from, {option} {path}" in start("--overwrite", option, str(path))
    (run / "checkpoint-4" / "config.json").unlink()
    (run / "checkpoint-4").rmdir()
    assert not started
    monkeypatch.setattr("shutil.rmtree", lambda folder: [path.unlink() for path in folder.iterdir()])
    assert start("--overwrite") == "" and started == [[]]
    (run / "thesis.txt").write_text("precious")
    assert "holds no run" in start("--overwrite") and (run / "thesis.txt").exists() and len(started) == 1
    (run / "run.json").write_text('{"status": "finished"}')
    (run / "model.safetensors").touch()
    with one_rank():
        assert "the output folder is not empty" in start("--overwrite") and (run / "run.json").exists()
