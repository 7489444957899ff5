"""Everything that is claimed for GPUs, shown on this machine's: one command, one report.

    make gpu                                         all of it, eight minutes at most; no network
    python benchmarks/gpu.py --parts scoring,profile

1. parity    tests/on_gpu: both phases against the plain forward, each model type, each dtype; and by how much they differ
2. scoring   tokens/s and share of the GPU's peak at OLMo 3's 7B shape with random weights, by tokens per batch; memory against what
             --tokens-per-batch auto planned
3. profile   where the time goes, by kind of kernel, in scoring and in a training micro-step
4. several   two workers, one worker with the model over two GPUs, two ranks, where there are two GPUs
5. training  packed rows by tokens against stock TRL, at its best micro-batch (benchmarks/training.py)

Each part runs in a process of its own, for an error of CUDA spoils its process, and prints what it has as soon as it has it. One that fails or
takes longer than its share of the time that is left is said in the report, and the next goes on; the exit code is then 1. No process holds
a GPU while another one uses it, but for the several of one command: some GPUs take one process at a time.
"""

import argparse
import contextlib
import ctypes
import importlib.metadata
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUTF8": "1",  # whatever the locale: the report is read as UTF-8
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from apart import apart
from shapes import SHAPES, num_parameters

OF_A_RUN = ("log_probs", "entropy", "mean_logits", "is_top1")
"""What a training run asks the head for: its loss and TRL's metrics."""

BUDGETS = (2048, 4096, 8192, 16384, 32768)
GIB = 2**30

KINDS = {
    "attention": r"flash|fmha|attention|sdpa|softmax_lse",
    "matrix products": r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitk|aten::(mm|addmm|bmm|linear)$",
    "copies between host and device": r"memcpy.*(htod|dtoh)|aten::_to_copy",
    "reductions and softmax": r"triton_(red|per)_|^_(forward|backward)_kernel|reduce|softmax|norm|logsumexp|cumsum|argmax",
    "element-wise": r"triton_poi_|elementwise|vectorized|index|gather|scatter|copy|fill|cat|memset|memcpy|adam|foreach",
    "collectives": r"nccl",
}
"""Names of kernels, the first that fits; of operators where the profiler has no device times. `_forward_kernel` is the head's softmax (trl.kernels)."""


