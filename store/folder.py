"""Is this folder a store, may it become one, or is it something else? Asked before anything is written or read."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from store import disk, record
from store.command import Command, cli
from store.errors import InputError, StoreError
from store.manifest import MANIFEST, Identity, Manifest, check_same, manifest_path
from store.schema import SourceColumn
from store.shard import part_name, parts_in, read_footer

IDENTITY_NOTE = "identity.json"
"""In the staging folder of an unsealed store: what its shards will say in their footers."""

COMMAND_NOTE = "command.json"
"""Beside it: the command that last went on with the store. A sealed store has it in its manifest's provenance."""


SOURCE_COLUMNS_NOTE = "source_columns.json"
"""And the dataset's own columns that its shards keep."""


def prepare_store(store: Path, identity: Identity, command: Command | None = None) -> None:
    """Make `store` a place where shards of `identity` may be published: create it, or check that it is a store of this identity.

    `command` is noted, to be printed by whoever finds the store unfinished. Any number of workers may call this at once. InputError for a
    path that is no store and not empty (nothing is touched); StoreError for a store of another identity or a folder that cannot be written.
    """
    refuse_non_store(store, for_writing=True)
    if store.exists() and (stored := stored_identity(store)) is not None:
        check_same(stored, identity, store, stored_command(store), command)
        if manifest_path(store).exists() and not missing_shards(store, identity):
            return  # complete: nothing will be written, so nothing need be writable
    note = store / disk.STAGING / IDENTITY_NOTE
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        if not note.exists():
            staged = disk.staging_path(store, IDENTITY_NOTE, "tmp")
            disk.write_new(staged, record.canonical(identity) + b"\n")
            disk.publish(staged, note)  # another worker may have been first: what it wrote is compared next
        check_same(identity_of(store), identity, store, stored_command(store), command)
        if command is not None:
            staged = disk.staging_path(store, COMMAND_NOTE, "tmp")
            disk.write_new(staged, record.canonical(command) + b"\n")
            os.replace(staged, note.with_name(COMMAND_NOTE))
    except OSError as error:
        if not manifest_path(store).exists():  # else another worker sealed, and removed the staging folder under us
            raise disk.refusal(error, store) from error
        check_same(identity_of(store), identity, store, stored_command(store), command)


def stored_identity(store: Path) -> Identity | None:
    """The identity of a store, sealed or not; None if the folder holds nothing yet. StoreError where its record is damaged."""
    if manifest_path(store).exists():
        return Manifest.load(manifest_path(store)).identity
    note = store / disk.STAGING / IDENTITY_NOTE
    if note.exists():
        try:
            return Identity.from_json(record.parse(record.read(note), note), note)
        except StoreError:
            if not manifest_path(store).exists():
                raise
            return Manifest.load(manifest_path(store)).identity  # sealed this moment, and the note removed under us
    parts = parts_in(store)
    return read_footer(parts[0])[0] if parts else None


def identity_of(store: Path) -> Identity:
    """The same of a folder that is a store: InputError where it holds nothing."""
    if (identity := stored_identity(store)) is None:
        raise InputError("holds no store yet", where=store, next="Run precompute first.")
    return identity


def stored_source_columns(store: Path) -> tuple[SourceColumn, ...]:
    """The columns of the source that a store keeps, sealed or not; none in a store of an earlier version."""
    if manifest_path(store).exists():
        return Manifest.load(manifest_path(store)).source_columns or ()
    if parts := parts_in(store):
        return read_footer(parts[0])[1].source_columns or ()
    note = store / disk.STAGING / SOURCE_COLUMNS_NOTE
    return record.build(_Noted, record.parse(record.read(note), note), note).columns if note.exists() else ()


