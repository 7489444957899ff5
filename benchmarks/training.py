"""Phase 2 against stock TRL, in one run on the same rows: with its online reference, with its own precompute pass, and from a store.

    python benchmarks/training.py --model DIR --dataset FILE --rows 64 --max-length 2048 --micro-batches 1,2,4,8 --steps 2
    python benchmarks/training.py --shape 7B --dtype bfloat16 --rows 512 --max-length 8192 --dataset FILE --tokenizer DIR

One process per GPU, or one on the CPU. Every contender trains the same global batches under DeepSpeed ZeRO-2, with each micro-batch in turn,
in processes of its own: its memory is its own. Seconds per optimizer step leave the first step out, in which kernels are chosen and memory is
first allocated. For stock with precompute the pass over the rows is timed too (loading included) and shared out over the steps of one epoch;
for ours likewise phase 1. Ratios are what counts.

`--shape` makes a random model of OLMo 3's shape (1B: a smaller one of the same kind) instead of `--model`; its numbers mean nothing, its
FLOPs do. MFU counts what the pairs need (train/flops.py), for all contenders alike, over the GPUs' dense peak.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "sliding_window": 64},
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "sliding_window": 4096,
    },
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "sliding_window": 4096,
    },
}
"""Olmo3Config; 7B is allenai/Olmo-3-7B's. Every fourth layer sees all tokens."""

