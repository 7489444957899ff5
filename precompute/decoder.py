"""From a store's ids back to text, by the tokenizer that made them."""

import sys
from collections.abc import Callable

from precompute.scorer.api import load_tokenizer, tokenizer_sha256
from store.errors import InputError
from store.manifest import Identity


def decoder(identity: Identity, name: str | None = None) -> Callable | None:
    """Ids to text with the store's tokenizer; `name`: a copy of it. None (and a line that says so) where it is not at hand and none was
    named. InputError for a tokenizer that is not the store's."""
    try:
        tokenizer = load_tokenizer(
            name or identity.tokenizer,
            revision=identity.revision if name is None and identity.tokenizer == identity.model else None,
        )
    except InputError:
        if name is not None:
            raise
        print(
            f"pairs are shown as token ids: the tokenizer {identity.tokenizer} cannot be loaded; pass --tokenizer", file=sys.stderr
        )
        return None
    if tokenizer_sha256(tokenizer) != identity.tokenizer_sha256:
        raise InputError(
            "not the tokenizer the store was made with",
            where=f"--tokenizer {name or identity.tokenizer}",
            next=f"Pass a copy of {identity.tokenizer}.",
        )
    return tokenizer.decode
