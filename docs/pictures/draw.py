"""The drawings of README.md and docs/architecture.md: `python docs/pictures/draw.py` writes the .svg files beside it.

Plain Python, so that a drawing is changed like code. tests/test_docs.py compares the files with what this draws.

Not drawn here: throughput.png is made by benchmarks/sweep.py; report.png is two parts of a screenshot of the page that `python cli.py report` makes
of the demo's store.
"""

from collections.abc import Callable
from html import escape
from pathlib import Path

INK, PALE, LINE, PAPER = "#1f2933", "#52606d", "#9aa5b1", "#ffffff"
PROMPT, CHOSEN, REJECTED, PADDING = "#6b7c93", "#2f9e6e", "#d0563f", "#e4e7eb"
FILLS = {"plain": "#f5f7fa", "phase 1": "#e6f0fb", "store": "#fdf3dc", "phase 2": "#e5f5ec", "room": "#ffffff"}

PAIRS = ((45, 33, 187), (45, 78, 91))
"""Tokens of prompt, chosen and rejected: rows 4 and 6 of the demo dataset."""


class Drawing:
    """Shapes in the order in which they are drawn; all lengths in pixels."""

    def __init__(self, width: int, height: int, says: str):
        self.width, self.height, self.says = width, height, says
        self.shapes: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, fill: str, edge: str = "none", radius: float = 0) -> None:
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{fill}" stroke="{edge}"/>'
        )

    def text(
        self, x: float, y: float, words: str, size: int = 13, fill: str = INK, anchor: str = "start", bold: bool = False
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'
        )

    def polygon(self, points: list[tuple[float, float]], fill: str) -> None:
        self.shapes.append(f'<polygon points="{" ".join(f"{x:g},{y:g}" for x, y in points)}" fill="{fill}"/>')

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.shapes.append(f'<path d="{path}" fill="none" stroke="{PALE}" stroke-width="1.5"{dashes} marker-end="url(#head)"/>')

    def box(
        self, x: float, y: float, width: float, height: float, title: str, lines: tuple[str, ...] = (), kind: str = "plain"
    ) -> None:
        self.rect(x, y, width, height, FILLS[kind], LINE, 6)
        self.text(x + 10, y + 20, title, bold=True)
        for number, line in enumerate(lines):
            self.text(x + 10, y + 38 + 16 * number, line, 12, PALE)

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
            f' font-family="Helvetica, Arial, sans-serif" role="img">\n<title>{escape(self.says)}</title>\n'
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 Z" fill="{PALE}"/></marker></defs>\n'
            f'<rect width="{self.width}" height="{self.height}" rx="8" fill="{PAPER}"/>\n'
        )
        return head + "\n".join(self.shapes) + "\n</svg>\n"


def packed_row() -> Drawing:
    """Two pairs as a padded batch, as one packed row, and what each token of the row sees."""
    padded_to = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in PAIRS)
    positions, tokens = 2 * len(PAIRS) * padded_to, sum(map(sum, PAIRS))
    drawing = Drawing(880, 356, f"Two pairs: {positions} positions as a padded batch, {tokens} as one packed row")
    left, pixel = 20, 1.1

    drawing.text(left, 30, "Padded batch, as TRL scores it", bold=True)
    drawing.text(left, 48, f"each side alone, prompt twice: 4 x {padded_to} = {positions} positions", 12, PALE)
    y = 60
    for prompt, *sides in PAIRS:
        for length, colour in zip(sides, (CHOSEN, REJECTED), strict=True):
            drawing.rect(left, y, prompt * pixel, 18, PROMPT)
            drawing.rect(left + prompt * pixel, y, length * pixel, 18, colour)
            drawing.rect(left + (prompt + length) * pixel, y, (padded_to - prompt - length) * pixel, 18, PADDING)
            y += 22

    y += 34
    drawing.text(left, y, "Packed row, as refdpo scores and trains it", bold=True)
    drawing.text(left, y + 18, f"each prompt once, no padding: {tokens} positions", 12, PALE)
    y += 30
    x = float(left)
    for number, pair in enumerate(PAIRS, 1):
        start = x
        for length, colour in zip(pair, (PROMPT, CHOSEN, REJECTED), strict=True):
            drawing.rect(x, y, length * pixel - 1, 30, colour)
            x += length * pixel
        drawing.text((start + x) / 2, y + 48, f"pair {number}", 12, PALE, "middle")

    x = float(left)
    for name, colour in (("prompt", PROMPT), ("chosen", CHOSEN), ("rejected", REJECTED), ("padding", PADDING)):
        drawing.rect(x, 322, 14, 14, colour)
        drawing.text(x + 20, 334, name, 12, PALE)
        x += 92

    left, top, pixel = 592, 60, 0.56
    side = tokens * pixel
    drawing.text(left, 30, "What each token of the row sees", bold=True)
    drawing.text(left, 48, "its prompt, and its own side up to itself", 12, PALE)
    drawing.rect(left, top, side, side, "#f7f9fb", LINE)
    start = 0.0
    for prompt, chosen, rejected in PAIRS:
        corner = start
        for length, colour in ((prompt, PROMPT), (chosen, CHOSEN), (rejected, REJECTED)):
            x, y, size = left + corner * pixel, top + corner * pixel, length * pixel
            drawing.polygon([(x, y), (x, y + size), (x + size, y + size)], colour)
            if corner > start:
                drawing.rect(left + start * pixel, y, prompt * pixel, size, colour)
            corner += length
        start = corner
    drawing.text(left, top + side + 22, "a line per token; coloured: what it sees", 12, PALE)
    return drawing


