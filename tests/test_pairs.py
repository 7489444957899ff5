"""Token ids against TRL itself: what DPOTrainer makes of the same rows is what the store must hold."""

import copy

import datasets
import numpy as np
import pytest
import tiny
from trl import DPOConfig, DPOTrainer

from precompute.pairs import pair_id, tokenize_rows
from store.errors import InputError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [SYSTEM, user("Why?"), assistant("Because."), user("And\n\nthen?")]

CONVERSATIONS = {
    "explicit prompt": [
        {"prompt": [user("Hi")], "chosen": [assistant("Hello there.")], "rejected": [assistant("What?")]},
        {"prompt": TURNS, "chosen": [assistant("Then it ends.")], "rejected": [assistant("  Then nothing\n")]},
        {"prompt": [user("Two turns follow")], "chosen": [assistant("a"), user("b"), assistant("c")], "rejected": [assistant("a")]},
        {"prompt": [user("Leer")], "chosen": [assistant("")], "rejected": [assistant("\nnewline first")]},
    ],
    "implicit prompt": [
        {"chosen": [user("Hi"), assistant("Hello there.")], "rejected": [user("Hi"), assistant("What?")]},
        {"chosen": [*TURNS, assistant("Then it ends.")], "rejected": [*TURNS, assistant("No.")]},
        {"chosen": [*TURNS, assistant("Same")], "rejected": [*TURNS, assistant("Same")]},
        {"chosen": [user("Hi"), assistant("a"), user("b"), assistant("c")], "rejected": [user("Hi"), assistant("a")]},
        {
            "chosen": [user("Hi"), assistant("a"), user("b"), assistant("c")],
            "rejected": [user("Hi"), assistant("x"), user("b"), assistant("c")],
        },
    ],
    "tools and template arguments": [
        {
            "prompt": [user("Weather?")],
            "chosen": [assistant("Sunny")],
            "rejected": [assistant("No idea")],
            "tools": [{"name": "weather", "parameters": {"city": "string"}}],
            "chat_template_kwargs": {"style": "terse"},
        },
        {
            "prompt": [user("Weather again?")],
            "chosen": [assistant("Rain")],
            "rejected": [assistant("Rain, I think")],
            "tools": [{"name": "weather", "parameters": {"city": "string"}}],
            "chat_template_kwargs": {"style": "warm"},
        },
    ],
    "tools as JSON text": [
        {
            "prompt": [user("Weather?")],
            "chosen": [assistant("Sunny")],
            "rejected": [assistant("No")],
            "tools": '[{"name": "weather", "parameters": {}}]',
        }
    ],
}

PLAIN = {
    "explicit prompt": [
        {"prompt": "The quick brown", "chosen": " fox", "rejected": " dog<|endoftext|>"},
        {"prompt": "A list:", "chosen": "\n1. one", "rejected": "\n\n2. two"},
        {"prompt": "Über", "chosen": "mut", "rejected": "haupt"},  # tokens merge across the boundary
        {"prompt": "Empty", "chosen": "", "rejected": "!"},
        {"prompt": "x" * 40, "chosen": "y", "rejected": "z"},
    ],
    "implicit prompt": [
        {"chosen": "Why does it jump? Because it can!", "rejected": "Why does it jump? Nobody knows."},
        {"chosen": "answer = 42", "rejected": "answer = 41"},
        {"chosen": "The lazy dog jumps", "rejected": "The lazy dog jumps: 42"},
    ],
}

TEMPLATES = {
    "chatml": tiny.CHATML,
    "thinking": tiny.THINKING,
    "with tools": tiny.WITH_TOOLS,
    "drops tool turns": tiny.DROPS_TOOL_TURNS,
}

CASES = [(f"{name}, {template}", rows, template) for name, rows in CONVERSATIONS.items() for template in TEMPLATES]
CASES += [(f"plain text, {name}", rows, "chatml") for name, rows in PLAIN.items()]


@pytest.fixture(scope="module")
def trl_ids(tmp_path_factory):
    """rows, template name, max_length -> what TRL's DPOTrainer prepares and its collator truncates."""
    model = tiny.make_model("llama")

    def prepare(rows, template, max_length=None):
        args = DPOConfig(
            str(tmp_path_factory.mktemp("trl")),
            use_cpu=True,
            bf16=False,
            max_length=max_length,
            report_to=[],
            gradient_checkpointing=False,
        )
        trainer = DPOTrainer(
            model=copy.deepcopy(model),
            ref_model=copy.deepcopy(model),
            args=args,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tiny.make_tokenizer(TEMPLATES[template]),
        )
        prepared = []
        for row in trainer.train_dataset:
            batch = trainer.data_collator([row])
            sides = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
            num_prompt = len(row["prompt_ids"])
            prepared.append([sides[0][:num_prompt], sides[0][num_prompt:], sides[1][num_prompt:]])
        return prepared

    return prepare


