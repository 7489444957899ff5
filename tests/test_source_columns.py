"""The dataset's other columns: read as they are, kept beside the numbers, seen by SQL, export and report, and of no effect on the numbers."""

import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from store_samples import make_identity, make_shard, memory_folder

import cli
from precompute.rows.columns import ColumnOptions
from precompute.rows.dataset import JoinedRows, check_and_fingerprint, load_rows
from precompute.rows.source_columns import SourceColumns
from store.errors import InputError, StoreError
from store.export import export
from store.folder import prepare_store, settle_source_columns, stored_source_columns
from store.manifest import ShardReport
from store.reader import open_store
from store.report import report
from store.schema import SourceColumn
from store.seal import seal
from store.select import select
from store.shard import publish_shard
from store.sql import connect
from store.verify import verify


def row(number: int, **more) -> dict:
    return {"prompt": f"Why {number}?", "chosen": "because", "rejected": f"no {number}", **more}


ROWS = [
    row(0, dataset_source="a", score=1, exact=7, good=True, tags=["x"], row=5, Row="r", odd='q"{x}', kind=1, empty=None),
    row(
        1,
        dataset_source="ünï\u2028",
        score=2.5,
        exact=2**53 + 1,
        good=False,
        tags=[],
        row=6,
        Row="s",
        odd=None,
        kind="b",
        empty=None,
    ),
    row(2, dataset_source=None, score=None, exact=None, good=None, tags=None, row=None, Row=None, odd="", kind=None, empty=None),
]


def write(path, rows: list[dict]):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def offered(rows):
    found = SourceColumns.of(rows)
    return found, found.values(rows, range(len(rows)), found.columns).to_pylist()


def test_values_are_those_of_the_source(tmp_path):
    found, values = offered(load_rows(str(write(tmp_path / "rows.jsonl", ROWS)), split="train"))
    types = {column.name: column.type for column in found.columns}
    assert types == {
        "dataset_source": "string",
        "score": "double",
        "exact": "int64",
        "good": "bool",
        "source_row": "int64",
        "source_source_Row": "string",
        "odd": "string",
    }
    assert [each["dataset_source"] for each in values] == ["a", "ünï\u2028", None]
    assert [each["score"] for each in values] == [1.0, 2.5, None] and [each["exact"] for each in values] == [7, 2**53 + 1, None]
    assert [each["odd"] for each in values] == ['q"{x}', None, ""] and [each["good"] for each in values] == [True, False, None]
    assert [each["source_row"] for each in values] == [5, 6, None]
    assert set(found.left_out) == {"tags", "kind"}


def test_a_name_that_is_taken_gets_another_whatever_its_case(tmp_path):
    found, values = offered(load_rows(str(write(tmp_path / "rows.jsonl", ROWS)), split="train"))
    assert found.renamed["source_row"] == "row" and found.renamed["source_source_Row"] == "Row"
    assert [each["source_source_Row"] for each in values] == ["r", "s", None]
    assert "source_row (there: row)" in found.notice(found.columns) and "not single values of one kind: tags, kind" in found.notice(
        ()
    )


def test_parquet_csv_and_saved_datasets_have_them_too(tmp_path):
    plain = [{name: each[name] for name in ("prompt", "chosen", "rejected", "dataset_source", "score", "tags")} for each in ROWS]
    write(tmp_path / "rows.parquet", plain)
    datasets.Dataset.from_list(plain).save_to_disk(str(tmp_path / "saved"))
    expected = [{"dataset_source": each["dataset_source"], "score": each["score"]} for each in plain]
    for source in ("rows.parquet", "saved"):
        rows = load_rows(str(tmp_path / source), split="train")
        found, values = offered(rows)
        assert values == expected and found.left_out == ("tags",) and rows.column_names == ["prompt", "chosen", "rejected"], source
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected,score,row\nWhy?,a,b,0.5,\n")
    assert offered(load_rows(str(tmp_path / "rows.csv"), split="train"))[1] == [
        {"score": "0.5", "source_row": ""}
    ]  # text stays text


def test_files_that_do_not_agree_and_columns_to_ignore(tmp_path):
    write(tmp_path / "a.parquet", [row(0, score=1, same="x")])
    write(tmp_path / "b.parquet", [row(1, score="one", more=2.0)])
    found, values = offered(load_rows(str(tmp_path / "*.parquet"), split="train"))
    assert found.left_out == ("score",) and values == [{"same": "x", "more": None}, {"same": None, "more": 2.0}]
    ignoring = load_rows(str(tmp_path / "a.parquet"), split="train", options=ColumnOptions(ignore=("same", "score")))
    assert offered(ignoring)[0].columns == ()


def test_several_datasets_and_the_fingerprint(tmp_path):
    one = load_rows(str(write(tmp_path / "a.jsonl", [row(0, score=1, source="a"), row(1, score=2, source="a")])), split="train")
    two = load_rows(str(write(tmp_path / "b.jsonl", [row(2, score=0.5, tag=True)])), split="train")
    rows = JoinedRows((one, two))
    found, _ = offered(rows)
    assert found.values(rows, [1, 2], found.columns).to_pylist() == [
        {"score": 2.0, "source": "a", "tag": None},
        {"score": 0.5, "source": None, "tag": True},
    ]
    bare = JoinedRows(
        tuple(
            load_rows(str(write(tmp_path / name, rows)), split="train")
            for name, rows in (("c.jsonl", [row(0), row(1)]), ("d.jsonl", [row(2)]))
        )
    )
    assert check_and_fingerprint(rows) == check_and_fingerprint(bare)


