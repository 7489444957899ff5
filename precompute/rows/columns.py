"""Which columns of a source are scored, what each layout of preference data means, and which columns must not be passed over in silence.

Every source row becomes one of the project's rows: prompt (optional), chosen, rejected, tools, chat_template_kwargs. The layouts that are read
are listed, each with an example, in docs/data.md.
"""

import re
import shlex
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from precompute.rows import no_pairs
from precompute.rows.options import ColumnOptions
from store.errors import InputError

COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
"""The columns of a source row that decide what is scored."""

TURN_FIELDS = (
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "functions",
    "function_calls",
    "reasoning_content",
    "thinking",
    "reasoning",
)
"""The fields of a turn that chat templates read, and `reasoning`, which transformers hands them as reasoning_content. Others are bookkeeping (Dolci-Instruct's turns have 24 fields, nearly all null), but for those that the template at hand reads: see pairs.py."""

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython", "environment"})

JSON_SUFFIX = ".json"
"""Of a column that holds JSON text."""

NOTICED_SUFFIX = "?"
"""Of a column that says whether the column of that name holds anything."""

BESIDE_SUFFIX, LEFT_OUT_SUFFIX = "+", "-"
"""Of a column that is not scored and has one value per row, and of one that has not (whose values are not kept)."""

CONTEXT = ("messages", "conversations")
"""Columns with the turns before the answers, where a dataset has no prompt column (axolotl's and ShareGPT's way)."""

SYSTEMS = ("system", "system_prompt", "system_message")

PROMPTS = (
    "question",
    "instruction",
    "input",
    "query",
    "problem",
    "user",
    "user_prompt",
    "prompt_text",
    "dialogue",
    "conversation",
    "context",
    "post",
    "prompt",
)
"""Columns that look like a prompt, as does `prompt` in another spelling. With a prompt column, or turns that begin with one, they are bookkeeping."""

BEFORE = ("history",)
"""Earlier turns beside a prompt (LLaMA-Factory's way)."""

NOTICED = SYSTEMS + PROMPTS + BEFORE

LIKE = {
    "chosen": (
        "chosen",
        "chosen_response",
        "response_chosen",
        "response_j",
        "preferred",
        "accepted",
        "answer_chosen",
        "better",
        "good",
    ),
    "rejected": (
        "rejected",
        "rejected_response",
        "response_rejected",
        "response_k",
        "dispreferred",
        "answer_rejected",
        "worse",
        "bad",
    ),
    "prompt": PROMPTS,
}
"""Names seen for a column that is missing: suggested, never assumed."""


def _is_like(name: str, known: Iterable[str]) -> bool:
    """Whether a column's name is one of the known ones but for capitals, spaces, hyphens or a plural: `User Prompts` is user_prompt."""
    return _plain(name) in map(_plain, known)


def _plain(name: str) -> str:
    parted = re.sub(r"([a-z])([A-Z])", r"\1_\2", name)
    return re.sub(r"[\W_]+", "_", parted.lower()).strip("_").removesuffix("s")


SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
"""ShareGPT's `from` -> role."""


PICTURE = re.compile(r"(image|picture|video|audio)s?([ _-]?(path|url|file|data|bytes)s?)?|img|pixel[ _-]?values?", re.IGNORECASE)


def is_picture(name: str) -> bool:
    """Whether a column, or a field of a part of a turn, is named as pictures and sound are. `image_count` and `has_image` are not."""
    return PICTURE.fullmatch(name.strip()) is not None


def scored(names: Iterable[str], options: ColumnOptions, where: str) -> dict[str, str]:
    """Column of the source -> its name here, for those that decide what is scored. InputError for one that is missing."""
    names = list(names)
    given = options.named()
    absent = [column for column in [*given, *options.ignore] if column not in names]
    if absent:
        raise InputError(f"no column {' and '.join(absent)}", where=where, found=", ".join(names))
    kept = given | {name: name for name in COLUMNS if name in names and name not in given and name not in given.values()}
    missing = [name for name in ("chosen", "rejected") if name not in kept.values()]
    if missing:
        raise InputError(
            f"no column {' and '.join(missing)}",
            where=where,
            expected="chosen and rejected (prompt optional)",
            found=", ".join(names),
            next=_suggestion(names, kept.values()),
        )
    if "prompt" not in kept.values():
        kept |= {name: name for name in CONTEXT if name in names and name not in options.ignore}
    return kept


def _suggestion(names: list[str], present: Iterable[str]) -> str:
    found = {side: next((name for name in names if _is_like(name, LIKE[side])), None) for side in ("prompt", "chosen", "rejected")}
    words = [f"--{side}-column {shlex.quote(name)}" for side, name in found.items() if name and side not in present]
    if not (found["chosen"] or found["rejected"]) and (advice := no_pairs.advice(names)):
        return f"{advice} See docs/data.md."
    if words:
        return f"Perhaps: {' '.join(words)}"
    return "Name the columns: --chosen-column, --rejected-column, --prompt-column."


def noticed(names: Iterable[str], kept: Iterable[str], options: ColumnOptions) -> list[str]:
    """Columns that are not scored and may matter: refused later if they hold anything."""
    return [
        name for name in names if (is_picture(name) or _is_like(name, NOTICED)) and name not in kept and name not in options.ignore
    ]


def beside(names: Iterable[str], kept: Iterable[str], options: ColumnOptions) -> list[str]:
    """Columns that are not scored, in their order: the store keeps those of one value per row. One that is to be ignored is none, nor is
    one without a name (pandas writes its index so)."""
    return [name for name in names if name and name not in kept and name not in options.ignore]


