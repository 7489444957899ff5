"""Loading and checking datasets, and their fingerprint."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from precompute.rows.dataset import check_and_fingerprint, load_rows
from store.errors import InputError

ROWS = [
    {
        "chosen": [{"role": "user", "content": f"Frage {i}\u2028"}, {"role": "assistant", "content": "ja" * (i % 7)}],
        "rejected": [
            {"role": "user", "content": f"Frage {i}\u2028"},
            {"role": "assistant", "content": None if i % 5 == 4 else "nein"},
        ],
        "source": "x",
    }
    for i in range(23)
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def fingerprint(source, **options):
    return check_and_fingerprint(load_rows(str(source), **{"split": "train"} | options))


def test_every_format_gives_the_same_rows_and_fingerprint(tmp_path):
    jsonl = write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "pairs.parquet", row_group_size=5)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "dict")
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "a.jsonl", ROWS[:9])
    write_jsonl(tmp_path / "folder" / "b.jsonl", ROWS[9:])
    sources = [jsonl, tmp_path / "pairs.parquet", tmp_path / "saved", tmp_path / "dict", tmp_path / "folder"]
    assert len({fingerprint(source) for source in sources}) == 1
    assert all(
        load_rows(str(source), split="train").to_list() == load_rows(str(jsonl), split="train").to_list() for source in sources
    )


def test_the_fingerprint_sees_every_change_of_content(tmp_path, monkeypatch):
    def of(rows):
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        return fingerprint(path)

    edited = json.loads(json.dumps(ROWS))
    edited[7]["rejected"][1]["content"] += "!"
    moved = json.loads(json.dumps(ROWS))  # the same characters, cut elsewhere
    moved[1]["chosen"][0]["content"], moved[1]["chosen"][1]["content"] = "Frage 1\u2028j", "a"
    nulled = json.loads(json.dumps(ROWS))
    nulled[0]["chosen"][1]["content"] = None
    variants = [ROWS, edited, moved, nulled, [ROWS[1], ROWS[0], *ROWS[2:]], [*ROWS, ROWS[0]], ROWS[:-1]]
    assert len({of(rows) for rows in variants}) == len(variants)
    assert of([row | {"source": "y"} for row in ROWS]) == of(ROWS)  # not scored, not counted
    before = of(ROWS)
    monkeypatch.setattr("precompute.rows.dataset.ROWS_AT_A_TIME", 3)
    assert of(ROWS) == before


def test_limit_takes_the_first_rows(tmp_path):
    jsonl = write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    assert load_rows(str(jsonl), split="train", limit=5).to_list() == load_rows(str(jsonl), split="train").to_list()[:5]
    assert fingerprint(jsonl, limit=5) == fingerprint(write_jsonl(tmp_path / "five.jsonl", ROWS[:5]))


TURN = {"role": "user", "content": "a"}
BAD_ROWS = {
    "null": ([{"chosen": [TURN], "rejected": [TURN]}, {"chosen": None, "rejected": [TURN]}], "row 1: `chosen` is null"),
    "empty": ([{"chosen": [TURN], "rejected": [TURN]}, {"chosen": [TURN], "rejected": []}], "row 1: `rejected` is an empty list"),
    "role": (
        [{"chosen": [TURN], "rejected": [TURN, TURN | {"role": "robot"}]}],
        "row 0, rejected: a turn has an unknown role.*'robot'",
    ),
    "no role": ([{"chosen": [{"from": "user"}], "rejected": [{"from": "user"}]}], "turns have no role"),
    "not a list": ([{"chosen": {"role": "user"}, "rejected": {"role": "user"}}], "column chosen: not a preference column"),
    "kinds": ([{"chosen": "a", "rejected": [TURN]}], "chosen and rejected differ in kind"),
    "prompt kind": ([{"prompt": [TURN], "chosen": "a", "rejected": "b"}], "prompt and completions differ in kind"),
    "columns": ([{"good": "a", "bad": "b"}], "no column chosen and rejected.*found good, bad"),
    "no rows": ([], "no rows|cannot be read"),
}


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_malformed_datasets_are_refused_before_anything_is_scored(tmp_path, rows, message):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(InputError, match=message):
        fingerprint(path)


def test_unreadable_sources_are_refused(tmp_path):
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"chosen": "ä", "rejected": "b"}\n'.encode("latin-1"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    for source in (latin, tmp_path / "empty", tmp_path / "notes.txt", tmp_path / "nowhere.jsonl"):
        with pytest.raises(InputError, match=str(source)):
            fingerprint(source)
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "dict")
    with pytest.raises(InputError, match="no such split.*--split test"):
        fingerprint(tmp_path / "dict")


def write_text_rows(path, count):
    texts = {side: [f"{side} {row} " + "word " * 20 for row in range(count)] for side in ("prompt", "chosen", "rejected")}
    pq.write_table(pa.table(texts), path, row_group_size=10_000)
    return path


def anonymous_mb_after(sources: list[Path], cache: Path) -> list[float]:
    """What the process owns after loading and fingerprinting each of the files, one after another."""
    datasets.config.HF_DATASETS_CACHE = cache
    found = []
    for source in sources:
        fingerprint(source)
        status = Path("/proc/self/status").read_text()
        found.append(int(status.split("RssAnon:")[1].split()[0]) / 1000)
    return found


def test_a_large_dataset_leaves_no_more_memory_taken_than_a_small_one(tmp_path):
    """Arrow keeps what converting a file took, tens of MB, unless told to give it back: the model's loading would come on top."""
    sources = [write_text_rows(tmp_path / f"{count}.parquet", count) for count in (100, 100_000)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        small, large = fresh.submit(anonymous_mb_after, sources, tmp_path / "cache").result()
    assert large - small < 30
