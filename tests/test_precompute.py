"""Phase 1 as a user runs it: real processes, real kill -9, the same bytes whoever did the work."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from held import shard_held
from transformers import AutoModelForCausalLM, LlamaConfig

import cli
from store.reader import open_store
from store.verify import verify

ROOT = Path(__file__).parents[1]


def write_rows(path: Path, num_rows: int) -> Path:
    """Conversations of varied length; rows share prompts in threes; two have a prompt that fills any short max_length."""
    rng = np.random.default_rng(0)
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "and",
        "then",
        "answers",
        "42",
        "because",
        "it",
        "can",
    ]

    def text(length):
        return " ".join(rng.choice(words, length))

    with open(path, "w") as file:
        for row in range(num_rows):
            if row % 3 == 0:
                prompt = [{"role": "user", "content": text(300 if row in (6, 21) else rng.integers(3, 30))}]
            sides = [{"role": "assistant", "content": text(rng.integers(1, 40))} for _ in range(2)]
            file.write(json.dumps({"prompt": prompt, "chosen": sides[:1], "rejected": sides[1:]}) + "\n")
    return path


def command(dataset: Path, model: Path, store: Path, *more: str) -> list[str]:
    required = [
        "--dataset",
        str(dataset),
        "--model",
        str(model),
        "--max-length",
        "200",
        "--dtype",
        "float32",
        "--ref-store",
        str(store),
    ]
    return [sys.executable, str(ROOT / "cli.py"), "precompute", *required, "--shard-size", "4", "--tokens-per-batch", "512", *more]


def start(argv: list[str], **environ: str) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        argv, env=env | {"OMP_NUM_THREADS": "1"} | environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    return out, err


def shard_bytes(store: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(store.glob("*.parquet"))}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", 70)


@pytest.fixture(scope="module")
def one_worker(rows, tiny_olmo3, tmp_path_factory) -> Path:
    """The undisturbed store of one worker, this process."""
    store = tmp_path_factory.mktemp("stores") / "one"
    result = CliRunner().invoke(cli.main, command(rows, tiny_olmo3, store)[2:])
    assert result.exit_code == 0, result.output
    out = result.stdout
    assert f"{store} is sealed: 64 pairs of 70 rows in 18 shards" in out
    assert "6 rows could not be scored" in out and "row 6: the prompt alone has" in out
    return store


def test_the_store_is_right(one_worker, rows, tiny_olmo3):
    """Stored log-probs equal a plain forward of the stored ids; sums, counts and coverage pass verify."""
    assert verify(one_worker) == []
    store = open_store(one_worker, check="sha256")
    model = AutoModelForCausalLM.from_pretrained(tiny_olmo3, dtype=torch.float32).eval()
    for pair in store.read(range(0, store.num_pairs, 7)).to_pylist():
        for side in ("chosen", "rejected"):
            ids = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            logps = logps[len(pair["prompt_ids"]) - 1 :].numpy()
            np.testing.assert_allclose(pair[f"{side}_token_logps"], logps, atol=1e-4)
            assert pair[f"ref_{side}_logps"] == pytest.approx(float(logps.sum(dtype=np.float64)), abs=1e-3)
    assert store.manifest.provenance["layout"] == "packed"
    assert store.manifest.model_tokens < store.manifest.num_completion_tokens + 2 * store.manifest.num_prompt_tokens


def test_three_workers_write_the_same_bytes(one_worker, rows, tiny_olmo3, tmp_path):
    finish(start(command(rows, tiny_olmo3, tmp_path / "three", "--num-workers", "3")))
    assert shard_bytes(tmp_path / "three") == shard_bytes(one_worker)


def test_a_killed_run_is_finished_by_others_to_the_same_bytes(one_worker, rows, tiny_olmo3, tmp_path):
    """SIGKILL the whole group of two workers half-way, then go on with two others: nothing is lost, nothing differs."""
    store = tmp_path / "killed"
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with shard_held(store, 11):
        victim = subprocess.Popen(
            command(rows, tiny_olmo3, store, "--num-workers", "2"),
            env=env | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 600
        while len(list(store.glob("*.parquet"))) < 5:
            assert victim.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
    done = len(shard_bytes(store))
    assert 5 <= done < 18 and not (store / "_manifest.json").exists()
    _, err = finish(start(command(rows, tiny_olmo3, store, "--num-workers", "2")))
    # The first worker says so, unless the other has begun so much earlier that it is done.
    assert "rows are done, going on" in err or "sealed already, nothing to score" in err, err
    assert shard_bytes(store) == shard_bytes(one_worker)
    assert verify(store) == []


def test_a_worker_killed_among_others_is_replaced(one_worker, rows, tiny_olmo3, tmp_path):
    """Two workers of a launcher, one of them killed: the survivor takes over its shard and seals."""
    store = tmp_path / "survivor"
    with shard_held(store, 11):
        workers = [
            start(command(rows, tiny_olmo3, store), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)) for rank in range(2)
        ]
        while not list(store.glob("*.parquet")):
            assert workers[1].poll() is None
            time.sleep(0.002)
        workers[1].kill()
        finish(workers[1], code=-signal.SIGKILL)
    finish(workers[0])
    assert shard_bytes(store) == shard_bytes(one_worker)
    assert (store / "_manifest.json").exists()


def again(argv: list[str]) -> tuple[int, str]:
    """(exit code, stderr) of the command, run in this process: start-up is most of what it costs."""
    result = CliRunner().invoke(cli.main, argv[2:])
    return result.exit_code, result.stderr


def test_running_again_changes_nothing_and_another_identity_is_refused(one_worker, rows, tiny_olmo3, tiny_llama, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in one_worker.iterdir()}
    assert again(command(rows, tiny_olmo3, one_worker))[0] == 0
    for argv, message in (
        (command(rows, tiny_llama, one_worker), "made with another model"),
        (command(write_rows(tmp_path / "other.jsonl", 69), tiny_olmo3, one_worker), "made with another dataset"),
        (
            ["100" if word == "200" else word for word in command(rows, tiny_olmo3, one_worker)],
            "made with another max length.*expected max_length 100.*found max_length 200",
        ),
    ):
        code, err = again([*argv, "--quiet"])
        assert code == 1, err
        assert err.count("\n") == 1 and err.startswith("Error: ")
        assert re.search(message, err), err
    assert {path: path.stat().st_mtime_ns for path in one_worker.iterdir()} == before


def test_non_finite_scores_are_never_written(rows, tmp_path):
    """Of a token that every row has and the self-test, among so many, does not meet."""
    config = LlamaConfig(**(tiny.SMALL | {"vocab_size": 8192}), tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    model.model.embed_tokens.weight[tiny.make_tokenizer().convert_tokens_to_ids("<|im_start|>"), 3] = float("inf")
    model.save_pretrained(tmp_path / "broken")
    tiny.make_tokenizer().save_pretrained(tmp_path / "broken")
    code, err = again(command(rows, tmp_path / "broken", tmp_path / "store", "--layout", "padded"))
    assert code == 1 and err.count("Error:") == 1 and ("nan" in err or "finite" in err), err
    assert not list((tmp_path / "store").glob("*.parquet"))
