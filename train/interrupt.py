"""Told to stop while training: write a checkpoint after the step at hand, on all ranks at once. An evaluation at hand is dropped."""

import torch
import torch.distributed
from transformers import TrainerCallback

from stop import StopRequest


def anyone_told(request: StopRequest, device: torch.device) -> bool:
    """Whether any rank was told to stop; every rank asks at once, and all get the same answer.

    A signal reaches the ranks at different moments, or only one of them; stopping apart would leave the others waiting without end.
    """
    told = request.soon
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return told
    flag = torch.tensor(int(told), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)


class CheckpointAndStop(TrainerCallback):
    """After each step asks whether any rank was told to stop; then all of them save a checkpoint and end the loop at this very step.

    Nothing is evaluated then: a batch system kills soon. What was due is made up for when the run goes on (`evaluation_is_due`).
    """

    def __init__(self, request: StopRequest):
        self.request = request
        self.stopped_at: int | None = None
        """The step, if the run was ended early."""

    def on_step_end(self, args, state, control, **kwargs):
        if not anyone_told(self.request, args.device) or state.global_step >= state.max_steps:
            return
        self.stopped_at = state.global_step
        control.should_save = True
        control.should_evaluate = False
        control.should_training_stop = True

    def on_prediction_step(self, args, state, control, **kwargs):
        """Before each batch of an evaluation (train/evaluate.py), which may take longer than a batch system waits."""
        if anyone_told(self.request, args.device):
            self.stopped_at = state.global_step
            control.should_epoch_stop = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped_at is not None:
            control.should_save = control.should_evaluate = False


def evaluation_is_due(state: dict, args) -> bool:
    """Whether a run that goes on from a checkpoint has an evaluation to make up for: it was ended between that checkpoint and the
    evaluation. `state`: the checkpoint's (train/checkpoint.py); `args`: the run's TrainingArguments."""
    step = state["global_step"]
    if any(is_evaluation(entry, step) for entry in state["log_history"]):
        return False
    at_end = step >= state["max_steps"]
    if args.eval_strategy == "epoch":
        return at_end or float(state["epoch"]).is_integer()
    return args.eval_strategy == "steps" and (at_end or step % args.eval_steps == 0)


def is_evaluation(entry: dict, step: int) -> bool:
    """Whether this entry of a log is of an evaluation at `step`."""
    return entry.get("step") == step and any(name.startswith("eval_") for name in entry)
