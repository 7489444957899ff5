"""Several datasets in one store: a column that says which, one identity, and stores of one dataset as they ever were."""

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import tiny
from click.testing import CliRunner
from store_samples import make_identity, make_store

import cli
from precompute.pairs import tokenize_rows
from precompute.rows.dataset import JoinedRows, check_and_fingerprint, load_rows
from store import record
from store.errors import InputError, StoreError
from store.manifest import DatasetPart, Identity, Manifest, manifest_path
from store.reader import open_store
from store.select import select
from store.sql import connect
from store.verify import verify


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Five conversations, and three plain texts in another layout."""
    folder = tmp_path_factory.mktemp("several")
    turns = [
        {
            side: [{"role": "user", "content": f"Why {i}?"}, {"role": "assistant", "content": side}]
            for side in ("chosen", "rejected")
        }
        for i in range(5)
    ]
    texts = [{"prompt": f"How {i}? ", "chosen": "so", "rejected": "not so"} for i in range(3)]
    for name, rows in (("turns", turns), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder / "turns.jsonl"), str(folder / "texts.jsonl")]


def run(*argv, code: int = 0) -> str:
    result = CliRunner().invoke(cli.main, [str(word) for word in argv], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def test_rows_of_all_are_tokenized_as_alone(files):
    parts = [load_rows(file, split="train") for file in files]
    both = JoinedRows(tuple(parts))
    assert both.to_list() == [row for part in parts for row in part.to_list()]
    assert both.select([6, 0, 4]).to_list() == [both.to_list()[i] for i in (6, 0, 4)]
    tokenizer = tiny.make_tokenizer()
    alone = [pair for part in parts for pair in tokenize_rows(tokenizer, part.to_list(), 0, 64).pairs]
    together = tokenize_rows(tokenizer, both.to_list(), 0, 64).pairs
    assert [pair.prompt_ids.tolist() for pair in together] == [pair.prompt_ids.tolist() for pair in alone]
    assert len({check_and_fingerprint(each) for each in (both, JoinedRows(both.parts[::-1]), *parts)}) == 4


def test_a_store_of_two_says_which(files, tiny_llama, tmp_path):
    store = tmp_path / "store"
    options = [
        "--model",
        tiny_llama,
        "--max-length",
        "64",
        "--dtype",
        "float32",
        "--shard-size",
        "2",
        "--quiet",
        "--ref-store",
        store,
    ]
    datasets = [word for file in files for word in ("--dataset", file)]
    assert "8 pairs of 8 rows in 4 shards" in run("precompute", *datasets, *options)
    assert verify(store) == []
    assert pq.read_table(store)["dataset"].to_pylist() == [files[0]] * 5 + [files[1]] * 3
    identity = open_store(store, check="sha256").identity
    assert identity.datasets == tuple(map(DatasetPart, files, (5, 3))) and identity.dataset_of(4) == files[0]
    answer = run(
        "inspect", "--ref-store", store, "--format", "json", "--sql", "select dataset, count(*) n from pairs group by 1 order by n"
    )
    assert [row["n"] for row in json.loads(answer)] == [3, 5]
    for view, n in (("completions", 2), ("tokens", "sum(num_chosen_tokens + num_rejected_tokens)")):
        counts = f"select dataset, count(*) as n from {view} group by all order by all"
        expected = f"select dataset, {n} * count(*)" if n == 2 else f"select dataset, {n}"
        assert (
            connect(store).sql(counts).fetchall()
            == connect(store).sql(f"{expected} from pairs group by all order by all").fetchall()
        )
    assert len(select(store, where=f"dataset = '{files[1]}'").train) == 3
    run("export", "--ref-store", store, "--format", "jsonl", "--output", tmp_path / "out", "--quiet")
    assert json.loads((tmp_path / "out" / "pairs.jsonl").read_text().splitlines()[-1])["dataset"] == files[1]
    run("precompute", *datasets, *options)  # goes on
    manifest_path(store).unlink()
    (store / "part-00003.parquet").unlink()
    assert "8 pairs" in run("precompute", *datasets, *options)
    for other in (files[::-1], files[:1]):
        assert "made with another" in run("precompute", *[w for file in other for w in ("--dataset", file)], *options, code=1)
    assert "given twice" in run("precompute", "--dataset", files[0], *datasets, *options, code=2)


def test_a_bad_row_is_named_with_its_dataset(files, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"chosen": "a", "rejected": "b"}\n{"chosen": null, "rejected": "b"}\n')
    with pytest.raises(InputError, match="--dataset number 2, row 1: `chosen` is null"):
        check_and_fingerprint(JoinedRows((load_rows(files[0], split="train"), load_rows(str(bad), split="train"))))


def test_identities_with_and_without_parts():
    plain = make_identity()
    assert b"datasets" not in record.canonical(plain)
    several = replace(plain, datasets=(DatasetPart("a", 6), DatasetPart("b", 4)))
    assert Identity.from_json(json.loads(record.canonical(several)), "x") == several
    assert [several.dataset_of(row) for row in (0, 5, 6, 9)] == ["a", "a", "b", "b"]
    with pytest.raises(StoreError, match="datasets have 11 rows, not 10"):
        Identity.from_json({**plain.to_json(), "datasets": [{"dataset": "a", "num_rows": 11}]}, "x")


def test_a_shard_without_the_column_is_refused(tmp_path):
    identity = make_identity(datasets=(DatasetPart("a", 6), DatasetPart("b", 4)))
    with pytest.raises(StoreError, match="column dataset is missing"):
        make_store(tmp_path / "s", identity)
    make_store(tmp_path / "t")
    assert Manifest.load(manifest_path(tmp_path / "t")).identity.datasets is None
