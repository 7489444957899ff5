"""A store on one screen: what it is, how long its pairs are, what the reference thinks of them."""

import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import duckdb

from store.command import cli
from store.errors import StoreError
from store.folder import identity_of, missing_shards, stored_command
from store.manifest import MANIFEST, Identity, Manifest, Totals, manifest_path, rerun, totals_of
from store.schema import SUMS_ONLY_NOTE
from store.shard import read_footer
from store.spans import SCORED, TURNS, num_scored_sql
from store.sql import connect, readable_shards

COUNTS_SHOWN = 6

# Of lengths: the smallest that so many pairs do not exceed, a length that occurs, as analyze and the report say it. Log-probs are interpolated.
MEASURED = """
select
    quantile_disc(num_prompt_tokens, [0.5, 0.9, 0.95, 0.99, 1]) as prompt,
    quantile_disc(num_chosen_tokens, [0.5, 0.9, 0.95, 0.99, 1]) as chosen,
    quantile_disc(num_rejected_tokens, [0.5, 0.9, 0.95, 0.99, 1]) as rejected,
    quantile_cont(ref_chosen_logps - ref_rejected_logps, [0.05, 0.25, 0.5, 0.75, 0.95]) as by_sum,
    quantile_cont(ref_chosen_logps / {num_chosen} - ref_rejected_logps / {num_rejected},
        [0.05, 0.25, 0.5, 0.75, 0.95]) as by_mean,
    avg((ref_chosen_logps > ref_rejected_logps)::int) as prefers_by_sum,
    avg((ref_chosen_logps / {num_chosen} > ref_rejected_logps / {num_rejected})::int) as prefers_by_mean,
    avg(chosen_truncated::int) as chosen_truncated,
    avg(rejected_truncated::int) as rejected_truncated
from pairs
"""


def summary(path: Path, width: int | None = None) -> str:
    """At most 40 lines of `width` columns (default: the terminal's, at least 80; only the command at the end may be longer).

    Works on unsealed stores and says so.

    InputError for a path that is no store, StoreError for one with damaged shards.
    """
    path = Path(path)
    width = width or max(80, shutil.get_terminal_size().columns)
    files = readable_shards(path)
    identity = identity_of(path)
    manifest = Manifest.load(manifest_path(path)) if manifest_path(path).exists() else None
    totals = manifest or totals_of([read_footer(file)[1] for file in files])
    size = sum(file.stat().st_size for file in files)
    fitted = [
        [f"{path}: {_state(path, identity, manifest)}, {_bytes(size)}"],
        _identity_lines(identity),
        _row_lines(identity, totals, files),
        _measured_lines(path) if totals.num_pairs else [],
        _count_lines(totals, width),
        _provenance_lines(manifest),
    ]
    lines = [_fit(line, width) for block in fitted if block for line in (*block, "")]
    return "\n".join([*lines, _next_line(path, identity, manifest)])


def _state(path: Path, identity: Identity, manifest: Manifest | None) -> str:
    if manifest is not None:
        return f"sealed, {_number(len(manifest.shards), 'shard')}"
    missing = missing_shards(path, identity)
    listed = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
    return f"NOT SEALED, {len(missing)} of {_number(identity.num_shards, 'shard')} missing{f' ({listed})' if listed else ''}"


def _identity_lines(identity: Identity) -> list[str]:
    def line(title: str, name: str, revision: str | None, sha256: str) -> str:
        return f"{title:11}{name}{f'@{revision}' if revision else ''}  [{sha256[:8]}]"

    template = identity.chat_template_sha256
    return [
        line("model", identity.model, identity.revision, identity.weights_sha256),
        line("tokenizer", identity.tokenizer, None, identity.tokenizer_sha256),
        f"{'template':11}{'none: plain text' if template == 'none' else f'[{template[:8]}]'}",
        line("dataset", identity.dataset, identity.dataset_revision, identity.dataset_fingerprint)
        + (f"  split {identity.split}" if identity.split else ""),
        f"{'scored':11}{identity.dtype}, max length {identity.max_length:,} ({identity.truncation})"
        + f", {identity.shard_size:,} rows per shard, "
        + ("by TRL" if identity.sums_only else f"scorer {identity.scorer_version}"),
        *(
            [f"{'':11}{TURNS[identity.scored_turns]} alone (--score-turns {identity.scored_turns})"]
            if identity.scored_turns
            else []
        ),
        *([f"{'':11}{SUMS_ONLY_NOTE}"] if identity.sums_only else []),
    ]


