"""docs/models.md: written by the sweep, and read by its tests as what is expected.

python tests/models_page.py            sweep everything (minutes) and write the page
python tests/models_page.py NAME ...   print what the sweep finds
"""

import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from architectures import KNOWN_AS, NOT_MADE, model_type, names
from sweep import WAYS, Outcome, sweep

PAGE = ROOT / "docs" / "models.md"

HEAD = """# Which models work

Find `model_type` in the `config.json` of your model. This page is written by a sweep that makes a
tiny random model of every causal language model in transformers {version}, with windows, chunks and
original contexts shorter than its sequences. It compares each log-prob, and in training the
gradient of each parameter, with the plain forward of every sequence alone, in float32 on a CPU.

| word | meaning |
|---|---|
| right | the same as the plain forward, up to rounding |
| refused | stops with an error that says what to do, before anything is computed |
| WRONG | other numbers, without an error: a fault of this project |
| CRASH | ends in some other error: a fault of this project |

The last column is the largest difference seen, in nats per token. `packed` and `padded` are the two
values of `--layout`. A line with a comma is a setting of the `config.json` named before the comma.

| model_type | packed scoring | padded scoring | packed training | padded training | below |
|---|---|---|---|---|---|
"""

FOOT = """
`make test` sweeps some of these again and `make test-all` all of them. What they find must be what
stands here. To write the page again, for another version of transformers for example:
`python tests/models_page.py`.
"""


CHECKPOINTS = """
## What else is looked at in a checkpoint

transformers loads most of these without an error. Here each is one, before the weights are read
where that is possible:

- Code of its own (`auto_map` in `config.json` or `tokenizer_config.json`), which is never run, and
  whose class is not the one that transformers has for this `model_type`. A repository's own copy of
  a class that transformers has by the same name is said in a line.
- Weights that the class does not use: a bias, another layer, what LoRA left. Parts of their own
  beside the language model (a value head, towers for pictures) are said in a line.
- Weights that are there twice under two names; a head with other values than the embeddings that
  `config.json` ties it to; another shape; integers without a `quantization_config`.
- Quantized weights (bitsandbytes, GPTQ, AWQ, and so on). fp8 and mxfp4, in which gpt-oss is
  released, are turned back into numbers of `--dtype` at loading, and a line says so.
- Files of weights beside those that are read are named in a line.
"""


def page(found: dict[str, dict[str, Outcome]], version: str) -> str:
    """The whole text of docs/models.md."""
    rows = []
    for name in sorted(found, key=lambda name: (model_type(name).lower(), "," in name, name)):
        verdicts = (found[name][way].verdict for way in WAYS)
        known_as = f" {KNOWN_AS[name]}" if name in KNOWN_AS else ""
        rows.append(f"| `{name}`{known_as} | {' | '.join(verdicts)} | {_bound(found[name])} |\n")
    return HEAD.format(version=version) + "".join(rows) + _reasons(found) + _not_made() + FOOT + CHECKPOINTS


def _bound(outcomes: dict[str, Outcome]) -> str:
    """A power of ten above the differences of what is right: rounding is another on every machine."""
    largest = max((each.difference for each in outcomes.values() if each.verdict == "right"), default=None)
    return "" if largest is None else f"1e-{next(power for power in range(6, 0, -1) if largest < 10.0**-power)}"


def _reasons(found: dict[str, dict[str, Outcome]]) -> str:
    by_reason: dict[str, dict[str, list[str]]] = {}
    for name, outcomes in found.items():
        for way, outcome in outcomes.items():
            if outcome.verdict == "refused":
                by_reason.setdefault(outcome.detail, {}).setdefault(name, []).append(way)
    text = "\n## Why\n"
    for reason in sorted(by_reason, key=lambda reason: (-len(by_reason[reason]), reason)):
        by_ways: dict[str, list[str]] = {}
        for name, ways in by_reason[reason].items():
            by_ways.setdefault(", ".join(ways), []).append(f"`{name}`")
        for ways, listed in by_ways.items():
            text += "\n" + _wrapped(f"- {ways}: *{reason}*: {', '.join(sorted(listed))}")
    return text


def _not_made() -> str:
    text = "\n\n## Not tried\n"
    return text + "".join("\n" + _wrapped(f"- `{name}`: {reason}") for name, reason in sorted(NOT_MADE.items())) + "\n"


def _wrapped(line: str) -> str:
    return "\n".join(textwrap.wrap(line, 99, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


def read() -> dict[str, dict[str, Outcome]]:
    """What docs/models.md says: name -> way -> outcome."""
    text = PAGE.read_text(encoding="utf-8")
    reasons = {}
    for item in re.split(r"\n- ", text[text.index("## Why") : text.index("## Not tried")])[1:]:
        ways, reason, listed = re.fullmatch(r"(.*?): \*(.*)\*: (.*)", " ".join(item.split())).groups()
        reasons |= {(name, way): reason for name in re.findall(r"`([^`]+)`", listed) for way in ways.split(", ")}
    outcomes = {}
    for name, cells, bound in re.findall(r"^\| `([^`]+)`[^|]* \|((?: \w+ \|){4}) (\S*) \|$", text, re.MULTILINE):
        verdicts = zip(WAYS, cells.replace("|", " ").split(), strict=True)
        outcomes[name] = {way: Outcome(verdict, reasons.get((name, way), ""), float(bound or 0) / 2) for way, verdict in verdicts}
    return outcomes


def main(which: list[str]) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = read() if which else {}
    for name in which or [name for name in names() if name not in NOT_MADE]:
        found[name] = sweep(name)
        print(name, *(f"\n    {way}: {each}" for way, each in found[name].items()), flush=True)
    PAGE.write_text(page(found, transformers.__version__), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
