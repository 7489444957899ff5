"""Phase 1 against TRL's own precompute pass and against the bare matrix products, in one run on the same rows.

    python benchmarks/scoring.py --model DIR --dataset FILE --rows 16 --max-length 2048
    python benchmarks/scoring.py --shape 7B --tokenizer DIR --dtype bfloat16 --dataset FILE --rows 256 --max-length 8192        on a GPU

The rows are the stretch of the file, in its order, that stands best for the whole: of all stretches of so many rows the one whose tokens per
pair, as each contender computes them, are nearest to the set's. The set's own counts are printed beside the stretch's.

Each contender goes from raw rows to readable log-probs in a process of its own, the model's loading included: TRL by constructing DPOTrainer
with precompute_ref_log_probs=True, ours by one worker that seals a store. Scoring alone, without loading, is then timed beside the bare products
of the same tokens, batch by batch in turn, so that both see the same machine: the linear layers with the model's own weights, by PyTorch's
F.linear and by what ours uses (precompute/scorer/cpu.py; the same on cores without AVX-512); attention's two products over what each branch sees, by flash attention's tile and the triangle at half the
square; the head on the completion positions.

On the CPU times are the process's CPU seconds, which other load on the machine does not stretch; run it with OMP_NUM_THREADS=1, for idle
threads count too. On a GPU they are seconds by the clock, and instead of the products the model FLOPs per second are given against the rate
of a large product in the same dtype.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from shapes import SHAPES, forward_flops, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import Process
from precompute.config import PrecomputeConfig
from precompute.pairs import Pair, tokenize_rows
from precompute.scorer.cpu import keep_freed_memory, linear
from precompute.scorer.model import load_model
from precompute.scorer.packing import PackedBatch, Sequence, pack, plan
from precompute.scorer.scoring import HEAD_TILE, ready_to_score, score_packed
from precompute.worker import run
from store import DTYPES
from store.reader import Store, open_store


def in_fresh_process(work, *arguments):
    """What one contender does to its process (how malloc behaves, for one) must not reach the next."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def now() -> float:
    """Seconds; only differences mean something."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def time_trl(args, rows: datasets.Dataset, batch_size: int, folder: Path) -> tuple[float, np.ndarray]:
    """Seconds, and float64 [pairs, 2] sums of chosen and rejected."""
    from trl import DPOConfig, DPOTrainer

    started = now()
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa"),
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
        dataset=(str(source),),
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


# --- the stretch of rows that stands for the set ----------------------------------------------------------------------------------------


def costs(pairs: list[Pair], args) -> dict[str, float]:
    """What a set of pairs costs each contender, per pair: positions computed, positions scored, and attention's squares."""
    lengths = [max(len(sequence.ids) for sequence in pair.sequences) for pair in pairs]
    sequences = [sequence for pair in pairs for sequence in pair.sequences]
    found = {
        "useful": sum(len(sequence.ids) for sequence in sequences),
        "squares": sum(len(sequence.ids) ** 2 for sequence in sequences),
        "scored": sum(sequence.num_scored for sequence in sequences),
        "ours": 0,
    }
    for size in args.trl_batch_sizes:
        batches = [lengths[first : first + size] for first in range(0, len(lengths), size)]
        found[f"trl {size}"] = sum(2 * len(batch) * max(batch) for batch in batches)
    for first in range(0, len(pairs), args.shard_size):
        ids = [sequence.ids for pair in pairs[first : first + args.shard_size] for sequence in pair.sequences]
        for batch in plan(ids, args.tokens_per_batch):
            found["ours"] += sum(len(ids[index]) - 1 - shared for index, shared in batch)
    return {name: value / len(pairs) for name, value in found.items()}


