"""What phase 2 shows while it runs: one line per logged step, from rank 0; everything that is logged stays in run.json."""

import time

from transformers import TrainerCallback

from train.balance import pairs_of_steps


class ProgressLines(TrainerCallback):
    """`step 12/1,172 · 1,536 pairs · loss 0.6874 · accuracy 0.62 · margin 0.31 · 5,120 tokens/s · 2.1 pairs/s · 47% MFU · 1:02:33 left`"""

    def __init__(self, pairs_per_step: int, num_pairs: int):
        """`num_pairs`: of an epoch, whose last step may have fewer."""
        self.pairs_per_step, self.num_pairs = min(pairs_per_step, num_pairs), num_pairs
        self.started = self.first_step = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            print(f"training for {state.max_steps:,} steps of {self.pairs_per_step:,} pairs", flush=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or logs is None:
            return
        # transformers logs each evaluation by itself, its seconds among it.
        for which in (name.removesuffix("_runtime") for name in logs if name.startswith("eval") and name.endswith("_runtime")):
            title = which.replace("_", " ", 1)
            print(f"step {state.global_step:,}/{state.max_steps:,} · {title} loss {logs[f'{which}_loss']:.4f}", flush=True)
        if "loss" not in logs:
            return
        elapsed, steps = time.monotonic() - self.started, state.global_step - self.first_step
        left = elapsed / steps * (state.max_steps - state.global_step)
        pairs = pairs_of_steps(state.global_step, self.num_pairs, self.pairs_per_step)
        parts = [f"step {state.global_step:,}/{state.max_steps:,}", f"{pairs:,} pairs"]
        parts.append(f"loss {logs['loss']:.4f}")
        for title, name in (("accuracy", "rewards/accuracies"), ("margin", "rewards/margins")):
            if name in logs:
                parts.append(f"{title} {logs[name]:.2f}")
        if "speed/tokens_per_second" in logs:
            parts.append(f"{logs['speed/tokens_per_second']:,.0f} tokens/s · {logs['speed/pairs_per_second']:.3g} pairs/s")
        if "speed/mfu" in logs:
            parts.append(f"{logs['speed/mfu']:.0%} MFU")
        parts.append(f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d} left")
        print(" · ".join(parts), flush=True)
