"""Told to stop while training: write a checkpoint after the step at hand, on all ranks at once."""

import torch
import torch.distributed
from transformers import TrainerCallback

from stop import StopRequest


class CheckpointAndStop(TrainerCallback):
    """After each step asks whether any rank was told to stop; then all of them save a checkpoint and end the loop at this very step."""

    def __init__(self, request: StopRequest):
        self.request = request
        self.stopped_at: int | None = None
        """The step, if the run was ended early."""

    def on_step_end(self, args, state, control, **kwargs):
        if not self._anyone_told(args.device) or state.global_step >= state.max_steps:
            return
        self.stopped_at = state.global_step
        control.should_save = True
        control.should_training_stop = True

    def _anyone_told(self, device: torch.device) -> bool:
        """A signal reaches the ranks at different steps, or only one of them; stopping apart would leave the others waiting for ever."""
        told = self.request.soon
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return told
        flag = torch.tensor(int(told), device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag)
