"""`submit` and the batch scripts without a cluster: what is refused before anything is queued, what sbatch would get, what the shell does."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from store_samples import make_identity, make_store

import cli
from store.command import VARIABLE

ROOT = Path(__file__).parents[1]


def submit(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.main, ["submit", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def commands(*words: str) -> tuple[list[str], list[str]]:
    """The two sbatch commands that `--dry-run` prints."""
    first, second = submit(*words, "--dry-run").splitlines()[1:3]
    return shlex.split(first), shlex.split(second)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The user's, where the repository is not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    (tmp_path / "template.jinja").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "no model").mkdir()
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    (tmp_path / "other.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": 64}))
    (tmp_path / "runs" / "full").mkdir(parents=True)
    (tmp_path / "runs" / "full" / "thesis.txt").write_text("precious")
    return tmp_path


OWN = "--dataset pairs.jsonl --precompute-args '--model ./model --max-length 64 --dtype float32'"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataset nowhere.jsonl --precompute-args '--model m --max-length 64 --dtype float32'", "nowhere.jsonl: no such file"),
        ("--dataset 'no-*.parquet' --precompute-args '--model m --max-length 64 --dtype float32'", "no file matches"),
        ("--dataset ./think --precompute-args '--model m --max-length 64 --dtype float32'", "--dataset ./think: no such file"),
        (
            "--dataset pairs.jsonl --dataset b.jsonl --precompute-args '--model m --max-length 64 --dtype float32'",
            "b.jsonl: no such",
        ),
        ("--dataset acme/prefs", "--precompute-args: --model, --max-length, --dtype must be given"),
        ("--dataset acme/prefs --precompute-args '--max-length 64 --dtype float32'", "--model must be given"),
        ("--dataset think --precompute-args '--model ./nowhere'", "--model ./nowhere: no such folder"),
        ("--dataset think --precompute-args '--model \"no model\"'", "holds no model; expected config.json"),
        ("--dataset think --precompute-args '--model pairs.jsonl'", "a file, not the folder of a model"),
        ("--dataset think --precompute-args '--tokenizer a:b'", "neither a file or folder that is there nor a hub id"),
        ("--dataset think --precompute-args '--max-lenght 64'", "--precompute-args: No such option '--max-lenght'"),
        ("--dataset think --precompute-args '--max-length many'", "--precompute-args: Invalid value for '--max-length'"),
        ("--dataset think --precompute-args '--chat-template nowhere.jinja'", "'nowhere.jinja' does not exist"),
        ("--dataset think --precompute-args '--ref-store x'", "--precompute-args --ref-store: is not for these"),
        ("--dataset think --precompute-args '--dtype float32 --dtype bfloat16'", "--dtype: given 2 times"),
        ("--dataset think --precompute-args '\"'", "--precompute-args: cannot be split into words"),
        ("--dataset think --ref-store runs/full", "neither empty nor a reference store"),
        ("--dataset think --ref-store made", "made with another max length, dtype; expected max_length 8192; dtype bfloat16"),
        ("--dataset think --train-args '--lerning-rate 1'", "--train-args: No such option '--lerning-rate'"),
        ("--dataset think --train-args '--loss-type sigmoidal'", "unknown loss type"),
        ("--dataset think --train-args '--chat-template nowhere.jinja'", "'nowhere.jinja' does not exist"),
        ("--dataset think --train-args '--zero-config nowhere.json'", "'nowhere.json' does not exist"),
        ("--dataset think --train-args '--zero-config other.json'", "--zero-config other.json: contradicts the options"),
        ("--dataset think --train-args '--policy ./nowhere'", "--policy ./nowhere: no such folder"),
        ("--dataset think --train-args '--eval-ref-store nowhere'", "nowhere: no such folder"),
        ("--dataset think --train-args '--output-dir runs/full'", "the output folder is not empty"),
        ("--dataset think --train-args '--max-length 9000'", "longer than what phase 1 scores; expected at most 8192"),
        (
            "--dataset think --gpus 3 --train-args '--per-device-train-batch-size 1'",
            "an effective batch of 128 pairs does not divide over 3 devices",
        ),
        ("--dataset think --train-nodes 3 --train-args '--per-device-train-batch-size 1'", "does not divide over 12 devices"),
        ("--dataset think --gpus h100", "expected 4, or with the kind: h100:4"),
        ("--dataset think --gpus gpu:4", "expected 4, or with the kind: h100:4"),
        ("--dataset think --gpus gpu:h100:4", "expected 4, or with the kind: h100:4"),
        (
            "--dataset think --precompute-gpus h100:4 --precompute-args '--gpus-per-worker 3'",
            "--precompute-args --gpus-per-worker 3: some GPUs of a node would do nothing; expected a divisor of 4",
        ),
        ("--dataset think --precompute-gpus h100:64", "fewer CPUs than GPUs; expected at least 64"),
        ("--dataset think --sbatch-args '\"'", "--sbatch-args: cannot be split into words"),
    ],
)
def test_what_would_fail_in_the_job_is_refused_before_it_is_queued(folder, words, message):
    make_store(folder / "made", make_identity(max_length=64, dtype="float32"))
    output = submit(*shlex.split(words), code=1 if "made" in words else 2)
    assert message in output and output.startswith("Error: ") and output.count("\n") == 1, output
    assert not (folder / "logs").exists()


def test_each_phase_has_its_own_resources_where_they_are_given(folder):
    first, second = commands("--dataset", "think")
    for words in (first, second):
        assert {"--gpus-per-node=4", "--cpus-per-task=32", "--mem=500G", "--time=24:00:00", "--nodes=1"} <= {*words}
        assert not any(word.startswith(("--partition", "--account", "--qos")) for word in words)
    first, second = commands(
        *[
            "--dataset",
            "think",
            "--gpus",
            "h100:4",
            "--train-gpus",
            "b200:8",
            "--cpus",
            "16",
            "--train-cpus",
            "64",
            "--mem",
            "200G",
            "--precompute-mem",
            "100G",
        ],
        *[
            "--time",
            "1-0",
            "--precompute-time",
            "2:00:00",
            "--partition",
            "gpu",
            "--train-partition",
            "big",
            "--qos",
            "low",
            "--train-qos",
            "high",
            "--account",
            "a",
        ],
        *["--train-account", "b", "--array", "8", "--train-nodes", "2", "--sbatch-args"],
        "--nice=5 --comment='a b'",
        "--train-sbatch-args",
        "--exclusive",
    )
    shared = ["--nice=5", "--comment=a b"]
    of_first = (
        "--gpus-per-node=h100:4 --cpus-per-task=16 --mem=100G --time=2:00:00 --partition=gpu --account=a --qos=low --array=0-7"
    )
    of_second = "--gpus-per-node=b200:8 --cpus-per-task=64 --mem=200G --time=1-0 --partition=big --account=b --qos=high --nodes=2 --exclusive"
    assert {*shared, *of_first.split()} <= {*first} and {*shared, *of_second.split()} <= {*second}
    assert "--exclusive" not in first and not any(word.startswith("--dependency") for word in first)
    assert commands("--dataset", "think", "--gpus", "a100:2,h100:2")[1].count("--gpus-per-node=a100:2,h100:2") == 1
    assert "--gpus-per-node=0" in commands("--dataset", "think", "--gpus", "0")[0]


def test_paths_are_those_of_the_folder_it_is_typed_in(folder):
    own = shlex.split(OWN.replace("float32'", "float32 --chat-template template.jinja --layout padded'"))
    first, second = commands(*own, "--train-args", "--zero-config zero.json")
    assert first[first.index(f"{ROOT}/slurm/precompute.sbatch") :][1:5] == [
        "--dataset",
        "pairs.jsonl",
        "--ref-store",
        "store/pairs",
    ]
    # Phase 2 gets what it cannot take from the store: hours later its gate would refuse another template.
    needed = ["--ref-store", "store/pairs", "--chat-template", "template.jinja", "--layout", "padded", "--zero-config", "zero.json"]
    assert second[second.index(f"{ROOT}/slurm/train.sbatch") :][1:] == needed
    for words in (first, second):
        assert f"--chdir={ROOT}" in words and f"--output={folder}/logs/%x-%j.out" in words
    _, second = commands(*own, "--train-args", "--layout packed --chat-template ./template.jinja")
    assert second[second.index("--ref-store") + 2 :] == ["--layout", "packed", "--chat-template", "./template.jinja"]


# --- the scripts, in a shell of their own


def in_job(script: str, cwd: Path, **environ: str) -> str:
    """Standard output of a shell that starts in the repository, as the jobs do, and sources slurm/job.sh."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PYTORCH_", "OMP_", "REFDPO_"))}
    keep |= {"SLURM_SUBMIT_DIR": str(cwd), "SLURM_JOB_ID": "7"} | environ
    lines = f"source slurm/job.sh || exit 9\n{script}"
    done = subprocess.run(["bash", "-c", lines], check=False, cwd=ROOT, env=keep, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_job_takes_its_workers_from_its_gpus(tmp_path):
    say = 'echo "$ranks $cpus $cpus_per_rank $OMP_NUM_THREADS"'
    for environ, said in (
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32"}, "4 32 8 8"),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS_PER_NODE": "4"}, "8 32 4 4"),
        ({"SLURM_CPUS_PER_TASK": "6"}, "1 6 6 6"),
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_CPUS_PER_TASK": "6", "OMP_NUM_THREADS": "2"}, "1 6 6 2"),
        ({"REFDPO_RANKS_PER_NODE": "3", "SLURM_CPUS_PER_TASK": "2"}, "3 2 1 1"),
    ):
        assert in_job(say, tmp_path, **environ) == said


