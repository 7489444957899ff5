"""Dataset rows -> token ids of prompt, chosen and rejected: the one definition of what is scored.

It is TRL's (DPOTrainer._prepare_dataset, 1.16): prompt, prompt + chosen and prompt + rejected are each rendered and tokenized as a whole; the
completion begins where they diverge (the longest common token prefix) and everything after it counts, end-of-turn included. Truncation keeps
the start of the whole sequence. What TRL passes over in silence or with one warning is counted here, with one example each.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from precompute.packing import Sequence, common_prefix
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
)
"""The fields of a turn that chat templates read. Others are bookkeeping (Dolci-Instruct's turns have 24 fields, nearly all null)."""

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython", "environment"})


@dataclass(frozen=True)
class Pair:
    """One preference row as it is scored. Ids are int32 arrays; prompt + completion is at most max_length long."""

    pair_id: str
    row: int
    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    chosen_truncated: bool
    rejected_truncated: bool

    @property
    def sequences(self) -> tuple[Sequence, Sequence]:
        """(prompt + chosen, prompt + rejected), ready for scoring."""
        num_prompt = len(self.prompt_ids)
        chosen, rejected = (np.concatenate([self.prompt_ids, ids]) for ids in (self.chosen_ids, self.rejected_ids))
        return Sequence(chosen, num_prompt), Sequence(rejected, num_prompt)


@dataclass
class TokenizedRows:
    """The pairs of a block of rows; the rows that cannot be scored, with the reason; and what was noticed (see store.schema.COUNTS)."""

    pairs: list[Pair] = field(default_factory=list)
    unscorable: list[dict] = field(default_factory=list)  # {"row": int, "pair_id": str, "reason": str}
    counts: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def note(self, what: str, row: int, example: str) -> None:
        self.counts[what] += 1
        self.examples.setdefault(what, f"row {row}: {example}")


def pair_id(row: dict) -> str:
    """Content hash of the columns that are scored: 128 bits as 32 hex digits, the same in any order, file format and machine."""
    content = _without_nulls({name: row[name] for name in COLUMNS if name in row})
    return hashlib.blake2b(json.dumps(content, sort_keys=True, ensure_ascii=False).encode(), digest_size=16).hexdigest()


def _without_nulls(value):
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def tokenize_rows(tokenizer: PreTrainedTokenizerBase, rows: list[dict], first_row: int, max_length: int) -> TokenizedRows:
    """Tokenize consecutive source rows, the first of which has index `first_row`.

    Raises InputError that names the row when a row is malformed (null side, unknown role, a template that fails, ...). Rows that are well
    formed but leave nothing to score are listed in `unscorable`.
    """
    result = TokenizedRows()
    special = _special_spelling(tokenizer)
    rendered = []
    for index, row in enumerate(rows, start=first_row):
        try:
            rendered.append(_render(tokenizer, row, index, special, result))
        except InputError:
            raise
        except Exception as error:  # templates raise whatever they like; add where
            raise InputError(
                f"the chat template failed: {error}", where=f"row {index}", next="Mend the row, or pass --chat-template FILE."
            ) from error

    # One batched call: the tokenizer works in parallel and releases the interpreter meanwhile.
    texts = [text for entry in rendered if entry is not None for text in entry.texts]
    plain = bool(rendered) and next((not entry.conversational for entry in rendered if entry is not None), False)
    # A template writes its own special tokens; plain text gets the tokenizer's.
    ids = tokenizer(texts, add_special_tokens=plain, return_attention_mask=False)["input_ids"] if texts else []
    ids = iter([np.asarray(one, dtype=np.int32) for one in ids])
    for index, row, entry in zip(range(first_row, first_row + len(rows)), rows, rendered, strict=True):
        if entry is None:
            result.unscorable.append(
                {"row": index, "pair_id": pair_id(row), "reason": "chosen and rejected share no turn: there is no prompt"}
            )
            continue
        _place(result, tokenizer, index, pair_id(row), next(ids), next(ids), next(ids), max_length)
    return result


@dataclass(frozen=True)
class _Rendered:
    texts: tuple[str, str, str]  # prompt, prompt + chosen, prompt + rejected
    conversational: bool


def _render(tokenizer, row: dict, index: int, special: re.Pattern | None, result: TokenizedRows) -> _Rendered | None:
    prompt, chosen, rejected = _sides(row, index)
    if chosen == rejected:
        result.note("identical", index, _shorten(chosen if isinstance(chosen, str) else chosen[-1].get("content")))
    if isinstance(chosen, str):
        contents = [prompt, chosen, rejected]
        if not chosen or not rejected:
            result.note("empty_completion", index, "chosen" if not chosen else "rejected")
        eos = tokenizer.eos_token
        if eos is None:
            raise InputError("plain-text rows end with the tokenizer's end-of-text token, and it has none", where=f"row {index}")
        chosen, rejected = (text if text.endswith(eos) else text + eos for text in (chosen, rejected))
        texts = (prompt, prompt + chosen, prompt + rejected)
    else:
        if not prompt:
            return None
        turns = [*prompt, *chosen, *rejected]
        contents = [turn["content"] for turn in turns if isinstance(turn.get("content"), str)]
        if any(turn.get("content") is None for turn in turns):
            result.note("null_content", index, next(turn["role"] for turn in turns if turn.get("content") is None))
        if not _text_of(chosen) or not _text_of(rejected):
            result.note("empty_completion", index, "chosen" if not _text_of(chosen) else "rejected")
        kwargs = _template_kwargs(row, index)
        if tokenizer.chat_template is None:
            raise InputError(
                "the rows are conversations and the tokenizer has no chat template",
                where=f"row {index}",
                next="Pass --chat-template FILE, or a --tokenizer that has one.",
            )
        texts = (
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **kwargs),
            tokenizer.apply_chat_template(prompt + chosen, tokenize=False, **kwargs),
            tokenizer.apply_chat_template(prompt + rejected, tokenize=False, **kwargs),
        )
        for side, text in ((prompt + chosen, texts[1]), (prompt + rejected, texts[2])):
            lost = [turn for turn in side if isinstance(turn.get("content"), str) and turn["content"].strip() not in text]
            if lost:
                result.note("turn_not_rendered", index, f"{lost[0]['role']}: {_shorten(lost[0]['content'])}")
                break
    if special is not None:
        found = next((match for content in contents if (match := special.search(content))), None)
        if found:
            result.note("special_token_in_content", index, found.group())
    return _Rendered(texts, conversational=not isinstance(chosen, str))


