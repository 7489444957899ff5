"""Small stores made of random numbers: what a scorer would have written, without a model."""

import math
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from store.disk import STAGING
from store.folder import prepare_store
from store.manifest import MANIFEST, Identity, Manifest, ShardFile, ShardReport, Unscorable, totals_of
from store.schema import SCHEMA
from store.seal import seal, sha256_of
from store.shard import part_name, publish_shard

PROVENANCE = {"seconds": 2.0, "waited": 0.25, "worker": "n1:0", "host": "n1", "device": "cpu", "versions": {"torch": "2.13.0"}}


def memory_folder() -> Iterator[Path]:
    """A temporary folder in memory where the system has one: these tests wait for the disk thousands of times."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)


def make_identity(**changes) -> Identity:
    values = {
        "model": "acme/tiny",
        "revision": "main",
        "tokenizer": "acme/tiny",
        "dataset": "acme/prefs",
        "split": "train",
        "dataset_revision": None,
        "weights_sha256": "a1" * 32,
        "config_sha256": "b2" * 32,
        "tokenizer_sha256": "c3" * 32,
        "chat_template_sha256": "none",
        "dataset_fingerprint": "d4" * 16,
        "num_rows": 10,
        "max_length": 64,
        "truncation": "keep_start",
        "dtype": "float32",
        "shard_size": 4,
        "scorer_version": 1,
    }
    return Identity(**{**values, **changes})


def make_shard(identity: Identity, index: int, seed: int = 0, unscorable: tuple[int, ...] = ()) -> tuple[ShardReport, pa.Table]:
    """A shard's report and table, the same for the same arguments. `unscorable`: source rows to leave out."""
    rows = identity.rows_of(index)
    pairs = [make_pair(row, identity.max_length, seed) for row in rows if row not in unscorable]
    table = pa.Table.from_pylist(pairs, schema=SCHEMA)
    truncated = sum(pair["chosen_truncated"] for pair in pairs)
    prompt, chosen, rejected = (sum(pair[f"num_{side}_tokens"] for pair in pairs) for side in ("prompt", "chosen", "rejected"))
    return ShardReport(
        index=index,
        first_row=rows.start,
        num_rows=len(rows),
        num_pairs=len(pairs),
        unscorable=tuple(Unscorable(row, f"{row:032x}", "prompt fills max_length") for row in rows if row in unscorable),
        counts={"chosen_truncated": truncated} if truncated else {},
        examples={"chosen_truncated": f"row {rows.start}: …and so on"} if truncated else {},
        num_prompt_tokens=prompt,
        num_completion_tokens=chosen + rejected,
        model_tokens=prompt + chosen + rejected,
    ), table


def make_pair(row: int, max_length: int, seed: int = 0) -> dict:
    rng = random.Random(f"{seed} {row}")
    prompt = rng.randint(1, max(1, max_length // 2))
    pair = {"pair_id": f"{row:032x}", "row": row, "prompt_ids": _ids(rng, prompt), "num_prompt_tokens": prompt}
    for side in ("chosen", "rejected"):
        n = rng.randint(1, max_length - prompt)
        # multiples of 1/64: exact in float32, as are their sums
        logps = [-rng.randint(0, 640) / 64 for _ in range(n)]
        pair |= {
            f"{side}_ids": _ids(rng, n),
            f"{side}_token_logps": logps,
            f"ref_{side}_logps": math.fsum(logps),
            f"num_{side}_tokens": n,
            f"{side}_truncated": prompt + n == max_length,
        }
    return pair


def _ids(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(100_000) for _ in range(n)]


def make_store(path: Path, identity: Identity | None = None, unscorable: tuple[int, ...] = (), **changes) -> Manifest:
    """A sealed store at `path`."""
    identity = identity or make_identity(**changes)
    prepare_store(path, identity)
    for index in range(identity.num_shards):
        publish_shard(path, identity, *make_shard(identity, index, unscorable=unscorable), PROVENANCE)
    return seal(path, identity, {"layout": "packed", "tokens_per_batch": 4096}, "demo")


def make_empty_store(path: Path, num_rows: int) -> Manifest:
    """A sealed store without a pair, as versions before this one made it: sealing refuses that now, reading does not."""
    identity = make_identity(num_rows=num_rows, shard_size=num_rows)
    prepare_store(path, identity)
    report, table = make_shard(identity, 0, unscorable=tuple(range(num_rows)))
    publish_shard(path, identity, report, table, PROVENANCE)
    file = path / part_name(0)
    shard = ShardFile(file.name, file.stat().st_size, sha256_of(file), 0, 0, num_rows)
    manifest = Manifest(**vars(totals_of([report])), identity=identity, shards=(shard,), preset=None, provenance={})
    (path / MANIFEST).write_bytes(manifest.to_bytes())
    shutil.rmtree(path / STAGING)
    return manifest
