"""How far apart N workers finish: a simulation with real lengths, the product's shard sizes and the product's claiming order.

    python benchmarks/balance.py --tokenizer DOLMA2 --dataset dolci_think_dpo_sample/train.parquet arena_hard_v2_delta/train.parquet

Real: the lengths (the rows of each dataset are tokenized, then drawn with replacement up to --rows), the cost estimate and the order
(precompute/plan.py), one shard claimed ahead of the one being scored, as in precompute/worker.py. "think" takes the ratios of the first
dataset's rows (chosen to rejected, prompt to completion, bytes to tokens) and stretches them to the lengths stated for the whole of
Dolci-Think: log-normal, median 2,138 tokens, 95 % within 15,433. Simulated: the time of a pair, as the arithmetic of OLMo 3 7B on the
positions that the packed layout computes: linear in them, and quadratic in attention, three of four layers within a window of 4,096.
Not in it: the noise of devices and disks, the start of the workers, batches that are not full.
"""

import argparse
import heapq
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from precompute.pairs import tokenize_rows
from precompute.plan import claiming_order, default_shard_size, row_costs
from precompute.rows.dataset import load_rows
from precompute.scorer.model import load_tokenizer

LINEAR, ATTENTION = 2 * 7.0e9, 4 * 4096
"""Operations per position, and per layer and (query, key)."""
FULL_LAYERS, WINDOW_LAYERS, WINDOW = 8, 24, 4096
THINK_MEDIAN, THINK_P95 = 2138, 15433


