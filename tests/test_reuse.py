"""A mended dataset: bad rows are found before anything is scored, and what was scored of the other rows is kept."""

import json
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

import cli
from store.folder import prepare_store
from store.manifest import manifest_path
from store.reader import open_store
from store.schema import SCHEMA, SUMS_ONLY, without_token_logps
from store.shard import part_name, publish_shard, read_footer
from store.verify import verify


def row(number: int) -> dict:
    return {
        "prompt": f"Why {number}?",
        **{
            side: [{"role": "user", "content": f"Why {number}?"}, {"role": "assistant", "content": side}]
            for side in ("chosen", "rejected")
        },
    }


@pytest.fixture
def run(tiny_llama, tmp_path):
    def run(rows: list[dict], store: str, *more, code: int = 0) -> str:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        argv = [
            "precompute",
            "--dataset",
            tmp_path / "rows.jsonl",
            "--model",
            tiny_llama,
            *([] if "--max-length" in more and code == 0 else ["--max-length", "64"]),
            "--dtype",
            "float32",
        ]
        argv += ["--shard-size", "4", "--ref-store", tmp_path / store, *more]
        result = CliRunner().invoke(cli.main, [str(word) for word in argv], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result.output

    return run


def test_a_bad_row_at_the_end_stops_before_anything_is_scored(run, tmp_path):
    rows = [row(i) for i in range(12)]
    rows[9]["prompt"] = rows[11]["prompt"] = "X"
    output = run(rows, "store", code=2)
    assert output.count("Error:") == 1 and re.search("row 9, chosen.*1 more rows fail: 11", output)
    assert not (tmp_path / "store").exists()


def test_the_rows_that_did_not_change_are_not_scored_again(run, tmp_path):
    """One row mended, one put in front, so that every row is in another place, and the number of tokens shows what was scored."""
    rows = [row(i) for i in range(12)]
    run(rows, "before")
    before = open_store(tmp_path / "before", check="sha256")
    mended = [row(100), *rows]
    mended[6] = row(200)
    refused = run(mended, "before", code=1)
    assert "another dataset" in refused and "add --reuse with this store" in refused
    output = run(mended, "after", "--reuse", tmp_path / "before")
    assert f"11 pairs were taken from {tmp_path / 'before'}" in output and verify(tmp_path / "after") == []
    after = open_store(tmp_path / "after", check="sha256")
    run(mended, "scratch")
    scratch = open_store(tmp_path / "scratch", check="sha256")
    assert after.identity.differences(scratch.identity) == []
    assert after.manifest.model_tokens < scratch.manifest.model_tokens / 4
    names = [name for name in scratch.read([0]).column_names if "logps" not in name]
    assert after.read(range(13), names).equals(scratch.read(range(13), names))
    sums = [np.array(store.columns(["ref_chosen_logps"])[0].to_pylist()) for store in (after, scratch, before)]
    np.testing.assert_allclose(sums[0], sums[1], atol=1e-4)
    assert sums[0][1] == sums[2][0] and sums[0][12] == sums[2][11]  # taken, not scored

    output = run(mended, "whole", "--reuse", tmp_path / "after")
    assert "13 pairs were taken" in output and "scored 13/13 pairs" in output and "the model waited" not in output

    manifest_path(tmp_path / "before").unlink()
    (tmp_path / "before" / "part-00000.parquet").unlink()  # an unfinished store: what it has
    assert "7 pairs were taken" in run(mended, "again", "--reuse", tmp_path / "before")


def test_other_numbers_are_not_taken(run, tmp_path):
    rows = [row(i) for i in range(3)]
    run(rows, "before", "--limit", "2")
    output = run(rows, "after", "--reuse", tmp_path / "before", "--max-length", "32", code=2)
    assert "given 2 times" in output  # this command has one already
    run(rows, "other", "--reuse", tmp_path / "before")
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    output = run(rows, "third", "--reuse", tmp_path / "before", "--chat-template", tmp_path / "template.jinja", code=1)
    assert "another chat template" in output and output.count("Error:") == 1 and not (tmp_path / "third").exists()
    assert "is the store that is being made" in run(rows, "before", "--reuse", tmp_path / "before", code=2)


def long_row(number: int) -> dict:
    """About 40 tokens on one side, and more than 64 on the other of every third."""
    more = " and again" * (12 if number % 3 == 0 else 1)
    return {"prompt": f"Why {number}?", "chosen": f"because {number}{more}", "rejected": f"no {number}"}


def logps_of(store, names=("chosen_token_logps", "rejected_token_logps")) -> list[np.ndarray]:
    table = open_store(store, check="sha256").columns(names)
    return [np.array(each) for name in names for each in table[name].to_pylist()]


def same_but_for_noise(grown, fresh) -> int:
    """How many token log-probs differ at all; none by more than float32 does."""
    stores = [open_store(each, check="sha256") for each in (grown, fresh)]
    assert stores[0].identity.differences(stores[1].identity) == []
    names = [name for name in stores[1].read([0]).column_names if "logps" not in name]
    everything = range(stores[1].num_pairs)
    assert stores[0].read(everything, names).equals(stores[1].read(everything, names))
    tokens = [np.concatenate(logps_of(each)) for each in (grown, fresh)]
    np.testing.assert_allclose(*tokens, rtol=0, atol=2e-5)
    sums = [np.array(store.columns(["ref_chosen_logps"])[0].to_pylist()) for store in stores]
    np.testing.assert_allclose(*sums, rtol=0, atol=2e-4)
    assert verify(grown) == []
    return int((tokens[0] != tokens[1]).sum())


def test_a_longer_store_has_the_shorter_ones_numbers_and_a_shorter_one_what_it_did_not_cut(run, tmp_path):
    """With the values of the longer store moved by what no scorer gives, so that it shows which were taken."""
    rows = [long_row(i) for i in range(9)]
    lengths = {name: ["--max-length", length] for name, length in (("long", 96), ("short", 40))}
    for name, words in lengths.items():
        run(rows, name, *words)
        run(rows, f"{name}-fresh", *words)
    cut = open_store(tmp_path / "short").columns(["chosen_truncated"])[0].to_pylist()
    assert any(cut) and not all(cut)
    output = run(rows, "shortened", *lengths["short"], "--reuse", tmp_path / "long")
    assert "9 pairs were taken" in output and open_store(tmp_path / "shortened").manifest.model_tokens == 0
    same_but_for_noise(tmp_path / "shortened", tmp_path / "short-fresh")
    for mine, longer in zip(logps_of(tmp_path / "shortened"), logps_of(tmp_path / "long"), strict=True):
        assert np.array_equal(mine, longer[: len(mine)])
    output = run(rows, "lengthened", *lengths["long"], "--reuse", tmp_path / "short")
    assert f"{9 - sum(cut)} pairs were taken" in output
    same_but_for_noise(tmp_path / "lengthened", tmp_path / "long-fresh")


def test_of_several_stores_the_first_that_has_a_pair(run, tmp_path):
    rows = [long_row(i) for i in range(9)]
    run(rows[:4], "one")
    run(rows[2:7], "two")
    output = run(rows[::-1], "mixed", "--reuse", tmp_path / "one", "--reuse", tmp_path / "two")
    assert f"4 pairs were taken from {tmp_path / 'one'}" in output and f"3 pairs were taken from {tmp_path / 'two'}" in output
    run(rows[::-1], "fresh")
    same_but_for_noise(tmp_path / "mixed", tmp_path / "fresh")
    manifest = open_store(tmp_path / "mixed").manifest
    assert manifest.counts["reused"] == 7 and manifest.provenance["reused"] == {str(tmp_path / "one"): 4, str(tmp_path / "two"): 3}
    by_shard = [read_footer(tmp_path / "mixed" / part_name(shard))[1] for shard in range(3)]
    assert [report.counts.get("reused", 0) for report in by_shard] == [2, 4, 1]  # rows 8, 7 are in neither
    assert by_shard[1].examples["reused"] == "shard 1: 3 from one, 1 from two"
    assert [each["num_pairs"] for each in manifest.provenance["reuse_checked"]] == [4, 5]


def test_a_store_whose_numbers_this_model_does_not_give_is_refused_with_the_numbers(run, tmp_path):
    rows = [long_row(i) for i in range(6)]
    run(rows[:4], "honest")
    honest = open_store(tmp_path / "honest")
    prepare_store(tmp_path / "wrong", honest.identity)
    _, report = read_footer(tmp_path / "honest" / part_name(0))
    pairs = honest.read(range(4)).to_pylist()
    for pair in pairs:
        pair["chosen_token_logps"] = [logp - 0.5 for logp in pair["chosen_token_logps"]]
        pair["ref_chosen_logps"] = float(np.sum(pair["chosen_token_logps"], dtype=np.float64))
    table = pa.Table.from_pylist(pairs, schema=SCHEMA)
    sums = [float(np.asarray(each, np.float32).sum(dtype=np.float64)) for each in table["chosen_token_logps"].to_pylist()]
    table = table.set_column(SCHEMA.get_field_index("ref_chosen_logps"), SCHEMA.field("ref_chosen_logps"), pa.array(sums))
    publish_shard(tmp_path / "wrong", honest.identity, report, table, {})
    output = run(rows, "grown", "--reuse", tmp_path / "wrong", code=1)
    assert output.count("Error:") == 1 and re.search(r"expected at most 0.001 nats per token.*found 0\.\d+, most on row \d", output)
    assert not list((tmp_path / "grown").glob("*.parquet"))


def test_sums_alone_are_not_taken(run, tmp_path, tiny_llama):
    rows = [long_row(i) for i in range(3)]
    run(rows, "fresh")
    identity = replace(open_store(tmp_path / "fresh").identity, scorer_version=SUMS_ONLY)
    prepare_store(tmp_path / "sums", identity)
    _, report = read_footer(tmp_path / "fresh" / part_name(0))
    publish_shard(tmp_path / "sums", identity, report, without_token_logps(open_store(tmp_path / "fresh").read(range(3))), {})
    output = run(rows, "grown", "--reuse", tmp_path / "sums", code=2)
    assert "has sums only" in output and output.count("Error:") == 1 and not (tmp_path / "grown").exists()
