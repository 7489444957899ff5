"""Attention over packed rows on a CPU: this project's kernel against PyTorch's flash kernel branch by branch, and against bare products.

    OMP_NUM_THREADS=1 python benchmarks/attention.py --heads 9 --kv-heads 3 --head-dim 64

Each line is a row of branches of one length over one context, float32. GFLOP/s count what tokens see: 4 per query, visible key and channel.
Bare products: queries x keys and probabilities x values, 256 queries at a time, a branch's own triangle taken as half its square's time.
"""

import argparse
import time

import torch

from precompute.scorer import attention
from precompute.scorer.attention import PackedLayout
from precompute.scorer.cpu import keep_freed_memory
from precompute.scorer.packing import Branch

SHAPES = [(0, 40), (0, 100), (0, 200), (0, 300), (0, 600), (0, 1200), (0, 3000), (100, 300), (400, 300), (1200, 40), (1200, 600)]
"""(tokens of context, tokens of a branch)"""
TOKENS = 4000
"""Of all branches of a row together, about."""


def best(work, rounds: int = 7) -> float:
    """CPU seconds per call of one thread, by the clock with more."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    work()
    seconds = []
    for _ in range(rounds):
        started = now()
        work()
        seconds.append(now() - started)
    return min(seconds)


def row_of(num_context: int, length: int) -> tuple[Branch, ...]:
    branches = [Branch(0, num_context, ())] if num_context else []
    context = ((0, num_context),) if num_context else ()
    for start in range(num_context, num_context + max(1, TOKENS // length) * length, length):
        branches.append(Branch(start, start + length, context))
    return tuple(branches)


def bare_products(args, branches: tuple[Branch, ...]) -> float:
    """Seconds."""
    seconds, timed = 0.0, {}
    for branch in branches:
        own = branch.stop - branch.start
        for num_keys, share in ((branch.num_context, 1.0), (own, 0.5)):
            if num_keys and (own, num_keys) not in timed:
                query = torch.randn(args.heads // args.kv_heads * own, args.head_dim)
                key, value = torch.randn(args.head_dim, num_keys), torch.randn(num_keys, args.head_dim)
                timed[own, num_keys] = best(lambda q=query, k=key, v=value: [(tile @ k) @ v for tile in q.split(256)])
            seconds += share * timed.get((own, num_keys), 0.0) * args.kv_heads
    return seconds


def by_flash(query, key, value, branches: tuple[Branch, ...]) -> torch.Tensor:
    """PyTorch's flash kernel, called over each branch, causally, and over its context; the two merged by their log-sum-exps."""
    flash, results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, []
    for branch in branches:
        own = slice(branch.start, branch.stop)
        result, sums = flash(query[:, :, own], key[:, :, own], value[:, :, own], 0.0, True)
        for start, stop in branch.context:
            over, of_context = flash(query[:, :, own], key[:, :, start:stop], value[:, :, start:stop], 0.0, False)
            result = torch.lerp(over, result, torch.sigmoid(sums - of_context)[..., None])
        results.append(result)
    return torch.cat(results, dim=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--window", type=int)
    args = parser.parse_args()
    keep_freed_memory()
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; GFLOP/s of what is seen")
    print(f"{'context':>8}{'branch':>8}{'kernel':>9}{'flash':>9}{'bare':>9}{'kernel / flash':>16}")
    for num_context, length in SHAPES:
        branches = row_of(num_context, length)
        tensors = [
            torch.randn(1, branches[-1].stop, heads, args.head_dim).transpose(1, 2)
            for heads in (args.heads, args.kv_heads, args.kv_heads)
        ]
        layout = PackedLayout(branches, tensors[0].device)

        def attend(tensors=tensors, layout=layout):
            attention.attend(torch.nn.Identity(), *tensors, attention.PackedMask(layout, args.window))

        with torch.inference_mode():
            kernel = best(attend)
            if args.window is None:
                flash = best(lambda tensors=tensors, branches=branches: by_flash(*tensors, branches), rounds=4)
            else:  # that kernel has no window; with a mask it is another one
                flash = best(
                    lambda tensors=tensors, layout=layout: attention._attend_in_blocks(*tensors, None, args.window, layout),
                    rounds=4,
                )
        seen = 0
        for branch in branches:
            places = torch.arange(branch.num_context + 1, branch.num_context + branch.stop - branch.start + 1)
            seen += int(places.clamp(max=args.window or branches[-1].stop).sum())
        flops = 4e-9 * args.heads * args.head_dim * seen
        bare = f"{flops / bare_products(args, branches):9.1f}" if args.window is None else f"{'-':>9}"
        print(
            f"{num_context:8}{length:8}{flops / kernel:9.1f}{flops / flash:9.1f}{bare}{flash / kernel:14.2f} x",
            flush=True,
        )


if __name__ == "__main__":
    main()