def _row_lines(identity: Identity, totals: Totals, files: list[Path]) -> list[str]:
    done = f"{totals.num_pairs:,} of {identity.num_rows:,} rows"
    if totals.unscorable:
        done += f"; {len(totals.unscorable):,} unscorable"
    lines = [
        f"{'pairs':11}{done}",
        f"{'tokens':11}{totals.num_completion_tokens:,} {'scored ' if identity.scored_turns is None else ''}in completions, {totals.num_prompt_tokens:,} in prompts",
    ]
    reasons = Counter(each.reason for each in totals.unscorable).most_common(3)
    return lines + [f"{'':11}{count:,} unscorable: {reason}" for reason, count in reasons]


def _measured_lines(path: Path) -> list[str]:
    try:
        counts = {f"num_{side}": num_scored_sql(side, identity_of(path).scored_turns) for side in SCORED}
        cursor = connect(path).execute(MEASURED.format(**counts))
        values = dict(zip([column[0] for column in cursor.description], cursor.fetchall()[0], strict=True))
    except duckdb.Error as error:
        reason = " ".join(str(error).split())[:160]
        raise StoreError(
            "a shard cannot be read",
            where=path,
            found=reason,
            next=f"Which, once it is sealed: {cli('verify', '--ref-store', path)}",
        ) from error
    lengths = [_row(f"  {name}", (f"{number:,.0f}" for number in values[name])) for name in ("prompt", "chosen", "rejected")]
    return [
        _row("length, tokens", ("p50", "p90", "p95", "p99", "max")),
        *lengths,
        "",
        _row("margin, nats (chosen - rejected)", ("p5", "p25", "p50", "p75", "p95")),
        _row("  of the sums", (f"{number:,.1f}" for number in values["by_sum"])),
        _row("  per token", (f"{number:,.3f}" for number in values["by_mean"])),
        f"reference prefers chosen   {values['prefers_by_sum']:.1%} by sum, {values['prefers_by_mean']:.1%} per token",
        f"truncated                  {values['chosen_truncated']:.1%} of chosen, {values['rejected_truncated']:.1%} of rejected",
    ]


def _count_lines(totals: Totals, width: int) -> list[str]:
    """What was noticed about the rows, the most frequent first, one line and one short example each."""
    counts = sorted(totals.counts.items(), key=lambda item: (-item[1], item[0]))
    column = max((len(name) for name, _ in counts), default=0)
    lines = [f"  {name:{column}}{count:>11,}  {_one_line(totals.examples.get(name, ''))}" for name, count in counts[:COUNTS_SHOWN]]
    if len(counts) > COUNTS_SHOWN:
        lines.append(f"  … and {_number(len(counts) - COUNTS_SHOWN, 'more kind')}, in {MANIFEST}")
    return [f"{'noticed':{column + 2}}{'rows':>11}  for example", *lines] if lines else []


def _provenance_lines(manifest: Manifest | None) -> list[str]:
    if manifest is None:
        return []
    known = manifest.provenance
    speed, seconds = known.get("tokens_per_second"), known.get("seconds")
    workers, devices = known.get("shards_by_worker") or {}, known.get("shards_by_device") or {}
    time = [
        f"{seconds / 60:,.1f} worker-minutes" if seconds else "",
        f"{speed:,.0f} tokens/s each" if speed else "",
        f"the model waited {known['waited'] / (known['waited'] + seconds):.1%}" if seconds and "waited" in known else "",
    ]
    means = [_number(len(workers), "worker") if workers else "", " + ".join(sorted(devices)), known.get("layout", "")]
    lines = [(title, ", ".join(filter(None, parts))) for title, parts in (("made in", time), ("made by", means))]
    made = [f"{title:11}{parts}" for title, parts in lines if parts]
    return made or ([f"{'made from':11}{known['imported_from']}"] if "imported_from" in known else [])


def _next_line(path: Path, identity: Identity, manifest: Manifest | None) -> str:
    """A command to copy, so it is never cut."""
    if manifest is None:
        return f"To finish it: {rerun(identity, path, stored_command(path))}"
    return f"{'ask more':11}{cli('inspect', '--ref-store', path, '--sql', 'describe pairs')}"


def _row(title: str, cells: Iterable[object]) -> str:
    return f"{title:33}" + "".join(f"{cell:>9}" for cell in cells)


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _bytes(size: int) -> str:
    if size < 1000:
        return f"{size} bytes"
    power = min(4, (len(str(size)) - 1) // 3)
    return f"{size / 1000**power:,.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def _one_line(text: str) -> str:
    """Visible on one line: control characters and runs of spaces as the eye expects them."""
    return " ".join(repr(text)[1:-1].split()) if not text.isprintable() else text


def _fit(line: str, width: int) -> str:
    """Cut to `width` terminal columns; East Asian characters take two."""
    used = 0
    for i, character in enumerate(line):
        used += 2 if unicodedata.east_asian_width(character) in "WF" else 0 if unicodedata.combining(character) else 1
        if used > width:
            return line[: max(0, i - 1)] + "…"
    return line
