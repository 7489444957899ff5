"""`--tokens-per-batch auto`: with or without gradient checkpointing, and how many tokens to a micro-step, so that a run fits its device.

1. measure  what a micro-step of the policy takes: forward and backward of made-up packed rows of two lengths, with checkpointing and without
2. measure  what DeepSpeed's engine takes of a parameter, in the backward and in the optimizer's step: real steps of two small models under the run's
            own configuration and number of ranks
3. choose   no checkpointing where the budget then holds the longest pair and USEFUL tokens; checkpointing otherwise

All ranks measure at the same time, for the engine's work is collective, and take the worst of what any of them saw.
"""

import gc
import json
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from precompute.scorer.api import MOST, SHARE, MemoryWatch, free_memory
from precompute.scorer.packing import Sequence
from store.errors import InputError
from train.packed import packed_forward, ready_to_train
from train.self_test import as_trl_pads

PROBES = {"cuda": (1024, 4096), "cpu": (128, 512)}
"""Tokens of the two measured rows."""

USEFUL = 16384
"""Tokens to a micro-step beyond which more gain little, so that memory is better spent on what backward would compute again."""

LAYER = 1024
"""Channels of the small models' layers, of 1024 x 1024 parameters each."""

LAYERS = {"cuda": (2, 6), "cpu": (8, 24)}
"""Of the two small models. A host's memory is counted in pages that come and go, so there they are larger."""

GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """Bytes: `per_unit` x units + `constant`."""

    per_unit: float
    constant: float

    def of(self, units: float) -> float:
        """Bytes of so many units."""
        return self.constant + self.per_unit * units

    @classmethod
    def through(cls, small: tuple[float, float], large: tuple[float, float]) -> "Cost":
        """Of two measurements (units, bytes)."""
        per_unit = max(1.0, (large[1] - small[1]) / (large[0] - small[0]))
        return cls(per_unit, max(0.0, small[1] - per_unit * small[0]))


@dataclass(frozen=True)
class Measured:
    """Bytes of the rank that needs most, or has least. Beside the weights, which are there already."""

    free: float
    """What may be used: SHARE of what is free."""
    kept: Cost
    """A micro-step without gradient checkpointing, by its tokens."""
    checkpointed: Cost
    """A micro-step with it."""
    backward: float
    """What the engine holds at most while gradients come: Adam's states, float32 weights, sums of gradients, buffers."""
    step: float
    """What it holds at most in the optimizer's step."""


@dataclass(frozen=True)
class MemoryPlan:
    """What was chosen, and why."""

    gradient_checkpointing: bool
    tokens_per_batch: int
    measured: Measured

    @property
    def used(self) -> float:
        """Bytes that a micro-step of `tokens_per_batch` takes, with the engine's."""
        return self.measured.backward + self._cost.of(self.tokens_per_batch)

    @property
    def _cost(self) -> Cost:
        return self.measured.checkpointed if self.gradient_checkpointing else self.measured.kept

    def __str__(self) -> str:
        return (
            f"--tokens-per-batch auto: {self.tokens_per_batch:,} with{'' if self.gradient_checkpointing else 'out'} gradient checkpointing:"
            f" {self._cost.per_unit / 1e6:.2g} MB per token, {self.measured.backward / GIB:.3g} GiB for the engine"
            f" ({self.measured.step / GIB:.3g} in its step), together {self.used / GIB:.3g} of {self.measured.free / GIB:.3g} GiB"
        )

    def to_json(self) -> dict:
        """For run.json."""
        return asdict(self)


