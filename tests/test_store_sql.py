"""The SQL views against numpy, and the lock: the store can be read, nothing else can, and nothing can be written."""

import csv
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from store_samples import PROVENANCE, make_empty_store, make_identity, make_shard, make_store, memory_folder

import cli
import store
from store.errors import InputError, StoreError
from store.folder import prepare_store
from store.manifest import MANIFEST
from store.reader import open_store
from store.shard import part_name, parts_in, publish_shard
from store.sql import connect, prompt, run, write_parquet
from store.summary import _fit, summary


@pytest.fixture
def tmp_path():
    yield from memory_folder()


@pytest.fixture(scope="module")
def made():
    for folder in memory_folder():
        make_store(folder / "s", unscorable=(3,), num_rows=150, shard_size=60, max_length=40)
        yield folder / "s"


def rows_of(path: Path) -> list[dict]:
    return [row for part in parts_in(path) for row in pq.ParquetFile(part).read().to_pylist()]


# --- views


def test_pairs_are_the_store(made):
    connection = connect(made)
    names = [row[0] for row in connection.execute("describe pairs").fetchall()]
    assert [dict(zip(names, row, strict=True)) for row in connection.execute("from pairs").fetchall()] == rows_of(made)


def test_completions_are_both_sides_of_every_pair(made):
    got = connect(made).execute("from completions order by row, side").fetchall()
    expected = [
        (
            pair["pair_id"],
            pair["row"],
            side,
            pair["prompt_ids"],
            pair[f"{side}_ids"],
            pair[f"ref_{side}_logps"],
            pair[f"num_{side}_tokens"],
            pair[f"{side}_truncated"],
            pair[f"{side}_token_logps"],
        )
        for pair in rows_of(made)
        for side in ("chosen", "rejected")
    ]
    assert got == expected


def test_tokens_are_every_scored_token(made):
    got = connect(made).execute("from tokens order by row, side, position").fetchall()
    expected = [
        (pair["pair_id"], pair["row"], side, position, token, logp)
        for pair in rows_of(made)
        for side in ("chosen", "rejected")
        for position, (token, logp) in enumerate(zip(pair[f"{side}_ids"], pair[f"{side}_token_logps"], strict=True))
    ]
    assert got == expected


def test_aggregates_equal_numpy(made):
    pairs = rows_of(made)
    margins = np.array([pair["ref_chosen_logps"] - pair["ref_rejected_logps"] for pair in pairs])
    connection = connect(made)
    (answer,) = connection.execute(
        "select quantile_cont(ref_chosen_logps - ref_rejected_logps, [0.05, 0.5, 0.95]) from pairs"
    ).fetchall()
    assert answer[0] == pytest.approx(np.quantile(margins, [0.05, 0.5, 0.95]))
    by_token = connection.execute("select row, side, sum(logp::double), count(*) from tokens group by all order by all").fetchall()
    by_side = connection.execute("select row, side, ref_logps, num_tokens from completions order by all").fetchall()
    assert by_token == by_side  # sums of multiples of 1/64 are exact


def test_duckdb_reads_the_shards_without_us(made):
    import duckdb

    rows = duckdb.execute(f"select row, ref_chosen_logps, chosen_token_logps from '{made}/*.parquet' order by row").fetchall()
    assert rows == [(pair["row"], pair["ref_chosen_logps"], pair["chosen_token_logps"]) for pair in rows_of(made)]
    footers = f"select distinct decode(value) from parquet_kv_metadata('{made}/*.parquet') where key = 'refdpo.identity'"
    assert [json.loads(value) for (value,) in duckdb.execute(footers).fetchall()] == [open_store(made).identity.to_json()]


