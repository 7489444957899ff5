"""Does a policy fit its GPUs under ZeRO? Counted from its configuration, before a weight is read.

Bytes per parameter on each of n GPUs (ZeRO, arXiv 1910.02054, section 3; DeepSpeed 0.19's allocations, which are these or somewhat more):

             weights    float32 weights    Adam's states    gradients
    stage 0     b       4; 0 in float32          8              g         b: bytes of the dtype
    stage 1     b            4 / n             8 / n            g         g: of data_types.grad_accum_dtype, else b
    stage 2     b            4 / n             8 / n           g / n

Rows need room beside them, which memory.py measures once the policy is there.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed

from precompute.scorer.api import free_memory, without_weights
from store.errors import InputError
from train.choices import ADAMS
from train.config import TrainConfig
from train.plan import Policy

GIB = 2**30

BYTES = {"float32": 4, "fp32": 4, "bfloat16": 2, "bf16": 2, "float16": 2, "fp16": 2}


@dataclass(frozen=True)
class PerParameter:
    """Bytes on each GPU: those of its own, and those that all GPUs share."""

    weights: int
    own: dict[str, int]
    shared: dict[str, int]

    @classmethod
    def under(cls, zero: dict, dtype: str, optim: str | None = None, trained: bool = True) -> "PerParameter":
        """At the least, under the DeepSpeed configuration `zero`, with transformers' optimizer `optim`. `trained`: or are the weights frozen, beside
        an adapter that is small? What is kept on the host, and states of other optimizers than float32 Adam, are not counted."""
        stage, weights = zero["zero_optimization"]["stage"], BYTES[dtype]
        offloaded = zero["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
        if not trained or offloaded:
            return cls(weights, {}, {})
        adam = zero["optimizer"].get("type", "").lower() in ("adam", "adamw") if "optimizer" in zero else _in_float32(optim)
        copy = 0 if stage == 0 and dtype == "float32" else 4
        states = {"float32 weights": copy, "Adam's states": 8 if adam else 0}
        gradients = {"gradients": BYTES.get(zero.get("data_types", {}).get("grad_accum_dtype") or dtype, weights)}
        own = (states if stage < 1 else {}) | (gradients if stage < 2 else {})
        shared = (states if stage >= 1 else {}) | (gradients if stage >= 2 else {})
        return cls(weights, *({name: size for name, size in each.items() if size} for each in (own, shared)))

    def on_each_of(self, num_gpus: int) -> float:
        return self.weights + sum(self.own.values()) + sum(self.shared.values()) / num_gpus

    def arithmetic(self, num_gpus: int) -> str:
        """`2 of weights + (4 of float32 weights + 8 of Adam's states + 4 of gradients) / 4`"""
        terms = [f"{size} of {name}" for name, size in ({"weights": self.weights} | self.own).items()]
        if self.shared:
            terms.append(f"({' + '.join(f'{size} of {name}' for name, size in self.shared.items())}) / {num_gpus}")
        return " + ".join(terms)


def _in_float32(optim: str | None) -> bool:
    return optim is None or optim in [name for name, package in ADAMS.items() if package is None]


def refuse_too_large(config: TrainConfig, policy: Policy, *, world: int, device: torch.device) -> None:
    """InputError, with the arithmetic, where `policy` does not fit the GPU of one of `world` ranks at all. Every rank calls it, at the same time, as
    all are to stop."""
    if device.type != "cuda":
        return
    free = torch.tensor(free_memory(device), dtype=torch.float64, device=device)
    if world > 1:
        torch.distributed.all_reduce(free, op=torch.distributed.ReduceOp.MIN)
    num_parameters = without_weights(policy.name, revision=policy.revision, dtype=policy.dtype).num_parameters()
    refuse_by_number(config, policy, num_parameters, world=world, free=int(free))


def refuse_by_number(config: TrainConfig, policy: Policy, num_parameters: int, *, world: int, free: int) -> None:
    """The same for so many parameters and so many bytes free on each GPU."""
    zero = json.loads(Path(config.zero_config).read_text(encoding="utf-8"))
    stage = zero["zero_optimization"]["stage"]
    each = PerParameter.under(zero, policy.dtype, config.optim, trained=not config.use_peft)
    if num_parameters * each.on_each_of(world) <= free:
        return
    room = free / num_parameters - each.weights - sum(each.own.values())
    ways = []
    if room > 0:
        enough = math.ceil(sum(each.shared.values()) / room)
        ways.append(f"train on {enough} GPUs or more, which share all but the {'weights' if stage == 2 else 'rest'}")
    if stage < 2 and num_parameters * PerParameter.under(_of_stage_2(zero), policy.dtype, config.optim).on_each_of(world) <= free:
        ways.append("take stage 2 in --zero-config")
    if not config.use_peft and num_parameters * each.weights <= free:
        ways.append(
            f"train an adapter beside the frozen weights, which take {num_parameters * each.weights / GIB:.3g} GiB: --use-peft"
        )
    if not ways:
        ways.append("take larger GPUs: ZeRO-3, which shares the weights too, is not offered, as the gate needs them whole")
    advice = "; or ".join(ways)
    raise InputError(
        f"the policy does not fit under ZeRO stage {stage}",
        where=policy.name,
        expected=f"{num_parameters * each.on_each_of(world) / GIB:.3g} GiB on each GPU, before any row: {num_parameters:,} parameters x"
        f" ({each.arithmetic(world)}) bytes",
        found=f"{free / GIB:.3g} GiB free",
        next=f"{advice[0].upper()}{advice[1:]}.",
    )


def _of_stage_2(zero: dict) -> dict:
    return zero | {"zero_optimization": zero["zero_optimization"] | {"stage": 2}}
