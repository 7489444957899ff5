"""Run by test_train_lora.py under torchrun: LoRA from a store against stock TRL's LoRA, under a real DeepSpeed engine on one or two processes.

torchrun --nproc_per_node N tests/lora_cases.py FOLDER    reads the worlds in FOLDER, writes FOLDER/results-N.json from rank 0
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed
from datasets import Dataset
from deepspeed.utils import safe_get_full_grad
from peft import LoraConfig, PeftModel
from ranks import run_cases
from train_setup import DPO_SETTINGS, MAX_LENGTH, run_config
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from precompute.scorer.adapter import adapter_of
from store.errors import RefdpoError
from store.reader import open_store
from train import lora
from train.data import dataset_of, lengths_of
from train.leave import leave
from train.run import train
from train.trainer import StoreDPOTrainer

FOLDER = Path(sys.argv[1])
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
ROWS = json.loads((FOLDER / "rows.json").read_text())
SETTINGS = DPO_SETTINGS | {
    "output_dir": str(FOLDER / "unused"),
    "max_steps": 4,
    "per_device_train_batch_size": 8 // WORLD,
    "gradient_accumulation_steps": 1,
    "learning_rate": 3e-3,
    "gradient_checkpointing": True,
}
LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}


class Gradients(TrainerCallback):
    """Of every adapter weight, before each optimizer step."""

    def __init__(self):
        self.trainer, self.steps = None, []

    def on_train_begin(self, args, state, control, **kwargs):
        engine = self.trainer.model_wrapped
        step = engine.step

        def keep_and_step(*args, **kwargs):
            if engine.is_gradient_accumulation_boundary():
                trained = ((name, each) for name, each in engine.module.named_parameters() if each.requires_grad)
                self.steps.append({name: safe_get_full_grad(each).clone() for name, each in trained})
            step(*args, **kwargs)

        engine.step = keep_and_step


def trained(make) -> tuple[list[float], list[dict], DPOTrainer]:
    """Losses and gradients of each step."""
    gradients = Gradients()
    gradients.trainer = make([gradients])
    gradients.trainer.train()
    losses = [entry["loss"] for entry in gradients.trainer.state.log_history if "loss" in entry]
    return losses, gradients.steps, gradients.trainer


def base(kind: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER / kind / "model", dtype=torch.float32)


def ours(kind: str, model: PeftModel, layout: str, store: str = "store"):
    """`layout` tokens: packed, in micro-batches of so many tokens instead of pairs."""
    where = FOLDER / kind / store
    dataset = dataset_of(open_store(where), MAX_LENGTH)
    by_tokens = {"tokens_per_batch": 256, "pairs_per_step": 8} if layout == "tokens" else {}
    return lambda callbacks: StoreDPOTrainer(
        model=model,
        args=DPOConfig(**SETTINGS | {"precompute_ref_log_probs": True}),
        train_dataset=dataset,
        processing_class=PreTrainedTokenizerFast.from_pretrained(FOLDER / kind / "model"),
        callbacks=callbacks,
        lengths=None if layout == "padded" else lengths_of(dataset, open_store(where), MAX_LENGTH),
        **by_tokens,
    )


def stock(kind: str, model: PreTrainedModel | PeftModel, **more):
    """TRL's own: the reference is the base without the adapter, or a frozen copy of an adapter that is trained on."""
    return lambda callbacks: DPOTrainer(
        model=model,
        args=DPOConfig(**SETTINGS),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=PreTrainedTokenizerFast.from_pretrained(FOLDER / kind / "model"),
        callbacks=callbacks,
        **more,
    )


def compared(mine: tuple, theirs: tuple) -> dict:
    losses = [each[0] for each in (mine, theirs)]
    differences = []
    for ours, stocks in zip(mine[1], theirs[1], strict=True):
        assert ours.keys() == {name for name in stocks if ".ref." not in name} and ours
        largest = max(float(each.norm()) for each in stocks.values())
        differences.append(
            max(float((ours[name] - stocks[name]).norm()) / max(float(stocks[name].norm()), 1e-3 * largest) for name in ours)
        )
    adapters = [name for name, _ in mine[2].model.named_parameters() if ".ref." in name]
    trained = sum(each.requires_grad for each in mine[2].model.parameters())
    return {"ours": losses[0], "theirs": losses[1], "gradient": differences, "of_reference": len(adapters), "trained": trained}


def case_fresh() -> dict:
    """{kind: {layout: compared}}"""
    results = {}
    for kind, layouts in (("llama", ("packed", "padded")), ("olmo3", ("tokens",))):
        theirs = trained(stock(kind, base(kind), peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA)))
        fresh = lambda kind=kind: lora.fresh(base(kind), LoraConfig(task_type="CAUSAL_LM", **LORA), seed=42)
        results[kind] = {layout: compared(trained(ours(kind, fresh(), layout)), theirs) for layout in layouts}
    return results


def case_going_on() -> dict:
    """From a saved adapter, whose merge made the store."""
    adapter = FOLDER / "llama" / "adapter"
    theirs = trained(stock("llama", PeftModel.from_pretrained(base("llama"), adapter, is_trainable=True)))
    results = {}
    for layout in ("packed", "padded"):
        model = lora.going_on(base("llama"), adapter_of(str(adapter)))
        results[layout] = compared(trained(ours("llama", model, layout, "store-adapter")), theirs)
    return results


RUN = run_config(
    FOLDER,
    ref_store=FOLDER / "llama" / "store",
    where="row < 24",
    eval_fraction=0.2,
    learning_rate=3e-3,
    tokens_per_batch=256,
    per_device_train_batch_size=None,
    effective_batch_size=4,
    max_steps=6,
    save_steps=2,
    use_peft=True,
    lora_r=4,
    lora_target_modules=("q_proj,v_proj", "down_proj"),
    use_rslora=True,
    lora_dropout=0.2,
)


def case_run() -> dict:
    """train.run.train: whole, gone on with from the middle (with one process: from what two wrote), and from a saved adapter."""
    if WORLD == 1:
        train(replace(RUN, output_dir=FOLDER / "one", resume=FOLDER / "run" / "checkpoint-4"))
        return {}
    train(RUN)
    train(replace(RUN, output_dir=FOLDER / "resumed", resume=FOLDER / "run" / "checkpoint-4"))
    train(replace(RUN, output_dir=FOLDER / "undropped", lora_dropout=None, save_strategy="no"))
    fresh = {"lora_r": None, "lora_target_modules": (), "use_rslora": False, "lora_dropout": None}
    on = replace(
        RUN, ref_store=FOLDER / "llama" / "store-adapter", output_dir=FOLDER / "on", save_strategy="no", max_steps=2, **fresh
    )
    train(on)
    errors = []
    for refused in (
        replace(on, ref_store=RUN.ref_store, policy=str(FOLDER / "llama" / "adapter"), output_dir=FOLDER / "no"),
        replace(on, lora_r=8, output_dir=FOLDER / "no"),
        replace(RUN, lora_target_modules=("w9",), output_dir=FOLDER / "no"),
        replace(RUN, lora_target_modules=("lm_head",), output_dir=FOLDER / "no"),
    ):
        try:
            train(refused)
            errors.append("")
        except RefdpoError as error:
            errors.append(str(error))
    return {"errors": errors}


if __name__ == "__main__":
    with leave():
        run_cases(globals(), FOLDER / f"results-{WORLD}.json")