def test_a_number_of_gpus_that_is_none_is_an_error_and_not_one_rank(tmp_path):
    """Bash would take it for 0, and the script would start one rank on a node of four GPUs."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    command = ["bash", "-c", "source slurm/job.sh; echo went on"]
    env = keep | {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_GPUS_ON_NODE": "gpu:4"}
    done = subprocess.run(command, check=False, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "", done.stdout
    assert done.stderr.startswith("Error: SLURM_GPUS_ON_NODE=gpu:4: no number") and done.stderr.count("\n") == 1, done.stderr


def test_steps_get_the_environment_of_the_job_whatever_the_job_got(tmp_path):
    """Of --export=NONE, which srun would hand on to its tasks: they had neither .env nor PATH."""
    assert in_job('echo "$SLURM_EXPORT_ENV"', tmp_path, SLURM_EXPORT_ENV="NONE") == "ALL"


@pytest.mark.parametrize(
    ("sent", "own", "launcher", "code"),
    [
        ("TERM", 1, "torch.distributed.run", 75),
        ("TERM", 0, "torch.distributed.run", 0),
        (None, 1, "torch.distributed.run", 1),
        ("TERM", 2, "torch.distributed.run", 2),
        ("TERM", 1, "cli.py", 1),
    ],
)
def test_a_step_that_was_told_to_stop_ends_with_the_code_that_says_so(tmp_path, sent, own, launcher, code):
    """torchrun's is 1, as for a failure. What ended well has ended well, and workers say themselves how they ended."""
    flag = shlex.quote(str(tmp_path / "started"))
    step = f"sleep 600 & trap 'kill $!; exit {own}' TERM; touch {flag}; wait $!" if sent else f"exit {own}"
    tell = f"(until [[ -f {flag} ]]; do sleep 0.05; done; kill -{sent} $$) &" if sent else ""
    script = f"source slurm/job.sh\n{tell}\ntrap 'echo code $?' EXIT\nrun_step bash -c {shlex.quote(step)} {launcher}"
    keep = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env = keep | {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_JOB_NODELIST": "n1"}
    command = ["bash", "-c", script]
    done = subprocess.run(command, check=False, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines()[-1] == f"code {code}", done.stdout + done.stderr


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def test_the_first_node_alone_hosts_the_rendezvous(tmp_path):
    """torchrun decides by the name of its machine, and where that is 127.0.1.1 no node would."""
    program(
        tmp_path / "scontrol", 'if [[ $2 == hostnames ]]; then echo n1; else echo "NodeName=n1 NodeAddr=10.0.0.1 State=IDLE"; fi'
    )
    program(tmp_path / "srun", 'while [[ $1 == --* ]]; do shift; done; for id in 0 1; do SLURM_NODEID=$id "$@"; done')
    program(tmp_path / "python", 'echo "$@"')
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
    keep = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env = (
        keep
        | job
        | {"SLURM_SUBMIT_DIR": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
    )
    command = ["bash", "slurm/train.sbatch", "--ref-store", "a store"]
    done = subprocess.run(command, check=True, cwd=ROOT, env=env, capture_output=True, text=True)
    of_nodes = [line for line in done.stdout.splitlines() if line.startswith("-m torch.distributed.run")]
    assert [re.search(r"--rdzv-conf=is_host=(\d) ", line)[1] for line in of_nodes] == ["1", "0"], done.stdout
    assert all(
        "--rdzv-endpoint=10.0.0.1:20007 " in line and line.endswith("train --resume-or-start --ref-store a store")
        for line in of_nodes
    )


def test_a_job_that_is_submitted_within_a_job_gets_nothing_of_it(folder, monkeypatch):
    """In the shell of `srun --mem-per-cpu=4G --pty bash` phase 1 ended with "srun: fatal: SLURM_MEM_PER_CPU, … are mutually exclusive"."""
    program(folder / "sbatch", f"env >> {folder}/seen; echo 7")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    (folder / "seen").touch()
    for name, value in {
        "SLURM_MEM_PER_CPU": "4096",
        "SLURM_CPU_BIND": "mask_cpu:0x1",
        "SLURM_CONF": "/etc/x",
        "SBATCH_QOS": "low",
    }.items():
        monkeypatch.setenv(name, value)

    def seen() -> set[str]:
        (folder / "seen").write_text("")
        submit(*shlex.split(OWN))
        return {line.partition("=")[0] for line in (folder / "seen").read_text().splitlines()}

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert {"SLURM_MEM_PER_CPU", "SLURM_CPU_BIND", "SLURM_CONF"} <= seen()  # a user's own
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    assert {name for name in seen() if name.startswith(("SLURM_", "SBATCH_"))} == {"SLURM_CONF", "SBATCH_QOS"}


def test_a_job_takes_fewer_workers_where_each_has_several_gpus(tmp_path):
    (tmp_path / "run.yaml").write_text("gpus_per_worker: 4\n")
    node = {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32"}
    say = 'echo "$ranks $cpus_per_rank $OMP_NUM_THREADS"'
    for words, said in (
        ("--dataset demo --gpus-per-worker 2", "2 16 16"),
        ("--gpus-per-worker=2 --dataset demo", "2 16 16"),
        ("--dataset demo --config run.yaml", "1 32 32"),
        ("--dataset demo", "4 8 8"),
        ("--dataset demo --no-such-option", "4 8 8"),
    ):
        assert in_job(f'share_node "$(gpus_per_worker {words})"\n{say}', tmp_path, **node) == said
    wrong = 'error=$(share_node "$(gpus_per_worker --dataset demo --gpus-per-worker 3)" 2>&1); echo "$? $error"'
    said = "2 Error: --gpus-per-worker 3: some GPUs would do nothing; expected a divisor of 4, the number of GPUs of this node."
    assert in_job(wrong, tmp_path, **node) == said


def test_a_job_works_where_it_was_submitted_and_leaves_the_sites_settings_alone(tmp_path):
    (tmp_path / ".env").write_text("WANDB_API_KEY=secret\n")
    say = 'echo "$PWD $WANDB_API_KEY"; env | grep -E "^(NCCL|PYTORCH)" | sort'
    lines = in_job(say, tmp_path, NCCL_SOCKET_IFNAME="ib0").splitlines()
    assert lines == [f"{tmp_path} secret", "NCCL_SOCKET_IFNAME=ib0", "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"]
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        assert in_job("env | grep ^PYTORCH", tmp_path, **{name: "max_split_size_mb:512"}) == f"{name}=max_split_size_mb:512"


def test_a_job_says_how_it_was_submitted(tmp_path):
    tell = f"typed_again slurm/train.sbatch --where \"a < 'b c'\" --ref-store 'x y'; echo \"${VARIABLE}\""
    options = ["--where", "a < 'b c'", "--ref-store", "x y"]
    layout = {
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_PER_NODE": "h100:4",
        "SLURM_JOB_PARTITION": "gpu",
        "SLURM_JOB_ACCOUNT": "(null)",
    }
    array = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "7", "SLURM_ARRAY_TASK_STEP": "1"}
    words = shlex.split(in_job(tell, tmp_path, **layout, **array))
    given = ["--partition=gpu", "--nodes=2", "--gpus-per-node=h100:4", "--array=0-7:1", f"--chdir={ROOT}"]
    assert words == ["sbatch", *given, f"{ROOT}/slurm/train.sbatch", *options]
    assert shlex.split(in_job(tell, ROOT)) == ["sbatch", "slurm/train.sbatch", *options]
    assert in_job(tell, tmp_path, **{VARIABLE: "python cli.py submit --dataset think"}) == "python cli.py submit --dataset think"


def test_ranks_are_bound_only_where_the_job_has_cpus_beside_every_gpu(tmp_path):
    devices, path = tmp_path / "devices", tmp_path / "bin"
    path.mkdir()

    def near(mine: str | None, *nodes: int) -> bool:
        for number, node in enumerate(nodes):
            (devices / str(number)).mkdir(parents=True, exist_ok=True)
            for name, value in (("vendor", "0x10de"), ("class", "0x030200"), ("numa_node", node)):
                (devices / str(number) / name).write_text(f"{value}\n")
        (devices / "network").mkdir(parents=True, exist_ok=True)
        for name, value in (("vendor", "0x15b3"), ("class", "0x020000"), ("numa_node", 7)):
            (devices / "network" / name).write_text(f"{value}\n")
        tool = path / "numactl"
        tool.unlink(missing_ok=True)
        if mine is not None:
            tool.write_text(f"#!/bin/sh\necho 'cpubind: 9 '\necho 'nodebind: {mine} '\n")
            tool.chmod(0o755)
        return in_job(f"near_gpus {devices} && echo yes || echo no", tmp_path, PATH=f"{path}:/usr/bin:/bin") == "yes"

    assert not near("0 1")  # no GPU at all
    assert near("0 1", 0, 0, 1, 1)
    assert not near("0", 0, 0, 1, 1)  # the job has no CPUs of the second NUMA node
    assert not near("0 1", 0, 0, 0, 0)  # nothing to choose between
    assert not near("0 1", -1, -1, -1, -1)  # the machine does not say
    if not Path("/usr/bin/numactl").exists():
        assert not near(None, 0, 0, 1, 1)
