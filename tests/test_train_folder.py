"""The output folder of a run: who may write there, which of its checkpoints are whole, which are old, and what a full disk says."""

import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from store_samples import memory_folder

from store.errors import InputError, StoreError
from train import alone, record
from train.checkpoint import damage, last_checkpoint, remove_cut_short, remove_oldest
from train.config import TrainConfig
from train.saving import written

ROOT = Path(__file__).parents[1]

STATES = "global_step2"


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    loss = {"loss_type": ("sigmoid",), "beta": 0.1, "learning_rate": 1e-6, "tokens_per_batch": 4096}
    return TrainConfig(ref_store=tmp_path / "store", output_dir=tmp_path / "run", effective_batch_size=4, resume=True, **loss)


def checkpoint(folder: Path, step: int = 2, world: int = 1) -> Path:
    """As transformers and DeepSpeed name the files of `world` ranks; every file of torch is a zip archive."""
    made = folder / f"checkpoint-{step}"
    states = made / f"global_step{step}"
    states.mkdir(parents=True)
    parts = [states / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world)]
    random = ["rng_state.pth"] if world == 1 else [f"rng_state_{rank}.pth" for rank in range(world)]
    for path in (states / "mp_rank_00_model_states.pt", *parts, made / "scheduler.pt", *(made / name for name in random)):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data", bytes(1000))
    (made / "latest").write_text(states.name)
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "trainer_state.json").write_text(f'{{"global_step": {step}, "best_global_step": 1}}')
    return made


def test_a_checkpoint_that_a_copy_left_incomplete_is_refused_by_its_files(config):
    whole = checkpoint(config.output_dir, world=12)
    assert damage(whole, in_parts=True) == [] and record.checkpoint_of(config) == whole
    record.refuse_damaged(whole, config)
    parts = f"{STATES}/bf16_zero_pp_rank"
    names = [
        f"{parts}_11_mp_rank_00_optim_states.pt",
        f"{parts}_0_mp_rank_00_optim_states.pt",
        f"{STATES}/mp_rank_00_model_states.pt",
    ]
    for name in (*names, "scheduler.pt", "rng_state_3.pth", "rng_state_11.pth"):
        content = (whole / name).read_bytes()
        for left in (None, b"", content[:500], bytes(len(content))):
            (whole / name).unlink()
            if left is not None:
                (whole / name).write_bytes(left)
            with pytest.raises(InputError, match=f"missing or cut short; found {name}. Copy it again.*rm -r {whole}"):
                record.refuse_damaged(whole, config)
            (whole / name).write_bytes(content)
    for state in (whole / STATES).glob("bf16*"):
        state.unlink()
    assert len(damage(whole, in_parts=True)) == 12 and damage(whole, in_parts=False) == []
    (whole / "latest").unlink()
    with pytest.raises(InputError, match="missing or cut short; found latest"):  # and not: written with --save-only-model
        record.refuse_damaged(record.checkpoint_of(config), config)


def test_the_best_checkpoint_must_be_there_where_it_is_to_be_saved(config):
    best, last = checkpoint(config.output_dir, 1), checkpoint(config.output_dir, 2)
    saves_best = replace(config, load_best_model_at_end=True, save_steps=1, eval_steps=1, eval_fraction=0.1)
    record.refuse_damaged(last, saves_best)
    (best / "trainer_state.json").unlink()
    record.refuse_damaged(last, config)
    with pytest.raises(InputError, match="checkpoint-1: the checkpoint that evaluated best so far is not there"):
        record.refuse_damaged(last, saves_best)


def test_the_oldest_checkpoint_is_that_of_the_lowest_step_whatever_its_time(tmp_path):
    for step in (1, 2, 10):
        os.utime(checkpoint(tmp_path, step), (2e9 - step, 2e9 - step))
    (tmp_path / "checkpoint-2-mine").mkdir()

    def left() -> set[str]:
        return {path.name for path in tmp_path.iterdir()} - {"checkpoint-2-mine"}

    remove_oldest(tmp_path, 3, best_step=None)
    assert len(left()) == 3
    remove_oldest(tmp_path, 2, best_step=1)
    assert left() == {"checkpoint-1", "checkpoint-10"}
    remove_oldest(tmp_path, 1, best_step=1)
    assert left() == {"checkpoint-1", "checkpoint-10"}
    remove_oldest(tmp_path, 1, best_step=10)
    assert left() == {"checkpoint-10"}
    assert remove_cut_short(tmp_path) == [] and (tmp_path / "checkpoint-2-mine").exists()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


HOLD = """
import sys
from pathlib import Path
from train.alone import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs" / "it"
    first = holder(folder)
    for enter in (alone.refuse_running, lambda folder: alone.alone(folder).__enter__()):
        with pytest.raises(InputError, match=f"another training runs in this folder; found process {first.pid} on "):
            enter(folder)
    first.kill()  # the kernel gives its lock back
    first.wait()
    alone.refuse_running(folder)
    with alone.alone(folder):
        record.refuse_other_run(folder)  # its lock is no content
        (folder / "run.json").touch()
    assert [path.name for path in folder.iterdir()] == ["run.json"]

    # Of another machine, which may be lost: its locks are waited for, then it is believed.
    second = holder(folder)
    (folder / alone.NAME).write_text('{"host": "elsewhere", "pid": 7}')
    monkeypatch.setattr(alone, "LEASE_S", 0.2)
    with pytest.raises(InputError, match="process 7 on elsewhere"), alone.alone(folder):
        pass
    assert "held by a run on elsewhere; waiting" in capsys.readouterr().out
    second.communicate("")
    with alone.alone(tmp_path / "empty"):
        pass
    assert second.returncode == 0 and not (tmp_path / "empty").exists()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="a link to a folder that is not there"), alone.alone(tmp_path / "link"):
        pass


@pytest.fixture
def small_disk():
    for folder in memory_folder():
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
        mounted = subprocess.run(command, check=False, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"no tmpfs here: {mounted.stderr.strip()}")
        yield folder
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_error_whichever_library_was_writing(small_disk, config, monkeypatch):
    monkeypatch.setattr("store.command.called_with", ("train",))  # an earlier test's command may have had --resume
    large = torch.zeros(1 << 16)
    for write in (
        lambda path: torch.save({"states": large}, path),
        lambda path: save_file({"weights": large}, path),
        lambda path: path.write_bytes(bytes(1 << 18)),
    ):
        with (
            pytest.raises(StoreError, match="disk full or quota reached.*with --resume-or-start: .*--resume-or-start$"),
            written(small_disk),
        ):
            write(small_disk / "file")
        (small_disk / "file").unlink(missing_ok=True)
    with pytest.raises(RuntimeError, match="of another kind"), written(small_disk):
        raise RuntimeError("of another kind")
    with pytest.raises(StoreError, match="run.json: disk full"):
        record.write(small_disk, {"long": "x" * (1 << 18)})
    assert list(small_disk.iterdir()) == []
