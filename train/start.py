"""`cli.py train` before its ranks: complete the options, refuse what can be refused without a model, start one process per GPU."""

import inspect
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import launch
from default_store import default_run
from presets import PRESETS, Preset
from quiet import importing
from stop import STOP_TRAINING, Stopped, listening
from store.errors import InputError
from store.reader import open_store
from train import hub, record
from train.alone import refuse_running
from train.beta import default_beta
from train.checkpoint import last_checkpoint
from train.choices import WITHOUT_WARMUP
from train.config import TrainConfig, fixed_pairs
from train.plan import Plan, plan, refuse_folder, refuse_other_course

OF_PRESET = (
    "loss_type",
    "beta",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "num_train_epochs",
    "max_grad_norm",
)


def config_of(given: dict[str, Any], preset: type[Preset] | Preset | None = None) -> TrainConfig:
    """The run's config: what was given, completed by the preset of the store; `preset` where the store is yet to be made."""
    given, ref_store = dict(given), given["ref_store"]
    if preset is None:
        preset = PRESETS.get(open_store(ref_store, check="none").manifest.preset) or Preset
    if given["beta"] is None and given["loss_type"] not in ((), (preset.loss_type,)):
        given["beta"] = default_beta(given["loss_type"])
    without_warmup = given["lr_scheduler_type"] in WITHOUT_WARMUP or given.get("warmup_steps") is not None
    if without_warmup and given["warmup_ratio"] is None:
        given["warmup_ratio"] = 0.0
    for name in OF_PRESET:
        if given[name] is None or given[name] == ():
            given[name] = getattr(preset, name)
    if isinstance(given["loss_type"], str):
        given["loss_type"] = (given["loss_type"],)
    if given["effective_batch_size"] is None and given["gradient_accumulation_steps"] is None:
        given["effective_batch_size"] = preset.effective_batch_size
    if given["tokens_per_batch"] is None and given["per_device_train_batch_size"] is None:
        fixed = fixed_pairs(*(given[name] for name in inspect.signature(fixed_pairs).parameters))
        name = "tokens_per_batch" if fixed is None else "per_device_train_batch_size"
        given[name] = "auto" if fixed is None else preset.per_device_train_batch_size
    if given["gradient_checkpointing"] is None and not preset.gradient_checkpointing:
        given["gradient_checkpointing"] = False
    if given["output_dir"] is None:
        given["output_dir"] = default_run(ref_store)
    if given["zero_config"] is None:
        del given["zero_config"]
    given["report_to"] = tuple(name for name in given["report_to"] if name != "none")
    return TrainConfig(**given)


def start(
    config: TrainConfig, num_processes: int | None, resume_or_start: bool, overwrite: bool = False, options: str | None = None
) -> None:
    """Phase 2 with `num_processes` local ranks, or as the rank that a launcher made this. `options`: the file that --config names.

    Raises what `plan` and `train.run.train` raise; ends the process where it started others.
    """
    process = launch.launched()
    if overwrite and (config.resume or resume_or_start):
        raise InputError("one of the two", where="--overwrite, --resume", next="Start again, or go on.")
    if (config.resume or resume_or_start) and record.finished(config.output_dir) is not None:
        refuse_other_course(config)
        if process is None or process.rank == 0:
            _end_finished(config)
        return
    if resume_or_start:
        config = replace(config, resume=last_checkpoint(config.output_dir) is not None)
    if process is None:
        _start_ranks(config, launch.num_local_processes(num_processes, default_without_gpu=2), overwrite, options)
    with listening(STOP_TRAINING) as stop:
        with importing():
            from train.run import train

        train(config, stop)


def _start_ranks(config: TrainConfig, num_processes: int, overwrite: bool, options: str | None) -> None:
    """Ends the process. What can be refused here need not cost the start of every rank."""
    planned = plan(config, num_processes)
    refuse_running(config.output_dir)
    if overwrite:  # never in a rank: a job that is started again would remove what it has done
        _refuse_what_is_needed(config, planned, options)
        record.remove_run(config.output_dir)
    refuse_folder(config, planned)
    if config.push_to_hub:
        hub.reach(config.hub_model_id)
    code = launch.run_torchrun(num_processes)
    # Told to stop at the very end, the ranks may have finished all the same.
    sys.exit(0 if code == Stopped.exit_code and record.finished(config.output_dir) is not None else code)


def _refuse_what_is_needed(config: TrainConfig, planned: Plan, options: str | None) -> None:
    """InputError where --overwrite would remove what the run starts from: the ranks read it again."""
    needed = [
        ("--config", options),
        ("--policy", planned.policy.name),
        ("--tokenizer", planned.policy.tokenizer),
        ("--chat-template", config.chat_template),
        ("--zero-config", config.zero_config),
        ("--ref-store", config.ref_store),
        *(("--eval-ref-store", path) for path in config.eval_stores.values()),
    ]
    folder = config.output_dir.resolve()
    for option, path in needed:
        if path is not None and Path(path).exists() and (folder == Path(path).resolve() or folder in Path(path).resolve().parents):
            raise InputError(
                f"would remove what the run starts from, {option} {path}",
                where=f"--overwrite, --output-dir {config.output_dir}",
                next="Choose another --output-dir, or copy it elsewhere.",
            )


def _end_finished(config: TrainConfig) -> None:
    """What is left to do for a run that is finished: at most its copy on the Hub."""
    if not config.push_to_hub or hub.is_sent(record.finished(config.output_dir), config.hub_model_id):
        print(f"{config.output_dir}: trained already, nothing to do")
    else:
        print(f"{config.output_dir}: trained already; pushed to {hub.send(config.output_dir, config.hub_model_id)}")