ODD_NAMES = ["with space", "o'brien", 'quo"te', "ünïcødé 试", "glob [1]*?{a,b}", "semi;colon -- no", "100%", ".hidden"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_folder_name(tmp_path, name):
    make_store(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / name)
    for path in (tmp_path / name, tmp_path / "link"):
        assert connect(path).execute("select count(*) from pairs").fetchall() == [(10,)]
        assert str(path)[:70] in summary(path, 200)


def test_unsealed_stores_are_served_as_far_as_they_go(tmp_path):
    identity = make_identity()
    prepare_store(tmp_path, identity)
    assert run(connect(tmp_path), "select count(*) as n from tokens", "csv") == "n\n0"
    assert f"{tmp_path}: NOT SEALED, 3 of 3 shards missing (0, 1, 2)" in summary(tmp_path)
    publish_shard(tmp_path, identity, *make_shard(identity, 1), PROVENANCE)
    assert run(connect(tmp_path), "select list(row) as rows from pairs", "json") == '[{"rows": [4, 5, 6, 7]}]'
    text = summary(tmp_path)
    assert "NOT SEALED, 2 of 3 shards missing (0, 2)" in text and "4 of 10 rows" in text
    assert text.splitlines()[-1].startswith("To finish it: python cli.py precompute --dataset acme/prefs")


def test_what_is_no_store_or_damaged(made, tmp_path):
    for look in (connect, summary):
        with pytest.raises(InputError, match="no such folder"):
            look(tmp_path / "x")
        with pytest.raises(InputError, match="is the shelf, not a dataset"):
            look(Path(store.__file__).parent)
    make_store(tmp_path / "s")
    (tmp_path / "s" / part_name(1)).write_bytes(b"PAR1")
    for look in (connect, summary):
        with pytest.raises(StoreError, match="part-00001.parquet: altered shard"):
            look(tmp_path / "s")


# --- the lock

FORBIDDEN = [
    "select * from read_text('/etc/passwd')",
    "select * from read_blob('{store}/_manifest.json')",
    "select * from read_csv('/etc/passwd')",
    "select * from read_parquet('{store}/part-00000.parquet')",
    "select * from '{other}'",
    "select * from glob('/etc/*')",
    "copy pairs to '{other}'",
    "copy (select 1) to '{store}/part-00000.parquet' (use_tmp_file false)",
    "copy (select 1) to '{store}/new.parquet' (use_tmp_file false)",
    "explain analyze copy (select 1) to '{other}' (use_tmp_file false)",
    "create table t as select 1; copy t from '{other}'",
    "export database '{other}.d'",
    "import database '/etc'",
    "attach '{other}.db'",
    "install httpfs",
    "load httpfs",
    "load '{other}'",
    "create secret (type s3)",
    "set enable_external_access = true",
    "set allowed_directories = ['/']",
    "set temp_directory = '/tmp'",
    "reset enable_external_access",
    "pragma enable_profiling",
    "set lock_configuration = false",
    "select * from secret_table",  # a Python variable in sight
]


@pytest.mark.parametrize("sql", FORBIDDEN)
def test_nothing_else_can_be_read_or_written(made, tmp_path, sql):
    secret_table = pq.ParquetFile(made / part_name(0)).read()
    assert secret_table.num_rows
    before = {file: file.read_bytes() for file in made.iterdir()}
    other = tmp_path / "other.parquet"
    pq.write_table(secret_table, other)
    bystanders = {file: file.read_bytes() for file in tmp_path.iterdir()}
    sql = sql.format(store=made, other=other)
    for format in ("table", "csv"):
        with pytest.raises(InputError):
            run(connect(made), sql, format)
    assert {file: file.read_bytes() for file in made.iterdir()} == before
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == bystanders


# --- answers


def test_csv_and_json_say_the_same(made):
    connection = connect(made)
    sql = "select row, chosen_token_logps, null as nothing, 1.5 as half, 'a,\"b\"\nü' as text from pairs order by row limit 7"
    from_json = json.loads(run(connection, sql, "json"))
    from_csv = list(csv.DictReader(io.StringIO(run(connection, sql, "csv"))))
    assert len(from_json) == len(from_csv) == 7
    for a, b, pair in zip(from_json, from_csv, rows_of(made), strict=False):
        assert a["chosen_token_logps"] == pair["chosen_token_logps"] == json.loads(b["chosen_token_logps"])
        assert a["half"] == 1.5 and b["half"] == "1.5"
        assert a["nothing"] is None and b["nothing"] == ""
        assert a["text"] == b["text"] == 'a,"b"\nü'
        assert a["row"] == int(b["row"]) == pair["row"]


def test_odd_answers(made):
    connection = connect(made)
    assert run(connection, "select 'nan'::double as x, [1, 'inf'::float] as y", "json") == '[{"x": "nan", "y": [1.0, "inf"]}]'
    assert run(connection, "select row from pairs where false", "json") == "[]"
    assert run(connection, "select row from pairs where false", "csv") == "row"
    assert "row" in run(connection, "select row from pairs where false", "table")
    with pytest.raises(InputError, match="more than one column is called row"):
        run(connection, "select a.row, b.row from pairs a, pairs b limit 1", "json")
    assert run(connection, "", "table") == run(connection, "", "csv") == ""
    assert run(connection, "select 1 as a; select 2 as b", "csv") == "a\n1\nb\n2"
    assert "│" in run(connection, "describe tokens", "table")


def test_a_wrong_query_is_explained_on_one_line(made):
    for sql, message in (
        ("selec 1", "syntax error at or near"),
        ("select beta from pairs", 'column "beta" not found'),
        ("from pears", "pears does not exist"),
    ):
        with pytest.raises(InputError) as error:
            run(connect(made), sql)
        assert message in str(error.value) and "\n" not in str(error.value)
        assert str(error.value).endswith("Views: pairs, completions, tokens; `describe pairs` lists columns.")


def test_prompt(made):
    script = "select count(*) as n\nfrom pairs;\n;\nselec;\nselect 2 as two;\n"
    program = "import sys; from store.sql import connect, prompt; prompt(connect(sys.argv[1]), 'csv')"
    code = Path(store.__file__).parents[1]
    command = [sys.executable, "-c", program, str(made)]
    done = subprocess.run(command, cwd=code, input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "n\n149\n" in done.stdout and "Error: Parser Error: syntax error" in done.stdout and "two\n2\n" in done.stdout


def test_prompt_answers_every_query_and_knows_the_usual_words(made, monkeypatch, capsys):
    connection = connect(made)

    def typed(script: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(script))
        prompt(connection, "csv")
        return capsys.readouterr().out

    script = "select 1 as a; select 2 as b;\nselect ';\n' as c;\nselect 3 -- ;\nas d; -- done\ncreate temp table t as select 4 as e;\nfrom t"
    assert typed(script) == 'a\n1\nb\n2\nc\n";\n"\nd\n3\ne\n4\n'
    assert typed(".schema\n.help\n.no\n").startswith("pairs: pair_id VARCHAR, row BIGINT")
    assert typed(".tables\n") == "completions\npairs\nt\ntokens\n"
    for word in ("exit", "quit;", ".exit", "EXIT"):
        assert typed(f"{word}\nselect 1 as a;\n") == ""


def test_parquet_is_the_answer(made, tmp_path):
    sql = "select row, side, logp, token_id from tokens order by row, side, position"
    assert write_parquet(connect(made), sql, tmp_path / "new" / "x.parquet") == len(connect(made).sql(sql).fetchall())
    table = pq.read_table(tmp_path / "new" / "x.parquet")
    assert [tuple(row.values()) for row in table.to_pylist()] == connect(made).execute(sql).fetchall()
    assert table.schema.field("logp").type == "float" and table.schema.field("token_id").type == "int32"


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("select 1; select 2", "not one query; found 2 statements"),
        ("create table t as select 1", "not one query"),
        ("selec", "syntax error"),
        ("select interval 1 day as x", "cannot be written as Parquet"),
        ("select 1 as a, 2 as a", "more than one column is called a"),
        ("select if(range = 99999, error('boom'), 1) from range(100000)", "boom"),
        ("copy pairs to 'x.parquet'", "not one query"),
    ],
)
def test_a_parquet_file_is_there_whole_or_not_at_all(made, tmp_path, sql, message):
    with pytest.raises(InputError, match=message):
        write_parquet(connect(made), sql, tmp_path / "x.parquet")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.parquet").write_text("precious")
    with pytest.raises(InputError, match="exists already"):
        write_parquet(connect(made), "select 1", tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").read_text() == "precious"


def asked(made, *options: str, **popen) -> subprocess.Popen:
    command = [sys.executable, "cli.py", "inspect", "--ref-store", str(made), *options]
    return subprocess.Popen(command, cwd=Path(store.__file__).parents[1], stdout=subprocess.PIPE, text=True, **popen)


ENDLESS = "from tokens a, tokens b, tokens c, tokens d where a.logp + b.logp + c.logp + d.logp"


@pytest.mark.parametrize("format", ["csv", "json", "parquet"])
def test_a_long_answer_is_streamed_and_ctrl_c_ends_it(made, tmp_path, format):
    """An answer that would take hours: its first rows come at once; interrupted, the command ends and leaves no half file."""
    to_file = ["--output", str(tmp_path / "x.parquet")] if format == "parquet" else []
    process = asked(made, "--sql", f"select 0 as row {ENDLESS} < 0", "--format", format, *to_file, stderr=subprocess.PIPE)
    if to_file:
        wait_for(lambda: any(tmp_path.iterdir()))
    else:
        assert process.stdout.readline() == {"csv": "row\n", "json": '[{"row": 0},\n'}[format]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1 and "Traceback" not in errors and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["table", "csv"])
