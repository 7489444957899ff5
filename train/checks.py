"""What the options of a run must satisfy, each by itself and together: asked when a TrainConfig is made, before anything is loaded."""

import importlib.util
import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from options import check_choices
from store.errors import InputError
from train.choices import (
    ADAMS,
    F_LOSSES,
    LOSS_TYPES,
    ONE_OF,
    OPTIMIZERS,
    REPORTERS,
    SCHEDULES,
    SMOOTHED,
    SORT_PAIRS,
    WITHOUT_WARMUP,
)

LARGEST_SEED = 2**32 - 1
"""NumPy's."""

OF_FRESH_ADAPTER = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora")
"""Options that an adapter that is trained on has decided."""


def is_pattern(name: str) -> bool:
    """Whether this is a regular expression for whole names of layers, rather than a name or the end of one."""
    return re.fullmatch(r"[\w.,-]+", name) is None


def check(config: Any) -> None:
    """InputError for the first option of this TrainConfig that cannot be meant: out of range, unknown, without effect, or against another one."""
    check_choices(config)
    _check_loss(config)
    _check_schedule(config)
    _check_environment(config)
    _check_adapter(config)


def _check_loss(config: Any) -> None:
    unknown = [name for name in config.loss_type if name not in LOSS_TYPES]
    if unknown or not config.loss_type:
        found = ", ".join(unknown) or "none"
        raise InputError("unknown loss type", where="--loss-type", expected=f"one or more of {', '.join(LOSS_TYPES)}", found=found)
    if config.loss_weights is not None and len(config.loss_weights) != len(config.loss_type):
        raise InputError(
            "every loss type needs its weight",
            where="--loss-weights",
            expected=f"{len(config.loss_type)} weights for {', '.join(config.loss_type)}",
            found=len(config.loss_weights),
        )
    weights = config.loss_weights or (1.0,)
    _require(all(map(math.isfinite, weights)) and any(weights), "--loss-weights", "numbers, not all 0", ",".join(map(str, weights)))
    if len(set(config.loss_type)) < len(config.loss_type):
        raise InputError("a loss is given twice", where=f"--loss-type {', '.join(config.loss_type)}", next="Use --loss-weights.")
    _require(config.beta > 0 and math.isfinite(config.beta), "--beta", "a positive number", config.beta)
    if config.label_smoothing and not set(config.loss_type) & set(SMOOTHED):
        raise InputError(
            f"label smoothing has no effect on {', '.join(config.loss_type)}",
            where=f"--label-smoothing {config.label_smoothing}",
            next=f"Use it with {', '.join(SMOOTHED)}.",
        )
    _require(0 <= config.label_smoothing < 0.5, "--label-smoothing", "at least 0 and below 0.5", config.label_smoothing)
    if "exo_pair" in config.loss_type and not config.label_smoothing:
        raise InputError("exo_pair needs label smoothing above 0", where="--label-smoothing", next="The EXO paper uses 0.001.")
    sorting = [name for name in config.loss_type if name in SORT_PAIRS]
    if config.use_weighting and sorting:
        raise InputError(
            f"weighting pairs has no meaning for {', '.join(sorting)}",
            where="--use-weighting",
            next="It sorts the pairs of a batch; use another loss.",
        )
    if config.use_weighting and "sft" in config.loss_type:
        raise InputError(
            "weighting pairs has no meaning for sft",
            where="--use-weighting",
            next="It is a mean over tokens; leave out one of the two.",
        )
    if config.use_weighting and "hinge" in config.loss_type:
        raise InputError(
            "TRL's weights of pairs change hinge in place, which PyTorch has no gradient of",
            where="--use-weighting, --loss-type hinge",
            next="Leave out one of the two.",
        )
    others = [name for name in config.loss_type if name not in F_LOSSES]
    if config.f_divergence_type != "reverse_kl" and others:
        raise InputError(
            f"TRL knows {', '.join(others)} under reverse_kl alone",
            where=f"--f-divergence-type {config.f_divergence_type}",
            expected=f"losses of {', '.join(F_LOSSES)}",
            next="Leave it out, or use another --loss-type.",
        )
    if (
        config.f_alpha_divergence_coef != _default(config, "f_alpha_divergence_coef")
        and config.f_divergence_type != "alpha_divergence"
    ):
        raise InputError("belongs to --f-divergence-type alpha_divergence", where="--f-alpha-divergence-coef", next="Leave it out.")
    _require(math.isfinite(config.f_alpha_divergence_coef), "--f-alpha-divergence-coef", "a number", config.f_alpha_divergence_coef)
    _require(config.ld_alpha is None or 0 <= config.ld_alpha <= 1, "--ld-alpha", "a number from 0 to 1", config.ld_alpha)


