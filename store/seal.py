"""Sealing: when every shard is there, write the manifest, once, last."""

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from store import disk, record
from store.errors import InputError, StoreError
from store.folder import missing_shards, stored_command
from store.manifest import (
    MANIFEST,
    Identity,
    Manifest,
    ShardFile,
    ShardReport,
    Totals,
    check_same,
    manifest_path,
    rerun,
    totals_of,
)
from store.schema import SourceColumn
from store.shard import Sidecar, in_stretches, part_name, read_footer


def seal(store: Path, identity: Identity, provenance: dict[str, Any], preset: str | None) -> Manifest:
    """Write `_manifest.json` if all shards are there and return it; if the store is sealed already, return the manifest it has.

    Any number of workers may seal at once: one manifest wins, all return that one. `provenance` is recorded as given (layout,
    …), beside what the shards' own provenance adds up to. StoreError if shards are missing or not of `identity`.
    """
    if not manifest_path(store).exists():
        if missing := missing_shards(store, identity):
            raise unsealed(store, identity, missing)
        try:
            _write_manifest(store, identity, provenance, preset)
        except OSError as error:
            raise disk.refusal(error, store / MANIFEST) from error
    manifest = Manifest.load(manifest_path(store))
    check_same(manifest.identity, identity, manifest_path(store))
    shutil.rmtree(store / disk.STAGING, ignore_errors=True)
    return manifest


def _names(columns: tuple[SourceColumn, ...] | None) -> str:
    return ", ".join(f"{column.name} ({column.type})" for column in columns or ()) or "none"


def unsealed(store: Path, identity: Identity, missing: list[int]) -> StoreError:
    """The error for a store that lacks shards, or only its manifest."""
    if missing:
        indices = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
        reason = f"{len(missing)} of {identity.num_shards} shards missing ({indices})"
    else:
        reason = f"all {identity.num_shards} shards are there, {MANIFEST} is missing"
    return StoreError(f"{store} is not sealed: {reason}", next=f"Re-run: {rerun(identity, store, stored_command(store))}")


def _no_pairs(store: Path, totals: Totals) -> InputError:
    (reason, count), *_ = Counter(re.sub(r"\d+ tokens", "too many tokens", each.reason) for each in totals.unscorable).most_common(
        1
    )
    return InputError(
        f"0 pairs of {len(totals.unscorable):,} rows can be scored",
        where=store,
        found=f"{count:,} times: {reason}",
        next="Nothing was sealed. Choose a longer --max-length or correct the dataset, and another --ref-store.",
    )


def sha256_of(path: Path) -> str:
    """Of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(store: Path, identity: Identity, provenance: dict[str, Any], preset: str | None) -> None:
    paths = [store / part_name(index) for index in range(identity.num_shards)]
    sidecars = _sidecars(store)

    def describe(stretch: Sequence[Path]) -> list:
        return [_describe(path, identity, sidecars.get(path.name, [])) for path in stretch]

    described = list(chain.from_iterable(in_stretches(describe, paths)))
    totals = totals_of([report for report, _, _ in described])
    for path, (report, _, _) in zip(paths, described, strict=True):
        if report.source_columns != totals.source_columns:
            raise StoreError(
                "holds other columns of the source than the first shard",
                where=path,
                expected=_names(totals.source_columns),
                found=_names(report.source_columns),
                next="Delete the file and run precompute again.",
            )
    if not totals.num_pairs:
        raise _no_pairs(store, totals)
    manifest = Manifest(
        **vars(totals),
        identity=identity,
        shards=tuple(file for _, file, _ in described),
        preset=preset,
        provenance={**_added_up([(report, sidecar) for report, _, sidecar in described]), **provenance},
    )
    (store / disk.STAGING).mkdir(exist_ok=True)
    staged = disk.staging_path(store, MANIFEST, "tmp")
    try:
        disk.write_new(staged, manifest.to_bytes())
        disk.publish(staged, store / MANIFEST)
    except FileNotFoundError:
        if not manifest_path(store).exists():  # else another worker sealed, and removed the staging folder under us
            raise


def _describe(path: Path, identity: Identity, notes: list[Path]) -> tuple[ShardReport, ShardFile, Sidecar | None]:
    """A shard as the manifest lists it. The checksum comes from its sidecar, or from the file where that is missing or in doubt."""
    stored, report = read_footer(path)
    check_same(stored, identity, path)
    size = path.stat().st_size
    sidecars = _read_sidecars(notes)
    if len({sidecar.sha256 for sidecar in sidecars}) == 1 and sidecars[0].size == size:
        sha256 = sidecars[0].sha256
    else:
        sha256 = sha256_of(path)
    sidecar = next((each for each in sidecars if each.sha256 == sha256), None)
    return report, ShardFile(path.name, size, sha256, report.num_pairs, report.first_row, report.num_rows), sidecar


def _sidecars(store: Path) -> dict[str, list[Path]]:
    """The sidecars of each shard, by its name; the folder is listed once for all."""
    found: dict[str, list[Path]] = {}
    try:
        notes = sorted((store / disk.STAGING).glob("part-*.parquet.*.json"))
    except FileNotFoundError:  # another worker sealed, and is removing the folder under us
        notes = []
    for note in notes:
        found.setdefault(note.name.partition(".parquet")[0] + ".parquet", []).append(note)
    return found


def _read_sidecars(notes: list[Path]) -> list[Sidecar]:
    found = []
    for note in notes:
        try:
            found.append(record.build(Sidecar, record.parse(note.read_bytes(), note), note))
        except (FileNotFoundError, StoreError):  # dropped by its writer just now, or cut short: the file itself is the authority
            continue
    return found


def _added_up(shards: list[tuple[ShardReport, Sidecar | None]]) -> dict[str, Any]:
    """What the shards' provenance says as a whole. Shards whose sidecar was lost are counted, not guessed."""
    known = [(report, sidecar.provenance) for report, sidecar in shards if sidecar is not None]
    timed = [(report, each["seconds"]) for report, each in known if "seconds" in each]
    seconds = sum(each for _, each in timed)
    total: dict[str, Any] = {"shards_without_provenance": len(shards) - len(known), "seconds": seconds}
    total["waited"] = sum(each.get("waited", 0.0) for _, each in known)
    total["tokens_per_second"] = sum(report.model_tokens for report, _ in timed) / seconds if seconds > 0 else None
    for name in ("worker", "host", "device", "tokens_per_batch", "attention_kernel"):
        total[f"shards_by_{name}"] = dict(Counter(str(each[name]) for _, each in known if name in each))
    reused: Counter[str] = Counter()
    for _, each in known:
        reused.update(each.get("reused", {}))
    if reused:
        total["reused"] = dict(reused)
    versions = {record.canonical(each["versions"]): each["versions"] for _, each in known if "versions" in each}
    total["versions"] = [versions[key] for key in sorted(versions)]
    total["started"] = min((each["started"] for _, each in known if "started" in each), default=None)
    total["finished"] = max((each["finished"] for _, each in known if "finished" in each), default=None)
    return total
