"""The learning rate of every step, asked for before anything is loaded: transformers looks at a schedule's arguments when training begins, or later."""

import json
import math

import numpy as np
import torch
from transformers.optimization import get_scheduler
from trl import DPOConfig

from store.errors import InputError
from train.choices import SCHEDULES

MOST_STEPS = 1000
"""That are asked for, evenly over the run, and the end of the warm-up."""

REACHED = 0.99
"""Of the learning rate: one schedule begins to fall a step before the others."""


def tried(args: DPOConfig, num_steps: int) -> str | None:
    """What is said of a schedule that never reaches the learning rate of `args` in its `num_steps` optimizer steps; None: it does.

    Raises InputError for arguments with which there is no learning rate at some step, the one after the last among them: it is asked for too.
    """
    kind, given = args.lr_scheduler_type.value, args.lr_scheduler_kwargs or {}
    where = f"--lr-scheduler-type {kind}" + (f" --lr-scheduler-kwargs '{json.dumps(given)}'" if given else "")
    warmup = args.get_warmup_steps(num_steps)
    advice = f"Change --lr-scheduler-kwargs; {kind} has {', '.join(SCHEDULES[kind])}."
    if warmup >= num_steps:
        advice = f"Shorten the warm-up, which takes {warmup:,} of {num_steps:,} step(s): --warmup-steps 0, say. Or c{advice[1:]}"
    steps = np.unique([*np.linspace(0, num_steps - 1, MOST_STEPS, dtype=int), *np.clip([warmup - 1, warmup], 0, num_steps - 1)])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    try:
        schedule = get_scheduler(kind, optimizer, warmup, num_steps, dict(given))
        *shares, _ = (schedule.lr_lambdas[0](step) for step in (*steps.tolist(), num_steps))
        usable = all(math.isfinite(share) and share >= 0 for share in shares)
    except (ArithmeticError, LookupError, TypeError, UnboundLocalError, ValueError) as error:
        raise InputError(f"no schedule can be made of these arguments: {error}", where=where, next=advice) from error
    if not usable:
        raise InputError("the learning rate is negative or no number at some step", where=where, next=advice)
    if "num_decay_steps" in given and "num_stable_steps" not in given and warmup + given["num_decay_steps"] > num_steps:
        raise InputError(
            "warm-up and decay take more steps than there are",
            where=where,
            expected=f"at most {num_steps:,} steps, of which {warmup:,} are warm-up",
            found=f"num_decay_steps {given['num_decay_steps']:,}",
            next="Lower num_decay_steps or the warm-up.",
        )
    if max(shares) > REACHED:
        return None
    of_warmup = f", as the warm-up takes {warmup:,}" if warmup >= num_steps else ""
    return f"the learning rate does not reach {args.learning_rate:g}: at most {max(shares) * args.learning_rate:.3g} in {num_steps:,} step(s){of_warmup}"