def _check_schedule(config: Any) -> None:
    positive = ("learning_rate", "num_train_epochs", "logging_steps", "save_steps")
    optional = (
        "per_device_train_batch_size",
        "effective_batch_size",
        "gradient_accumulation_steps",
        "max_length",
        "max_steps",
        "eval_steps",
        "save_total_limit",
    )
    for name in (*positive, *(name for name in optional if getattr(config, name) is not None)):
        value = getattr(config, name)
        _require(value > 0 and math.isfinite(value), _option(name), "a positive number", value)
    for name in ("weight_decay", "max_grad_norm", "dataloader_num_workers"):
        value = getattr(config, name)
        _require(value >= 0 and math.isfinite(value), _option(name), "0 or more", value)
    _require(0 <= config.seed <= LARGEST_SEED, "--seed", f"0 to {LARGEST_SEED:,}", config.seed)
    _require(0 <= config.warmup_ratio < 1, "--warmup-ratio", "at least 0 and below 1", config.warmup_ratio)
    if (config.effective_batch_size is None) == (config.gradient_accumulation_steps is None):
        both = "both are given" if config.effective_batch_size is not None else "neither is given"
        raise InputError(f"{both}", where="--effective-batch-size, --gradient-accumulation-steps", expected="one of the two")
    _check_scheduler(config)
    _check_optimizer(config)
    if (config.tokens_per_batch is None) == (config.per_device_train_batch_size is None):
        both = "neither is given" if config.tokens_per_batch is None else "both are given"
        raise InputError(both, where="--tokens-per-batch, --per-device-train-batch-size", expected="one of the two")
    if config.tokens_per_batch is not None and (why := config.refuses_tokens) is not None:
        raise InputError(
            f"micro-batches have a fixed number of pairs with {why}",
            where=f"--tokens-per-batch {config.tokens_per_batch}",
            next="Give --per-device-train-batch-size instead.",
        )
    _require(
        config.eval_fraction is None or 0 < config.eval_fraction < 1,
        "--eval-fraction",
        "a number between 0 and 1",
        config.eval_fraction,
    )
    if len(config.eval_stores) < len(config.eval_ref_store):
        raise InputError(
            "two stores of one name",
            where=f"--eval-ref-store {', '.join(config.eval_ref_store)}",
            next="Name them: --eval-ref-store NAME=PATH.",
        )
    if config.eval_fraction is not None and config.eval_ref_store:
        raise InputError("both are given", where="--eval-fraction, --eval-ref-store", expected="one of the two")
    if config.eval_steps is not None and not config.evaluates:
        raise InputError(
            "there is nothing to evaluate on", where="--eval-steps", next="Give --eval-ref-store or --eval-fraction too."
        )
    _check_saving(config)


def _check_scheduler(config: Any) -> None:
    kind, given = config.lr_scheduler_type, config.lr_scheduler_kwargs or {}
    _require_one_of(kind, tuple(SCHEDULES), "--lr-scheduler-type")
    if unknown := [name for name in given if name not in SCHEDULES[kind]]:
        raise InputError(
            f"the schedule {kind} has no {', '.join(unknown)}",
            where="--lr-scheduler-kwargs",
            expected=", ".join(SCHEDULES[kind]) or "none: it has no arguments",
        )
    if kind in ONE_OF and not set(ONE_OF[kind]) & given.keys():
        raise InputError(
            f"the schedule {kind} needs {' or '.join(ONE_OF[kind])}",
            where="--lr-scheduler-kwargs",
            next=f"""Add --lr-scheduler-kwargs '{{"{ONE_OF[kind][-1]}": {"100" if "steps" in ONE_OF[kind][-1] else "0.1"}}}', say.""",
        )
    if len(both := [name for name in ONE_OF.get(kind, ()) if name in given]) > 1:
        raise InputError("only one of them counts", where=f"--lr-scheduler-kwargs, {' and '.join(both)}", next="Leave one out.")
    if kind in WITHOUT_WARMUP and (config.warmup_steps or config.warmup_ratio):
        raise InputError(
            f"the schedule {kind} has no warm-up",
            where="--warmup-steps" if config.warmup_steps else f"--warmup-ratio {config.warmup_ratio:g}",
            next=f"Give --lr-scheduler-type {kind}_with_warmup, or leave the warm-up out.",
        )
    if config.warmup_steps is not None and config.warmup_ratio:
        raise InputError("both are given", where="--warmup-steps, --warmup-ratio", expected="one of the two")
    _require(config.warmup_steps is None or config.warmup_steps >= 0, "--warmup-steps", "0 or more", config.warmup_steps)


def _check_optimizer(config: Any) -> None:
    for name in ("adam_beta1", "adam_beta2"):
        _require(0 <= getattr(config, name) < 1, _option(name), "at least 0 and below 1", getattr(config, name))
    _require(
        config.adam_epsilon > 0 and math.isfinite(config.adam_epsilon), "--adam-epsilon", "a positive number", config.adam_epsilon
    )
    if config.optim is None:
        return
    changed = [
        _option(name) for name in ("adam_beta1", "adam_beta2", "adam_epsilon") if getattr(config, name) != _default(config, name)
    ]
    if changed and config.optim not in ADAMS:
        raise InputError(f"has no effect on {config.optim}", where=", ".join(changed), next="Leave it out.")
    if (package := OPTIMIZERS[config.optim]) is not None and importlib.util.find_spec(package) is None:
        raise InputError("its package is not installed", where=f"--optim {config.optim}", next=f"pip install {package}")


