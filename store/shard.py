"""One shard: a Parquet file that is complete under its final name and says in its footer what it is.

    publish_shard(store/think, identity, report, table)
      1. check every value            nothing is written otherwise
      2. .staging/part-00007.parquet.host.4711.1f2e3d4c.tmp     whole file, fsync
      3. .staging/part-00007.parquet.host.4711.5a6b7c8d.json    its size, sha256 and provenance: sealing need not read it again
      4. part-00007.parquet           linked to its final name, unless another worker was first

A kill on the way leaves nothing under a final name.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from store import disk, record
from store.check import problems
from store.errors import StoreError
from store.manifest import Identity, ShardReport, check_same
from store.schema import FORMAT_VERSION, schema_of

STRETCH = 16
"""Shards that one thread opens before it hands over what it found: one at a time, handing over took as long as opening."""

THREADS = 2
"""That open shards side by side. Opening one is mostly Python, which runs one thread at a time: six on two cores took 1.2 to 1.3 times as long as
two (docs/notebook/memory.md). Two hide some of a network file system's latency."""

ROW_GROUP_PAIRS, ROW_GROUP_TOKENS = 64, 1 << 18
"""A row group, the unit that random access decodes, is 64 pairs, or as many as have so many tokens: short pairs in small groups would make
a store whose footers are larger and slower to read than its values."""

IDENTITY_KEY, REPORT_KEY, FORMAT_KEY = b"refdpo.identity", b"refdpo.shard", b"refdpo.format_version"


@dataclass(frozen=True)
class Sidecar:
    """`.staging/part-00007.parquet.*.json`: what is known of a shard's file without reading it."""

    size: int
    sha256: str
    provenance: dict[str, Any]


def in_stretches(work: Callable[[Sequence], Any], shards: Sequence) -> list:
    """What `work` returns for each stretch of `shards`, in order; for reading footers and a few columns of all shards."""
    stretches = [shards[first : first + STRETCH] for first in range(0, len(shards), STRETCH)]
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(work, stretches))


def part_name(index: int) -> str:
    """The name under which shard `index` is complete."""
    return f"part-{index:05d}.parquet"


def parts_in(store: Path) -> list[Path]:
    """The shard files present, in order."""
    return sorted(store.glob("part-*.parquet"), key=lambda path: (len(path.name), path.name))


def render_shard(identity: Identity, report: ShardReport, table: pa.Table) -> bytes:
    """The bytes of a shard. They depend on the arguments and the version of pyarrow alone: no times, no hosts, fixed options."""
    metadata = {
        IDENTITY_KEY: record.canonical(identity),
        REPORT_KEY: record.canonical(report),
        FORMAT_KEY: str(FORMAT_VERSION).encode(),
    }
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata(metadata).combine_chunks(),
        sink,
        row_group_size=_row_group_size(report),
        compression="zstd",
        compression_level=3,
        version="2.6",
        data_page_version="1.0",
        write_statistics=True,
        use_dictionary=False,  # measured: plain values under zstd are a third smaller and twice as fast here
    )
    return sink.getvalue().to_pybytes()


