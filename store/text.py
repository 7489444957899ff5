"""Ids to text, by a function that the caller brings: a store holds ids and knows no tokenizer.

One token is not always whole characters, and some tokenizers drop the space before a text's first word. So what a token says is what it adds to
the text before it.
"""

from collections.abc import Callable, Iterator, Sequence

Decode = Callable[[list[int]], str]
"""Token ids -> their text, special tokens included."""

BROKEN = "\ufffd"
"""What decoders write for a character of which some bytes are missing."""

LONGEST_CHARACTER = 4
"""Bytes, and so tokens, of which not even one is whole."""


def pieces(ids: Sequence[int], decode: Decode, before: Sequence[int] = ()) -> Iterator[tuple[int, str]]:
    """(number of tokens, what they add to the text), in order: one token each, but for characters that are spread over several.

    `before`: ids in front of them, such as the prompt's.
    """
    context = list(before[-LONGEST_CHARACTER:])
    known, waiting = decode(context) if context else "", []
    for index, token in enumerate(ids):
        waiting.append(token)
        text = decode(context + waiting)
        whole = not text.endswith(BROKEN) or len(waiting) >= LONGEST_CHARACTER
        if whole or index == len(ids) - 1:
            yield len(waiting), text[len(known) :]
            context = (context + waiting)[-LONGEST_CHARACTER:]
            known, waiting = decode(context), []


class Vocabulary:
    """What each token says by itself, inside a text; asked of the tokenizer once for each id."""

    def __init__(self, decode: Decode):
        self._decode = decode
        self._known: dict[int, str] = {}
        self._letter = next((id_ for id_ in range(1000) if _is_letter(id_, decode)), None)

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            letter = [] if self._letter is None else [self._letter]
            self._known[token] = self._decode([*letter, token])[len(letter) :]
        return self._known[token]


def _is_letter(token: int, decode: Decode) -> bool:
    """An ordinary letter: what follows it is written as inside a text, with the space in front of a word."""
    text = decode([token])
    return len(text) == 1 and text.isalpha() and text.isascii() and decode([token, token]) == 2 * text
