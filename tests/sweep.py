"""What scoring and training make of an architecture, against the plain forward of each sequence alone: the sweep behind docs/models.md.

right     every log-prob (in training also the gradient of every parameter) is the plain forward's, up to rounding
refused   an InputError, which says what to do
WRONG     anything else without an error
CRASH     any other exception
"""

import copy
import re
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from architectures import config_of, make_model
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from precompute.model import load_model
from precompute.packing import Sequence
from precompute.scoring import score
from precompute.worker import self_test
from store.errors import InputError
from train.flops import PairFlops
from train.packed import pack_policy

LOGPS, GRADIENT = 1e-3, 1e-3
"""Largest difference that counts as rounding: nats per token in float32, and a parameter's gradient relative to its norm. Seen: 1e-4, 1e-5."""

WAYS = ("packed scoring", "padded scoring", "packed training", "padded training")


@dataclass(frozen=True)
class Outcome:
    verdict: str
    detail: str = ""
    difference: float = 0.0
    """Nats per token, or of a gradient's norm, whichever is the larger."""


def sequences() -> list[Sequence]:
    """Of unequal lengths on both sides of every threshold of architectures.py (24, 32 and 48 tokens, and the tokens at them); prefixes shared
    within the prompt, up to its end, and deep in the completion; a prompt of one token; one sequence twice."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(10, 384, count)

    def sequence(prefix: np.ndarray, length: int, num_prompt: int) -> Sequence:
        return Sequence(np.concatenate([prefix, tokens(length - len(prefix))]).astype(np.int32), num_prompt)

    short, long = tokens(12), tokens(40)
    made = [sequence(short, length, 12) for length in (15, 24, 25, 33)]
    made += [sequence(long, length, 40) for length in (48, 49, 90, 130)]
    made += [
        sequence(made[6].ids[:70], 100, 40),
        sequence(made[3].ids[:28], 60, 12),
        sequence(long[:20], 50, 20),
        sequence(tokens(1), 40, 1),
    ]
    return [*made, made[4]]


def plain(model: PreTrainedModel, sequence: Sequence) -> torch.Tensor:
    """Float32 [num_scored]: the sequence alone, no padding, no mask, no cache, in a model that remembers no other."""
    forget(model)
    ids = torch.from_numpy(sequence.ids.astype(np.int64))[None]
    logps = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    return logps[:-1].gather(1, ids[0, 1:, None])[sequence.num_prompt - 1 :, 0]


def forget(model: PreTrainedModel) -> None:
    """Dynamic RoPE keeps the frequencies of the longest sequence that it has seen: back to those of a model just loaded."""
    for module in model.modules():
        for name in [
            each for each in vars(module) | dict(module.named_buffers(recurse=False)) if each.endswith("original_inv_freq")
        ]:
            prefix = name.removesuffix("original_inv_freq")
            setattr(module, f"{prefix}inv_freq", getattr(module, name).clone())
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def load(name: str, seed: int = 0) -> PreTrainedModel:
    """The tiny model, saved and loaded as a user's is. Raises InputError."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(config_of(name), seed).save_pretrained(folder)
        return load_model(folder, revision=None, dtype="float32", device=torch.device("cpu"))


def sweep(name: str, ways: tuple[str, ...] = WAYS) -> dict[str, Outcome]:
    """The outcome of each way for one architecture of architectures.py."""
    try:
        model = load(name)
    except InputError as error:
        return dict.fromkeys(ways, Outcome("refused", _first_clause(error)))
    return {way: _judged(lambda way=way: RUN[way](copy.deepcopy(model))) for way in ways}


def _judged(run: Callable[[], float]) -> Outcome:
    try:
        difference = run()
    except InputError as error:
        return Outcome("refused", _first_clause(error))
    except Exception as error:  # noqa: BLE001 (whatever an architecture raises is a finding)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        return Outcome("CRASH", f"{type(error).__name__}: {' '.join(str(error).split())[:150]} ({place})")
    return Outcome("right" if difference <= LOGPS else "WRONG", difference=difference)


