"""Verify a sealed store from first principles: every byte, every row, every value.

`open_store` asks whether the files are those the manifest lists. This asks whether what they hold can be true at all.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pyarrow.parquet as pq

from store.check import problems
from store.errors import StoreError
from store.integrity import damage
from store.manifest import Manifest, ShardReport, Totals, manifest_path, totals_of
from store.reader import load_manifest
from store.shard import part_name, read_footer

THREADS = 4
"""Shards held in memory at once."""


def verify(path: Path, progress: Callable[[int, int], None] | None = None) -> list[StoreError]:
    """Everything found wrong with the sealed store at `path`; empty when it is intact. `progress(done, total)` counts shards.

    Checked: the manifest's own checksum; that the folder holds exactly its shards; their sha256; footers against the manifest; that
    every source row is a pair or listed unscorable, exactly once; finite values; counts against ids; sums against token log-probs;
    totals against the shards. InputError for a path that is no store, StoreError for one that is unsealed or has a broken manifest.
    """
    path = Path(path)
    manifest = load_manifest(path)
    found = _plan(path, manifest) + damage(path, manifest, "sha256")
    damaged = {error.where for error in found}
    intact = [path / shard.name for shard in manifest.shards if path / shard.name not in damaged]
    reports: list[ShardReport] = []
    with ThreadPoolExecutor(THREADS) as threads:
        for done, (report, errors) in enumerate(threads.map(lambda file: _shard(file, manifest), intact), start=1):
            reports.append(report)
            found += errors
            if progress is not None:
                progress(done, len(intact))
    others = {report.source_columns for report in reports} - {manifest.source_columns}
    if others:
        found.append(StoreError("the shards keep different columns of the source", where=path))
    if len(reports) == len(manifest.shards):  # else the sums cannot agree, and the reason is listed already
        found += _totals(path, manifest, totals_of(reports))
    return found


def _plan(path: Path, manifest: Manifest) -> list[StoreError]:
    """The shards listed are the blocks that the identity asks for, so that every source row belongs to exactly one."""
    identity = manifest.identity
    expected = [(part_name(i), identity.rows_of(i).start, len(identity.rows_of(i))) for i in range(identity.num_shards)]
    listed = [(shard.name, shard.first_row, shard.num_rows) for shard in manifest.shards]
    if listed == expected:
        return []
    first = next((i for i, (a, b) in enumerate(zip(expected, listed, strict=False)) if a != b), min(len(expected), len(listed)))
    return [
        StoreError(
            f"the shards listed do not cover the dataset's rows exactly once, from number {first} on",
            where=manifest_path(path),
            expected=expected[first] if first < len(expected) else "no more shards",
            found=listed[first] if first < len(listed) else "no more shards",
        )
    ]


def _shard(file: Path, manifest: Manifest) -> tuple[ShardReport, list[StoreError]]:
    """Read one shard whole and check what it holds."""
    _, report = read_footer(file)
    table = pq.ParquetFile(file).read(use_threads=False).replace_schema_metadata()
    errors = [StoreError(problem, where=file) for problem in problems(table, manifest.identity, report)]
    return report, errors


def _totals(path: Path, manifest: Manifest, totals: Totals) -> list[StoreError]:
    """What the manifest says of all shards together is what their footers add up to."""
    both = [(field.name, getattr(totals, field.name), getattr(manifest, field.name)) for field in fields(Totals)]
    return [
        StoreError(f"{name} is not what the shards add up to", where=manifest_path(path), expected=summed, found=stated)
        for name, summed, stated in both
        if summed != stated
    ]