def machine() -> dict:
    """What the report begins with. Errors of GPUs that cannot be used are one line."""
    import devices
    from store.errors import InputError

    try:
        device = devices.device(0)
    except InputError as error:
        raise SystemExit(f"Error: {error}") from None
    if device.type != "cuda":
        raise SystemExit("Error: there is no GPU here; make gpu is about them.")

    import torch

    free, memory = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability(0)
    return {
        "device": torch.cuda.get_device_name(0),
        "GPUs": torch.cuda.device_count(),
        "memory": f"{free / GIB:.1f} of {memory / GIB:.1f} GiB free",
        "PyTorch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "driver": devices.driver(),
        "compute capability": f"{major}.{minor}; PyTorch has kernels for {', '.join(torch.cuda.get_arch_list())}",
        "transformers, trl, deepspeed, triton": ", ".join(map(version, ("transformers", "trl", "deepspeed", "triton"))),
        "commit": commit(),
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a machine without git
        return "unknown"
    return done.stdout.strip() or "unknown"


def shapes_for(gib: float) -> tuple[str, str]:
    """What a GPU with so much free memory can score in bfloat16, and train alone: weights, gradients and optimizer in 18 bytes per parameter,
    stock TRL's reference in 2; a quarter more and 2 GiB for what is computed."""

    def largest(names: tuple[str, ...], per_parameter: int) -> str:
        return next((name for name in names if 1.25 * per_parameter * num_parameters(name) / GIB + 2 <= gib), "tiny")

    return largest(("7B", "1B"), 2), largest(("7B/4", "1B", "1B/4"), 20)


def own_environment() -> dict[str, str]:
    """Of a part: it is no task of the srun in whose shell this may run, and starts processes itself."""
    of_a_launcher = re.compile(r"RANK|WORLD_SIZE|LOCAL_RANK|(SLURM|PMI|PMIX|OMPI|PMI2)_.*")
    return {name: value for name, value in os.environ.items() if not of_a_launcher.fullmatch(name)}


def first_gpus(number: int) -> dict[str, str]:
    """The variable that shows a process the first of the GPUs that this one sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[:number] if visible[0] else map(str, range(number)))}


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(row(*line) + "\n" for line in lines)


def row(*cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


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


def part_parity(shape: str, seconds: float) -> None:
    # Training first, in a process that sees one GPU, for it is one rank; this process has not touched any yet.
    command = [sys.executable, "-m", "pytest", *PYTEST, str(ROOT / "tests" / "on_gpu" / "training.py")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | first_gpus(1), capture_output=True, text=True, check=False)
    of_training = done.stdout
    print(f"`tests/on_gpu/training.py`: {last_line(of_training)}\n", flush=True)

    import numpy as np
    import pytest
    import tiny
    import torch
    from test_attention_cuda import gradients
    from test_scoring import pairs

    from precompute.scorer.scoring import score

    torch.set_num_threads(1)  # what is compared on the CPU is tiny
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

    files = ["scoring.py", "spread.py"] if torch.cuda.device_count() > 1 else ["scoring.py"]
    with contextlib.redirect_stdout(io.StringIO()) as of_scoring:  # in this process, which has imported all they need
        code = pytest.main([*PYTEST, *(str(ROOT / "tests" / "on_gpu" / name) for name in files)])
    print(f"{' and '.join(f'`tests/on_gpu/{name}`' for name in files)}: {last_line(of_scoring.getvalue())}\n", flush=True)
    failed = [said for said, bad in ((of_training, done.returncode), (of_scoring.getvalue(), code)) if bad]
    if failed:
        raise SystemExit("\n".join(said[-3000:] for said in failed) + done.stderr[-1000:])


PYTEST = ("-q", "-p", "no:cacheprovider", "--no-header", "--tb=short", "--show-capture=no", "-W", "ignore")
"""The report has room for what failed and by how much."""


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "nothing was printed")


def part_scoring(shape: str, seconds: float) -> None:
    import torch
    from shapes import forward_flops, random_model

    from precompute.scorer.budget import SHARE, free_memory, largest_budget
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
        *whole, _ = pack(sequences_of(4 * budget, min(8192, budget), vocabulary), budget)  # the last holds what was left over
        batches = whole[:4]
        try:
            with ready_to_score(model):
                score_packed(model, batches[0]).cpu()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                started = time.perf_counter()
                for batch in batches:
                    score_packed(model, batch).cpu()
                took = time.perf_counter() - started
        except torch.cuda.OutOfMemoryError:
            return ["out of memory", "", "", ""]
        finally:
            torch.cuda.empty_cache()
        tokens = sum(len(batch.input_ids) for batch in batches)
        rate = sum(forward_flops(model.config, layers, head, batch) for batch in batches) / took
        share = f"{rate / peak:.1%}" if peak else "unknown peak"
        memory = torch.cuda.max_memory_allocated() / GIB
        return [f"{tokens / took:,.0f}", f"{rate / 1e12:,.1f}", share, f"{memory:.2f}"]

    print(
        f"OLMo 3's kind, shape {shape} ({SHAPES[shape]['num_hidden_layers']} layers of {SHAPES[shape]['hidden_size']:,}), bfloat16,"
    )
    print("random weights, lengths as in Dolci-Think; the peak is the data sheet's, dense.", end=" ")
    largest = _rate_of_a_product(256 if small else 8192)
    print(f"A product of {'256' if small else '8,192'} squared here: {largest / 1e12:,.1f} TFLOP/s.\n")
    columns = ["tokens per batch", "tokens/s", "TFLOP/s", "of the peak", "GiB at most, weights included"]
    print(table(columns, []), end="")
    for budget in budgets:
        print(row(f"{budget:,}", *measured(budget)), flush=True)

    if small:  # as large a part of a small device: no huge batch on a host's processor
        held = torch.empty(max(0, torch.cuda.mem_get_info()[0] - 96 * 2**20), dtype=torch.uint8, device=device)
    free = free_memory(device)
    longest = 256 if small else 8192
    planned = largest_budget(model, layout="packed", max_length=longest, num_workers=1)
    with ready_to_score(model):
        (batch, *_) = pack(sequences_of(planned, longest, vocabulary), planned)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        score_packed(model, batch)
        used = torch.cuda.max_memory_allocated() - before
    print(
        f"\n`--tokens-per-batch auto` chose {planned:,} tokens, to stay within {SHARE['cuda']:.0%} of {free / GIB:.2f} GiB that were free;"
    )
    print(f"a batch of {len(batch.input_ids):,} tokens took {used / GIB:.2f} GiB.\n", flush=True)
    if small:
        del held

    # Last, for the compiler may take longer than there is time.
    budget = 16384 if not small else budgets[-1]
    compiled = _compiled(lambda: measured(budget))
    if isinstance(compiled, str):
        print(f"Not compiled: {compiled}\n")
    else:
        print(table(columns, [[f"{budget:,}, compiled", *compiled]]))
    if used > free * SHARE["cuda"]:
        raise SystemExit("--tokens-per-batch auto: more than was planned")


def _rate_of_a_product(size: int) -> float:
    """FLOPs per second of the fastest of ten, bfloat16."""
    import torch

    one, other = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        one @ other
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def _compiled(measure):
    """What `measure()` returns with compiled layers, or the words of why they do not run here."""
    from precompute.scorer.compiled import named_compiler, use_compiler
    from store.errors import InputError

    try:
        use_compiler(True, layout="packed")
        with named_compiler():
            return measure()
    except InputError as error:
        return " ".join(str(error).split())
    finally:
        use_compiler(False, layout="packed")


def part_profile(shape: str, seconds: float) -> None:
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
        packed_forward(model, ids, mask, labels, OF_A_RUN).loss.backward()
        model.zero_grad()

    def of_micro_step() -> dict:
        with ready_to_train(model):
            return _by_kind(micro_step)

    def show(measured: dict[str, dict]) -> None:
        rows = [
            [name, *(f"{each['kinds'].get(name, 0) / max(sum(each['kinds'].values()), 1e-9):.1%}" for each in measured.values())]
            for name in (*KINDS, "other")
        ]
        rows.append(["milliseconds, together", *(f"{sum(each['kinds'].values()):,.1f}" for each in measured.values())])
        rows.append(["milliseconds by the clock", *(f"{each['clock']:,.1f}" for each in measured.values())])
        print(table(["kind", *measured], rows))
        for what, each in measured.items():
            if each["other"]:
                print(f"Other, in {what}: {', '.join(each['other'])}\n")
        sys.stdout.flush()

    try:
        measured["a training micro-step"] = of_micro_step()
    finally:  # scoring's all the same
        how = "" if small else ", the micro-step with gradient checkpointing"
        print(f"Shape {shape}, {len(batch.input_ids):,} tokens{how}, by the profiler", end="")
        on_device = all(each["device"] for each in measured.values())
        print(".\n" if on_device else "; it has no times of kernels here, so these are the host's, by operator.\n")
        show(measured)
    compiled = _compiled(of_micro_step)  # last, for it may take longer than there is time
    if isinstance(compiled, str):
        print(f"Not compiled: {compiled}\n")
    else:
        show({"a training micro-step, compiled": compiled})


def _by_kind(work) -> dict:
    """Milliseconds by KINDS of the second run of `work`, and by the clock of the third; the largest of those that are of no kind."""
    import torch
    from torch.autograd import DeviceType
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
    kernels, operators = {}, {}
    for each in recorded.key_averages():  # an operator's device times are those of its kernels, which are events too
        if each.device_type == DeviceType.CPU:
            if each.key.startswith("aten::"):
                operators[each.key] = each.self_cpu_time_total / 1e3
        elif not each.is_user_annotation:
            kernels[each.key] = each.self_device_time_total / 1e3
    kinds: dict[str, float] = {}
    other: dict[str, float] = {}
    for name, milliseconds in (kernels or operators).items():
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "other")
        kinds[kind] = kinds.get(kind, 0.0) + milliseconds
        if kind == "other" and kernels:
            other[name[:60]] = other.get(name[:60], 0.0) + milliseconds
    largest = sorted(other, key=other.get, reverse=True)[:3]
    return {
        "kinds": kinds,
        "clock": clock,
        "device": bool(kernels),
        "other": [f"`{name}` {other[name]:.1f} ms" for name in largest if other[name] > 0.01 * sum(kinds.values())],
    }


def part_several(shape: str, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        score = ["precompute", "--dataset", "demo", "--dtype", "bfloat16", "--shard-size", 16, "--tokens-per-batch", 2048]
        for name, how in (("one", ["--num-workers", 1, "--gpus-per-worker", 2]), ("two", ["--num-workers", 2])):
            took = _by_two([*score, "--ref-store", folder / name, *how])
            print(f"- `precompute {' '.join(map(str, how))}` on the demo's 88 pairs: {took:.0f} s, start included", flush=True)
        parts = sorted(path.name for path in (folder / "one").glob("part-*.parquet"))
        same = [name for name in parts if (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()]
        print(f"- {len(same)} of {len(parts)} shards are the same bytes from one worker and from two", flush=True)
        train = ["train", "--ref-store", folder / "two", "--output-dir", folder / "run"]
        train += ["--max-steps", 3, "--effective-batch-size", 8, "--tokens-per-batch", 4096]
        took = _by_two([*train, "--num-processes", 2, "--save-strategy", "no"])
        print(f"- `train --num-processes 2`, three steps of 8 pairs: {took:.0f} s, start included\n", flush=True)
        if len(same) < len(parts):
            raise SystemExit("shards differ")


def _by_two(words: list) -> float:
    """Seconds of a command that uses two GPUs. SystemExit where it fails, or does not."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "cli.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode or not re.search("^device: 2 x ", done.stdout + done.stderr, re.MULTILINE):
        raise SystemExit(f"{' '.join(map(str, words))}\n{(done.stdout + done.stderr)[-2000:]}")
    return time.perf_counter() - started


def part_training(shape: str, seconds: float) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    end = time.monotonic() + seconds
    small = shape == "tiny"
    world = 1 if small else apart(_num_gpus)  # each process is started for each contender
    longest, vocabulary, steps = (128, 1000, 1) if small else (4096, 100_278, 3)
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
            steps,
            "--contenders",
            "tokens,online",
        ]
        command += ["--micro-batches", "2" if small else "1,2,4", "--tokens-per-batch", 512 if small else 16384]
        print(
            f"Shape {shape}, random weights, with gradient checkpointing; the first step is left out. Times are seconds of the clock per pair.\n\n```",
            flush=True,
        )
        command += ["--seconds", f"{end - time.monotonic() - 5:.0f}"]  # the last lines compare what there is by then
        env = os.environ | {"PYTHONPATH": _path()} | (first_gpus(1) if small else {})
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT / "benchmarks", env=env, check=False)
        print("```\n", flush=True)
        if done.returncode:
            raise SystemExit(f"benchmarks/training.py ended with {done.returncode}")


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


