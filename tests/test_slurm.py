"""The batch scripts on real Slurm daemons: arrays, kills, requeues, two nodes, and the chain from phase 1 to phase 2. `make test-slurm`."""

import hashlib
import json
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from held import held_training, shard_held
from slurm_cluster import DONE, Slurm, cluster, obstacle

from store.reader import open_store
from store.verify import verify

ROOT = Path(__file__).parents[1]
STEPS = 12

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if reason := obstacle():
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def model(demo_model) -> Path:
    return demo_model


@pytest.fixture(scope="module")
def reference(tmp_path_factory, model) -> Path:
    """The store as one undisturbed worker without Slurm makes it, a row per shard."""
    store = tmp_path_factory.mktemp("reference") / "demo"
    options = ["--dataset", "demo", "--model", str(model), "--shard-size", "1", "--ref-store", str(store)]
    done = subprocess.run(
        [sys.executable, "cli.py", "precompute", *options], check=False, cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    return store


def submit(
    slurm: Slurm, model: Path, store: Path, logs: Path, *options: str, precompute: str = "", train: str = ""
) -> tuple[str, str]:
    """`cli.py submit` with one fake GPU per node and small jobs; the ids of both jobs."""
    logs.mkdir(exist_ok=True)
    argv = [
        sys.executable,
        "cli.py",
        "submit",
        "--dataset",
        "demo",
        "--ref-store",
        str(store),
        "--gpus",
        "1",
        "--cpus",
        "2",
        "--mem",
        "1G",
    ]
    argv += [
        "--time",
        "30",
        "--sbatch-args",
        f"--output={logs}/%x-%j.out",
        "--precompute-args",
        f"--model {model} {precompute}",
        "--train-args",
        train,
        *options,
    ]
    out = slurm.run(*argv, cwd=ROOT, env={"PYTHON": sys.executable})
    first, second = re.search(r"phase 1 is job (\d+), phase 2 is job (\d+)", out).groups()
    return first, second


def test_a_node_out_of_service_is_put_back(slurm):
    """What the tests below build on where Slurm takes one of the two nodes away."""
    slurm.run("scontrol", "update", "nodename=n2", "state=drain", "reason=tried")
    job = slurm.run("sbatch", "--parsable", "--nodes=2", "--output=/dev/null", "--wrap", "true")
    with pytest.warns(UserWarning, match="took n2 out of service: tried"):
        assert slurm.wait(job, DONE) == {job: "COMPLETED"}


SAY = "from store.command import again; print(again('--resume'))"


def test_under_srun_the_command_is_that_of_srun(slurm, tmp_path):
    """What every task prints, typed again in the same folder, prints itself."""
    (tmp_path / "cli.py").write_text(SAY)
    typed = ["srun", "--nodes=2", "--ntasks=3", "--gpus-per-node=2", sys.executable, "cli.py", "train", "--ref-store", "a store"]
    environ = {"PYTHONPATH": str(ROOT)}
    printed = set(slurm.run(*typed, cwd=tmp_path, env=environ).splitlines())
    assert len(printed) == 1
    words = shlex.split(printed.pop())
    assert words[0] == "srun" and {*typed[1:4]} <= {*words} and words[words.index(sys.executable) :] == [*typed[4:], "--resume"]
    assert {*slurm.run(*words, cwd=tmp_path, env=environ).splitlines()} == {shlex.join(words)}


def test_submitted_from_another_folder_with_resources_for_each_phase(slurm, model, tmp_path):
    """Relative paths, another kind and number of GPUs, queue and limit for each phase; the store remembers what was typed."""
    (tmp_path / "rows.jsonl").write_text((ROOT / "demo/pairs.jsonl").read_text())
    typed = [
        sys.executable,
        str(ROOT / "cli.py"),
        "submit",
        "--dataset",
        "rows.jsonl",
        "--cpus",
        "4",
        "--mem",
        "1G",
        "--time",
        "30",
    ]
    typed += ["--precompute-gpus", "red:2", "--train-gpus", "blue:1", "--train-time", "25", "--train-partition", "other"]
    typed += ["--precompute-args", f"--model {model} --max-length 512 --dtype float32 --limit 24 --shard-size 4"]
    typed += ["--train-args", "--max-steps 2 --effective-batch-size 4 --output-dir out"]
    out = slurm.run(*typed, cwd=tmp_path, env={"PYTHON": sys.executable})
    first, second = re.search(r"phase 1 is job (\d+), phase 2 is job (\d+)", out).groups()
    of_first, of_second = slurm.jobs(first)[first], slurm.jobs(second)[second]
    assert (of_first["Partition"], of_first["TimeLimit"]) == ("all", "00:30:00")
    assert (of_second["Partition"], of_second["TimeLimit"]) == ("other", "00:25:00")
    assert slurm.wait(first, DONE) == {first: "COMPLETED"}, logged(tmp_path / "logs")
    assert slurm.wait(second, DONE) == {second: "COMPLETED"}, logged(tmp_path / "logs")
    assert (slurm.jobs(first)[first]["NodeList"], slurm.jobs(second)[second]["NodeList"]) == ("n1", "n2")
    manifest = open_store(tmp_path / "store" / "rows", check="sha256").manifest
    assert manifest.identity.num_rows == 24 and manifest.command.words == tuple(typed) and manifest.command.folder == str(tmp_path)
    said = logged(tmp_path / "logs")
    assert "device: 2 x " in said  # a worker for each GPU; the first may find that the other has scored all of 24 rows
    assert ("pairs · " in said and "by 2 workers" in said) or "by other workers" in said, said[:4000]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "finished" and record["world_size"] == 1 and record["result"]["num_steps"] == 2


def shard_bytes(store: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(store.glob("*.parquet"))}


def logged(logs: Path) -> str:
    return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(logs.glob("*.out")))


