"""Copies of a store elsewhere: any fsspec URL (s3://, gs://, file://, hf://datasets/…) or a repository on the Hugging Face Hub.

pull("hf://datasets/acme/think-ref", Path("store/think"))     resumable; every shard's sha256 is checked; sealed last
push(Path("store/think"), "s3://bucket/think")                shards first, manifest last: a reader never sees half a store as
sealed
local_copy("s3://bucket/think")                               what `--ref-store s3://…` reads: a checked copy in the cache folder
"""

import hashlib
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from store import disk
from store.command import Command, again
from store.errors import InputError, StoreError
from store.folder import prepare_store
from store.manifest import FORMER_MANIFEST, MANIFEST, Identity, Manifest, ShardFile, check_same, manifest_path
from store.reader import Store, open_store
from store.schema import SUMS_ONLY_NOTE
from store.seal import sha256_of
from store.spans import TURNS

Progress = Callable[[int, int], None]

THREADS = 4
"""Shards copied at a time."""

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}

CARD = "README.md"


def is_url(text: str) -> bool:
    """Whether this names a place that fsspec reaches, rather than a path or a repository on the Hub."""
    return "://" in text


def url_of(text: str, revision: str | None = None) -> str:
    """A URL as it is; owner/name as that dataset repository on the Hub. InputError for anything else."""
    if is_url(text):
        if revision is not None:
            raise InputError("belongs to a repository on the Hub", where=f"--revision {revision}", found=text)
        return text.rstrip("/")
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or text.endswith("/"):
        raise InputError("neither a URL nor a repository", where=text, expected="owner/name, s3://bucket/path, file:///path, …")
    return f"hf://datasets/{text}" + (f"@{revision}" if revision else "")


def pull(source: str, path: Path, progress: Progress | None = None, revision: str | None = None) -> Manifest:
    """Copy the sealed store at `source` (a URL, or owner/name on the Hub) to `path`, and seal it there last.

    Run it again after an interruption: shards that arrived whole are kept. InputError for a source that is no store or cannot be
    read; StoreError where `path` is another store or a shard arrives altered.
    """
    url = url_of(source, revision)
    with _reaching(url) as (files, root):
        manifest = _remote_manifest(files, root, url)
        if manifest_path(path).exists():
            check_same(Manifest.load(manifest_path(path)).identity, manifest.identity, path)
            return open_store(path, check="sha256").manifest
        prepare_store(path, manifest.identity, Command.now(path))
        done = 0
        with ThreadPoolExecutor(THREADS) as threads:
            for _ in threads.map(lambda shard: _pull_shard(files, root, shard, path), manifest.shards):
                done += 1
                if progress is not None:
                    progress(done, len(manifest.shards))
    try:
        staged = disk.staging_path(path, MANIFEST, "tmp")
        disk.write_new(staged, manifest.to_bytes())
        disk.publish(staged, path / MANIFEST)
    except OSError as error:
        raise disk.refusal(error, path) from error
    shutil.rmtree(path / disk.STAGING, ignore_errors=True)
    return open_store(path).manifest


def push(path: Path, target: str, progress: Progress | None = None, *, private: bool = False) -> str:
    """Copy the sealed store at `path` to `target` (a URL, or owner/name on the Hub); returns where it is now.

    Every byte is checked before; what is there already with the right content is not sent again; after the copy each shard there is
    compared
    with the manifest. StoreError if the target holds a store of another identity or does not hold what was sent.
    """
    store = open_store(path, check="sha256")
    url = url_of(target)
    if url.startswith("hf://"):
        return _push_to_hub(store, url.removeprefix("hf://datasets/"), private, progress)
    with _reaching(url) as (files, root):
        _refuse_other(files, root, url, store.identity)
        files.makedirs(root, exist_ok=True)
        for done, shard in enumerate(store.manifest.shards, start=1):
            there = f"{root}/{shard.name}"
            if not files.exists(there) or files.size(there) != shard.size or _sha256(files, there) != shard.sha256:
                files.put_file(str(path / shard.name), there)
            if files.size(there) != shard.size or _sha256(files, there) != shard.sha256:
                raise StoreError(
                    "a shard is not there as it was sent",
                    where=f"{url}/{shard.name}",
                    next=f"Run the same command again: {again()}",
                )
            if progress is not None:
                progress(done, len(store.manifest.shards))
        files.pipe_file(f"{root}/{CARD}", card(store.manifest, url).encode())
        name = _manifest_name(lambda name: files.exists(f"{root}/{name}"))
        files.pipe_file(f"{root}/{name}", store.manifest.to_bytes())
    return url


