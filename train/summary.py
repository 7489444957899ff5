"""What the user reads at the end of phase 2."""

import shlex

from store.command import cli
from train import record
from train.config import TrainConfig
from train.record import TrainResult
from train.speed import PHASES


def describe_speed(speed: dict[str, float]) -> str:
    """`5,120 tokens/s, 2.1 pairs/s, 47 % of the GPUs' peak, ranks waited 2 % · data 1 %, forward 30 %, backward and step 69 %`"""
    parts = [f"{speed['speed/tokens_per_second']:,.0f} tokens/s", f"{speed['speed/pairs_per_second']:.3g} pairs/s"]
    if "speed/mfu" in speed:
        parts.append(f"{speed['speed/mfu']:.1%} of the GPUs' peak")
    if "speed/imbalance" in speed:
        parts.append(f"ranks waited {speed['speed/imbalance']:.1%}")
    phases = [f"{name.replace('_', ' ')} {speed[f'speed/{name}_share']:.0%}" for name in PHASES]
    return f"{', '.join(parts)} · {', '.join(phases)}"


def summary(result: TrainResult, config: TrainConfig) -> str:
    """Steps, loss, speed, memory, and where the model is; then what to type next."""
    steps = result.num_steps - result.num_steps_before
    trained = f"trained {result.num_steps:,} steps on {result.num_pairs:,} pairs"
    if steps:
        trained += f" in {result.seconds:.0f} s ({steps / result.seconds:.2g} steps/s)" if result.seconds else ""
        trained += f"; {result.num_steps_before:,} of the steps before this start" if result.num_steps_before else ""
    else:
        trained += ", all of them before this start, which saved the model"
    lines = [
        trained,
        f"  loss     {result.first_loss:.4f} at step 1, {result.last_loss:.4f} at the end ({' + '.join(config.loss_type)}, beta {config.beta:g})",
        *([f"  speed    {describe_speed(result.speed)}"] if result.speed else []),
        f"  memory   {result.peak_memory / 2**30:.2f} GiB in the process that needed most; no reference model was loaded",
        f"  model    {result.output_dir}",
        f"  record   {result.output_dir}/{record.NAME} (options, store, loss history)",
        f"next: {cli('inspect', '--ref-store', config.ref_store)}",
    ]
    if "tensorboard" in config.report_to:
        lines.append(f"      tensorboard --logdir {shlex.quote(result.output_dir)}")
    return "\n".join(lines)
