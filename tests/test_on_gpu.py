"""On GPUs: the files of tests/on_gpu, each in a process of its own, and whole commands. The GPUs are this machine's, or else made up
(tests/made_up_gpu)."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import made_up_gpu
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from train_setup import make_rows, make_tokenizer

from precompute.scorer.packing import Sequence
from precompute.scorer.scoring import score
from store.reader import open_store

TESTS = Path(__file__).parent


def environment(num_gpus: int, gib: float = 4.0) -> dict[str, str]:
    """Of a process that sees so many GPUs, of `gib` GiB where they are made up."""
    if torch.cuda.is_available():
        if torch.cuda.device_count() < num_gpus:
            pytest.skip(f"this machine has fewer than {num_gpus} GPUs")
        return os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(num_gpus)))}
    if made_up_gpu.possible():
        return made_up_gpu.environment(num_gpus, gib)
    pytest.skip("PyTorch is built for CUDA and there is no GPU; made-up ones need its build for CPUs")


def run(command: list, env: dict[str, str], code: int = 0) -> str:
    """What the command writes, both streams in one; it must end with `code`."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(
        command, check=False, env=env, cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200
    )
    assert done.returncode == code, done.stdout[-8000:]
    return done.stdout


def test_scoring():
    env = environment(3 if not torch.cuda.is_available() else torch.cuda.device_count())
    files = [TESTS / "on_gpu" / name for name in ("scoring.py", "spread.py")]
    print(run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *files], env))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and rows; and the store that two workers made of them."""
    folder = tmp_path_factory.mktemp("on-gpu")
    tiny.make_model("olmo3").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(40)))
    return folder


def precompute(folder: Path, *more) -> list:
    given = {"dataset": folder / "rows.jsonl", "model": folder / "model", "dtype": "bfloat16", "max-length": 96, "shard-size": 4}
    return ["cli.py", "precompute", *(word for name, value in given.items() for word in (f"--{name}", value)), *more]


@pytest.fixture(scope="module")
def store(folder) -> Path:
    said = run(precompute(folder, "--ref-store", folder / "store", "--tokens-per-batch", "auto"), environment(2, gib=0.02))
    assert re.search(r"^device: 2 x NVIDIA .*\(torch", said, re.MULTILINE)
    assert re.search(r"--tokens-per-batch auto: [\d,]+$", said, re.MULTILINE)
    return folder / "store"


@pytest.mark.slow
def test_two_workers_make_the_store_that_a_cpu_makes(store):
    opened = open_store(store)
    assert "NVIDIA" in str(opened.manifest.provenance)
    pairs = opened.read(range(40)).to_pylist()
    sequences, stored = [], []
    for pair in pairs:
        for side in ("chosen", "rejected"):
            ids = np.array(pair["prompt_ids"] + pair[f"{side}_ids"], dtype=np.int32)
            sequences.append(Sequence(ids, len(pair["prompt_ids"])))
            stored += pair[f"{side}_token_logps"]
    model = tiny.make_model("olmo3").to(torch.bfloat16)
    expected = np.concatenate(score(model, sequences, layout="padded", tokens_per_batch=1))
    assert np.abs(expected - np.array(stored)).mean() < 0.06


@pytest.mark.slow
def test_verify_scores_again(store, folder):
    said = run(["cli.py", "verify", "--ref-store", store, "--model", folder / "model"], environment(1))
    assert "the weights that made the store" in said
    assert float(re.search(r"mean ([\d.e+-]+), max", said)[1]) < 0.06


@pytest.mark.slow
def test_two_ranks_train_evaluate_stop_and_go_on(store, folder):
    """Two steps; then the second again, from the first one's checkpoint: the same weights."""
    command = ["cli.py", "train", "--ref-store", store, "--max-steps", 2, "--save-steps", 1, "--effective-batch-size", 4]
    command += ["--eval-fraction", 0.2, "--eval-steps", 1, "--learning-rate", 1e-4, "--warmup-ratio", 0, "--output-dir"]
    said = run([*command, folder / "run"], environment(2))
    assert re.search(r"^device: 2 x NVIDIA .*\(torch", said, re.MULTILINE)
    record = json.loads((folder / "run" / "run.json").read_text())
    losses = [entry["loss"] for entry in record["log_history"] if "loss" in entry]
    assert losses[0] == pytest.approx(np.log(2), abs=0.01) and len(losses) == 2
    assert len([entry for entry in record["log_history"] if "eval_loss" in entry]) == 2
    assert record["result"]["peak_memory"] < 2**31  # of the device, not of the process

    shutil.copytree(folder / "run" / "checkpoint-1", folder / "again" / "checkpoint-1")
    (folder / "again" / "run.json").write_text(json.dumps(record | {"status": "running"}))
    said = run([*command, folder / "again", "--resume"], environment(2))
    assert "resuming from" in said
    once, again = (load_file(folder / name / "model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert any(
        not torch.equal(once[name].float(), weight.float())
        for name, weight in load_file(folder / "model" / "model.safetensors").items()
    )


@pytest.mark.slow
def test_a_task_of_srun_uses_the_only_gpu_it_sees(folder):
    """srun --gpus-per-task=1: task 3 sees one GPU, which is number 0 to it."""
    task = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "3", "SLURM_GPUS_ON_NODE": "4"}
    said = run(precompute(folder, "--ref-store", folder / "by-srun", "--limit", 8), environment(1) | task)
    assert re.search("^device: NVIDIA", said, re.MULTILINE)
    assert (folder / "by-srun" / "part-00001.parquet").exists()