CONTENDERS = ("online", "precompute", "packed", "padded")
"""Stock TRL with a reference beside the policy; stock with its own pass; from a store, packed; from a store, padded."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id")
    parser.add_argument("--shape", choices=list(SHAPES), help="a random model of OLMo 3's kind instead")
    parser.add_argument("--tokenizer", help="folder or hub id; needed with --shape")
    parser.add_argument("--dataset", type=Path, required=True, help="Parquet file of preference rows")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the random choice of rows")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--loss-type", default="sigmoid_norm")
    parser.add_argument("--effective-batch-size", type=int, default=16)
    parser.add_argument("--micro-batches", default="1,2,4,8")
    parser.add_argument("--contenders", default="online,precompute,packed", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--steps", type=int, default=2, help="timed, after the first")
    parser.add_argument("--no-gradient-checkpointing", action="store_true")
    parser.add_argument("--torch-compile", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # CONTENDER:MICRO_BATCH, the run of one process
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- one contender, in each rank of a torchrun of its own -------------------------------------------------------------------------------


def run_one(args) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from launch import Process, launched
    from store.reader import open_store
    from train.config import ZERO2
    from train.data import dataset_of, lengths_of
    from train.flops import PairFlops
    from train.run import join, peak_memory
    from train.speed import Speed
    from train.trainer import StoreDPOTrainer

    contender, micro_batch = args.only.split(":")
    process = launched() or Process(0, 1, 0)
    join(process)

    class StepTimes(TrainerCallback):
        """Wall-clock times at which steps end."""

        def __init__(self):
            self.ends = []

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    class Counted(DPOTrainer):
        """Stock, with its batches counted as ours are."""

        def _compute_loss(self, model, inputs, return_outputs):
            self.speed.count(inputs["attention_mask"], inputs["completion_mask"])
            return super()._compute_loss(model, inputs, return_outputs)

    settings = DPOConfig(
        output_dir=str(args.work / "unused"),
        use_cpu=not torch.cuda.is_available(),
        bf16=args.dtype == "bfloat16",
        deepspeed=str(ZERO2),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=int(micro_batch),
        gradient_accumulation_steps=args.effective_batch_size // (int(micro_batch) * process.world),
        max_steps=args.steps + 1,
        max_length=args.max_length,
        loss_type=[args.loss_type],
        beta=5.0 if args.loss_type == "sigmoid_norm" else 0.1,
        learning_rate=1e-6,
        logging_steps=10**6,
        logging_strategy="steps",
        gradient_checkpointing=not args.no_gradient_checkpointing,
        torch_compile=args.torch_compile,
        precompute_ref_log_probs=contender != "online",
        precompute_ref_batch_size=int(micro_batch),
        remove_unused_columns=contender in ("online", "precompute"),
        seed=args.seed,
        data_seed=args.seed,
    )
    load = {"dtype": getattr(torch, args.dtype), "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(args.model, **load).to(settings.device)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    times = StepTimes()
    started = time.perf_counter()
    if contender in ("online", "precompute"):
        import datasets

        datasets.disable_progress_bars()
        rows = datasets.load_dataset(
            "parquet", data_files=str(args.work / "trl.parquet"), split="train", cache_dir=str(args.work / args.only)
        )
        reference = AutoModelForCausalLM.from_pretrained(args.model, **load).to(settings.device) if contender == "online" else None
        trainer = Counted(
            model=model, ref_model=reference, args=settings, train_dataset=rows, processing_class=tokenizer, callbacks=[times]
        )
        trainer.speed = Speed(PairFlops.of(model), settings.device, model.dtype)
    else:
        store = open_store(args.work / "store")
        pairs = dataset_of(store, args.max_length)
        lengths = lengths_of(pairs, store, args.max_length) if contender == "packed" else None
        trainer = StoreDPOTrainer(
            model=model, args=settings, train_dataset=pairs, processing_class=tokenizer, callbacks=[times], lengths=lengths
        )
    prepared = time.perf_counter() - started
    trainer.train()
    counted = trainer.speed.recent if contender in ("online", "precompute") else trainer.speed.all
    counted = counted if counted.pairs else trainer.speed.recent
    mine = torch.tensor([counted.flops, counted.pairs], dtype=torch.float64, device=settings.device)
    if process.world > 1:
        torch.distributed.all_reduce(mine)
    flops, pairs_seen = mine.tolist()
    seconds = (times.ends[-1] - times.ends[0]) / args.steps
    memory = peak_memory(settings.device)
    if process.rank == 0:
        result = {
            "seconds_per_step": seconds,
            "prepared": prepared,
            "memory": memory,
            "num_pairs": len(trainer.train_dataset),
            "flops_per_pair": flops / pairs_seen,
            "peak": trainer.speed.peak,
            "world": process.world,
        }
        (args.work / "result.json").write_text(json.dumps(result))


# --- the comparison ---------------------------------------------------------------------------------------------------------------------


def prepare(args) -> float:
    """Rows, model and store in `args.work`; seconds of phase 1."""
    import datasets
    import torch
    from transformers import AutoTokenizer, Olmo3Config, Olmo3ForCausalLM

    from launch import Process
    from precompute.worker import PrecomputeConfig, run

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("parquet", data_files=str(args.dataset), split="train", cache_dir=str(args.work / "cache"))
    columns = [name for name in ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs") if name in rows.column_names]
    rows = rows.select_columns(columns).shuffle(seed=args.seed).select(range(min(args.rows, len(rows)))).flatten_indices()
    rows.to_parquet(args.work / "rows.parquet")
    both = isinstance(rows[0].get("prompt"), str) and isinstance(rows[0]["chosen"], list)
    (rows.remove_columns("prompt") if both else rows).to_parquet(
        args.work / "trl.parquet"
    )  # on Dolci-Think's schema TRL 1.16 fails
    if args.shape:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        vocabulary = -(-len(tokenizer) // 128) * 128
        config = Olmo3Config(
            vocab_size=vocabulary,
            max_position_embeddings=65536,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            **SHAPES[args.shape],
        )
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            Olmo3ForCausalLM(config).to(getattr(torch, args.dtype)).save_pretrained(args.work / "model")
        tokenizer.save_pretrained(args.work / "model")
        args.model = args.tokenizer = str(args.work / "model")
    config = PrecomputeConfig(
        dataset=str(args.work / "rows.parquet"),
        split="train",
        dataset_revision=None,
        limit=args.rows,
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
    started = time.perf_counter()
    run(config, Process(0, 1, 0))
    return time.perf_counter() - started


def measure(args, contender: str, micro_batch: int, world: int) -> dict | None:
    """One contender in its own processes; None where it fails, of memory for instance."""
    (args.work / "result.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", *sys.argv]
    command += ["--only", f"{contender}:{micro_batch}", "--work", str(args.work), "--model", args.model]
    command += ["--tokenizer", args.tokenizer or args.model]
    env = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world)),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    } | os.environ
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    if done.returncode:
        reason = "out of memory" if "OutOfMemoryError" in done.stderr else done.stderr.strip()[-2000:]
        print(f"{contender}, micro-batch {micro_batch}: failed: {reason}", flush=True)
        return None
    return json.loads((args.work / "result.json").read_text())


def main() -> None:
    args = parse()
    if args.only:
        return run_one(args)
    if (args.model is None) == (args.shape is None):
        raise SystemExit("give --model or --shape")
    if args.shape and not args.tokenizer:
        raise SystemExit("--shape needs --tokenizer")
    import torch

    world = torch.cuda.device_count() or 1
    table = {}
    with tempfile.TemporaryDirectory() as temporary:
        args.work = Path(temporary)
        phase1 = prepare(args)
        micro_batches = [
            int(each) for each in args.micro_batches.split(",") if args.effective_batch_size % (int(each) * world) == 0
        ]
        print(
            f"{args.dataset.parent.name}: {args.rows} rows, max length {args.max_length}, {args.dtype}, {world} process(es),",
            end=" ",
        )
        print(f"{args.effective_batch_size} pairs per step; phase 1 took {phase1:.1f} s", flush=True)
        print(f"{'contender':12}{'micro-batch':>12}{'s/step':>10}{'+ pass':>10}{'pairs/s':>10}{'MFU':>8}{'GiB':>8}")
        for contender in args.contenders.split(","):
            for micro_batch in micro_batches:
                result = measure(args, contender, micro_batch, world)
                if result is None:
                    continue
                # An epoch's share of the pass that scored the reference. TRL tokenizes inside it; so does phase 1.
                steps = result["num_pairs"] / args.effective_batch_size
                one_pass = {"online": 0.0, "precompute": result["prepared"]}.get(contender, phase1) / steps
                rate = args.effective_batch_size / result["seconds_per_step"]
                mfu = rate * result["flops_per_pair"] / (result["peak"] * result["world"]) if result["peak"] else None
                table[f"{contender}:{micro_batch}"] = result | {"pass_per_step": one_pass, "pairs_per_second": rate, "mfu": mfu}
                print(f"{contender:12}{micro_batch:12}{result['seconds_per_step']:10.2f}", end="")
                print(f"{result['seconds_per_step'] + one_pass:10.2f}{rate:10.3f}", end="")
                print(f"{'—' if mfu is None else f'{mfu:.1%}':>8}{result['memory'] / 2**30:8.2f}", flush=True)
    ratios(table)
    if args.json:
        args.json.write_text(
            json.dumps({"options": {k: str(v) for k, v in vars(args).items()}, "phase1": phase1, "runs": table}, indent=1)
        )


def ratios(table: dict) -> None:
    """Ours at its best micro-batch against each of the others at its best, and at each micro-batch."""

    def seconds(name: str, whole: bool) -> float:
        return table[name]["seconds_per_step"] + (table[name]["pass_per_step"] if whole else 0.0)

    ours = [name for name in table if name.startswith("packed:")]
    if not ours:
        return
    for whole, title in ((False, "training alone"), (True, "one epoch, the pass over the reference included")):
        best = min(ours, key=lambda name: seconds(name, whole))
        print(f"{title}: packed is best at micro-batch {best.partition(':')[2]}")
        for other in ("online", "precompute", "padded"):
            theirs = {name: seconds(name, whole) for name in table if name.startswith(f"{other}:")}
            if not theirs:
                continue
            fastest = min(theirs, key=theirs.get)
            text = f"  {other:11} {theirs[fastest] / seconds(best, whole):.2f} x ours at its best ({fastest.partition(':')[2]})"
            each = ", ".join(f"{name.partition(':')[2]}: {value / seconds(best, whole):.2f} x" for name, value in theirs.items())
            print(f"{text}; at each: {each}")


if __name__ == "__main__":
    main()
