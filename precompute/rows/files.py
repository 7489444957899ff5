"""What `--dataset` names -> the files of each split: a file, a pattern, a folder or a hub id.

Folders and hub repositories are read as `datasets` reads them (their README's configurations, `data/train-00000-of-00002.parquet`, train.jsonl
beside test.jsonl, test/…), so that a split means here what it means in `load_dataset`. What that library passes over in silence is an error:
files of another kind or of no split, and a set of numbered files with one missing.
"""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import datasets
import huggingface_hub
from datasets.data_files import FILES_TO_IGNORE, EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError
from huggingface_hub.errors import LocalEntryNotFoundError

from store.errors import InputError

KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}

READABLE = ", ".join(KINDS) + "; text files also as .gz, .zst or .bz2"

NUMBERED = re.compile(r"^(.*)-(\d{5})-of-(\d{5})(\..*)$")
"""As the Hub and `datasets` name the parts of one split."""


def kind_of(file: Path) -> str | None:
    """parquet, json or csv; None for anything else."""
    packed = file.suffix in COMPRESSIONS
    kind = KINDS.get((Path(file.stem).suffix if packed else file.suffix).lower())
    return None if kind == "parquet" and packed else kind


def find_files(source: str, *, config: str | None = None, revision: str | None = None) -> dict[str, list[Path]] | None:
    """Split name -> its files, in order. None for a hub id that is here only as `datasets` prepared it (offline).

    Raises InputError for a path that does not exist, a folder or repository without data files, and an unknown configuration.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return {"train": [path]}
    if path.is_dir():
        return _in_folder(path, config, source)
    if glob.has_magic(source):
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        if not files:
            raise InputError(
                "no file matches this pattern", where=f"--dataset {source}", next="Quote it, so that the shell leaves it alone."
            )
        return {"train": files}
    if kind_of(path) or path.suffix in COMPRESSIONS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError("no such file or folder", where=f"--dataset {source}")
    return _on_hub(source, config, revision)


def one_kind(files: Sequence[Path], source: str) -> str:
    """The kind of all `files`. InputError if one is of no known kind, or if they are of several."""
    kinds = {kind_of(file): file for file in files}
    if None in kinds:
        raise InputError(
            "unknown kind of file", where=f"--dataset {source}", expected=READABLE, found=kinds[None].suffix or "no ending"
        )
    if len(kinds) > 1:
        raise InputError(
            "files of several kinds",
            where=f"--dataset {source}",
            found=", ".join(sorted(file.name for file in kinds.values())),
            next=f"Name those of one kind: --dataset '{Path(source) if Path(source).is_dir() else Path(source).parent}/*.jsonl'",
        )
    return next(iter(kinds))


def check_complete(files: Sequence[Path], source: str) -> None:
    """InputError if a part of a numbered set is missing: the rest would be scored as if it were the whole."""
    sets: dict[tuple, set[int]] = {}
    for file in files:
        if match := NUMBERED.match(file.name):
            sets.setdefault((file.parent, match[1], match[4], int(match[3])), set()).add(int(match[2]))
    for (folder, name, suffix, count), present in sets.items():
        absent = [f"{name}-{index:05d}-of-{count:05d}{suffix}" for index in range(count) if index not in present]
        if absent:
            raise InputError(
                f"{len(absent)} of {count} files are missing",
                where=f"--dataset {source}",
                expected=", ".join(absent[:3]),
                next=f"Download or copy them into {folder}.",
            )


def _in_folder(path: Path, config: str | None, source: str) -> dict[str, list[Path]]:
    where = f"--dataset {source}"
    if glob.has_magic(str(path.resolve())):  # `datasets` would look for files that match it
        raise InputError("the folder's path has one of * ? [ in it", where=where, found=path.resolve(), next="Rename the folder.")
    try:
        builder = datasets.load_dataset_builder(str(path.resolve()), name=config)
    except (EmptyDatasetError, DataFilesNotFoundError) as error:
        expected = f"files from save_to_disk, or {READABLE}"
        raise InputError("the folder holds no dataset", where=where, expected=expected, found=_some(path)) from error
    except ValueError as error:
        raise _no_config(str(path.resolve()), config, where, None, error) from error
    files = {str(split): [Path(name) for name in names] for split, names in builder.config.data_files.items()}
    _refuse_reading_options(builder.config, [file.name for names in files.values() for file in names], where)
    if not _declares_configs(path):
        _refuse_leftovers(path, files, source)
    return files


OF_EVERY_BUILDER = {each.name for each in fields(datasets.BuilderConfig)} | {"features"}


def _refuse_reading_options(config: datasets.BuilderConfig, files: Sequence[str], where: str) -> None:
    """InputError for options of a README's configuration that say how its files are read, such as sep or names: they would not be followed."""
    usual = type(config)()
    tabs = {"sep", "delimiter"} if all(".tsv" in Path(name).suffixes for name in files) else set()  # those are read with tabs
    said = {each.name: getattr(config, each.name) for each in fields(config) if each.name not in OF_EVERY_BUILDER}
    said = {name: value for name, value in said.items() if value != getattr(usual, name) and not (name in tabs and value == "\t")}
    said = {name: value for name, value in said.items() if name != "delimiter" or said.get("sep") != value}
    if said:
        raise InputError(
            "options of its README for reading the files are not followed",
            where=where,
            found=", ".join(f"{name}: {value!r}" for name, value in said.items()),
            next="Write the files as CSV with commas and a line of names, as JSON lines or as Parquet.",
        )


