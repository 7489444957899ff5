"""The head in training on a CPU, in float32: log-probs of the targets, and what else TRL's loss and metrics read of the softmax.

The same numbers as TRL's ChunkedLogProbFunction, from one pass over each tile of logits (kernels.py) where that takes ten, and products by the faster
library (cpu.py). As there, logits exist for a tile at a time, and the backward computes them again.
"""

import torch

from precompute.scorer.cpu import linear
from precompute.scorer.head import Head
from precompute.scorer.kernels import fold_logits, logits_gradient_

TILE = (1024, 2048)
"""Completion positions x vocabulary entries whose logits exist at a time: they stay in cache between the product and what follows (1.1 times the
speed of whole rows)."""


def head_values(
    hidden: torch.Tensor, head: torch.nn.Linear, after: Head, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden float32 [N, D], targets int64 [N] -> log-prob of the target, entropy, log(sum of p^2) and mean logit, float32 [N] in nats, and
    whether the target is the most probable entry, bool [N].

    The first two are differentiable in hidden states, weight and bias.
    """
    return _HeadValues.apply(hidden, head.weight, head.bias, targets, after)


class _HeadValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, after):
        stats = hidden.new_empty(-(-len(weight) // TILE[1]), len(hidden), 6)
        found = hidden.new_empty(len(hidden))
        for rows in _parts(len(hidden), TILE[0]):
            for number, entries in enumerate(_parts(len(weight), TILE[1])):
                logits = after.logits(_product(hidden, weight, bias, rows, entries))
                places = targets[rows] - entries.start
                stats[number, rows] = fold_logits(logits, places)
                inside = (places >= 0) & (places < logits.shape[1])
                found[rows][inside] = logits[inside, places[inside]]
        largest, exps, weighted, squares, plain, before = stats.unbind(dim=2)
        most = largest.amax(dim=0)
        shrink = (largest - most).exp()
        total = (exps * shrink).sum(dim=0)
        log_sums = most + total.log()
        entropy = log_sums - (weighted * shrink).sum(dim=0) / total
        log_sum_squares = (squares * shrink.square()).sum(dim=0).log() - 2 * total.log()
        is_top = (found >= most) & (found > before.amax(dim=0))
        ctx.save_for_backward(hidden, weight, bias, targets, log_sums, entropy)
        ctx.after = after
        means = plain.sum(dim=0) / len(weight)
        ctx.mark_non_differentiable(log_sum_squares, means, is_top)
        return found - log_sums, entropy, log_sum_squares, means, is_top

    @staticmethod
    def backward(ctx, grad, grad_entropy, *_):
        hidden, weight, bias, targets, log_sums, entropy = ctx.saved_tensors
        after = ctx.after
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight) if for_weight else None
        grad_bias = torch.zeros_like(bias) if for_bias else None
        grad, grad_entropy = grad.contiguous(), grad_entropy.contiguous()
        for rows in _parts(len(hidden), TILE[0]):
            of_rows = [each[rows] for each in (targets, log_sums, entropy, grad, grad_entropy)]
            for entries in _parts(len(weight), TILE[1]):
                logits = after.logits(_product(hidden, weight, bias, rows, entries))
                slope = None if after == Head() else after.slope(logits)
                change = logits_gradient_(logits, of_rows[0] - entries.start, *of_rows[1:])
                if slope is not None:
                    change *= slope
                if grad_hidden is not None:
                    grad_hidden[rows] += linear(change, weight[entries].t(), None)
                if grad_weight is not None:
                    grad_weight[entries] += linear(change.t(), hidden[rows].t(), None)
                if grad_bias is not None:
                    grad_bias[entries] += change.sum(dim=0)
        return grad_hidden, grad_weight, grad_bias, None, None


def _parts(number: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, number)) for first in range(0, number, size)]


def _product(hidden, weight, bias, rows: slice, entries: slice) -> torch.Tensor:
    return linear(hidden[rows], weight[entries], None if bias is None else bias[entries])
