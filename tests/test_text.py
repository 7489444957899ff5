"""Ids as text: in SQL, only where a query asks for it, and on the report's page, token by token."""

import re

import pytest
import store_samples
from click.testing import CliRunner
from tiny import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import cli
from store import report as report_module
from store.errors import InputError
from store.reader import open_store
from store.report import report
from store.select import select
from store.sql import connect, run, write_parquet
from store.text import Vocabulary, pieces


@pytest.fixture
def path():
    for folder in store_samples.memory_folder():
        store_samples.make_store(folder / "s", num_rows=6, max_length=24)
        yield folder / "s"


class Counting:
    """Decodes to the ids themselves, and counts how often it is asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, ids: list[int]) -> str:
        self.calls += 1
        return "".join(f"<{id_}>" for id_ in ids)


def test_texts_are_the_decoded_ids(path):
    decode = Counting()
    found = connect(path, decode=decode).execute("from texts order by row").fetchall()
    pairs = open_store(path).read(range(6)).to_pylist()
    assert found == [
        (pair["pair_id"], pair["row"], *(decode(pair[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")))
        for pair in pairs
    ]
    tokens = connect(path, decode=decode).execute("select token_id, token from tokens").fetchall()
    assert tokens and all(text == f"<{id_}>" for id_, text in tokens)


def test_nothing_is_decoded_that_no_query_asks_for(path):
    decode = Counting()
    connection = connect(path, decode=decode)
    for query in (
        "select count(*), avg(logp) from tokens",
        "select token_id from tokens",
        "select row from texts",
        "describe texts",
        "select count(*) from texts where row > 2",
    ):
        assert run(connection, query)
    assert decode.calls == 0
    assert len(connection.execute("select chosen from texts where row = 3").fetchall()) == 1
    assert decode.calls == 1


def test_the_connection_stays_locked(path, tmp_path):
    connection = connect(path, decode=Counting())
    (tmp_path / "secret.csv").write_text("a\n1\n")
    for query in (
        f"from '{tmp_path}/secret.csv'",
        f"copy (select token from tokens) to '{tmp_path}/out.csv'",
        "set enable_external_access = true",
    ):
        with pytest.raises(InputError):
            run(connection, query)
    assert not (tmp_path / "out.csv").exists()


def test_a_tokenizer_that_is_not_at_hand_is_one_line_that_names_the_option(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def inspect(*words: str):
        return CliRunner().invoke(cli.main, ["inspect", "--ref-store", str(path), *words])

    assert inspect("--sql", "select count(*) from tokens").exit_code == 0
    for words in (
        ["--sql", "from tokens"],
        ["--sql", "select chosen from texts", "--format", "json"],
        ["--sql", "from texts", "--format", "parquet", "--output", str(tmp_path / "out.parquet")],
    ):
        result = inspect(*words)
        assert result.exit_code == 2 and result.output.startswith("Error: ") and result.output.count("\n") == 1
        assert result.output.startswith("Error: acme/tiny: no tokenizer can be loaded") and "pass --tokenizer" in result.output
    assert not (tmp_path / "out.parquet").exists()
    make_tokenizer().save_pretrained(tmp_path / "other")
    result = inspect("--sql", "from texts", "--tokenizer", str(tmp_path / "other"))
    assert result.exit_code == 2 and "not the tokenizer the store was made with" in result.output
    assert "belongs to --sql" in inspect("--tokenizer", str(tmp_path / "other")).output


def test_a_query_goes_on_after_one_that_could_not_decode(path, tmp_path):
    def refuse(ids):
        raise InputError("no tokenizer")

    connection = connect(path, decode=refuse)
    with pytest.raises(InputError, match="^no tokenizer"):
        write_parquet(connection, "from texts", tmp_path / "x.parquet")
    with pytest.raises(InputError, match="Views: pairs, completions, tokens, texts"):
        run(connection, "select nothing from texts")


def test_conditions_may_ask_for_text(path):
    first = open_store(path).read([4]).to_pylist()[0]["prompt_ids"][0]
    chosen = select(path, f"pair_id in (select pair_id from texts where starts_with(prompt, '<{first}>'))", decode=Counting())
    assert chosen.train == (4,)


SPOKEN = "Grüße 🙂 naïve 試す café<|im_end|> x"


def test_pieces_join_to_the_text_and_split_no_character():
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(SPOKEN)
    found = list(pieces(ids, tokenizer.decode))
    assert "".join(text for _, text in found) == tokenizer.decode(ids) == SPOKEN
    assert sum(count for count, _ in found) == len(ids)
    assert [(4, "🙂"), (3, "試")] == [piece for piece in found if piece[1] in ("🙂", "試")]  # UTF-8 bytes


def test_words_keep_the_space_in_front_of_them():
    """As Llama 2's tokenizer: its decoder drops the space before a text's first word."""
    words = ["<unk>", "▁a", "▁the", "re", "a", "▁"]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    vocabulary = Vocabulary(tokenizer.decode)
    assert [vocabulary[index] for index in (2, 3, 4)] == [" the", "re", "a"] and tokenizer.decode([2]) == "the"
    assert list(pieces([2, 3], tokenizer.decode, [1])) == [(1, " the"), (1, "re")]


def test_shades_by_hand():
    """0.5, 0.1, 0.01 and 0.001 are -0.69, -2.30, -4.61 and -6.91 nats; changes step at a quarter, a half, one and two."""
    shade = report_module._shade
    assert [shade([7], [logp], None)[0] for logp in (-0.6, -0.7, -2.4, -4.7, -7.0)] == ["", "l1", "l2", "l3", "l4"]
    assert shade([7, 8], [-0.5, -0.5], None) == ("l1", "token 7 8: -1.000")
    changes = (0.2, 0.3, 0.6, 1.5, 3.0)
    assert [shade([7], [-4.0], [-4.0 + change])[0] for change in changes] == ["", "u1", "u2", "u3", "u4"]
    assert [shade([7], [-1.0], [-1.0 - change])[0] for change in changes] == ["", "d1", "d2", "d3", "d4"]
    assert shade([7], [-1.0], [-1.5]) == ("d2", "token 7: -1.000 here, -1.500 there, -0.500")
    assert shade([7], [None], None) == ("", "token 7")  # imported: not known
    assert shade([7], [-1.0], []) == ("", "token 7: -1.000 here")  # cut earlier there


def test_the_page_shades_each_token(path, tmp_path):
    page = report(path, tmp_path / "out", Counting()).read_text()
    pair = max(open_store(path).read(range(6)).to_pylist(), key=lambda pair: pair["ref_chosen_logps"] - pair["ref_rejected_logps"])
    first = page.partition('<pre class="chosen">')[2].partition("</pre>")[0]
    found = re.findall(r'<i(?: class="(l\d)")? title="token (\d+): (-?[\d.]+)">&lt;(\d+)&gt;</i>', first)
    assert [int(id_) for _, id_, _, _ in found] == pair["chosen_ids"] and [text for *_, text in found] == [
        i for _, i, _, _ in found
    ]
    for (step, _, shown, _), logp in zip(found, pair["chosen_token_logps"], strict=True):
        assert float(shown) == pytest.approx(logp, abs=5e-4)
        limits = (-0.6931, -2.3026, -4.6052, -6.9078)
        assert step == (f"l{sum(logp < limit for limit in limits)}" if logp < limits[0] else "")
