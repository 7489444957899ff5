"""Phase 2 against stock TRL, in one run on the same rows: with its online reference, with its own precompute pass, and from a store.

    python benchmarks/training.py --model DIR --dataset FILE --max-length 2048 --effective-batch-size 8 --steps 1 --json RESULT
    python benchmarks/training.py --shape 7B --dtype bfloat16 --max-length 8192 --effective-batch-size 64 --steps 8 --dataset FILE --tokenizer DIR

1. sample   random rows whose tokens per pair, padding at each micro-batch included, are nearest to the set's: few rows must stand for many
2. phase 1  the store that ours trains from, its scoring timed
3. train    each contender with each micro-batch, in processes of its own, for its memory is its own; all under DeepSpeed ZeRO-2
4. compare  each at its best

Every contender trains the same pairs in the same global batches, which is checked, not assumed. The first step, on the set's shortest rows,
is left out: kernels are chosen in it. On the CPU times are CPU seconds of all processes together, which other load on the machine does not
stretch; run it with OMP_NUM_THREADS=1, for idle threads count too. On GPUs they are seconds by the clock. Passes over the reference
(stock's, and our phase 1) are the scoring of the timed rows alone, without tokenizing and loading, on both sides.

`--seconds N`: no contender is begun that would not end within N seconds, by the longest so far; which were left out is said.

With --json a run that was cut short goes on where it was: what the file has is not measured again. `--repeats 2` runs all contenders in turn, twice;
the faster of each counts, and both are printed.

`--products`, on a CPU: after each of our micro-steps by tokens the bare matrix products of its row (products.py), to compare the two. Two steps
are then left out, both on the rows of the timed one with the most tokens: training keeps the memory it frees, and what it pays for that, a page
fault per 4 kB, it pays nearly all in its first two large steps. Stock pays in every step.

`--lora R` trains an adapter of rank R at every linear layer instead of all weights, in all contenders; stock's online reference is then its own,
the policy with the adapter off.

`--shape` makes a random model of OLMo 3's shape (1B: a smaller one of the same kind) instead of `--model`; its numbers mean nothing, its
FLOPs do. MFU counts what the pairs need (train/flops.py), for all contenders alike, over the GPUs' dense peak.
"""

import argparse
import gc
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}

from apart import apart
from shapes import SHAPES, make_model

POOL = 2000
"""Rows of which the sample is chosen, at most."""

MICRO_BATCHES = (1, 2, 4, 8)
"""At which the sample's padding is that of the set, whichever of them are measured: the sample is the same each time."""

FREE = ("json", "left_out", "only", "work", "contenders", "micro_batches", "repeats", "seconds")
"""Options that do not change what is measured, only how much of it."""

CONTENDERS = ("online", "precompute", "tokens", "packed", "padded")
"""Stock TRL with a reference beside the policy; stock with its own pass; from a store: micro-batches by tokens, packed ones of as many pairs as
stock's, padded ones."""

