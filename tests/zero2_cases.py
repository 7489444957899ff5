"""Run by test_train_zero2.py under torchrun: every case trains with a real DeepSpeed engine on each of two processes.

torchrun --nproc_per_node 2 tests/zero2_cases.py FOLDER    reads the worlds in FOLDER, writes FOLDER/results.json from rank 0
"""

import copy
import gc
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed
from datasets import Dataset
from deepspeed.utils import safe_get_full_grad
from ranks import run_cases
from tiny import SMALL
from train_setup import DPO_SETTINGS, MAX_LENGTH, SCHEDULE_ARGUMENTS, SCHEDULE_STEPS, SCHEDULE_WARMUP, run_config
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.trainer_utils import SchedulerType
from trl import DPOConfig, DPOTrainer

from store.errors import RefdpoError
from store.reader import open_store
from train.choices import SCHEDULES
from train.data import dataset_of
from train.leave import leave
from train.run import train
from train.trainer import StoreDPOTrainer

FOLDER = Path(sys.argv[1])
TOKENIZER = PreTrainedTokenizerFast.from_pretrained(FOLDER / "model")
ROWS = json.loads((FOLDER / "rows.json").read_text())
SETTINGS = DPO_SETTINGS | {"output_dir": str(FOLDER / "unused")}


def policy(dtype: str = "float32") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER / "model", dtype=getattr(torch, dtype))


class Watched(StoreDPOTrainer):
    """Records what arrives in the loss, and how often the policy is run for it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        (
            self.seen,
            self.forwards,
            self.losses_computed,
            self.logps_dtype,
            self.engine,
        ) = [], 0, 0, "", ""
        self.model.register_forward_hook(self._on_forward)

    def _on_forward(self, module, args, output):
        self.forwards += 1
        self.logps_dtype = str(output.log_probs.dtype)

    def _compute_loss(self, model, inputs, return_outputs):
        self.losses_computed += 1
        self.engine = f"{type(model).__name__} stage {model.zero_optimization_stage()}"
        chosen, rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        self.seen.append((str(chosen.dtype), chosen.tolist(), rejected.tolist()))
        return super()._compute_loss(model, inputs, return_outputs)


def from_store(store: str, dtype: str = "float32", model: PreTrainedModel | None = None, **changes) -> Watched:
    """A trainer fed by the store FOLDER/<store>, already trained."""
    args = DPOConfig(**(SETTINGS | {"bf16": dtype == "bfloat16", "precompute_ref_log_probs": True} | changes))
    dataset = dataset_of(open_store(FOLDER / store), MAX_LENGTH)
    trainer = Watched(
        model=model or policy(dtype),
        args=args,
        train_dataset=dataset,
        processing_class=TOKENIZER,
    )
    trainer.train()
    return trainer


def online(
    model: PreTrainedModel | None = None,
    reference: PreTrainedModel | None = None,
    **changes,
) -> DPOTrainer:
    """TRL's own trainer with a reference model beside the policy, on the same rows as text, already trained."""
    args = DPOConfig(**(SETTINGS | changes))
    model, reference = model or policy(), reference or policy()
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=TOKENIZER,
    )
    trainer.train()
    return trainer


def history(trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def rates(trainer: DPOTrainer, kind: str) -> list[float]:
    """The learning rates of this schedule over the trainer's own optimizer."""
    trainer.lr_scheduler, trainer.args.lr_scheduler_type = None, SchedulerType(kind)
    trainer.args.lr_scheduler_kwargs, trainer.args.warmup_steps = SCHEDULE_ARGUMENTS.get(kind), SCHEDULE_WARMUP
    trainer.create_scheduler(SCHEDULE_STEPS)
    return [trainer.lr_scheduler.lr_lambdas[0](step) for step in range(SCHEDULE_STEPS)]


def case_start() -> dict:
    trainer = from_store("store", max_steps=1)
    return {
        "schedules": {kind: rates(trainer, kind) for kind in SCHEDULES},
        "losses": history(trainer),
        "engine": trainer.engine,
        "world": torch.distributed.get_world_size(),
    }


def case_start_bfloat16() -> dict:
    trainer = from_store("store-bfloat16", "bfloat16", max_steps=1)
    return {
        "losses": history(trainer),
        "seen": trainer.seen,
        "logps_dtype": trainer.logps_dtype,
        "engine": trainer.engine,
    }


def case_shifted() -> dict:
    return {"losses": history(from_store("store-shifted", max_steps=1))}


def case_twenty_steps() -> dict:
    """Also what exists in memory and runs meanwhile: `forwards` per loss, whole models alive."""
    alive = [models_alive()]
    ours = from_store("store", max_steps=20)
    alive.append(models_alive())
    theirs = online(max_steps=20)
    alive.append(models_alive())
    return {
        "ours": history(ours),
        "theirs": history(theirs),
        "our_margins": history(ours, "rewards/margins"),
        "their_margins": history(theirs, "rewards/margins"),
        "forwards": ours.forwards,
        "losses_computed": ours.losses_computed,
        "ref_model": repr(ours.ref_model),
        "models_added": [alive[1] - alive[0], alive[2] - alive[1]],
    }


def case_memory() -> dict:
    """Resident bytes that each way of training adds at its peak, with a model of 64 MB."""
    big = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    added = []
    for start in (
        lambda: from_store("store", model=llama(**big), max_steps=1),
        lambda: online(llama(**big), llama(**big), max_steps=1),
    ):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
        before = resident("VmRSS")
        trainer = start()
        added.append(resident("VmHWM") - before)
        size = sum(parameter.numel() * parameter.element_size() for parameter in trainer.model.parameters())
        del trainer
        gc.collect()
    return {"from_store": added[0], "online": added[1], "model_bytes": size}


def llama(**changes) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**(SMALL | changes)))


