"""What a run on GPUs would take, from counted tokens: nothing is timed, no model is loaded.

    python benchmarks/estimate.py --dataset FILE --tokenizer DIR --max-length 8192 --micro-batch 4 --set-median 2138 --set-p95 15433

1. count    tokens of the sample's pairs: what stock computes at this micro-batch (padded, prompts twice), what the packed layout computes
2. scale    to the whole set, if its median and 95th percentile are given: lengths log-normal, sharing and padding as in the sample
3. FLOPs    that a pair needs in training (train/flops.py) for a model of the given shape
4. hours    at several utilizations of the GPUs' dense peak (MFU): assumed, not measured

The scoring of phase 1 is one forward: a third of what training needs. It is added. Gradient checkpointing computes a forward again, which
no MFU counts as useful: at the same busyness of the GPU it lowers the MFU to three quarters.
"""

import argparse
import math
from pathlib import Path
from statistics import NormalDist

import datasets
import numpy as np
import torch
from training import SHAPES, tokens_per_pair
from transformers import AutoTokenizer, Olmo3Config, Olmo3ForCausalLM

from precompute.pairs import tokenize_rows
from train.flops import PEAK_FLOPS, PairFlops

MFUS = (0.02, 0.086, 0.15, 0.30, 0.45)


def truncated_mean(median: float, p95: float, longest: int) -> float:
    """E[min(X, longest)] of a log-normal X with these quantiles."""
    normal = NormalDist()
    mu, sigma = math.log(median), math.log(p95 / median) / normal.inv_cdf(0.95)
    z = (math.log(longest) - mu) / sigma
    return math.exp(mu + sigma**2 / 2) * normal.cdf(z - sigma) + longest * (1 - normal.cdf(z))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="Parquet file of preference rows")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--shape", choices=list(SHAPES), default="7B")
    parser.add_argument("--max-length", type=int, default=8192)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--set-median", type=float, help="tokens of the longer side in the whole set")
    parser.add_argument("--set-p95", type=float)
    parser.add_argument("--pairs", type=int, default=150_000)
    parser.add_argument("--gpu", choices=list(PEAK_FLOPS), default="B200")
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--now", type=float, default=0.37, help="pairs per second of the run to compare with")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    rows = datasets.load_dataset("parquet", data_files=str(args.dataset), split="train")
    pairs = tokenize_rows(tokenizer, rows.to_list(), 0, args.max_length).pairs
    lengths = np.array([[len(each.prompt_ids), len(each.chosen_ids), len(each.rejected_ids)] for each in pairs])
    rng = np.random.default_rng(0)
    packed, padded = np.mean([tokens_per_pair(rng.permutation(lengths), [args.micro_batch]) for _ in range(200)], axis=0)
    longer = (lengths[:, 0] + lengths[:, 1:].max(axis=1)).mean()
    print(
        f"{len(pairs)} pairs, longer side {longer:,.0f} tokens on average; per pair {packed:,.0f} packed, {padded:,.0f} padded at"
    )
    print(f"micro-batch {args.micro_batch}: {padded / packed:.2f} times as many")

    with torch.device("meta"):
        config = Olmo3Config(vocab_size=-(-len(tokenizer) // 128) * 128, tie_word_embeddings=False, **SHAPES[args.shape])
        flops = PairFlops.of(Olmo3ForCausalLM(config))
    factor = 1.0
    if args.set_median:
        mean = truncated_mean(args.set_median, args.set_p95, args.max_length)
        factor = mean / longer
        print(f"the whole set: {mean:,.0f} tokens, {factor:.2f} times the sample's")
    needed = flops.of_pairs(*(lengths * factor).T).mean()
    print(f"a pair needs {needed / 1e12:,.0f} TFLOPs in training, {needed / 3e12:,.0f} to be scored")
    peak = PEAK_FLOPS[args.gpu] * args.gpus
    print(
        f"{args.now} pairs/s are {args.now * needed / peak:.1%} of {args.gpus} x {args.gpu}'s peak, and {args.pairs / args.now / 3600:,.0f} h"
    )
    stock = (10 / 8) * padded / packed
    print(f"computing {stock:.2f} times less (padding, prompts, 10/8 for the reference) at the same FLOPs per second:", end=" ")
    print(f"{args.pairs / args.now / 3600 / stock:,.0f} h")
    for mfu in MFUS:
        hours = args.pairs * needed / (peak * mfu) / 3600
        print(
            f"MFU {mfu:5.1%}: training {hours:6.1f} h, {args.pairs / hours / 3600:6.2f} pairs/s; phase 1 at the same {hours / 3:5.1f} h"
        )


if __name__ == "__main__":
    main()
