"""How the columns of a source are named and meant: options of every command that reads a dataset (options.py)."""

from dataclasses import dataclass, fields
from typing import Annotated

from options import Option

DATA = "Dataset"
"""The group of these options, and of what precompute/config.py adds to them."""


@dataclass(frozen=True)
class ColumnOptions:
    """How the columns of a source are named and meant, where it does not say so itself."""

    prompt: Annotated[
        str | None, Option("Column that holds the prompt.", DATA, default="prompt, if there is one", flags=("--prompt-column",))
    ] = None
    chosen: Annotated[str | None, Option("Column of the better answer.", DATA, default="chosen", flags=("--chosen-column",))] = None
    rejected: Annotated[
        str | None, Option("Column of the worse answer.", DATA, default="rejected", flags=("--rejected-column",))
    ] = None
    system: Annotated[
        str | None,
        Option(
            "Column whose text becomes a first system turn; plain texts then become turns too.", DATA, flags=("--system-column",)
        ),
    ] = None
    as_conversation: Annotated[bool, Option("Plain texts become turns: user (prompt) and assistant (answers).", DATA)] = False
    ignore: Annotated[
        tuple[str, ...],
        Option(
            "A column that looks like part of the prompt and is not, or that the store need not keep; repeatable.",
            DATA,
            flags=("--ignore-column",),
        ),
    ] = ()

    def named(self) -> dict[str, str]:
        """Column of the source -> what it is, for those that were named."""
        given = {name: getattr(self, name) for name in ("prompt", "chosen", "rejected", "system")}
        return {column: name for name, column in given.items() if column is not None}

    def __str__(self) -> str:
        """As options of the command line."""
        words = [f"--{each.name}-column {getattr(self, each.name)}" for each in fields(self)[:4] if getattr(self, each.name)]
        words += ["--as-conversation"] * self.as_conversation + [f"--ignore-column {name}" for name in self.ignore]
        return " ".join(words)
