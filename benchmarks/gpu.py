"""Everything that is claimed for GPUs, shown on this machine's: one command, one report.

    make gpu                                         all of it, eight minutes at most; no network
    python benchmarks/gpu.py --parts scoring,profile

1. parity    tests/on_gpu: both phases against the plain forward, each model type, each dtype; and by how much they differ
2. scoring   tokens/s and share of the GPU's peak at OLMo 3's 7B shape with random weights, by tokens per batch; memory against what
             --tokens-per-batch auto planned
3. profile   where the time goes, by kind of kernel, in scoring and in a training micro-step
4. several   two workers and two ranks, where there are two GPUs
5. training  packed against stock TRL, at its best micro-batch (benchmarks/training.py, with the time that is left)

Each part runs in a process of its own, for an error of CUDA spoils its process. One that fails or takes too long is said in the report, and
the next goes on; the exit code is then 1.
"""

import argparse
import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

BUDGETS = (2048, 4096, 8192, 16384, 32768)
GIB = 2**30

KINDS = {
    "attention": r"flash|fmha|attention|softmax_lse",
    "matrix products": r"gemm|cutlass|cublas|nvjet|xmma|aten::(mm|addmm|bmm|linear)$",
    "copies between host and device": r"memcpy.*(htod|dtoh)|aten::_to_copy",
    "reductions and softmax": r"reduce|softmax|norm|logsumexp|cumsum|argmax",
    "element-wise": r"elementwise|vectorized|index|gather|scatter|copy|fill|cat|memset|memcpy|adam",
    "collectives": r"nccl",
}
"""Names of kernels, the first that fits; of operators where the profiler has no device times."""


def machine() -> dict:
    import devices
    from store.errors import InputError

    try:
        device = devices.device(0)
    except InputError as error:  # before the libraries are loaded
        raise SystemExit(f"Error: {error}") from None
    if device.type != "cuda":
        raise SystemExit("Error: there is no GPU here; make gpu is about them.")

    import torch
    import transformers
    import trl

    memory = torch.cuda.get_device_properties(0).total_memory
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(0),
        "GPUs": torch.cuda.device_count(),
        "memory": f"{memory / GIB:.0f} GiB",
        "PyTorch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "driver": devices.driver(),
        "transformers, trl": f"{transformers.__version__}, {trl.__version__}",
        "commit": commit or "unknown",
    }


