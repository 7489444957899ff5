"""A mended dataset: bad rows are found before anything is scored, and what was scored of the other rows is kept."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

import cli
from store.manifest import manifest_path
from store.reader import open_store
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
            "--max-length",
            "64",
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
