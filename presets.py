"""The presets think | instruct | demo: dataset, model, lengths and OLMo 3's hyperparameters.

Hyperparameters are the user's table for OLMo 3 7B. docs/olmo3.md states where it differs from AI2's own launch scripts.
"""

from dataclasses import dataclass
from pathlib import Path

DEMO = Path(__file__).parent / "demo"


@dataclass(frozen=True)
class Preset:
    """Defaults of both phases for one dataset. A value that changes the numbers has a default here or none at all."""

    name: str
    dataset: str
    """Hub id or path."""
    split: str
    model: str
    """The checkpoint that the dataset was made for: reference of phase 1, policy of phase 2."""
    max_length: int
    """Tokens of prompt + completion; longer sequences keep their start."""
    dtype: str
    beta: float = 5.0
    loss_type: str = "sigmoid_norm"
    """Length-normalized DPO: beta = 5 means nothing without it."""
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.1
    num_train_epochs: float = 1.0
    effective_batch_size: int = 128
    """Pairs per optimizer step over all processes."""
    per_device_train_batch_size: int = 1
    gradient_checkpointing: bool = True


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="think",
            dataset="allenai/Dolci-Think-DPO-7B",
            split="train",
            model="allenai/Olmo-3-7B-Think-SFT",
            max_length=8192,
            dtype="bfloat16",
        ),
        Preset(
            name="instruct",
            dataset="allenai/Dolci-Instruct-DPO",
            split="train",
            model="allenai/Olmo-3-7B-Instruct-SFT",
            max_length=2048,
            dtype="bfloat16",
        ),
        Preset(
            name="demo",
            dataset=str(DEMO / "pairs.jsonl"),
            split="train",
            model=str(DEMO / "model"),
            max_length=512,
            dtype="float32",
            learning_rate=3e-4,
            num_train_epochs=3.0,
            effective_batch_size=8,
            per_device_train_batch_size=2,
            gradient_checkpointing=False,
        ),
    )
}