def settle_source_columns(store: Path, offered: tuple[SourceColumn, ...]) -> tuple[SourceColumn, ...]:
    """Which columns of the source every shard of the unsealed store at `store` keeps: those that its first worker found. InputError if one of
    them is not in `offered` any more, for the shards of a store have the same columns."""
    note = store / disk.STAGING / SOURCE_COLUMNS_NOTE
    try:
        if not parts_in(store) and not note.exists():
            staged = disk.staging_path(store, SOURCE_COLUMNS_NOTE, "tmp")
            disk.write_new(staged, record.canonical(_Noted(offered)) + b"\n")
            disk.publish(staged, note)  # the first worker's stays
    except OSError as error:
        if not manifest_path(store).exists():
            raise disk.refusal(error, store) from error
    settled = stored_source_columns(store)
    if gone := [column for column in settled if column not in offered]:
        raise InputError(
            f"the dataset no longer has the column {', '.join(f'{each.name} ({each.type})' for each in gone)}, which the store keeps",
            where=store,
            found=", ".join(f"{each.name} ({each.type})" for each in offered) or "no such column",
            next="Put it back, or choose another --ref-store and add --reuse with this store.",
        )
    return settled


@dataclass(frozen=True)
class _Noted:
    """What the note of an unsealed store holds."""

    columns: tuple[SourceColumn, ...]


def stored_command(store: Path) -> Command | None:
    """The command that makes a store, sealed or not; None where nobody noted it. StoreError for a broken manifest."""
    if manifest_path(store).exists():
        return Manifest.load(manifest_path(store)).command
    note = store / disk.STAGING / COMMAND_NOTE
    try:
        return record.build(Command, record.parse(note.read_bytes(), note), note)
    except (OSError, StoreError):  # a note for people; what counts is the identity
        return None


def refuse_non_store(path: Path, *, for_writing: bool = False) -> None:
    """InputError unless `path` is a store (or, for writing, does not exist or is empty)."""
    try:
        _refuse_non_store(path, for_writing)
    except PermissionError as error:
        raise StoreError("may not be read by you", where=error.filename, next="Ask its owner for access.") from error


def _refuse_non_store(path: Path, for_writing: bool) -> None:
    if not path.exists():
        if for_writing and not path.is_symlink():
            return
        what = "a symbolic link to nothing" if path.is_symlink() else "no such folder"
        stores = _stores_in(path.parent) if path.parent.is_dir() else []
        beside = f"{path.parent}/ has: {_some(stores)}. " if stores else ""
        raise InputError(what, where=path, next=f"{beside}{_make(path)}")
    if not path.is_dir():
        raise InputError("a file, not a folder", where=path, next="--ref-store names the folder of a store, such as store/think.")
    if _is_store(path):
        return
    if is_shelf(path):
        stores = _stores_in(path)
        what = f"{path}/ is the shelf, not a dataset; on it: {_some(stores) or 'nothing yet'}"
        raise InputError(what, next=f"Name a dataset on it: --ref-store {shlex.quote(str(path / (stores or ['think'])[0]))}")
    entries = sorted(entry.name for entry in path.iterdir() if entry.name != disk.STAGING)
    if not for_writing:
        raise InputError(
            "not a reference store",
            where=path,
            expected=f"part-*.parquet and {MANIFEST}",
            found=_some(entries) or "an empty folder",
            next=_make(path),
        )
    if entries:
        raise InputError(
            "neither empty nor a reference store; nothing was touched",
            where=path,
            found=_some(entries),
            next="Choose another --ref-store, or empty this folder yourself.",
        )


def _make(path: Path) -> str:
    return f"Make it with: {cli('precompute', '--dataset')} … --ref-store {shlex.quote(str(path))}"


def is_shelf(path: Path) -> bool:
    """A folder that keeps stores side by side: the code folder `store/`, or any folder with stores in it."""
    return (path / "schema.py").exists() or bool(_stores_in(path))


def _is_store(path: Path) -> bool:
    return manifest_path(path).exists() or (path / disk.STAGING / IDENTITY_NOTE).exists() or bool(parts_in(path))


def _stores_in(path: Path) -> list[str]:
    readable = (entry for entry in path.iterdir() if entry.is_dir() and os.access(entry, os.R_OK | os.X_OK))
    return sorted(entry.name for entry in readable if _is_store(entry))


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")


def missing_shards(store: Path, identity: Identity) -> list[int]:
    """Indices of the shards not present, without opening any."""
    present = {path.name for path in parts_in(store)}
    return [index for index in range(identity.num_shards) if part_name(index) not in present]
