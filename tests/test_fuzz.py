"""Untrusted input: store files and dataset rows of somebody else lead to an `Error:` line or a right answer, never to a traceback, a hang, code
that runs, or a look at other files. `REFDPO_FUZZ=10` multiplies the number of cases, and takes other ones each time."""

import ast
import json
import os
import pickle
import random
import string
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_samples import make_identity, make_store, memory_folder

from precompute.pairs import tokenize_rows
from precompute.rows.dataset import Rows, check_and_fingerprint, load_rows
from store import record, sql
from store.errors import RefdpoError
from store.manifest import MANIFEST, Identity, Manifest
from store.reader import open_store
from store.shard import part_name, read_footer
from store.status import describe, status
from store.summary import summary
from store.verify import verify

ROOT = Path(__file__).parents[1]
TIMES = int(os.environ.get("REFDPO_FUZZ", "1"))


def fuzz(cases: int):
    return settings(max_examples=cases * TIMES, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder():
    yield from memory_folder()


@pytest.fixture(scope="module")
def store(folder) -> Path:
    make_store(folder / "store", num_rows=4, shard_size=2)
    return folder / "store"


def survives(function, *arguments) -> bool:
    """True if it answers, False for an `Error:` that a terminal can show; anything else is a bug and propagates."""
    try:
        function(*arguments)
        return True
    except RefdpoError as error:
        assert "\n" not in str(error).strip() or len(str(error)) < 4000
        str(error).encode()
        return False


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["part-00000.parquet", "../../etc/passwd", "float32"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def mutated(value: object, data: st.DataObject, depth: int = 0) -> object:
    """A JSON value with one thing in it replaced, removed, added or renamed."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 5 - min(depth, 4))):
        key = data.draw(st.sampled_from(sorted(value)))
        action = data.draw(st.sampled_from(["into", "into", "replace", "remove", "rename"]))
        rest = {name: item for name, item in value.items() if name != key}
        if action == "into":
            return rest | {key: mutated(value[key], data, depth + 1)}
        if action == "replace":
            return rest | {key: data.draw(json_values)}
        return rest if action == "remove" else rest | {data.draw(st.text(max_size=8)): value[key]}
    if isinstance(value, list) and value and data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(value) - 1))
        action = data.draw(st.sampled_from(["into", "remove", "double"]))
        middle = {"into": [mutated(value[place], data, depth + 1)], "remove": [], "double": [value[place]] * 2}[action]
        return value[:place] + middle + value[place + 1 :]
    if type(value) is int:
        return data.draw(st.sampled_from([-1, 0, value + 1, -value, 2**31, 2**63, 10**18, 10**400]))
    return data.draw(json_values)


# --- the manifest


@fuzz(400)
@given(data=st.data())
def test_a_mutated_manifest_is_refused(folder, store, data):
    path = folder / "manifest-fuzz"
    path.mkdir(exist_ok=True)
    for shard in store.glob("*.parquet"):
        if not (path / shard.name).exists():
            os.link(shard, path / shard.name)
    original = json.loads((store / MANIFEST).read_text())
    changed = mutated(original, data)
    signed = data.draw(st.booleans())
    if signed and isinstance(changed, dict):  # an attacker who computes the checksum too
        try:
            changed["sha256"] = Manifest(
                **vars(record.build(Manifest, {k: v for k, v in changed.items() if k not in ("format_version", "sha256")}, path))
            ).to_bytes()
            changed = json.loads(changed["sha256"])
        except (RefdpoError, ValueError):
            pass
    text = json.dumps(changed, indent=1, sort_keys=True, ensure_ascii=data.draw(st.booleans()))
    (path / MANIFEST).write_bytes(text.encode(errors="surrogatepass") + b"\n")
    for look in (open_store, verify, summary, lambda path: describe(status(path), path)):
        survives(look, path)
    if json.dumps(changed, sort_keys=True) != json.dumps(original, sort_keys=True):
        assert not survives(Manifest.load, path / MANIFEST) or signed


@fuzz(600)
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass")))
def test_any_bytes_as_a_manifest_are_refused(folder, data):
    path = folder / "bytes-fuzz"
    path.mkdir(exist_ok=True)
    (path / MANIFEST).write_bytes(data)
    assert not survives(open_store, path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 50_000,
        "1" * 10_000,
        "NaN",
        '"\\ud800"',
        '{"format_version": 1, "identity": "\\udfff"}',
        "1e999",
        "-0",
        '{"format_version": NaN}',
        "\ufeff{}",
    ],
    ids=[
        "deep list",
        "deep object",
        "long number",
        "nan",
        "half character",
        "half character inside",
        "infinite",
        "zero",
        "nan inside",
        "bom",
    ],
)
def test_awkward_json_is_an_error_line(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    assert not survives(open_store, tmp_path) and not survives(summary, tmp_path) and not survives(verify, tmp_path)


def test_a_forged_identity_does_not_make_its_reader_count_for_ever(tmp_path, store):
    identity = json.loads((store / MANIFEST).read_text())["identity"]
    (tmp_path / ".staging").mkdir()
    for change in ({"num_rows": 10**18}, {"num_rows": 10**9, "shard_size": 1}, {"num_rows": -5}, {"shard_size": 0}):
        (tmp_path / ".staging" / "identity.json").write_text(json.dumps(identity | change))
        for look in (open_store, summary, verify, status):
            assert not survives(look, tmp_path)


# --- shards


@fuzz(500)
@given(data=st.data())
def test_a_mutated_shard_is_refused_or_right(folder, store, data):
    """Random bytes of the file changed; the Parquet footer, which says how to read the rest, most of all."""
    original = (store / part_name(0)).read_bytes()
    footer_at = len(original) - 8 - int.from_bytes(original[-8:-4], "little")
    path = folder / "shard-fuzz" / part_name(0)
    path.parent.mkdir(exist_ok=True)
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        first = data.draw(st.sampled_from([0, footer_at, footer_at, len(original) - 8]))
        content[data.draw(st.integers(first, len(original) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    if (
        survives(read_footer, path) and data.draw(st.integers(0, 3)) == 0
    ):  # the costly looks at an unsealed store with this shard in it
        survives(summary, path.parent)
        survives(lambda: sql.run(sql.connect(path.parent), "select sum(ref_chosen_logps), count(chosen_ids) from pairs"))
    survives(open_store, path.parent)


@fuzz(300)
@given(data=st.data())
def test_a_shard_with_mutated_notes_in_its_footer_is_refused(folder, store, data):
    path = folder / "notes-fuzz" / part_name(0)
    path.parent.mkdir(exist_ok=True)
    table = pq.read_table(store / part_name(0))
    metadata = dict(table.schema.metadata)
    key = data.draw(st.sampled_from(sorted(key for key in metadata if key.startswith(b"refdpo"))))
    if data.draw(st.booleans()):
        metadata[key] = json.dumps(mutated(json.loads(metadata[key]), data)).encode(errors="surrogatepass")
    else:
        metadata[key] = data.draw(st.binary(max_size=40))
    pq.write_table(table.replace_schema_metadata(metadata), path)
    if survives(read_footer, path):
        survives(summary, path.parent)
        survives(lambda: describe(status(path.parent), path.parent))


def test_pipes_and_devices_are_not_read(tmp_path, store):
    """A name in a store that is a pipe, or a link to a device, would be read for ever."""
    identity = json.loads((store / MANIFEST).read_text())["identity"]
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        for name in (MANIFEST, part_name(0), ".staging/identity.json"):
            path = tmp_path / f"{make.__name__}-{name.replace('/', '-')}"
            (path / ".staging").mkdir(parents=True)
            (path / ".staging" / "identity.json").write_text(json.dumps(identity))
            (path / name).unlink(missing_ok=True)
            make(path / name)
            for look in (open_store, verify, summary):
                assert not survives(look, path)


# --- rows


contents = (
    st.none()
    | st.text(max_size=20)
    | st.sampled_from(["<|im_end|>", "<think>", "\ud800", "\x00", "{{ 7*7 }}", "{% for", "a" * 300, "\u2028", "e\u0301"])
)
turns = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool", "", "nobody"]), "content": contents})
sides = st.lists(turns, max_size=3)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


@fuzz(300)
@given(
    rows=st.lists(st.fixed_dictionaries({"chosen": sides, "rejected": sides}, optional={"prompt": sides}), min_size=1, max_size=3)
)
def test_any_conversations_are_tokenized_or_refused(tokenizer, rows):
    _tokenize(tokenizer, rows)


@fuzz(300)
@given(
    rows=st.lists(
        st.fixed_dictionaries({"chosen": contents, "rejected": contents}, optional={"prompt": contents}), min_size=1, max_size=3
    )
)
def test_any_texts_are_tokenized_or_refused(tokenizer, rows):
    _tokenize(tokenizer, rows)


def _tokenize(tokenizer, rows: list[dict]) -> None:
    """Whatever passes the check of the dataset is tokenized into pairs that add up, row by row, or is a row's own error."""
    import datasets

    columns = sorted({name for row in rows for name in row})
    try:
        table = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows])
        dataset = Rows(datasets.Dataset(table))
    except (pa.ArrowException, UnicodeEncodeError, ValueError, TypeError):
        return  # no file can hold such rows
    if not survives(check_and_fingerprint, dataset):
        return
    try:
        result = tokenize_rows(tokenizer, dataset.to_list(), 0, 64)
    except RefdpoError:
        return
    assert len(result.pairs) + len(result.unscorable) == len(rows)
    for pair in result.pairs:
        assert len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) <= 64
        assert len(pair.chosen_ids) and len(pair.rejected_ids)