@pytest.fixture(scope="module")
def made(tiny_llama, tmp_path_factory):
    """with: a store of 12 rows and their columns; bare: of the same rows without."""
    folder = tmp_path_factory.mktemp("columns")
    rows = [row(i, dataset_source="even" if i % 2 == 0 else "odd", score=i / 2, tags=[1]) for i in range(12)]
    bare = [row(i) for i in range(12)]
    outputs = {}
    for name, content in (("with", rows), ("bare", bare)):
        words = ["precompute", "--dataset", write(folder / f"{name}.jsonl", content), "--model", tiny_llama, "--max-length", 64]
        words += ["--dtype", "float32", "--shard-size", 5, "--ref-store", folder / name]
        result = CliRunner().invoke(cli.main, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        outputs[name] = result.output
    return folder, outputs


def test_the_numbers_are_the_same_with_them(made):
    folder, outputs = made
    stores = {name: open_store(folder / name, check="sha256") for name in ("with", "bare")}
    assert verify(folder / "with") == [] and stores["with"].identity.differences(stores["bare"].identity) == []
    names = stores["bare"].read([0]).column_names
    assert stores["with"].read(range(12), names).equals(stores["bare"].read(range(12)))
    assert stores["with"].read([0]).column_names == [*names, "dataset_source", "score"]
    assert "kept beside the numbers: dataset_source, score; left out" in outputs["with"] and "other columns" not in outputs["bare"]
    assert b"source_columns" not in (folder / "bare" / "_manifest.json").read_bytes()


def test_sql_selection_export_and_report_see_them(made, tmp_path):
    folder, _ = made
    store = folder / "with"
    assert select(store, "dataset_source = 'odd' and score > 2").train == (5, 7, 9, 11)
    query = "select dataset_source, count(distinct row) from tokens group by all order by all"
    assert connect(store).execute(query).fetchall() == [("even", 6), ("odd", 6)]
    export(store, "jsonl", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == [i / 2 for i in range(12)]
    page = re.sub(r"<[^>]+>", " ", report(store, tmp_path / "page").read_text())
    assert "By dataset_source" in page and re.search(r"even\s+6\s", page) and "dataset_source: odd" in page


def test_ids_and_conditions_from_a_file(made, tmp_path):
    folder, _ = made
    ids = [pair["pair_id"] for pair in open_store(folder / "with").read([3, 8, 4], ["pair_id"]).to_pylist()]
    file = tmp_path / "ids.txt"
    file.write_text("\n".join([*ids, "0" * 32, ids[0]]) + "\n")
    chosen = select(folder / "with", where_file=file)
    assert chosen.train == (3, 4, 8) and "4 pair_ids, 1 of them not in the store" in str(chosen)
    assert select(folder / "with", "score >= 2", where_file=file).train == (4, 8)
    file.write_text("dataset_source = 'even' -- these\n")
    assert select(folder / "with", "row < 4 or row > 9", where_file=file).train == (0, 2, 10)
    for text, message in (("\n", "holds nothing"), ("nothing = 1", "where-file.*ids.txt.*nothing"), ("f" * 32, "no pair is left")):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            select(folder / "with", where_file=file)


A, B = SourceColumn("a", "string"), SourceColumn("b", "double")


@pytest.fixture
def path():
    for folder in memory_folder():
        prepare_store(folder / "s", make_identity(num_rows=8, shard_size=4))
        yield folder / "s"


def with_column(column: SourceColumn, index: int) -> tuple[ShardReport, pa.Table]:
    report, table = make_shard(make_identity(num_rows=8, shard_size=4), index)
    report = ShardReport(**{**vars(report), "source_columns": (column,)})
    return report, table.append_column(column.field, pa.nulls(len(table), column.field.type))


def test_a_store_keeps_what_its_first_worker_found(path):
    assert settle_source_columns(path, (A,)) == (A,)
    assert settle_source_columns(path, (A, B)) == (A,)  # another worker finds more
    with pytest.raises(InputError, match=r"no longer has the column a \(string\)"):
        settle_source_columns(path, (B,))
    publish_shard(path, make_identity(num_rows=8, shard_size=4), *make_shard(make_identity(num_rows=8, shard_size=4), 0), {})
    assert settle_source_columns(path, (A,)) == ()  # begun by an earlier version: its shards have none


def test_shards_of_other_columns_are_neither_written_nor_sealed(path):
    identity = make_identity(num_rows=8, shard_size=4)
    report, table = with_column(A, 0)
    for wrong in (table.drop_columns(["a"]), table.set_column(14, B.field, pa.nulls(4, pa.float64()))):
        with pytest.raises(StoreError, match="column"):
            publish_shard(path, identity, report, wrong, {})
    publish_shard(path, identity, report, table, {})
    assert stored_source_columns(path) == (A,)
    publish_shard(path, identity, *with_column(B, 1), {})
    with pytest.raises(StoreError, match="other columns of the source"):
        seal(path, identity, {}, None)


def test_the_stores_own_names_are_refused():
    for name, kind in (("row", "string"), ("Pair_ID", "string"), ("x", "list")):
        with pytest.raises(ValueError):
            SourceColumn(name, kind)
