"""Run by test_train_bins.py under torchrun: micro-batches by tokens against stock TRL, five optimizer steps, the last of an incomplete batch.

torchrun --nproc_per_node N tests/bins_cases.py FOLDER LOSS,LOSS… M,M…     for M micro-steps writes FOLDER/N-LOSS-M.pt, and of one process
FOLDER/stock-LOSS.pt
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from train_setup import DPO_SETTINGS
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from store.reader import open_store
from train.balance import shuffled
from train.bins import num_micro_steps
from train.choices import LOSS_TYPES, SORT_PAIRS
from train.data import dataset_of, lengths_of
from train.leave import leave
from train.trainer import StoreDPOTrainer

LOSSES = {
    **{name: {"loss_type": [name]} for name in LOSS_TYPES if name not in SORT_PAIRS},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"], "beta": 5.0},
    "sigmoid + sigmoid_norm": {"loss_type": ["sigmoid", "sigmoid_norm"], "loss_weights": [1.0, 0.3]},
    "sigmoid + sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    "WPO": {"use_weighting": True},
    "ld_alpha": {"ld_alpha": 0.3},
}
BATCH, NUM_PAIRS, MAX_LENGTH = 16, 67, 2048
"""Five batches, of which the last has 3 pairs: fewer than there are bins."""


def settings(folder: Path, loss: str) -> dict:
    smoothing = {"label_smoothing": 0.1} if loss in ("exo_pair", "robust") else {}
    mine = {"output_dir": str(folder / "unused"), "max_length": MAX_LENGTH, "learning_rate": 1e-4, "max_steps": 5}
    return DPO_SETTINGS | mine | {"discopop_tau": 1.0} | smoothing | LOSSES[loss]


def budget_for(tokens: np.ndarray, wanted: int, world: int) -> int:
    """The largest budget that gives so many micro-steps."""
    order = shuffled(len(tokens), DPOConfig.seed, 0)
    batches = [tokens[order[start : start + BATCH]] for start in range(0, len(order), BATCH)]

    def needed(budget: int) -> int:
        return max(num_micro_steps(batch, world, budget) for batch in batches)

    low, high = 1, int(tokens.sum())
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) >= wanted else (low, middle - 1)
    assert needed(low) == wanted
    return low


def ours(folder: Path, loss: str, wanted: int, world: int) -> StoreDPOTrainer:
    store = open_store(folder / "store")
    args = DPOConfig(**(settings(folder, loss) | {"precompute_ref_log_probs": True}))
    dataset = dataset_of(store, MAX_LENGTH, args.ld_alpha)
    lengths = lengths_of(dataset, store, MAX_LENGTH)
    trainer = StoreDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        args=args,
        train_dataset=dataset,
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "model"),
        lengths=lengths,
        tokens_per_batch=budget_for(lengths.packed, wanted, world),
        pairs_per_step=BATCH,
    )
    assert args.gradient_accumulation_steps == wanted
    return trainer


def stock(folder: Path, loss: str) -> DPOTrainer:
    changes = {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1}
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        ref_model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=DPOConfig(**(settings(folder, loss) | changes)),
        train_dataset=Dataset.from_list(json.loads((folder / "rows.json").read_text())),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "model"),
    )


def trained(trainer: DPOTrainer) -> dict:
    """What each step logged, and every parameter after the last."""
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    logged = [{name: value for name, value in step.items() if not name.startswith("speed/")} for step in steps]
    weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    return {"logged": logged, "weights": weights}


def main() -> None:
    folder, losses, divided = Path(sys.argv[1]), sys.argv[2].split(","), [int(each) for each in sys.argv[3].split(",")]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for loss in losses:
        results = {f"{world}-{loss}-{wanted}": trained(ours(folder, loss, wanted, world)) for wanted in divided}
        if world == 1:
            results[f"stock-{loss}"] = trained(stock(folder, loss))
        for name, result in results.items():
            if rank == 0:
                torch.save(result, folder / f"{name}.pt")


if __name__ == "__main__":
    with leave():
        main()