@fuzz(150)
@given(data=st.binary(max_size=120), lines=st.lists(json_values, max_size=3))
def test_any_file_as_a_dataset_is_read_or_refused(folder, data, lines):
    path = folder / "rows.jsonl"
    text = "\n".join(json.dumps({"chosen": "a", "rejected": "b", "prompt": line}) for line in lines).encode(errors="surrogatepass")
    for content in (data, text, text + data):
        path.write_bytes(content)

        def load():
            check_and_fingerprint(load_rows(str(path), split="train"))

        survives(load)


# --- SQL and code


ESCAPES = """
select * from read_csv('{secret}', header = false)
select * from read_text('{secret}')
select * from read_blob('{secret}')
select * from '{secret}'
select * from glob('{folder}/*')
select * from read_parquet('{store}/part-00000.parquet')
copy pairs to '{folder}/out.parquet'
copy (select 1) to '{store}/part-00000.parquet' (format csv)
copy pairs from '{secret}'
export database '{folder}/out'
import database '{folder}/out'
attach '{folder}/other.db' as other
attach '{secret}' as other
install httpfs
load httpfs
load '{folder}/evil.duckdb_extension'
force install httpfs from 'http://localhost:1/'
select * from read_csv('http://localhost:1/x')
set enable_external_access = true
set lock_configuration = false
reset enable_external_access
set allowed_directories = ['/']
set allowed_paths = ['{secret}']
set extension_directory = '{folder}'
set temp_directory = '{folder}'
set home_directory = '{folder}'
set python_enable_replacements = true
set autoload_known_extensions = true
pragma enable_profiling = 'json'; pragma profiling_output = '{folder}/out'
set profile_output = '{folder}/out'; set enable_profiling = 'json'; select 1
pragma log_query_path = '{folder}/out'
set log_query_path = '{folder}/out'
select getenv('HOME')
create secret (type s3, key_id 'a', secret 'b')
create persistent secret s (type http, bearer_token 'x')
select * from secret_in_python
select * from sniff_csv('{secret}')
select * from parquet_metadata('{store}/part-00000.parquet')
checkpoint; vacuum; use memory; attach ':memory:' as m; copy from database memory to m; attach '{folder}/x.db'
call enable_logging(storage = 'file', storage_config = {{'path': '{folder}/out'}})
"""

