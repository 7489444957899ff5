"""verify finds what checksums cannot: a store whose files are as sealed, yet cannot be true."""

import dataclasses
import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_samples import make_identity, make_store, memory_folder

from store.errors import StoreError
from store.manifest import MANIFEST, Manifest, ShardReport
from store.reader import open_store
from store.schema import SCHEMA
from store.shard import part_name, read_footer, render_shard
from store.verify import verify


@pytest.fixture
def path():
    for folder in memory_folder():
        make_store(folder, unscorable=(5,))
        yield folder


def forge(path: Path, index: int, report: ShardReport | None = None, table: pa.Table | None = None, **changes) -> None:
    """Replace a shard and reseal around it, as a bug in the writer would have: every checksum fits."""
    shard = path / part_name(index)
    identity, old = read_footer(shard)
    table = pq.ParquetFile(shard).read().replace_schema_metadata() if table is None else table
    data = render_shard(identity, report or old, table)
    shard.write_bytes(data)
    manifest = Manifest.load(path / MANIFEST)
    shards = list(manifest.shards)
    sha256 = hashlib.sha256(data).hexdigest()
    shards[index] = dataclasses.replace(shards[index], size=len(data), sha256=sha256, num_pairs=table.num_rows)
    (path / MANIFEST).write_bytes(dataclasses.replace(manifest, shards=tuple(shards), **changes).to_bytes())


def shifted(table: pa.Table, name: str, by: float) -> pa.Table:
    values = [value + by for value in table[name].to_pylist()]
    return table.set_column(table.column_names.index(name), SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type))


def test_an_intact_store_has_no_findings(path):
    seen = []
    assert verify(path, progress=lambda done, total: seen.append((done, total))) == []
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("name", "by", "message"), [
    ("ref_chosen_logps", 0.5, "its tokens sum to"),
    ("ref_rejected_logps", float("nan"), "column ref_rejected_logps: nan"),
    ("num_chosen_tokens", 1, "num_chosen_tokens is"),
    ("row", 1, "neither scored nor listed as unscorable"),
])  # fmt: skip
def test_values_that_cannot_be_true(path, name, by, message):
    table = pq.ParquetFile(path / part_name(2)).read().replace_schema_metadata()
    forge(path, 2, table=shifted(table, name, by))
    open_store(path, check="sha256")  # nothing wrong with the bytes
    found = verify(path)
    assert found and all(finding.where == path / part_name(2) for finding in found)
    assert any(message in str(finding) for finding in found)


def test_a_row_that_is_neither_scored_nor_listed(path):
    report = dataclasses.replace(read_footer(path / part_name(1))[1], unscorable=())
    forge(path, 1, report=report, unscorable=())
    assert ["rows 5: neither scored nor listed as unscorable" in str(finding) for finding in verify(path)] == [True]


def test_a_pair_dropped_everywhere(path):
    table = pq.ParquetFile(path / part_name(0)).read().replace_schema_metadata()[:3]
    report = dataclasses.replace(read_footer(path / part_name(0))[1], num_pairs=3)
    forge(path, 0, report=report, table=table, num_pairs=8)
    assert ["rows 3: neither scored" in str(finding) for finding in verify(path)] == [True]


@pytest.mark.parametrize("change", [{"num_pairs": 12}, {"counts": {"identical": 3}}, {"unscorable": ()}, {"model_tokens": 1}])
def test_totals_that_do_not_add_up(path, change):
    forge(path, 0, **change)
    (found,) = verify(path)
    assert f"{MANIFEST}: {next(iter(change))} is not what the shards add up to" in str(found)


def test_a_dataset_not_covered_by_the_shards_listed(path):
    manifest = Manifest.load(path / MANIFEST)
    shorter = dataclasses.replace(manifest, shards=manifest.shards[:2])
    (path / MANIFEST).write_bytes(shorter.to_bytes())
    (path / part_name(2)).unlink()
    assert "do not cover the dataset's rows exactly once, from number 2 on" in str(verify(path)[0])


def test_footers_of_another_identity(path):
    manifest = Manifest.load(path / MANIFEST)
    other = dataclasses.replace(manifest, identity=dataclasses.replace(manifest.identity, weights_sha256="0" * 64))
    (path / MANIFEST).write_bytes(other.to_bytes())
    assert len(verify(path)) == 3 and all("another model (its weights differ)" in str(finding) for finding in verify(path))
    with pytest.raises(StoreError, match="3 files are not as sealed: part-00000.parquet .made with another model"):
        open_store(path)
    assert make_identity() != other.identity
