"""Which tokens of a conversation are scored by its turns: the assistant's last one, or all of the assistant's.

open-instruct's DPO does the first since 2025-06-26 (commit 8699c789, so for OLMo 3) and did the second before (Tülu 3). Both sides of a row are
whole conversations here, each with its own turns; what they share is scored for both.

A turn is found as open-instruct found it then, by counting: it begins behind as many tokens as the conversation before it has with the generation
prompt, and ends where the conversation up to it ends. That only holds where the template renders a turn as it does when nothing follows; where it
does not, open-instruct scores other tokens than it means, and here the row cannot be scored.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from precompute.scorer.packing import common_prefix
from store import ScoredTurns

END_TOKENS = 2
"""A template may end the last turn otherwise than the others, with so many tokens at most: `<|endoftext|>` instead of `<|im_end|>` and a line break."""


class NotFoundInText(ValueError):
    """Why the tokens of a turn cannot be told; not an error of the row."""


@dataclass(frozen=True)
class Turn:
    """One turn that is scored, by the texts that end where it begins and where it ends."""

    header: str
    """The conversation before it, with the generation prompt."""
    prefix: bool
    """Is that how the whole conversation begins? Else but for the generation prompt, and the turn begins where the tokens diverge."""
    through: str | None
    """The conversation up to and with it; None: the whole one."""

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.header,) if self.through is None else (self.header, self.through)


def turns_of(conversation: list[dict], text: str, which: ScoredTurns, render: Callable[..., str]) -> tuple[Turn, ...]:
    """`text`: `render(conversation)`. Raises NotFoundInText."""
    places = [place for place, turn in enumerate(conversation) if turn["role"] == "assistant"]
    if not places:
        raise NotFoundInText("no turn is the assistant's")
    found = []
    for place in places if which == "all" else places[-1:]:
        before = conversation[:place]
        header = render(before, add_generation_prompt=True) if before else ""
        prefix = text.startswith(header)
        if not prefix and not text.startswith(render(before)):
            raise NotFoundInText(f"the chat template renders what stands before turn {place} otherwise when it is followed")
        last = place == len(conversation) - 1
        found.append(Turn(header, prefix, None if last else render(conversation[: place + 1])))
    return tuple(found)


def mask_of_turns(ids: np.ndarray, turns: tuple[Turn, ...], ids_of: dict[str, np.ndarray]) -> np.ndarray:
    """bool [tokens] for the `ids` of a whole conversation; `ids_of` has those of the turns' texts. The first token has no context and is never
    scored. Raises NotFoundInText."""
    mask = np.zeros(len(ids), bool)
    for turn in turns:
        header = ids_of[turn.header]
        start = len(header) if turn.prefix else common_prefix(header, ids)
        stop = len(ids)
        if turn.through is not None:
            through = ids_of[turn.through]
            stop = len(through)
            if common_prefix(through, ids) < stop - END_TOKENS:
                raise NotFoundInText("the chat template renders a turn of the assistant otherwise when others follow it")
        mask[max(start, 1) : stop] = True
    return mask