def shapes_for(gib: float) -> tuple[str, str]:
    """What this GPU can score, and train alone."""
    return ("7B", "7B/4") if gib >= 60 else ("1B", "tiny") if gib >= 16 else ("tiny", "tiny")


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def word_tokenizer(num_words: int):
    """`w17` is token 17; as many entries as OLMo's, for the head is a large part of the work."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0, "<pad>": 1} | {f"w{index}": index for index in range(2, num_words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def lengths(num_pairs: int, longest: int, seed: int = 0):
    """int [pairs, 3]: prompt, chosen, rejected; log-normal as in Dolci-Think (medians 200 and 1,500), scaled down with `longest`."""
    import numpy as np

    rng = np.random.default_rng(seed)
    scale = min(1.0, longest / 8192)
    drawn = np.exp(rng.normal([math.log(200 * scale), *[math.log(1500 * scale)] * 2], [0.6, 0.7, 0.7], (num_pairs, 3)))
    return np.clip(drawn, 2, [longest // 8, longest // 2, longest // 2]).astype(int)


def sequences_of(num_tokens: int, longest: int, vocabulary: int):
    import numpy as np

    from precompute.scorer.packing import Sequence

    rng = np.random.default_rng(1)
    made, used = [], 0
    for prompt, *sides in lengths(100_000, longest):
        start = rng.integers(2, vocabulary, prompt)
        made += [Sequence(np.concatenate([start, rng.integers(2, vocabulary, side)]).astype(np.int32), prompt) for side in sides]
        used += prompt + sum(sides)
        if used >= num_tokens:
            return made


# ---- parts: each prints Markdown


def part_parity() -> None:
    import numpy as np
    import tiny
    import torch
    from test_attention_cuda import gradients
    from test_scoring import pairs

    from precompute.scorer.scoring import score

    rows = []
    for kind in tiny.CONFIGS:
        for dtype in ("bfloat16", "float32"):
            model = tiny.make_model(kind).to(getattr(torch, dtype)).to("cuda")
            packed, alone = (
                np.concatenate(score(model, pairs(seed=5), layout=layout, tokens_per_batch=tokens))
                for layout, tokens in (("packed", 400), ("padded", 1))
            )
            of_row, of_sequences = gradients(model)
            relative = [((of_row[name] - each).norm() / each.norm()).item() for name, each in of_sequences.items()]
            differences = np.abs(packed - alone)
            rows.append([kind, dtype, f"{differences.mean():.1e}", f"{differences.max():.1e}", f"{max(relative):.1e}"])
    head = ["model", "dtype", "nats per token, mean", "largest", "gradient of the worst parameter, relative"]
    print("Packed rows against the plain forward of each sequence alone, on this GPU; tiny models whose weights are large.\n")
    print(table(head, rows), flush=True)
    for name in ("scoring.py", "training.py"):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--no-header",
            *("--tb=short", "--show-capture=no", "-W", "ignore"),  # the report has room for what failed and by how much
            str(ROOT / "tests" / "on_gpu" / name),
        ]
        one = {"CUDA_VISIBLE_DEVICES": "0"} if name == "training.py" else {}  # it is one rank, which sees one GPU
        done = subprocess.run(command, cwd=ROOT, env=os.environ | one, capture_output=True, text=True, check=False)
        print(f"`tests/on_gpu/{name}`: {done.stdout.strip().splitlines()[-1]}\n", flush=True)
        if done.returncode:
            raise SystemExit(done.stdout[-3000:])


def part_scoring(shape: str) -> None:
    import torch
    from shapes import SHAPES, forward_flops, random_model

    from precompute.scorer.budget import SHARE, largest_budget
    from precompute.scorer.packing import pack
    from precompute.scorer.scoring import ready_to_score, score_packed
    from train.flops import peak_flops

    small = shape == "tiny"
    model = random_model(shape, word_tokenizer(1000 if small else 100_278), "bfloat16").eval().requires_grad_(False)
    device, vocabulary = model.device, model.config.vocab_size
    head = model.get_output_embeddings().weight
    layers = [module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]
    peak = peak_flops(device, torch.bfloat16)
    budgets = (256, 512) if small else BUDGETS

    def measured(budget: int) -> list[str]:
        batches = list(pack(sequences_of(3 * budget, min(8192, budget), vocabulary), budget))[:4]
        with ready_to_score(model):
            score_packed(model, batches[0])
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            for batch in batches:
                score_packed(model, batch).cpu()
            seconds = time.perf_counter() - started
        tokens = sum(len(batch.input_ids) for batch in batches)
        rate = sum(forward_flops(model.config, layers, head, batch) for batch in batches) / seconds
        share = f"{rate / peak:.1%}" if peak else "unknown peak"
        memory = torch.cuda.max_memory_allocated() / GIB
        return [f"{tokens / seconds:,.0f}", f"{rate / 1e12:,.1f}", share, f"{memory:.2f}"]

    rows = [[f"{budget:,}", *measured(budget)] for budget in budgets]
    compiled = _compiled(lambda: measured(budgets[-1]))
    if not isinstance(compiled, str):
        rows.append([f"{budgets[-1]:,}, compiled", *compiled])
    print(
        f"OLMo 3's kind, shape {shape} ({SHAPES[shape]['num_hidden_layers']} layers of {SHAPES[shape]['hidden_size']:,}), bfloat16,"
    )
    print("random weights, lengths as in Dolci-Think; the peak is the data sheet's, dense.\n")
    print(table(["tokens per batch", "tokens/s", "TFLOP/s", "of the peak", "GiB at most, weights included"], rows), flush=True)
    if isinstance(compiled, str):
        print(f"Not compiled: {compiled}\n")

    if small:  # as large a part of a small device: no huge batch on a host's processor
        free = torch.cuda.mem_get_info()[0]
        held = torch.empty(free - min(free, 96 * 2**20), dtype=torch.uint8, device=device)
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    longest = 256 if small else 8192
    planned = largest_budget(model, layout="packed", max_length=longest, num_workers=1)
    with ready_to_score(model):
        (batch, *_) = pack(sequences_of(planned, longest, vocabulary), planned)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        score_packed(model, batch)
        used = torch.cuda.max_memory_allocated() - before
    print(
        f"`--tokens-per-batch auto` chose {planned:,} tokens, to stay within {SHARE['cuda']:.0%} of {free / GIB:.2f} GiB that were free;"
    )
    print(f"a batch of {len(batch.input_ids):,} tokens took {used / GIB:.2f} GiB.\n")
    if used > free * SHARE["cuda"]:
        raise SystemExit("more than was planned")
    if small:
        del held


def _compiled(measure):
    """What `measure()` returns with compiled layers, or the words of why they do not run here."""
    from precompute.scorer.compiled import named_compiler, use_compiler
    from store.errors import InputError

    try:
        use_compiler(True, layout="packed")
        with named_compiler():
            return measure()
    except InputError as error:
        return str(error)
    finally:
        use_compiler(False, layout="packed")


def part_profile(shape: str) -> None:
    import torch
    from shapes import random_model

    from precompute.scorer.packing import pack
    from precompute.scorer.scoring import ready_to_score, score_packed
    from train.packed import packed_forward, ready_to_train

    small = shape == "tiny"
    model = random_model(shape, word_tokenizer(1000 if small else 100_278), "bfloat16").eval()
    tokens = 256 if small else 16384
    sequences = sequences_of(tokens, tokens // 2, model.config.vocab_size)[:-2]
    batch = next(iter(pack(sequences, tokens)))
    with ready_to_score(model):
        measured = {"scoring": _by_kind(lambda: score_packed(model, batch).cpu())}

    model.train().requires_grad_(True)
    if not small:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    longest = max(len(each.ids) for each in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, each in enumerate(sequences):
        ids[row, : len(each.ids)] = torch.from_numpy(each.ids)
        mask[row, : len(each.ids)] = 1
        labels[row, each.num_prompt : len(each.ids)] = ids[row, each.num_prompt : len(each.ids)]
    ids, mask, labels = (each.to(model.device) for each in (ids, mask, labels))

    def micro_step():
        packed_forward(model, ids, mask, labels, ("log_probs",)).loss.backward()
        model.zero_grad()

    def of_micro_step() -> dict:
        with ready_to_train(model):
            return _by_kind(micro_step)

    measured["a training micro-step"] = of_micro_step()
    compiled = _compiled(of_micro_step)
    if not isinstance(compiled, str):
        measured["the same, compiled"] = compiled
    on_device = all(each["device"] for each in measured.values())
    print(f"Shape {shape}, {len(batch.input_ids):,} tokens, by the profiler", end="")
    print(".\n" if on_device else "; it has no times of kernels here, so these are the host's, by operator.\n")
    names = [*KINDS, "other"]
    rows = [
        [name, *(f"{each['kinds'].get(name, 0) / max(sum(each['kinds'].values()), 1e-9):.1%}" for each in measured.values())]
        for name in names
    ]
    rows.append(["milliseconds, together", *(f"{sum(each['kinds'].values()):,.1f}" for each in measured.values())])
    if isinstance(compiled, str):
        print(f"Not compiled: {compiled}\n")
    rows.append(["milliseconds by the clock", *(f"{each['clock']:,.1f}" for each in measured.values())])
    print(table(["kind", *measured], rows))


def _by_kind(work) -> dict:
    """Milliseconds by KINDS of the second run of `work`, and by the clock of the third."""
    import torch
    from torch.profiler import profile, supported_activities

    work()
    torch.cuda.synchronize()
    with profile(activities=supported_activities()) as recorded:
        work()
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    clock = (time.perf_counter() - started) * 1e3
    events = recorded.key_averages()
    kernels = {
        each.key: each.self_device_time_total / 1e3
        for each in events
        if each.self_device_time_total and not each.key.startswith("aten::")
    }
    times = kernels or {each.key: each.self_cpu_time_total / 1e3 for each in events if each.key.startswith("aten::")}
    kinds: dict[str, float] = {}
    for name, milliseconds in times.items():
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "other")
        kinds[kind] = kinds.get(kind, 0.0) + milliseconds
    return {"kinds": kinds, "clock": clock, "device": bool(kernels)}


def part_several() -> None:
    import torch

    if torch.cuda.device_count() < 2:
        print("This machine has one GPU.\n")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        score = [
            "precompute",
            "--dataset",
            "demo",
            "--dtype",
            "bfloat16",
            "--shard-size",
            "16",
            "--tokens-per-batch",
            "2048",
            "--ref-store",
        ]
        for name, workers in (("one", 1), ("two", 2)):
            seconds = _command([*score, folder / name, "--num-workers", workers])
            print(f"- `precompute --num-workers {workers}` on the demo's 88 pairs: {seconds:.0f} s, start included")
        parts = sorted(path.name for path in (folder / "one").glob("part-*.parquet"))
        same = [name for name in parts if (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()]
        print(f"- {len(same)} of {len(parts)} shards are the same bytes from one worker and from two")
        train = ["train", "--ref-store", folder / "two", "--output-dir", folder / "run"]
        train += ["--max-steps", 3, "--effective-batch-size", 8, "--tokens-per-batch", 4096]
        seconds = _command([*train, "--num-processes", 2, "--save-strategy", "no"])
        print(f"- `train --num-processes 2`, three steps of 8 pairs: {seconds:.0f} s, start included\n")
        if len(same) < len(parts):
            raise SystemExit("shards differ")


def _command(words: list) -> float:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "cli.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{(done.stdout + done.stderr)[-2000:]}")
    return time.perf_counter() - started


def part_training(shape: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    small = shape == "tiny"
    world = 1 if small else torch.cuda.device_count()  # each process is started for each contender
    longest, vocabulary = (128, 1000) if small else (4096, 100_278)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        word_tokenizer(vocabulary).save_pretrained(folder / "tokenizer")
        drawn = lengths(16 * 8 * world, longest)

        def text(row: int, side: int) -> str:
            return "".join(f" w{2 + (row * 7919 + side * 104729 + i * 31) % (vocabulary - 2)}" for i in range(drawn[row, side]))

        rows = [
            dict(zip(("prompt", "chosen", "rejected"), (text(row, side) for side in range(3)), strict=True))
            for row in range(len(drawn))
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        sizes = [size for size in (1, 2, 4) if not small or size == 2]
        command = [
            "training.py",
            "--shape",
            shape,
            "--dtype",
            "bfloat16",
            "--tokenizer",
            folder / "tokenizer",
            "--dataset",
            folder / "rows.parquet",
        ]
        command += [
            "--max-length",
            longest,
            "--effective-batch-size",
            (2 if small else 8) * world,
            "--steps",
            1,
            "--contenders",
            "online,packed",
        ]
        command += ["--micro-batches", ",".join(map(str, sizes))]
        print(
            f"Shape {shape}, random weights; the first step is left out. Times are seconds of the clock per pair.\n\n```",
            flush=True,
        )
        env = os.environ | {"PYTHONPATH": _path()} | ({"CUDA_VISIBLE_DEVICES": "0"} if small else {})
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT / "benchmarks", env=env, check=False)
        print("```\n", flush=True)
        if done.returncode:
            raise SystemExit(f"benchmarks/training.py ended with {done.returncode}")


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


# ---- the report

PARTS = {"parity": 120, "scoring": 150, "profile": 90, "several": 120, "training": 480}
"""Seconds that each may take of eight minutes, within what is left."""


def run_part(name: str, shapes: tuple[str, str], seconds: float) -> tuple[str, bool]:
    """Its Markdown, and whether it succeeded."""
    command = [sys.executable, str(Path(__file__)), "--part", name, "--shapes", ",".join(shapes)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(max(seconds, 1))
            problem = f"ended with exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            problem = f"took longer than {seconds:.0f} s"
        finally:  # it has a session of its own: what it started goes with it, and on Ctrl-C nothing stays on the GPU
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        err.seek(0)
        text, last = out.read(), err.read().strip()[-1500:]
    if problem:
        if text.count("```") % 2:
            text += "```\n"
        text += f"\n**This part {problem}.**\n\n```\n{last}\n```\n"
    return text, problem is None


def write(output: Path, text: str) -> None:
    """The report so far, whole or as it was. Where it cannot be written it is printed, and SystemExit says why."""
    text = re.sub(r"\n{3,}", "\n\n", text)
    partial = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        os.replace(partial, output)
    except OSError as error:
        print(text)
        raise SystemExit(f"Error: the report cannot be written: {error}. Make room, or name another place: --output FILE") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="of these, in this order")
    parser.add_argument(
        "--shapes", help="what is scored and what is trained, of benchmarks/shapes.py  [default: what fits the GPU]"
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--output", type=Path, help="[default: runs/gpu/<device>.md]")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [name for name in args.parts.split(",") if name not in PARTS]:
        parser.error(f"--parts {','.join(unknown)}: no such part; there are {', '.join(PARTS)}")
    if args.shapes and args.shapes.count(",") != 1:
        parser.error(f"--shapes {args.shapes}: two are needed, of what is scored and of what is trained, such as 7B,7B/4")
    if args.part:
        shape = dict(zip(("scoring", "training"), args.shapes.split(","), strict=True))
        shape["profile"] = shape["training"]
        work = globals()[f"part_{args.part}"]
        return work(shape[args.part]) if args.part in shape else work()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that run_part ends its part
    end = time.monotonic() + 60 * args.minutes
    about = machine()
    shapes = tuple(args.shapes.split(",")) if args.shapes else shapes_for(float(about["memory"].split()[0]))
    output = args.output or ROOT / "runs" / "gpu" / f"{re.sub(r'[^A-Za-z0-9]+', '-', about['device']).strip('-')}.md"
    text = f"# {about['device']}\n\n" + table(["what", "found"], [[name, value] for name, value in about.items()])
    write(output, text)  # a folder that cannot be written is seen before eight minutes are spent
    failed = []
    for name in args.parts.split(","):
        print(f"{name} …", flush=True)
        markdown, good = run_part(name, shapes, min(PARTS[name] * args.minutes / 8, end - time.monotonic()))
        failed += [] if good else [name]
        text += f"\n## {name.capitalize()}\n\n{markdown}"
        write(output, text)  # what is done stays if the rest is cut short
    print(f"report: {output}")
    if failed:
        print(f"failed: {', '.join(failed)}; the report says how")
        sys.exit(1)


if __name__ == "__main__":
    main()