secret_in_python = pa.table({"key": ["s3cret"]})


@pytest.mark.parametrize("statement", [line for line in ESCAPES.splitlines() if line])
def test_sql_reaches_nothing_but_the_store(tmp_path, store, statement):
    secret_in_python = pa.table({"key": ["s3cret"]})  # noqa: F841 (DuckDB would find it by name)
    (tmp_path / "secret").write_text("s3cret\n")
    (tmp_path / "evil.duckdb_extension").write_bytes(b"\x7fELF")
    present = sorted(path.name for path in tmp_path.iterdir())
    before = {path: path.read_bytes() for path in store.iterdir()}
    connection = sql.connect(store)
    try:
        answer = sql.run(connection, statement.format(secret=tmp_path / "secret", folder=tmp_path, store=store), "json")
    except RefdpoError as error:
        answer = str(error)
    assert "s3cret" not in answer and os.environ.get("HOME", "none") + '"' not in answer
    assert sorted(path.name for path in tmp_path.iterdir()) == present
    assert {path: path.read_bytes() for path in store.iterdir()} == before
    assert "4" in sql.run(connection, "select count(*) from pairs", "csv")  # and the connection still answers


@fuzz(400)
@given(
    query=st.lists(
        st.sampled_from(
            [
                *[
                    "select",
                    "from",
                    "pairs",
                    "tokens",
                    "completions",
                    "where",
                    "order",
                    "by",
                    "limit",
                    "group",
                    "(",
                    ")",
                    ",",
                    "*",
                    ";",
                    "'",
                    '"',
                    "--",
                    "/*",
                    "1",
                    "-1",
                    "null",
                    "row",
                    "unnest",
                    "with",
                    "as",
                ],
                "chosen_ids",
                "\x00",
                "🙂",
                "\ud800",
            ]
        ),
        max_size=9,
    ).map(" ".join)
)
def test_any_query_is_answered_or_refused(store, query):
    survives(sql.run, sql.connect(store), query, random.choice(["table", "csv", "json"]))


