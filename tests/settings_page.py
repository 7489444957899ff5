"""docs/settings.md, made from the commands' options: python tests/settings_page.py writes it."""

import re
import sys
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import cli

PAGE = ROOT / "docs" / "settings.md"

HEAD = """# Settings

Every option of every command. This page is written by `python tests/settings_page.py` from the
fields that the commands read; a test fails where it is not up to date.

An option is taken from the first place that has it:

1. what is typed;
2. the file named with `--config`;
3. the preset: of `--dataset think`, `instruct` or `demo` in phase 1, of the store in phase 2;
4. the default in the tables below.

## A file of options

`--config run.yaml` works with every command. Names are those of the options, with dashes or
underscores; switches are `true` or `false`; options that may be repeated take a list. Paths start
in the folder where the command is typed. An unknown name is an error.

```yaml
ref_store: store/think
learning_rate: 5e-7
loss_type: [sigmoid_norm]
gradient_checkpointing: true
report_to: [wandb]
```

The `run.json` of an earlier run is such a file too. This trains the same again, with another seed:

    python cli.py train --config runs/think/run.json --seed 1 --output-dir runs/think-1

An option that is typed also sets aside what the file says of another way to the same:
`--gradient-accumulation-steps` for `effective_batch_size`, `--loss-type` for `beta`.
"""

DEFAULT = re.compile(r"\s*\[default: (.*)\]$")


def page() -> str:
    """The whole page."""
    return HEAD + "".join(_of_command(name, command) for name, command in cli.main.commands.items() if name != "completion")


def _of_command(name: str, command: click.Command) -> str:
    said = command.help.split("\n\n")[0].replace("\n", " ")
    groups: dict[str, list[str]] = {}
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden and option.name != "config":
            groups.setdefault(getattr(option, "group", "") or "", []).append(_row(option))
    tables = []
    for title in sorted(groups, key=lambda title: title == ""):  # those without a heading last
        head = f"| {title or ('Others' if len(groups) > 1 else 'Option')} | default | |\n|---|---|---|\n"
        tables.append(head + "".join(groups[title]))
    return f"\n## {name}\n\n{_folded(said)}\n\n" + "\n".join(tables)


def _row(option: click.Option) -> str:
    flags = "/".join([option.opts[0], *option.secondary_opts[:1]])
    if isinstance(option.type, click.Choice):
        flags += f" {'|'.join(option.type.choices)}"
    text, default = option.help or "", ""
    if found := DEFAULT.search(text):
        text, default = text[: found.start()], found[1]
    elif option.required:
        default = "required"
    elif option.show_default and option.default is not None:
        default = str(option.default)
    cells = [f"`{flags}`", default, text]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "\\<") for cell in cells) + " |\n"


def _folded(text: str) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > 100:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
