"""On GPUs: the files of tests/on_gpu, each in a process of its own, and whole commands. The GPUs are this machine's, or else made up
(tests/made_up_gpu)."""

import ast
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import made_up_gpu
import numpy as np
import pytest
import tiny
import torch
from held import shard_held
from peft import LoraConfig, get_peft_model
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


@pytest.fixture(scope="module", autouse=True)
def what_all_of_it_costs(request):
    """Printed whether output is captured or not: all of it may take four minutes."""

    def used() -> float:
        each = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in each)

    before, started = used(), time.monotonic()
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\ntests on GPUs: {time.monotonic() - started:.0f} s by the clock of 240, {used() - before:.0f} CPU seconds")


def run(command: list, env: dict[str, str], code: int | None = 0) -> str:
    """What the command writes, both streams in one; it must end with `code`, if that is given. Says how long it took: docs/gpu.md has a list."""
    words, before = [sys.executable, *map(str, command)], resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        words, check=False, env=env, cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"\n{seconds:.0f} CPU seconds: {' '.join(Path(word).name for word in words[1:])[:100]}")
    assert code is None or done.returncode == code, done.stdout[-8000:]
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


def precompute(folder: Path, *more, **others) -> list:
    given = {"dataset": folder / "rows.jsonl", "model": folder / "model", "dtype": "bfloat16", "max-length": 96, "shard-size": 4}
    given |= others
    return ["cli.py", "precompute", *(word for name, value in given.items() for word in (f"--{name}", value)), *more]


