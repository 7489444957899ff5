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
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from architectures import config_of, make_model
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from precompute.scorer.model import load_model
from precompute.scorer.packing import Sequence
from precompute.scorer.rope import refuse_dynamic, refuse_mixed
from precompute.scorer.scoring import score
from precompute.scorer.self_test import self_test
from store.errors import InputError
from train import dropout
from train.flops import PairFlops
from train.packed import pack_policy
from train.self_test import self_test_policy

ROUNDING = 1e-3
"""Largest difference that counts as right: nats of any token in float32, or of a parameter's gradient as a share of its norm. Seen: 1e-5, 1e-4."""

LONGEST_REASON = 110
"""Characters of an error that docs/models.md shows."""

WAYS = ("packed scoring", "padded scoring", "packed training", "padded training")


@dataclass(frozen=True)
class Outcome:
    verdict: str
    detail: str = ""
    difference: float = 0.0
    """As ROUNDING counts it."""


def sequences() -> list[Sequence]:
    """Of unequal lengths on both sides of every threshold of architectures.py (24, 32 and 48 tokens, and the tokens at them); prefixes shared
    within the prompt, up to its end, and deep in the completion; a prompt of one token; one sequence twice. The ids of bos, pad and eos (0, 1, 2)
    stand inside, as they do in conversations whose pad is their eos."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return rng.choice([0, 1, 2, *range(10, 384)], count, p=[0.02] * 3 + [0.94 / 374] * 374)

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
            if hasattr(module, "max_seq_len_cached"):
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def load(name: str, seed: int = 0) -> PreTrainedModel:
    """The tiny model, saved and loaded as a user's is. Raises InputError."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(config_of(name), seed).save_pretrained(folder)
        return load_model(folder, revision=None, dtype="float32", device=torch.device("cpu"))


def sweep(name: str) -> dict[str, Outcome]:
    """The outcome of each way for one architecture of architectures.py."""
    try:
        model = load(name)
    except InputError as error:
        return dict.fromkeys(WAYS, Outcome("refused", _first_clause(error)))
    made, alone = sequences(), Alone(model)
    return {
        "packed scoring": _judged(lambda: _scoring(model, made, alone, "packed")),
        "padded scoring": _judged(lambda: _scoring(model, made, alone, "padded")),
        "packed training": _judged(lambda: _training(model, made, alone, "packed")),
        "padded training": _judged(lambda: _training(model, made, alone, "padded")),
    }


class Alone:
    """The truth about `sequences()`: the plain forward of each alone."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    @cached_property
    def logps(self) -> list[list[np.ndarray]]:
        """By the implementation of attention that was loaded, and by transformers' own written-out one."""
        results = []
        for implementation in dict.fromkeys((self.model.config._attn_implementation, "eager")):
            model = copy.deepcopy(self.model)
            if implementation != model.config._attn_implementation:
                model.set_attn_implementation(implementation)
            with torch.no_grad():
                results.append([plain(model, each).numpy() for each in sequences()])
        return results

    @cached_property
    def training(self) -> tuple[list[np.ndarray], PreTrainedModel]:
        """Log-probs in evaluation mode, as the reference's are, and a model with the gradients of their weighted sum."""
        model, results = copy.deepcopy(self.model).requires_grad_(True).eval(), []
        for weight, each in zip(_weights(), sequences(), strict=True):
            logps = plain(model, each)
            (weight * logps.sum()).backward()
            results.append(logps.detach().numpy())
        return results, model


def _judged(way: Callable[[], float]) -> Outcome:
    try:
        difference = way()
    except InputError as error:
        return Outcome("refused", _first_clause(error))
    except Exception as error:  # noqa: BLE001 (whatever an architecture raises is a finding)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        return Outcome("CRASH", f"{type(error).__name__}: {' '.join(str(error).split())[:150]} ({place})")
    return Outcome("right" if difference <= ROUNDING else "WRONG", difference=float(difference))


def _first_clause(error: InputError) -> str:
    """What is wrong, without the numbers, which depend on the machine, the name of the class, and the tail of another library's message."""
    text = re.sub(r"\b\d+(\.\d+)?(e-?\d+)?\b", "...", " ".join(error.what.split()))
    text = re.sub(r"\b[A-Z]\w+(Model|LM|Generation|Head)\b", "this class", text)
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON].rsplit(" ", 1)[0] + " ..."


def _scoring(model: PreTrainedModel, made: list[Sequence], alone: Alone, layout: str) -> float:
    model = copy.deepcopy(model)
    self_test(model, "float32", layout=layout)
    found = [score(model, made, layout=layout, tokens_per_batch=budget) for budget in (300, 100_000)]
    return np.max([_largest(scores, expected) for scores in found for expected in alone.logps])


def _training(model: PreTrainedModel, made: list[Sequence], alone: Alone, layout: str) -> float:
    lengths = np.array([len(each.ids) for each in made])
    if layout == "padded":
        refuse_mixed(model, lengths)
    refuse_dynamic(model, int(lengths.max()))
    self_test_policy(copy.deepcopy(model), "float32", layout)
    policy = _trainable(model)
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
    sum(weight * each.sum() for weight, each in zip(_weights(), found, strict=True)).backward()
    logps, reference = alone.training
    return np.max([_largest([each.detach().numpy() for each in found], logps), _gradients_apart(policy, reference)])


def _weights() -> torch.Tensor:
    """Of each sequence's sum in the loss: as of chosen and rejected ones, of either sign."""
    return torch.linspace(-1, 1, len(sequences()))


def _trainable(model: PreTrainedModel) -> PreTrainedModel:
    """As the trainer has it: in training mode without what that draws at random, with gradient checkpointing."""
    policy = copy.deepcopy(model).requires_grad_(True)
    if policy.supports_gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    dropout.turn_off(policy)
    return policy.train()


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
    return np.max(apart)  # not a number if one is


def _largest(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Difference of any token, nats; not a number if one is."""
    return float(np.abs(np.concatenate(found) - np.concatenate(expected)).max())
