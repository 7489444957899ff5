"""`--torch-compile`: what a layer does to each token by itself (norms, projections, RoPE, MLP, residuals), compiled once for rows of any length.

torch.compile cannot trace how a row is packed, and would compile each arrangement again. So attention stays outside: a layer becomes a graph
before it and one after it, with the number of tokens as a variable. The layers are compiled inside of gradient checkpointing, which runs the same
graphs again in the backward. Embeddings, the last norm and the head are not part of it.
"""

import functools
import importlib.util
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from precompute.scorer.attention import NAME, attend
from precompute.scorer.forwards import replaced
from store.errors import InputError

MOST_VARIANTS = 64
"""Of one piece of code: kinds of layers, dtypes, with and without gradients, the small twin and the model. A row that is compiled for itself
reaches it soon, and that is an error: torch.compile would go on uncompiled, in silence."""

_wanted = False


def use_compiler(wanted: bool, *, layout: str) -> None:
    """Let packed rows run compiled layers from now on, or not. Raises InputError for another layout, and on a GPU without Triton."""
    global _wanted
    if wanted and layout != "packed":
        raise InputError("belongs to the packed layout", where="--torch-compile", next="Leave it out, or use --layout packed.")
    if wanted and torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        raise InputError(
            "torch.compile writes its kernels for GPUs with Triton, which is not installed",
            where="--torch-compile",
            expected="the package triton, which PyTorch's builds for CUDA bring along",
            found=f"torch {torch.__version__} without it",
            next="Leave it out, or: uv pip install triton",
        )
    _wanted = wanted
    if wanted:
        torch._dynamo.config.recompile_limit = MOST_VARIANTS
        torch._dynamo.config.accumulated_recompile_limit = 100 * MOST_VARIANTS
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    AttentionInterface.register(NAME, torch.compiler.disable(attend) if wanted else attend)


def compiler_wanted() -> bool:
    """Whether packed rows run compiled layers."""
    return _wanted


def advice(otherwise: str) -> str:
    """What to do where packed rows are computed wrongly: without the compiler first."""
    return "Leave out --torch-compile." if _wanted else otherwise


def num_graphs() -> int:
    """How many were compiled in this process, forward and backward counted as one."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def use_compiled_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Give every layer of the model's body its compiled forward; return the layers. Raises InputError where there are none."""
    layers = [each for each in model.base_model.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(
            "this model has no layers that torch.compile is known to work on",
            where=type(model).__name__,
            expected="transformers' GradientCheckpointingLayer",
            next="Leave out --torch-compile.",
        )
    for layer in layers:
        layer.forward = _forward_of(layer)
    return layers


@contextmanager
def compiled_layers(model: PreTrainedModel):
    """Inside the block the layers are as `use_compiled_layers` makes them; at its end each is its own again."""
    with replaced(use_compiled_layers(model)):
        yield


def _forward_of(layer: GradientCheckpointingLayer):
    # The class's forward checkpoints what it wraps; compiled from outside, the checkpoint would hide its layer from the compiler.
    compiled = torch.compile(type(layer).forward.__wrapped__, dynamic=True)

    def forward(*args, **kwargs):
        if layer.gradient_checkpointing and layer.training:
            return layer._gradient_checkpointing_func(functools.partial(compiled, layer, **kwargs), *args)
        return compiled(layer, *args, **kwargs)

    return forward


@contextmanager
def named_compiler():
    """Around the first use of compiled layers: what cannot be compiled is an InputError that names the option."""
    if not _wanted:  # torch._dynamo takes seconds to import
        yield
        return
    try:
        yield
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise InputError(
            "this model's code is compiled again for row after row",
            where="--torch-compile",
            expected=f"at most {MOST_VARIANTS} variants of it, whatever the rows' lengths",
            next="Leave it out.",
        ) from error
    except torch._dynamo.exc.TorchDynamoException as error:
        raise InputError(
            f"this model cannot be compiled here: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            where="--torch-compile",
            next="Leave it out.",
        ) from error