@pytest.fixture(scope="module")
def store(folder) -> Path:
    said = run(precompute(folder, "--ref-store", folder / "store", "--tokens-per-batch", "auto"), environment(2, gib=0.05))
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
def test_a_worker_of_two_gpus_is_killed_and_the_other_one_finishes(folder):
    """Four GPUs, two to a worker, and an adapter as the reference: its store has what a plain forward of the merge on a CPU says."""
    generator = torch.Generator().manual_seed(0)
    policy = get_peft_model(tiny.make_model("olmo3"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    for weight in (each for each in policy.parameters() if each.requires_grad):
        weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    policy.peft_config["default"].base_model_name_or_path = str(folder / "model")
    policy.save_pretrained(folder / "adapter")
    by_twos = ["--gpus-per-worker", 2]
    others = {"model": folder / "adapter", "tokenizer": folder / "model", "dtype": "float32", "limit": 20}
    command = [sys.executable, *precompute(folder, *by_twos, "--ref-store", folder / "by-twos", **others)]
    with shard_held(folder / "by-twos", 4):
        launcher = subprocess.Popen(
            [*map(str, command)], env=environment(4), cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        while len(list((folder / "by-twos").glob("part-*.parquet"))) < 4:
            assert launcher.poll() is None, launcher.stdout.read()
            time.sleep(0.05)
        os.kill(worker(launcher, 1), signal.SIGKILL)
    said, _ = launcher.communicate(timeout=1200)
    assert launcher.returncode == 0, said
    assert re.search(r"^device: 4 x NVIDIA .*, 2 to a worker", said, re.MULTILINE)
    assert "worker 1 was killed by signal 9" in said and "is sealed: 20 pairs of 20 rows in 5 shards" in said

    merged = policy.merge_and_unload().eval()
    for pair in open_store(folder / "by-twos").read(range(20)).to_pylist():
        for side in ("chosen", "rejected"):
            ids = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])
            with torch.no_grad():
                logps = merged(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            np.testing.assert_allclose(pair[f"{side}_token_logps"], logps[len(pair["prompt_ids"]) - 1 :].numpy(), atol=1e-4)

    verify = ["cli.py", "verify", "--ref-store", folder / "by-twos", "--model", folder / "adapter", "--num-pairs", 4, *by_twos]
    said = run(verify, environment(2))
    assert "the weights that made the store" in said
    assert float(re.search(r"mean ([\d.e+-]+), max", said)[1]) < 1e-5


def worker(launcher: subprocess.Popen, rank: int) -> int:
    """The process that is this rank of a command's own."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return next(int(each) for each in children if f"\0RANK={rank}\0" in Path(f"/proc/{each}/environ").read_text())


@pytest.mark.slow
def test_two_ranks_train_evaluate_stop_and_go_on(store, folder):
    """Two steps; then the second again, from the first one's checkpoint, without measuring again what fits: the same weights."""
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
    fitting = ["--tokens-per-batch", record["micro_steps"]["tokens_per_batch"], "--no-gradient-checkpointing"]
    assert record["memory"]["gradient_checkpointing"] is False
    said = run([*command, folder / "again", "--resume", *fitting], environment(2))
    assert "resuming from" in said
    once, again = (load_file(folder / name / "model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert any(
        not torch.equal(once[name].float(), weight.float())
        for name, weight in load_file(folder / "model" / "model.safetensors").items()
    )


@pytest.mark.slow
def test_the_whole_report(tmp_path):
    """`make gpu` on two GPUs, in the shell of `srun --pty`, with more time than a real one takes: every part succeeds. tests/on_gpu/training.py
    is run here alone; of scoring.py and spread.py, all of which test_scoring runs, the first part has what counts."""
    few = {"PYTEST_ADDOPTS": "-k 'training or launches or same_bytes'"}
    shell = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    command = ["benchmarks/gpu.py", "--minutes", "100", "--output", tmp_path / "report.md"]
    said = run(command, environment(2) | few | shell, code=None)
    report = (tmp_path / "report.md").read_text()
    assert "failed" not in said and "**" not in report, report
    head, *parts = report.split("\n## ")
    assert head.startswith("# NVIDIA") and "| GPUs | 2 |" in head
    text = {part.split("\n", 1)[0]: part for part in parts}
    assert list(text) == ["Parity", "Scoring", "Profile", "Several", "Training"]
    for kind in tiny.CONFIGS:
        for dtype, bound in (("bfloat16", 0.06), ("float32", 1e-4)):
            mean = re.search(rf"^\| {kind} \| {dtype} \| ([\d.e+-]+) \|", text["Parity"], re.MULTILINE)[1]
            assert 0 < float(mean) < bound, text["Parity"]
    for names in ("`tests/on_gpu/training.py`", "`tests/on_gpu/scoring.py` and `tests/on_gpu/spread.py`"):
        assert re.search(rf"^{names}: \d+ passed", text["Parity"], re.MULTILINE), text["Parity"]
    assert "| 512 |" in text["Scoring"] and re.search(r"`--tokens-per-batch auto` chose [\d,]+ tokens", text["Scoring"])
    assert re.search(r"^\| matrix products \| [\d.]+% \| [\d.]+% \|$", text["Profile"], re.MULTILINE)
    for how in ("precompute --num-workers 1 --gpus-per-worker 2", "precompute --num-workers 2", "train --num-processes 2"):
        assert f"- `{how}`" in text["Several"]
    assert re.search(r"^- (\d+) of \1 shards are the same bytes from one worker and from two$", text["Several"], re.MULTILINE)
    for contender in ("online", "tokens"):
        assert re.search(rf"^{contender} +\d+ +[\d.]+ ", text["Training"], re.MULTILINE)
    assert re.search(r"^  online +[\d.]+ x ours", text["Training"], re.MULTILINE)


def of_report(code: str, *arguments) -> subprocess.Popen:
    """A process that has imported benchmarks/gpu.py; it imports no torch."""
    command = [sys.executable, "-c", f"import gpu, sys; from pathlib import Path; {code}", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(TESTS.parent / "benchmarks")}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_report_goes_on_past_parts_that_fail(tmp_path):
    """One never ends and one fails in the middle of a block; the next is in the report all the same."""
    (tmp_path / "part.py").write_text(
        "import sys, time\n"
        "name = sys.argv[sys.argv.index('--part') + 1]\n"
        "if name == 'several':\n"
        "    time.sleep(600)\n"
        "print(f'{name}, as far as it came\\n\\n```', flush=True)\n"
        "if name == 'profile':\n"
        "    raise KeyError('none')\n"
        "print('```')\n"
    )
    code = "gpu.__file__ = sys.argv.pop(); gpu.machine = lambda: {'device': 'NVIDIA', 'GPUs': 2, 'memory': '1 GiB'}\n"
    code += "gpu.PARTS |= {'several': 1}; gpu.main()"
    arguments = ["--parts", "several,profile,scoring", "--minutes", "5", "--output", tmp_path / "report.md", tmp_path / "part.py"]
    with of_report(code, *arguments) as process:
        said = process.communicate(timeout=600)[0]
    assert process.returncode == 1
    assert "failed: several, profile; the report says how" in said
    report = (tmp_path / "report.md").read_text()
    assert report.startswith("# NVIDIA")
    hung, profiled, scored = re.split("\n## [A-Z][a-z]+\n", report)[1:]
    assert re.search(r"\*\*This part took longer than \d s.\*\*", hung)
    assert "profile, as far as it came" in profiled
    assert "**This part ended with exit code 1.**" in profiled and "KeyError: 'none'" in profiled and profiled.count("```") == 4
    assert "scoring, as far as it came" in scored and "**" not in scored


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_part_does_not_outlive_the_command(tmp_path, sent):
    """Nor what it started in a session of its own, as torchrun does: they would stay on the GPU."""
    (tmp_path / "part.py").write_text(
        "import os, subprocess, sys, time\n"
        "from pathlib import Path\n"
        "rank = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "Path(__file__).with_name('new').write_text(f'{os.getpid()} {rank.pid}')\n"
        "Path(__file__).with_name('new').rename(Path(__file__).with_name('pid'))\n"
        "time.sleep(600)\n"
    )
    code = "gpu.__file__ = sys.argv.pop(); gpu.machine = lambda: {'device': 'none', 'GPUs': 2, 'memory': '1 GiB'}; gpu.main()"
    arguments = ["--parts", "several", "--output", tmp_path / "report.md", tmp_path / "part.py"]
    with of_report(code, *arguments) as process:
        while not (tmp_path / "pid").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(sent)
        assert process.wait(60) != 0
    for started in map(int, (tmp_path / "pid").read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(started, 0)
    assert (tmp_path / "report.md").read_text().startswith("# none")


def test_a_part_that_cannot_go_on_says_why_in_one_line():
    code = "from store.errors import InputError\n"
    code += (
        "def refuse(shape, seconds): raise InputError('does not fit', next='Free memory.')\ngpu.part_scoring = refuse; gpu.main()"
    )
    error = of_report(code, "--part", "scoring", "--shapes", "tiny,tiny", "--seconds", "5").communicate(timeout=600)[1]
    assert error == "Error: does not fit. Free memory.\n"


@pytest.mark.slow
def test_the_profile_of_scoring_stays_where_training_has_too_little_memory(tmp_path):
    command = ["benchmarks/gpu.py", "--minutes", "100", "--parts", "profile", "--output", tmp_path / "report.md"]
    if torch.cuda.is_available():
        pytest.skip("a real GPU's memory is what it is")
    run(command, environment(1, gib=0.012), code=1)
    report = (tmp_path / "report.md").read_text()
    assert re.search(r"^\| matrix products \| [\d.]+% \|$", report, re.MULTILINE) and "OutOfMemoryError" in report, report


def test_the_report_is_printed_where_it_cannot_be_written(tmp_path):
    """A folder in place of the file, as a full disk would: OSError."""
    (tmp_path / "report.md").mkdir()
    said, error = of_report("gpu.write(Path(sys.argv[1]), '# NVIDIA')", tmp_path / "report.md").communicate(timeout=600)
    assert said.startswith("# NVIDIA")
    assert error.startswith("Error: the report cannot be written: ") and "--output FILE" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--parts", "scoring,none"], "--parts none: no such part; there are parity, scoring"),
        (["--shapes", "7B"], "--shapes 7B: two are needed"),
        (["--shapes", "7B,none"], "--shapes none: no such shape; there are tiny, 1B, 7B, 7B/4"),
    ],
)
def test_words_that_the_report_does_not_know(words, text):
    assert text in of_report("gpu.main()", *words).communicate(timeout=600)[1]


def test_a_report_about_gpus_that_cannot_be_used(tmp_path):
    """One line, as every command's."""
    code = "import devices; from store.errors import InputError\n"
    code += (
        "def refuse(rank): raise InputError('4 GPUs are here, but PyTorch cannot use them')\ndevices.device = refuse; gpu.main()"
    )
    error = of_report(code, "--output", tmp_path / "report.md").communicate(timeout=600)[1]
    assert [line for line in error.splitlines() if "Error" in line] == ["Error: 4 GPUs are here, but PyTorch cannot use them."]
    assert not (tmp_path / "report.md").exists()


def test_shapes_fit_the_gpu():
    """Free GiB of a small one, and of 24, 40, 48, 80, 141 and 192 GB; 18 bytes for a parameter in training, and 2 for stock's reference."""
    sizes = (4, 15, 23, 39, 44, 79, 139, 178)
    said, error = of_report(f"print([gpu.shapes_for(gib) for gib in {sizes}])").communicate(timeout=600)
    shapes = [("tiny", "tiny"), ("1B", "tiny"), ("7B", "1B/4"), ("7B", "1B"), ("7B", "1B"), *[("7B", "7B/4")] * 3]
    assert ast.literal_eval(said) == shapes, error
    billions = {"tiny": 0, "1B/4": 0.68, "1B": 1.48, "7B/4": 2.44, "7B": 7.30}
    for gib, (scored, trained) in zip(sizes, shapes, strict=True):
        assert 2 * billions[scored] < 0.7 * gib and 20 * billions[trained] < 0.85 * gib


def test_a_part_sees_the_gpus_that_the_command_sees(monkeypatch):
    """By whatever name, and no srun."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5d0,3,1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    said, error = of_report("print(gpu.first_gpus(1), gpu.first_gpus(2), 'SLURM_PROCID' in gpu.own_environment())").communicate(
        timeout=600
    )
    assert said.strip() == "{'CUDA_VISIBLE_DEVICES': 'GPU-5d0'} {'CUDA_VISIBLE_DEVICES': 'GPU-5d0,3'} False", error


def test_no_room_for_the_model_that_is_trained():
    """Said before anything is run."""
    code = "gpu.shutil.disk_usage = lambda place: type('usage', (), {'free': 2**30}); gpu.refuse_small_disk('7B/4')"
    error = of_report(code).communicate(timeout=600)[1]
    assert re.fullmatch(r"Error: .* has 1.0 GiB free, 5.7 are needed. Name a larger place: TMPDIR=/larger make gpu\n", error)
