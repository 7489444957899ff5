"""What is printed to be typed: why two stores differ, and the command that goes on, found out, kept, and followed to its end."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner
from held import shard_held
from one_rank import one_rank
from store_samples import make_identity

import cli
from precompute.scorer.model import chat_template_sha256
from store.command import Command
from store.errors import StoreError
from store.manifest import DatasetPart, check_same
from store.reader import open_store
from train import record
from train.checkpoint import COMPLETE

ROOT = Path(__file__).parents[1]


# --- causes, from identities and commands alone


def command(**changes) -> Command:
    values = {
        "words": ("python", "cli.py"),
        "folder": "/",
        "ref_store": "s",
        "limit": None,
        "chat_template": None,
        "shard_size": None,
    }
    return Command(**{**values, **changes})


OTHER_ROWS = {"dataset_fingerprint": "9" * 32, "num_rows": 6, "shard_size": 2}
TWO = {"datasets": (DatasetPart("a", 5), DatasetPart("b", 2)), "num_rows": 7}
TWO_SHORT = OTHER_ROWS | {"datasets": (DatasetPart("a", 3), DatasetPart("b", 2)), "num_rows": 5}
OTHER_MODEL = {"model": "acme/b", "weights_sha256": "8" * 64}
OTHER_TOKENIZER = {"tokenizer_sha256": "7" * 64, "chat_template_sha256": "6" * 64}


@pytest.mark.parametrize(
    ("stored", "now", "blamed", "said"),
    [  # what differs -> what is named after "made with another", and what is said further
        ({}, {"dtype": "bfloat16", "weights_sha256": "8" * 64}, "dtype", "repeat its --dtype;"),
        ({}, OTHER_MODEL | {"dtype": "bfloat16"}, "dtype", "The model was acme/tiny, now it is acme/b"),
        ({}, OTHER_MODEL | {"dtype": "bfloat16", "config_sha256": "5" * 64}, "model configuration, dtype", "repeat its --model"),
        ({}, OTHER_MODEL | {"config_sha256": "5" * 64}, "model (its weights differ)", "repeat its --model and --revision;"),
        ({}, OTHER_MODEL | OTHER_TOKENIZER | {"tokenizer": "acme/b"}, "model (its weights differ)", "repeat its --model"),
        (
            {},
            OTHER_MODEL | OTHER_TOKENIZER,
            "model (its weights differ), tokenizer",
            "The tokenizer acme/tiny has changed",
        ),  # named itself
        ({}, OTHER_TOKENIZER | {"tokenizer": "acme/tok"}, "tokenizer", "repeat its --tokenizer;"),
        ({}, {"weights_sha256": "8" * 64}, "model (its weights differ)", "For other numbers .* acme/tiny have changed since: pin"),
        ({}, {"revision": "v2", "weights_sha256": "8" * 64}, "model (its weights differ)", "repeat its --model and --revision;"),
        ({}, {"tokenizer_sha256": "7" * 64}, "tokenizer", "The tokenizer acme/tiny has changed since"),
        ({}, {"chat_template_sha256": "6" * 64}, "chat template", "repeat its --chat-template;"),
        ({}, OTHER_ROWS | {"split": "test"}, "split", "repeat its --split;"),
        ({}, OTHER_ROWS | {"dataset_config": "v2"}, "dataset configuration", "repeat its --dataset-config;"),
        ({}, OTHER_ROWS | {"columns": "--prompt-column q"}, "choice of columns", "repeat its --prompt-column and the like;"),
        (TWO, TWO_SHORT | {"limit": 3}, "limit", "repeat its --limit;"),
        (TWO, {"dataset_fingerprint": "9" * 32}, "dataset (its rows differ), number of rows", "repeat its --dataset and --split;"),
        ({}, OTHER_ROWS | {"dataset_revision": "v2"}, "dataset revision", "repeat its --dataset-revision;"),
        (
            {},
            OTHER_ROWS | {"dataset": "acme/more"},
            "dataset (its rows differ), number of rows",
            "repeat its --dataset and --split;",
        ),
        ({}, {"dataset_fingerprint": "9" * 32}, "dataset (its rows differ)", "The rows of acme/prefs have changed since"),
        ({}, OTHER_ROWS | {"limit": 6}, "limit", "repeat its --limit;"),
        (
            {"limit": 10},
            OTHER_ROWS,
            "dataset (its rows differ), number of rows",
            "rows of acme/prefs have changed since",
        ),  # 10, now 6
        ({}, OTHER_ROWS, "dataset (its rows differ), number of rows", "The rows of acme/prefs have changed since"),
        ({}, OTHER_ROWS | {"limit": 7}, "dataset (its rows differ), number of rows", "have changed since"),  # fewer than its limit
        ({}, OTHER_ROWS | {"limit": 6, "split": "test"}, "split, limit", "repeat its --split, --limit;"),
        ({}, OTHER_ROWS | {"shard_size_given": 2, "limit": 6}, "limit, shard size", "repeat its --limit, --shard-size;"),
        ({}, {"shard_size": 2, "shard_size_given": 2}, "shard size", "repeat its --shard-size;"),
        ({}, {"max_length": 32, "dtype": "bfloat16", "weights_sha256": "8" * 64}, "max length, dtype", "--max-length, --dtype;"),
        ({"scorer_version": 0}, {}, "version of the scorer", "TRL's sums were imported"),
    ],
)
def test_a_refusal_names_what_was_asked_for_otherwise_and_nothing_that_follows_from_it(stored, now, blamed, said):
    def parts(given: dict):
        given = dict(given)
        asked = command(
            limit=given.pop("limit", None), shard_size=given.pop("shard_size_given", None), columns=given.pop("columns", None)
        )
        return make_identity(**given), asked

    (there, then), (here, asked) = parts(stored), parts(now)
    with pytest.raises(StoreError) as error:
        check_same(there, here, "s", then, asked)
    named = re.search(r"made with another (.*?); expected", str(error.value))[1]
    assert named == blamed
    assert re.search(said, str(error.value)), str(error.value)


def test_without_the_commands_a_number_of_rows_is_a_number_of_rows():
    with pytest.raises(StoreError, match="made with another number of rows, shard size; .* repeat its --limit"):
        check_same(make_identity(), make_identity(**OTHER_ROWS), "s")


# --- the command as typed


SAY = "import sys; from store.command import again, cli; print(cli('inspect')); print(again('--resume'))"


def printed(*words: str, cwd: Path, **environ: str) -> list[list[str]]:
    """Another command of this project, and this one again."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "REFDPO_"))}
    keep["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(words, check=True, cwd=cwd, env=keep | environ, capture_output=True, text=True, timeout=1200)
    return [shlex.split(line) for line in done.stdout.strip().splitlines()[-2:]]


def said(*words: str, cwd: Path, **environ: str) -> list[str]:
    return printed(*words, cwd=cwd, **environ)[-1]


def test_the_command_is_what_was_typed_whatever_started_it(tmp_path):
    script = tmp_path / "cli.py"
    script.write_text(SAY)
    # As our own workers are started: by a process with the same arguments.
    (tmp_path / "outer.py").write_text("import subprocess, sys; subprocess.run([sys.executable, '-u', 'cli.py', *sys.argv[1:]])")
    python = sys.executable
    words = ["train", "--where", "row < 3 and 'a b' = $x", "--ref-store", "a store"]
    torchrun = str(Path(python).with_name("torchrun"))
    for typed, more in (
        ([python, "cli.py", *words], {}),
        ([python, "-X", "dev", "cli.py", *words], {}),
        ([python, "outer.py", *words], {}),
        (["timeout", "1200", python, "cli.py", *words], {}),
        ([torchrun, "--standalone", "--nproc-per-node=1", "cli.py", *words], {}),
        (
            [torchrun, "--standalone", "--nproc-per-node=1", "cli.py", *words],
            {"PATH": f"{Path(python).parent}:{os.environ['PATH']}"},
        ),
    ):
        expected = ["torchrun" if more and word == torchrun else word for word in typed]
        another, again = printed(*typed, cwd=tmp_path, **more)
        assert again == [*expected, "--resume"]
        assert another == [
            "python" if more else str(Path(python).with_name("python")) if torchrun in typed else python,
            "cli.py",
            "inspect",
        ]
    assert said(python, "cli.py", *words, "--resume", cwd=tmp_path)[-1:] == ["--resume"]
    assert said(python, "cli.py", "x", cwd=tmp_path, REFDPO_COMMAND="sbatch 'a b.sbatch' x") == [
        "sbatch",
        "a b.sbatch",
        "x",
        "--resume",
    ]
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_GPUS_PER_NODE": "h100:4"}
    layout = ["srun", "--nodes=2", "--ntasks=8", "--gpus-per-node=h100:4"]
    assert said(python, "cli.py", "x", cwd=tmp_path, **step) == [*layout, python, "cli.py", "x", "--resume"]
    assert said(python, "cli.py", "x", cwd=tmp_path, **step, SLURM_STEP_IDX="") and "srun" not in said(
        python, "cli.py", "x", cwd=tmp_path, SLURM_STEP_ID="batch"
    )


def test_another_command_is_started_as_this_one_was(tmp_path):
    """By the installed one, which need not be on the PATH; in a batch job as `submit` was, or by what stands in the job's script."""
    bin, script = tmp_path / "bin", tmp_path / "cli.py"
    bin.mkdir()
    for path, start in ((script, ""), (bin / "refdpo", f"#!{sys.executable}\n")):
        path.write_text(start + SAY)
        path.chmod(0o755)
    path = {"PATH": f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for typed, environ, expected in (
        (["refdpo"], path, ["refdpo"]),
        (["bin/refdpo"], {}, ["bin/refdpo"]),
        ([sys.executable, "-m", "cli"], path, [Path(sys.executable).name, "-m", "cli"]),
        ([sys.executable, str(script)], {"REFDPO_COMMAND": "refdpo submit --dataset cli.py"} | path, ["refdpo"]),
        (
            [sys.executable, str(script)],
            {"REFDPO_COMMAND": "sbatch slurm/train.sbatch --ref-store x"} | path,
            [Path(sys.executable).name, "cli.py"],
        ),
    ):
        found, _ = printed(*typed, "status", cwd=tmp_path, **environ)
        assert found == [*expected, "inspect"], typed


def test_a_recorded_command_is_only_printed_where_it_works(tmp_path, monkeypatch):
    store = tmp_path / "there" / "a store"
    store.mkdir(parents=True)
    made = command(
        words=("python", "cli.py", "precompute", "--ref-store", "a store"), folder=str(tmp_path / "there"), ref_store="a store"
    )
    monkeypatch.chdir(tmp_path)
    assert made.line(store) == f"cd {tmp_path}/there && python cli.py precompute --ref-store 'a store'"
    monkeypatch.chdir(tmp_path / "there")
    assert made.line(Path("a store")) == "python cli.py precompute --ref-store 'a store'"
    assert made.line(tmp_path) is None  # a copy or another store
    assert dataclasses.replace(made, folder="/nowhere").line(store) is None  # another machine
    tricky = dataclasses.replace(made, words=("python", "x; rm -rf ~", "\x1b[2J"))
    assert tricky.line(store) == "python 'x; rm -rf ~' '?[2J'"


# --- followed, with real processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Rows, and a chat template that is not the tokenizer's."""
    folder = tmp_path_factory.mktemp("again")
    turn = lambda role, text: [{"role": role, "content": text}]
    rows = [
        {
            "prompt": turn("user", f"Why {n}?"),
            "chosen": turn("assistant", f"{n} " * 60),
            "rejected": turn("assistant", "no " * (n + 1)),
        }
        for n in range(30)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "other template.jinja").write_text(tiny.CHATML.replace("im_start|>' + m", "im_start|>the ' + m"))
    return folder


def follow(line: str, cwd: Path) -> subprocess.CompletedProcess:
    """A printed line in a shell, as a person pastes it."""
    return subprocess.run(["bash", "-c", line], check=False, cwd=cwd, capture_output=True, text=True, timeout=1200)


@contextlib.contextmanager
def typed_in(folder: Path, *argv: object):
    """A command line inside this process, typed in `folder`."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield CliRunner().invoke(cli.main, [str(word) for word in argv], catch_exceptions=False)
    finally:
        os.chdir(before)


@pytest.mark.slow
def test_every_printed_command_goes_on_to_the_store_that_was_begun(folder, tiny_llama, tmp_path):
    options = ["--limit", "24", "--chat-template", "other template.jinja", "--layout", "padded", "--max-length", "128"]
    words = [sys.executable, str(ROOT / "cli.py"), "precompute", "--dataset", "rows.jsonl", "--model", str(tiny_llama), *options]
    words += ["--dtype", "float32", "--shard-size", "1", "--ref-store", "a store"]
    store = folder / "a store"
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    for number in (signal.SIGINT, signal.SIGTERM):
        already = len(list(store.glob("*.parquet")))
        with shard_held(store, 23), contextlib.ExitStack() as also:
            if number == signal.SIGINT:
                also.enter_context(shard_held(store, 22))  # left for the next one to score
            run = subprocess.Popen(words, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            while len(list(store.glob("*.parquet"))) == already:
                assert run.poll() is None, run.communicate()[1]
                time.sleep(0.005)
            run.send_signal(number)
            _, err = run.communicate(timeout=600)
        assert run.returncode == 75 and err.count("Error:") == 1 and "Traceback" not in err, err
        printed = re.search(r"Run the same command again to go on: (.*)$", err, re.MULTILINE)[1]
        assert shlex.split(printed) == words
    # Whoever finds the store unfinished says the same, from wherever it is asked.
    elsewhere = f"cd {folder} && {printed}"
    for argv, line in (
        (("status", "--ref-store", store), rf"Nobody is working on it: {re.escape(elsewhere)}$"),
        (("inspect", "--ref-store", store), rf"To finish it: {re.escape(elsewhere)}$"),
        (("verify", "--ref-store", store), rf"Re-run: {re.escape(elsewhere)}$"),
        (("train", "--ref-store", store), rf"Re-run: {re.escape(elsewhere)}$"),
    ):
        with typed_in(tmp_path, *argv) as result:
            assert re.search(line, result.output, re.MULTILINE), result.output
    done = follow(elsewhere, tmp_path)
    assert done.returncode == 0, done.stderr
    made = open_store(store, check="sha256")
    template = tiny.make_tokenizer((folder / "other template.jinja").read_text())
    assert made.identity.num_rows == 24 and made.identity.chat_template_sha256 == chat_template_sha256(template)
    assert made.manifest.command.words == tuple(words) and made.manifest.provenance["layout"] == "padded"

    # A damaged shard of the sealed store, and phase 2, which needs the same template and layout.
    (store / "part-00007.parquet").write_bytes(b"PAR1")
    with typed_in(tmp_path, "verify", "--ref-store", store) as result:
        line = re.search(r"score what is missing: (.*)$", result.output, re.MULTILINE)[1]
    done = follow(line, tmp_path)
    assert done.returncode == 0, done.stderr
    with typed_in(folder, "verify", "--ref-store", "a store") as result:
        assert result.exit_code == 0, result.output
    program, train = (words := shlex.split(re.search(r"^Next: (.*)$", done.stdout, re.MULTILINE)[1]))[:2], words[2:]
    assert program == [sys.executable, str(ROOT / "cli.py")]  # no cli.py in this folder
    assert train == ["train", "--ref-store", "a store", "--chat-template", "other template.jinja", "--layout", "padded"]
    with one_rank(), typed_in(folder, *train, "--output-dir", tmp_path / "run") as result:
        assert result.exit_code == 0, result.output
    next_line = re.search(r"^next: python cli.py (.*)$", result.output, re.MULTILINE)[1]
    with typed_in(folder, *shlex.split(next_line)) as result:
        assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def sealed(folder, tiny_llama) -> tuple[Path, dict]:
    given = {
        "dataset": "rows.jsonl",
        "model": tiny_llama,
        "limit": 12,
        "max-length": 128,
        "dtype": "float32",
        "ref-store": "sealed",
    }
    with typed_in(folder, "precompute", *(word for name, value in given.items() for word in (f"--{name}", value))) as result:
        assert result.exit_code == 0, result.output
    return folder / "sealed", given


@pytest.mark.parametrize(
    ("changes", "blamed", "options"),
    [
        ({"dtype": "bfloat16"}, "dtype", "--dtype"),
        ({"limit": 7}, "limit", "--limit"),
        ({"limit": None}, "limit", "--limit"),
        ({"max-length": 100}, "max length", "--max-length"),
        ({"shard-size": 5}, "shard size", "--shard-size"),
        ({"chat-template": "other template.jinja"}, "chat template", "--chat-template"),
        ({"model": "another model"}, "model (its weights differ)", "--model and --revision"),
        ({"tokenizer": "another tokenizer"}, "tokenizer", "--tokenizer"),
        ({"dataset": "edited.jsonl"}, "dataset (its rows differ)", "--dataset and --split"),
        ({"dtype": "bfloat16", "model": "copy of the model"}, "dtype", "--dtype"),
    ],
)
def test_changing_one_option_is_refused_for_that_option(sealed, folder, tiny_llama, changes, blamed, options):
    if not (folder / "another model").exists():
        tiny.save(folder / "another model", seed=1, chat_template=tiny.THINKING)
        shutil.copytree(tiny_llama, folder / "copy of the model")
        changed = tiny.make_tokenizer(tiny.THINKING)
        changed.eos_token = "<|im_end|>"
        changed.save_pretrained(folder / "another tokenizer")
        (folder / "edited.jsonl").write_text((folder / "rows.jsonl").read_text().replace("Why 3?", "Why not 3?"))
    given = sealed[1] | changes
    words = [str(word) for name, value in given.items() if value is not None for word in (f"--{name}", value)]
    with typed_in(folder, "precompute", *words) as result:
        assert result.exit_code == 1, result.output
    assert f"sealed: made with another {blamed}; expected" in result.output, result.output
    assert f"To go on with this store repeat its {options}; for" in result.output, result.output
    command = re.search(r"Its command was: (.*)\.?$", result.output.strip())[1]
    assert shlex.split(command)[2:] == [
        "precompute",
        *(str(word) for name, value in sealed[1].items() for word in (f"--{name}", value)),
    ]


def test_rows_that_have_changed_under_their_name_are_said_to(sealed, folder):
    rows = (folder / "rows.jsonl").read_text()
    words = [str(word) for name, value in sealed[1].items() for word in (f"--{name}", value)]
    try:
        for text in (rows.replace("Why 3?", "Why not 3?"), "".join(rows.splitlines(keepends=True)[:9])):
            (folder / "rows.jsonl").write_text(text)
            with typed_in(folder, "precompute", *words) as result:
                assert result.exit_code == 1, result.output
            assert "made with another dataset (its rows differ)" in result.output
            assert "The rows of rows.jsonl have changed since." in result.output and "repeat its" not in result.output
    finally:
        (folder / "rows.jsonl").write_text(rows)


def test_a_run_with_checkpoints_says_how_to_go_on(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / COMPLETE).write_text("{}")
    monkeypatch.setattr("store.command.called_with", ["train", "--ref-store", "a store"])
    with pytest.raises(Exception, match="with --resume: python cli.py train --ref-store 'a store' --resume"):
        record.refuse_other_run(tmp_path)
