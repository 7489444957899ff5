"""A row -> prompt, chosen and rejected: three texts, or three lists of turns with the fields that a chat template reads."""

import json
import re
from contextlib import suppress
from functools import lru_cache

from precompute.rows.columns import ROLES, TURN_FIELDS, is_picture
from store.errors import InputError


def fields_read(tokenizer, row: dict, index: int) -> tuple[str, ...]:
    """TURN_FIELDS, and the row's further fields that the template reads: it names them, and without them it writes another text.

    The name alone is not enough: a turn's `id` is bookkeeping though a template reads a call's, and it would part turns that are the same.
    """
    turns = [turn for name in ("prompt", "chosen", "rejected") if isinstance(row.get(name), list) for turn in row[name]]
    filled = {name for turn in turns if isinstance(turn, dict) for name, value in turn.items() if value is not None}
    unknown = filled.difference(TURN_FIELDS)
    if not unknown or tokenizer.chat_template is None:
        return TURN_FIELDS
    templates = tokenizer.chat_template  # one, or several by name
    words = _words_of("\n".join(templates.values()) if isinstance(templates, dict) else templates)
    further = sorted(name for name in unknown if _words_of(name) <= words)
    if not further:
        return TURN_FIELDS
    kwargs = template_kwargs(row, index)

    def conversations(fields: list[str]) -> list[str]:
        prompt, chosen, rejected = sides_of(row, index, (*TURN_FIELDS, *fields))
        sides = ((prompt or []) + chosen, (prompt or []) + rejected)
        return [tokenizer.apply_chat_template(turns, tokenize=False, **kwargs) for turns in sides]

    written = conversations(further)
    for name in list(further):
        without = [other for other in further if other != name]
        with suppress(Exception):  # a template that fails cannot do without the field
            if conversations(without) == written:
                further = without
    return (*TURN_FIELDS, *further)


@lru_cache
def _words_of(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text))


def sides_of(row: dict, index: int, fields: tuple[str, ...]) -> tuple:
    """(prompt, chosen, rejected) of a row: three strings, or three lists of turns of which chosen and rejected follow the prompt.

    `fields`: those of a turn that count. InputError, which names the row by its `index`, for a row that contradicts itself.
    """
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, list):
        chosen, rejected = _turns(chosen, "chosen", index, fields), _turns(rejected, "rejected", index, fields)
        if isinstance(prompt, list):
            prompt = _turns(prompt, "prompt", index, fields)
            if prompt and prompt == chosen[: len(prompt)] == rejected[: len(prompt)]:
                raise InputError(
                    "chosen and rejected begin with the turns of the prompt, which would be scored twice",
                    where=f"row {index}",
                    next="Take the turns of the prompt out of chosen and rejected, or drop the prompt column.",
                )
            return prompt, chosen, rejected
        if isinstance(prompt, str):
            if chosen and rejected and chosen[0]["role"] == rejected[0]["role"] == "assistant":
                return [{"role": "user", "content": prompt}], chosen, rejected  # the answers alone
            # Dolci-Think: the prompt is a string and the conversations, which are the data, repeat it as their first user turn.
            for side, turns in (("chosen", chosen), ("rejected", rejected)):
                first = next((turn.get("content") for turn in turns if turn["role"] == "user"), None)
                if first != prompt:
                    raise InputError(
                        "`prompt` is a string beside conversations, so it must equal their first user turn",
                        where=f"row {index}, {side}",
                        expected=repr(shorten(prompt)),
                        found=repr(shorten(first)),
                        next="Drop the prompt column if the conversations are complete, or make it a list of turns.",
                    )
        return _split_at_divergence(chosen, rejected)
    if isinstance(prompt, str):
        return prompt, chosen, rejected
    return _split_at_divergence(chosen, rejected)


def _split_at_divergence(chosen, rejected) -> tuple:
    """Implicit prompt: what both sides begin with, as TRL's extract_prompt has it.

    The last common item stays a completion where one side is a prefix of the other, and a space before the divergence belongs to it.
    """
    shorter = min(len(chosen), len(rejected))
    split = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter - 1)
    if split > 0 and chosen[split] != rejected[split] and chosen[split - 1] == " ":
        split -= 1
    split = max(split, 0)
    return chosen[:split], chosen[split:], rejected[split:]


def _turns(turns: list, side: str, index: int, fields: tuple[str, ...]) -> list[dict]:
    """The turns with `fields`, without null fields; null content, which is counted, transformers drops itself."""
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise InputError(
                "a turn needs a known role",
                where=f"row {index}, {side}",
                expected=f"one of {', '.join(sorted(ROLES))}",
                found=repr(turn.get("role") if isinstance(turn, dict) else turn),
            )
    return [
        {
            name: _content(turn.get(name), f"row {index}, {side}") if name == "content" else without_nulls(turn[name])
            for name in fields
            if name == "content" or turn.get(name) is not None
        }
        for turn in turns
    ]


def _content(content: object, where: str) -> str | None:
    """A turn's text: as it is, or the texts of its parts joined. InputError for pictures and the like, numbers, …"""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError("the content of a turn is no text", where=where, found=repr(content)[:60], next="Write it as text.")
    texts = []
    for part in content:
        if isinstance(part, dict):
            pictures = [name for name, value in part.items() if value and is_picture(name)]
            kind, part = (pictures or [part.get("type")])[0], part.get("text")
            if kind not in (None, "text") or not isinstance(part, str):
                raise InputError(
                    f"a part of a turn's content is no text{'' if kind in (None, 'text') else f' but {kind}'}",
                    where=where,
                    expected="parts {type: text, text}",
                    next="Only text is scored: drop the row, or take the part out on purpose.",
                )
        elif not isinstance(part, str):
            raise InputError("a part of a turn's content is no text", where=where, found=repr(part)[:60])
        texts.append(part)
    return "".join(texts)


def template_kwargs(row: dict, index: int) -> dict:
    """What a template gets beside the turns. InputError for text that is no JSON."""
    tools, kwargs = (_parsed(row.get(name), name, index) for name in ("tools", "chat_template_kwargs"))
    return {"tools": tools, **(kwargs or {})}


def _parsed(value: object, name: str, index: int) -> object:
    """Without the null fields that Parquet pads structs with; of text, which has no padding, what it says."""
    if not isinstance(value, str):
        return without_nulls(value)
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise InputError(f"`{name}` is text but not JSON: {error}", where=f"row {index}") from error


def without_nulls(value: object) -> object:
    """Without the null fields of objects, however deep."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def shorten(text: object, length: int = 60) -> str:
    """On one line of at most `length` characters, for messages."""
    text = " ".join(str(text).split())
    return text if len(text) <= length else text[: length - 1] + "…"