@pytest.mark.slow
def test_the_whole_report(tmp_path):
    """`make gpu` on two GPUs, with more time than a real one takes: every part succeeds, tests/on_gpu/training.py with the first."""
    run(["benchmarks/gpu.py", "--minutes", "100", "--output", tmp_path / "report.md"], environment(2))
    head, *parts = (tmp_path / "report.md").read_text().split("\n## ")
    assert head.startswith("# NVIDIA") and "| GPUs | 2 |" in head
    text = {part.split("\n", 1)[0]: part for part in parts}
    assert list(text) == ["Parity", "Scoring", "Profile", "Several", "Training"]
    for kind in tiny.CONFIGS:
        for dtype, bound in (("bfloat16", 0.06), ("float32", 1e-4)):
            mean = re.search(rf"^\| {kind} \| {dtype} \| ([\d.e+-]+) \|", text["Parity"], re.MULTILINE)[1]
            assert 0 < float(mean) < bound, text["Parity"]
    for name in ("scoring", "training"):
        assert re.search(rf"^`tests/on_gpu/{name}.py`: \d+ passed", text["Parity"], re.MULTILINE), text["Parity"]
    assert re.search(r"`--tokens-per-batch auto` chose [\d,]+ tokens", text["Scoring"])
    assert re.search(r"^\| matrix products \| [\d.]+% \| [\d.]+% \|$", text["Profile"], re.MULTILINE)
    assert re.search(r"^- (\d+) of \1 shards are the same bytes from one worker and from two$", text["Several"], re.MULTILINE)
    for contender in ("online", "packed"):
        assert contender in text["Training"]


@pytest.mark.slow
def test_the_report_goes_on_past_a_part_that_fails(tmp_path):
    """`make gpu`: a shape that does not exist fails one part; the next is in the report all the same."""
    command = ["benchmarks/gpu.py", "--parts", "profile,scoring", "--shapes", "tiny,none", "--minutes", "30"]
    said = run([*command, "--output", tmp_path / "report.md"], environment(1), code=1)
    assert "failed: profile; the report says how" in said
    report = (tmp_path / "report.md").read_text()
    assert report.startswith("# NVIDIA")
    profiled, scored = report[report.index("## Profile") :].split("## Scoring")
    assert "**This part ended with exit code 1.**" in profiled and "KeyError: 'none'" in profiled
    assert "| 512 |" in scored and re.search(r"`--tokens-per-batch auto` chose [\d,]+ tokens", scored) and "**" not in scored
