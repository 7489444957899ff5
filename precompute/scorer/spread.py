"""A model over several GPUs (`--gpus-per-worker`): which part lies where, and how a part gets its inputs.

    GPU 0: embeddings, layers 0-31      GPU 1: layers 32-63, last norm, head

Parts (the embeddings, a layer, the head) lie in runs, in their order, so that the GPU that holds most holds as little as can be. A part whose
weights are another's too lies with that one, and one without weights (RoPE) with the first. One GPU computes at a time. accelerate moves what a
part is called with: hidden states, positions, RoPE's factors, and what packed attention needs to know. Its `dispatch_model` is not used, for it
puts itself in the place of `forward`, as the packed layout's norms and compiled layers do (forwards.py).
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def spread(model: PreTrainedModel, devices: Sequence[torch.device]) -> PreTrainedModel:
    """`model`, moved in place: over `devices`, or over fewer where it has fewer parts."""
    if len(devices) == 1:
        return model.to(devices[0])
    parts = list(_parts(model))
    sizes = _sizes(parts)
    weighty = [index for index, size in enumerate(sizes) if size]
    of_run = dict.fromkeys(range(len(parts)), devices[0])
    for run, device in zip(runs([sizes[index] for index in weighty], len(devices)), devices, strict=False):
        of_run |= {weighty[index]: device for index in run}
    home: dict[int, torch.device] = {}
    for index, part in enumerate(parts):
        weights = [id(each) for each in part.parameters()]
        device = next((home[each] for each in weights if each in home), of_run[index])
        home |= dict.fromkeys(weights, device)
        part.to(device).register_forward_pre_hook(partial(_bring, device), with_kwargs=True)
    return model


def _bring(device: torch.device, part: torch.nn.Module, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return send_to_device(given, device), send_to_device(named, device)


def devices_of(model: PreTrainedModel) -> tuple[torch.device, ...]:
    """Those that hold its weights, in the order of its parts; of one device, the one that the model says it is on."""
    found = tuple(dict.fromkeys(each.device for each in model.parameters()))
    return found if len(found) > 1 else (model.device,)


def largest_share(model: PreTrainedModel, num_devices: int) -> int:
    """Bytes of weights on the device that would hold most; the model may be on the meta device."""
    sizes = [size for size in _sizes(list(_parts(model))) if size]
    return max(sum(sizes[run.start : run.stop]) for run in runs(sizes, num_devices))


def larger_numbers(number: int) -> list[int]:
    """Of GPUs per worker, above `number`: those that leave none of this machine's idle."""
    there = torch.cuda.device_count()
    return [larger for larger in range(number + 1, there + 1) if there % larger == 0]


def more_room(number: int) -> str:
    """What to do where `number` GPUs per worker have too little memory, as the end of a sentence."""
    larger = larger_numbers(number)
    return f"spread the model: --gpus-per-worker {larger[0]}" if larger else "take GPUs that have more."


def runs(sizes: Sequence[int], num_runs: int) -> list[range]:
    """Indices of `sizes` (positive) in consecutive runs, as many as asked for unless there are fewer sizes; the largest sum of a run is as small
    as it can be. [1, 1, 1, 9] in two: [0, 1, 2] and [3]."""
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(sizes, num_runs, middle)) <= num_runs else (middle + 1, high)
    return _filled(sizes, num_runs, low)


def _filled(sizes: Sequence[int], num_runs: int, most: int) -> list[range]:
    """Each run takes what fits `most`, and leaves one for every run to come."""
    starts, held = [0], 0
    for index, size in enumerate(sizes):
        needed = len(sizes) - index <= num_runs - len(starts)
        if index and (needed or held + size > most):
            starts.append(index)
            held = 0
        held += size
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def _parts(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """In the order in which they are defined: what transformers says must stay whole, and what has weights of its own or nothing inside."""
    whole = set(model._no_split_modules or ())

    def walk(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own or type(module).__name__ in whole or isinstance(module, GradientCheckpointingLayer) or not any(module.children()):
            yield module
        else:
            for child in module.children():
                yield from walk(child)

    return walk(model)


def _sizes(parts: Sequence[torch.nn.Module]) -> list[int]:
    """Bytes of each part's weights; a shared one counts where it is first."""
    seen: set[int] = set()
    sizes = []
    for part in parts:
        new = [each for each in part.parameters() if id(each) not in seen]
        seen |= {id(each) for each in new}
        sizes.append(sum(each.numel() * each.element_size() for each in new))
    return sizes
