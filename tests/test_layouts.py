"""The layouts of preference data that docs/data.md lists, out of every kind of file, against TRL and against each other."""

import bz2
import csv
import gzip
import json
import re
import shlex
from pathlib import Path

import click
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

import cli
from precompute.config import ColumnOptions
from precompute.pairs import check_rows, tokenize_rows
from precompute.rows.dataset import check_and_fingerprint, load_rows
from store.errors import InputError

PAGE = (Path(cli.__file__).parent / "docs" / "data.md").read_text(encoding="utf-8")
TOOLS = tiny.WITH_TOOLS.replace(
    "(m['content'] or '')",
    "(m['content'] or '') + ((m.tool_calls | tojson) if m.tool_calls else '') + (m.reasoning_content or '')",
)
"""Shows a template's every input: tools, calls, reasoning."""


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def load(source, **options):
    return load_rows(str(source), **{"split": "train"} | options)


def ids(source, template=TOOLS, **options):
    """[prompt, chosen, rejected] as decoded text, of each row."""
    tokenizer = tiny.make_tokenizer(template)
    rows = load(source, **options)
    check_and_fingerprint(rows)
    check_rows(tokenizer, rows.to_list())
    pairs = tokenize_rows(tokenizer, rows.to_list(), 0, 100_000).pairs
    return [[tokenizer.decode(each) for each in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)] for pair in pairs]


def trl_ids(source, tmp_path, template=TOOLS):
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(str(tmp_path / "trl"), use_cpu=True, bf16=False, max_length=None, report_to=[], gradient_checkpointing=False)
    tokenizer = tiny.make_tokenizer(template)
    trainer = DPOTrainer(
        model=tiny.make_model("llama"),
        ref_model=tiny.make_model("llama"),
        args=args,
        train_dataset=datasets.load_dataset("json", data_files=str(source), split="train"),
        processing_class=tokenizer,
    )
    return [[tokenizer.decode(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")] for row in trainer.train_dataset]


CALLS = [
    [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}],
    [{"type": "function", "function": {"name": "dice", "arguments": {"sides": 6, "times": 2}}}],
]
SCHEMAS = [
    {
        "type": "function",
        "function": {"name": "clock", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}},
    },
    {
        "type": "function",
        "function": {"name": "dice", "parameters": {"type": "object", "properties": {"sides": {"type": "integer"}}}},
    },
]
RAGGED = {
    "reasoning_content": [
        {"chosen": [user(f"Q{i}"), assistant(f"a{i}", reasoning_content="hm")], "rejected": [user(f"Q{i}"), assistant("b")]}
        for i in range(3)
    ],
    "reasoning": [
        {"chosen": [user(f"Q{i}"), assistant(f"a{i}", reasoning="hm")], "rejected": [user(f"Q{i}"), assistant("b")]}
        for i in range(3)
    ],
    "calls": [
        {"chosen": [user("Roll"), assistant("", tool_calls=CALLS[i % 2])], "rejected": [user("Roll"), assistant("I cannot.")]}
        for i in range(4)
    ],
    "tools": [
        {"prompt": [user("Roll")], "chosen": [assistant(f"a{i}")], "rejected": [assistant("b")], "tools": SCHEMAS[: 1 + i % 2]}
        for i in range(4)
    ],
    "calls from both sides, later rows wider": [
        {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]},
        {
            "chosen": [user("Roll"), assistant("", tool_calls=CALLS[0]), {"role": "tool", "content": "6", "name": "dice"}],
            "rejected": [user("Roll"), assistant("", tool_calls=CALLS[1])],
        },
    ],
}


@pytest.mark.parametrize("rows", RAGGED.values(), ids=RAGGED)
def test_rows_that_differ_in_fields_are_trls_and_the_same_out_of_parquet(rows, tmp_path):
    """Parquet fills the fields that a row lacks with nulls, which no template may see; TRL is asked for the JSON lines."""
    jsonl, parquet = write_jsonl(tmp_path / "rows.jsonl", rows), write_parquet(tmp_path / "rows.parquet", rows)
    found = ids(jsonl)
    assert found == trl_ids(jsonl, tmp_path) and len(found) == len(rows)
    assert ids(parquet) == found and "null" not in str(found)
    assert check_and_fingerprint(load(jsonl)) == check_and_fingerprint(load(parquet))
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert ids(tmp_path / "saved") == found


PLANS = tiny.CHATML.replace(
    "(m['content'] or '')", "(m['content'] or '') + (m.tool_plan | string if m.tool_plan else '') + (m.call or {}).id | string"
)
"""Reads a field of a turn that few templates know, and the id of something that is no turn."""


