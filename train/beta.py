"""The usual beta of each loss: what compares means of log-probs needs a larger one than what compares sums."""

from store.errors import InputError

BETA = {"sigmoid_norm": 5.0}
"""Usual values of losses that compare means of log-probs: OLMo 3's and Tulu's."""

BETA_ELSE = 0.1
"""TRL's default, for all other losses: most compare sums over completions of some hundred tokens."""


def default_beta(loss_type: tuple[str, ...]) -> float:
    """The usual beta of these losses. Raises InputError where they have not got the same."""
    usual = {BETA.get(name, BETA_ELSE) for name in loss_type if name != "sft"} or {BETA_ELSE}
    if len(usual) > 1:
        raise InputError(
            "must be given: these losses have betas of different scales",
            where="--beta",
            found=", ".join(f"{name} {BETA.get(name, BETA_ELSE):g}" for name in loss_type if name != "sft"),
        )
    return usual.pop()


def beta_notice(loss_type: tuple[str, ...], beta: float) -> str | None:
    """What is said of a beta more than ten times larger or smaller than the usual one of its loss."""
    for name in loss_type:
        usual = BETA.get(name, BETA_ELSE)
        if name != "sft" and not usual / 10 <= beta <= usual * 10:
            scale = f"{name} compares {'means' if name in BETA else 'sums'} of log-probs" if name != "ipo" else "ipo's own"
            return f"beta {beta:g} is far from the usual {usual:g} of --loss-type {name} ({scale}): is it meant for another loss?"
    return None
