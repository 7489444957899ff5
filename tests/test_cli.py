"""The command line as a user meets it: help, errors, exit codes."""

import gc
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import tiny
from click.testing import CliRunner

import cli
import store.command
from presets import PRESETS
from quiet import importing
from train.start import config_of

ROOT = Path(__file__).parents[1]


def run(*argv: str, code: int) -> str:
    """Run in this process; return the output, which must be one `Error:` line when it fails."""
    result = CliRunner().invoke(cli.main, [str(word) for word in argv])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def refused(*argv: str, code: int, match: str) -> None:
    output = run(*argv, code=code)
    errors = [line for line in output.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1 and "Traceback" not in output, output
    assert re.search(match, errors[0]), errors[0]


def test_help_is_fast_and_every_command_has_an_example():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)  # CPU time: the clock's depends on what else runs
    subprocess.run([sys.executable, str(ROOT / "cli.py"), "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    for name in cli.main.commands:
        output = run(name, "--help", code=0)
        assert f"python cli.py {name}" in output


def test_help_imports_nothing_heavy():
    code = (
        "import sys, cli; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets', 'duckdb', 'pyarrow')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    row = {"prompt": [{"role": "user", "content": "Why?"}]} | {
        side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")
    }
    path.write_text(json.dumps(row) + "\n")
    return path


def options(dataset, model, store, **more) -> list[str]:
    given = {"dataset": dataset, "model": model, "ref-store": store, "max-length": 64, "dtype": "float32"} | more
    return ["precompute", *(word for name, value in given.items() if value is not None for word in (f"--{name}", str(value)))]


def test_what_changes_the_numbers_has_no_default(rows, tmp_path):
    refused(*options(rows, None, tmp_path / "store"), code=2, match="--model must be given.*think, instruct, demo")
    argv = ["precompute", "--dataset", rows, "--model", "x"]
    refused(*argv, code=2, match="--max-length, --dtype must be given")


def test_models_that_cannot_score_are_refused(rows, tiny_llama, tmp_path):
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    store = tmp_path / "store"
    refused(*options(rows, tmp_path / "nowhere", store), code=2, match="no tokenizer can be loaded")
    BertModel(
        BertConfig(vocab_size=384, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(tmp_path / "bert")
    LlamaModel(LlamaConfig(**tiny.SMALL, tie_word_embeddings=False)).save_pretrained(tmp_path / "headless")
    for name, message in (
        ("bert", "no causal language model can be loaded|lacks .* of the model's weights"),
        ("headless", "lacks 1 of the model's weights.*lm_head"),
    ):
        tiny.make_tokenizer().save_pretrained(tmp_path / name)
        refused(*options(rows, tmp_path / name, store), code=2, match=message)
    refused(
        *options(rows, tiny_llama, store, **{"max-length": 100000}), code=2, match="longer than the model's context.*at most 512"
    )
    assert not store.exists()


def test_stores_that_are_none_are_refused(rows, tiny_llama, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    for command in ("inspect", "verify", "train"):
        refused(command, "--ref-store", tmp_path / "nowhere", code=2, match="no such folder.*precompute")
        refused(command, "--ref-store", file, code=2, match="a file, not a folder")
        refused(command, "--ref-store", folder, code=2, match="folder")
        refused(command, "--ref-store", ROOT / "store", code=2, match="is the shelf, not a dataset")
    refused(*options(rows, tiny_llama, file), code=2, match="a file, not a folder")
    refused(*options(rows, tiny_llama, folder), code=2, match="folder")
    refused(*options(rows, tiny_llama, ROOT / "store"), code=2, match="is the shelf, not a dataset")
    assert (folder / "thesis.txt").read_text() == "precious" and sorted(path.name for path in folder.iterdir()) == ["thesis.txt"]


def test_a_store_without_a_pair_is_refused_and_not_sealed(rows, tiny_llama, tmp_path):
    store = tmp_path / "store"
    for _ in range(2):  # the second time every shard is there
        refused(
            *options(rows, tiny_llama, store, **{"max-length": 3}),
            code=2,
            match="0 pairs of 1 rows.*fills max_length 3.*--max-length",
        )
    assert not (store / "_manifest.json").exists()


def test_unknown_loss_type_is_refused(rows, tiny_llama, tmp_path):
    store = tmp_path / "store"
    run(*options(rows, tiny_llama, store), code=0)
    refused(
        "train", "--ref-store", store, "--loss-type", "sigmoidal", code=2, match="unknown loss type.*sigmoid_norm.*found sigmoidal"
    )
    refused("train", "--ref-store", store, "--loss-weights", "a,b", code=2, match="not comma-separated numbers")


@pytest.mark.parametrize("name", sorted(cli.main.commands))
def test_an_option_given_twice_where_one_counts_is_refused(name):
    """Every option of every command, with two values of its type, alike or not; those that collect values may be repeated."""
    command = cli.main.commands[name]
    context = click.Context(command)
    tried = 0
    for option in command.params:
        if not isinstance(option, click.Option) or option.is_flag:
            continue
        values = option.type.choices if isinstance(option.type, click.Choice) else ("7", "8")
        words = [option.opts[0], values[0], option.opts[0], values[-1]]
        if option.multiple:
            assert len(command._given(context, words)) == 2
            continue
        refused(name, *words, code=2, match=f"{option.opts[0]}: given 2 times, and one counts")
        refused(name, f"{option.opts[0]}={values[0]}", *words, code=2, match=f"{option.opts[0]}: given 3 times")
        tried += 1
    assert tried


def test_switches_may_be_repeated_but_not_contradict(rows, tiny_llama, tmp_path):
    refused("precompute", "--dataset", "demo", "--quiet", "--json", code=2, match="--quiet, --json: given 2 times")
    both = ("--gradient-checkpointing", "--no-gradient-checkpointing")
    refused("train", "--ref-store", tmp_path, *both, code=2, match="--gradient-checkpointing: given 2 times")
    refused("train", "--ref-store", tmp_path / "no", "--resume", "--resume", code=2, match="no such folder")


def test_a_loss_that_is_named_brings_its_own_beta(rows, tiny_llama, tmp_path):
    store = tmp_path / "store"
    run(*options(rows, tiny_llama, store), code=0)
    for words, expected in (
        ("", 5.0),
        ("--loss-type sigmoid", 0.1),
        ("--loss-type sigmoid_norm", 5.0),
        ("--loss-type ipo --beta 0.7", 0.7),
    ):
        argv = ["--ref-store", str(store), *words.split()]
        given = cli.main.commands["train"].make_context("train", argv).params
        given = {name: value for name, value in given.items() if name not in ("num_processes", "resume_or_start", "overwrite")}
        assert config_of(given).beta == expected
    refused(
        "train",
        "--ref-store",
        store,
        "--loss-type",
        "sigmoid",
        "--loss-type",
        "sigmoid_norm",
        code=2,
        match="--beta: must be given",
    )


@pytest.mark.parametrize(
    ("command", "option", "meant"),
    [
        ("train", "--model", "--policy"),
        ("train", "--dataset", "--ref-store"),
        ("train", "--lr", "--learning-rate"),
        ("train", "--batch-size", "--effective-batch-size"),
        ("precompute", "--policy", "--model"),
        ("precompute", "--modle", "--model"),
    ],
)
def test_an_option_of_another_name_is_told_its_own(command, option, meant):
    refused(command, option, "x", code=2, match=f"No such option '{option}'.*{meant}")


def test_presets_are_the_users_table():
    think, instruct = PRESETS["think"], PRESETS["instruct"]
    assert (think.dataset, think.max_length) == ("allenai/Dolci-Think-DPO-7B", 8192)
    assert (instruct.dataset, instruct.max_length) == ("allenai/Dolci-Instruct-DPO", 2048)
    for preset in (think, instruct):
        table = (
            preset.beta,
            preset.loss_type,
            preset.learning_rate,
            preset.lr_scheduler_type,
            preset.warmup_ratio,
            preset.num_train_epochs,
        )
        assert table == (5.0, "sigmoid_norm", 1e-6, "linear", 0.1, 1.0)
        assert (preset.effective_batch_size, preset.dtype, preset.gradient_checkpointing) == (128, "bfloat16", True)


def test_version():
    assert re.fullmatch(r"refdpo \d+\.\d+\.\d+\n", run("--version", code=0))


def test_the_shell_completes_commands_and_options_and_values():
    def completed(words: str) -> str:
        env = {"_REFDPO_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
        return CliRunner().invoke(cli.main, [], prog_name="refdpo", complete_var="_REFDPO_COMPLETE", env=env).output

    assert completed("refdpo pre") == "plain,precompute\n"
    assert completed("refdpo train --learn") == "plain,--learning-rate\n"
    assert completed("refdpo train --layout pa") == "plain,packed\nplain,padded\n"
    for shell in ("bash", "zsh", "fish"):
        assert f"_REFDPO_COMPLETE={shell}_complete" in run("completion", shell, code=0)
    refused("completion", "cmd", code=2, match="'cmd' is not one of 'bash', 'zsh', 'fish'")


def test_the_installed_command_speaks_of_itself(monkeypatch):
    """What it prints to be typed next, and the examples of its help."""
    monkeypatch.setattr(store.command, "called_with", None)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/refdpo", "train"])
    assert store.command.cli("train", "--ref-store", "a b") == "refdpo train --ref-store 'a b'"
    output = CliRunner().invoke(cli.main, ["status", "--help"], prog_name="refdpo").output
    assert "\n  refdpo status --ref-store store/think" in output and "cli.py" not in output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's")
def test_what_cannot_be_printed_is_an_error_and_a_closed_output_is_none():
    """One process each: what Python does at its end counts too."""
    for words in (["--help"], ["--version"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "cli.py", *words], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert (done.returncode, done.stderr) == (1, "Error: what was to be printed cannot be written: No space left on device.\n")
    closed = f"exec {shlex.quote(sys.executable)} cli.py --version >&-"
    done = subprocess.run(closed, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_output_is_utf_8_in_every_locale(tmp_path):
    environ = os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "cli.py", "inspect", "--ref-store", tmp_path / "nü"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, check=False)
    assert done.returncode == 2 and done.stderr.decode().startswith(f"Error: {tmp_path / 'nü'}: "), done.stderr
    help_ = subprocess.run([*command[:3], "--help"], cwd=ROOT, env=environ, capture_output=True, check=False)
    assert help_.returncode == 0 and help_.stderr == b""


def test_what_was_imported_is_not_searched_for_garbage():
    """And what comes after it is, however the imports end."""
    with pytest.raises(ImportError), importing():
        assert not gc.isenabled()
        raise ImportError
    try:
        assert gc.isenabled() and gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()
