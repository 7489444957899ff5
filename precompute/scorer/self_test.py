"""Before anything is scored or trained: does this layout compute what the model's own plain forward computes?

1. twin    a small random model of the same class and configuration (twin.py), in float32, on sequences of unequal lengths on both sides of every
           length at which it changes, which share prefixes at several depths. The plain forward of each sequence alone is the truth, and hardly
           anything separates it from another order of the same sums: TWIN_TOLERANCE.
2. model   the model itself in its own dtype, on a few sequences of lengths that its device can afford, against its own noise: how far its plain
           forward moves when its embeddings are rounded once more.

The first sees what is computed, the second that this device's kernels compute it.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from precompute.scorer import Layout
from precompute.scorer.attention import active_kernel
from precompute.scorer.budget import enough_memory
from precompute.scorer.compiled import advice, compiler_wanted
from precompute.scorer.packing import MIN_SHARED, Sequence
from precompute.scorer.scoring import score
from precompute.scorer.spread import devices_of, more_room
from precompute.scorer.twin import lengths_of, twin_of
from store.errors import InputError

Compute = Callable[[PreTrainedModel, list[Sequence]], list[np.ndarray]]
"""A way to compute log-probs: float32 [num_scored] for each sequence, in nats."""

TWIN_TOLERANCE = 1e-3
"""Largest |difference| of any token in float32, nats. Measured over every architecture that is right: 1e-5; a key, a position or a factor that
is wrong moves some token of the twin by more than 0.01."""

NOISE_FACTOR = 4.0
"""The model's mean |difference| per token may be so many times that of one rounding of its embeddings. Measured on SmolLM2-135M: packed scoring
is off by 2.0 times in float32 (8e-6 to 4e-6 nats), 1.0 times in bfloat16 (0.08 to 0.08)."""

NOISE_FLOOR = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
"""Mean |difference| per token, nats, that is allowed however small the measured noise is: random models have next to none."""

LONGEST = {"cpu": 48, "cuda": 4608}
"""Tokens of the longest sequence that the model itself is tried with: a second's work. On a GPU a window of 4,096 lies below it."""


@dataclass(frozen=True)
class SelfTest:
    """What was seen, in nats: the twin's largest difference of a token (None: no twin could be made), the model's mean one, its noise."""

    what: str
    of_twin: float | None
    of_model: float
    noise: float
    seconds: float
    num_missing: int = 0
    """Kinds of layers that the twin lacks."""

    def __str__(self) -> str:
        lacks = f", which lacks {self.num_missing} of its kinds of layers," if self.num_missing else ""
        twin = (
            "no small twin of it could be made"
            if self.of_twin is None
            else f"a small twin of it{lacks} is off by at most {self.of_twin:.1g} nats"
        )
        return (
            f"self-test: {self.what} against the model's own forward: {twin},"
            f" the model by {self.of_model:.1g} per token (its noise is {self.noise:.1g}); {self.seconds:.1f} s"
        )


def self_test(model: PreTrainedModel, dtype: str, *, layout: Layout = "packed", tokens_per_batch: int = 16384) -> SelfTest:
    """Of `score` in this layout. InputError where it disagrees with the plain forward of each sequence alone."""
    return compare(
        model,
        dtype,
        lambda any_model, sequences: score(any_model, sequences, layout=layout, tokens_per_batch=tokens_per_batch),
        what=f"{layout} scoring" + (", compiled," if compiler_wanted() else ""),
        advice=advice("Use --layout padded for this model.")
        if layout == "packed"
        else "Its padded batches mix their rows: use --tokens-per-batch 1, which scores each sequence alone.",
        for_room=f"Free memory (other processes?), or {more_room(len(devices_of(model)))}",
    )


def compare(model: PreTrainedModel, dtype: str, compute: Compute, *, what: str, advice: str, for_room: str) -> SelfTest:
    """`compute` against the plain forward of each sequence alone, on the twin and on `model`. Raises InputError where they disagree, with `advice`,
    and where memory runs out, with `for_room`."""
    with enough_memory("in the self-test: beside the model there is no room for some short sequences", for_room):
        return _compare(model, dtype, compute, what, advice)