def ours(rows, template, max_length=10_000):
    rows = datasets.Dataset.from_list(rows).to_list()
    result = tokenize_rows(tiny.make_tokenizer(TEMPLATES[template]), rows, 0, max_length)
    assert all(ids.dtype == np.int32 for pair in result.pairs for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
    return [[pair.prompt_ids.tolist(), pair.chosen_ids.tolist(), pair.rejected_ids.tolist()] for pair in result.pairs], result


@pytest.mark.parametrize(("rows", "template"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_ids_equal_trls(trl_ids, rows, template):
    assert ours(rows, template)[0] == trl_ids(rows, template)


@pytest.mark.parametrize("max_length", [4, 12, 40])
def test_truncation_and_dropped_rows_equal_trls(trl_ids, max_length):
    rows = CONVERSATIONS["explicit prompt"] * 2
    kept, result = ours(rows, "chatml", max_length)
    assert kept == trl_ids(rows, "chatml", max_length)
    assert len(kept) + len(result.unscorable) == len(rows)
    assert all("fills max_length" in each["reason"] for each in result.unscorable)


def test_dolci_think_rows_are_their_conversations(trl_ids):
    """TRL 1.16 fails on a text prompt beside conversations; without the prompt column it reads them as meant."""
    rows = [
        {
            "prompt": "Why?",
            "chosen": [user("Why?"), assistant("<think>hm</think> So.")],
            "rejected": [user("Why?"), assistant("No.")],
        },
        {"prompt": "Hi", "chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi"), assistant("<think>")]},
    ]
    without_prompt = [{side: row[side] for side in ("chosen", "rejected")} for row in rows]
    assert ours(rows, "thinking")[0] == trl_ids(without_prompt, "thinking")
    rows[1]["prompt"] = "Something else"
    with pytest.raises(InputError, match="row 1, chosen.*must equal their first user turn.*'Something else'.*'Hi'"):
        ours(rows, "thinking")


def test_bookkeeping_fields_of_turns_do_not_matter():
    """Dolci-Instruct's turns carry 24 fields; ids that differ between the sides must not split the prompt."""
    rows = [{"chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]}]
    padded = copy.deepcopy(rows)
    for number, turn in enumerate(turn for side in padded[0].values() for turn in side):
        turn |= {"request_id": f"id-{number}", "function_calls": None, "country": None}
    assert ours(padded, "chatml")[0] == ours(rows, "chatml")[0]


def test_what_trl_passes_over_is_counted_with_an_example():
    tool = {"role": "tool", "content": "22 degrees"}
    rows = [
        {"prompt": [user("Hi")], "chosen": [assistant("Same")], "rejected": [assistant("Same")]},
        {"prompt": [user("Weather?"), tool], "chosen": [assistant("22")], "rejected": [assistant("23")]},
        {"prompt": [user("Say <|im_end|>")], "chosen": [assistant("")], "rejected": [assistant("no")]},
        {"prompt": [user("Null")], "chosen": [{"role": "assistant", "content": None}], "rejected": [assistant("x")]},
    ]
    _, result = ours(rows, "drops tool turns")
    assert dict(result.counts) == {
        "identical": 1,
        "turn_not_rendered": 1,
        "special_token_in_content": 1,
        "empty_completion": 2,
        "null_content": 1,
    }
    assert result.examples["turn_not_rendered"] == "row 1: tool: 22 degrees"
    _, result = ours(CONVERSATIONS["explicit prompt"][:2], "thinking")
    assert result.counts["prompt_not_prefix"] == 2
    assert "<think>" in result.examples["prompt_not_prefix"]


def test_rows_without_a_prompt_are_listed_not_scored():
    rows = [{"chosen": [assistant("a")], "rejected": [assistant("b")]}, CONVERSATIONS["implicit prompt"][0]]
    kept, result = ours(rows, "chatml")
    assert len(kept) == 1 and result.unscorable[0]["row"] == 0 and "no prompt" in result.unscorable[0]["reason"]
    kept, result = ours([{"prompt": "", "chosen": "a", "rejected": "b"}], "chatml")
    assert not kept and "the prompt has no token" in result.unscorable[0]["reason"]


def test_malformed_rows_are_named():
    bad_role = [{"prompt": [user("Hi")], "chosen": [{"role": "robot", "content": "a"}], "rejected": [assistant("b")]}]
    with pytest.raises(InputError, match="row 0, chosen: a turn needs a known role.*found 'robot'"):
        ours(bad_role, "chatml")
    with pytest.raises(InputError, match="no chat template.*--chat-template"):
        tokenize_rows(tiny.make_tokenizer(None), CONVERSATIONS["explicit prompt"], 0, 100)
    with pytest.raises(InputError, match="row 7.*tools.*not JSON"):
        tokenize_rows(tiny.make_tokenizer(), [CONVERSATIONS["tools as JSON text"][0] | {"tools": "{"}], 7, 100)


def test_pair_ids_depend_on_content_alone():
    row = CONVERSATIONS["explicit prompt"][0]
    same = {
        "rejected": row["rejected"],
        "chosen": row["chosen"],
        "prompt": [{"content": "Hi", "role": "user", "id": None}],
        "tools": None,
        "source": "x",
    }
    assert pair_id(row) == pair_id(same) and len(pair_id(row)) == 32
    assert pair_id(row) != pair_id(row | {"chosen": row["rejected"], "rejected": row["chosen"]})