@pytest.mark.parametrize("plans", [("PLAN", "PLAN"), ({"b": 1, "a": 2}, {"a": 1, "c": 2.5})], ids=["text", "of many shapes"])
def test_a_field_of_a_turn_that_the_template_reads_is_rendered_as_trl_renders_it(plans, tmp_path):
    rows = [
        {"prompt": [user("Q")], "chosen": [assistant("a", tool_plan=plan)], "rejected": [assistant("b", meta=meta)]}
        for plan, meta in zip(plans, (1, "x"), strict=True)
    ]
    jsonl = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = ids(jsonl, template=PLANS)
    assert [chosen for _, chosen, _ in found] == [f"a{plan}<|im_end|>\n" for plan in plans]
    if plans[0] == "PLAN":  # of other shapes `datasets` makes nulls, which TRL prints
        rows = [{**row, "rejected": [assistant("b")]} for row in rows]
        assert ids(write_parquet(tmp_path / "rows.parquet", rows), template=PLANS) == found
        assert trl_ids(write_jsonl(tmp_path / "plain.jsonl", rows), tmp_path, template=PLANS) == found


def test_a_field_whose_name_the_template_uses_for_something_else_does_not_part_the_prompt(tmp_path):
    rows = [{"chosen": [user("Q") | {"id": 1}, assistant("a") | {"id": 2}], "rejected": [user("Q") | {"id": 3}, assistant("b")]}]
    assert ids(write_jsonl(tmp_path / "a.jsonl", rows), template=PLANS)[0][0].endswith("<|im_start|>assistant\n")


def test_values_that_arrow_would_change_are_kept_as_they_are_written(tmp_path):
    """6 beside 6.5 stays 6, keys keep their order, a number may stand beside a text."""
    arguments = [{"sides": 6}, {"sides": 6.5}, {"b": 1, "a": 2}, {"a": 1, "b": "x", "c": 3}]
    rows = [
        {
            "chosen": [user("Roll"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": each}}])],
            "rejected": [user("Roll"), assistant("no")],
        }
        for each in arguments
    ]
    written = [chosen for _, chosen, _ in ids(write_jsonl(tmp_path / "rows.jsonl", rows))]
    assert all(json.dumps(each) in text for each, text in zip(arguments, written, strict=True)), written


def test_numbers_beyond_arrows_are_kept_in_calls_and_tools(tmp_path):
    call = [{"type": "function", "function": {"name": "f", "arguments": {"n": 2**64}}}]
    limits = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 2**64 - 1, "minimum": -(2**63) - 1}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": limits}}]
    row = {"prompt": [user("Q")], "chosen": [assistant("", tool_calls=call)], "rejected": [assistant("b")]}
    path = write_jsonl(tmp_path / "a.jsonl", [row, row | {"tools": tools}])
    found = ids(path)
    assert json.dumps(tools) in found[1][0] and all(json.dumps(call) in chosen for _, chosen, _ in found)


PRINTED = {
    "one turn": {"role": "assistant", "content": "x"},
    "one turn, content first": {"content": 'He said "no"', "role": "assistant"},
    "ShareGPT's": {"from": "gpt", "value": "x"},
    "turns with bookkeeping first": [{"country": None, "role": "user", "content": "Q"}, {"role": "assistant", "content": "x"}],
}


@pytest.mark.parametrize("turns", PRINTED.values(), ids=PRINTED)
@pytest.mark.parametrize("printed", [str, json.dumps, lambda turns: json.dumps(turns, indent=1)], ids=["python", "json", "lines"])
def test_turns_printed_into_a_text_column_are_refused(turns, printed, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", "chosen": printed(turns), "rejected": printed(turns)}] * 2)
    with pytest.raises(InputError, match="column chosen: conversations written as text"):
        ids(path)


def test_answers_that_are_json_of_another_kind_are_text(tmp_path):
    answers = ['{"value": 3}', '{"content": "x"}', '{"role": "admin"}', '[{"name": "a"}]', "{from: user}"]
    rows = [{"prompt": "Q", "chosen": answer, "rejected": "no"} for answer in answers]
    for index, row in enumerate(rows):
        path = write_jsonl(tmp_path / f"{index}.jsonl", [row])
        assert ids(path)[0][1].startswith(row["chosen"])


def test_a_row_with_padding_is_another_dataset_than_before(tmp_path):
    """Stores whose templates saw the nulls must not be taken for stores of these rows: padding changes the fingerprint, nothing else does."""
    plain = [{"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")], "tools": SCHEMAS[:1]}]
    padded = pa.Table.from_pylist(plain * 2 + [plain[0] | {"tools": SCHEMAS}])
    pq.write_table(padded.slice(0, 2), tmp_path / "padded.parquet")
    write_parquet(tmp_path / "plain.parquet", plain * 2)
    assert ids(tmp_path / "padded.parquet") == ids(tmp_path / "plain.parquet")
    assert check_and_fingerprint(load(tmp_path / "padded.parquet")) != check_and_fingerprint(load(tmp_path / "plain.parquet"))