def _push_to_hub(store: Store, repo: str, private: bool, progress: Progress | None) -> str:
    """Shards in one commit, then manifest and card in another. The Hub keeps uploaded chunks: a second try sends only what is
    missing."""
    from huggingface_hub import HfApi

    api = HfApi()
    shards = {shard.name: shard.sha256 for shard in store.manifest.shards}
    try:
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        there = _on_hub(api, repo)
        sealed_by = _manifest_name(there.__contains__)
        if sealed_by in there:
            with tempfile.TemporaryDirectory() as folder:
                stored = Manifest.load(Path(api.hf_hub_download(repo, sealed_by, repo_type="dataset", local_dir=folder)))
            check_same(stored.identity, store.identity, f"{repo} on the Hub")
        extra = sorted(name for name in there if name.endswith(".parquet") and name not in shards)
        if extra:
            raise StoreError(
                f"the repository has other Parquet files: {', '.join(extra[:5])}", where=repo, next="Choose another repository."
            )
        missing = [name for name, sha256 in shards.items() if there.get(name) != sha256]
        if missing:
            message = f"{len(missing)} shards of {store.path.name}"
            api.upload_folder(
                repo_id=repo, repo_type="dataset", folder_path=store.path, allow_patterns=missing, commit_message=message
            )
        there = _on_hub(api, repo)
        wrong = [name for name, sha256 in shards.items() if there.get(name) != sha256]
        if wrong:
            raise StoreError(
                f"{len(wrong)} shards are not there as they were sent: {', '.join(wrong[:5])}",
                where=repo,
                next=f"Run the same command again: {again()}",
            )
        for name, data in ((CARD, card(store.manifest, repo).encode()), (sealed_by, store.manifest.to_bytes())):
            api.upload_file(
                path_or_fileobj=data,
                path_in_repo=name,
                repo_id=repo,
                repo_type="dataset",
                commit_message=f"{name} of a sealed store",
            )
    except (InputError, StoreError):
        raise
    except Exception as error:  # the client's own, its HTTP library's, the system's
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"the Hub refused or cannot be reached: {type(error).__name__}: {reason}",
            where=repo,
            next=f"Log in with `hf auth login`, check the name, then run it again: {again()}",
        ) from error
    if progress is not None:
        progress(len(shards), len(shards))
    return f"hf://datasets/{repo}"


def _on_hub(api: Any, repo: str) -> dict[str, str | None]:
    """File name -> sha256 (None for files that are not stored as large files)."""
    siblings = api.repo_info(repo, repo_type="dataset", files_metadata=True).siblings or []
    return {each.rfilename: each.lfs.sha256 if each.lfs is not None else None for each in siblings}


def local_copy(url: str, progress: Progress | None = None) -> Path:
    """A local folder with the store at `url`, checked when it was copied; copied once per content of its manifest.

    It lies in $REFDPO_CACHE, else in refdpo/ of $XDG_CACHE_HOME or ~/.cache; delete it whenever you like.
    """
    with _reaching(url_of(url)) as (files, root):
        manifest = _remote_manifest(files, root, url)
    base = os.environ.get("REFDPO_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "refdpo"
    )
    content = hashlib.sha256(manifest.to_bytes()).hexdigest()[:12]
    path = Path(base) / content / root.rstrip("/").rsplit("/", 1)[-1]
    if not manifest_path(path).exists():
        pull(url, path, progress)
    return path


@contextmanager
def _reaching(url: str) -> Iterator[tuple]:
    """(fsspec file system, root path). Its many kinds of failure become one InputError."""
    import fsspec

    try:
        yield fsspec.core.url_to_fs(url)
    except (InputError, StoreError):
        raise
    except ImportError as error:
        package = PACKAGES.get(url.partition("://")[0], "the file system's package")
        raise InputError("needs another package", where=url, next=f"pip install {package}") from error
    except Exception as error:  # each file system raises its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"cannot be reached: {type(error).__name__}: {reason}", where=url, next="Check the address and your credentials."
        ) from error


def _manifest_name(exists: Callable[[str], bool]) -> str:
    """The name of the manifest at a target: a copy made under the former name keeps it, or it would have two."""
    return FORMER_MANIFEST if exists(FORMER_MANIFEST) and not exists(MANIFEST) else MANIFEST