# ---- the report

PARTS = {"parity": 110, "scoring": 110, "profile": 70, "several": 80, "training": 110}
"""Seconds of eight minutes. Each part may take its share of the time that is left for it and those after it: what one leaves is the others'."""


def run_part(name: str, shapes: tuple[str, str], seconds: float) -> tuple[str, bool]:
    """Its Markdown, and whether it succeeded."""
    command = [sys.executable, str(Path(__file__)), "--part", name, "--shapes", ",".join(shapes), "--seconds", f"{seconds:.0f}"]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, env=own_environment(), start_new_session=True)
        try:
            code = process.wait(max(seconds, 1))
            problem = f"ended with exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            problem = f"took longer than {seconds:.0f} s"
        finally:  # on Ctrl-C too: nothing stays on a GPU
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            end_orphans()
        out.seek(0)
        err.seek(0)
        text, last = (file.read().decode(errors="replace") for file in (out, err))
    if problem:
        if text.count("```") % 2:
            text += "```\n"
        text += f"\n**This part {problem}.**\n\n```\n{last.strip()[-1500:]}\n```\n"
    return text, problem is None


def adopt_orphans() -> None:
    """Let descendants whose parent ends become this process's children. torchrun's ranks have sessions of their own; when it is killed they go on."""
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_orphans() -> None:
    """Kill what a part has left, and what that has left."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while left := children.read_text().split():
        for each in left:
            os.kill(int(each), signal.SIGKILL)
            os.waitpid(int(each), 0)


def write(output: Path, text: str) -> None:
    """The report so far, whole or as it was. Where it cannot be written it is printed, and SystemExit says why."""
    text = re.sub(r"\n{3,}", "\n\n", text)
    partial = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, output)
    except OSError as error:
        print(text)
        raise SystemExit(f"Error: the report cannot be written: {error}. Make room, or name another place: --output FILE") from None


def refuse_small_disk(trained: str) -> None:
    """Training saves its model for all contenders. SystemExit where there is no room for it."""
    place = tempfile.gettempdir()
    needed, free = 2.5 * num_parameters(trained), shutil.disk_usage(place).free
    if free < needed:
        raise SystemExit(
            f"Error: {place} has {free / GIB:.1f} GiB free, {needed / GIB:.1f} are needed. Name a larger place: TMPDIR=/larger make gpu"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="of these, in this order")
    parser.add_argument(
        "--shapes", help="what is scored and what is trained, of benchmarks/shapes.py  [default: what fits the GPU]"
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--output", type=Path, help="[default: runs/gpu/<device>.md]")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [name for name in args.parts.split(",") if name not in PARTS]:
        parser.error(f"--parts {','.join(unknown)}: no such part; there are {', '.join(PARTS)}")
    if args.shapes and args.shapes.count(",") != 1:
        parser.error(f"--shapes {args.shapes}: two are needed, of what is scored and of what is trained, such as 7B,7B/4")
    if unknown := [name for name in (args.shapes or "").split(",") if name and name not in SHAPES]:
        parser.error(f"--shapes {','.join(unknown)}: no such shape; there are {', '.join(SHAPES)}")
    if args.part:
        scored, trained = args.shapes.split(",")
        from store.errors import InputError

        try:
            return globals()[f"part_{args.part}"](scored if args.part == "scoring" else trained, args.seconds)
        except InputError as error:
            raise SystemExit(f"Error: {error}") from None

    for sent, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        signal.signal(sent, lambda *_, code=code: sys.exit(code))  # so that run_part ends its part
    adopt_orphans()
    end = time.monotonic() + 60 * args.minutes
    about = apart(machine)
    shapes = tuple(args.shapes.split(",")) if args.shapes else shapes_for(float(about["memory"].split()[0]))
    refuse_small_disk(shapes[1])
    output = args.output or ROOT / "runs" / "gpu" / f"{re.sub(r'[^A-Za-z0-9]+', '-', about['device']).strip('-')}.md"
    text = f"# {about['device']}\n\n" + table(["what", "found"], [[name, value] for name, value in about.items()])
    write(output, text)  # a folder that cannot be written is seen before eight minutes are spent
    failed, parts = [], args.parts.split(",")
    for index, name in enumerate(parts):
        if name == "several" and about["GPUs"] < 2:
            markdown, good = "This machine has one GPU.\n", True
        else:
            share = PARTS[name] / sum(PARTS[each] for each in parts[index:] if each != "several" or about["GPUs"] > 1)
            seconds = max(0.0, share * (end - time.monotonic()))
            print(f"{name}: {seconds:.0f} s at most", flush=True)
            markdown, good = run_part(name, shapes, seconds)
        failed += [] if good else [name]
        text += f"\n## {name.capitalize()}\n\n{markdown}"
        write(output, text)  # what is done stays if the rest is cut short
    print(f"report: {output}")
    if failed:
        print(f"failed: {', '.join(failed)}; the report says how")
        sys.exit(1)


if __name__ == "__main__":
    main()
