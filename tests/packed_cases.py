"""Run by test_train_packed.py under torchrun: the packed layout against stock TRL under a real DeepSpeed engine, on one or two processes.

torchrun --nproc_per_node N tests/packed_cases.py FOLDER         reads the worlds in FOLDER, writes FOLDER/results-N.json from rank 0
torchrun --nproc_per_node N tests/packed_cases.py FOLDER CASE    that case alone
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from datasets import Dataset
from deepspeed.utils import safe_get_full_grad
from ranks import run_cases
from train_setup import DPO_SETTINGS, MAX_LENGTH, run_config
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from store.reader import open_store
from train.balance import RELATE_PAIRS, Shape, deal, deal_whole
from train.choices import LOSS_TYPES
from train.data import dataset_of, lengths_of
from train.leave import leave
from train.run import train
from train.trainer import StoreDPOTrainer

FOLDER = Path(sys.argv[1])
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
KINDS = ("llama", "qwen3", "olmo3") if WORLD == 2 else ("olmo3",)
PAIRS = 8
"""Of a global batch."""

LOSSES = {
    **{name: {"loss_types": [name]} for name in LOSS_TYPES},
    "sigmoid + sft, weighted": {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    "WPO": {"use_weighting": True},
    "ld_alpha": {"ld_alpha": 0.3},
}
PLAIN = {"loss_types": ["sigmoid"], "loss_weights": [1.0], "use_weighting": False, "ld_alpha": None, "label_smoothing": 0.0}

SETTINGS = DPO_SETTINGS | {
    "output_dir": str(FOLDER / "unused"),
    "discopop_tau": 1.0,  # with TRL's 0.05 this loss multiplies the rounding of its argument by 20
    "use_weighting": True,  # so that the head computes what WPO needs; the cases switch it
}


def policy(kind: str, folder: str = "policy") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER / kind / folder)


def packed(kind: str, **changes) -> StoreDPOTrainer:
    args = DPOConfig(**(SETTINGS | {"precompute_ref_log_probs": True} | changes))
    store = open_store(FOLDER / kind / "store")
    dataset = dataset_of(store, MAX_LENGTH)
    return StoreDPOTrainer(
        model=policy(kind),
        args=args,
        train_dataset=dataset,
        processing_class=PreTrainedTokenizerFast.from_pretrained(FOLDER / kind / "model"),
        lengths=lengths_of(dataset, store, MAX_LENGTH),
    )


def stock(kind: str, **changes) -> DPOTrainer:
    """TRL's own trainer with the reference beside the policy, on the same rows as text."""
    return DPOTrainer(
        model=policy(kind),
        ref_model=policy(kind, "model"),
        args=DPOConfig(**(SETTINGS | changes)),
        train_dataset=Dataset.from_list(json.loads((FOLDER / kind / "rows.json").read_text())),
        processing_class=PreTrainedTokenizerFast.from_pretrained(FOLDER / kind / "model"),
    )


def over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of the ranks."""
    torch.distributed.all_reduce(value)
    return value / torch.distributed.get_world_size()


class Step:
    """One forward and backward of a global batch at a time, on the same weights each time: the learning rate is zero."""

    def __init__(self, trainer: DPOTrainer):
        self.trainer, self.gradients = trainer, {}
        trainer.train()
        self.engine = trainer.model_wrapped
        self.optimizer_step = self.engine.step
        self.engine.step = self._keep_gradients

    def _keep_gradients(self, *args, **kwargs):
        self.gradients = {name: safe_get_full_grad(each).clone() for name, each in self.engine.module.named_parameters()}
        self.optimizer_step(*args, **kwargs)

    def run(self, dataset, indices: np.ndarray) -> tuple[float, dict, dict]:
        """Loss, metrics, gradients; `indices` are this rank's."""
        trainer = self.trainer
        trainer._metrics["train"].clear()
        trainer.accelerator.gradient_state._set_sync_gradients(True)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        inputs = trainer.data_collator(dataset.__getitems__(indices.tolist()))
        loss = trainer.training_step(self.engine, trainer._prepare_inputs(inputs))
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
        return over_ranks(loss.clone()).item(), metrics, self.gradients


