"""Dataset rows -> token ids of prompt, chosen and rejected: the one definition of what is scored.

It is TRL's (DPOTrainer._prepare_dataset, 1.16), unless turns are asked for (turns.py): prompt, prompt + chosen and prompt + rejected are each
rendered and tokenized as a whole; the completion begins where they diverge (the longest common token prefix) and everything after it counts,
end-of-turn included. Truncation keeps the start of the whole sequence. What TRL passes over in silence or with one warning is counted here,
with one example each.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from precompute.clock import DateWanted
from precompute.rows.columns import COLUMNS
from precompute.scorer.packing import Sequence, common_prefix
from precompute.sides import fields_read, shorten, sides_of, template_kwargs, without_nulls
from precompute.turns import NotFoundInText, Turn, mask_of_turns, turns_of
from store import ScoredTurns
from store.errors import InputError


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
    chosen_mask: np.ndarray | None = None
    """bool [chosen_ids]: which tokens are scored; None: all."""
    rejected_mask: np.ndarray | None = None

    @property
    def sequences(self) -> tuple[Sequence, Sequence]:
        """(prompt + chosen, prompt + rejected), ready for scoring."""
        num_prompt = len(self.prompt_ids)
        chosen, rejected = (np.concatenate([self.prompt_ids, ids]) for ids in (self.chosen_ids, self.rejected_ids))
        return Sequence(chosen, num_prompt, self.chosen_mask), Sequence(rejected, num_prompt, self.rejected_mask)


@dataclass
class TokenizedRows:
    """The pairs of a block of rows; the rows that cannot be scored, with the reason; and what was noticed (see store.schema.COUNTS)."""

    pairs: list[Pair] = field(default_factory=list)
    unscorable: list[dict] = field(default_factory=list)  # {"row": int, "pair_id": str, "reason": str}
    counts: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def note(self, what: str, row: int, example: str) -> None:
        """Count `what`, a name in store.schema.COUNTS; the first example is kept."""
        self.counts[what] += 1
        self.examples.setdefault(what, f"row {row}: {example}")


def pair_id(row: dict) -> str:
    """Content hash of the columns that are scored: 128 bits as 32 hex digits, the same in any order, file format and machine."""
    content = without_nulls({name: row[name] for name in COLUMNS if name in row})
    return hashlib.blake2b(json.dumps(content, sort_keys=True, ensure_ascii=False).encode(), digest_size=16).hexdigest()


def tokenize_rows(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict], first_row: int, max_length: int, scored_turns: ScoredTurns | None = None
) -> TokenizedRows:
    """Tokenize consecutive source rows, the first of which has index `first_row`. `scored_turns`: as Identity has it.

    Raises InputError that names the row when a row is malformed (null side, unknown role, a template that fails, ...). Rows that are well
    formed but leave nothing to score are listed in `unscorable`.
    """
    result = TokenizedRows()
    special = _special_spelling(tokenizer)
    rendered = [_rendered(tokenizer, row, index, special, result, scored_turns) for index, row in enumerate(rows, start=first_row)]
    # A template writes its own special tokens; plain text gets the tokenizer's.
    ids = {
        plain: _tokenized(tokenizer, [entry for entry in rendered if entry and entry.plain is plain], plain)
        for plain in (True, False)
    }
    ids_of = _ids_of_turns(tokenizer, rendered) if scored_turns is not None else {}
    for index, row, entry in zip(range(first_row, first_row + len(rows)), rows, rendered, strict=True):
        if entry is None:
            result.unscorable.append({"row": index, "pair_id": pair_id(row), "reason": f"{NO_SHARED_TURN}: there is no prompt"})
            continue
        three = next(ids[entry.plain]), next(ids[entry.plain]), next(ids[entry.plain])
        if scored_turns is not None:
            _place_turns(result, tokenizer, index, pair_id(row), entry, three[1:], ids_of, max_length)
            continue
        _place(result, tokenizer, index, pair_id(row), *three, max_length)
        if entry.plain:
            _note_doubled_end(result, tokenizer, index, three, entry.texts)
    return result


def check_rows(tokenizer: PreTrainedTokenizerBase, rows: Iterable[dict], scored_turns: ScoredTurns | None = None) -> None:
    """Render every row, as scoring will, and keep nothing: InputError for the rows that fail, or if none has a prompt.

    The message is that of the first bad row, with the numbers of the others. Takes about a third of a millisecond a row.
    """
    special, ignored = _special_spelling(tokenizer), TokenizedRows()
    failed: list[tuple[int, InputError]] = []
    usable = index = 0
    unplaced: str | None = None
    for index, row in enumerate(rows, start=1):
        try:
            entry = _rendered(tokenizer, row, index - 1, special, ignored, scored_turns)
            usable += entry is not None and entry.unplaced is None
            unplaced = unplaced or (entry and entry.unplaced)
        except DateWanted:
            raise
        except InputError as error:
            failed.append((index - 1, error))
    if failed:
        (_, first), *others = failed
        if others:
            listed = ", ".join(str(row) for row, _ in others[:MOST_LISTED]) + (", …" if len(others) > MOST_LISTED else "")
            first.next = f"{first.next or ''} {len(others):,} more rows fail: {listed}.".strip()
        raise InputError(first.what, where=first.where, expected=first.expected, found=first.found, next=first.next)
    if index and not usable:
        raise _no_prompt(index) if unplaced is None else _no_turn(index, unplaced)


MOST_LISTED = 20
"""Further bad rows that a message names."""


def _no_prompt(num_rows: int) -> InputError:
    return InputError(
        f"none of the {num_rows:,} rows has a prompt: {NO_SHARED_TURN}",
        expected="a prompt column, or conversations that begin with the same turns",
        next="Name the column that holds the prompt: --prompt-column.",
    )


def _no_turn(num_rows: int, unplaced: str) -> InputError:
    return InputError(
        f"none of the {num_rows:,} rows has turns whose tokens can be told: {unplaced}",
        next="Score what follows the prompt, as TRL does: --score-turns completion. Or pass another --chat-template.",
    )


NO_SHARED_TURN = "chosen and rejected share no turn"


def _tokenized(tokenizer, entries: list["_Rendered"], plain: bool) -> Iterator[np.ndarray]:
    """The ids of all texts of `entries`. One batched call: the tokenizer works in parallel and releases the interpreter meanwhile."""
    texts = [text for entry in entries for text in entry.texts]
    ids = tokenizer(texts, add_special_tokens=plain, return_attention_mask=False)["input_ids"] if texts else []
    return iter([np.asarray(one, dtype=np.int32) for one in ids])


@dataclass(frozen=True)
class _Rendered:
    texts: tuple[str, str, str]  # prompt, prompt + chosen, prompt + rejected
    plain: bool
    turns: tuple[tuple[Turn, ...], ...] = ()
    """Of chosen and rejected, where turns are asked for."""
    unplaced: str | None = None
    """Why there are none."""


def _rendered(
    tokenizer, row: dict, index: int, special: re.Pattern | None, result: TokenizedRows, scored_turns: ScoredTurns | None
) -> _Rendered | None:
    """`_render`, whose every failure is an InputError."""
    try:
        return _render(tokenizer, row, index, special, result, scored_turns)
    except InputError:
        raise
    except Exception as error:  # templates raise whatever they like; add where
        raise InputError(
            f"the chat template failed: {error}", where=f"row {index}", next="Mend the row, or pass --chat-template FILE."
        ) from error


def _render(
    tokenizer, row: dict, index: int, special: re.Pattern | None, result: TokenizedRows, scored_turns: ScoredTurns | None
) -> _Rendered | None:
    fields = fields_read(tokenizer, row, index)
    prompt, chosen, rejected = sides_of(row, index, fields)
    if isinstance(chosen, str) and scored_turns is not None:
        raise InputError(
            "plain text has no turns",
            where=f"row {index}, --score-turns {scored_turns}",
            next="Leave the option out, or make the texts turns: --as-conversation.",
        )
    turns, unplaced = (), None
    if chosen == rejected:
        result.note("identical", index, shorten(chosen if isinstance(chosen, str) else chosen[-1].get("content")))
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
        if any(turn["content"] is None for turn in turns):
            result.note("null_content", index, next(turn["role"] for turn in turns if turn["content"] is None))
        if not _text_of(chosen) or not _text_of(rejected):
            result.note("empty_completion", index, "chosen" if not _text_of(chosen) else "rejected")
        kwargs = template_kwargs(row, index)
        if tokenizer.chat_template is None:
            raise InputError(
                "the rows are conversations and the tokenizer has no chat template",
                where=f"row {index}",
                next="Pass --chat-template FILE, or a --tokenizer that has one.",
            )
        texts = _templated(tokenizer, prompt, chosen, rejected, kwargs)
        for side, text in ((prompt + chosen, texts[1]), (prompt + rejected, texts[2])):
            lost = [turn for turn in side if isinstance(turn.get("content"), str) and turn["content"].strip() not in text]
            if lost:
                result.note("turn_not_rendered", index, f"{lost[0]['role']}: {shorten(lost[0]['content'])}")
                break
        if scored_turns is not None:
            try:
                turns = _turns_of_sides(tokenizer, (prompt + chosen, prompt + rejected), texts[1:], scored_turns, kwargs)
            except NotFoundInText as error:
                unplaced = str(error)
    if special is not None:
        found = next((match for content in contents if (match := special.search(content))), None)
        if found:
            result.note("special_token_in_content", index, found.group())
    return _Rendered(texts, isinstance(chosen, str), turns, unplaced)


def _turns_of_sides(tokenizer, sides: tuple, texts: tuple, scored_turns: ScoredTurns, kwargs: dict) -> tuple[tuple[Turn, ...], ...]:
    def render(turns: list[dict], **options) -> str:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options, **kwargs)

    return tuple(turns_of(side, text, scored_turns, render) for side, text in zip(sides, texts, strict=True))


def _ids_of_turns(tokenizer, rendered: list[_Rendered | None]) -> dict[str, np.ndarray]:
    """The ids of every text that ends where a turn begins or ends: what sides share is tokenized once."""
    texts = list(dict.fromkeys(text for entry in rendered if entry for side in entry.turns for turn in side for text in turn.texts))
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []
    return {text: np.asarray(one, dtype=np.int32) for text, one in zip(texts, ids, strict=True)}


def _templated(tokenizer, prompt: list[dict], chosen: list[dict], rejected: list[dict], kwargs: dict) -> tuple[str, str, str]:
    return (
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **kwargs),
        tokenizer.apply_chat_template(prompt + chosen, tokenize=False, **kwargs),
        tokenizer.apply_chat_template(prompt + rejected, tokenize=False, **kwargs),
    )


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
    _note_truncated(result, index, len(with_chosen), len(with_rejected), max_length)
    result.pairs.append(pair)


def _place_turns(
    result: TokenizedRows, tokenizer, index: int, id_: str, entry: _Rendered, sides: tuple, ids_of: dict, max_length: int
) -> None:
    """As `_place`, of turns: the prompt ends where the sides diverge, or where the first turn that is scored begins."""
    masks, reason = (), entry.unplaced
    if reason is None:
        try:
            masks = tuple(mask_of_turns(ids, turns, ids_of) for ids, turns in zip(sides, entry.turns, strict=True))
        except NotFoundInText as error:
            reason = str(error)
    num_prompt = 0
    if reason is None:
        num_prompt = min(common_prefix(*sides), *(int(mask.argmax()) for mask in masks))
        if not all(mask[:max_length].any() for mask in masks):
            which = next(name for name, mask in zip(("chosen", "rejected"), masks, strict=True) if not mask[:max_length].any())
            reason = f"no token of a turn that is scored is within max_length {max_length}: {which}"
        elif num_prompt == 0:
            reason = "the prompt has no token: the first token of the completion has no context"
    if reason is not None:
        result.unscorable.append({"row": index, "pair_id": id_, "reason": reason})
        return
    bare = next((turn for turns in entry.turns for turn in turns if not turn.prefix), None)
    if bare is not None:
        result.note("prompt_not_prefix", index, f"prompt ends {shorten(bare.header[-30:])!r}, the conversation goes on otherwise")
    chosen, rejected = sides
    result.pairs.append(
        Pair(
            id_,
            index,
            prompt_ids=chosen[:num_prompt],
            chosen_ids=chosen[num_prompt:max_length],
            rejected_ids=rejected[num_prompt:max_length],
            chosen_truncated=len(chosen) > max_length,
            rejected_truncated=len(rejected) > max_length,
            chosen_mask=masks[0][num_prompt:max_length],
            rejected_mask=masks[1][num_prompt:max_length],
        )
    )
    _note_truncated(result, index, len(chosen), len(rejected), max_length)


def _note_truncated(result: TokenizedRows, index: int, num_chosen: int, num_rejected: int, max_length: int) -> None:
    for side, length in (("chosen_truncated", num_chosen), ("rejected_truncated", num_rejected)):
        if length > max_length:
            result.note(side, index, f"{length} tokens")


def _note_doubled_end(result: TokenizedRows, tokenizer, index: int, ids: tuple, texts: tuple[str, str, str]) -> None:
    """Plain text gets one end-of-text token here, as in TRL, and a second from a tokenizer that appends its own."""
    end = tokenizer.eos_token_id
    for sequence, text in zip(ids[1:], texts[1:], strict=True):
        if len(sequence) > 1 and sequence[-1] == sequence[-2] == end and not text.endswith(2 * tokenizer.eos_token):
            result.note("doubled_end", index, f"…{tokenizer.decode(sequence[-4:])}")
            return


def _special_spelling(tokenizer) -> re.Pattern | None:
    special = [token for token in tokenizer.all_special_tokens if token]
    return re.compile("|".join(map(re.escape, special))) if special else None


def _text_of(turns: list[dict]) -> str:
    return "".join(str(turn.get(name) or "") for turn in turns for name in ("content", "tool_calls", "function_calls"))
