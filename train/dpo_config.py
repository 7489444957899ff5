"""A run in TRL's terms: the options of this project -> DPOConfig."""

import json
import os
import warnings

import torch
from trl import DPOConfig

from train.config import TrainConfig


def dpo_config(
    config: TrainConfig, dtype: str, max_length: int, accumulation: int | None, engine_options: dict | None = None
) -> DPOConfig:
    """The same run in TRL's terms. Building it joins the other ranks (transformers does) and needs `join` before.

    `engine_options` complete the DeepSpeed configuration of `config`.
    """
    # accelerate launch may announce a dtype of its own; the store's holds.
    os.environ["ACCELERATE_MIXED_PRECISION"] = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "no")
    if not config.evaluates:
        evaluation = {"eval_strategy": "no"}
    elif config.eval_steps is None:
        evaluation = {"eval_strategy": "epoch"}
    else:
        evaluation = {"eval_strategy": "steps", "eval_steps": config.eval_steps}
    # TRL declares `gradient_checkpointing`, transformers has renamed it and warns; the setting is passed on all the same.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
    return DPOConfig(
        output_dir=str(config.output_dir),
        # the loss
        loss_type=list(config.loss_type),
        loss_weights=list(config.loss_weights) if config.loss_weights is not None else None,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        use_weighting=config.use_weighting,
        router_aux_loss_coef=config.router_aux_loss_coef or 0.0,
        ld_alpha=config.ld_alpha,
        f_divergence_type=config.f_divergence_type,
        f_alpha_divergence_coef=config.f_alpha_divergence_coef,
        max_length=max_length,
        # the store has what these are about
        precompute_ref_log_probs=True,
        remove_unused_columns=False,
        # the course
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        lr_scheduler_kwargs=config.lr_scheduler_kwargs,
        warmup_steps=config.warmup_ratio
        if config.warmup_steps is None
        else config.warmup_steps,  # below 1 it is a share of all steps
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps if config.max_steps is not None else -1,
        per_device_train_batch_size=config.per_device_train_batch_size or 1,  # by tokens the trainer decides
        per_device_eval_batch_size=config.per_device_train_batch_size or 1,
        gradient_accumulation_steps=accumulation or 1,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        **({} if config.optim is None else {"optim": config.optim}),
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        train_sampling_strategy="random" if config.order_by is None else "sequential",
        # the machine
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=not torch.cuda.is_available(),
        deepspeed=json.loads(config.zero_config.read_text(encoding="utf-8")) | engine_options
        if engine_options
        else str(config.zero_config),
        gradient_checkpointing=config.gradient_checkpointing is not False,
        disable_dropout=not config.lora_dropout,  # TRL's would be the adapter's too, against what was asked for
        torch_compile=config.torch_compile and config.layout == "padded",
        dataloader_num_workers=config.dataloader_num_workers,
        # the records
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not a number must be seen
        report_to=list(config.report_to) or "none",
        run_name=config.run_name,
        save_strategy=config.save_strategy,
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        save_only_model=config.save_only_model,
        load_best_model_at_end=config.load_best_model_at_end,
        # In full: transformers adds `eval_` to a name that does not begin with it, and a store's may.
        metric_for_best_model=None if config.deciding_metric is None else f"eval_{config.deciding_metric}",
        **evaluation,
    )