def case_steps() -> dict:
    """{kind: {loss: {loss: [ours, TRL's], metrics: {name: [ours, TRL's]}, gradient: largest relative difference of a parameter}}}"""
    rank, world = RANK, WORLD
    once = {"per_device_train_batch_size": PAIRS // world, "gradient_accumulation_steps": 1, "max_steps": 1, "learning_rate": 0.0}
    batch = np.arange(3, 3 + PAIRS)
    results = {}
    for kind in KINDS:
        ours, theirs = Step(packed(kind, **once)), Step(stock(kind, **once))
        shape = Shape(PAIRS // world, world, 1)
        tokens = ours.trainer.lengths.packed[batch]
        mine = slice(rank * PAIRS // world, (rank + 1) * PAIRS // world)
        results[kind] = {}
        for name, loss in LOSSES.items():
            smoothing = {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}
            for trainer in (ours.trainer, theirs.trainer):
                vars(trainer).update(PLAIN | {"loss_weights": [1.0] * len(loss.get("loss_types", [1]))} | smoothing | loss)
            dealt = (deal if RELATE_PAIRS.isdisjoint(ours.trainer.loss_types) else deal_whole)(batch, tokens, shape)
            dataset = dataset_of(open_store(FOLDER / kind / "store"), MAX_LENGTH, ours.trainer.ld_alpha)
            ours_loss, ours_metrics, ours_gradients = ours.run(dataset, dealt[mine])
            their_loss, their_metrics, their_gradients = theirs.run(theirs.trainer.train_dataset, batch[mine])
            assert ours_metrics.keys() == their_metrics.keys() and ours_gradients.keys() == their_gradients.keys()
            results[kind][name] = {
                "loss": [ours_loss, their_loss],
                "metrics": {key: [ours_metrics[key], their_metrics[key]] for key in ours_metrics},
                "gradient": max(
                    ((ours_gradients[key] - their_gradients[key]).norm() / their_gradients[key].norm()).item()
                    for key in their_gradients
                ),
                "dealt_anew": bool((np.sort(dealt[mine]) != batch[mine]).any()),
            }
        results[kind]["attention"] = ours.trainer.model.config._attn_implementation
    return results


def case_order() -> dict:
    """What reaches each rank, by its reference values, against the sampler; two epochs. Reached: {epoch: [[position]]} per rank."""
    trainer = packed("llama")
    values = trainer.train_dataset[:]
    known = {
        (np.float32(chosen), np.float32(rejected)): index
        for index, (chosen, rejected) in enumerate(zip(values["ref_chosen_logps"], values["ref_rejected_logps"], strict=True))
    }
    loader = trainer.get_train_dataloader()
    reached = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        inner = getattr(loader.batch_sampler, "batch_sampler", None)
        if hasattr(inner, "set_epoch"):
            inner.set_epoch(epoch)
        reached.append(
            [
                [
                    known[np.float32(c), np.float32(r)]
                    for c, r in zip(b["ref_chosen_logps"].tolist(), b["ref_rejected_logps"].tolist(), strict=True)
                ]
                for b in loader
            ]
        )
    expected = []
    for epoch in (0, 1):
        sampler = trainer.get_train_sampler()
        sampler.set_epoch(epoch)
        expected.append(list(sampler))
    everyones = [None] * WORLD
    torch.distributed.all_gather_object(everyones, reached)
    return {"reached": everyones, "expected": expected}


def case_fifty_steps() -> dict:
    if WORLD == 1:
        return {}
    whole = {"max_steps": 50, "use_weighting": False, "learning_rate": 3e-4, "per_device_train_batch_size": 4}
    ours, theirs = (make("olmo3", **whole, gradient_accumulation_steps=1) for make in (packed, stock))
    for trainer in (ours, theirs):
        trainer.train()
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (ours, theirs)]
    speed = [entry for entry in ours.state.log_history if "speed/tokens_per_second" in entry]
    return {"ours": losses[0], "theirs": losses[1], "speed": speed[-1], "whole_speed": ours.speed.whole_report()}


RUN = run_config(
    FOLDER,
    ref_store=FOLDER / "llama" / "store",
    eval_fraction=0.2,
    loss_type=("sigmoid_norm",),
    beta=5.0,
    max_steps=6,
    save_steps=2,
)
"""Four full batches to an epoch, so that step 6 belongs to the second."""


def case_run_and_resume() -> dict:
    """On two processes a whole run and one that goes on from inside each epoch; on one, that run's checkpoint goes on."""
    if WORLD == 1:
        train(replace(RUN, output_dir=FOLDER / "one", resume=FOLDER / "run" / "checkpoint-2"))
        return {"left": sorted(path.name for path in (FOLDER / "run" / "checkpoint-2").iterdir() if "universal" in path.name)}
    train(RUN)
    train(replace(RUN, output_dir=FOLDER / "resumed", resume=FOLDER / "run" / "checkpoint-4"))
    train(replace(RUN, output_dir=FOLDER / "padded", layout="padded"))
    return {}


def resume_on_more() -> dict:
    """A checkpoint that one process wrote goes on with two. Not among the cases of a whole launch: it needs what the launch of one left."""
    train(replace(RUN, output_dir=FOLDER / "two", resume=FOLDER / "one" / "checkpoint-4"))
    return {"left": sorted(path.name for path in (FOLDER / "one" / "checkpoint-4").iterdir() if "universal" in path.name)}


if __name__ == "__main__":
    with leave():
        run_cases(globals(), FOLDER / f"results-{'-'.join([str(WORLD), *sys.argv[2:]])}.json", *sys.argv[2:])
