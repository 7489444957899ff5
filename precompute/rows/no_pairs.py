"""A source without columns for the better and the worse answer: what it seems to be, by its columns' names, and how pairs are made of it."""

import re
from collections import defaultdict

SEVERAL = ("answers", "completions", "generations", "responses", "candidates", "outputs", "summaries")
"""Names of columns with a list of answers."""

DELIMITERS = {";": "semicolons", "|": "bars", "\t": "tabs", ",": "commas"}

NUMBERED = re.compile(r"(.*?)[ _-]?([0-9]|[a-z])", re.IGNORECASE)
"""`response_0` and `response_1`, `human_ref_A` and `human_ref_B`."""

ANSWERS = ("response", "answer", "human_ref", "completion", "output", "generation", "text", "reply")


def advice(names: list[str]) -> str:
    """What to do about a source with these columns; empty where they tell nothing."""
    if len(names) == 1 and (found := next((mark for mark in DELIMITERS if mark in names[0]), None)):
        instead = "with commas" if found != "," else "with tabs, or call it .csv"
        return f"Its cells seem to be separated by {DELIMITERS[found]}: write it {instead}" + (
            ", or call it .tsv." if found == "\t" else "."
        )
    lower = {name.lower() for name in names}
    if "preferred_output" in lower and "non_preferred_output" in lower:
        return "Rows of OpenAI's preference format: put input.messages into prompt, preferred_output into chosen, non_preferred_output into rejected."
    if two := _two_answers(names):
        return f"Two answers a row, {' and '.join(two)}: write the better one as chosen and the other as rejected, by the column that tells."
    if {"label", "completion"} <= lower or {"label", "response"} <= lower:
        return "One answer a row, with a label: join a good and a bad answer to the same prompt as chosen and rejected."
    if several := [name for name in names if name.lower() in SEVERAL]:
        return f"Several answers a row, in {several[0]}: choose two of them as chosen and rejected."
    if lower & {"response", "completion", "output", "messages", "conversations", "text"}:
        return "One answer a row, as for fine-tuning: a preference pair has two, chosen and rejected."
    return ""


def _two_answers(names: list[str]) -> list[str]:
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if (match := NUMBERED.fullmatch(name)) and match[1].lower() in ANSWERS:
            alike[match[1].lower()].append(name)
    return next((found for found in alike.values() if len(found) == 2), [])