def _first_clause(error: InputError) -> str:
    """What is wrong, without the numbers, which depend on the machine, and without the tail of another library's message."""
    return re.sub(
        r"\b[A-Z]\w+(Model|LM|Generation|Head)\b",
        "this class",
        re.sub(r"\b\d+(\.\d+)?(e-?\d+)?\b", "...", " ".join(error.what.split())),
    )[:110]


def _scoring(layout: str) -> Callable[[PreTrainedModel], float]:
    def run(model: PreTrainedModel) -> float:
        made = sequences()
        with torch.no_grad():
            expected = [plain(model, each).numpy() for each in made]
        if layout == "packed":
            self_test(model, "float32")
        found = score(model, made, layout=layout, tokens_per_batch=300)
        together = score(model, made, layout=layout, tokens_per_batch=100_000)
        return max(_largest(a, b) for scores in (found, together) for a, b in zip(scores, expected, strict=True))

    return run


def _training(layout: str) -> Callable[[PreTrainedModel], float]:
    def run(model: PreTrainedModel) -> float:
        made = sequences()
        weights = torch.linspace(-1, 1, len(made))  # of each sequence's sum in the loss
        policy = _trainable(model)
        if layout == "packed":
            PairFlops.of(policy)
        add_fused_lm_head(policy, outputs=("log_probs",))
        if layout == "packed":
            pack_policy(policy, ("log_probs",))
        longest = max(len(each.ids) for each in made)
        ids, mask, labels = torch.zeros(3, len(made), longest, dtype=torch.long)
        labels -= 100
        for row, each in enumerate(made):
            ids[row, : len(each.ids)] = torch.from_numpy(each.ids.astype(np.int64))
            mask[row, : len(each.ids)] = 1
            labels[row, each.num_prompt : len(each.ids)] = ids[row, each.num_prompt : len(each.ids)]
        values = policy(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
        found = [values[row, each.num_prompt - 1 : len(each.ids) - 1] for row, each in enumerate(made)]
        sum(weight * each.sum() for weight, each in zip(weights, found, strict=True)).backward()

        reference = _trainable(model)
        expected = []
        for weight, each in zip(weights, made, strict=True):
            logps = plain(reference, each)
            (weight * logps.sum()).backward()
            expected.append(logps.detach().numpy())
        logps = max(_largest(a.detach().numpy(), b) for a, b in zip(found, expected, strict=True))
        return max(logps, _gradients_apart(policy, reference) * LOGPS / GRADIENT)

    return run


def _trainable(model: PreTrainedModel) -> PreTrainedModel:
    """As TRL's trainer has it: in training mode without dropout, with gradient checkpointing."""
    policy = copy.deepcopy(model).requires_grad_(True).train()
    disable_dropout_in_model(policy)
    if policy.supports_gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    return policy


def _gradients_apart(policy: PreTrainedModel, reference: PreTrainedModel) -> float:
    """Of the parameter that is worst: norm of the difference over its own norm, or over 1e-4 of the whole model's where that is more."""
    pairs = [
        (
            mine.grad if mine.grad is not None else torch.zeros_like(mine),
            own.grad if own.grad is not None else torch.zeros_like(own),
        )
        for mine, own in zip(policy.parameters(), reference.parameters(), strict=True)
    ]
    whole = sum(float(own.norm()) ** 2 for _, own in pairs) ** 0.5
    apart = [float((mine - own).norm()) / (float(own.norm()) + 1e-4 * whole) for mine, own in pairs]
    return float(np.max(apart))  # not a number if one is


def _largest(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


RUN = {
    "packed scoring": _scoring("packed"),
    "padded scoring": _scoring("padded"),
    "packed training": _training("packed"),
    "padded training": _training("padded"),
}
