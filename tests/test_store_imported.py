"""An imported store has sums only: every view gives unknown, never an invented log-prob of a token, also where an earlier version wrote one."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_samples import make_identity, make_pair, make_shard, memory_folder

from store.derive import derive
from store.errors import InputError, StoreError
from store.export import export
from store.folder import prepare_store
from store.manifest import Identity
from store.reader import open_store
from store.remote import card
from store.report import report
from store.schema import SCHEMA, SUMS_ONLY, TOKEN_LOGPS, without_token_logps
from store.seal import seal
from store.select import select
from store.shard import part_name, publish_shard
from store.sql import connect, run
from store.summary import summary
from store.verify import verify

NUM_ROWS = 10


def spread_evenly(table: pa.Table) -> pa.Table:
    """As versions before wrote it: each sum spread over its tokens."""
    pairs = table.to_pylist()
    for pair in pairs:
        for side in ("chosen", "rejected"):
            pair[f"{side}_token_logps"] = [pair[f"ref_{side}_logps"] / pair[f"num_{side}_tokens"]] * pair[f"num_{side}_tokens"]
            pair[f"ref_{side}_logps"] = float(
                pa.array(pair[f"{side}_token_logps"], pa.float32()).cast(pa.float64()).to_numpy().sum()
            )
    return pa.Table.from_pylist(pairs, schema=SCHEMA)


@pytest.fixture(scope="module", params=[without_token_logps, spread_evenly], ids=["now", "before"])
def imported(request):
    for folder in memory_folder():
        identity = make_identity(num_rows=NUM_ROWS, shard_size=4, scorer_version=SUMS_ONLY)
        prepare_store(folder / "imported", identity)
        for index in range(identity.num_shards):
            shard, table = make_shard(identity, index)
            publish_shard(folder / "imported", identity, shard, request.param(table), {})
        seal(folder / "imported", identity, {"imported_from": "TRL's cache ref.arrow"}, None)
        yield folder / "imported"


def truth() -> list[dict]:
    return [make_pair(row, 64) for row in range(NUM_ROWS)]


def test_no_reader_gets_a_log_prob_of_a_token(imported):
    store, connection = open_store(imported), connect(imported)
    for pairs in (
        store.read(range(NUM_ROWS)),
        store.columns(SCHEMA.names),
        connection.sql("from pairs order by row").to_arrow_table(),
    ):
        for name in TOKEN_LOGPS:
            expected = [[None] * len(pair[name]) for pair in truth()]
            assert pairs[name].to_pylist() == expected
        assert pairs["ref_chosen_logps"].to_pylist() == pytest.approx([pair["ref_chosen_logps"] for pair in truth()], rel=1e-6)
    sql = "select side, count(*) as n, count(logp) as known, avg(logp) as mean from tokens group by side order by side"
    assert json.loads(run(connection, sql, "json")) == [
        {"side": side, "n": sum(pair[f"num_{side}_tokens"] for pair in truth()), "known": 0, "mean": None}
        for side in ("chosen", "rejected")
    ]


def test_what_needs_single_tokens_is_refused(imported):
    store = open_store(imported)
    pairs = store.read(range(NUM_ROWS))
    longest = max(pair["num_prompt_tokens"] + max(pair["num_chosen_tokens"], pair["num_rejected_tokens"]) for pair in truth())
    shorter = max(pair["num_prompt_tokens"] for pair in truth()) + 1
    assert shorter < longest  # not vacuous
    for change in ({"max_length": shorter}, {"ld_alpha": 0.5}):
        with pytest.raises(InputError, match="log-probs of single tokens are not known.*sums only"):
            derive(pairs, **change)
    assert derive(pairs, max_length=longest).equals(pairs)  # nothing is cut: no token is needed
    for where, order_by in (("chosen_token_logps[1] > -5", None), (None, "list_min(rejected_TOKEN_logps)")):
        with pytest.raises(InputError, match="asks for log-probs of single tokens, which .* does not have"):
            select(imported, where, order_by)
    assert len(select(imported, "ref_chosen_logps < 0 and num_chosen_tokens > 0", "ref_rejected_logps").train) == NUM_ROWS


def test_every_view_says_so(imported, tmp_path):
    assert "sums only; the log-probs of its tokens" in summary(imported) and "scorer 0" not in summary(imported)
    page = report(imported, tmp_path / "page").read_text()
    assert "sums only; the log-probs of its tokens" in page and not (tmp_path / "page" / "logprob_by_position.png").exists()
    assert (tmp_path / "page" / "logprob_by_length.png").exists() and page.count("data:image/png") == 5
    assert "sums only" in card(open_store(imported).manifest, "acme/x")
    assert "sums only" in " ".join(export(imported, "jsonl", tmp_path / "jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "jsonl" / "pairs.jsonl").read_text().splitlines()]
    assert all(set(line["chosen_token_logps"]) == {None} for line in lines)


def test_it_is_a_store_like_any_other_to_verify(imported):
    assert verify(imported) == []


def test_nulls_are_accepted_of_an_imported_store_only(tmp_path):
    def publish(identity: Identity, change) -> None:
        prepare_store(tmp_path / "store", identity)
        shard, table = make_shard(identity, 0)
        publish_shard(tmp_path / "store", identity, shard, change(table), {})

    with pytest.raises(StoreError, match="column chosen_token_logps: has nulls"):
        publish(make_identity(), without_token_logps)
    half = lambda table: without_token_logps(table.select([*SCHEMA.names[:-1]])).append_column(
        SCHEMA.field(SCHEMA.names[-1]), table[SCHEMA.names[-1]]
    )
    with pytest.raises(StoreError, match="has nulls"):
        (tmp_path / "store" / ".staging" / "identity.json").unlink()
        publish(make_identity(scorer_version=SUMS_ONLY), half)
    assert not (tmp_path / "store" / part_name(0)).exists()


def test_the_files_themselves_hold_nulls(tmp_path: Path):
    identity = make_identity(num_rows=4, scorer_version=SUMS_ONLY)
    prepare_store(tmp_path, identity)
    shard, table = make_shard(identity, 0)
    publish_shard(tmp_path, identity, shard, without_token_logps(table), {})
    column = pq.read_table(tmp_path / part_name(0))["chosen_token_logps"].combine_chunks()
    assert column.flatten().null_count == len(column.flatten()) == sum(pair["num_chosen_tokens"] for pair in truth()[:4])