def rooms() -> Drawing:
    """The folders, and who imports whom."""
    drawing = Drawing(880, 420, "The folders of the project, and who imports whom")
    drawing.box(20, 20, 200, 60, "slurm/", ("submit, check, batch scripts",))
    drawing.box(290, 20, 300, 60, "cli.py, options.py, presets.py", ("the command line: a config, then one call",))
    drawing.box(660, 20, 200, 60, "launch, devices, stop", ("processes, GPUs, signals,", "for both phases"))

    drawing.rect(20, 130, 520, 160, FILLS["phase 1"], LINE, 6)
    drawing.text(30, 152, "precompute/   phase 1", bold=True)
    for number, line in enumerate(("pairs: rows become token ids", "worker, plan, shard: the job")):
        drawing.text(30, 172 + 16 * number, line, 12, PALE)
    drawing.box(30, 200, 214, 38, "rows/", kind="room")
    drawing.text(82, 220, "reads and checks a set", 12, PALE)
    drawing.box(30, 244, 214, 38, "desk/", kind="room")
    drawing.text(82, 264, "analyze, import, verify", 12, PALE)
    drawing.box(
        258,
        162,
        268,
        114,
        "scorer/",
        (
            "a model and sequences -> log-probs,",
            "with or without gradients: packing,",
            "attention, head, scoring, self-test.",
            "Used: api, packing, adapter, decoder",
        ),
        "room",
    )

    drawing.box(
        650,
        130,
        210,
        160,
        "train/   phase 2",
        (
            "plan, gate: the right store?",
            "data: store -> TRL's dataset",
            "bins, rows: micro-batches",
            "packed, trainer: the step",
            "checkpoint, record, speed",
        ),
        "phase 2",
    )
    drawing.box(
        20,
        340,
        840,
        60,
        "store/   on disk",
        (
            "Parquet shards and a manifest: writing, claims, sealing, reading, SQL, verify, report, copies. Imports none of the above.",
        ),
        "store",
    )

    drawing.arrow((290, 50), (220, 50))
    drawing.arrow((400, 80), (340, 130))
    drawing.arrow((540, 80), (700, 130))
    drawing.arrow((650, 220), (526, 220))
    drawing.text(595, 212, "same forward", 12, PALE, "middle")
    drawing.arrow((150, 290), (150, 340))
    drawing.arrow((755, 290), (755, 340))
    drawing.arrow((392, 276), (392, 340))
    drawing.text(160, 320, "writes", 12, PALE)
    drawing.text(402, 320, "reads a sample, to score it again", 12, PALE)
    drawing.text(765, 320, "reads", 12, PALE)
    return drawing


def chain(drawing: Drawing, y: float, kind: str, boxes: list[tuple[str, tuple[str, ...]]], height: float = 92) -> list[float]:
    """Boxes of one row with arrows between them; returns their centres."""
    gap = 22
    width = (drawing.width - 40 - gap * (len(boxes) - 1)) / len(boxes)
    centres = []
    for number, (title, lines) in enumerate(boxes):
        x = 20 + number * (width + gap)
        drawing.box(x, y, width, height, title, lines, kind)
        if number:
            drawing.arrow((x - gap, y + height / 2), (x, y + height / 2))
        centres.append(x + width / 2)
    return centres