def test_ctrl_c_ends_a_query_that_has_no_row_yet(made, format):
    process = asked(made, "--sql", f"select 1 as begun; select count(*) {ENDLESS} > 0", "--format", format, stderr=subprocess.PIPE)
    while "1" not in process.stdout.readline():
        pass
    time.sleep(0.5)  # the second query has begun
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1 and "Traceback" not in errors


def wait_for(condition, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_options_of_inspect_that_say_nothing_together_are_refused(made, tmp_path):
    for options, message in (
        (("--format", "csv"), "--format: belongs to --sql"),
        (("--output", str(tmp_path / "x")), "--output: belongs to --sql"),
        (("-i", "--sql", "select 1"), "one of the two"),
        (("-i", "--output", str(tmp_path / "x")), "belongs to --sql"),
        (("--sql", "select 1", "--format", "parquet"), "needs a file"),
    ):
        result = CliRunner().invoke(cli.main, ["inspect", "--ref-store", str(made), *options])
        assert result.exit_code == 2 and message in result.output, result.output
    argv = ["inspect", "--ref-store", str(made), "--sql", "select 'ü' as x", "--format", "csv", "--output", str(tmp_path / "x.csv")]
    assert CliRunner().invoke(cli.main, argv).exit_code == 0
    assert (tmp_path / "x.csv").read_bytes() == "x\nü\n".encode()


# --- summary


def test_summary_fits_a_screen_and_its_numbers_are_right(made):
    text = summary(made, 80)
    *lines, command = text.splitlines()
    assert len(lines) < 40 and max(map(len, lines)) <= 80
    assert command == f"ask more   python cli.py inspect --ref-store {made} --sql 'describe pairs'"
    words = " ".join(text.split())
    pairs = rows_of(made)
    chosen, rejected = (np.array([pair[f"ref_{side}_logps"] for pair in pairs]) for side in ("chosen", "rejected"))
    num_chosen, num_rejected = (np.array([pair[f"num_{side}_tokens"] for pair in pairs]) for side in ("chosen", "rejected"))
    quantiles = [0.05, 0.25, 0.5, 0.75, 0.95]
    for expected in (
        f"{made}: sealed, 3 shards",
        "149 of 150 rows; 1 unscorable",
        "1 unscorable: prompt fills max_length",
        f"{num_chosen.sum() + num_rejected.sum():,} scored in completions",
        "chosen " + " ".join(f"{n:,}" for n in np.quantile(num_chosen, [0.5, 0.9, 0.95, 0.99, 1], method="inverted_cdf")),
        "of the sums " + " ".join(f"{n:,.1f}" for n in np.quantile(chosen - rejected, quantiles)),
        "per token " + " ".join(f"{n:,.3f}" for n in np.quantile(chosen / num_chosen - rejected / num_rejected, quantiles)),
        f"{(chosen > rejected).mean():.1%} by sum, {(chosen / num_chosen > rejected / num_rejected).mean():.1%} per token",
        f"{np.mean([pair['chosen_truncated'] for pair in pairs]):.1%} of chosen",
        "model acme/tiny@main [a1a1a1a1]",
        "float32, max length 40",
        "chosen_truncated",
        "tokens/s each",
        "made by ",
    ):
        assert expected in words


def test_summary_of_a_store_full_of_remarks(tmp_path):
    """Long names, many counts, examples with newlines and wide characters: still one screen."""
    identity = make_identity(num_rows=4, model="organisation/" + "m" * 90, dataset="d" * 90)
    prepare_store(tmp_path, identity)
    report, table = make_shard(identity, 0, unscorable=(1, 2))
    counts = {f"kind_{i}": i for i in range(20)}
    examples = {name: "row 1: 試験試験試験\n\n" * 20 for name in counts}
    report = type(report)(**{**vars(report), "counts": counts, "examples": examples})
    publish_shard(tmp_path, identity, report, table, PROVENANCE)
    lines = summary(tmp_path, 80).splitlines()[:-1]
    assert len(lines) < 40 and "  … and 14 more kinds, in _manifest.json" in lines
    widths = [sum(2 if ord(character) > 0x2E80 else 1 for character in line) for line in lines]
    assert max(widths) <= 80
    assert not (tmp_path / MANIFEST).exists()


def test_fit_counts_columns():
    assert _fit("abcdef", 6) == "abcdef"
    assert _fit("abcdefg", 6) == "abcde…"
    assert _fit("試試試", 6) == "試試試"
    assert _fit("試試試試", 6) == "試試…"


def test_summary_with_nothing_scorable(tmp_path):
    make_empty_store(tmp_path, 4)
    assert "0 of 4 rows; 4 unscorable" in summary(tmp_path)
    assert open_store(tmp_path, check="sha256").read([]).num_rows == 0
