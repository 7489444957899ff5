"""Two curves of phase 1: throughput against tokens per batch, and cost against the size of the dataset. Draws both.

    python benchmarks/sweep.py --model DIR --dataset FILE --picture docs/pictures/throughput.png

1. The same pairs are scored with each budget, in turn and twice, the better of two counts. What falls with a small budget is sharing (prefixes
   are computed again in each batch) and the efficiency of small products; both are shown: tokens per second that the model computes, and
   useful tokens per second, prompts counted twice as others compute them.
2. Whole commands over the first 4, 8, 16, ... rows, loading included, each in a process of its own. A straight line is what linear cost means;
   its beginning is the start-up.

CPU seconds on the CPU (run it with OMP_NUM_THREADS=1), the clock on a GPU.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib
import numpy as np
import torch

from precompute.pairs import tokenize_rows
from precompute.rows.dataset import load_rows
from precompute.scorer.cpu import keep_freed_memory
from precompute.scorer.model import load_model, load_tokenizer
from precompute.scorer.scoring import score_batches
from store import DTYPES
from store.reader import open_store

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, StrMethodFormatter


def now() -> float:
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def throughput(args, budgets: list[int]) -> dict[int, tuple[float, float]]:
    """By budget: tokens per second that the model computes, and useful tokens per second."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()  # as the worker does
    rows = load_rows(str(args.dataset), split="train", limit=args.rows)
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, revision=None, dtype=args.dtype, device=device)
    pairs = tokenize_rows(tokenizer, rows.to_list(), 0, args.max_length).pairs
    sequences = [sequence for pair in pairs for sequence in pair.sequences]
    useful = sum(len(sequence.ids) for sequence in sequences)
    seconds: dict[int, list[float]] = {budget: [] for budget in budgets}
    computed = {}
    for _ in range(2):
        for budget in budgets:
            started = now()
            computed[budget] = sum(
                batch.num_model_tokens for batch in score_batches(model, sequences, layout="packed", tokens_per_batch=budget)
            )
            seconds[budget].append(now() - started)
    return {budget: (computed[budget] / min(seconds[budget]), useful / min(seconds[budget])) for budget in budgets}


def whole_commands(args, sizes: list[int]) -> dict[int, tuple[int, float]]:
    """By number of rows: useful tokens, and seconds of the whole command."""
    found = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            command = [
                sys.executable,
                str(ROOT / "cli.py"),
                "precompute",
                "--dataset",
                str(args.dataset),
                "--model",
                args.model,
                "--quiet",
            ]
            command += [
                "--max-length",
                str(args.max_length),
                "--dtype",
                args.dtype,
                "--limit",
                str(size),
                "--ref-store",
                str(store),
            ]
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
            if torch.cuda.is_available():
                seconds = time.perf_counter() - started
            lengths = open_store(store).lengths()
            useful = sum(
                2 * lengths["num_prompt_tokens"].to_numpy()
                + lengths["num_chosen_tokens"].to_numpy()
                + lengths["num_rejected_tokens"].to_numpy()
            )
            found[size] = (int(useful), seconds)
            print(f"{size:5} rows {useful:9,} tokens {seconds:8.1f} s", flush=True)
    return found


def draw(speeds: dict, costs: dict, picture: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    budgets = list(speeds)
    left.plot(budgets, [speeds[budget][0] for budget in budgets], "o-", label="computed by the model")
    left.plot(budgets, [speeds[budget][1] for budget in budgets], "s-", label="useful (prompts twice)")
    left.set(xscale="log", xlabel="--tokens-per-batch", ylabel="tokens per second", ylim=(0, None))
    left.set_xticks(budgets, [f"{budget:,}" for budget in budgets], rotation=45)
    left.minorticks_off()
    left.legend(frameon=False)
    tokens, seconds = np.array(list(costs.values())).T
    slope, start = np.polyfit(tokens, seconds, 1)
    right.plot(tokens, seconds, "o")
    right.plot(
        [0, max(tokens)],
        [start, start + slope * max(tokens)],
        "-",
        lw=1,
        label=f"{start:.0f} s + {1000 * slope:.2f} s per 1,000 tokens",
    )
    right.set(xlabel="useful tokens in the dataset", ylabel="seconds, whole command", xlim=(0, None), ylim=(0, None))
    right.xaxis.set_major_locator(MaxNLocator(5))
    right.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", type=Path, required=True, help="Parquet file of preference rows")
    parser.add_argument("--rows", type=int, default=8, help="of the first curve")
    parser.add_argument("--sizes", type=lambda text: [int(size) for size in text.split(",")], default=[2, 4, 8, 16, 32])
    parser.add_argument(
        "--budgets", type=lambda text: [int(size) for size in text.split(",")], default=[512, 1024, 2048, 4096, 16384]
    )
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--picture", type=Path, required=True)
    args = parser.parse_args()
    speeds = throughput(args, args.budgets)
    for budget, (computed, useful) in speeds.items():
        print(f"{budget:6} tokens per batch {computed:8.0f} computed tokens/s {useful:8.0f} useful tokens/s", flush=True)
    costs = whole_commands(args, args.sizes)
    draw(speeds, costs, args.picture)
    print(json.dumps({"throughput": speeds, "cost": costs}))


if __name__ == "__main__":
    main()
