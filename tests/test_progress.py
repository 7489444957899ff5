"""What phase 1 shows: the time left counts tokens, other workers' shards count, and each way of showing it."""

import json
from pathlib import Path

import pytest
import store_samples
from click.testing import CliRunner

import cli
from launch import Process
from precompute import progress as module
from precompute.progress import Progress, say_where_it_goes_on
from store.folder import prepare_store
from store.shard import parts_in, publish_shard


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """now[0] is what time.monotonic() says."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def make(tmp_path: Path, **kwargs) -> tuple[Progress, object]:
    identity = store_samples.make_identity(num_rows=16, shard_size=4)
    prepare_store(tmp_path / "store", identity)
    return Progress(tmp_path / "store", identity, Process(0, 2, 0), **kwargs), identity


def finish(tmp_path: Path, identity, index: int) -> object:
    report, table = store_samples.make_shard(identity, index)
    publish_shard(tmp_path / "store", identity, report, table, {})
    return report


def test_time_left_is_counted_in_tokens_of_all_workers(tmp_path, clock):
    """After 10 s: shard 0 by this worker and shard 2 by another, T tokens in all, 10 more of a third; 8 rows are missing."""
    progress, identity = make(tmp_path)
    assert progress.state()["seconds_left"] is None
    progress.shard_started()
    own = finish(tmp_path, identity, 0)
    progress.batch_done(own.model_tokens)
    progress.shard_done(own)
    other = finish(tmp_path, identity, 2)
    progress.shard_started()
    progress.batch_done(10)
    clock[0] += 10
    tokens = own.model_tokens + other.model_tokens
    state = progress.state()
    assert state["rows_done"] == 8 and state["num_workers"] == 2
    assert state["tokens_per_second"] == pytest.approx((tokens + 10) / 10)
    assert state["seconds_left"] == pytest.approx((8 * tokens / 8 - 10) / ((tokens + 10) / 10))


def test_where_nothing_is_left_to_score_nothing_is_counted(tmp_path, clock, capsys):
    """All shards of an earlier run, not sealed: no speed of nothing, and no time left that is not known. With one missing: a line."""
    store = tmp_path / "store"
    _, identity = make(tmp_path)
    say_where_it_goes_on(store, identity, parts_in(store))
    assert capsys.readouterr().err == ""
    for index in range(3):
        finish(tmp_path, identity, index)
    say_where_it_goes_on(store, identity, before := parts_in(store))
    make(tmp_path)[0].close()
    assert "12 of 16 rows are done, going on\nscored 12/16" in capsys.readouterr().err
    progress, _ = make(tmp_path)
    capsys.readouterr()
    finish(tmp_path, identity, 3)  # by another worker, while this one scored nothing
    progress.close()
    assert "scored 16/16" in (line := capsys.readouterr().err) and "0:00:00 left" in line
    say_where_it_goes_on(store, identity, before)  # what was there when the run began
    assert capsys.readouterr().err == f"{store}: 12 of 16 rows are done, going on\n"
    say_where_it_goes_on(store, identity, parts_in(store))
    make(tmp_path)[0].close()
    assert capsys.readouterr().err == f"{tmp_path}/store: 16 of 16 rows are done, sealing\n"


def test_shards_of_an_earlier_run_give_no_speed(tmp_path, clock):
    _, identity = make(tmp_path)
    finish(tmp_path, identity, 1)
    progress, _ = make(tmp_path)
    clock[0] += 5
    state = progress.state()
    assert state["rows_done"] == 4 and state["tokens_per_second"] == 0 and state["seconds_left"] is None


def test_it_says_when_the_model_waits(tmp_path, clock, capsys):
    progress, _ = make(tmp_path)
    clock[0] += 6  # tokenizing the first shard
    progress.shard_started()
    clock[0] += 4
    progress.batch_done(100)
    progress._say()
    assert "the model waited 60.0% of the time for tokenizer or disk" in capsys.readouterr().err
    clock[0] += 1  # packing and scoring the next batch
    progress.batch_done(100)
    clock[0] += 2  # publishing, and tokenizing the second shard
    assert progress.shard_started() == 2
    clock[0] += 67
    progress.batch_done(100)
    progress._say()
    assert "waited" not in capsys.readouterr().err  # no news
    clock[0] += 1000  # for other workers' shards
    progress.close()
    assert "the model waited 10.0% of the time for tokenizer or disk" in capsys.readouterr().err


def test_a_log_gets_a_line_a_minute_and_other_workers_are_silent(tmp_path, clock, capsys):
    progress, _ = make(tmp_path)
    for _ in range(100):
        clock[0] += 3
        progress.batch_done(1)
    assert len(capsys.readouterr().err.splitlines()) == 4  # 300 s: at 63, 126, 189, 252
    for silent in ({"show": "nothing"}, {}):
        quiet, _ = make(tmp_path, **silent)
        quiet.process = Process(1, 2, 1) if not silent else quiet.process
        clock[0] += 100
        quiet.batch_done(1)
        quiet.close()
        assert capsys.readouterr() == ("", "")


def test_json_and_quiet(tmp_path, tiny_llama):
    row = {"prompt": [{"role": "user", "content": "Why?"}]} | {
        side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    argv = [
        "precompute",
        "--dataset",
        str(tmp_path / "rows.jsonl"),
        "--model",
        str(tiny_llama),
        "--max-length",
        "64",
        "--dtype",
        "float32",
    ]
    result = CliRunner().invoke(cli.main, [*argv, "--ref-store", str(tmp_path / "a"), "--json"], catch_exceptions=False)
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert (
        [event["event"] for event in events] == ["progress", "sealed"]
        and events[0]["rows_done"] == 1
        and events[1]["num_pairs"] == 1
    )
    result = CliRunner().invoke(cli.main, [*argv, "--ref-store", str(tmp_path / "b"), "--quiet"], catch_exceptions=False)
    assert result.stderr == "" and "is sealed: 1 pairs" in result.stdout