def pair() -> Drawing:
    """One pair from the dataset to the loss, with the files it goes through."""
    drawing = Drawing(880, 474, "One pair, from the dataset to the loss")

    drawing.text(860, 30, "Phase 1, score it once: precompute/", bold=True, anchor="end")
    first = chain(
        drawing,
        42,
        "phase 1",
        [
            ("rows/dataset.py", ("a row: prompt, chosen,", "rejected; checked,", "hashed: its pair_id")),
            ("pairs.py", ("token ids of prompt and", "both completions, cut", "at max_length")),
            ("scorer/packing.py", ("one row of many pairs,", "each prompt once")),
            ("scorer/scoring.py", ("the frozen model: one", "log-prob per completion", "token, float32")),
        ],
    )
    drawing.text(860, 192, "On disk, checked: store/", bold=True, anchor="end")
    second = chain(
        drawing,
        204,
        "store",
        [
            ("check.py, shard.py", ("ids, token log-probs, sums,", "counts -> part-00000.parquet,", "complete or not there")),
            ("seal.py", ("_manifest.json, written last:", "identity, sha256 of every", "shard, totals")),
            ("reader.py, derive.py", ("read by position; shorter", "max_length, LD-DPO sums", "without scoring again")),
        ],
    )
    drawing.text(860, 354, "Phase 2, train on it: train/", bold=True, anchor="end")
    third = chain(
        drawing,
        366,
        "phase 2",
        [
            ("gate.py", ("is the policy the store's", "reference? 8 pairs are", "scored again")),
            ("data.py", ("TRL's dataset: ids and", "reference sums, read", "when they are needed")),
            ("packed.py", ("the policy's log-probs,", "by the same packing and", "attention as above")),
            ("trainer.py", ("TRL's own loss, of the", "policy's sums and the", "reference's in float32")),
        ],
    )
    drawing.arrow((first[-1], 134), (first[-1], 160), (second[0], 160), (second[0], 204))
    drawing.arrow((second[-1], 296), (second[-1], 322), (third[0], 322), (third[0], 366))
    return drawing


def training_step() -> Drawing:
    """One optimizer step of phase 2 on one rank."""
    drawing = Drawing(880, 350, "One training step, on one rank")
    drawing.text(860, 30, "Once per step", bold=True, anchor="end")
    top = chain(
        drawing,
        42,
        "plain",
        [
            ("bins.py", ("the step's pairs, dealt to", "micro-steps and ranks,", "even in tokens")),
            ("data.py", ("rows of the store by position:", "ids and reference sums")),
            ("rows.py", ("each micro-batch of this rank:", "one row, each prompt once,", "no padding")),
        ],
    )
    drawing.rect(10, 178, 860, 110, "none", LINE, 8)
    drawing.text(860, 170, "For each micro-batch", bold=True, anchor="end")
    bottom = chain(
        drawing,
        188,
        "phase 2",
        [
            ("packed.py", ("the row, on the", "device; nothing", "is read back")),
            ("model's layers", ("attention over the", "packed row:", "scorer/attention.py")),
            ("head", ("log-probs of the", "completions, in", "tiles (TRL's)")),
            ("trainer.py", ("TRL's loss, its", "metrics as sums", "(metrics.py)")),
            ("backward", ("DeepSpeed ZeRO-2", "sums gradients", "over the ranks")),
        ],
        90,
    )
    drawing.arrow((top[-1], 134), (top[-1], 152), (bottom[0], 152), (bottom[0], 188))
    drawing.text(20, 316, "Then", bold=True)
    drawing.text(66, 316, "each rank takes one Adam step for its part of the weights, and all ranks get the new weights;", 12, PALE)
    drawing.text(
        66, 334, "speed.py and progress.py print a line; at --save-steps, or when told to stop, a checkpoint is written.", 12, PALE
    )
    return drawing


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "packed_row.svg": packed_row,
    "rooms.svg": rooms,
    "pair.svg": pair,
    "training_step.svg": training_step,
}


if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (Path(__file__).parent / name).write_text(draw().svg(), encoding="utf-8")
