"""Phase 1 against TRL's own precompute pass and against the bare matrix products, in one run on the same rows.

    python benchmarks/scoring.py --model DIR --dataset FILE --rows 64 --max-length 2048 --trl-batch-sizes 8,1,2,4

Each contender goes from raw rows to readable log-probs, the model's loading included: TRL by constructing DPOTrainer with
precompute_ref_log_probs=True, ours by one worker that seals a store. The bare products are the linear layers of the tokens that ours
computed, in the same batches, with the model's own weights; the head on the completion positions; and the attention's FLOPs at the rate
that the linear layers reach. On the CPU times are the process's CPU seconds, which other load on the machine does not stretch; run it
with OMP_NUM_THREADS=1, for idle threads count too. On a GPU they are seconds by the clock.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import Process
from precompute.model import DTYPES, load_model
from precompute.packing import Sequence, pack
from precompute.scoring import HEAD_TILE
from precompute.worker import PrecomputeConfig, run
from store.reader import Store, open_store


def now() -> float:
    """Seconds; only differences mean something."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def time_trl(args, rows: datasets.Dataset, batch_size: int, folder: Path) -> tuple[float, np.ndarray]:
    """Seconds, and float64 [pairs, 2] sums of chosen and rejected."""
    from trl import DPOConfig, DPOTrainer

    started = now()
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype], attn_implementation="sdpa"),
        args=DPOConfig(
            str(folder),
            use_cpu=not torch.cuda.is_available(),
            bf16=args.dtype == "bfloat16",
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=batch_size,
            max_length=args.max_length,
            report_to=[],
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )
    seconds = now() - started
    columns = trainer.train_dataset.with_format("numpy")
    return seconds, np.stack([columns["ref_chosen_logps"], columns["ref_rejected_logps"]], axis=1).astype(np.float64)


def time_ours(args, source: Path, folder: Path) -> tuple[float, Store]:
    started = now()
    config = PrecomputeConfig(
        dataset=str(source),
        split="train",
        dataset_revision=None,
        limit=args.rows,
        model=args.model,
        revision=None,
        tokenizer=args.model,
        chat_template=None,
        max_length=args.max_length,
        dtype=args.dtype,
        shard_size=args.shard_size,
        ref_store=folder,
        preset=None,
        tokens_per_batch=args.tokens_per_batch,
    )
    run(config, Process(0, 1, 0))
    store = open_store(folder)
    return now() - started, store


@torch.inference_mode()
def time_products(args, store: Store) -> tuple[float, dict[str, int]]:
    """Seconds of the bare matrix products of what ours computed, and counts of tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(args.model, revision=None, dtype=args.dtype, device=device)
    config = model.config.get_text_config()
    heads, head_dim = (
        config.num_attention_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    head = model.get_output_embeddings().weight
    linear = [module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]
    widest = max(module.in_features for module in linear)
    num_rows, num_entries = HEAD_TILE[device.type]
    seconds = attention_flops = linear_flops = 0.0
    counts = {"model": 0, "scored": 0, "useful": 0}
    for first in range(0, store.num_pairs, args.shard_size):
        pairs = store.read(range(first, min(first + args.shard_size, store.num_pairs))).to_pylist()
        sequences = [
            Sequence(np.array(pair["prompt_ids"] + pair[side], dtype=np.int32), len(pair["prompt_ids"]))
            for pair in pairs
            for side in ("chosen_ids", "rejected_ids")
        ]
        counts["useful"] += sum(len(sequence.ids) for sequence in sequences)
        for batch in pack(sequences, args.tokens_per_batch):
            tokens = len(batch.input_ids)
            x = torch.randn(tokens, widest, device=device, dtype=head.dtype)
            hidden = torch.randn(len(batch.targets), head.shape[1], device=device, dtype=head.dtype)
            inputs = {width: x[:, :width].contiguous() for width in {module.in_features for module in linear}}
            _synchronize(device)
            started = now()
            for module in linear:
                F.linear(inputs[module.in_features], module.weight)
            for start in range(0, len(hidden), num_rows):
                for first in range(0, len(head), num_entries):
                    F.linear(hidden[start : start + num_rows], head[first : first + num_entries])
            _synchronize(device)
            seconds += now() - started
            linear_flops += sum(2 * tokens * module.weight.numel() for module in linear) + 2 * len(hidden) * head.numel()
            for branch in batch.branches:
                own = branch.stop - branch.start
                visible = own * branch.num_context + own * (own + 1) / 2
                attention_flops += 4 * visible * heads * head_dim * config.num_hidden_layers
            counts["model"] += tokens
            counts["scored"] += len(batch.targets)
    return seconds * (1 + attention_flops / linear_flops), counts


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", type=Path, required=True, help="Parquet file of preference rows")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the random choice of rows")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--trl-batch-sizes", default="8,1,2,4")
    parser.add_argument("--tokens-per-batch", type=int, default=16384)
    parser.add_argument("--shard-size", type=int, default=256)
    args = parser.parse_args()
    datasets.disable_progress_bars()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        datasets.config.HF_DATASETS_CACHE = folder / "cache"  # nothing of an earlier run is reused
        rows = datasets.load_dataset("parquet", data_files=str(args.dataset), split="train", cache_dir=str(folder / "cache"))
        columns = [name for name in ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs") if name in rows.column_names]
        rows = rows.select_columns(columns).shuffle(seed=args.seed).select(range(min(args.rows, len(rows)))).flatten_indices()
        if isinstance(rows[0].get("prompt"), str) and isinstance(rows[0]["chosen"], list):
            trl_rows = rows.remove_columns("prompt")  # Dolci-Think's schema, on which TRL 1.16 fails
        else:
            trl_rows = rows
        source = folder / "rows.parquet"
        rows.to_parquet(source)

        ours, store = time_ours(args, source, folder / "store")
        products, counts = time_products(args, store)
        sums = store.lengths()
        sums = np.stack([sums["ref_chosen_logps"].to_numpy(), sums["ref_rejected_logps"].to_numpy()], axis=1)
        print(
            f"{args.dataset.parent.name}: {len(rows)} rows, {store.num_pairs} pairs, {counts['useful']:,} tokens with prompts twice"
        )
        print(
            f"ours                    {ours:8.1f} s   {counts['model']:,} model tokens ({counts['model'] / counts['useful']:.2f} of the above)"
        )
        print(f"bare matrix products    {products:8.1f} s   {products / ours:.2f} of ours")
        times = {}
        for batch_size in [int(size) for size in args.trl_batch_sizes.split(",")]:
            # A copy in its own file each time: TRL caches by content.
            fresh = datasets.Dataset.from_list(trl_rows.to_list(), features=trl_rows.features)
            times[batch_size], theirs = time_trl(args, fresh, batch_size, folder / f"trl{batch_size}")
            difference = np.abs(theirs - sums).max() if len(theirs) == len(sums) else float("nan")
            print(
                f"TRL, batch size {batch_size:2d}      {times[batch_size]:8.1f} s   {times[batch_size] / ours:.2f} x ours; sums agree to {difference:.1e} nats"
            )
        best = min(times, key=times.get)
        print(f"against TRL's best ({best}): {times[best] / ours:.2f} x")


if __name__ == "__main__":
    main()