def _compare(model: PreTrainedModel, dtype: str, compute: Compute, what: str, advice: str) -> SelfTest:
    started = time.monotonic()
    twin = twin_of(model)
    of_twin = None
    if twin is not None:
        sequences = made_up(_around(twin.lengths, _context(twin.model)), twin.model)
        truth = alone(twin.model, sequences)
        if not _largest(alone(twin.model, sequences[-2:]), truth[-2:]) <= TWIN_TOLERANCE:
            raise InputError(
                "this architecture's own forward gives other log-probs each time",
                where=type(model).__name__,
                next="No layout can score it: use another model.",
            )
        of_twin = _largest(attempt(compute, twin.model, sequences, what, advice), truth)
        if not of_twin <= TWIN_TOLERANCE:  # also true for NaN
            raise InputError(
                f"{what} disagrees with this architecture's own forward by up to {of_twin:.2g} nats per token, in float32 on a small"
                " random model of its kind",
                where=type(model).__name__,
                expected=f"at most {TWIN_TOLERANCE:g}",
                next=advice,
            )
    sequences = made_up(_affordable(model), model)[::2]
    truth = alone(model, sequences)
    if not np.isfinite(np.concatenate(truth)).all():
        raise InputError(
            "this model's own forward gives log-probs that are not finite",
            where=type(model).__name__,
            found=f"{np.concatenate(truth)[~np.isfinite(np.concatenate(truth))][0]} in {dtype}",
            next="Check its weights, or use another dtype: float16 overflows in many models that were trained in bfloat16.",
        )
    with _embeddings_rounded_again(model):
        noise = _mean(alone(model, sequences[1:2]), truth[1:2])
    allowed = max(NOISE_FLOOR[dtype], NOISE_FACTOR * noise)
    of_model = _mean(compute(model, sequences), truth)
    if not of_model <= allowed:
        raise InputError(
            f"{what} disagrees with this model's own forward by {of_model:.2g} nats per token",
            where=type(model).__name__,
            expected=f"at most {allowed:.2g} in {dtype}, where rounding its embeddings once more makes {noise:.2g}",
            next=advice,
        )
    return SelfTest(what, of_twin, of_model, noise, time.monotonic() - started, 0 if twin is None else twin.num_missing)


def attempt(compute: Callable, twin: PreTrainedModel, sequences: list[Sequence], what: str, advice: str):
    """compute(twin, sequences); InputError too where the architecture's code cannot run what `compute` gives it. What a kernel that was asked for by
    name raises is left to named_kernel."""
    try:
        return compute(twin, sequences)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model's code raises
        if active_kernel() is not None:
            raise
        raise InputError(
            f"{what} cannot run this architecture: {type(error).__name__}: {str(error)[:200]}",
            where=type(twin).__name__,
            next=advice,
        ) from error


def alone(model: PreTrainedModel, sequences: list[Sequence]) -> list[np.ndarray]:
    """The truth: float32 [num_scored] for each sequence, by one plain forward each."""
    with torch.inference_mode():
        return [alone_logps(model, sequence).cpu().numpy() for sequence in sequences]


def alone_logps(model: PreTrainedModel, sequence: Sequence) -> torch.Tensor:
    """Log-probs of the completion tokens, float32 [num_scored], by a plain forward of this sequence: no padding, no mask, no cache."""
    ids = torch.from_numpy(sequence.ids.astype(np.int64)).to(model.device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, sequence.num_prompt - 1 : -1]
    targets = ids[sequence.num_prompt :, None].to(logits.device)
    return logits.float().log_softmax(dim=-1).gather(1, targets)[:, 0]


def made_up(lengths: list[int], model: PreTrainedModel) -> list[Sequence]:
    """Two random sequences of each length, which share beginnings with the others: nearly all of it, half of it, or just enough to be shared."""
    generator = np.random.default_rng(0)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    vocabulary = min(len(each.weight) for each in ends if each is not None)
    trunk = generator.integers(0, vocabulary, max(lengths))
    sequences: list[Sequence] = []
    for length in lengths:
        for shared in (length - 3, max(length // 2, min(MIN_SHARED + 1, length - 2))):
            ids = np.concatenate([trunk[:shared], generator.integers(0, vocabulary, length - shared)])
            sequences.append(Sequence(ids.astype(np.int32), num_prompt=max(1, shared - 2 * (len(sequences) % 3))))
    return sequences


def _around(edges: tuple[int, ...], context: int) -> list[int]:
    """Lengths on both sides of each edge, near and far, short ones, and one far beyond all, so that padding is long; none shorter than a pair,
    as a window of one token is."""
    lengths = {7, 15, 40, max(130, *(2 * edge for edge in edges), 0)}
    lengths |= {edge + step for edge in edges for step in (0, 1, edge // 2, edge + 5)}
    return sorted(length for length in lengths if min(7, context) <= length <= context)


def _affordable(model: PreTrainedModel) -> list[int]:
    """Lengths for the model itself: a short, a middle and a long one, the long one beyond the longest edge that is affordable."""
    most = min(LONGEST[model.device.type], _context(model))
    edges = [edge for edge in lengths_of(model.config.get_text_config()) if edge + 32 <= most]
    longest = max(edges) + 32 if edges else min(most, 1024)
    return [12, max(14, longest // 3), max(16, longest)]


def _context(model: PreTrainedModel) -> int:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return context if context and context > 0 else 1 << 20  # some say -1 for any length


@contextmanager
def _embeddings_rounded_again(model: PreTrainedModel):
    """Inside the block the embeddings of tokens move by up to half a unit in their last place, at random."""

    def after(module, given, embeddings):
        generator = torch.Generator().manual_seed(0)
        moves = torch.rand(embeddings.shape, generator=generator).to(embeddings) * 2 - 1
        return embeddings * (1 + moves * torch.finfo(embeddings.dtype).eps)

    hook = model.get_input_embeddings().register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


def _largest(found: list[np.ndarray], truth: list[np.ndarray]) -> float:
    return float(np.abs(np.concatenate(found) - np.concatenate(truth)).max())


def _mean(found: list[np.ndarray], truth: list[np.ndarray]) -> float:
    return float(np.abs(np.concatenate(found) - np.concatenate(truth)).mean())