def choose(measured: Measured, *, longest: int, most_useful: int, gradient_checkpointing: bool | None) -> MemoryPlan:
    """`longest`: tokens of the longest pair; `most_useful`: of a rank in one optimizer step; `gradient_checkpointing` None: decide.

    Raises InputError where the engine or the longest pair does not fit.
    """
    if (engine := max(measured.backward, measured.step)) > measured.free:
        raise InputError(
            "gradients and the optimizer's states do not fit the memory",
            where="--tokens-per-batch auto",
            expected=f"{engine / GIB:.3g} GiB for DeepSpeed's engine, beside the weights",
            found=f"{measured.free / GIB:.3g} GiB that may be used",
            next="Train on more GPUs, which share them, or free memory (other processes?).",
        )
    room = measured.free - measured.backward
    for checkpointing in (False, True) if gradient_checkpointing is None else (gradient_checkpointing,):
        cost = measured.checkpointed if checkpointing else measured.kept
        fitting = math.floor((room - cost.constant) / cost.per_unit)
        useful = min(USEFUL, most_useful) if gradient_checkpointing is None and not checkpointing else 0
        if fitting >= max(longest, useful):
            return MemoryPlan(checkpointing, max(longest, min(MOST, fitting) // 1024 * 1024), measured)
    how = f"{'with' if checkpointing else 'without'} gradient checkpointing"
    if math.isinf(cost.per_unit):
        raise InputError(
            f"the measured row itself does not fit the memory {how}",
            where="--tokens-per-batch auto",
            expected=f"room for {PROBES['cuda'][-1]:,} tokens beside the weights",
            next=f"{'Free memory (other processes?)' if checkpointing else 'Use --gradient-checkpointing'}, or give --tokens-per-batch a number.",
        )
    raise InputError(
        f"the longest pair does not fit the memory {how}",
        where="--tokens-per-batch auto",
        expected=f"{(measured.backward + cost.of(longest)) / GIB:.3g} GiB for the engine and {longest:,} tokens",
        found=f"{measured.free / GIB:.3g} GiB that may be used",
        next="Lower --max-length, or train on more GPUs." if checkpointing else "Use --gradient-checkpointing.",
    )


@contextmanager
def explained(plan: MemoryPlan | None, gradient_checkpointing: bool, budget: int | None, longest: int, step: Callable[[], int]):
    """Around training: memory that does not suffice is an InputError with the numbers and the option to use.

    `budget`: tokens of a micro-batch, None where it has a fixed number of pairs; `longest`: tokens of the longest pair; `step`: steps done so far.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        planned = None
        if budget is not None:
            planned = f"{budget:,} tokens to a micro-step" + (
                "" if plan is None else f", for which {plan.used / GIB:.3g} GiB were planned"
            )
        if not gradient_checkpointing:
            advice = "Use --gradient-checkpointing."
        elif budget is None:
            advice = "Lower --per-device-train-batch-size or --max-length, or train on more GPUs."
        elif longest <= (smaller := budget // 2):
            advice = f"Use --tokens-per-batch {smaller}."
        else:
            advice = f"Lower --max-length, for a pair goes alone at the least, and the longest has {longest:,} tokens; or train on more GPUs."
        raise InputError(
            f"out of memory in step {step() + 1}",
            where=f"rank {torch.distributed.get_rank() if torch.distributed.is_initialized() else 0}",
            expected=planned,
            found=" ".join(str(error).split())[:300],
            next=advice,
        ) from error


def measure(model: PreTrainedModel, args: TrainingArguments, zero_config: Path, *, world: int) -> Measured:
    """Every rank calls it, with its policy on its device, before the engine is made; of an adapter's policy, the base that holds it. Ranks on
    a CPU share a host's memory. What is frozen costs the engine nothing."""
    device = model.device
    num_parameters = sum(each.numel() for each in model.parameters() if each.requires_grad)
    free = free_memory(device) * SHARE[device.type] / (world if device.type == "cpu" else 1)
    kept, checkpointed = (_of_micro_steps(model, checkpointing) for checkpointing in (False, True))
    backward, step = _of_engines(zero_config, args, model.dtype, device, world)
    seen = [-free, *_numbers(kept), *_numbers(checkpointed), backward.of(num_parameters), step.of(num_parameters)]
    worst = torch.tensor(seen, dtype=torch.float64, device=device)
    if world > 1:
        torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
    free, *costs, backward, step = worst.tolist()
    return Measured(-free, Cost(*costs[:2]), Cost(*costs[2:]), backward, step)


def _numbers(cost: Cost) -> tuple[float, float]:
    return cost.per_unit, cost.constant


def _of_micro_steps(model: PreTrainedModel, checkpointing: bool) -> Cost:
    """By tokens. A row that does not fit counts as endless: what is asked is whether checkpointing can be left out."""
    training = model.training
    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # that alone: what is inside would apply dropout, which the trainer turns off
    (model.activation_checkpointing_enable if checkpointing else model.activation_checkpointing_disable)()
    try:
        with ready_to_train(model), _gradients_let_go(model):
            _micro_step(model, 64)  # libraries allocate workspace at first use
            watch = MemoryWatch(model.device)
            seen = [(tokens, watch.most(lambda tokens=tokens: _micro_step(model, tokens))) for tokens in PROBES[model.device.type]]
    except torch.OutOfMemoryError:
        return Cost(math.inf, 0.0)
    finally:
        model.activation_checkpointing_disable()
        model.train(training)
        model.zero_grad()
    return Cost.through(*seen)


def _micro_step(model: PreTrainedModel, num_tokens: int) -> None:
    """Forward and backward of one made-up pair of so many packed tokens."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = np.random.default_rng(0)
    prompt, side = generator.integers(0, vocabulary, num_tokens // 16), num_tokens * 15 // 32
    pair = [np.concatenate([prompt, generator.integers(0, vocabulary, side)]).astype(np.int32) for _ in range(2)]
    given = as_trl_pads(model, [Sequence(ids, len(prompt)) for ids in pair])
    packed_forward(model, *given, ("log_probs", "entropy", "mean_logits", "is_top1")).log_probs.sum().backward()


@contextmanager
def _gradients_let_go(model: PreTrainedModel):
    """Inside the block each parameter's gradient is freed when it has come, as DeepSpeed does."""

    def let_go(parameter: torch.nn.Parameter) -> None:
        parameter.grad = None

    hooks = [each.register_post_accumulate_grad_hook(let_go) for each in model.parameters() if each.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _of_engines(
    zero_config: Path, args: TrainingArguments, dtype: torch.dtype, device: torch.device, world: int
) -> tuple[Cost, Cost]:
    """By parameters of the model, whose weights are not counted: (while gradients come, in the optimizer's step)."""
    config = json.loads(zero_config.read_text(encoding="utf-8"))
    config |= {
        "train_batch_size": 2 * world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    try:
        seen = [_of_engine(_without_auto(config), args, num_layers, dtype, device) for num_layers in LAYERS[device.type]]
    except torch.OutOfMemoryError as error:
        raise InputError(
            "the measured small models themselves do not fit the memory",
            where="--tokens-per-batch auto",
            found=" ".join(str(error).split())[:300],
            next="Free memory (other processes?), or give --tokens-per-batch a number.",
        ) from error
    return tuple(Cost.through((seen[0][0], seen[0][i]), (seen[1][0], seen[1][i])) for i in (1, 2))


def _without_auto(config: dict) -> dict:
    """A copy without what is left to others: DeepSpeed's defaults hold, which are no smaller."""
    entries = {name: _without_auto(value) if isinstance(value, dict) else value for name, value in config.items()}
    return {name: value for name, value in entries.items() if value != "auto"}


def _of_engine(
    config: dict, args: TrainingArguments, num_layers: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, int, int]:
    """(parameters, bytes at most while gradients come, bytes at most in the step) of a small model's second optimizer step."""
    watch = MemoryWatch(device)
    with torch.random.fork_rng(devices=[]):  # the run's random numbers are as without this
        layers = torch.nn.Sequential(*(torch.nn.Linear(LAYER, LAYER, bias=False) for _ in range(num_layers)))
    layers.to(device, dtype)
    weights = sum(each.numel() * each.element_size() for each in layers.parameters())
    num_parameters = sum(each.numel() for each in layers.parameters())
    optimizer = None
    if "optimizer" not in config:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, layers)
        optimizer = kind(layers.parameters(), **options)
    engine, *_ = deepspeed.initialize(model=layers, optimizer=optimizer, model_parameters=layers.parameters(), config=config)
    x = torch.ones(1, LAYER, dtype=dtype, device=device)

    def gradients() -> None:
        engine.backward(engine(x).float().sum())

    for _ in range(2):  # the first step makes Adam's states
        gradients()
        engine.step()
    backward = watch.most(gradients)
    engine.step()
    backward = max(backward, watch.most(gradients))
    step = watch.most(engine.step)
    _let_go(engine)
    return num_parameters, backward - weights, step - weights


def _let_go(engine: deepspeed.DeepSpeedEngine) -> None:
    """Free the engine's memory: it and its small model hold each other through hooks in autograd, which Python's collector does not see."""
    optimizer = engine.optimizer
    engine.destroy()
    for holder in (optimizer, engine):
        vars(holder).clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