# --- the table of docs/data.md

EXAMPLE = re.compile(r"^\| (.+?) \| `(\{.+\})` \|(.*?)\| (.+?) \|$", re.MULTILINE)
LAYOUTS = [(name, json.loads(row), more.strip(" `"), reading) for name, row, more, reading in EXAMPLE.findall(PAGE)]


def options_of(words: str) -> dict:
    command = cli.main.commands["precompute"]
    given, rest, _ = command.make_parser(click.Context(command)).parse_args(shlex.split(words))
    assert not rest
    from precompute.rows.columns import ColumnOptions

    names = {name: given.get(f"{name}_column") for name in ("prompt", "chosen", "rejected", "system")}
    options = ColumnOptions(
        **names, as_conversation=bool(given.get("as_conversation")), ignore=tuple(given.get("ignore_column", ()))
    )
    return {"options": options}


@pytest.mark.parametrize(("row", "more", "reading"), [each[1:] for each in LAYOUTS], ids=[each[0] for each in LAYOUTS])
def test_every_layout_of_the_table_is_read_as_it_says(row, more, reading, tmp_path):
    """The last column is the text that is scored: prompt, chosen, rejected; ChatML's marks are written as 〈role〉 and ⏎."""
    options = options_of(more)
    for source in (write_jsonl(tmp_path / "a.jsonl", [row, row]), write_parquet(tmp_path / "b.parquet", [row, row])):
        found = ids(source, template=tiny.CHATML, **options)
        assert len(found) == 2
        shown = [re.sub(r"<\|im_start\|>(\w+)\n", r"〈\1〉", text).replace("<|im_end|>\n", "⏎") for text in found[0]]
        assert [text.replace("<|endoftext|>", "∎") for text in shown] == re.findall(r"`([^`]*)`", reading)


def test_the_table_has_an_example_of_each_layout():
    assert len(LAYOUTS) >= 12


# --- columns that are not scored