def _check_saving(config: Any) -> None:
    if config.metric_for_best_model is not None and not config.load_best_model_at_end:
        raise InputError("belongs to --load-best-model-at-end", where="--metric-for-best-model", next="Give both.")
    if not config.load_best_model_at_end:
        return
    where = "--load-best-model-at-end"
    if not config.evaluates:
        raise InputError("there is nothing to evaluate on", where=where, next="Give --eval-ref-store or --eval-fraction too.")
    if config.save_only_model:
        raise InputError("DeepSpeed loads whole checkpoints alone", where=f"{where}, --save-only-model", next="Leave one out.")
    matching = (
        config.save_strategy == "epoch"
        if config.eval_steps is None
        else config.save_strategy == "steps" and config.save_steps % config.eval_steps == 0
    )
    if not matching:
        evaluated = "once per epoch" if config.eval_steps is None else f"every {config.eval_steps} steps"
        raise InputError(
            "every checkpoint must have been evaluated",
            where=where,
            expected="--save-strategy epoch"
            if config.eval_steps is None
            else f"--save-strategy steps, --save-steps a multiple of {config.eval_steps}",
            found=f"saved by {config.save_strategy}{f', every {config.save_steps}' if config.save_strategy == 'steps' else ''}, evaluated {evaluated}",
            next="Change --save-strategy, --save-steps or --eval-steps.",
        )


def _check_environment(config: Any) -> None:
    for name in config.report_to:
        _require_one_of(name, tuple(REPORTERS), "--report-to")
        if importlib.util.find_spec(REPORTERS[name]) is None:
            raise InputError("not installed", where=f"--report-to {name}", next=f"pip install {REPORTERS[name]}")
    if config.push_to_hub != (config.hub_model_id is not None):
        raise InputError("belong together", where="--push-to-hub, --hub-model-id", next="Give both or neither.")
    if config.revision is not None and config.policy is None:
        raise InputError(
            "belongs to --policy", where="--revision", next="Without --policy the store's model and revision are used."
        )
    if config.layout == "packed" and config.attn_implementation is not None:
        raise InputError(
            "the packed layout brings its own attention",
            where=f"--attn-implementation {config.attn_implementation}",
            next="Leave it out, or use --layout padded.",
        )
    _check_stage(config.zero_config)


def _check_adapter(config: Any) -> None:
    modules = config.lora_target_modules
    _require(
        len(modules) < 2 or not any(name == "all-linear" or is_pattern(name) for name in modules),
        "--lora-target-modules",
        "names of layers, or all-linear alone, or one regular expression",
        ", ".join(modules),
    )
    if config.lora_dropout is not None:
        _require(0 <= config.lora_dropout < 1, "--lora-dropout", "at least 0 and below 1", config.lora_dropout)
    if not config.use_peft:
        if given := [
            _option(name) for name in (*OF_FRESH_ADAPTER, "load_in_4bit") if getattr(config, name) not in (None, False, ())
        ]:
            raise InputError("belongs to --use-peft", where=", ".join(given), next="Give --use-peft too.")
        return
    for option, package in (("--use-peft", "peft"), ("--load-in-4bit", "bitsandbytes")):
        if importlib.util.find_spec(package) is None and getattr(config, option[2:].replace("-", "_")):
            raise InputError(f"needs {package}, which is not installed", where=option, next=f"pip install {package}")


def _check_stage(path: Path) -> None:
    """Of a DeepSpeed configuration: 0, 1 or 2."""
    where = f"--zero-config {path}"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        stage = config["zero_optimization"]["stage"]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as JSON: {error}", where=where) from error
    except (KeyError, TypeError) as error:
        raise InputError("names no ZeRO stage", where=where, expected='{"zero_optimization": {"stage": 2, …}, …}') from error
    if stage not in (0, 1, 2):
        raise InputError(
            "this trains with whole parameters on every device",
            where=where,
            expected="ZeRO stage 0, 1 or 2",
            found=f"stage {stage}",
            next="The gate rescores with the live policy before step 1, which needs them whole.",
        )


def _default(config: Any, name: str) -> object:
    return next(field.default for field in fields(config) if field.name == name)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require(holds: bool, where: str, expected: str, found: object) -> None:
    if not holds:
        raise InputError("out of range", where=where, expected=expected, found=found)


def _require_one_of(value: str, allowed: tuple[str, ...], where: str) -> None:
    if value not in allowed:
        raise InputError("unknown value", where=where, expected=f"one of {', '.join(allowed)}", found=value)
