"""A chat template that writes the date: one day for a store, part of its identity, and none where nobody asked."""

import json
import re
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import tiny
from click.testing import CliRunner
from store_samples import make_identity

import cli
from precompute.clock import Clock, DateWanted
from precompute.pairs import check_rows, tokenize_rows
from store import record
from store.errors import StoreError
from store.manifest import Identity, check_same

DATED = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + tiny.CHATML
UNLESS_GIVEN = DATED.replace("strftime_now('%d %b %Y')", "(day if day is defined else strftime_now('%d %b %Y'))")
ROW = {
    "prompt": [{"role": "user", "content": "Why?"}],
    "chosen": [{"role": "assistant", "content": "a"}],
    "rejected": [{"role": "assistant", "content": "b"}],
}


def first_line(tokenizer) -> str:
    (pair,) = tokenize_rows(tokenizer, [ROW], 0, 100).pairs
    return tokenizer.decode(pair.prompt_ids).split("<|im_end|>")[0]


def test_the_template_is_told_one_day_and_without_one_nothing_is_scored():
    tokenizer = tiny.make_tokenizer(DATED)
    clock = Clock(tokenizer, "2026-11-24")
    assert first_line(tokenizer).endswith("Today is 24 Nov 2026") and clock.asked
    Clock(tokenizer, "2026-12-01")
    assert first_line(tokenizer).endswith("Today is 01 Dec 2026")
    Clock(tokenizer, None)
    with pytest.raises(DateWanted, match=r"today's date.*--template-date \d{4}-\d\d-\d\d\.?$"):
        check_rows(tokenizer, [ROW] * 3)


def test_a_template_that_is_not_asked_needs_no_day():
    for template, row in ((tiny.CHATML, ROW), (UNLESS_GIVEN, ROW | {"chat_template_kwargs": {"day": "1 May"}})):
        tokenizer = tiny.make_tokenizer(template)
        clock = Clock(tokenizer, None)
        check_rows(tokenizer, [row])
        assert not clock.asked


def test_the_day_is_part_of_the_identity_and_older_stores_have_none():
    plain = make_identity()
    written = record.canonical(plain)
    assert b"template_date" not in written and Identity.from_json(record.parse(written, "x"), "x") == plain
    dated = replace(plain, template_date="2026-11-24", dataset_config="easy")
    assert Identity.from_json(json.loads(record.canonical(dated)), "x") == dated
    check_same(dated, replace(dated, dataset_config="hard"), "x")  # a name
    with pytest.raises(StoreError, match=r"another date in the chat template.*2026-11-25 .*2026-11-24 .*--template-date"):
        check_same(dated, replace(dated, template_date="2026-11-25"), "x")
    with pytest.raises(StoreError, match="template_date should be str"):
        Identity.from_json({**plain.to_json(), "template_date": 5}, "x")


def test_a_store_keeps_its_day(tiny_llama, tmp_path):
    (tmp_path / "dated.jinja").write_text(DATED)
    (tmp_path / "a.jsonl").write_text((json.dumps(ROW) + "\n") * 2)
    argv = f"precompute --dataset {tmp_path}/a.jsonl --model {tiny_llama} --max-length 64 --dtype float32 --quiet "
    argv += f"--chat-template {tmp_path}/dated.jinja --shard-size 1 --ref-store {tmp_path}/store"

    def run(*more: str):
        return CliRunner().invoke(cli.main, [*argv.split(), *more], catch_exceptions=False)

    refused = run()
    assert refused.exit_code == 2 and refused.output.count("Error:") == 1 and not (tmp_path / "store").exists()
    named = re.search(r"--template-date (\S+)", refused.output)[1]
    assert run("--template-date", named).exit_code == 0
    metadata = pq.read_metadata(tmp_path / "store" / "part-00000.parquet").metadata
    assert json.loads(metadata[b"refdpo.identity"])["template_date"] == named
    assert run("--template-date", named).exit_code == 0
    other = run("--template-date", "2001-01-01")
    assert other.exit_code == 1 and "another date in the chat template" in other.output
