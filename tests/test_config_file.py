"""--config: what a file says is what typing it says; typed words come first; a run.json is such a file. And a store without its flag."""

import json
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from store_samples import make_store

import cli
from options import collected
from presets import PRESETS, Preset
from store.errors import InputError
from train.config import TrainConfig
from train.start import config_of

REQUIRED = {
    "precompute": {"dataset": "demo"},
    "analyze": {"dataset": "demo"},
    "submit": {"dataset": "demo"},
    "import": {"dataset": "demo", "cache": "pairs.jsonl"},
    "export": {"ref_store": "store", "format": "trl", "output": "out"},
}
WORDS = {"push": ["acme/x"], "pull": ["acme/x"]}
VALUES = {
    "TEXT": "some-text",
    "INTEGER": "7",
    "JSON": '{"power": 2, "kind": "linear"}',
    "FLOAT": "0.25",
    "FILE": "pairs.jsonl",
    "DIRECTORY": "store",
    "PATH": "store",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    (tmp_path / "store").mkdir()
    return tmp_path


def params(name: str, *words: str) -> dict:
    return cli.main.commands[name].make_context(name, list(words)).params


def refused(*words: str) -> str:
    result = CliRunner().invoke(cli.main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 2, result.output
    return result.output.splitlines()[-1]


def value_of(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return option.type.choices[-1]
    if isinstance(option.type, click.DateTime):
        return "2026-11-24"
    kind = option.type.name.upper()
    return VALUES["INTEGER" if "INTEGER" in kind else "FLOAT" if "FLOAT" in kind else kind]


@pytest.mark.parametrize("name", sorted(cli.main.commands))
def test_every_option_of_every_command_may_stand_in_a_file(name, folder):
    """With dashes and with underscores, alone and beside the required ones, in YAML and in JSON."""
    tried = 0
    for option in cli.main.commands[name].params:
        if not isinstance(option, click.Option) or option.name == "config":
            continue
        flag = option.opts[0]
        required = REQUIRED.get(name, {"ref_store": "store"})
        required = {key: value for key, value in required.items() if f"--{key.replace('_', '-')}" != flag}
        typed = [word for key, value in required.items() for word in (f"--{key.replace('_', '-')}", value)]
        values = [flag] if option.is_flag else [flag, "1,2" if flag == "--loss-weights" else value_of(option)]
        expected = params(name, *typed, *values, *WORDS.get(name, []))
        written = "true" if option.is_flag else values[1]
        for key in (flag[2:], flag[2:].replace("-", "_")):
            content = required | {key: [written] if option.multiple else written}
            Path("run.yaml").write_text(
                "".join(f"{k}: {json.dumps(v) if isinstance(v, list) else v}\n" for k, v in content.items())
            )
            Path("run.json").write_text(json.dumps(content))
            for file in ("run.yaml", "run.json"):
                assert params(name, "--config", file, *WORDS.get(name, [])) == expected, (file, key)
        tried += 1
    assert tried or name == "completion"


def test_typed_before_file_before_preset(folder):
    Path("run.yaml").write_text("dataset: demo\nmax_length: 256\nsplit: train[:10]\n")
    given = collected(cli.PrecomputeConfig, params("precompute", "--config", "run.yaml", "--split", "train[:5]"))
    given.pop("num_workers")
    from precompute.config import completed

    preset, options = completed(given)
    assert (options["split"], options["max_length"], options["dtype"]) == ("train[:5]", 256, PRESETS["demo"].dtype)
    assert preset is PRESETS["demo"]


def test_what_is_typed_sets_aside_the_other_way_to_it(folder):
    """Accumulation for the batch, a loss with its own beta, another way to evaluate: not two answers to one question."""
    Path("run.yaml").write_text(
        "ref_store: store\neffective_batch_size: 32\nloss_type: sigmoid_norm\nbeta: 5\neval_fraction: 0.1\n"
    )
    words = ["--gradient-accumulation-steps", "4", "--loss-type", "sigmoid", "--eval-ref-store", "other"]
    given = params("train", "--config", "run.yaml", *words)
    assert (given["effective_batch_size"], given["gradient_accumulation_steps"]) == (None, 4)
    assert (given["loss_type"], given["beta"], given["eval_fraction"]) == (("sigmoid",), None, None)
    assert params("train", "--config", "run.yaml", "--seed", "1")["beta"] == 5


def test_a_run_json_gives_the_run_again(folder):
    config = TrainConfig(
        ref_store=Path("store"),
        output_dir=Path("runs/a"),
        loss_type=("sigmoid", "sft"),
        loss_weights=(1.0, 0.25),
        beta=0.3,
        learning_rate=3e-7,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        gradient_checkpointing=False,
        save_strategy="no",
        layout="padded",
        where="num_chosen_tokens < 9",
        resume=True,
    )
    Path("run.json").write_text(json.dumps({"status": "finished", "log_history": [1], "config": config.to_json()}))
    given = params("train", "--config", "run.json", "--output-dir", "runs/b")
    for name in ("num_processes", "resume_or_start", "overwrite"):
        given.pop(name)
    assert config_of(collected(TrainConfig, given), Preset) == replace(config, output_dir=Path("runs/b"), resume=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "run.yaml: learning_rat: no such option; found --learning-rate is an option"),
        ("lr: 1", "lr: no such option; found --learning-rate"),
        ("ref_store_: x\nnonsense: 1", "no such option"),
        ("nonsense: 1", "nonsense: no such option. All options: "),
        ("seed: many", "'--seed': 'many' is not a valid integer .in run.yaml"),
        ("seed: [1, 2]", "seed: takes one value"),
        ("seed: {a: 1}", "seed: takes one value"),
        ("- seed", "names no options"),
        ("seed", "names no options"),
        ("seed: 1\nseed: 2", "seed is given twice"),
        ("log-x: 1\nseed: {", "cannot be read"),
        ("learning_rate: 1\nlearning-rate: 2", "learning-rate: given twice, and one counts"),
        ("config: other.yaml", "config: no such option"),
        ("torch_compile: perhaps", "'perhaps' is not a valid boolean.*in run.yaml"),
        ("save_strategy: often", "'often' is not one of .*in run.yaml"),
    ],
)
def test_a_wrong_file_is_one_line(folder, text, message):
    import re

    Path("run.yaml").write_text(text)
    line = refused("train", "--ref-store", "store", "--config", "run.yaml")
    assert line.startswith("Error: ") and re.search(message, line), line
    assert "does not exist" in refused("train", "--ref-store", "store", "--config", "nowhere.yaml")


def test_values_are_read_as_they_would_be_typed(folder):
    """YAML's own ideas of no, of 24:00:00, of a date and of 1e-6 are not followed; null and nothing are nothing."""
    Path("run.yaml").write_text("dataset: demo\ntime: 24:00:00\narray: null\nmem:\n")
    given = params("submit", "--config", "run.yaml")
    assert (given["time"], given["array"], given["mem"]) == ("24:00:00", None, "500G")
    Path("run.yaml").write_text("dataset: [demo]\ntemplate-date: 2026-11-24\nquiet: false\njson: true\n")
    given = params("precompute", "--config", "run.yaml")
    assert (given["template_date"], given["show"], given["dataset"]) == ("2026-11-24", "json", ("demo",))
    Path("run.yaml").write_text("ref_store: store\nlearning_rate: 1e-6\nsave_strategy: no\n# nothing\n")
    given = params("train", "--config", "run.yaml")
    assert (given["learning_rate"], given["save_strategy"]) == (1e-6, "no")


def test_what_analyze_recommends_has_the_options_of_the_file(folder):
    """The command to type next reads the same rows."""
    Path("run.yaml").write_text("split: train[:9]\nchosen_column: answer\nignore_column: [a, b]\nas_conversation: true\n")
    command = cli.main.commands["analyze"]
    with command.make_context("analyze", ["--dataset", "x.jsonl", "--model", "m", "--config", "run.yaml"]):
        words = cli._also_for_precompute()
    typed = (
        "--dataset x.jsonl --model m --split train[:9] --chosen-column answer --as-conversation --ignore-column a --ignore-column b"
    )
    assert sorted(words) == sorted(typed.split())


@pytest.mark.parametrize(
    ("words", "store", "other"),
    [
        ("status a", "a", None),
        ("inspect a --sql a", "a", None),
        ("inspect --sql a b", "b", None),
        ("train --seed 1 a --beta 2", "a", None),
        ("push a b", "a", "b"),
        ("push --ref-store a b", "a", "b"),
        ("pull b a", "a", "b"),
        ("pull b --ref-store a", "a", "b"),
        ("pull b --revision b a", "a", "b"),
    ],
)
def test_the_store_may_stand_alone(words, store, other):
    name, *rest = words.split()
    given = params(name, *rest)
    assert given["ref_store"] == Path(store) and other in (given.get("target"), given.get("source"))


@pytest.mark.parametrize("words", ["status a b", "status --ref-store a b", "push a b c", "precompute a"])
def test_a_word_too_many_is_refused(words):
    name, *rest = words.split()
    with pytest.raises(click.UsageError, match="unexpected extra argument|Missing parameter: dataset"):
        params(name, *rest)


def test_a_file_for_a_real_command(folder):
    make_store(Path("store/demo"), num_rows=4)
    Path("look.yaml").write_text("ref_store: store/demo\nsql: select count(*) as n from pairs\nformat: csv\n")
    result = CliRunner().invoke(cli.main, ["inspect", "--config", "look.yaml"], catch_exceptions=False)
    assert result.exit_code == 0 and result.output.splitlines()[0] == "n", result.output
    with pytest.raises(InputError, match="--ref-store: given 2 times"):
        params("inspect", "--ref-store", "a", "--ref-store", "a")


def test_overwrite_replaces_what_the_same_command_made(folder):
    make_store(Path("store/demo"), num_rows=4)

    def run(*words: str, code: int = 0) -> str:
        result = CliRunner().invoke(cli.main, list(words), catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result.output

    query = ("inspect", "store/demo", "--sql", "select 1 as n", "--output", "n.csv", "--format", "csv")
    run(*query)
    Path("n.csv").write_text("old")
    assert "add --overwrite" in run(*query, code=2) and Path("n.csv").read_text() == "old"
    run(*query[:3], "select nothing from nowhere", *query[4:], "--overwrite", code=2)
    assert Path("n.csv").read_text() == "old"
    run(*query, "--overwrite")
    assert Path("n.csv").read_text() == "n\n1\n"
    assert "belongs to --output" in run("inspect", "store/demo", "--sql", "select 1", "--overwrite", code=2)
    shard = Path("store/demo/part-00000.parquet").read_bytes()
    into_store = ("inspect", "store/demo", "--sql", "select 1", "--overwrite", "--output", "store/demo/part-00000.parquet")
    assert "is in the store" in run(*into_store, code=2) and Path("store/demo/part-00000.parquet").read_bytes() == shard
    export = ("export", "store/demo", "--format", "jsonl", "--output", "out")
    run(*export)
    Path("out/pairs.jsonl").write_text("old")
    assert "add --overwrite" in run(*export, code=2)
    Path("out/thesis.txt").write_text("precious")
    assert "holds other files than this export; found thesis.txt" in run(*export, "--overwrite", code=2)
    assert Path("out/pairs.jsonl").read_text() == "old" and Path("out/thesis.txt").exists()
    Path("out/thesis.txt").unlink()
    run(*export, "--overwrite")
    assert len(Path("out/pairs.jsonl").read_text().splitlines()) > 0 and "old" not in Path("out/pairs.jsonl").read_text()
