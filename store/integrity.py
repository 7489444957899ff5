"""Does a sealed store still hold what its manifest lists? Three depths, each including the one before."""

import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

from store.errors import StoreError
from store.manifest import Manifest, check_same, manifest_path, rerun
from store.seal import sha256_of
from store.shard import in_stretches, read_footer

Check = Literal["none", "footers", "sha256"]
"""How closely to look: file names and sizes only; the footers too; every byte."""


def damage(store: Path, manifest: Manifest, check: Check) -> list[StoreError]:
    """Everything found wrong with the files of a sealed store, in the order of shards; empty when it is intact. `check` as in
    `open_store`; ValueError for another word."""
    if check not in ("none", "footers", "sha256"):
        raise ValueError(f"check must be none, footers or sha256, is {check!r}")
    found = _listing(store, manifest)

    def footers(shards: Sequence[int]) -> list[StoreError]:
        return [error for index in shards if (error := _footer(store, manifest, index)) is not None]

    def not_yet_bad() -> list[int]:
        bad = {error.where for error in found}
        return [index for index, shard in enumerate(manifest.shards) if store / shard.name not in bad]

    if check != "none":
        found += chain.from_iterable(in_stretches(footers, not_yet_bad()))
    if check == "sha256":
        with ThreadPoolExecutor() as threads:  # hashlib releases the interpreter: one file per core at a time
            found += filter(None, threads.map(partial(_sha256, store, manifest), not_yet_bad()))
    return sorted(found, key=lambda error: str(error.where))


def _listing(store: Path, manifest: Manifest) -> list[StoreError]:
    """The folder has exactly the listed shards, of the listed sizes. One directory listing; nothing is opened."""
    sizes = {path.name: path.stat().st_size for path in store.glob("*.parquet") if path.exists()}
    found = []
    for shard in manifest.shards:
        size = sizes.pop(shard.name, None)
        if size is None:
            found.append(StoreError("shard is missing", where=store / shard.name, next=advice(store, manifest, shard.name)))
        elif size != shard.size:
            expected, is_now = f"{shard.size:,} bytes", f"{size:,} bytes"
            found.append(
                StoreError(
                    "altered shard",
                    where=store / shard.name,
                    expected=expected,
                    found=is_now,
                    next=advice(store, manifest, shard.name),
                )
            )
    extra = "extra shard: the manifest does not list it, yet every reader of *.parquet would see it"
    found += [StoreError(extra, where=store / name, next="Move it elsewhere.") for name in sizes]
    return found


def _footer(store: Path, manifest: Manifest, index: int) -> StoreError | None:
    shard = manifest.shards[index]
    path = store / shard.name
    try:
        identity, report = read_footer(path)
        check_same(identity, manifest.identity, path)
    except StoreError as error:
        return error
    listed = (index, shard.num_pairs, shard.first_row, shard.num_rows)
    says = (report.index, report.num_pairs, report.first_row, report.num_rows)
    if listed == says:
        return None
    what = "footer and manifest disagree on (index, pairs, first row, rows)"
    return StoreError(what, where=path, expected=listed, found=says, next=advice(store, manifest, shard.name))


def _sha256(store: Path, manifest: Manifest, index: int) -> StoreError | None:
    shard = manifest.shards[index]
    path = store / shard.name
    try:
        found = sha256_of(path)
    except OSError as error:
        return StoreError("cannot be read", where=path, found=error.strerror, next=advice(store, manifest, shard.name))
    if found == shard.sha256:
        return None
    expected = f"sha256 {shard.sha256[:12]}…"
    return StoreError(
        "altered shard", where=path, expected=expected, found=f"{found[:12]}…", next=advice(store, manifest, shard.name)
    )


def advice(store: Path, manifest: Manifest, *damaged: str) -> str:
    """What to do about damaged shards of a sealed store: the files are in their old state again, or are made again."""
    files = shlex.join(str(each) for each in (*(store / name for name in damaged), manifest_path(store)))
    again = rerun(manifest.identity, store, manifest.command)
    return f"Restore the file, or delete it and {manifest_path(store)} and score what is missing: rm -f {files} && {again}"