def _remote_manifest(files: Any, root: str, url: str) -> Manifest:
    name = _manifest_name(lambda name: files.exists(f"{root}/{name}"))
    try:
        data = files.cat_file(f"{root}/{name}")
    except FileNotFoundError as error:
        raise InputError("no sealed store", where=url, expected=f"{MANIFEST} beside part-*.parquet") from error
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / MANIFEST
        note.write_bytes(data)
        try:
            return Manifest.load(note)
        except StoreError as error:  # which names the temporary file
            raise StoreError(
                f"its manifest: {error.what}", where=url, next="Copy it there again from where it was made."
            ) from error


def _refuse_other(files: Any, root: str, url: str, identity: Identity) -> None:
    if any(files.exists(f"{root}/{name}") for name in (MANIFEST, FORMER_MANIFEST)):
        check_same(_remote_manifest(files, root, url).identity, identity, url)
    elif files.exists(root) and any(
        not name.rstrip("/").rsplit("/", 1)[-1].startswith(("part-", CARD)) for name in files.ls(root, detail=False)
    ):
        raise InputError("neither empty nor a reference store; nothing was touched", where=url, next="Choose another target.")


def _pull_shard(files: Any, root: str, shard: ShardFile, path: Path) -> None:
    final = path / shard.name
    if final.exists():
        if final.stat().st_size == shard.size and sha256_of(final) == shard.sha256:
            return
        raise StoreError(
            "is not the shard of the source",
            where=final,
            next=f"Delete it and run the same command again: rm {shlex.quote(str(final))} && {again()}",
        )
    staged = disk.staging_path(path, shard.name, "tmp")
    try:
        try:
            files.get_file(f"{root}/{shard.name}", str(staged))
        except FileNotFoundError as error:
            raise StoreError("the source lacks a shard", where=f"{root}/{shard.name}", next="Push it there again.") from error
        if staged.stat().st_size != shard.size or sha256_of(staged) != shard.sha256:
            raise StoreError(
                "arrived altered: its sha256 is not the manifest's",
                where=f"{root}/{shard.name}",
                next=f"Run the same command again: {again()}",
            )
        disk.publish(staged, final)
    finally:
        disk.drop(staged)


def _sha256(files: Any, name: str) -> str:
    digest = hashlib.sha256()
    with files.open(name, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def card(manifest: Manifest, name: str) -> str:
    """The dataset card: what the numbers are, what made them, how to use them."""
    identity = manifest.identity
    model = f"{identity.model}@{identity.revision}" if identity.revision else identity.model
    rows = "\n".join(f"| `{field}` | `{value}` |" for field, value in identity.to_json().items())
    unscorable = f", {len(manifest.unscorable):,} without a pair (listed in _manifest.json)" if manifest.unscorable else ""
    parts = "`chosen_token_logps` and `rejected_token_logps` are their parts."
    if identity.scored_turns:
        parts += f" Only {TURNS[identity.scored_turns]} were scored: other tokens have null, and `chosen_scored` and `rejected_scored` say which."
    if identity.sums_only:
        parts = f"This store was {SUMS_ONLY_NOTE}."
    return f"""---
tags:
- dpo
- preference
- reference-log-probs
- refdpo
configs:
- config_name: default
  data_files: part-*.parquet
---
# Reference log-probs of {model} on {identity.dataset}

{manifest.num_pairs:,} preference pairs ({identity.num_rows:,} source rows{unscorable}): token ids as scored, the summed and per-token natural-log
probability of every completion under the frozen reference model, in {identity.dtype}, up to {identity.max_length:,} tokens. Sealed by
[refdpo](_manifest.json): `_manifest.json` lists every file's sha256.

    python cli.py pull {name} --ref-store store/{name.rstrip("/").rsplit("/", 1)[-1]}
    python cli.py train --ref-store store/{name.rstrip("/").rsplit("/", 1)[-1]}
    duckdb -c "select avg(ref_chosen_logps - ref_rejected_logps) from 'part-*.parquet'"

| identity | value |
|---|---|
{rows}

`ref_chosen_logps` and `ref_rejected_logps` are sums in nats over `num_chosen_tokens` and `num_rejected_tokens` completion tokens;
{parts} The texts, as far as the ids hold them, are under the terms of the dataset.
"""
