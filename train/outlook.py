"""What a layout and the dealing of batches save, told before the first step: from the lengths in the store, for the first epoch."""

from dataclasses import dataclass

import numpy as np

from train.balance import Shape, imbalance
from train.data import Lengths


@dataclass(frozen=True)
class Outlook:
    """Tokens that the model computes in one epoch, and the share of the ranks' time lost to waiting for each other."""

    padded_tokens: int
    """Two rows per pair, all as long as the longest of their micro-batch, in shuffled order: stock TRL."""
    packed_tokens: int
    """Each prompt once, no padding. What pairs of a micro-batch share besides is left out of both."""
    imbalance_before: float
    """In shuffled order."""
    imbalance_after: float

    @property
    def padding(self) -> float:
        """Share of the padded tokens that packing leaves out."""
        return 1 - self.packed_tokens / self.padded_tokens


def outlook(lengths: Lengths, before: np.ndarray, imbalance_after: float, shape: Shape) -> Outlook:
    """`before`: the shuffled order of the pairs, int [pairs], cut into micro-batches as `shape` says."""
    longest = lengths.longer[before]
    padded = sum(
        2 * len(each) * int(each.max()) for each in np.split(longest, range(shape.micro_batch, len(longest), shape.micro_batch))
    )
    tokens = lengths.packed
    return Outlook(padded, int(tokens.sum()), imbalance(before, tokens, shape), imbalance_after)


def describe(seen: Outlook, layout: str, world: int) -> str:
    """`layout packed: 1,234,567 tokens an epoch, 54 % less than padded (2,683,841); ranks wait 2.1 % of the time, 19.4 % as shuffled`"""
    if layout == "padded":
        text = f"layout padded: {seen.padded_tokens:,} tokens an epoch, of which {seen.padding:.0%} are padding or a prompt's second copy"
        return text + (f"; ranks wait {seen.imbalance_before:.1%} of the time" if world > 1 else "")
    text = f"layout packed: {seen.packed_tokens:,} tokens an epoch, {seen.padding:.0%} less than padded ({seen.padded_tokens:,})"
    if world > 1:
        text += f"; ranks wait {seen.imbalance_after:.1%} of the time, {seen.imbalance_before:.1%} as shuffled"
    return text
