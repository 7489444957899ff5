"""`report`: the numbers on the page against Python, a page that needs nothing else, and two stores side by side."""

import html
import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import store_samples
from click.testing import CliRunner

import cli
from precompute.desk.analyze import QUANTILES, _quantiles
from store import report as module
from store.errors import InputError, StoreError
from store.folder import prepare_store
from store.reader import open_store
from store.report import report
from store.report_pictures import whole_under
from store.schema import SCHEMA
from store.seal import seal
from store.shard import publish_shard
from store.summary import summary

FIGURES = {
    "lengths.png",
    "margins.png",
    "margins_per_token.png",
    "logprob_by_length.png",
    "logprob_by_position.png",
    "truncation.png",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """here: 40 rows; there: the same but for every chosen sum 4 nats lower (on its first token) and other weights."""
    folder = tmp_path_factory.mktemp("report")
    identity = store_samples.make_identity(num_rows=40, shard_size=16)
    store_samples.make_store(folder / "here", identity, unscorable=(3,))
    other = replace(identity, weights_sha256="e5" * 32, model="acme/other")
    prepare_store(folder / "there", other)
    for index in range(other.num_shards):
        shard, table = store_samples.make_shard(other, index)
        pairs = table.to_pylist()
        for pair in pairs:
            pair["chosen_token_logps"][0] -= 4.0
            pair["ref_chosen_logps"] -= 4.0
        publish_shard(folder / "there", other, shard, pa.Table.from_pylist(pairs, schema=SCHEMA), {})
    seal(folder / "there", other, {}, None)
    return folder


def decode(ids: list[int]) -> str:
    return "<script>alert(1)</script> & " + " ".join(map(str, ids))


@pytest.fixture(scope="module")
def page(folder) -> str:
    return report(folder / "here", folder / "out", decode, folder / "there").read_text()


def visible(page: str) -> str:
    """The text as a reader sees it."""
    return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)).split())


def test_numbers_are_those_of_the_pairs(folder, page):
    pairs = open_store(folder / "here").read(range(39)).to_pylist()
    margins = [pair["ref_chosen_logps"] - pair["ref_rejected_logps"] for pair in pairs]
    means = [
        pair["ref_chosen_logps"] / pair["num_chosen_tokens"] - pair["ref_rejected_logps"] / pair["num_rejected_tokens"]
        for pair in pairs
    ]
    text = visible(page)
    assert "39 pairs of 40 rows" in text
    assert f"{sum(m > 0 for m in margins) / 39:.1%} the reference prefers chosen, by sum" in text
    assert f"{sum(m > 0 for m in means) / 39:.1%} the same, per token" in text
    median = statistics.median(margins)
    assert re.search(rf"sums, nats \S+ \S+ {re.escape(f'{median:.1f}' if abs(median) >= 100 else f'{median:.3g}')} ", text)
    assert f"{sum(pair['chosen_truncated'] for pair in pairs) / 39:.1%} of chosen truncated" in text
    best = max(range(39), key=margins.__getitem__)
    assert f"row {pairs[best]['row']}: " in text and pairs[best]["pair_id"] in text
    assert "not in the store: prompt fills max_length (row 3)" in text


