"""Evaluation that is exact for any batch size and number of ranks: TRL's loss and metrics, computed once over all pairs.

TRL averages what it computes of single batches: a last batch of two pairs counts as much as a full one, and pairs that even out the ranks
count twice. Here:

1. run      each rank runs the policy on batches that no other rank has        TRL's own call of the model, watched
2. keep     what the head says of each completion token: some 20 bytes          `Told`
3. replay   rank 0 runs TRL's loss on the tokens of all pairs as one batch      on the CPU, where there is room
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.distributed
from torch.utils.data import DataLoader, Dataset
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from precompute.scorer.api import enough_memory
from train.data import REFERENCE
from train.metrics import gathering
from train.packed import PER_TOKEN


class Dropped(Exception):
    """An evaluation was ended early, on all ranks at once: the run was told to stop (train/interrupt.py)."""


@dataclass(frozen=True)
class Told:
    """What the policy's head told of one batch of pairs, on the CPU."""

    counts: torch.Tensor
    """int64 [2 pairs]: completion tokens of each sequence, chosen first."""
    values: dict[str, torch.Tensor]
    """Names of PER_TOKEN to [sum of counts]."""
    reference: dict[str, torch.Tensor]
    """REFERENCE to float32 [pairs]."""
    aux_loss: torch.Tensor | None
    """Of the batch, by a mixture's router; it is no mean over pairs, so that of all pairs is their mean, weighted by tokens."""


def evaluate(trainer: DPOTrainer, dataset: Dataset, rank: int, world: int) -> tuple[float, dict[str, list[float]]]:
    """(loss, TRL's metrics as `trainer._metrics` has them) of the pairs of `dataset`. Every rank calls it, and all get the same.

    Raises Dropped where a callback's `on_prediction_step`, which all ranks call once per batch of any, asks to stop, and InputError where memory
    runs out.
    """
    batches, advice = trainer.eval_batches(dataset), trainer.smaller_eval_batches(dataset)
    loader = DataLoader(
        dataset,
        batch_sampler=batches[rank::world],
        collate_fn=trainer.data_collator,
        num_workers=trainer.args.dataloader_num_workers,
        generator=torch.Generator(),  # it would draw from training's random numbers
    )
    trainer.model.eval()
    mine = []
    for _, inputs in zip_longest(range(math.ceil(len(batches) / world)), loader):
        trainer.control = trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)
        if trainer.control.should_epoch_stop:
            raise Dropped
        if inputs is not None:
            with enough_memory("in an evaluation", advice):
                mine.append(watch(trainer, trainer._prepare_inputs(inputs)))
    everyones = [mine]
    if world > 1:
        everyones = [None] * world if rank == 0 else None
        torch.distributed.gather_object(mine, everyones)
    result = [None]
    if rank == 0:
        in_order = [everyones[index % world][index // world] for index in range(len(batches))]
        result = [replay(trainer, in_order)]
    if world > 1:
        torch.distributed.broadcast_object_list(result)
    return result[0]


def watch(trainer: DPOTrainer, inputs: dict) -> Told:
    """Run the policy on one batch as TRL's loss does."""
    seen = []

    def model(**arguments):
        seen.append(trainer.model(**arguments))
        return seen[0]

    with torch.no_grad(), trainer.compute_loss_context_manager():
        _trls_loss(trainer, model, inputs, trainer.accelerator.device)
    (output,) = seen
    mask = inputs["completion_mask"][:, 1:].bool()
    values = {name: getattr(output, name) for name in PER_TOKEN}
    return Told(
        counts=mask.sum(dim=1).cpu(),
        values={name: value[:, -mask.shape[1] :][mask].cpu() for name, value in values.items() if value is not None},
        reference={name: inputs[name].cpu() for name in REFERENCE},
        aux_loss=None if output.aux_loss is None else output.aux_loss.detach().float().cpu(),
    )


def replay(trainer: DPOTrainer, told: list[Told]) -> tuple[float, dict[str, list[float]]]:
    """TRL's loss and metrics of all these pairs as one batch. Each sequence stands as one prompt token and its completion."""
    counts = torch.cat([_sides(each.counts, side) for side in (0, 1) for each in told])
    completion = torch.arange(int(counts.max())) < counts[:, None]
    mask = torch.nn.functional.pad(completion, (1, 0)).to(torch.int8)
    placed = {}
    for name in told[0].values:
        parts = [each.values[name].split(each.counts.tolist()) for each in told]
        tokens = torch.cat([part for side in (0, 1) for each in parts for part in _sides(each, side)])
        placed[name] = torch.zeros(completion.shape, dtype=tokens.dtype).masked_scatter(completion, tokens)
    aux_loss = None
    if told[0].aux_loss is not None:
        weights = torch.stack([each.counts.sum() for each in told])
        aux_loss = (torch.stack([each.aux_loss for each in told]) * weights).sum() / weights.sum()
    absent = dict.fromkeys(name for name in PER_TOKEN if name not in placed)
    output = FusedCausalLMOutput(loss=None, label_mask=completion, aux_loss=aux_loss, **placed, **absent)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": mask,
        "completion_mask": mask,
        **{name: torch.cat([each.reference[name] for each in told]) for name in REFERENCE},
    }
    loss, metrics = _trls_loss(trainer, lambda **arguments: output, inputs, torch.device("cpu"))
    return loss, metrics


def _sides(sequences, side: int):
    """Chosen (0) or rejected (1) of a batch in which the chosen stand first."""
    half = len(sequences) // 2
    return sequences[side * half : (side + 1) * half]


def _trls_loss(trainer: DPOTrainer, model: Callable, inputs: dict, device: torch.device) -> tuple[float, dict[str, list[float]]]:
    """TRL's loss and metrics of one batch, by this rank alone."""

    def same(values: torch.Tensor) -> torch.Tensor:
        return values

    with gathering(trainer, "eval", device, same, same) as metrics:
        loss = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
        return float(loss), dict(metrics)