def _declares_configs(path: Path) -> bool:
    readme = path / "README.md"
    return readme.is_file() and bool(huggingface_hub.DatasetCard.load(readme, ignore_metadata_errors=True).data.get("configs"))


def _refuse_leftovers(path: Path, files: dict[str, list[Path]], source: str) -> None:
    used = {file.resolve() for names in files.values() for file in names}
    hidden = (".", "__")
    present = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and kind_of(file)
        and file.name not in FILES_TO_IGNORE
        and not any(part.startswith(hidden) for part in file.relative_to(path).parts)
    ]
    left = [str(file.relative_to(path)) for file in present if file.resolve() not in used]
    if left:
        raise InputError(
            "files that belong to no split, or are of another kind than the rest, would not be read",
            where=f"--dataset {source}",
            found=", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else ""),
            next=f"Move them elsewhere, or name the files to read: --dataset '{path}/PATTERN'",
        )


def _on_hub(source: str, config: str | None, revision: str | None) -> dict[str, list[Path]] | None:
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        try:
            folder = huggingface_hub.snapshot_download(source, repo_type="dataset", revision=revision, local_files_only=True)
        except LocalEntryNotFoundError:
            return None
        return _in_folder(Path(folder), config, source)
    try:
        builder = datasets.load_dataset_builder(source, name=config, revision=revision)
    except ValueError as error:
        raise _no_config(source, config, f"--dataset {source}", revision, error) from error
    files = builder.config.data_files
    if not files:
        return None
    _refuse_reading_options(builder.config, [str(name) for names in files.values() for name in names], f"--dataset {source}")
    remote = huggingface_hub.HfFileSystem()
    return {str(split): _RemoteFiles(remote.resolve_path(str(name)) for name in names) for split, names in files.items()}


class _RemoteFiles(list):
    """Files of one split on the Hub, downloaded when they are asked for: the other splits stay where they are."""

    def local(self) -> list[Path]:
        return [
            Path(huggingface_hub.hf_hub_download(file.repo_id, file.path_in_repo, repo_type=file.repo_type, revision=file.revision))
            for file in self
        ]


def local_files(files: Sequence) -> list[Path]:
    """The files of one split, on this machine."""
    return files.local() if isinstance(files, _RemoteFiles) else list(files)


def _no_config(source: str, config: str | None, where: str, revision: str | None, error: ValueError) -> InputError:
    try:
        names = datasets.get_dataset_config_names(source, revision=revision)
    except (ValueError, OSError, KeyError):  # the listing fails as the loading did: only that matters
        names = []
    if not names or (config is None and len(names) == 1):
        return InputError(f"the dataset cannot be read: {str(error).splitlines()[0]}", where=where)
    what = "the dataset has several configurations" if config is None else f"no configuration {config}"
    return InputError(what, where=where, found=", ".join(names), next=f"Add --dataset-config {names[0]}")


def _some(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "nothing"