@dataclass(frozen=True)
class Rows:
    """What is known of some rows: tokens (int64 [rows], the sides without their prompt), and bytes of text as plan.py estimates them."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    text: np.ndarray

    def take(self, indices: np.ndarray) -> "Rows":
        return Rows(*(column[indices] for column in (self.prompt, self.chosen, self.rejected, self.text)))

    @property
    def longer(self) -> np.ndarray:
        return self.prompt + np.maximum(self.chosen, self.rejected)

    def stretched(self, factor: np.ndarray) -> "Rows":
        return Rows(*((column * factor).astype(np.int64) for column in (self.prompt, self.chosen, self.rejected, self.text)))


def measure(path: str, tokenizer) -> Rows:
    """Tokenize a dataset uncut."""
    rows = load_rows(path, split="train")
    pairs = tokenize_rows(tokenizer, rows.to_list(), 0, 1 << 30).pairs
    text = row_costs(rows.with_format("arrow")[:], 1 << 30)[[pair.row for pair in pairs]]
    columns = ([len(getattr(pair, f"{part}_ids")) for pair in pairs] for part in ("prompt", "chosen", "rejected"))
    return Rows(*map(np.array, columns), text)


def seconds(rows: Rows, max_length: int) -> np.ndarray:
    """Time of each pair, in units of one operation."""

    def pairs_seen(start, stop):  # (query, key) of the queries at start ... stop - 1
        def up_to(n):
            windowed = np.where(n <= WINDOW, n * (n + 1) / 2, WINDOW * (WINDOW + 1) / 2 + (n - WINDOW) * WINDOW)
            return FULL_LAYERS * n * (n + 1) / 2 + WINDOW_LAYERS * windowed

        return up_to(stop) - up_to(start)

    prompt = np.minimum(rows.prompt, max_length)
    ends = [np.minimum(prompt + side, max_length) for side in (rows.chosen, rows.rejected)]
    positions = prompt + sum(end - prompt for end in ends)
    attended = pairs_seen(0 * prompt, prompt) + sum(pairs_seen(prompt, end) for end in ends)
    return LINEAR * positions + ATTENTION * attended


def in_shards(values: np.ndarray, shard_size: int) -> np.ndarray:
    return np.add.reduceat(values, np.arange(0, len(values), shard_size))


def finishing_times(orders: list[list[int]], cost: np.ndarray, slowness: np.ndarray) -> np.ndarray:
    """When each worker is done. Each claims its next shard when it begins to score the one before."""
    taken = np.zeros(len(cost), dtype=bool)
    positions = [0] * len(orders)
    at_hand: list[int | None] = [None] * len(orders)

    def next_of(worker: int) -> int | None:
        while positions[worker] < len(cost):
            shard = orders[worker][positions[worker]]
            positions[worker] += 1
            if not taken[shard]:
                taken[shard] = True
                return shard
        return None

    finished = np.zeros(len(orders))
    for worker in range(len(orders)):
        at_hand[worker] = next_of(worker)
    events = [(0.0, worker) for worker in range(len(orders))]
    while events:
        now, worker = heapq.heappop(events)
        finished[worker] = now
        if (shard := at_hand[worker]) is not None:
            at_hand[worker] = next_of(worker)
            heapq.heappush(events, (now + slowness[worker] * cost[shard], worker))
    assert taken.all()
    return finished


def spread(rows: Rows, max_length: int, shard_size: int, workers: int, in_order: bool, straggler: bool) -> float:
    """Slowest worker's finishing time over the mean of all, minus 1. `in_order`: claim by number, beginning apart, as before plan.py."""
    cost = in_shards(seconds(rows, max_length), shard_size)
    capped = np.minimum(rows.text, 2 * 4 * max_length)
    estimate = in_shards(capped, shard_size)
    if in_order:
        numbers = list(range(len(cost)))
        orders = [numbers[(cut := len(cost) * place // workers) :] + numbers[:cut] for place in range(workers)]
    else:
        orders = [claiming_order(estimate, range(len(cost)), place, workers) for place in range(workers)]
    slowness = np.ones(workers)
    if straggler:
        slowness[0] = 1 / 0.8
    finished = finishing_times(orders, cost, slowness)
    return finished.max() / finished.mean() - 1


def think(rows: Rows, count: int, generator: np.random.Generator) -> Rows:
    sample = rows.take(generator.integers(0, len(rows.text), count))
    sigma = np.log(THINK_P95 / THINK_MEDIAN) / 1.6449
    wanted = np.exp(generator.normal(np.log(THINK_MEDIAN), sigma, count))
    return sample.stretched(wanted / sample.longer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="With a chat template where the rows are conversations.")
    parser.add_argument("--dataset", nargs="+", required=True)
    parser.add_argument("--rows", type=int, default=150_000)
    parser.add_argument("--max-length", type=int, default=8192)
    parser.add_argument("--shard-sizes", type=int, nargs="+", help="default: the product's, and 256")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64])
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    tokenizer = load_tokenizer(options.tokenizer)
    measured = {Path(path).parent.name or path: measure(path, tokenizer) for path in options.dataset}
    draws = {name: rows.take(generator.integers(0, len(rows.text), options.rows)) for name, rows in measured.items()}
    draws["think"] = think(next(iter(measured.values())), options.rows, generator)
    draws["think, sorted"] = draws["think"].take(np.argsort(draws["think"].longer, kind="stable"))
    print("| rows | median | p95 | within 8,192 |\n|---|---:|---:|---:|")
    for name, rows in draws.items():
        median, p95 = np.quantile(rows.longer, [0.5, 0.95])
        print(f"| {name} | {median:,.0f} | {p95:,.0f} | {np.mean(rows.longer <= 8192):.1%} |")
    workers = " | ".join(f"{number}" for number in options.workers)
    print(f"\n| rows | shard size | order | {workers} | {options.workers[-1]}, one 20 % slower |")
    print("|---|---:|---|" + "---:|" * (len(options.workers) + 1))
    for name, rows in draws.items():
        for shard_size in options.shard_sizes or [default_shard_size(options.rows), 256]:
            for in_order in (True, False):
                cases = [(number, False) for number in options.workers] + [(options.workers[-1], True)]
                found = (spread(rows, options.max_length, shard_size, number, in_order, slow) for number, slow in cases)
                cells = " | ".join(f"{each:.1%}" for each in found)
                print(f"| {name} | {shard_size} | {'by number' if in_order else 'plan.py'} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