def test_page_needs_nothing_else_and_trusts_no_text(folder, page):
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page) and "url(" not in page and "@import" not in page
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert 'name="viewport"' in page
    for name in FIGURES | {"compared_margins.png", "compared_change.png"}:
        assert (folder / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert page.count("data:image/png;base64,") == 8


def test_comparison_joins_by_pair_id(page):
    """The other store lowers every chosen sum by 4 nats: the margin changes by -4 everywhere; row 3 exists there only."""
    text = visible(page)
    assert "39 pairs in both; 0 only here, 1 only there" in text
    assert "margin, change -4 -4 -4 -4 -4" in text and "rejected, change 0 0 0 0 0" in text
    assert "Largest change of a sum: 4 (chosen), 0 (rejected)" in text
    assert re.search(r'class="differs"><td>weights_sha256', page) and not re.search(r'class="differs"><td>(model|dtype)<', page)


def test_stores_of_other_rows_are_not_compared(folder, tmp_path):
    identity = store_samples.make_identity(num_rows=4, shard_size=4, dataset="acme/others")
    prepare_store(tmp_path / "foreign", identity)
    shard, columns = store_samples.make_shard(identity, 0)
    pairs = [pair | {"pair_id": f"{9000 + pair['row']:032x}"} for pair in columns.to_pylist()]
    publish_shard(tmp_path / "foreign", identity, shard, pa.Table.from_pylist(pairs, schema=SCHEMA), {})
    seal(tmp_path / "foreign", identity, {}, None)
    with pytest.raises(InputError, match="no pair in common.*acme/prefs and acme/others"):
        report(folder / "here", tmp_path / "out", None, tmp_path / "foreign")


def test_empty_store_and_one_pair_have_a_page(tmp_path):
    store_samples.make_empty_store(tmp_path / "empty", 3)
    assert "no pair" in report(tmp_path / "empty", tmp_path / "out0").read_text()
    store_samples.make_store(tmp_path / "one", num_rows=1)
    text = visible(report(tmp_path / "one", tmp_path / "out1").read_text())
    assert "1 pairs of 1 rows" in text and "Token ids, not text" in text


def test_token_sample_is_whole_row_groups_over_the_store(monkeypatch):
    positions = module._sampled(100_000)
    assert len(positions) == len(set(positions)) == module.TOKENS_SAMPLED
    assert all(position % 64 == 0 for position in positions[::64]) and positions[-1] > 95_000
    assert module._sampled(50) == list(range(50))


def test_command_line(folder, tmp_path):
    argv = ["report", "--ref-store", str(folder / "here"), "--output-dir", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.main, argv, catch_exceptions=False)
    assert result.exit_code == 0 and f"report: {tmp_path}/out/index.html" in result.output and "shown as token ids" in result.output
    (tmp_path / "file").write_text("")
    for bad, message, code in (
        ([*argv, "--tokenizer", str(tmp_path / "none")], "no tokenizer can be loaded", 2),
        ([*argv[:-1], str(tmp_path / "file")], "cannot", 1),
        (["report", "--ref-store", str(tmp_path / "none")], "no such folder", 2),
        ([*argv, "--compare", str(tmp_path / "none")], "no such folder", 2),
    ):
        result = CliRunner().invoke(cli.main, bad)
        assert (
            result.exit_code == code and message in result.output and len(re.findall("^Error:", result.output, re.MULTILINE)) == 1
        ), result.output


def test_unsealed_store_is_refused(tmp_path):
    identity = store_samples.make_identity()
    prepare_store(tmp_path / "store", identity)
    with pytest.raises(StoreError, match="not sealed"):
        report(tmp_path / "store", tmp_path / "out")


def test_the_curve_of_whole_pairs_ends_where_the_store_does():
    """By hand: of five pairs two were cut at 64, which they exceed; the others need 10, 30 and 64."""
    lengths, whole = whole_under(np.array([10, 30, 64, 65, 65]), 64)
    assert (lengths[0], lengths[-1]) == (10, 64) and (whole[0], whole[-1]) == (20, 60)
    assert whole[lengths.tolist().index(63)] == 40 and list(whole) == sorted(whole)
    lengths, whole = whole_under(np.array([65, 65]), 64)  # every pair was cut
    assert list(lengths) == [64] and list(whole) == [0]


def test_lengths_have_one_definition_of_quantiles(folder, page):
    """analyze, inspect and report on the same lengths, of which the middle and the tails lie between two that occur."""
    store_samples.make_store(folder / "even", num_rows=38, shard_size=16)
    lengths = open_store(folder / "even").lengths()
    columns = [lengths[f"num_{part}_tokens"].to_numpy() for part in ("prompt", "chosen", "rejected")]
    here = visible(report(folder / "even", folder / "even_page").read_text())
    by_analyze = _quantiles(np.stack([*columns, columns[0], *columns], axis=1).astype(np.int64), QUANTILES)
    words = " ".join(summary(folder / "even").split())
    for part, title in (("prompt", "prompt, tokens"), ("chosen", "chosen"), ("rejected", "rejected")):
        values = " ".join(str(value) for value in by_analyze[part].values())
        assert f"{title} {values}" in here and f" {part} {values}" in words
    interpolated = [np.quantile(column, [0.5, 0.9, 0.95, 0.99]) for column in columns]
    assert any(value % 1 for values in interpolated for value in values)  # not vacuous