SIDES = {"chosen": [user("Q"), assistant("a")], "rejected": [user("Q"), assistant("b")]}
TEXTS = {"prompt": "Q", "chosen": "a", "rejected": "b"}
UNUSED = {
    "images": (SIDES | {"images": ["p.png"]}, "column images is not scored.*--ignore-column images"),
    "image_path": (TEXTS | {"image_path": "x.png"}, "column image_path is not scored"),
    "pixel values": (SIDES | {"Pixel Values": [1]}, "column Pixel Values is not scored.*--ignore-column 'Pixel Values'"),
    "image": (TEXTS | {"image": {"path": "x"}}, "column image is not scored"),
    "question and system": (
        {"question": "Q", "system": "S", "chosen": "a", "rejected": "b"},
        "columns question and system.*--prompt-column question --system-column system.*--ignore-column question --ignore-column system",
    ),
    "system beside a prompt": (TEXTS | {"system": "S"}, "column system would not be scored.*--system-column system"),
    "system beside turns": (SIDES | {"System": "S"}, "--system-column System"),
    "instruction beside answers alone": (
        {"instruction": "Q", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        "column instruction.*--prompt-column instruction",
    ),
    "history": (TEXTS | {"history": [["a", "b"]]}, "column history"),
    "a capital": ({"Prompt": "Q", "chosen": "x a", "rejected": "x b"}, "column Prompt would.*--prompt-column Prompt"),
    "a space": ({"prompt ": "Q", "chosen": "x a", "rejected": "x b"}, "--prompt-column 'prompt '.*--ignore-column 'prompt '"),
    "a plural": ({"userPrompts": "Q", "chosen": "x a", "rejected": "x b"}, "--prompt-column userPrompts"),
    "a post": ({"post": "Q", "chosen": "x a", "rejected": "x b"}, "--prompt-column post"),
    "a system with a hyphen": (SIDES | {"System-Prompt": "S"}, "--system-column System-Prompt"),
}


@pytest.mark.parametrize(("row", "message"), UNUSED.values(), ids=UNUSED)
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_columns_that_look_like_part_of_the_prompt_are_not_passed_over(row, message, write, tmp_path):
    path = write(tmp_path / ("a.jsonl" if write is write_jsonl else "a.parquet"), [row])
    with pytest.raises(InputError, match=message):
        load(path)
    empty = {name: value if name in ("prompt", "chosen", "rejected") else type(value)() for name, value in row.items()}
    if "prompt" in row or isinstance(row["chosen"], list):
        load(write_jsonl(tmp_path / "empty.jsonl", [empty]))  # nothing is lost


def test_bookkeeping_columns_are_passed_over(tmp_path):
    """As UltraFeedback has them: `messages` repeats the chosen side, a question stands beside complete conversations."""
    row = SIDES | {"prompt": "Q", "messages": SIDES["chosen"], "question": "Q", "score_chosen": 8.5, "prompt_id": "x"}
    row |= {"has_image": False, "image_count": 0, "image_url": None}
    same = ids(write_jsonl(tmp_path / "plain.jsonl", [SIDES]))
    assert ids(write_jsonl(tmp_path / "a.jsonl", [row])) == same
    without = {name: value for name, value in row.items() if name != "prompt"}
    path = write_jsonl(tmp_path / "b.jsonl", [without])
    assert ids(path) == same and check_and_fingerprint(load(path)) == check_and_fingerprint(load(tmp_path / "plain.jsonl"))


def test_other_spellings_of_the_scored_columns_are_suggested(tmp_path):
    row = {"Prompt": "Q", "Chosen": "a", "rejected ": "b"}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(InputError, match="Perhaps: --prompt-column Prompt --chosen-column Chosen --rejected-column 'rejected '"):
        load(path)
    found = load(path, options=ColumnOptions(prompt="Prompt", chosen="Chosen", rejected="rejected "))
    assert found.to_list() == [{"prompt": "Q", "chosen": "a", "rejected": "b"}]


def test_a_column_without_a_name_is_passed_over(tmp_path):
    """pandas writes its index so."""
    (tmp_path / "a.csv").write_text(",prompt,chosen,rejected\n0,Q,a,b\n")
    sources = [tmp_path / "a.csv", write_jsonl(tmp_path / "a.jsonl", [{"": 0} | TEXTS]), tmp_path / "saved"]
    datasets.Dataset.from_dict({"": [0], "prompt": ["Q"], "chosen": ["a"], "rejected": ["b"]}).save_to_disk(tmp_path / "saved")
    sources.append(write_parquet(tmp_path / "a.parquet", [{"": 0} | TEXTS]))
    for source in sources:
        assert load(source).to_list() == [TEXTS]


def test_a_dataset_without_prompts_is_refused_with_every_bad_row_named(tmp_path):
    rows = [{"chosen": [assistant(f"a{i}")], "rejected": [assistant("b")]} for i in range(3)]
    with pytest.raises(InputError, match="none of the 3 rows has a prompt.*--prompt-column"):
        ids(write_jsonl(tmp_path / "a.jsonl", rows))
    rows = [{"prompt": "X" if i in (1, 3) else "Q", **SIDES} for i in range(5)]
    with pytest.raises(InputError, match="row 1, chosen.*1 more rows fail: 3"):
        ids(write_jsonl(tmp_path / "b.jsonl", rows))
    twice = {"prompt": [user("Q")], "chosen": SIDES["chosen"], "rejected": SIDES["rejected"]}
    with pytest.raises(InputError, match="row 0.*begin with the turns of the prompt"):
        ids(write_jsonl(tmp_path / "c.jsonl", [twice]))


# --- content

PART = {"type": "text", "text": "Name "}
CONTENT = {
    "a picture": ([{"type": "image", "text": None}, PART], "row 0.*no text but image"),
    "a picture's address": ([{"type": "image_url", "image_url": {"url": "x"}}], "no text but image_url"),
    "a picture beside text": ([{"type": "text", "text": "Q", "image_url": {"url": "x"}}], "no text but image_url"),
    "a part without text": ([{"type": "text", "text": None}], "a part of a turn's content is no text"),
    "a number": (7.5, "the content of turns is no text.*double|is no text"),
    "a truth": (True, "is no text"),
    "an object": ({"text": "x"}, "is no text"),
}


@pytest.mark.parametrize(("content", "message"), CONTENT.values(), ids=CONTENT)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_content_that_is_no_text_is_refused(content, message, kind, tmp_path):
    row = {"chosen": [user(content), assistant(content)], "rejected": [user(content), assistant(content)]}
    write = {"jsonl": write_jsonl, "parquet": write_parquet}[kind]
    with pytest.raises(InputError, match=message):
        ids(write(tmp_path / f"a.{kind}", [row]))


def test_parts_are_joined_whatever_stands_beside_them(tmp_path):
    parts = [PART, {"type": "text", "text": "it."}]
    rows = [
        {"chosen": [user(parts), assistant("a")], "rejected": [user(parts), assistant([{"type": "text", "text": "b"}])]},
        {"chosen": [user("plain"), assistant(["a", "b"])], "rejected": [user("plain"), assistant("c")]},
    ]
    texts = [
        {"chosen": [user("Name it."), assistant("a")], "rejected": [user("Name it."), assistant("b")]},
        {"chosen": [user("plain"), assistant("ab")], "rejected": [user("plain"), assistant("c")]},
    ]
    assert ids(write_jsonl(tmp_path / "mixed.jsonl", rows)) == ids(write_jsonl(tmp_path / "texts.jsonl", texts))
    padded = [{"type": "text", "text": "Name it.", "image_url": None}]
    rows = [{"chosen": [user(padded), assistant(padded)], "rejected": [user(padded), assistant([PART])]}]
    assert ids(write_parquet(tmp_path / "a.parquet", rows))[0][1] == "Name it.<|im_end|>\n"


def test_null_content_and_missing_content_are_the_same(tmp_path):
    """Parquet cannot tell them apart; a template that prints the content must write nothing, not "None"."""
    prints = tiny.CHATML.replace("(m['content'] or '')", "('%s' % m['content'])")
    rows = [{"chosen": [user("Roll"), {"role": "assistant", "tool_calls": CALLS[0]}], "rejected": [user("Roll"), assistant("no")]}]
    jsonl, parquet = write_jsonl(tmp_path / "a.jsonl", rows), write_parquet(tmp_path / "a.parquet", rows)
    for template in (prints, TOOLS):
        assert ids(jsonl, template=template) == ids(parquet, template=template) and "None" not in str(ids(jsonl, template=template))


# --- kinds of files

MANY = [{"prompt": f"Frage {i}\u2028: ", "chosen": f"ü {i}", "rejected": "NA" if i % 2 else "2021-03-01", "n": i} for i in range(7)]


def all_kinds(folder: Path) -> list[Path]:
    """MANY in every kind of file."""
    jsonl = write_jsonl(folder / "a.jsonl", MANY)
    data = jsonl.read_bytes()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(data))
    (folder / "a.jsonl.bz2").write_bytes(bz2.compress(data))
    (folder / "a.jsonl.zst").write_bytes(pa.compress(data, "zstd", asbytes=True))
    (folder / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n\r\n"))
    (folder / "a.json").write_text(json.dumps(MANY, indent=1))
    (folder / "bom.json").write_bytes(b"\xef\xbb\xbf\n" + json.dumps(MANY).encode())
    for name, delimiter, mark in (("a.csv", ",", ""), ("a.tsv", "\t", ""), ("bom.csv", ",", "\ufeff")):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            file.write(mark)
            writer = csv.DictWriter(file, list(MANY[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(MANY)
    (folder / "a.csv.gz").write_bytes(gzip.compress((folder / "a.csv").read_bytes()))
    write_parquet(folder / "a.parquet", MANY)
    write_parquet(folder / "b" / "part-1.parquet", MANY[:3])
    write_parquet(folder / "b" / "part-2.parquet", MANY[3:])
    return [*sorted(file for file in folder.iterdir() if file.is_file()), folder / "b" / "*.parquet", folder / "b"]


def test_every_kind_of_file_holds_the_same_rows(tmp_path):
    expected = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in MANY]
    sources = all_kinds(tmp_path / "kinds")
    assert len(sources) >= 14
    for source in sources:
        rows = load(source)
        assert rows.to_list() == expected, source
    assert len({check_and_fingerprint(load(source)) for source in sources}) == 1


def test_columns_that_nobody_scores_need_not_fit(tmp_path):
    rows = [SIDES | {"score": 1}, SIDES | {"score": "hi", "more": {"x": 2}}, SIDES | {"score": [1.5], "more": "2021-01-01"}]
    write_jsonl(tmp_path / "one.jsonl", rows)
    for index, row in enumerate(rows):
        write_jsonl(tmp_path / "shards" / f"{index}.jsonl", [row])
        write_parquet(tmp_path / "parquet" / f"{index}.parquet", [row])
    turns = [json.loads(json.dumps(SIDES)) for _ in range(2)]
    turns[0]["chosen"][1]["meta"], turns[1]["chosen"][1]["meta"] = 1, "x"  # a field that no template reads
    write_jsonl(tmp_path / "turns.jsonl", [*turns, SIDES])
    expected = ids(write_jsonl(tmp_path / "plain.jsonl", [SIDES] * 3))
    for name in ("one.jsonl", "shards", "parquet", "turns.jsonl"):
        assert ids(tmp_path / name) == expected, name


def test_a_column_that_only_some_files_have_is_read_from_those(tmp_path):
    for index, more in enumerate(({}, {"tools": SCHEMAS})):
        row = {"prompt": [user("Q")], "chosen": [assistant("a")], "rejected": [assistant("b")], **more}
        write_jsonl(tmp_path / "jsonl" / f"{index}.jsonl", [row])
        write_parquet(tmp_path / "parquet" / f"{index}.parquet", [row])
    assert ids(tmp_path / "jsonl") == ids(tmp_path / "parquet")
    assert ["dice" in prompt for prompt, _, _ in ids(tmp_path / "jsonl")] == [False, True]


def test_text_stays_text(tmp_path):
    """Dates, numbers in quotes, "null", a text of a million characters and one that ends a line in U+0085."""
    texts = ["2021-03-01", "2021-03-01T10:00:00Z", "007", "null", "", " ", "x" * 1_000_000, "a\x85b\u2028"]
    rows = [{"prompt": "On which day? ", "chosen": text, "rejected": "1999-01-01"} for text in texts]
    assert [row["chosen"] for row in load(write_jsonl(tmp_path / "a.jsonl", rows)).to_list()] == texts
    turns = [{"prompt": [user(text)], "chosen": [assistant(text)], "rejected": [assistant("no")]} for text in texts]
    assert [row["chosen"][0]["content"] for row in load(write_jsonl(tmp_path / "b.jsonl", turns)).to_list()] == texts


def good(text: str) -> bytes:
    return (json.dumps({"prompt": "p", "chosen": text, "rejected": "r"}) + "\n").encode()


BROKEN = {
    "a.jsonl": [
        (good("a") + b'{"prompt": "p", "chosen": "x"\n', "line 2: not valid JSON"),
        (good("a") + b"[1]\n", "line 2: a line is no JSON object"),
        (good("a") + b'{"prompt": "p", "chosen": "x", "rejected": "y", "chosen": "z"}\n', "line 2.*chosen is there twice"),
        (good("a") + b'{"prompt": "p", "chosen": "\\ud800", "rejected": "y"}\n', "line 2.*cannot be stored"),
        (good("a") + b'{"prompt": "p", "chosen": ["x"], "rejected": "y"}\n', "line 2, chosen.*changes its kind.*found a list"),
        (good("a") + b'{"prompt": "p", "chosen": 7, "rejected": "y"}\n', "line 2, chosen.*changes its kind.*found a number"),
        (good("a") + b'{"prompt": "p", "rejected": "y"}\n', "row 1: `chosen` is null"),
        (good("a") + b'{"prompt": "p", "chosen": "\xfc", "rejected": "y"}\n', "line 2: not UTF-8"),
        (b"", "no rows"),
    ],
    "a.json": [
        (b'{"data": []}', "no column chosen and rejected|neither JSON lines"),
        (b'[{"chosen": 1}, 2]', "neither JSON lines nor a list"),
        (b'[{"chosen": "a", "rejected": "b"},', "not valid JSON"),
    ],
    "a.jsonl.gz": [
        (gzip.compress(good("a") * 1000)[:-30], "cannot be decompressed to its end"),
        (b"no gzip", "cannot be decompressed"),
    ],
    "a.csv.gz": [(gzip.compress(b"prompt,chosen,rejected\n" + b"p,a,b\n" * 9999)[:-30], "cannot be decompressed to its end")],
    "b.csv.gz": [(gzip.compress(b"prompt,chosen,rejected\n")[:14] + b"x" * 99, "cannot be decompressed to its end: Error -3")],
    "a.csv.zst": [(b"no zstd", "cannot be decompressed to its end")],
    "a.jsonl.zst": [(pa.compress(good("a") * 1000, "zstd", asbytes=True)[:-20], "cannot be decompressed to its end")],
    "a.csv": [
        (b"prompt,chosen,rejected\np,a\n", "line 2: another number of cells than columns; expected 3; found 2"),
        (b'prompt,chosen,rejected\np,"a,b\n', "not valid CSV"),
        (b"prompt,chosen,chosen,rejected\np,a,b,c\n", "column chosen is there twice"),
        (b"prompt,chosen,rejected\n", "no rows"),
        (
            b"""chosen,rejected\n"[{'content': 'Q', 'role': 'user'}]","[{""role"": ""user"", ""content"": ""Q""}]"\n""",
            "conversations written as text",
        ),
    ],
}


@pytest.mark.parametrize(("name", "data", "message"), [(name, *each) for name, cases in BROKEN.items() for each in cases])
def test_broken_files_are_refused_with_file_and_line(name, data, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as refusal:
        check_and_fingerprint(load(path))
    assert str(path) in str(refusal.value) or "row" in message or "written as text" in message


def test_an_edited_file_is_read_again(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", MANY)
    assert load(path).to_list()[0]["chosen"] == "ü 0"
    write_jsonl(path, [MANY[1], *MANY])
    assert load(path).to_list()[0]["chosen"] == "ü 1"


# --- splits, folders, patterns


def splits(folder: Path, **files: list) -> Path:
    for name, rows in files.items():
        write_jsonl(folder / name.replace("__", "/").replace("_dot_", "."), rows)
    return folder


def numbers(source, **options) -> list[str]:
    return [row["chosen"].removeprefix("ü ") for row in load(source, **options).to_list()]


def test_splits_are_those_that_datasets_finds(tmp_path):
    for index, (train, test) in enumerate(
        [
            ("train.jsonl", "test.jsonl"),
            ("train/a.jsonl", "test/a.jsonl"),
            ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
            ("my_train.csv", "my_test.csv"),
            ("nested/deep/train.json", "nested/deep/test.json"),
        ]
    ):
        folder = tmp_path / str(index)
        for name, rows in ((train, MANY[:4]), (test, MANY[4:])):
            datasets.Dataset.from_list(rows)  # the same rows for both readers
            path = folder / name
            if path.suffix == ".csv":
                path.parent.mkdir(parents=True, exist_ok=True)
                datasets.Dataset.from_list(rows).to_csv(path)
            else:
                (write_parquet if path.suffix == ".parquet" else write_jsonl)(path, rows)
        for split in ("train", "test", "train[:2]", "test[50%:]", "train+test", "train[-1:]"):
            theirs = datasets.load_dataset(str(folder), split=split)["chosen"]
            assert [row["chosen"] for row in load(folder, split=split).to_list()] == list(theirs), (folder, split)
        with pytest.raises(InputError, match="no such split.*--split train or test.*found nonsense"):
            load(folder, split="nonsense")


def test_saved_datasets_and_single_files_have_their_splits(tmp_path):
    rows = datasets.Dataset.from_list(MANY)
    datasets.DatasetDict(train_prefs=rows.select(range(4)), test_prefs=rows.select(range(4, 7))).save_to_disk(tmp_path / "dict")
    assert numbers(tmp_path / "dict", split="test_prefs") == ["4", "5", "6"]
    assert numbers(tmp_path / "dict", split="train_prefs[:2]+test_prefs[:1]") == ["0", "1", "4"]
    with pytest.raises(InputError, match="no such split.*train_prefs or test_prefs"):
        load(tmp_path / "dict")
    datasets.Dataset(rows.data, split="test").save_to_disk(tmp_path / "single")
    assert len(load(tmp_path / "single")) == len(load(tmp_path / "single", split="test")) == 7
    for source in (tmp_path / "single", write_jsonl(tmp_path / "train.jsonl", MANY), tmp_path / "*.jsonl"):
        with pytest.raises(InputError, match="no such split.*found nonsense"):
            load(source, split="nonsense")
    with pytest.raises(InputError, match="not a split"):
        load(tmp_path / "train.jsonl", split="train[a:b]")


def test_a_repositorys_configurations_are_those_of_its_readme(tmp_path):
    write_jsonl(tmp_path / "easy.jsonl", MANY[:2])
    write_jsonl(tmp_path / "hard" / "t.jsonl", MANY[2:5])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files:\n  - {split: train, path: easy.jsonl}\n"
        "- config_name: hard\n  data_files:\n  - {split: train, path: hard/t.jsonl}\n---\n"
    )
    assert numbers(tmp_path, config="easy") == ["0", "1"] and numbers(tmp_path, config="hard") == ["2", "3", "4"]
    with pytest.raises(InputError, match="several configurations.*easy, hard.*--dataset-config"):
        load(tmp_path)
    with pytest.raises(InputError, match="no configuration medium.*easy, hard"):
        load(tmp_path, config="medium")
    with pytest.raises(InputError, match="a file has no configurations"):
        load(tmp_path / "easy.jsonl", config="easy")


def test_files_that_would_be_passed_over_are_named(tmp_path):
    mixed = splits(tmp_path / "mixed", a_dot_jsonl=MANY[:2])
    write_parquet(mixed / "b.parquet", MANY)
    with pytest.raises(InputError, match=r"would not be read.*(a\.jsonl|b\.parquet)"):
        load(mixed)
    left = splits(tmp_path / "left", train_dot_jsonl=MANY[:2], extra_dot_jsonl=MANY)
    with pytest.raises(InputError, match=r"would not be read.*extra\.jsonl"):
        load(left)
    assert numbers(f"{left}/*.jsonl") == [*map(str, range(7)), "0", "1"]
    with pytest.raises(InputError, match="files of several kinds"):
        load(f"{mixed}/*")
    write_parquet(tmp_path / "part" / "data" / "train-00001-of-00003.parquet", MANY)
    for source in (tmp_path / "part", f"{tmp_path}/part/data/*.parquet"):
        with pytest.raises(InputError, match=r"2 of 3 files are missing; expected train-00000-of-00003\.parquet"):
            load(source)
    with pytest.raises(InputError, match="no file matches"):
        load(f"{tmp_path}/*.csv")
    bracketed = splits(tmp_path / "a[1]", a_dot_JSONL=MANY)
    assert numbers(bracketed / "a.JSONL") == [*map(str, range(7))]
    with pytest.raises(InputError, match=r"path has one of \* \? \[ in it.*Rename"):
        load(bracketed)
    with pytest.raises(InputError, match=r"--split train\[5:\]: the split has no rows; found 2 rows in all"):
        load(f"{left}/train.jsonl", split="train[5:]")
    assert numbers(f"{left}/train.jsonl", split="train[5:]+train[1:]") == ["1"]
    twice = pa.table([["Q"], ["a"], ["a"], ["b"]], names=["prompt", "chosen", "chosen", "rejected"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(InputError, match="column chosen is there twice"):
        load(tmp_path / "twice.parquet")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "README.md").write_text("# x")
    with pytest.raises(InputError, match=r"holds no dataset.*found README\.md"):
        load(tmp_path / "none")


def table_of(heading: str) -> list[list[str]]:
    lines = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]


def test_a_set_that_is_no_pairs_is_told_what_it_is(tmp_path):
    for name, columns, advice in table_of("Sets that are no pairs"):
        file = write_jsonl(tmp_path / f"{name}.jsonl", [{column: "x" for column in re.findall(r"`(.*?)`", columns)}])
        with pytest.raises(InputError, match="no column chosen and rejected") as refused:
            load(file)
        assert f" {advice} See docs/data.md." in str(refused.value)
    named = write_jsonl(tmp_path / "named.jsonl", [{"question": "q", "response_j": "a", "response_k": "b"}])
    with pytest.raises(
        InputError, match="Perhaps: --prompt-column question --chosen-column response_j --rejected-column response_k"
    ):
        load(named)


@pytest.mark.parametrize(
    ("name", "mark", "words"), [("a.csv", ";", "semicolons"), ("a.csv", "\t", "call it .tsv"), ("a.tsv", ",", "call it .csv")]
)
def test_a_table_with_another_delimiter_is_told_which(tmp_path, name, mark, words):
    (tmp_path / name).write_text(f"prompt{mark}chosen{mark}rejected\nq{mark}a{mark}b\n")
    with pytest.raises(InputError, match=f"no column chosen.*Its cells seem to be separated by .*{words}"):
        load(tmp_path / name)


def test_what_a_readme_says_of_reading_its_files_is_not_passed_over(tmp_path):
    readme = "---\nconfigs:\n- config_name: default\n  data_files: {}\n  {}\n---\n"
    for option, found in (
        ('sep: ";"', "sep: ';'"),
        ('delimiter: ";"', "sep: ';'"),
        ("names: [prompt, chosen, rejected]", "names: "),
    ):
        (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\nq,a,b\n")
        (tmp_path / "README.md").write_text(readme.format("pairs.csv", option))
        with pytest.raises(InputError, match=f"options of its README.*not followed; found {found}"):
            load(tmp_path)
    (tmp_path / "pairs.csv").rename(tmp_path / "pairs.tsv")
    (tmp_path / "pairs.tsv").write_text("prompt\tchosen\trejected\nq\ta\tb\n")
    (tmp_path / "README.md").write_text(readme.format("pairs.tsv", 'sep: "\\t"'))
    assert len(load(tmp_path)) == 1


def test_split_all_is_every_split(tmp_path):
    one = {"prompt": "q", "chosen": "a", "rejected": "b"}
    write_jsonl(tmp_path / "files" / "train.jsonl", [one, one])
    write_jsonl(tmp_path / "files" / "test.jsonl", [one])
    rows = datasets.Dataset.from_list([one, one])
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "saved")
    rows.save_to_disk(tmp_path / "alone")
    for folder, num_rows in (("files", 3), ("saved", 3), ("alone", 2), ("files/train.jsonl", 2)):
        assert len(load(tmp_path / folder, split="all")) == num_rows
    assert len(load(tmp_path / "files")) == 2


def test_a_prompt_in_two_columns_is_not_advised_away(tmp_path):
    row = {"instruction": "q", "input": "more", "chosen": "a", "rejected": "b"}
    with pytest.raises(InputError, match="--prompt-column instruction, once what input holds is put into it"):
        check_and_fingerprint(load(write_jsonl(tmp_path / "alpaca.jsonl", [row])))
