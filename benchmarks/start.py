"""From the command to the first batch: what phase 1 adds to loading the model.

    python benchmarks/start.py --model SMOLLM2 --dataset llamafactory_dpo_en/train.parquet

Beside the real command, up to the moment its first batch begins, a bare process imports torch and transformers and loads the model. They take
turns --repeats times; the least of each counts, in CPU seconds and by the clock, because other work on the machine only ever adds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STEPS = (
    *("load_rows", "check_and_fingerprint", "load_tokenizer", "tokenizer_sha256", "load_model", "weights_sha256", "load_inputs"),
    *("self_test", "shard_costs", "tokenize_rows"),
)
"""Functions of precompute/worker.py and precompute/inputs.py whose ends are stamped."""


def bare(options: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    stamp(options, "model loaded")


def real(options: argparse.Namespace) -> None:
    import cli
    from precompute import inputs, worker

    stamp(options, "imports")
    for name in STEPS:
        module = worker if hasattr(worker, name) else inputs
        setattr(module, name, stamping(options, name, getattr(module, name)))

    def first_batch(*arguments, **more):
        stamp(options, "first batch begins")
        os._exit(0)  # the claim it leaves is in a temporary folder

    worker.score_batches = first_batch
    with tempfile.TemporaryDirectory() as folder:
        required = ["--model", options.model, "--dtype", options.dtype, "--max-length", "512", "--num-workers", "1"]
        cli.main(["precompute", "--dataset", options.dataset, "--ref-store", f"{folder}/store", *required])


def stamping(options: argparse.Namespace, name: str, function):
    def call(*arguments, **more):
        result = function(*arguments, **more)
        stamp(options, name)
        return result

    return call


def stamp(options: argparse.Namespace, name: str) -> None:
    print(json.dumps([name, time.process_time(), time.time() - options.started]), flush=True)


def stamps_of(which: str, options: argparse.Namespace) -> list[tuple[str, float, float]]:
    """(step, CPU seconds, seconds since the process was started), in the order of their ends."""
    command = [sys.executable, __file__, "--model", options.model, "--dataset", options.dataset, "--dtype", options.dtype]
    command += ["--which", which, "--started", str(time.time())]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--which", choices=["bare", "real"], help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.which:
        return {"bare": bare, "real": real}[options.which](options)
    runs = {which: [] for which in ("bare", "real")}
    for _ in range(options.repeats):
        for which, found in runs.items():
            found.append(stamps_of(which, options))
    best = min(runs["real"], key=lambda stamps: stamps[-1][1])
    print("| until | CPU s | s |\n|---|---:|---:|")
    for name, cpu, seconds in best:
        print(f"| {name} | {cpu:.2f} | {seconds:.2f} |")
    totals = {which: [min(stamps[-1][i] for stamps in found) for i in (1, 2)] for which, found in runs.items()}
    print(f"| the model alone, imports and loading | {totals['bare'][0]:.2f} | {totals['bare'][1]:.2f} |")
    more = [all_ - alone for all_, alone in zip(totals["real"], totals["bare"], strict=True)]
    print(f"| **more than that** | **{more[0]:.2f}** | **{more[1]:.2f}** |")


if __name__ == "__main__":
    main()
