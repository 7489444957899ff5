"""The pictures of a report, as PNG bytes: small enough for a phone's width, each answering one question."""

import io
from typing import Any

import duckdb
import numpy as np

CHOSEN, REJECTED, NEUTRAL = "#2e7d4f", "#b5482f", "#3d7ea6"

BY_POSITION = """
with scored as (
    select side, unnest(range(len(logps))) as position, unnest(logps) as logp from (
        select 'chosen' as side, chosen_token_logps as logps from sampled
        union all select 'rejected', rejected_token_logps from sampled))
select side, floor(4 * log2(position + 1)) as step, min(position) + 1 as first, avg(logp) as mean,
    quantile_cont(logp, 0.1) as low, count(*) as num_tokens
from scored where logp is not null group by side, step having count(*) >= 10 order by side, step
"""


def pictures(connection: duckdb.DuckDBPyConnection, max_length: int, tokens_known: bool) -> dict[str, bytes]:
    """All pictures of one store; `connection` has the tables of store/report.py. That of single tokens only where their log-probs are known."""
    made = {
        "lengths.png": _lengths(connection, max_length),
        "margins.png": _histogram(connection, "margin", "chosen - rejected, nats (sums)"),
        "margins_per_token.png": _histogram(connection, "mean_margin", "chosen - rejected, nats per token"),
        "logprob_by_length.png": _by_length(connection),
        "truncation.png": _truncation(connection, max_length),
    }
    return made | ({"logprob_by_position.png": _by_position(connection)} if tokens_known else {})


def compared(connection: duckdb.DuckDBPyConnection) -> dict[str, bytes]:
    """The pictures of two stores; `connection` has `joined`."""
    figure, axes = _axes("margin here, nats", "margin there, nats")
    here, there = _columns(connection, "select margin, other_margin from joined using sample 5000 rows")
    axes.scatter(here, there, s=14, alpha=0.5, color=NEUTRAL, linewidths=0, zorder=2)
    ends = [min(*here, *there), max(*here, *there)]
    axes.plot(ends, ends, color="black", linewidth=0.6, zorder=1)
    scatter = _png(figure)
    return {
        "compared_margins.png": scatter,
        "compared_change.png": _histogram(connection, "other_margin - margin", "change of the margin, nats", "joined"),
    }


def _axes(xlabel: str, ylabel: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.4), layout="constrained", dpi=160)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def log_scale(axes: Any) -> None:
    """Numbers of tokens as people write them, 2,000 rather than 2 x 10^3."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot

    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    pyplot.close(figure)
    return stream.getvalue()


def _columns(connection: duckdb.DuckDBPyConnection, sql: str) -> list:
    """The columns of the answer, as arrays."""
    table = connection.sql(sql).to_arrow_table()
    return [column.to_numpy() for column in table.columns]


def _lengths(connection: duckdb.DuckDBPyConnection, max_length: int) -> bytes:
    figure, axes = _axes("tokens", "pairs")
    sides = _columns(connection, "select num_prompt_tokens, num_chosen_tokens, num_rejected_tokens from pairs")
    bins = np.geomspace(max(1, min(values.min() for values in sides)), max(2, max(values.max() for values in sides)) + 1, 50)
    for values, name, color in zip(sides, ("prompt", "chosen", "rejected"), (NEUTRAL, CHOSEN, REJECTED), strict=True):
        axes.hist(values, bins=bins, histtype="step", linewidth=1.6, label=name, color=color)
    log_scale(axes)
    axes.legend(frameon=False)
    return _png(figure)


def _histogram(connection: duckdb.DuckDBPyConnection, value: str, label: str, table: str = "pairs") -> bytes:
    """Between the 0.5 and 99.5 % quantiles; what lies beyond is counted in the outermost bars."""
    (values,) = _columns(connection, f"select {value} from {table}")
    low, high = np.quantile(values, [0.005, 0.995])
    if low == high:
        low, high = low - 0.5, high + 0.5
    figure, axes = _axes(label, "pairs")
    axes.hist(np.clip(values, low, high), bins=60, color=NEUTRAL)
    axes.axvline(0, color="black", linewidth=1)
    axes.axvline(np.median(values), color=REJECTED, linewidth=1.2, linestyle="--", label=f"median {np.median(values):.3g}")
    axes.legend(frameon=False)
    return _png(figure)


def _by_length(connection: duckdb.DuckDBPyConnection) -> bytes:
    figure, axes = _axes("completion tokens", "sum of log-probs, nats")
    for side, color in (("chosen", CHOSEN), ("rejected", REJECTED)):
        tokens, logps = _columns(connection, f"select num_{side}_tokens, ref_{side}_logps from pairs using sample 4000 rows")
        axes.scatter(tokens, logps, s=9, alpha=0.5, color=color, label=side, linewidths=0)
    axes.legend(frameon=False, markerscale=2)
    return _png(figure)


def _by_position(connection: duckdb.DuckDBPyConnection) -> bytes:
    figure, axes = _axes("position in the completion", "log-prob of the token, nats")
    rows = connection.execute(BY_POSITION).fetchall()
    for side, color in (("chosen", CHOSEN), ("rejected", REJECTED)):
        mine = [row for row in rows if row[0] == side]
        axes.plot([row[2] for row in mine], [row[3] for row in mine], color=color, label=f"{side}, mean", linewidth=1.6)
        axes.plot(
            [row[2] for row in mine], [row[4] for row in mine], color=color, linestyle=":", label="lowest tenth below", linewidth=1
        )
    log_scale(axes)
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def _truncation(connection: duckdb.DuckDBPyConnection, max_length: int) -> bytes:
    """How many pairs are whole under every max_length up to the store's: what `train --max-length` would cost. Those that the store
    itself cut are whole under none of them."""
    figure, axes = _axes("max length, tokens", "pairs whole, %")
    (needed,) = _columns(
        connection,
        # a truncated side needs more than the store's max_length, by how much is not known
        """select num_prompt_tokens + greatest(num_chosen_tokens, num_rejected_tokens)
            + (chosen_truncated or rejected_truncated)::int from pairs""",
    )
    lengths, whole = whole_under(needed, max_length)
    axes.plot(lengths, whole, color=NEUTRAL, linewidth=1.8)
    axes.plot(max_length, whole[-1], "o", color=NEUTRAL, markersize=5)
    axes.annotate(
        f"this store: {whole[-1]:.1f} %", (max_length, whole[-1]), (4, 8), textcoords="offset points", ha="right", fontsize=9
    )
    axes.set(ylim=(0, 112), yticks=range(0, 101, 20))
    log_scale(axes)
    return _png(figure)


def whole_under(needed: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(lengths, % of pairs that need no more), up to `max_length`; `needed`: tokens of prompt + the longer side, int64 [pairs]."""
    lengths = np.unique([*np.geomspace(min(needed.min(), max_length), max_length, 200).round().astype(int), max_length])
    return lengths, np.array([(needed <= length).mean() * 100 for length in lengths])