OURS = ("tokens", "packed")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id")
    parser.add_argument("--shape", choices=list(SHAPES), help="a random model of OLMo 3's kind instead")
    parser.add_argument("--tokenizer", help="folder or hub id; needed with --shape")
    parser.add_argument("--dataset", type=Path, required=True, help="Parquet file of preference rows")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of rows and of their order")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--loss-type", default="sigmoid_norm")
    parser.add_argument("--effective-batch-size", type=int, default=16)
    parser.add_argument("--micro-batches", default="1,2,4,8")
    parser.add_argument("--contenders", default="online,precompute,tokens", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--tokens-per-batch", type=int, default=16384, help="of the contender `tokens`")
    parser.add_argument("--repeats", type=int, default=1, help="of every contender, in turn")
    parser.add_argument("--products", action="store_true", help="time the bare matrix products of our micro-steps too")
    parser.add_argument("--steps", type=int, default=2, help="timed optimizer steps, after those that are left out")
    parser.add_argument("--lora", type=int, help="rank of an adapter; without it all weights are trained")
    parser.add_argument("--no-gradient-checkpointing", action="store_true")
    parser.add_argument("--torch-compile", action="store_true")
    parser.add_argument("--json", type=Path, help="keep the results here, and go on from what it has")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of the clock, from the start  [default: no end]")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # CONTENDER:MICRO_BATCH, the run of one process
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.left_out = 2 if args.products else 1
    return args


def now() -> float:
    """Seconds; only differences mean something."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


# --- one contender, in each rank of a torchrun of its own -------------------------------------------------------------------------------


def run_one(args) -> None:
    import datasets
    import numpy as np
    import torch
    from products import Products
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from launch import Process, launched
    from precompute.scorer.compiled import use_compiler
    from precompute.scorer.cpu import keep_freed_memory
    from store.reader import open_store
    from train import lora
    from train.balance import shuffled
    from train.config import ZERO2
    from train.data import Lengths, dataset_of, lengths_of
    from train.flops import PairFlops
    from train.ranks import join, peak_memory
    from train.speed import Speed
    from train.trainer import StoreDPOTrainer

    contender, micro_batch = args.only.split(":")
    process = launched() or Process(0, 1, 0)
    join(process)
    datasets.disable_progress_bars()

    class StepTimes(TrainerCallback):
        """When steps end."""

        def __init__(self):
            self.ends = []

        def on_step_end(self, *_, **__):
            self.ends.append(now())

    def name_of(chosen: np.ndarray, rejected: np.ndarray) -> str:
        """Of a pair, by the ids of its two sequences, int64."""
        return hashlib.sha256(chosen.tobytes() + b"|" + rejected.tobytes()).hexdigest()[:16]

    class Watched:
        """Which pairs reach each step's loss, and how many tokens those of the timed steps have; alike for all contenders."""

        def _compute_loss(self, model, inputs, return_outputs):
            lengths = inputs["attention_mask"].sum(dim=1).tolist()
            rows = [row[:length] for row, length in zip(inputs["input_ids"].cpu().numpy(), lengths, strict=True)]
            half = len(rows) // 2
            names = [name_of(rows[i], rows[half + i]) for i in range(half)]
            self.seen.setdefault(self.state.global_step, []).extend(names)
            if self.state.global_step >= args.left_out:
                whole, scored = (inputs[name].sum(dim=1).cpu().numpy() for name in ("attention_mask", "completion_mask"))
                padded = inputs["attention_mask"].numel()
                self.counts.count(Lengths((whole - scored)[:half], scored[:half], scored[half:]), padded)
            return super()._compute_loss(model, inputs, return_outputs)

    class Stock(Watched, DPOTrainer):
        """TRL's trainer; its own pass over the reference is timed."""

        pass_seconds = 0.0

        def _precompute_ref_logps(self, dataset, name, batch_size):
            order = shuffled(len(dataset), args.seed, epoch=0)
            parts = []
            first = args.left_out * args.effective_batch_size
            for rows in (order[:first], order[first:]):  # the warm-up's, then the timed
                started = now()
                parts.append(super()._precompute_ref_logps(dataset.select(rows), name, batch_size))
                self.pass_seconds = now() - started
            return datasets.concatenate_datasets(parts).select(np.argsort(order))

    class Ours(Watched, StoreDPOTrainer):
        pass

    class ByTokens(StoreDPOTrainer):
        """Watched as the others; and the bare products of each row, in turn with its micro-step."""

        products, bare, steps_seconds = None, {}, 0.0

        def training_step(self, model, inputs, *rest):
            started = now()
            loss = super().training_step(model, inputs, *rest)
            if self.products is not None:
                ended, (row,) = now(), inputs["row"].arranged.rows
                bare = self.products.seconds(row.layout.branches, len(inputs["row"].arranged.targets))
                if self.started:  # before that their process, too, pays for its memory
                    self.steps_seconds += ended - started
                    self.bare = {kind: self.bare.get(kind, 0.0) + seconds for kind, seconds in bare.items()}
            return loss

        def _compute_loss(self, model, inputs, return_outputs):
            row, self.started = inputs["row"], self.state.global_step >= args.left_out
            if row.micro_batch.weight:
                read = self.train_dataset[list(row.micro_batch.pairs)]
                sides = [
                    [np.array(prompt + ids) for prompt, ids in zip(read["prompt_ids"], read[f"{side}_ids"], strict=True)]
                    for side in ("chosen", "rejected")
                ]
                self.seen.setdefault(self.state.global_step, []).extend(map(name_of, *sides))
                if self.started:
                    self.counts.count(row.lengths, row.lengths.padded)
            return super()._compute_loss(model, inputs, return_outputs)

    by_tokens = {}
    pairs = int(micro_batch)
    if contender == "tokens":
        by_tokens, pairs = {"tokens_per_batch": pairs, "pairs_per_step": args.effective_batch_size}, 1
    settings = DPOConfig(
        output_dir=str(args.work / "unused"),
        use_cpu=not torch.cuda.is_available(),
        bf16=args.dtype == "bfloat16",
        deepspeed=str(ZERO2),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=pairs,
        gradient_accumulation_steps=args.effective_batch_size // (pairs * process.world),
        max_steps=args.left_out + args.steps,
        max_length=args.max_length,
        loss_type=[args.loss_type],
        beta=5.0 if args.loss_type == "sigmoid_norm" else 0.1,
        learning_rate=1e-6,
        logging_steps=10**6,
        logging_strategy="steps",
        gradient_checkpointing=not args.no_gradient_checkpointing,
        torch_compile=args.torch_compile and contender not in OURS,
        precompute_ref_log_probs=contender != "online",
        precompute_ref_batch_size=pairs,
        remove_unused_columns=contender in ("online", "precompute"),
        seed=args.seed,
        data_seed=args.seed,
    )
    use_compiler(args.torch_compile and contender in OURS, layout="packed")
    load = {"dtype": getattr(torch, args.dtype), "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(args.model, **load).to(settings.device)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    times = StepTimes()
    kind = None
    if args.lora:
        from peft import LoraConfig

        kind = LoraConfig(task_type="CAUSAL_LM", r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear")
    if contender in ("online", "precompute"):
        rows = datasets.load_dataset(
            "parquet", data_files=str(args.work / "trl.parquet"), split="train", cache_dir=str(args.work / args.only)
        )
        beside = contender == "online" and kind is None
        reference = AutoModelForCausalLM.from_pretrained(args.model, **load).to(settings.device) if beside else None
        given = {"model": model, "ref_model": reference, "peft_config": kind}
        trainer = Stock(args=settings, train_dataset=rows, processing_class=tokenizer, callbacks=[times], **given)
    else:
        store = open_store(args.work / "store")
        rows = dataset_of(store, args.max_length)
        lengths = lengths_of(rows, store, args.max_length) if contender in OURS else None
        policy = model if kind is None else lora.fresh(model, kind, seed=args.seed)
        given = {"model": policy, "args": settings, "train_dataset": rows, "processing_class": tokenizer, "callbacks": [times]}
        trainer = (ByTokens if by_tokens else Ours)(**given, lengths=lengths, **by_tokens)
        if by_tokens and args.products:
            trainer.products = Products(model)
    trainer.seen, trainer.counts = {}, Speed(PairFlops.of(model), settings.device, model.dtype)
    if contender in OURS and settings.device.type == "cpu":
        keep_freed_memory()  # as train/run.py does
    trainer.train()

    mine = {
        "seconds": times.ends[-1] - times.ends[args.left_out - 1],
        "pass_seconds": getattr(trainer, "pass_seconds", 0.0),
        "seen": trainer.seen,
        "bare": getattr(trainer, "bare", {}) and trainer.bare | {"steps": trainer.steps_seconds},
        **{name: getattr(trainer.counts.recent, name) for name in ("flops", "pairs", "tokens", "packed_tokens", "padded_tokens")},
    }
    everyones = [mine]
    if process.world > 1:
        everyones = [None] * process.world
        torch.distributed.all_gather_object(everyones, mine)
    memory = peak_memory(settings.device)
    if process.rank:
        return
    together = max if torch.cuda.is_available() else sum  # by the clock | CPU seconds
    result = {name: together(each[name] for each in everyones) for name in ("seconds", "pass_seconds")}
    result |= {name: sum(each[name] for each in everyones) for name in mine if name not in ("seen", "bare", *result)}
    result["bare"] = mine["bare"]
    result["seen"] = [
        sorted(name for each in everyones for name in each["seen"][step]) for step in range(args.left_out + args.steps)
    ]
    result |= {"memory": memory, "peak": trainer.counts.peak, "world": process.world}
    (args.work / "result.json").write_text(json.dumps(result))


# --- the comparison ---------------------------------------------------------------------------------------------------------------------


def tokens_per_pair(lengths, micro_batches: list[int]):
    """lengths int [pairs, 3]: prompt, chosen, rejected. Tokens per pair: packed, then padded at each micro-batch, in the order given."""
    import numpy as np

    longer = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    padded = [
        2 * sum(len(part) * part.max() for part in np.split(longer, range(size, len(longer), size))) for size in micro_batches
    ]
    return np.array([lengths.sum(), *padded]) / len(lengths)


def choose(lengths, num_rows: int, micro_batches: list[int], seed: int):
    """Of 2,000 random choices of rows, in order, the one whose `tokens_per_pair` are nearest to the whole set's; and both of these."""
    import numpy as np

    rng = np.random.default_rng(seed)
    whole = np.mean([tokens_per_pair(rng.permutation(lengths), micro_batches) for _ in range(20)], axis=0)
    draws = [rng.choice(len(lengths), num_rows, replace=False) for _ in range(2000)]
    seen = [tokens_per_pair(lengths[draw], micro_batches) for draw in draws]
    best = int(np.argmin([np.abs(np.log(each / whole)).max() for each in seen]))
    return draws[best], seen[best], whole


def prepare(args, micro_batches: list[int]) -> dict:
    """Rows, model and store in `args.work`; how many GPUs there are, what is known of the sample, and seconds that phase 1 scored the timed
    rows."""
    import datasets
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    from launch import Process
    from precompute import worker
    from precompute.config import PrecomputeConfig
    from precompute.pairs import tokenize_rows
    from precompute.worker import run
    from store.reader import open_store
    from train.balance import shuffled

    world = torch.cuda.device_count() or 1
    refused = [each for each in map(int, args.micro_batches.split(",")) if args.effective_batch_size % (each * world)]
    if refused:
        raise SystemExit(
            f"--micro-batches {refused}: --effective-batch-size {args.effective_batch_size} does not divide over {world} process(es)"
        )
    datasets.disable_progress_bars()
    rows = datasets.load_dataset("parquet", data_files=str(args.dataset), split="train", cache_dir=str(args.work / "cache"))
    columns = [name for name in ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs") if name in rows.column_names]
    rows = rows.select_columns(columns).shuffle(seed=args.seed).select(range(min(POOL, len(rows)))).flatten_indices()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    if args.shape:
        args.model = args.tokenizer = str(args.work / "model")
    pairs = tokenize_rows(tokenizer, rows.to_list(), 0, args.max_length).pairs
    lengths = np.array([[len(each.prompt_ids), len(each.chosen_ids), len(each.rejected_ids)] for each in pairs])
    num_rows = args.steps * args.effective_batch_size
    if len(pairs) < num_rows + args.effective_batch_size:
        raise SystemExit(
            f"{args.dataset}: {len(pairs)} pairs fit into --max-length {args.max_length}; --steps {args.steps} need"
            f" {num_rows}, and {args.effective_batch_size} more to warm up. Lower --steps or --effective-batch-size."
        )
    by_length = np.argsort(lengths.sum(axis=1), kind="stable")
    timed, of_sample, of_set = choose(lengths, num_rows, micro_batches, args.seed)
    if args.products:
        warm_up = max(np.split(timed, args.steps), key=lambda step: lengths[step].sum()).tolist() * args.left_out
    else:
        warm_up = [index for index in by_length if index not in set(timed)][: args.effective_batch_size]
    in_order = [pairs[index].row for index in (*warm_up, *timed)]
    rows.select(in_order[-num_rows:]).to_parquet(args.work / "timed.parquet")
    # Row k of the shuffle must be row k of this order.
    rows = rows.select(np.array(in_order)[np.argsort(shuffled(len(in_order), args.seed, epoch=0))]).flatten_indices()
    rows.to_parquet(args.work / "rows.parquet")
    both = isinstance(rows[0].get("prompt"), str) and isinstance(rows[0]["chosen"], list)
    (rows.remove_columns("prompt") if both else rows).to_parquet(
        args.work / "trl.parquet"
    )  # on Dolci-Think's schema TRL 1.16 fails
    if args.shape:
        make_model(args.shape, tokenizer, args.dtype, Path(args.model))
        gc.collect()
        torch.cuda.empty_cache()
    config = PrecomputeConfig(
        dataset=(str(args.work / "rows.parquet"),),
        split="train",
        dataset_revision=None,
        limit=None,
        model=args.model,
        revision=None,
        tokenizer=args.tokenizer or args.model,
        chat_template=None,
        max_length=args.max_length,
        dtype=args.dtype,
        shard_size=256,
        ref_store=args.work / "store",
        preset=None,
        tokens_per_batch=16384,
    )
    score_batches, seconds = worker.score_batches, 0.0

    def timed_batches(*args, **kwargs):
        nonlocal seconds
        started = now()
        for batch in score_batches(*args, **kwargs):
            seconds += now() - started
            yield batch
            started = now()

    worker.score_batches = timed_batches
    run(replace(config, dataset=(str(args.work / "timed.parquet"),), ref_store=args.work / "timed"), Process(0, 1, 0))
    worker.score_batches = score_batches
    run(config, Process(0, 1, 0))  # what the contenders train from has the warm-up's rows as well
    num_pairs = open_store(args.work / "store").num_pairs
    if num_pairs != len(rows):
        raise SystemExit(f"{args.dataset}: phase 1 scored {num_pairs} of {len(rows)} chosen rows; all are needed")
    return {"world": world, "phase1": seconds, "pairs": len(pairs), "sample": of_sample.tolist(), "set": of_set.tolist()}


def measure(args, contender: str, micro_batch: int, world: int) -> dict | str:
    """One contender in its own processes; the reason where it fails, of memory for instance."""
    (args.work / "result.json").unlink(missing_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
    command = [sys.executable, *launcher, *sys.argv]
    command += ["--only", f"{contender}:{micro_batch}", "--work", str(args.work), "--model", args.model]
    command += ["--tokenizer", args.tokenizer or args.model]
    env = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world)),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    } | os.environ
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    if done.returncode:
        said = re.split(r"^[EW]\d{4} ", done.stderr, flags=re.MULTILINE)[0]  # what follows is torchrun's account of its ranks
        reason = "out of memory" if "OutOfMemoryError" in done.stderr else said.strip()[-2000:]
        print(f"{contender}, micro-batch {micro_batch}: failed: {reason}", flush=True)
        return reason
    return json.loads((args.work / "result.json").read_text())


def main() -> None:
    args = parse()
    if args.only:
        return run_one(args)
    if (args.model is None) == (args.shape is None):
        raise SystemExit("give --model or --shape")
    if args.shape and not args.tokenizer:
        raise SystemExit("--shape needs --tokenizer")
    started, longest = time.monotonic(), 0.0
    options = {name: str(value) for name, value in vars(args).items() if name not in FREE}
    state = {"options": options, "runs": {}}
    if args.json and args.json.exists():
        state = json.loads(args.json.read_text())
        if state["options"] != options:
            raise SystemExit(f"{args.json} is of other options: {state['options']}. Give those, or another --json.")
    micro_batches = [int(each) for each in args.micro_batches.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        args.work = Path(temporary)
        possible = [size for size in MICRO_BATCHES if args.effective_batch_size % size == 0]
        state |= apart(prepare, args, possible)  # the first GPU is then the contenders'
        world = state["world"]
        if args.shape:
            args.model = args.tokenizer = str(args.work / "model")
        print(
            f"{args.dataset.parent.name}: {args.steps} step(s) of {args.effective_batch_size} pairs of {state['pairs']:,},", end=" "
        )
        print(f"max length {args.max_length}, {args.dtype}, {world} process(es)")
        for name in ("set", "sample"):
            packed, *padded = state[name]
            shares = ", ".join(f"{size}: {each / packed:.2f}" for size, each in zip(possible, padded, strict=True))
            print(f"  {name:7} {packed:7.0f} tokens per pair with each prompt once; padded, times that, at micro-batch {shares}")
        # Phase 1 is done again on each start.
        state["phase1_per_pair"] = state["phase1"] / (args.steps * args.effective_batch_size) / world
        print(f"phase 1 scored in {shown(state['phase1_per_pair'])} s per pair", flush=True)
        print(
            f"{'contender':11}{'micro-batch':>12}{'s/pair':>9}{'+ pass':>9}{'computed':>10}{'padding':>9}{'2nd prompt':>11}", end=""
        )
        print(f"{'MFU':>8}{'GiB':>7}")
        failed, left_out = [], []
        contenders = args.contenders.split(",")
        names = [f"tokens:{args.tokens_per_batch}"] if "tokens" in contenders else []
        names += [f"{contender}:{size}" for size in micro_batches for contender in contenders if contender != "tokens"]
        for repeat in range(args.repeats):
            for name in names:
                before = state["runs"].get(name)
                if before is None or len(before["every"]) <= repeat:
                    begun = time.monotonic()
                    if begun + longest > started + args.seconds:
                        left_out += [name]
                        continue
                    contender, _, size = name.partition(":")
                    result = measure(args, contender, int(size), world)
                    longest = max(longest, time.monotonic() - begun)
                    if isinstance(result, str):
                        failed += [] if result == "out of memory" else [name]
                        continue
                    every = [*(before["every"] if before else []), result["seconds"] / result["pairs"]]
                    fastest = result if before is None or result["seconds"] < before["seconds"] else before
                    state["runs"][name] = fastest | {"every": every}
                    refuse_other_pairs(state["runs"], name)
                    if args.json:
                        args.json.write_text(json.dumps(state, indent=1))
                print(line(name, state), flush=True)
    ratios(state)
    if left_out:
        print(f"left out, for want of time: {', '.join(left_out)}")
    if failed:
        raise SystemExit(f"failed, and not for want of memory: {', '.join(failed)}")


def refuse_other_pairs(runs: dict[str, dict], name: str) -> None:
    """SystemExit unless the run trained on the same pairs in each step as those before it."""
    first = next(iter(runs))
    for step, (expected, found) in enumerate(zip(runs[first]["seen"], runs[name]["seen"], strict=True)):
        if expected != found:
            raise SystemExit(
                f"step {step}: {name} trained on other pairs than {first}: {found}, not {expected}. Nothing is compared."
            )


def pass_per_pair(contender: str, state: dict) -> float:
    """Seconds that the reference costs outside training: stock's pass at its best batch size, our phase 1."""
    if contender == "online":
        return 0.0
    if contender != "precompute":
        return state["phase1_per_pair"]
    return min(each["pass_seconds"] / each["pairs"] for name, each in state["runs"].items() if name.startswith("precompute:"))


def shown(seconds: float) -> str:
    """Of a pair: a CPU needs many, a GPU hundredths of one."""
    return f"{seconds:.2f}" if seconds >= 1 or not seconds else f"{seconds:.3g}"


def line(name: str, state: dict) -> str:
    contender, _, micro_batch = name.partition(":")
    run = state["runs"][name]
    one_pass = run["pass_seconds"] / run["pairs"] if contender == "precompute" else pass_per_pair(contender, state)
    computed = run["packed_tokens"] if contender in OURS else run["padded_tokens"]
    padding, second = 1 - run["tokens"] / run["padded_tokens"], (run["tokens"] - run["packed_tokens"]) / run["padded_tokens"]
    shares = ("—", "—") if contender in OURS else (f"{padding:.0%}", f"{second:.0%}")
    mfu = f"{run['flops'] / run['seconds'] / (run['peak'] * run['world']):.1%}" if run["peak"] else "—"
    text = f"{contender:11}{micro_batch:>12}{shown(run['seconds'] / run['pairs']):>9}{shown(one_pass):>9}{computed:10,}"
    text += f"{shares[0]:>9}{shares[1]:>11}{mfu:>8}{run['memory'] / 2**30:7.2f}"
    if len(run["every"]) > 1:
        text += f"  of {', '.join(map(shown, run['every']))}"
    if bare := run["bare"]:
        products = bare["linear"] + bare["head"] + bare["attention"]
        text += f"\n  its bare products {products:.1f} of {bare['steps']:.1f} s: {products / bare['steps']:.2f}; attention's {bare['attention']:.1f},"
        text += f" the head's {bare['head']:.1f}; with PyTorch's linear layers {(products - bare['linear'] + bare['linear_mkl']) / bare['steps']:.2f}"
    return text


def ratios(state: dict) -> None:
    """Each of the others against ours, at their best; against packed micro-batches of as many pairs, where these were measured, at each."""
    for whole, title in ((False, "training alone"), (True, "one epoch, the pass over the reference included")):
        seconds = {
            (contender, int(micro_batch)): run["seconds"] / run["pairs"] + whole * pass_per_pair(contender, state)
            for name, run in state["runs"].items()
            for contender, _, micro_batch in [name.partition(":")]
        }
        ours = {run: value for run, value in seconds.items() if run[0] in OURS}
        if not ours:
            return
        best = min(ours, key=ours.get)
        print(f"{title}: of ours {best[0]} at {best[1]} is best, {shown(ours[best])} s per pair")
        for other in ("online", "precompute", "padded"):
            theirs = {size: value for (contender, size), value in seconds.items() if contender == other}
            if theirs:
                fastest = min(theirs, key=theirs.get)
                same = {size: value / ours["packed", size] for size, value in theirs.items() if ("packed", size) in ours}
                each = f"; packed at the same micro-batch {', '.join(f'{size}: {value:.2f}' for size, value in same.items())}"
                print(f"  {other:11}{theirs[fastest] / ours[best]:.2f} x ours, best ({fastest}) against best{each if same else ''}")


if __name__ == "__main__":
    main()
