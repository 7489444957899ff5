"""An Analysis as text for the terminal and as a PNG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from precompute.desk.analyze import ENOUGH, LOST, Analysis, AtMaxLength
from store.command import cli
from store.errors import InputError
from store.report_pictures import log_scale
from store.schema import COUNTS
from store.spans import TURNS

BAR = 48  # columns of the longest bar
SHOWN = 3  # malformed rows listed

TRAIN_COST = 4
"""A training token costs about four scored ones: forward, backward (twice a forward) and gradient checkpointing's second
forward."""


@dataclass(frozen=True)
class Rates:
    """Measured tokens per second of one GPU (or one CPU worker), and how many there are. None: not known, no time is guessed."""

    score: float | None
    train: float | None
    num_gpus: int

    def hours(self, analysis: Analysis, at: AtMaxLength) -> tuple[float | None, float | None]:
        """(phase 1, phase 2 for one epoch), in hours for the whole dataset."""
        score = self.score and analysis.scaled(at.tokens_packed) / self.score / self.num_gpus / 3600
        rate = self.train or (self.score and self.score / TRAIN_COST)
        return score, rate and analysis.scaled(at.tokens_padded) / rate / self.num_gpus / 3600


def describe(analysis: Analysis, rates: Rates, options: Sequence[str] = ()) -> str:
    """About forty lines of at most 120 columns, most important last: what to type next. `options`: words of this command that
    precompute must be given too."""
    blocks = [
        _head(analysis),
        _lengths(analysis),
        _table(analysis, rates),
        _histogram(analysis),
        _rows(analysis),
        _advice(analysis, options),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _head(analysis: Analysis) -> list[str]:
    looked = (
        f"{analysis.num_looked_at:,} of {analysis.num_rows:,} rows, evenly spaced"
        if analysis.num_looked_at < analysis.num_rows
        else f"{analysis.num_rows:,} rows"
    )
    turns = TURNS.get(analysis.config.scored_turns or "")
    scored = "" if turns is None else f"; scored: {turns} alone"
    return [f"{analysis.config.name}: {looked}; {analysis.num_pairs:,} pairs; tokenizer {analysis.config.tokenizer}{scored}"]


def _lengths(analysis: Analysis) -> list[str]:
    names = ("p50", "p90", "p95", "p99", "max")
    lines = [f"{'length, tokens':24}" + "".join(f"{name:>10}" for name in names)]
    return lines + [f"  {part:22}" + "".join(f"{at[name]:>10,}" for name in names) for part, at in analysis.quantiles.items()]


def _table(analysis: Analysis, rates: Rates) -> list[str]:
    timed = rates.score is not None or rates.train is not None
    titles = ("--max-length", "fits", "chosen cut", "rejected cut", "no pair", "same", "tokens", "packed", "saved")
    lines = ["".join(f"{title:>13}" for title in titles) + (f"{'phase 1':>10}{'phase 2':>10}" if timed else "")]
    for at in analysis.at:
        cells = (
            f"{at.max_length:,}",
            f"{at.fits:.1%}",
            *(f"{count / analysis.num_looked_at:.2%}" for count in (at.chosen_truncated, at.rejected_truncated, at.unscorable)),
            f"{at.cut_to_the_same:,}",
            _tokens(analysis.scaled(at.tokens_unshared)),
            _tokens(analysis.scaled(at.tokens_packed)),
            f"{1 - at.tokens_packed / at.tokens_unshared:.0%}" if at.tokens_unshared else "-",
        )
        hours = "".join(f"{_time(each):>10}" for each in rates.hours(analysis, at)) if timed else ""
        lines.append("".join(f"{cell:>13}" for cell in cells) + hours)
    lines.append(
        "  fits: both sides whole; no pair: the prompt alone fills it, or nothing to score within; same: both sides equal once cut; saved: prefixes computed once"
    )
    if timed:
        assumed = (
            ""
            if rates.train is not None
            else f" (phase 2 assumed {TRAIN_COST} times the work per token; measure and pass --train-tokens-per-second)"
        )
        lines.append(f"  times: {rates.num_gpus} GPU{'s' * (rates.num_gpus > 1)} at the given rates, one epoch{assumed}")
    else:
        lines.append("  for times, pass --tokens-per-second: precompute --limit 64 prints the rate of this machine")
    return lines


def _histogram(analysis: Analysis) -> list[str]:
    """Longer sides in half-octaves."""
    lengths = analysis.longer_side
    first, last = (math.floor(2 * math.log2(length)) for length in (lengths.min(), lengths.max()))
    edges = [math.ceil(2 ** (step / 2)) for step in range(first, last + 2)]
    heights, _ = np.histogram(lengths, bins=edges)
    tallest = heights.max()
    return ["longer side, tokens"] + [
        f"  {low:>7,} - {high - 1:>7,} {count:>9,} {'█' * round(BAR * count / tallest)}{'▏' if 0 < count < tallest / BAR / 2 else ''}"
        for low, high, count in zip(edges, edges[1:], heights, strict=False)
        if high > low
    ]


def _rows(analysis: Analysis) -> list[str]:
    lines = ["rows"] + [f"  {count:>9,}  {name}" for name, count in analysis.formats.items()]
    for name, count in analysis.counts.items():
        title = COUNTS.get(name, "rows whose content occurs before")
        lines.append(f"  {count:>9,}  {title}" + (f": {analysis.examples[name]}"[:100] if name in analysis.examples else ""))
    lines += [f"  {count:>9,}  cannot be scored: {reason}" for reason, count in analysis.unscorable.items()]
    if analysis.malformed:
        lines.append(f"  {len(analysis.malformed):>9,}  malformed: precompute refuses the dataset until they are corrected")
        lines += [f"             {line}" for line in analysis.malformed[:SHOWN]]
    return lines


def _advice(analysis: Analysis, options: Sequence[str]) -> list[str]:
    enough = f"leaves {ENOUGH:.0%} of the pairs whole and costs at most {LOST:.0%} of them"
    if analysis.recommended is None:
        longest = analysis.at[-1]
        return [f"recommended: none of these {enough}; --max-length {longest.max_length}: {_kept(analysis, longest)}"]
    at = next(each for each in analysis.at if each.max_length == analysis.recommended)
    config = analysis.config
    command = ["precompute", *(options or ("--dataset", config.name)), "--max-length", str(at.max_length)]
    if config.name == config.dataset:  # no preset, which would know the model and dtype
        command += [*([] if "--model" in command else ["--model", config.tokenizer]), "--dtype", "bfloat16"]
    return [
        f"recommended: --max-length {at.max_length}, the shortest that {enough} ({_kept(analysis, at)})",
        f"next: {cli(*command)}",
    ]


def _kept(analysis: Analysis, at: AtMaxLength) -> str:
    """The two shares that decide."""
    return f"{at.fits:.1%} whole, {at.lost / analysis.num_pairs:.2%} lost"


def _tokens(count: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def _time(hours: float | None) -> str:
    if hours is None:
        return "-"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def plot(analysis: Analysis, png: Path) -> None:
    """The distribution of lengths, with the max_lengths asked about. Raises InputError where `png` cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    everything = np.concatenate([analysis.longer_side, *analysis.parts.values()])
    bins = np.geomspace(max(1, everything.min()), everything.max() + 1, 60)
    axes.hist(analysis.longer_side, bins=bins, color="#9aa5b1", label="prompt + longer side")
    for (name, lengths), color in zip(analysis.parts.items(), ("#3d7ea6", "#2e7d4f", "#b5482f"), strict=True):
        axes.hist(lengths, bins=bins, histtype="step", linewidth=1.6, color=color, label=name)
    axes.set_ylim(top=axes.get_ylim()[1] * 1.25)  # room for the labels
    for at in analysis.at:
        if at.max_length <= bins[-1] * 1.5:
            recommended = at.max_length == analysis.recommended
            axes.axvline(at.max_length, color="black", linewidth=1.6 if recommended else 0.7, linestyle="-" if recommended else ":")
            axes.text(
                at.max_length,
                axes.get_ylim()[1],
                f"{at.max_length:,}: {at.fits:.0%} fit ",
                rotation=90,
                va="top",
                ha="right",
                fontsize=8,
            )
    log_scale(axes)
    axes.set(xlabel="tokens", ylabel="pairs", title=f"{Path(analysis.config.name).name}: {analysis.num_pairs:,} pairs")
    axes.legend(loc="upper left", fontsize=8)
    try:
        png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png, dpi=120, format="png")
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=f"--png {png}") from error
    finally:
        pyplot.close(figure)
