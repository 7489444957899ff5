"""What each shard costs beyond its scoring, at two numbers of shards: the table of docs/scale.md.

    python benchmarks/scale.py                          1,000 and 4,000 shards; a minute or two
    python benchmarks/scale.py --shards 2500 10000 --folder /scratch/me

A cost per shard that stays the same from one size to the next is linear. One that grows with the size says so in the last column.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from store_samples import PROVENANCE, make_identity, make_shard

from store.claim import claim
from store.folder import missing_shards, prepare_store
from store.manifest import Manifest, manifest_path
from store.reader import open_store
from store.seal import seal
from store.shard import part_name, publish_shard
from store.status import status

ONCE = ("list what is missing", "seal", "load the manifest", "open, footers checked", "open, sha256 checked", "status")
"""Done once per store (or worker), over all shards."""


def measure(folder: Path, num_shards: int) -> dict[str, float]:
    """Microseconds per shard of each step, and the manifest's bytes per shard, for a store of so many one-pair shards."""
    identity = make_identity(num_rows=num_shards, shard_size=1)
    store = folder / str(num_shards)
    found: dict[str, float] = {}

    def timed(name: str, function: Callable[[], object]) -> object:
        started = time.perf_counter()
        result = function()
        found[name] = (time.perf_counter() - started) / num_shards * 1e6
        return result

    prepare_store(store, identity)
    shards = [make_shard(identity, index) for index in range(num_shards)]

    def claims() -> None:
        for index in range(num_shards):
            claim(store, index).release()

    def publish() -> None:
        for report, table in shards:
            publish_shard(store, identity, report, table, PROVENANCE)

    def ask_for_held() -> None:
        assert all(claim(store, index) is None for index in range(num_shards))

    timed("claim and release", claims)
    timed("publish (check, write, fsync, link)", publish)
    timed("ask for a shard that is done", ask_for_held)
    timed("list what is missing", lambda: missing_shards(store, identity))
    timed("status", lambda: status(store))
    timed("seal", lambda: seal(store, identity, {}, None))
    timed("load the manifest", lambda: Manifest.load(manifest_path(store)))
    timed("open, footers checked", lambda: open_store(store))
    timed("open, sha256 checked", lambda: open_store(store, check="sha256"))
    found["manifest, bytes per shard"] = manifest_path(store).stat().st_size / num_shards
    assert (store / part_name(num_shards - 1)).exists()
    shutil.rmtree(store)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, nargs=2, default=(1000, 4000), metavar=("SMALL", "LARGE"))
    parser.add_argument(
        "--folder", type=Path, help="where to write; default: memory, so that the numbers are of this code and not of a disk"
    )
    options = parser.parse_args()
    memory = Path("/dev/shm")
    base = options.folder or (memory if memory.is_dir() else None)
    with tempfile.TemporaryDirectory(dir=base) as folder:
        measure(Path(folder), 100)  # imports, threads, caches
        small, large = (measure(Path(folder), size) for size in options.shards)
    print(f"| per shard, µs | {options.shards[0]:,} shards | {options.shards[1]:,} shards | ratio |\n|---|---:|---:|---:|")
    for name in small:
        print(f"| {name} | {small[name]:,.1f} | {large[name]:,.1f} | {large[name] / small[name]:.2f} |")


if __name__ == "__main__":
    main()
