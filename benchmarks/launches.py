"""What the host does in a training step: kernel launches, collectives and waits, counted on two ranks of made-up GPUs (tests/made_up_gpu).

    python benchmarks/launches.py

Small models of OLMo 3's kind with 4 and with 8 layers, trained by the command itself, by tokens and by pairs; the line through both numbers of
layers gives those of 32. Needs PyTorch's build for CPUs. A wait is an operator whose result the host reads; a launch is an operator on the device.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = (4, 8)
WANTED = 32
RANKS = 2
WAYS = {
    "by pairs, checkpointing": ("--per-device-train-batch-size", "1", "--gradient-checkpointing"),
    "by tokens, checkpointing": ("--tokens-per-batch", "300", "--gradient-checkpointing"),
    "by tokens, without": ("--tokens-per-batch", "300", "--no-gradient-checkpointing"),
}


def count_in_rank(folder: Path, words: list[str]) -> None:
    """In each rank: run the command, and write what each micro-step after the first optimizer step took."""
    from made_up_gpu import load as made_up

    import cli
    from train.trainer import StoreDPOTrainer

    steps, training_step = [], StoreDPOTrainer.training_step

    def counting(self, *args, **kwargs):
        made_up.clear_counts()
        loss = training_step(self, *args, **kwargs)
        counts = made_up.counts()
        collectives = sum(number for name, number in counts.items() if name.startswith("c10d::") and name not in NOT_COLLECTIVE)
        last = self.accelerator.sync_gradients
        if self.state.global_step:
            steps.append({"last": last, "launches": counts["launches"], "waits": counts["waits"], "collectives": collectives})
        return loss

    StoreDPOTrainer.training_step = counting
    cli.main(["train", *words], standalone_mode=False)
    import torch.distributed

    if torch.distributed.get_rank() == 0:
        (folder / "counts.json").write_text(json.dumps(steps))


NOT_COLLECTIVE = ("c10d::barrier", "c10d::monitored_barrier_")


def make_world(folder: Path, layers: int) -> None:
    """A model of so many layers, and its store."""
    import torch
    from train_setup import make_rows, make_tokenizer
    from transformers import Olmo3Config, Olmo3ForCausalLM

    torch.manual_seed(0)
    config = Olmo3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=258,
        sliding_window=24,
        tie_word_embeddings=False,
        eos_token_id=256,
        pad_token_id=257,
    )
    Olmo3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(48)))
    command = ["precompute", "--dataset", rows, "--model", folder / "model", "--max-length", "96", "--dtype", "bfloat16"]
    run([ROOT / "cli.py", *command, "--ref-store", folder / "store"])


def run(words: list) -> None:
    import made_up_gpu

    done = subprocess.run(
        [sys.executable, *map(str, words)], env=made_up_gpu.environment(RANKS), check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def counted(folder: Path, way: str) -> dict[str, dict[str, float]]:
    """Of one micro-step that ends no optimizer step, and what the one that does adds to it."""
    words = ["--ref-store", folder / "store", "--output-dir", folder / way.replace(" ", "-").replace(",", ""), *WAYS[way]]
    words += [
        "--effective-batch-size",
        "16",
        "--max-steps",
        "3",
        "--loss-type",
        "sigmoid_norm",
        "--beta",
        "5",
        "--learning-rate",
        "1e-6",
    ]
    words += ["--save-strategy", "no", "--logging-steps", "1"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    run([*launcher, __file__, "--in-rank", folder, *words])
    steps = json.loads((folder / "counts.json").read_text())
    within = [step for step in steps if not step["last"]]
    ends = [step for step in steps if step["last"]]
    assert within and ends, steps
    mean = {kind: sum(step[kind] for step in within) / len(within) for kind in ("launches", "collectives", "waits")}
    return {"micro-step": mean, "end": {kind: sum(step[kind] for step in ends) / len(ends) - mean[kind] for kind in mean}}


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if sys.argv[1:2] == ["--in-rank"]:
        return count_in_rank(Path(sys.argv[2]), sys.argv[3:])
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for layers in LAYERS:
            folder = Path(temporary) / str(layers)
            folder.mkdir()
            make_world(folder, layers)
            for way in WAYS:
                found[way, layers] = counted(folder, way)
    few, many = LAYERS
    print(f"{'':26}{'of':12}" + "".join(f"{f'{layers} layers':>30}" for layers in (*LAYERS, f"{WANTED} (line)")))
    for way in WAYS:
        for part in ("micro-step", "end"):
            a, b = found[way, few][part], found[way, many][part]
            line = {kind: a[kind] + (b[kind] - a[kind]) * (WANTED - few) / (many - few) for kind in a}
            texts = (f"{each['launches']:.0f}, {each['collectives']:.0f}, {each['waits']:.0f}" for each in (a, b, line))
            print(f"{way:26}{part:12}" + "".join(f"{text:>30}" for text in texts), flush=True)
    print("launches, collectives, waits; `end`: what the last micro-step of an optimizer step adds, the optimizer among it")


if __name__ == "__main__":
    main()