def _row_group_size(report: ShardReport) -> int:
    tokens = report.num_prompt_tokens + report.num_completion_tokens
    return max(ROW_GROUP_PAIRS, ROW_GROUP_TOKENS * report.num_pairs // max(1, tokens))


def publish_shard(store: Path, identity: Identity, report: ShardReport, table: pa.Table, provenance: dict[str, Any]) -> bool:
    """Check `table` (schema_of) and put it in `store` under its final name; False if that shard was there already.

    Nothing is written unless every value passes `check.problems`. `provenance` (JSON) is free; sealing adds up "seconds" and "waited" and lists
    the distinct "worker", "host", "device" and "versions". Errors: StoreError, also for a full disk or a read-only folder.
    """
    name = part_name(report.index)
    if found := problems(table, identity, report):
        raise StoreError(
            f"refused to write a wrong shard: {'; '.join(found)}",
            where=store / name,
            next="Nothing was written. Non-finite values usually mean a broken checkpoint or a dtype the model overflows in."
            if any("nan" in each or "inf" in each for each in found)
            else "Nothing was written.",
        )
    data = render_shard(identity, report, table)
    sidecar = record.canonical(Sidecar(len(data), hashlib.sha256(data).hexdigest(), provenance))
    staged, note = disk.staging_path(store, name, "tmp"), disk.staging_path(store, name, "json")
    published = False
    try:
        staged.parent.mkdir(exist_ok=True)
        disk.write_new(staged, data)
        disk.write_new(note, sidecar)  # before the final name exists, so that a sealer never finds the shard without it
        published = disk.publish(staged, store / name)
    except OSError as error:
        if not (isinstance(error, FileNotFoundError) and (store / name).exists()):
            raise disk.refusal(error, store / name) from error
        # else another worker published it and sealed the store, which removes the staging folder
    finally:
        disk.drop(staged)
        if not published:
            disk.drop(note)
    return published


def read_footer(path: Path) -> tuple[Identity, ShardReport]:
    """What a shard file says it is. StoreError if it is no complete shard of ours."""
    try:
        if path.exists() and not path.is_file():
            raise StoreError("not a file", where=path, next="Move it elsewhere.")  # a pipe would be read without end
        with pq.ParquetFile(path, pre_buffer=False) as file:
            # Not `footer.schema`: it and the footer hold each other, and 100 kB stay until the garbage collector comes round to them.
            footer, schema = file.metadata, file.schema_arrow
    except (OSError, ValueError, pa.ArrowException) as error:  # a footer cut to pieces is also a UnicodeDecodeError
        if isinstance(error, FileNotFoundError):
            raise StoreError("shard is missing", where=path) from error
        reason = str(error).splitlines()[0][:160]
        raise StoreError("not a readable Parquet file", where=path, found=reason, next=_DAMAGED) from error
    metadata = footer.metadata or {}
    missing = [key.decode() for key in (FORMAT_KEY, IDENTITY_KEY, REPORT_KEY) if key not in metadata]
    if missing:
        keys = f"footer keys {', '.join(missing)}"
        raise StoreError("not a shard of refdpo", where=path, expected=keys, next="Move it elsewhere.")
    if metadata[FORMAT_KEY] != str(FORMAT_VERSION).encode():
        version = metadata[FORMAT_KEY].decode(errors="replace")
        raise StoreError("shard of another format", where=path, expected=f"format_version {FORMAT_VERSION}", found=version)
    identity = Identity.from_json(record.parse(metadata[IDENTITY_KEY], path), path)
    report = record.build(ShardReport, record.parse(metadata[REPORT_KEY], path), path)
    if (
        not schema.equals(schema_of(identity, report.source_columns))
        or footer.num_rows != report.num_pairs
        or path.name != part_name(report.index)
    ):
        raise StoreError(
            "footer and file disagree",
            where=path,
            expected=f"{part_name(report.index)} with {report.num_pairs} pairs and the columns of store/schema.py",
            found=f"{footer.num_rows} rows of {len(schema)} columns",
            next=_DAMAGED,
        )
    return identity, report


def finished_shards(store: Path, identity: Identity) -> set[int]:
    """Indices of the shards present. StoreError if one is damaged, of another identity, or not one of this store's."""
    finished = set()
    for path in parts_in(store):
        stored, report = read_footer(path)
        check_same(stored, identity, path)
        if report.index >= identity.num_shards:
            expected = f"{identity.num_shards} shards"
            raise StoreError("a shard beyond the dataset's last", where=path, expected=expected, next="Move it elsewhere.")
        finished.add(report.index)
    return finished


_DAMAGED = "Delete the file (and the manifest, if there is one) and run precompute again: only this shard is scored again."