def resident(entry: str) -> int:
    """Bytes: VmRSS now, VmHWM at most."""
    return int(re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


RUN = run_config(FOLDER, eval_ref_store=FOLDER / "store-eval", max_steps=6, save_steps=3, eval_steps=3, dataloader_num_workers=1)


def case_run_and_resume() -> dict:
    """train.run.train: through the gate to a saved model, then again from the checkpoint in the middle."""
    whole = train(RUN)
    resumed = train(replace(RUN, output_dir=FOLDER / "resumed", resume=FOLDER / "run" / "checkpoint-3"))
    return {"whole": vars(whole), "resumed": vars(resumed)}


def case_resume_in_the_second_epoch() -> dict:
    """Two steps to an epoch, gone on with after the third."""
    run = replace(RUN, where="row < 16", eval_ref_store=None, eval_steps=None, max_steps=4, output_dir=FOLDER / "epochs")
    train(run)
    train(replace(run, output_dir=FOLDER / "epochs-resumed", resume=FOLDER / "epochs" / "checkpoint-3"))
    return {}


MICRO_STEPS = 32


class BesideThePlainModel(StoreDPOTrainer):
    """One optimizer step. Every micro-step's gradient is computed by a copy of the model that no engine has, too, and added up in float32."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.plain = copy.deepcopy(self.model)
        self.expected = [torch.zeros_like(each, dtype=torch.float32) for each in self.plain.parameters()]
        self.difference = float("nan")

    def training_step(self, model, inputs, *args, **kwargs):
        self.plain.train()
        self.plain.zero_grad()
        (self._compute_loss(self.plain, self._prepare_inputs(inputs), False) / MICRO_STEPS).backward()
        for total, parameter in zip(self.expected, self.plain.parameters(), strict=True):
            total += parameter.grad.float() / torch.distributed.get_world_size()
        model.step = lambda: None  # of the micro-steps but the last it does nothing; the gradients are looked at before the last
        loss = super().training_step(model, inputs, *args, **kwargs)
        del model.step
        if model.is_gradient_accumulation_boundary():
            self._compare(model)
        model.step()
        return loss

    def _compare(self, engine) -> None:
        square, of_expected = 0.0, 0.0
        for total, parameter in zip(self.expected, engine.module.parameters(), strict=True):
            torch.distributed.all_reduce(total)
            square += float((safe_get_full_grad(parameter) - total).square().sum())
            of_expected += float(total.square().sum())
        self.difference = (square / of_expected) ** 0.5


def case_accumulation() -> dict:
    """In bfloat16: how far the engine's gradient of MICRO_STEPS micro-steps is from float32's sum of theirs, as a share of it."""
    differences = {}
    for head, tied in (("tied", True), ("untied", False)):
        torch.manual_seed(0)  # the same weights on both ranks, as from a file
        trainer = BesideThePlainModel(
            model=llama(tie_word_embeddings=tied).to(torch.bfloat16),
            args=DPOConfig(
                **SETTINGS
                | {"bf16": True, "precompute_ref_log_probs": True, "max_steps": 1, "per_device_train_batch_size": 1}
                | {"gradient_accumulation_steps": MICRO_STEPS}
            ),
            train_dataset=dataset_of(open_store(FOLDER / "store-bfloat16"), MAX_LENGTH, positions=[*range(40), *range(24)]),
            processing_class=TOKENIZER,
        )
        trainer.train()
        differences[head] = trainer.difference
    return differences


def case_gate() -> dict:
    """Both ranks get the same error for another policy; with the flag it trains."""
    other = replace(
        RUN,
        policy=str(FOLDER / "other"),
        output_dir=FOLDER / "run-other",
        save_strategy="no",
        eval_ref_store=None,
        eval_steps=None,
    )
    try:
        train(other)
        error = ""
    except RefdpoError as refusal:
        error = str(refusal)
    errors = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error)
    allowed = train(replace(other, allow_different_policy=True, max_steps=2, logging_steps=10))
    return {"errors": errors, "first_loss": allowed.first_loss, "last_loss": allowed.last_loss}


def models_alive() -> int:
    gc.collect()
    return sum(isinstance(each, LlamaForCausalLM) for each in gc.get_objects())


if __name__ == "__main__":
    with leave():
        run_cases(globals(), FOLDER / "results.json")