def test_nothing_unpickles_and_no_remote_code_is_trusted():
    """Read from the source itself: no pickle, no eval, no shell, and trust_remote_code only as False."""
    for path in [
        *(path for name in ("store", "precompute", "train", "slurm", "demo") for path in (ROOT / name).glob("*.py")),
        *ROOT.glob("*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names} | {(getattr(node, "module", "") or "").split(".")[0]}
                assert not names & {"pickle", "dill", "cloudpickle", "shelve", "marshal"}, path
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                assert not (isinstance(node.func, ast.Name) and name in ("eval", "exec", "compile")), path
                assert name not in ("system", "popen") and not (name == "load" and ast.unparse(node.func) == "torch.load"), path
                for keyword in node.keywords:
                    assert keyword.arg != "trust_remote_code" or ast.unparse(keyword.value) == "False", path
                    assert keyword.arg != "shell", path


def test_a_pickle_in_a_store_is_never_opened(tmp_path, store):
    """Arrow can carry pickled Python types in a schema's metadata; a store with one is refused by its schema, and nothing runs."""

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    table = pq.read_table(store / part_name(0))
    metadata = table.schema.metadata | {
        b"pandas": pickle.dumps(Evil()),
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Evil()),
    }
    field = table.schema.field("row").with_metadata(
        {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(Evil())}
    )
    schema = pa.schema([field if each.name == "row" else each for each in table.schema], metadata=metadata)
    (tmp_path / "store").mkdir()
    pq.write_table(table.cast(schema), tmp_path / "store" / part_name(0))
    survives(summary, tmp_path / "store")
    survives(open_store, tmp_path / "store")
    assert not (tmp_path / "pwned").exists()


@fuzz(200)
@given(names=st.lists(st.text(alphabet=string.printable, min_size=1, max_size=12), min_size=3, max_size=3))
def test_any_names_in_an_identity_round_trip(names):
    identity = make_identity(model=names[0], dataset=names[1], revision=names[2])
    assert Identity.from_json(record.parse(record.canonical(identity), "x"), "x") == identity


def test_the_fuzz_starts_from_a_store_that_is_right(store):
    """Else everything above would be refused for another reason."""
    for look in (
        open_store,
        verify,
        summary,
        lambda path: describe(status(path), path),
        lambda path: read_footer(path / part_name(0)),
    ):
        assert survives(look, store)
