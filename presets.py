"""The presets: dataset, model, lengths and hyperparameters.

think and instruct are the table of a group that replicates OLMo 3's DPO. think-ai2, instruct-ai2, think-32b and instruct-32b are what AI2's launch
scripts ran (github.com/allenai/open-instruct, scripts/train/olmo3/{7b,32b}_{think,instruct}_dpo.sh; arXiv 2512.13961, table 48), as far as this
project goes: `note` and docs/olmo3.md say where it stops. demo needs no download.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
    max_grad_norm: float = 1.0
    """0: gradients are not clipped."""
    score_turns: str = "completion"
    """As precompute has it."""
    chat_template_sha256: str | None = None
    """Of the text of the template that --chat-template must give; None: the tokenizer's own, or any."""
    chat_template_source: str = ""
    """Where that text is."""
    note: str = ""
    """One line, printed when a run starts: what the user may not expect."""


_NOT_AI2 = "{name} is not the run that AI2 made: that one has {theirs}: {name}-ai2, docs/olmo3.md"

_AI2 = "{name} differs from AI2's run: nothing is clipped, as in AI2's newer code, where accelerate's default clipped at 1.0 (--max-grad-norm 1): docs/olmo3.md"

_LARGE = "; all weights train on 8 GPUs of 180 GB or more, an adapter (--use-peft) on any that hold 64 GB"

_THINK = Preset(
    name="think",
    dataset="allenai/Dolci-Think-DPO-7B",
    split="train",
    model="allenai/Olmo-3-7B-Think-SFT",
    max_length=8192,
    dtype="bfloat16",
    note=_NOT_AI2.format(
        name="think", theirs="learning rate 8e-8 instead of 1e-6, max length 16,384 instead of 8,192, another chat template"
    ),
)

_INSTRUCT = Preset(
    name="instruct",
    dataset="allenai/Dolci-Instruct-DPO",
    split="train",
    model="allenai/Olmo-3-7B-Instruct-SFT",
    max_length=2048,
    dtype="bfloat16",
    note=_NOT_AI2.format(name="instruct", theirs="max length 16,384 instead of 2,048"),
)

_DEMO = Preset(
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
)


def _of_ai2(base: Preset, name: str, *, max_length: int, also: str = "", **changes: Any) -> Preset:
    """What AI2's script ran, as far as it is not `base`: no clipping, and only the last turn of each side counts."""
    note = _AI2.format(name=name) + also
    return replace(base, name=name, max_length=max_length, max_grad_norm=0.0, score_turns="last", note=note, **changes)


PRESETS = {
    preset.name: preset
    for preset in (
        _THINK,
        _INSTRUCT,
        _DEMO,
        _of_ai2(
            _THINK,
            "think-ai2",
            max_length=16384,
            learning_rate=8e-8,
            chat_template_sha256="6d549883b5ed12879e191845c256a30c7dfd4eced0a4f160060a3ea0199d9e3a",
            chat_template_source="`olmo_thinker` in open_instruct/dataset_transformation.py of allenai/open-instruct at commit 68da0a1",
        ),
        _of_ai2(_INSTRUCT, "instruct-ai2", max_length=16384),
        _of_ai2(
            _THINK,
            "think-32b",
            dataset="allenai/Dolci-Think-DPO-32B",
            model="allenai/Olmo-3-32B-Think-SFT",
            max_length=8192,
            learning_rate=7e-8,
            also=_LARGE,
        ),
        _of_ai2(_INSTRUCT, "instruct-32b", model="allenai/Olmo-3.1-32B-Instruct-SFT", max_length=8192, also=_LARGE),
    )
}
