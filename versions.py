"""Are the installed packages new enough? Older ones start, and end in a traceback from inside a library, after a long time or with other numbers."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from store.errors import InputError

PROJECT = Path(__file__).with_name("pyproject.toml")


def refuse_old_packages() -> None:
    """InputError for a required package that is missing or older than pyproject.toml says.

    A version counts without what follows its numbers: NVIDIA's containers have builds such as 2.11.0a0+nv26.1.
    """
    for requirement in _required():
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = None
        if installed is None or _numbers(installed) not in requirement.specifier:
            raise InputError(
                "the package is missing" if installed is None else "the package is too old",
                where=requirement.name,
                expected=str(requirement.specifier),
                found=installed or "none",
                next=f'Install it: uv pip install "{requirement}" (or pip install).',
            )


def _numbers(installed: str) -> str:
    numbers = re.match(r"\d+(\.\d+)*", installed)  # of a build of one's own, what follows may be anything
    return numbers[0] if numbers else "0"


def _required() -> list[Requirement]:
    """Without extras: those are refused where they are used."""
    if PROJECT.exists():
        lines = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:  # installed, and not from a checkout
        lines = requires("refdpo") or []
    return [each for each in map(Requirement, lines) if each.marker is None]