def wait_until(condition, logs: Path, timeout: float = 600) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, logged(logs)
        time.sleep(0.05)


def losses(output_dir: Path) -> list[float]:
    history = json.loads((output_dir / "run.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_an_array_with_a_killed_and_a_requeued_task_seals_the_same_store(slurm, model, reference, tmp_path):
    """Eight workers on two nodes. One is killed, one requeued while they work; the others take over, and all but the killed one succeed."""
    store, logs = tmp_path / "a store", tmp_path / "logs"

    def at_work() -> list[str]:
        """Tasks whose worker has said its first line: Slurm calls a task running that has not begun."""
        tasks = slurm.jobs(first)
        said = {path.name: "device: " in path.read_text() for path in logs.glob("*.out")}
        begun = {task for task, fields in tasks.items() if said.get(f"refdpo-precompute-{fields['JobId']}.out")}
        return [task for task, fields in tasks.items() if fields["JobState"] == "RUNNING" and task in begun]

    with shard_held(store, 40):  # no task can end before these two were hit
        first, second = submit(slurm, model, store, logs, "--array", "8", precompute="--shard-size 1")
        wait_until(lambda: list(store.glob("*.parquet")) and len(at_work()) > 1, logs)
        assert len(slurm.states(first)) == 8
        killed, requeued = at_work()[:2]
        slurm.run("scancel", "--signal=KILL", killed)
        slurm.run("scontrol", "requeue", requeued)
    states = slurm.wait(first, DONE)
    assert states.pop(killed) in ("FAILED", "CANCELLED"), logged(logs)
    assert set(states.values()) == {"COMPLETED"}, (states, logged(logs))
    assert slurm.jobs(first)[requeued]["Restarts"] == "1"
    assert shard_bytes(store) == shard_bytes(reference)
    assert verify(store) == [] and not (store / ".staging").exists()
    # One task failed, hence afterok cannot hold any more: phase 2 is cancelled and does not wait for ever.
    assert slurm.wait(second, DONE) == {second: "CANCELLED"}
    assert not list(logs.glob("refdpo-train*"))


def test_a_failing_phase_1_keeps_phase_2_from_starting(slurm, model, tmp_path):
    store, logs = tmp_path / "store", tmp_path / "logs"
    first, second = submit(slurm, model, store, logs, precompute="--max-length 100000")
    assert slurm.wait(first, DONE) == {first: "FAILED"}
    assert "longer than the model's context" in logged(logs)
    assert slurm.wait(second, DONE) == {second: "CANCELLED"}
    assert not list(logs.glob("refdpo-train*")) and not store.exists()


@pytest.fixture(scope="module")
def chained(slurm, model, tmp_path_factory) -> Path:
    """Both phases, undisturbed: one node scores, then two nodes train."""
    folder = tmp_path_factory.mktemp("chain")
    train = f"--max-steps {STEPS} --output-dir {folder}/run"
    first, second = submit(slurm, model, folder / "store", folder / "logs", "--train-nodes", "2", train=train)
    assert slurm.jobs(second)[second]["Dependency"].startswith("afterok:")
    assert slurm.wait(first, DONE) == {first: "COMPLETED"}, logged(folder / "logs")
    assert slurm.wait(second, DONE) == {second: "COMPLETED"}, logged(folder / "logs")
    assert slurm.jobs(second)[second]["NodeList"] == "n[1-2]"
    return folder


def test_the_chain_trains_on_two_nodes(chained):
    store = open_store(chained / "store", check="sha256")
    record = json.loads((chained / "run" / "run.json").read_text())
    assert record["status"] == "finished" and record["result"]["num_steps"] == STEPS
    assert record["store"]["weights_sha256"] == store.identity.weights_sha256
    assert losses(chained / "run")[0] == pytest.approx(0.6931, abs=1e-3)
    assert list((chained / "run").glob("*.safetensors"))


def test_a_warned_phase_1_is_requeued_and_goes_on(slurm, model, reference, tmp_path):
    """SIGUSR1 to the batch script, as Slurm sends it before the time limit: the job runs twice and seals the same bytes."""
    store, logs = tmp_path / "store", tmp_path / "logs"
    with shard_held(store, 40):  # the job cannot end before it is warned
        first, _ = submit(
            slurm, model, store, logs, precompute="--shard-size 1", train=f"--max-steps 1 --output-dir {tmp_path}/run"
        )
        wait_until(lambda: list(store.glob("*.parquet")), logs)
        slurm.run("scancel", "--batch", "--signal=USR1", first)
        wait_until(lambda: "requeueing" in logged(logs), logs)
    assert re.search(r"stopped by SIGUSR1.* to go on: \S*python cli.py submit --dataset demo --ref-store ", logged(logs)), logged(
        logs
    )
    assert not (store / "_manifest.json").exists(), logged(logs)
    assert slurm.wait(first, DONE) == {first: "COMPLETED"}, logged(logs)
    assert slurm.jobs(first)[first]["Restarts"] == "1"
    assert "rows are done, going on" in logged(logs)
    assert shard_bytes(store) == shard_bytes(reference)


def test_a_warned_training_is_requeued_and_resumes_to_the_same_losses(slurm, chained, tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    options = [
        "--nodes=2",
        "--gpus-per-node=1",
        "--cpus-per-task=2",
        "--mem=1G",
        "--time=30",
        f"--output={logs}/%x-%j.out",
        f"--chdir={ROOT}",
    ]
    arguments = ["--ref-store", chained / "store", "--max-steps", STEPS, "--output-dir", tmp_path / "run"]
    environ = {"PYTHON": sys.executable} | held_training()
    job = slurm.run("sbatch", "--parsable", *options, ROOT / "slurm/train.sbatch", *arguments, env=environ)
    wait_until(lambda: f"step 1/{STEPS}" in logged(logs), logs)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait(job, DONE) == {job: "COMPLETED"}, logged(logs)
    assert slurm.jobs(job)[job]["Restarts"] == "1", logged(logs)
    stopped_at = int(re.search(r"a checkpoint is written at step (\d+) of", logged(logs))[1])
    assert 1 <= stopped_at < STEPS
    assert f"resuming from {tmp_path}/run/checkpoint-{stopped_at}" in logged(logs)
    assert losses(tmp_path / "run") == losses(chained / "run")
    # Once more, with the command that was printed, as after a crash of the controller: nothing to do, and said so.
    again = shlex.split(re.search(r"stopped by SIGUSR1.* to go on: (.*)$", logged(logs), re.MULTILINE)[1])
    assert {"--nodes=2", "--gpus-per-node=1", "--cpus-per-task=2", "slurm/train.sbatch", *map(str, arguments)} <= {*again}
    job = slurm.run("sbatch", "--parsable", f"--output={logs}/%x-%j.out", *again[1:], cwd=ROOT, env={"PYTHON": sys.executable})
    assert slurm.wait(job, DONE) == {job: "COMPLETED"}, logged(logs)
    assert "trained already, nothing to do" in logged(logs)


def test_status_answers_fast_and_without_torch(chained):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "cli.py", "status", "--ref-store", str(chained / "store")],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Seconds of CPU, not of the clock: other processes may keep the machine busy.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert not re.search(r"\b(torch|transformers|datasets|duckdb)\b$", done.stderr, re.MULTILINE)
    assert "sealed, 6 shards, 88 pairs of 88 rows" in done.stdout
