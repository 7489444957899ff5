"""Does memory grow with the dataset? Phase 1 from file to sealed store, then training's and SQL's opening of it, at growing numbers of rows.

    python benchmarks/memory.py --model DIR                         1,000 to 1,000,000 rows; a quarter of an hour
    python benchmarks/memory.py --model DIR --rows 1000 30000 --kind jsonl

The worker is the real one: load, check and fingerprint, plan, claim, tokenize ahead, pack, write behind, progress, seal. Only the model's
forward is left out, because a million rows of it are out of reach here: the log-probs are made up, of the right shape. `--model` is a small
model with the tokenizer to use; its size and the imports are in every figure.

Each size and step has a fresh process. Anonymous memory is what the process owns and nobody can take back; file pages are the memory-mapped
dataset, which the kernel drops when others need the room, so they may grow.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "answers", "because", "it", "can")
MAX_LENGTH, SHORTER = 64, 32


def write_rows(path: Path, count: int) -> None:
    """Short plain-text rows, none like another."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = random.Random(0)

    def text(row: int, side: str) -> str:
        return f"{side} {row} " + " ".join(generator.choices(WORDS, k=generator.randint(3, 20)))

    def block(first: int) -> list[dict]:
        rows = range(first, min(first + 10_000, count))
        return [{side: text(row, side) for side in ("prompt", "chosen", "rejected")} for row in rows]

    schema = pa.schema([(side, pa.string()) for side in ("prompt", "chosen", "rejected")])
    if path.suffix == ".jsonl":
        with open(path, "w", encoding="utf-8") as file:
            for first in range(0, count, 10_000):
                file.writelines(json.dumps(row) + "\n" for row in block(first))
        return
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, count, 10_000):
            writer.write_table(pa.Table.from_pylist(block(first), schema))


class Watch:
    """The largest anonymous memory and file pages of this process, MB, looked at every 20 ms; and its CPU seconds."""

    def __init__(self):
        self.anonymous = self.files = 0.0
        self.cpu, self.clock = time.process_time(), time.perf_counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            with open("/proc/self/status") as file:
                sizes = dict(line.split(":", 1) for line in file)
            self.anonymous = max(self.anonymous, int(sizes["RssAnon"].split()[0]) / 1000)
            self.files = max(self.files, int(sizes["RssFile"].split()[0]) / 1000)

    def done(self) -> dict[str, float]:
        self._stop.set()
        self._thread.join()
        return {
            "anonymous": self.anonymous,
            "files": self.files,
            "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
            "cpu": time.process_time() - self.cpu,
            "seconds": time.perf_counter() - self.clock,
        }


def precompute(folder: Path, dataset: Path, model: str, shard_size: int | None) -> dict:
    import numpy as np

    from launch import Process
    from precompute import worker
    from precompute.config import PrecomputeConfig
    from precompute.scorer.packing import pack
    from precompute.scorer.scoring import ScoredBatch

    def made_up(model, sequences, *, layout, tokens_per_batch):
        for batch in pack(sequences, tokens_per_batch):
            scores = -np.random.default_rng(0).random(len(batch.targets), dtype=np.float32)
            yield ScoredBatch(batch.members, [scores[slots] for slots in batch.slots], len(batch.input_ids))

    sealing = {}

    def timed_seal(*arguments):
        started, cpu = time.perf_counter(), time.process_time()
        manifest = real_seal(*arguments)
        sealing.update(seal_seconds=time.perf_counter() - started, seal_cpu=time.process_time() - cpu)
        return manifest

    real_seal, worker.seal, worker.score_batches = worker.seal, timed_seal, made_up
    config = PrecomputeConfig(
        dataset=(str(dataset),),
        split="train",
        dataset_revision=None,
        limit=None,
        model=model,
        revision=None,
        tokenizer=model,
        chat_template=None,
        max_length=MAX_LENGTH,
        dtype="float32",
        shard_size=shard_size,
        ref_store=folder / "store",
        preset=None,
        show="nothing",
    )
    watch = Watch()
    manifest = worker.run(config, Process(0, 1, 0))
    return watch.done() | sealing | {"shards": len(manifest.shards)}


def opening(folder: Path, how: str) -> dict:
    """What one reader of the sealed store takes, its imports apart."""
    from store.reader import open_store

    if how.startswith("train"):
        from train.data import dataset_of, lengths_of
    else:
        import duckdb  # noqa: F401

        from store.sql import connect
    before = Watch()
    time.sleep(0.1)
    imports = before.done()
    watch = Watch()
    if how == "sql":
        connect(folder / "store").execute("select avg(ref_chosen_logps - ref_rejected_logps) from pairs").fetchall()
    else:
        store = open_store(folder / "store", check="footers" if how == "open, footers checked" else "none")
        if how.startswith("train"):  # as every rank does but the first, which also reads every byte for its checksum
            max_length = MAX_LENGTH if how == "train" else SHORTER
            lengths_of(dataset_of(store, max_length), store, max_length)
    found = watch.done()
    return found | {"imports": imports["anonymous"] + imports["files"]}


def in_fresh_process(*arguments: str) -> dict:
    """Run this file with `arguments` and return the JSON object it prints last."""
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Folder of a small model and its tokenizer.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--kind", choices=["parquet", "jsonl"], default="parquet")
    parser.add_argument("--shard-size", type=int, help="default: the product's")
    parser.add_argument("--folder", type=Path, help="where to write; default: memory, which is not counted as this program's")
    parser.add_argument("--keep", action="store_true", help="leave the stores there")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        step, folder, *rest = options.one
        if step == "rows":
            write_rows(Path(folder) / f"rows.{rest[0]}", int(rest[1]))
            found = {}
        elif step == "precompute":
            found = precompute(Path(folder), Path(rest[0]), options.model, options.shard_size)
        else:
            found = opening(Path(folder), step)
        print(json.dumps(found))
        return
    memory = Path("/dev/shm")
    base = options.folder or (memory if memory.is_dir() else None)
    common = ("--model", options.model) + (("--shard-size", str(options.shard_size)) if options.shard_size else ())
    table = []
    for count in options.rows:
        folder = Path(tempfile.mkdtemp(dir=base, prefix=f"refdpo-{count}-"))
        os.environ["HF_HOME"] = str(folder / "cache")
        in_fresh_process(*common, "--one", "rows", str(folder), options.kind, str(count))
        dataset = str(folder / f"rows.{options.kind}")
        found = in_fresh_process(*common, "--one", "precompute", str(folder), dataset)
        table.append((f"precompute, {found['shards']:,} shards, sealed in {found['seal_seconds']:.1f} s", count, found))
        for how in ("open", "open, footers checked", "train", "train, shorter max_length", "sql"):
            table.append((how, count, in_fresh_process(*common, "--one", how, str(folder))))
        print("kept:" if options.keep else "made:", folder, file=sys.stderr)
        if not options.keep:
            shutil.rmtree(folder)
        print("| step | rows | anonymous MB | file pages MB | resident MB | imports MB | CPU s | s |\n" + "|---|" + "---:|" * 7)
        for step, rows, each in table:
            imports = f"{each['imports']:,.0f}" if "imports" in each else ""
            cells = f"{each['anonymous']:,.0f} | {each['files']:,.0f} | {each['resident']:,.0f} | {imports}"
            print(f"| {step} | {rows:,} | {cells} | {each['cpu']:.2f} | {each['seconds']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
