"""What the user reads at the end of phase 1. Imports nothing heavy."""

from pathlib import Path

from store.manifest import Manifest, manifest_path
from store.schema import COUNTS, SUMS_ONLY_NOTE

EXAMPLES_SHOWN = 3


def describe(manifest: Manifest, store: Path) -> str:
    """Pairs, shards, speed; what was noticed about the rows, with one example each; rows that are not in the store, and why."""
    speed = manifest.provenance.get("tokens_per_second")
    lines = [
        f"{store} is sealed: {manifest.num_pairs:,} pairs of {manifest.identity.num_rows:,} rows in {len(manifest.shards)} shards"
        + (f", {speed:,.0f} tokens/s per worker" if speed else "")
    ]
    if manifest.identity.sums_only:
        lines.append(f"  {SUMS_ONLY_NOTE}")
    for name, count in sorted(manifest.counts.items()):
        lines.append(f"  {count:,} rows: {COUNTS[name]}")
        lines.append(f"      {manifest.examples[name]}")
    if manifest.unscorable:
        lines.append(f"  {len(manifest.unscorable):,} rows could not be scored and are not in the store:")
        for each in manifest.unscorable[:EXAMPLES_SHOWN]:
            lines.append(f"      row {each.row}: {each.reason}")
        if len(manifest.unscorable) > EXAMPLES_SHOWN:
            lines.append(f"      … all are listed in {manifest_path(store)}")
    return "\n".join(lines)
