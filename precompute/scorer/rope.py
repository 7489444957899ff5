"""RoPE that follows a row's longest position: which sequences may share a row, so that each is as it would be alone.

`longrope` (arXiv 2402.13753; Phi-3 and Phi-4-mini with 128k) takes one set of frequencies for a row no longer than the original context and
another for a longer one. `dynamic` takes other frequencies for every length beyond it, and keeps those of the longest row it has seen.
"""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from precompute.scorer.packing import Sequence
from store.errors import InputError


@dataclass(frozen=True)
class Group:
    """Indices of sequences that may share rows (int64), and whether a row needs their last tokens, which predict nothing, for its length."""

    members: np.ndarray
    whole: bool


def together(model: PreTrainedModel, sequences: list[Sequence]) -> list[Group]:
    """The sequences in groups, each in its own order. Raises InputError for one longer than `dynamic` RoPE computes alike for every row."""
    lengths = np.array([len(sequence.ids) for sequence in sequences])
    refuse_dynamic(model, int(lengths.max(initial=0)))
    kinds = _kinds(model)
    if not kinds:
        return [Group(np.arange(len(sequences)), whole=False)]
    beyond = np.array([[length > edge for _, edge in kinds] for length in lengths]).reshape(len(lengths), len(kinds))
    patterns = sorted({tuple(row) for row in beyond.tolist()})
    return [Group(np.flatnonzero((beyond == pattern).all(axis=1)), whole=any(pattern)) for pattern in patterns]


def refuse_mixed(model: PreTrainedModel, lengths: np.ndarray) -> None:
    """InputError where sequences of these `lengths`, int [sequences], cannot be in one padded batch without changing each other: `longrope` takes the longest's."""
    for kind, edge in _kinds(model):
        if kind == "longrope" and lengths.min(initial=edge) <= edge < lengths.max(initial=0):
            raise InputError(
                "in a padded batch this model's RoPE (longrope) follows the longest sequence, so that shorter ones get other numbers",
                where=type(model).__name__,
                expected=f"all sequences within {edge} tokens, or all beyond it",
                found=f"{int(lengths.min())} to {int(lengths.max())} tokens",
                next="Use --layout packed, which computes each as it is alone.",
            )


def refuse_dynamic(model: PreTrainedModel, longest: int) -> None:
    """InputError for a row of `longest` tokens under `dynamic` RoPE that would be another one after a longer row."""
    for kind, edge in _kinds(model):
        if kind == "dynamic" and longest > edge:
            raise InputError(
                "this model's RoPE (dynamic) depends on the longest sequence computed so far",
                where=type(model).__name__,
                expected=f"at most {edge} tokens, within which it does not",
                found=f"{longest} tokens",
                next=f"Use --max-length {edge}, or give the model a RoPE that is the same for every length (yarn) in its config.json.",
            )


def _kinds(model: PreTrainedModel) -> list[tuple[str, int]]:
    """(kind, number of tokens beyond which it changes) of every RoPE that follows the row; layers of several kinds may have their own."""
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    each_kind = [parameters] if "rope_type" in parameters else [each for each in parameters.values() if isinstance(each, dict)]
    kinds = set()
    for parameters in each_kind:
        rope_type = parameters.get("rope_type") or ""
        if rope_type == "longrope":
            kinds.add(("longrope", int(parameters["original_max_position_embeddings"])))
        elif "dynamic" in rope_type:
            # transformers compares with the largest position, whatever the original context.
            kinds.add(("dynamic", int(config.max_position_embeddings)))
    return sorted(kinds)