def _sides(row: dict, index: int) -> tuple:
    """(prompt, chosen, rejected) of a row: three strings, or three lists of turns of which chosen and rejected follow the prompt."""
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, list):
        chosen, rejected = _turns(chosen, "chosen", index), _turns(rejected, "rejected", index)
        if isinstance(prompt, list):
            return _turns(prompt, "prompt", index), chosen, rejected
        if isinstance(prompt, str):
            # Dolci-Think: the prompt is a string and the conversations, which are the data, repeat it as their first user turn.
            for side, turns in (("chosen", chosen), ("rejected", rejected)):
                first = next((turn.get("content") for turn in turns if turn["role"] == "user"), None)
                if first != prompt:
                    raise InputError(
                        "`prompt` is a string beside conversations, so it must equal their first user turn",
                        where=f"row {index}, {side}",
                        expected=repr(_shorten(prompt)),
                        found=repr(_shorten(first)),
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


def _turns(turns: list, side: str, index: int) -> list[dict]:
    """The turns with the fields that templates read; null fields dropped, except content, which a template may test."""
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise InputError(
                "a turn needs a known role",
                where=f"row {index}, {side}",
                expected=f"one of {', '.join(sorted(ROLES))}",
                found=repr(turn.get("role") if isinstance(turn, dict) else turn),
            )
    return [
        {name: turn[name] for name in TURN_FIELDS if name in turn and (turn[name] is not None or name == "content")}
        for turn in turns
    ]


def _template_kwargs(row: dict, index: int) -> dict:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InputError(f"`tools` is text but not JSON: {error}", where=f"row {index}") from error
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}


def _place(result: TokenizedRows, tokenizer, index: int, id_: str, prompt, with_chosen, with_rejected, max_length: int) -> None:
    num_prompt = min(common_prefix(prompt, with_chosen), common_prefix(prompt, with_rejected))
    reason = None
    if num_prompt == 0:
        reason = "the prompt has no token: the first token of the completion has no context"
    elif num_prompt >= max_length:
        reason = f"the prompt alone has {num_prompt} tokens and fills max_length {max_length}"
    elif num_prompt == len(with_chosen) or num_prompt == len(with_rejected):
        reason = "a completion has no token"
    if reason is not None:
        result.unscorable.append({"row": index, "pair_id": id_, "reason": reason})
        return
    if num_prompt < len(prompt):
        divergence = f"prompt ends {tokenizer.decode(prompt[max(0, num_prompt - 4) :])!r}"
        divergence += f", conversation has {tokenizer.decode(with_chosen[max(0, num_prompt - 4) : num_prompt + 6])!r}"
        result.note("prompt_not_prefix", index, divergence)
    pair = Pair(
        pair_id=id_,
        row=index,
        prompt_ids=with_chosen[:num_prompt],
        chosen_ids=with_chosen[num_prompt:max_length],
        rejected_ids=with_rejected[num_prompt:max_length],
        chosen_truncated=len(with_chosen) > max_length,
        rejected_truncated=len(with_rejected) > max_length,
    )
    for side in ("chosen_truncated", "rejected_truncated"):
        if getattr(pair, side):
            result.note(side, index, f"{len(with_chosen if side.startswith('chosen') else with_rejected)} tokens")
    result.pairs.append(pair)


def _special_spelling(tokenizer) -> re.Pattern | None:
    special = [token for token in tokenizer.all_special_tokens if token]
    return re.compile("|".join(map(re.escape, special))) if special else None


def _text_of(turns: list[dict]) -> str:
    return "".join(str(turn.get(name) or "") for turn in turns for name in ("content", "tool_calls", "function_calls"))


def _shorten(text: object, length: int = 60) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= length else text[: length - 1] + "…"
