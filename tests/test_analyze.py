"""`analyze`: its numbers against counting by hand, against what precompute then does, and for rows of every kind."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

import cli
from precompute.desk.analyze import AnalyzeConfig, analyze
from precompute.desk.analyze_view import Rates, describe, plot
from precompute.pairs import tokenize_rows
from precompute.scorer.packing import Sequence, pack
from store.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


def turn(role: str, content: str | None) -> dict:
    return {"role": role, "content": content}


def conversation(words: int, answer: str) -> dict:
    return {"prompt": [turn("user", "why " * words)], "chosen": [turn("assistant", answer)], "rejected": [turn("assistant", "no")]}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(dataset: Path, tokenizer: Path, **changes) -> AnalyzeConfig:
    values = {"split": "train", "dataset_revision": None, "limit": None, "sample": None, "revision": None, "chat_template": None}
    values |= {
        "max_lengths": (32, 64, 128),
        "tokens_per_batch": 100,
        "num_workers": 1,
        "dataset": str(dataset),
        "name": str(dataset),
    }
    return AnalyzeConfig(tokenizer=str(tokenizer), **(values | changes))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    rows = [conversation(i % 29, "because " * (i % 13 + 1)) for i in range(60)]
    return write(tmp_path_factory.mktemp("rows") / "pairs.jsonl", rows)


def test_counts_are_what_tokenizing_at_that_max_length_gives(dataset, tokenizer):
    """Every number of one line of the table, found again by truncating for real and packing for real."""
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    found = analyze(config(dataset, tokenizer))
    assert found.num_pairs == found.num_rows == 60 and found.at[0].unscorable > 0  # not vacuous
    for at in found.at:
        truth = tokenize_rows(tiny.make_tokenizer(), rows, 0, at.max_length)
        sequences = [sequence for pair in truth.pairs for sequence in pair.sequences]
        assert at.unscorable == len(truth.unscorable)
        assert (at.chosen_truncated, at.rejected_truncated) == (
            truth.counts["chosen_truncated"],
            truth.counts["rejected_truncated"],
        )
        assert at.tokens_unshared == sum(len(sequence.ids) for sequence in sequences)
        assert at.tokens_packed == sum(len(batch.input_ids) for batch in pack(sequences, 100))
        assert at.tokens_padded == sum(2 * max(len(each.ids) for each in pair.sequences) for pair in truth.pairs)
        assert at.cut_to_the_same == sum(np.array_equal(pair.chosen_ids, pair.rejected_ids) for pair in truth.pairs)
        assert at.fits == pytest.approx(sum(not (p.chosen_truncated or p.rejected_truncated) for p in truth.pairs) / 60)
    whole = tokenize_rows(tiny.make_tokenizer(), rows, 0, 1 << 30).pairs
    assert found.quantiles["chosen"]["max"] == max(len(pair.chosen_ids) for pair in whole)
    assert (
        found.quantiles["longer side"]["p50"]
        == sorted(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in whole)[29]
    )


@pytest.mark.parametrize("which", ["last", "all"])
def test_turns_are_counted_as_they_are_scored(tokenizer, tmp_path, which):
    """The sides part early or late, and the turns that count begin long after that; found again by truncating and packing for real."""
    rows = []
    for i in range(20):
        ask, shared = turn("user", "why " * (i % 5 + 1)), turn("assistant", "so " * i)
        chosen = [ask, shared, ask, turn("assistant", "because " * (i % 7 + 1))]
        rejected = [ask, turn("assistant", "no")] if i % 3 == 0 else [*chosen[:3], turn("assistant", "not " * (i + 1))]
        rows.append({"chosen": chosen, "rejected": rejected})
    found = analyze(config(write(tmp_path / "turns.jsonl", rows), tokenizer, score_turns=which, max_lengths=(24, 64, 200)))
    assert found.at[0].lost > 0 and found.at[1].lost < found.at[0].lost  # not vacuous
    for at in found.at:
        truth = tokenize_rows(tiny.make_tokenizer(), rows, 0, at.max_length, which)
        sequences = [sequence for pair in truth.pairs for sequence in pair.sequences]
        assert at.unscorable == len(truth.unscorable)
        assert (
            at.chosen_truncated == truth.counts["chosen_truncated"] and at.rejected_truncated == truth.counts["rejected_truncated"]
        )
        assert at.tokens_unshared == sum(len(sequence.ids) for sequence in sequences)
        assert at.tokens_packed == sum(len(batch.input_ids) for batch in pack(sequences, 100))
    whole = tokenize_rows(tiny.make_tokenizer(), rows, 0, 1 << 30, which).pairs
    assert found.quantiles["chosen, scored"]["max"] == max(int(pair.chosen_mask.sum()) for pair in whole)
    assert found.quantiles["rejected, scored"]["p50"] == sorted(int(pair.rejected_mask.sum()) for pair in whole)[9]
    text = describe(found, Rates(None, None, 1))
    assert re.search(r"; scored: .* alone$", text.splitlines()[0]) and "rejected, scored" in text


def test_cut_to_the_same_counts_pairs_that_differ_too_late(tokenizer, tmp_path):
    row = {side: [turn("user", "hi"), turn("assistant", "same " * 40 + side)] for side in ("chosen", "rejected")}
    found = analyze(config(write(tmp_path / "late.jsonl", [row]), tokenizer, max_lengths=(24, 512)))
    assert [at.cut_to_the_same for at in found.at] == [1, 0]


def test_processes_and_one_process_agree(dataset, tokenizer, monkeypatch):
    monkeypatch.setattr("precompute.desk.analyze.ROWS_PER_BLOCK", 20)
    seen = []
    one = analyze(config(dataset, tokenizer))
    two = analyze(config(dataset, tokenizer, num_workers=2), lambda done, total: seen.append((done, total)))
    assert {**one.to_json(), "config": None} == {**two.to_json(), "config": None}
    assert seen == [(20, 60), (40, 60), (60, 60)]


def test_sample_is_spread_over_the_whole_dataset(dataset, tokenizer):
    found = analyze(config(dataset, tokenizer, sample=10))
    assert (found.num_looked_at, found.num_rows, found.num_pairs) == (10, 60, 10)
    assert found.scaled(100) == 600
    assert found.parts["prompt"].tolist() == analyze(config(dataset, tokenizer)).parts["prompt"][::6].tolist()
    assert "10 of 60 rows, evenly spaced" in describe(found, Rates(None, None, 1))
    assert analyze(config(dataset, tokenizer, sample=1000)).num_looked_at == 60


def test_formats_and_traps_are_counted(tokenizer, tmp_path):
    ask, a, b = turn("user", "hi"), turn("assistant", "a"), turn("assistant", "b")
    rows = [
        {"prompt": "hi", "chosen": [ask, a], "rejected": [ask, b]},
        {"prompt": "hi", "chosen": [ask, a], "rejected": [ask, b]},  # repeated
        {"prompt": "hi", "chosen": [ask, a, ask, a], "rejected": [ask, a, ask, b]},  # multi-turn
        {"prompt": "hi", "chosen": [turn("system", "s"), ask, a], "rejected": [turn("system", "s"), ask, b]},
        {"prompt": "hi", "chosen": [ask, a], "rejected": [ask, a]},  # identical
        {"prompt": "hi", "chosen": [ask, turn("assistant", "<|im_end|>")], "rejected": [ask, b]},
    ]
    found = analyze(config(write(tmp_path / "rows.jsonl", rows), tokenizer))
    assert found.formats == {"conversation that repeats a string prompt (Dolci-Think)": 6, "multi-turn": 1, "system turn": 1}
    assert found.counts == {"repeated": 1, "identical": 1, "special_token_in_content": 1}
    text = describe(found, Rates(None, None, 1))
    assert "no preference to learn" in text and "rows whose content occurs before" in text
    plain = analyze(config(write(tmp_path / "plain.jsonl", [{"chosen": "a b", "rejected": "a c"}]), tokenizer))
    assert plain.formats == {"plain text, implicit prompt": 1}


def test_malformed_rows_are_listed_and_the_others_measured(tokenizer, tmp_path):
    rows = [
        conversation(3, "yes"),
        conversation(3, "yes") | {"chosen": [turn("wizard", "x")]},
        conversation(3, "yes") | {"chosen": None},
        conversation(4, "yes"),
    ]
    found = analyze(config(write(tmp_path / "rows.jsonl", rows), tokenizer))
    assert found.num_pairs == 2 and len(found.malformed) == 2
    assert "row 1" in found.malformed[0] and "wizard" in found.malformed[0] and "row 2" in found.malformed[1]
    assert "malformed: precompute refuses" in describe(found, Rates(None, None, 1))
    with pytest.raises(InputError, match="not one row can be tokenized; the first: row 0"):
        analyze(config(write(tmp_path / "bad.jsonl", rows[1:2]), tokenizer))


def test_recommendation_is_the_shortest_that_leaves_enough_whole(tokenizer, tmp_path):
    rows = [conversation(1, "yes")] * 18 + [conversation(1, "because " * 40)] * 2  # a tenth needs more than 64
    path = write(tmp_path / "rows.jsonl", rows)
    assert analyze(config(path, tokenizer, max_lengths=(64, 256))).recommended == 256
    assert analyze(config(path, tokenizer, max_lengths=(64,))).recommended is None
    assert analyze(config(write(path, rows[:19]), tokenizer, max_lengths=(64, 256))).recommended == 256  # 18/19 = 94.7 %
    assert analyze(config(write(path, rows[:18]), tokenizer, max_lengths=(64, 256))).recommended == 64


def test_recommendation_says_both_of_its_conditions_and_they_hold(tokenizer, tmp_path):
    """Two of 100 prompts fill 64 tokens: 98 % of the pairs are whole there, yet 2 % would be lost. One of 100 is accepted."""
    rows = [conversation(1, "yes")] * 98 + [conversation(80, "yes")] * 2
    path = write(tmp_path / "rows.jsonl", rows)
    found = analyze(config(path, tokenizer, max_lengths=(64, 512)))
    assert (found.at[0].fits, found.at[0].lost, found.recommended) == (0.98, 2, 512)
    text = describe(found, Rates(None, None, 1))
    assert "the shortest that leaves 95% of the pairs whole and costs at most 1% of them (100.0% whole, 0.00% lost)" in text
    found = analyze(config(write(path, rows[:99] + rows[:1]), tokenizer, max_lengths=(64, 512)))
    assert found.recommended == 64 and "(99.0% whole, 1.00% lost)" in describe(found, Rates(None, None, 1))
    found = analyze(config(write(path, rows), tokenizer, max_lengths=(64,)))
    assert "none of these" in describe(found, Rates(None, None, 1)) and "64: 98.0% whole, 2.00% lost" in describe(
        found, Rates(None, None, 1)
    )


def test_the_next_command_has_what_precompute_must_know_too(tokenizer, tmp_path):
    """Every option that both commands have, but those that are answers or speed of this one."""
    dataset = write(tmp_path / "named.jsonl", [conversation(1, "yes") | {"policy": "Be brief.", "question": "yes?"}] * 6)
    template = tmp_path / "it's.jinja"
    template.write_text(tiny.CHATML)
    values = {
        "dataset": dataset,
        "model": tokenizer,
        "tokenizer": tokenizer,
        "chat_template": template,
        "split": "train",
        "limit": 5,
        "tokens_per_batch": 100,
        "score_turns": "last",
        "system_column": "policy",
        "ignore_column": "question",
        **{f"{side}_column": side for side in ("prompt", "chosen", "rejected")},
    }
    others = {"max_length", "num_workers", "revision", "dataset_revision", "dataset_config"}  # the latter three are for the hub
    others.add("config")  # what stands in the file is printed option by option
    switch = "--as-conversation"
    both = {option.name for option in cli.main.commands["analyze"].params} & {
        option.name for option in cli.main.commands["precompute"].params
    }
    assert not (new := both - values.keys() - others - {"as_conversation"}), f"give a value to {new} above"
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    text = (
        CliRunner().invoke(cli.main, ["analyze", *words, switch, "--png", str(tmp_path / "x.png")], catch_exceptions=False).output
    )
    line = next(line for line in text.splitlines() if line.startswith("next: "))
    given = shlex.split(line)[3:]
    assert given[0] == "precompute" and given.count(switch) == 1
    given.remove(switch)
    options = dict(zip(given[1::2], given[2::2], strict=True))
    assert options == dict(zip(words[::2], words[1::2], strict=True)) | {"--max-length": "1024", "--dtype": "bfloat16"}


def test_expected_times_follow_from_the_rates(dataset, tokenizer):
    found = analyze(config(dataset, tokenizer))
    at = found.at[-1]
    assert Rates(10, None, 2).hours(found, at) == pytest.approx(
        (at.tokens_packed / 10 / 2 / 3600, at.tokens_padded / 2.5 / 2 / 3600)
    )
    assert Rates(None, 5, 1).hours(found, at) == (None, pytest.approx(at.tokens_padded / 5 / 3600))
    assert Rates(None, None, 1).hours(found, at) == (None, None)
    assert "2 GPUs" in describe(found, Rates(10, None, 2))


def test_histogram_covers_every_pair_and_is_a_png(dataset, tokenizer, tmp_path):
    found = analyze(config(dataset, tokenizer))
    bars = [line for line in describe(found, Rates(None, None, 1)).splitlines() if "█" in line]
    assert sum(int(line.split()[3].replace(",", "")) for line in bars) == 60
    plot(found, tmp_path / "new" / "lengths.png")
    assert (tmp_path / "new" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--png"):
        plot(found, tmp_path / "file" / "x.png")


def test_command_line(dataset, tokenizer, tmp_path):
    argv = [
        "analyze",
        "--dataset",
        str(dataset),
        "--tokenizer",
        str(tokenizer),
        "--png",
        str(tmp_path / "x.png"),
        "--max-length",
        "64",
    ]
    text = CliRunner().invoke(cli.main, argv, catch_exceptions=False)
    assert text.exit_code == 0 and "recommended: --max-length 1024" in text.output and (tmp_path / "x.png").exists()
    answer = CliRunner().invoke(cli.main, [*argv, "--json"], catch_exceptions=False)
    assert json.loads(answer.stdout)["recommended"] == 1024
    for bad, message in (
        (["--dataset", "x.jsonl", "--tokenizer", str(tokenizer)], "no such file"),
        (["--dataset", str(dataset)], "--tokenizer must be given"),
        (["--dataset", "demo", "--tokens-per-second", "nan"], "not a finite number"),
        (["--dataset", "demo", "--train-tokens-per-second", "inf"], "not a finite number"),
        (["--dataset", str(dataset), "--tokenizer", str(tmp_path / "none")], "no tokenizer can be loaded"),
    ):
        result = CliRunner().invoke(cli.main, ["analyze", *bad])
        assert result.exit_code == 2 and message in result.output and len(re.findall("^Error:", result.output, re.MULTILINE)) == 1


def test_histograms_of_two_datasets_do_not_share_a_file(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("here/train.jsonl", "there/train.jsonl", "pairs.v1.jsonl", "pairs.v2.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [conversation(1, "yes")])
        argv = ["analyze", "--dataset", name, "--tokenizer", str(tokenizer)]
        assert CliRunner().invoke(cli.main, argv, catch_exceptions=False).exit_code == 0
    pictures = sorted(file.name for file in (tmp_path / "runs" / "analyze").iterdir())
    assert pictures == ["here-train.png", "pairs.v1.png", "pairs.v2.png", "there-train.png"]


def test_packing_plan_is_what_pack_uses():
    ids = [np.arange(20, dtype=np.int32), np.concatenate([np.arange(12), [99] * 9]).astype(np.int32)]
    sequences = [Sequence(each, 4) for each in ids]
    assert [len(batch.input_ids) for batch in pack(sequences, 1000)] == [19 + 20 - 12]
