"""Scored turns: masks written out by hand, log-probs and losses by a plain Hugging Face forward that knows the masks alone."""

import copy
import json

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from click.testing import CliRunner
from trl import DPOConfig

import cli
from precompute.pairs import check_rows, tokenize_rows
from store.check import problems
from store.errors import InputError
from store.reader import open_store
from store.shard import part_name, read_footer
from store.verify import verify
from train.data import dataset_of, lengths_of
from train.trainer import StoreDPOTrainer

OLMO = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ eos_token }}{% else %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As OLMo's: the last turn of the assistant ends in another token than the others."""

FORGETS = (
    "{% for m in messages %}{% set last = loop.last %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] if last or m['role'] == 'user' else m['content'].split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen 3's: what was thought before an earlier answer is left out."""


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}

S, U, A, E = "<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"

FOUR = [user("Hi"), assistant("Yes?"), user("So?")]

# What is scored stands between « and ».
CASES = {
    "one turn": (
        tiny.CHATML,
        ([SYSTEM, user("Why?"), assistant("Because.")], [SYSTEM, user("Why?"), assistant("No.")]),
        {
            which: (f"{S}Be brief.{E}{U}Why?{E}{A}«Because.{E}»", f"{S}Be brief.{E}{U}Why?{E}{A}«No.{E}»")
            for which in ("last", "all")
        },
    ),
    "turns that both share": (
        tiny.CHATML,
        ([*FOUR, assistant("Fine.")], [*FOUR, assistant("Bad, then")]),
        {
            "last": (f"{U}Hi{E}{A}Yes?{E}{U}So?{E}{A}«Fine.{E}»", f"{U}Hi{E}{A}Yes?{E}{U}So?{E}{A}«Bad, then{E}»"),
            "all": (f"{U}Hi{E}{A}«Yes?{E}»{U}So?{E}{A}«Fine.{E}»", f"{U}Hi{E}{A}«Yes?{E}»{U}So?{E}{A}«Bad, then{E}»"),
        },
    ),
    "sides that differ early, and in length": (
        tiny.CHATML,
        ([user("Hi"), assistant("a"), user("b"), assistant("c")], [user("Hi"), assistant("x")]),
        {
            "last": (f"{U}Hi{E}{A}a{E}{U}b{E}{A}«c{E}»", f"{U}Hi{E}{A}«x{E}»"),
            "all": (f"{U}Hi{E}{A}«a{E}»{U}b{E}{A}«c{E}»", f"{U}Hi{E}{A}«x{E}»"),
        },
    ),
    "another end of the last turn": (  # as in open-instruct, the line break behind an earlier turn is not the turn's
        OLMO,
        ([*FOUR, assistant("Fine.")], [*FOUR, assistant("No")]),
        {
            "all": (
                f"{U}Hi{E}{A}«Yes?<|im_end|>»\n{U}So?{E}{A}«Fine.<|endoftext|>»",
                f"{U}Hi{E}{A}«Yes?<|im_end|>»\n{U}So?{E}{A}«No<|endoftext|>»",
            ),
        },
    ),
    "a turn of the user behind": (
        tiny.CHATML,
        ([user("Hi"), assistant("a"), user("Thanks")], [user("Hi"), assistant("b"), user("Thanks")]),
        {"last": (f"{U}Hi{E}{A}«a{E}»{U}Thanks{E}", f"{U}Hi{E}{A}«b{E}»{U}Thanks{E}")},
    ),
    "an answer that does not think": (  # the generation prompt ends in <think>, the conversation does not go on so
        tiny.THINKING,
        ([user("Hi"), assistant("Yes")], [user("Hi"), assistant("<think>hm</think>No")]),
        {"last": (f"{U}Hi{E}{A}«Yes{E}»", f"{U}Hi{E}{A}<think>«hm</think>No{E}»")},
    ),
}


@pytest.mark.parametrize(("case", "which"), [(name, which) for name, (_, _, wanted) in CASES.items() for which in wanted])
def test_masks_written_out_by_hand(case, which):
    template, (chosen, rejected), wanted = CASES[case]
    tokenizer = tiny.make_tokenizer(template)
    (pair,) = tokenize_rows(tokenizer, [{"chosen": chosen, "rejected": rejected}], 0, 500, which).pairs
    assert tuple(marked(tokenizer, sequence) for sequence in pair.sequences) == wanted[which]


def marked(tokenizer, sequence) -> str:
    """The text of a sequence, what is scored between « and »."""
    scored = np.zeros(len(sequence.ids) + 1, bool)
    scored[sequence.scored] = True
    text, inside = "", False
    for place, token in enumerate([*sequence.ids.tolist(), None]):
        if scored[place] != inside:
            text, inside = text + ("«" if scored[place] else "»"), scored[place]
        text += "" if token is None else tokenizer.decode([token])
    return text


FORGOTTEN = [user("Hi"), assistant("<think>a long thought</think>Yes"), user("So?")]


def test_a_turn_that_the_template_rewrites_is_not_guessed():
    """open-instruct's counts would score other tokens than the turn's."""
    row = {"chosen": [*FORGOTTEN, assistant("Fine")], "rejected": [*FORGOTTEN, assistant("No")]}
    tokenizer = tiny.make_tokenizer(FORGETS)
    found = tokenize_rows(tokenizer, [row], 0, 500, "all")
    assert not found.pairs and "renders a turn of the assistant otherwise" in found.unscorable[0]["reason"]
    assert len(tokenize_rows(tokenizer, [row], 0, 500, "last").pairs) == 1


def test_rows_without_such_turns_are_refused():
    tokenizer = tiny.make_tokenizer()
    with pytest.raises(InputError, match="plain text has no turns"):
        check_rows(tokenizer, [{"prompt": "a", "chosen": "b", "rejected": "c"}], "all")
    with pytest.raises(InputError, match="no turn is the assistant's"):
        check_rows(tokenizer, [{"chosen": [user("a"), user("b")], "rejected": [user("a"), user("c")]}], "last")


def test_a_cut_that_leaves_no_scored_token_leaves_no_pair():
    _, (chosen, rejected), _ = CASES["sides that differ early, and in length"]
    tokenizer = tiny.make_tokenizer()
    (whole,) = tokenize_rows(tokenizer, [{"chosen": chosen, "rejected": rejected}], 0, 500, "last").pairs
    first = int(whole.sequences[0].scored[0])
    for max_length, pairs in ((first + 1, 1), (first, 0)):
        found = tokenize_rows(tokenizer, [{"chosen": chosen, "rejected": rejected}], 0, max_length, "last")
        assert len(found.pairs) == pairs and all("chosen" in each["reason"] for each in found.unscorable)


ROWS = ("one turn", "turns that both share", "sides that differ early, and in length", "a turn of the user behind")
"""Of CASES, all of one template."""

WANTED = {
    which: [CASES[name][2].get(which) or tuple(map(str, CASES[name][2]["last"])) for name in ROWS] for which in ("last", "all")
}
"""The last case has one turn of the assistant: last and all are the same."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """which -> a store that the command line made; and what it was given."""
    folder = tmp_path_factory.mktemp("turns")
    tiny.save(folder / "model")
    rows = [dict(zip(("chosen", "rejected"), CASES[name][1], strict=True)) for name in ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for which in ("last", "all"):
        precompute(folder, which, "--score-turns", which)
    return folder


def precompute(folder, store, *more, max_length=128, code=0):
    given = ["--dataset", folder / "rows.jsonl", "--model", folder / "model", "--max-length", max_length, "--dtype", "float32"]
    words = ["precompute", *given, "--shard-size", 2, "--ref-store", folder / store, *more]
    result = CliRunner().invoke(cli.main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def by_hand(model, text: str) -> tuple[torch.Tensor, list[int]]:
    """(log-probs of what stands between « and », its positions): a plain forward of the text without the marks, whose tokens are found by
    their place in the text."""
    tokenizer, plain = tiny.make_tokenizer(), text.replace("«", "").replace("»", "")
    inside, wanted = False, []
    for letter in text:
        if letter in "«»":
            inside = letter == "«"
        else:
            wanted.append(inside)
    encoded = tokenizer(plain, add_special_tokens=False, return_offsets_mapping=True)
    places = [place for place, (start, _) in enumerate(encoded["offset_mapping"]) if wanted[start]]
    ids = torch.tensor([encoded["input_ids"]])
    logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logps[[place - 1 for place in places]], places


@pytest.mark.parametrize("which", ["last", "all"])
def test_the_store_has_the_log_probs_of_these_tokens_alone(stores, which):
    store = open_store(stores / which, check="sha256")
    assert store.identity.scored_turns == which and verify(stores / which) == []
    model = tiny.make_model("llama")
    for pair, texts in zip(store.read(range(len(ROWS))).to_pylist(), WANTED[which], strict=True):
        for side, text in zip(("chosen", "rejected"), texts, strict=True):
            logps, places = by_hand(model, text)
            known = {place: logp for place, logp in enumerate(pair[f"{side}_token_logps"]) if logp is not None}
            assert [place + len(pair["prompt_ids"]) for place in known] == places
            np.testing.assert_allclose(list(known.values()), logps.numpy(), atol=1e-4)
            assert pair[f"ref_{side}_logps"] == pytest.approx(float(logps.double().sum()), abs=1e-4)


def test_sql_and_summary_count_what_was_scored(stores):
    def shown(*words):
        result = CliRunner().invoke(cli.main, ["inspect", "--ref-store", str(stores / "all"), *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    total = sum(len(by_hand(tiny.make_model("llama"), text)[1]) for texts in WANTED["all"] for text in texts)
    counted = shown("--sql", "select count(*) as n, count(logp) as m, sum(len(token)) > 0 as text from tokens", "--format", "csv")
    assert counted.splitlines()[1].startswith(f"{total},{total},")
    assert "the assistant's turns alone" in shown()


@pytest.mark.parametrize("which", ["last", "all"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("loss_type", ["sigmoid_norm", "sigmoid"])
def test_the_loss_is_that_of_masks_written_by_hand(stores, tmp_path, which, packed, loss_type):
    """The policy is another model than the reference, so that every count and every mask matters."""
    store, reference, policy = open_store(stores / which), tiny.make_model("llama"), tiny.make_model("llama", seed=1)
    args = DPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        loss_type=[loss_type],
        beta=2.0,
        precompute_ref_log_probs=True,
        remove_unused_columns=False,
        gradient_checkpointing=False,
        max_length=128,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=3,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
    )
    dataset = dataset_of(store, 128)
    trainer = StoreDPOTrainer(
        model=copy.deepcopy(policy).requires_grad_(True),
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tiny.make_tokenizer(),
        lengths=lengths_of(dataset, store, 128) if packed else None,
        tokens_per_batch=64 if packed else None,
    )
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.train()
    trained = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    losses = []
    for texts in WANTED[which]:
        chosen, rejected = (by_hand(policy, text)[0] - by_hand(reference, text)[0] for text in texts)
        norm = (lambda x: x.mean()) if loss_type == "sigmoid_norm" else (lambda x: x.sum())
        losses.append(-torch.nn.functional.logsigmoid(2.0 * (norm(chosen) - norm(rejected))))
    wanted = float(torch.stack(losses).mean())
    assert (trained, evaluated) == pytest.approx((wanted, wanted), abs=1e-4)


@pytest.mark.parametrize("max_length", [16, 24, 30])
def test_a_shorter_length_is_what_a_store_of_it_has(stores, max_length):
    """Of the derived rows, against the same rows scored at that length."""
    precompute(stores, f"all-{max_length}", "--score-turns", "all", max_length=max_length)
    shorter, longer = open_store(stores / f"all-{max_length}"), open_store(stores / "all")
    mine, theirs = dataset_of(longer, max_length), dataset_of(shorter, max_length)
    assert 0 < len(theirs) == len(mine)
    for one, other in zip(mine, theirs, strict=True):
        assert {name: one[name] for name in one if "logps" not in name} == {
            name: other[name] for name in other if "logps" not in name
        }
        assert one["ref_chosen_logps"] == pytest.approx(other["ref_chosen_logps"], abs=1e-4)


def test_reuse_takes_pairs_of_the_same_turns_alone(stores):
    output = precompute(stores, "again", "--score-turns", "all", "--reuse", stores / "all", max_length=30)
    assert "pairs were taken" in output and verify(stores / "again") == []
    refused = precompute(stores, "other", "--score-turns", "last", "--reuse", stores / "all", code=1)
    assert "choice of turns" in refused and "scored_turns all" in refused


def test_another_choice_for_the_same_store_is_refused(stores):
    refused = precompute(stores, "last", code=1)
    assert "scored_turns last" in refused and "--score-turns" in refused


def test_what_is_not_offered_is_refused_before_anything_is_loaded(stores, tmp_path):
    for words, text in (
        (["export", "--format", "trl", "--output", tmp_path / "out"], "--format jsonl"),
        (["train", "--ld-alpha", "0.5", "--output-dir", tmp_path / "run"], "--ld-alpha 0.5"),
        (
            ["train", "--loss-type", "sigmoid_norm", "--loss-type", "sft", "--output-dir", tmp_path / "run"],
            "--per-device-train-batch-size",
        ),
    ):
        result = CliRunner().invoke(cli.main, [words[0], "--ref-store", str(stores / "all"), *map(str, words[1:])])
        assert result.exit_code in (1, 2) and text in result.output, result.output


def test_verify_sees_a_wrong_span(stores):
    store = open_store(stores / "all")
    identity, report = read_footer(stores / "all" / part_name(0))
    table = store.read(range(2))
    assert problems(table, identity, report) == []
    name = "chosen_scored"
    for wrong in ([0, 1], [1, 0], [0, 10_000], [], [0]):
        column = pa.array([wrong, *table[name].to_pylist()[1:]], pa.list_(pa.int32()))
        changed = table.set_column(table.column_names.index(name), table.schema.field(name), [column])
        assert any(name in each for each in problems(changed, identity, report)), wrong
