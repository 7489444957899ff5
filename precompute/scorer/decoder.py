"""From a store's ids back to text, by the tokenizer that made them."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from store.errors import InputError
from store.text import Decode

if TYPE_CHECKING:  # pyarrow: not for `--help`
    from store.manifest import Identity


def decoder_of(identity: "Identity", name: str | None = None) -> Decode | None:
    """Ids to text with the store's tokenizer; `name`: a copy of it. None (and a line that says so) where it is not at hand and none was
    named. InputError for a tokenizer that is not the store's."""
    try:
        return _load(identity, name)
    except _NotAtHand:
        if name is not None:
            raise
        print(
            f"pairs are shown as token ids: the tokenizer {identity.tokenizer} cannot be loaded; pass --tokenizer", file=sys.stderr
        )
        return None


def lazy_decoder(store: Path, name: str | None = None) -> Decode:
    """The same for the store at `store`; the tokenizer is loaded when it is called first. InputError then, if it is not at hand."""
    from store.folder import identity_of

    loaded: list[Decode] = []

    def decode(ids: list[int]) -> str:
        if not loaded:
            loaded.append(_load(identity_of(store), name))
        return loaded[0](ids)

    return decode


class _NotAtHand(InputError):
    """There is no tokenizer of this name here."""


def _load(identity: "Identity", name: str | None) -> Decode:
    from precompute.scorer.model import load_tokenizer, tokenizer_sha256  # torch: only where there is something to decode

    try:
        tokenizer = load_tokenizer(
            name or identity.tokenizer,
            revision=identity.revision if name is None and identity.tokenizer == identity.model else None,
        )
    except InputError as error:
        raise _NotAtHand(
            error.what,
            where=error.where,
            next=error.next
            if name is not None
            else "Text needs the store's tokenizer: pass --tokenizer with a folder or hub id that has it. Ids and log-probs need none.",
        ) from error
    if tokenizer_sha256(tokenizer) != identity.tokenizer_sha256:
        raise InputError(
            "not the tokenizer the store was made with",
            where=f"--tokenizer {name or identity.tokenizer}",
            next=f"Pass a copy of {identity.tokenizer}.",
        )
    return lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)
