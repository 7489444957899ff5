"""The DeepSpeed configuration: values that stand in it and in the options are the same, or the run is refused before anything is loaded."""

import json
from pathlib import Path

from store.errors import InputError
from train.config import TrainConfig

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""DeepSpeed's names."""


def refuse_contradictions(config: TrainConfig, dtype: str, accumulation: int | None, batch: int) -> None:
    """InputError naming each value of `--zero-config` that is neither `auto` nor what the options say, with both.

    `accumulation`: micro-batches per optimizer step and rank; `batch`: pairs per optimizer step over all ranks. By tokens the engine's own
    counts are of micro-batches, however many pairs they have, and only `auto` is right.
    """
    said = json.loads(config.zero_config.read_text(encoding="utf-8"))
    where = f"--zero-config {config.zero_config}"
    if "scheduler" in said:
        raise InputError(
            "has a scheduler of its own, which would replace the options'",
            where=where,
            expected=f"--lr-scheduler-type {config.lr_scheduler_type} --warmup-ratio {config.warmup_ratio:g}",
            found=f"scheduler {_type(said['scheduler'])}",
            next='Remove "scheduler" from the file.',
        )
    if "optimizer" in said and config.optim is not None:
        raise InputError(
            "has an optimizer of its own",
            where=where,
            expected=f"--optim {config.optim}",
            found=f"optimizer {_type(said['optimizer'])}",
            next='Remove "optimizer" from the file, or leave out --optim.',
        )
    accumulated = _at(said, "data_types.grad_accum_dtype") or SHORT[dtype]
    if said["zero_optimization"]["stage"] == 0 and accumulated != SHORT[dtype]:
        raise InputError(
            "without ZeRO DeepSpeed adds gradients up in the weights' own dtype",
            where=where,
            expected=f"data_types.grad_accum_dtype {SHORT[dtype]}, with --dtype {dtype} and stage 0",
            found=accumulated,
            next='Remove "data_types" from the file, or take stage 1 or 2.',
        )
    differing = []
    for path, option, value in (
        *(
            (name, f"--tokens-per-batch {config.tokens_per_batch} with {name}", "auto")
            if config.by_tokens
            else (name, option, value)
            for name, option, value in (
                ("train_micro_batch_size_per_gpu", "--per-device-train-batch-size", config.per_device_train_batch_size),
                ("gradient_accumulation_steps", "--gradient-accumulation-steps", accumulation),
                ("train_batch_size", "--effective-batch-size", batch),
            )
        ),
        ("gradient_clipping", "--max-grad-norm", config.max_grad_norm),
        ("bf16.enabled", "--dtype", dtype == "bfloat16"),
        ("fp16.enabled", "--dtype", dtype == "float16"),
        ("optimizer.params.lr", "--learning-rate", config.learning_rate),
        ("optimizer.params.weight_decay", "--weight-decay", config.weight_decay),
        ("optimizer.params.betas", "--adam-beta1, --adam-beta2", [config.adam_beta1, config.adam_beta2]),
        ("optimizer.params.eps", "--adam-epsilon", config.adam_epsilon),
    ):
        found = _at(said, path)
        if found in (None, "auto") or found == value:
            continue
        differing.append((f"{option} {dtype if option == '--dtype' else value}", f"{path} {json.dumps(found)}"))
    if differing:
        raise InputError(
            "contradicts the options",
            where=where,
            expected="; ".join(ours for ours, _ in differing),
            found="; ".join(theirs for _, theirs in differing),
            next='Write "auto" there, or give the same value as an option.',
        )


def stage(path: Path) -> int:
    """ZeRO's, of the DeepSpeed configuration of a run whose options hold."""
    return json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]["stage"]


def _at(config: dict, path: str) -> object:
    """The value at a path of names joined by dots; None where there is none."""
    value: object = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _type(block: object) -> object:
    return block.get("type") if isinstance(block, dict) else block