def source_type(type_: pa.DataType) -> str | None:
    """What a column beside the scored ones is kept as, a key of store.schema.SOURCE_TYPES; None for one that holds no single values."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_):
        return "string"
    if pa.types.is_integer(type_) and type_ != pa.uint64():
        return "int64"
    if pa.types.is_floating(type_):
        return "double"
    if pa.types.is_boolean(type_):
        return "bool"
    if pa.types.is_date(type_):
        return "date"
    return "timestamp" if pa.types.is_timestamp(type_) and type_.tz is None else None


def has_content(values: pa.Array | pa.ChunkedArray) -> bool:
    """Whether any of these values, of any type, says something: not null, not an empty text or list."""
    type_ = values.type
    if pa.types.is_null(type_):
        return False
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return bool(pc.any(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(values)), 0)).as_py())
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return bool(pc.any(pc.greater(pc.list_value_length(values), 0)).as_py())
    return values.null_count < len(values)


def says_something(value: object) -> bool:
    """has_content of one value as JSON has it."""
    return bool(value.strip() if isinstance(value, str) else value if isinstance(value, list | dict) else value is not None)


def refuse_unused(used: Iterable[str], unused: list[str], first: dict, where: str) -> None:
    """InputError for a column that is not scored, holds something, and looks as if it should be. `first` is the first row."""
    pictures = [name for name in unused if is_picture(name)]
    if pictures:
        raise InputError(
            f"the column {' and '.join(pictures)} is not scored: only text is",
            where=where,
            next=f"Use a dataset without pictures or sound; to score the text alone: {_ignoring(pictures)}",
        )
    systems = [name for name in unused if _is_like(name, SYSTEMS)]
    before = [name for name in unused if _is_like(name, BEFORE)]
    prompts = [name for name in unused if _is_like(name, PROMPTS)]
    if "prompt" in used or not _lacks_prompt(first):
        prompts = []
    if not (systems or before or prompts):
        return
    named = prompts + systems + before
    words = [f"--prompt-column {shlex.quote(name)}" for name in prompts[:1]]
    words += [f"--system-column {shlex.quote(name)}" for name in systems[:1]]
    use = f"Use {'them' if len(words) > 1 else 'it'}: {' '.join(words)}. " if words else "Put its turns into the prompt. "
    if more := prompts[1:] + (before if words else []):
        use = f"{use[:-2]}, once what {' and '.join(more)} hold{'s' * (len(more) == 1)} is put into {'it' if prompts else 'the prompt'}. "
    raise InputError(
        f"the column{'s' * (len(named) > 1)} {' and '.join(named)} would not be scored, and look{'s' * (len(named) == 1)} like part of the prompt",
        where=where,
        next=f"{use}Or leave out on purpose: {_ignoring(named)}",
    )


def _ignoring(names: list[str]) -> str:
    return " ".join(f"--ignore-column {shlex.quote(name)}" for name in names)


def _lacks_prompt(row: dict) -> bool:
    """Whether a row without a prompt column has none inside its answers either. Of two texts nobody can say: they begin alike or not."""
    if isinstance(row["chosen"], str):
        return True
    first = row["chosen"][0] if row["chosen"] else None
    return not row.get("prompt") and (not isinstance(first, dict) or first.get("role") == "assistant")


def canonical(row: dict, options: ColumnOptions, index: int) -> dict:
    """A row of the source -> prompt (where it has one), chosen, rejected, tools, chat_template_kwargs. InputError names the row."""
    where = f"row {index}"
    turns = ("prompt", "chosen", "rejected", *CONTEXT)
    row = {name: _speakers(value, f"{where}, {name}") if name in turns else value for name, value in row.items()}
    for side in ("chosen", "rejected"):
        if isinstance(row[side], dict):  # one answer, not in a list
            row[side] = [row[side]]
    context = next((row.pop(name) for name in CONTEXT if row.get(name)), None)
    row = {name: value for name, value in row.items() if name not in CONTEXT}
    if context is not None and isinstance(row["chosen"], list) and _lacks_prompt(row):
        row["prompt"] = context
    if (options.as_conversation or options.system) and isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        row |= {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        if not row.get("prompt"):
            raise InputError("the row has no prompt, so its texts are no conversation", where=where)
        if isinstance(row["prompt"], str):
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    if options.system:
        _add_system(row, row.pop("system"), where)
    return row


def _add_system(row: dict, text: object, where: str) -> None:
    """The system text becomes the first turn: of the prompt, or of both sides where they hold the prompt."""
    if text is None or text == "":
        return
    if not isinstance(text, str):
        raise InputError("the system column is not text", where=where, found=type(text).__name__)
    if isinstance(row.get("prompt"), str) and _lacks_prompt({"chosen": row["chosen"]}):
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    for name in ("prompt",) if isinstance(row.get("prompt"), list) else ("chosen", "rejected"):
        turns = row[name] or []
        if turns and isinstance(turns[0], dict) and turns[0].get("role") == "system":
            if turns[0].get("content") == text:
                continue
            raise InputError("the row has another system turn already", where=f"{where}, {name}", next="Drop one of the two.")
        row[name] = [{"role": "system", "content": text}, *turns]


def _speakers(value: object, where: str) -> object:
    """ShareGPT's turns {from, value} as {role, content}; anything else as it is."""
    if isinstance(value, dict) and "from" in value and "value" in value and value.get("role") is None:
        if value["from"] not in SPEAKERS:
            raise InputError(
                "a turn is of an unknown speaker", where=where, expected=f"one of {', '.join(SPEAKERS)}", found=repr(value["from"])
            )
        return {"role": SPEAKERS[value["from"]], "content": value["value"]}
    return [_speakers(item, where) for item in value] if isinstance(value, list) else value
