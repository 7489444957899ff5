"""The bare matrix products of a training micro-step, which no implementation can avoid: forward, and twice as many in the backward.

Linear layers: y = x W^T, dx = dy W, dW = dy^T x; by what training uses on this CPU (precompute/scorer/cpu.py), or by PyTorch. The head: the same three on
completion tokens, in tiles of its vocabulary. Attention: queries x keys and probabilities x values over what each branch sees, forward; four products of
these shapes backward; by flash attention's tile, and the triangle at half the square. What a backward computes again is not counted.

They run in a process of their own, which keeps the memory that it frees, in turn with the micro-steps that they are compared with.
"""

import ctypes
import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from precompute.scorer.cpu import keep_freed_memory, linear
from precompute.scorer.packing import Branch

VOCABULARY_TILE = 2048
QUERY_TILE = 256
REPEATS = 3


@dataclass(frozen=True)
class Shapes:
    """Of a model's products."""

    linears: tuple[tuple[int, int], ...]
    """(out, in) of each linear layer below the head."""
    head: tuple[int, int]
    layers: int
    heads: int
    key_heads: int
    head_dim: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Shapes":
        config = model.config.get_text_config()
        linears = [module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]
        return cls(
            tuple(tuple(module.weight.shape) for module in linears),
            tuple(model.get_output_embeddings().weight.shape),
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        )


class Products:
    """`seconds` computes them once for a packed row and returns CPU seconds by kind."""

    def __init__(self, model: PreTrainedModel):
        self.shapes = Shapes.of(model)
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_begin, initargs=(os.getpid(),))

    def seconds(self, branches: tuple[Branch, ...], num_targets: int) -> dict[str, float]:
        """Of a row of these branches in which so many tokens are predicted: `linear`, `linear_mkl`, `head`, `attention`."""
        return self.pool.submit(_seconds, self.shapes, branches, num_targets).result()


def _begin(parent: int) -> None:
    # PR_SET_PDEATHSIG: an orphan of a run that was killed, for its memory say, would hold the pipes that somebody waits for.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # killed before that, while this process imported
        os._exit(1)
    keep_freed_memory()


def _seconds(shapes: Shapes, branches: tuple[Branch, ...], num_targets: int) -> dict[str, float]:
    num_tokens = sum(branch.stop - branch.start for branch in branches)
    return {
        "linear": _linears(linear, shapes, num_tokens),
        "linear_mkl": _linears(F.linear, shapes, num_tokens),
        "head": _head(shapes, num_targets),
        "attention": sum(_attention(shapes, branch) for branch in branches),
    }


def _linears(product, shapes: Shapes, num_tokens: int) -> float:
    """Each shape is timed by itself and taken as often as it is there."""
    kinds = {shape: shapes.linears.count(shape) for shape in shapes.linears}
    seconds = 0.0
    for (out, into), times in kinds.items():
        weight = torch.randn(out, into, requires_grad=True)
        x, dy = torch.randn(num_tokens, into, requires_grad=True), torch.randn(num_tokens, out)

        def three(x=x, weight=weight, dy=dy):
            torch.autograd.grad(product(x, weight, None), (x, weight), dy)

        seconds += times * _timed(three)
    return seconds


def _head(shapes: Shapes, num_targets: int) -> float:
    weight, hidden = torch.randn(shapes.head), torch.randn(num_targets, shapes.head[1])

    def three():
        for tile in weight.split(VOCABULARY_TILE):
            logits = linear(hidden, tile, None)
            linear(logits, tile.t(), None)
            linear(logits.t(), hidden.t(), None)

    return _timed(three)


def _attention(shapes: Shapes, branch: Branch) -> float:
    """Query heads folded onto their key head, of which one is timed."""
    groups, width, own = shapes.heads // shapes.key_heads, shapes.head_dim, branch.stop - branch.start
    seconds = 0.0
    for num_keys, share in ((branch.num_context, 1.0), (own, 0.5)):
        if num_keys:
            queries, keys = torch.randn(groups * own, width), torch.randn(num_keys, width)

            def six(queries=queries, keys=keys):
                for tile in queries.split(QUERY_TILE):
                    for _ in range(
                        2
                    ):  # queries x keys, and probabilities x values; of their gradients, those of probabilities and queries
                        seen = tile @ keys.t()
                        seen @ keys
                    for _ in range(2):  # the gradients of keys and values
                        seen.t() @ tile

            seconds += share * _timed(six) * shapes.key_heads * shapes.layers
    return seconds


def _timed(work) -> float:
    """The mean of REPEATS, after one that does not count."""
    work()
    started = time.process_time()
    for _ in range(REPEATS):
        work()
    return (time.process_time() - started) / REPEATS