def choose(rows: datasets.Dataset, args) -> tuple[range, dict, dict]:
    """The stretch of args.rows rows that stands best for all rows; its costs and the set's."""
    pairs = tokenize_rows(AutoTokenizer.from_pretrained(args.model), rows.to_list(), 0, args.max_length).pairs
    whole = costs(pairs, args)
    if args.rows >= len(rows):
        return range(len(rows)), whole, whole
    by_row = {pair.row: pair for pair in pairs}
    best = (float("inf"), None, None)
    for first in range(len(rows) - args.rows + 1):
        stretch = [by_row[row] for row in range(first, first + args.rows) if row in by_row]
        if len(stretch) < args.rows:
            continue
        found = costs(stretch, args)
        distance = sum(np.log(found[name] / whole[name]) ** 2 for name in whole)
        best = min(best, (distance, first, found), key=lambda each: each[0])
    _, first, found = best
    if first is None:
        raise SystemExit(
            f"no {args.rows} neighbouring rows have prompts shorter than --max-length {args.max_length}: raise it, or lower --rows"
        )
    return range(first, first + args.rows), found, whole


# --- the limit --------------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def time_scoring_and_products(args, store: Store) -> dict[str, float]:
    """Seconds of scoring the store's pairs again, of its bare products by PyTorch and by our kernel, and FLOPs; batch by batch in turn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()  # as the worker does; the products gain from it too
    model = load_model(args.model, revision=None, dtype=args.dtype, device=device)
    head = model.get_output_embeddings().weight
    layers = [module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]
    found = dict.fromkeys(("scoring", "products", "our_products", "attention", "flops", "tokens"), 0.0)
    for first in range(0, store.num_pairs, args.shard_size):
        pairs = store.read(range(first, min(first + args.shard_size, store.num_pairs))).to_pylist()
        sequences = [
            Sequence(np.array(pair["prompt_ids"] + pair[side], dtype=np.int32), len(pair["prompt_ids"]))
            for pair in pairs
            for side in ("chosen_ids", "rejected_ids")
        ]
        with ready_to_score(model):
            for batch in pack(sequences, args.tokens_per_batch):
                found["scoring"] += _timed(device, lambda batch=batch: score_packed(model, batch).cpu())
                found["flops"] += forward_flops(model.config.get_text_config(), layers, head, batch)
                found["tokens"] += len(batch.input_ids)
                if device.type == "cpu":
                    attention = _attention_products(model.config.get_text_config(), batch, head.dtype)
                    found["attention"] += attention
                    found["products"] += attention + _timed(
                        device, lambda batch=batch: _linear_products(F.linear, layers, head, batch)
                    )
                    found["our_products"] += attention + _timed(
                        device, lambda batch=batch: _linear_products(linear, layers, head, batch)
                    )
    return found


def _linear_products(product, layers: list[torch.nn.Linear], head: torch.Tensor, batch: PackedBatch) -> None:
    inputs = {width: torch.ones(len(batch.input_ids), width, dtype=head.dtype) for width in {each.in_features for each in layers}}
    for layer in layers:
        product(inputs[layer.in_features], layer.weight, None)
    hidden = torch.ones(len(batch.targets), head.shape[1], dtype=head.dtype)
    num_rows, num_entries = HEAD_TILE["cpu"]
    for rows in hidden.split(num_rows):
        for entries in head.split(num_entries):
            product(rows, entries, None)


def _attention_products(config, batch: PackedBatch, dtype: torch.dtype) -> float:
    """Seconds of queries x keys and probabilities x values, for every layer (each timed once), query heads folded onto their key head."""
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    seconds = 0.0
    for branch in batch.branches:
        own = branch.stop - branch.start
        for num_keys, share in ((branch.num_context, 1.0), (own, 0.5)):
            if num_keys:
                query = torch.ones(groups * own, width, dtype=dtype)
                key, value = torch.ones(width, num_keys, dtype=dtype), torch.ones(num_keys, width, dtype=dtype)

                def products(query=query, key=key, value=value):
                    for tile in query.split(256):
                        (tile @ key) @ value

                seconds += share * _timed(torch.device("cpu"), products) * config.num_key_value_heads * config.num_hidden_layers
    return seconds


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured FLOP/s of an 8192 x 8192 x 8192 product."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
    seconds = [_timed(device, lambda: a @ b) for _ in range(20)]
    return 2 * 8192**3 / min(seconds)


def _timed(device: torch.device, work) -> float:
    _synchronize(device)
    started = now()
    work()
    _synchronize(device)
    return now() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id")
    parser.add_argument("--shape", choices=list(SHAPES), help="a random model of OLMo 3's kind instead")
    parser.add_argument("--tokenizer", help="folder or hub id; needed with --shape")
    parser.add_argument("--dataset", type=Path, required=True, help="Parquet file of preference rows")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--trl-batch-sizes",
        type=lambda text: [int(size) for size in text.split(",") if size],
        default=[8, 1, 2, 4, 16],
        help="empty: only refdpo and the limit",
    )
    parser.add_argument("--tokens-per-batch", type=int, default=16384)
    parser.add_argument("--shard-size", type=int, default=256)
    args = parser.parse_args()
    if (args.model is None) == (args.shape is None) or (args.shape and not args.tokenizer):
        raise SystemExit("give --model, or --shape with --tokenizer")
    datasets.disable_progress_bars()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.shape:
            args.model = str(folder / "model")
            make_model(args.shape, AutoTokenizer.from_pretrained(args.tokenizer), args.dtype, folder / "model")
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")  # for the contenders: nothing of an earlier run is reused
        rows = datasets.load_dataset("parquet", data_files=str(args.dataset), split="train", cache_dir=str(folder / "cache"))
        columns = [name for name in ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs") if name in rows.column_names]
        rows = rows.select_columns(columns)
        stretch, found, whole = choose(rows, args)
        rows = rows.select(stretch).flatten_indices()
        print(f"{args.dataset.parent.name}: rows {stretch.start} to {stretch.stop - 1}, max length {args.max_length}, {args.dtype}")
        print("tokens per pair        " + "".join(f"{name:>9}" for name in found if name != "squares"))
        for title, counts in (("these rows", found), ("the whole set", whole)):
            print(f"  {title:21}" + "".join(f"{value:9.0f}" for name, value in counts.items() if name != "squares"), flush=True)
        if isinstance(rows[0].get("prompt"), str) and isinstance(rows[0]["chosen"], list):
            trl_rows = rows.remove_columns("prompt")  # Dolci-Think's schema, on which TRL 1.16 fails
        else:
            trl_rows = rows
        source = folder / "rows.parquet"
        rows.to_parquet(source)

        ours, store = in_fresh_process(time_ours, args, source, folder / "store")
        sums = store.lengths()
        sums = np.stack([sums["ref_chosen_logps"].to_numpy(), sums["ref_rejected_logps"].to_numpy()], axis=1)
        print(f"ours, whole command     {ours:8.1f} s", flush=True)
        limit = in_fresh_process(time_scoring_and_products, args, store)
        print(f"  scoring alone         {limit['scoring']:8.1f} s   {limit['tokens'] / limit['scoring']:.0f} tokens/s")
        if torch.cuda.is_available():
            rate, peak = limit["flops"] / limit["scoring"], peak_rate(torch.device("cuda"), getattr(torch, args.dtype))
            print(f"  model FLOPs           {rate / 1e12:8.1f} TFLOP/s, {rate / peak:.2f} of a large product's {peak / 1e12:.1f}")
        else:
            for name, title in (("products", "products, F.linear"), ("our_products", "products, cpu.linear")):
                print(
                    f"  {title:22}{limit[name]:8.1f} s   {limit[name] / limit['scoring']:.2f} of scoring (attention's {limit['attention']:.1f} s)"
                )
        times = {}
        for batch_size in args.trl_batch_sizes:
            # A copy in its own file each time: TRL caches by content.
            fresh = datasets.Dataset.from_list(trl_rows.to_list(), features=trl_rows.features)
            times[batch_size], theirs = in_fresh_process(time_trl, args, fresh, batch_size, folder / f"trl{batch_size}")
            difference = np.abs(theirs - sums).max() if len(theirs) == len(sums) else float("nan")
            print(
                f"TRL, batch size {batch_size:2d}      {times[batch_size]:8.1f} s   {times[batch_size] / ours:.2f} x ours;"
                f" sums agree to {difference:.1e} nats",
                flush=True,
            )
        if times:
            best = min(times, key=times.get)
            print(f"against TRL's best ({best}): {times[best] / ours:.2f} x")


if __name__ == "__main__":
    main()
