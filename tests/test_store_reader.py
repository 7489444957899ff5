"""Opening and reading: exactly what was published, in any order, from any process; anything else refused."""

import multiprocessing
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_samples import PROVENANCE, make_identity, make_shard, make_store, memory_folder

import store
from store.errors import InputError, StoreError
from store.folder import prepare_store
from store.manifest import MANIFEST
from store.reader import SHORT_COLUMNS, open_store
from store.remote import pull, push
from store.schema import SCHEMA
from store.seal import seal
from store.shard import part_name, publish_shard
from store.sql import connect
from store.status import status
from store.summary import summary
from store.verify import verify


@pytest.fixture
def tmp_path():
    yield from memory_folder()


NUM_ROWS, UNSCORABLE = 500, (0, 3, 199, 200, 499)


@pytest.fixture(scope="module")
def big():
    """A store of three shards (200, 200 and 100 rows), several row groups in each, and its pairs."""
    for folder in memory_folder():
        identity = make_identity(num_rows=NUM_ROWS, shard_size=200, max_length=30)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("store.shard.ROW_GROUP_TOKENS", 0)  # as pairs of thousands of tokens have them
            make_store(folder / "big", identity, unscorable=UNSCORABLE)
        yield folder / "big", pa.concat_tables(make_shard(identity, index, unscorable=UNSCORABLE)[1] for index in range(3))


def test_read_returns_what_was_published(big):
    path, pairs = big
    opened = open_store(path)
    assert opened.num_pairs == NUM_ROWS - len(UNSCORABLE) == pairs.num_rows
    assert opened.read(range(opened.num_pairs)).equals(pairs.combine_chunks())
    assert opened.lengths().equals(pairs.select(SHORT_COLUMNS))
    assert opened.columns(["prompt_ids", "row"]).equals(pairs.select(["prompt_ids", "row"]))


@pytest.mark.parametrize("stretch", [1, 2, 3])
def test_columns_are_whole_wherever_their_stretches_end(big, monkeypatch, stretch):
    path, pairs = big
    monkeypatch.setattr("store.shard.STRETCH", stretch)
    columns = open_store(path).columns(["row", "num_chosen_tokens"])
    assert columns.equals(pairs.select(["row", "num_chosen_tokens"]))
    assert columns["row"].num_chunks == -(-3 // stretch)


@settings(max_examples=40)
@given(st.lists(st.integers(0, NUM_ROWS - len(UNSCORABLE) - 1), max_size=30))
def test_read_keeps_the_order_asked(big, positions):
    path, pairs = big
    table = open_store(path, check="none").read(positions)
    assert table.schema.equals(SCHEMA)
    assert table.equals(pairs.take(pa.array(positions, pa.int64())).combine_chunks())


def test_read_some_columns(big):
    path, pairs = big
    table = open_store(path).read([300, 2], ["ref_chosen_logps", "chosen_ids"])
    assert table.column_names == ["ref_chosen_logps", "chosen_ids"]
    assert table.to_pylist() == pairs.select(table.column_names).take([300, 2]).to_pylist()


def test_read_decodes_only_the_row_groups_concerned(big, monkeypatch):
    asked, real = [], pq.ParquetFile.read_row_groups

    def spy(self, groups, **rest):
        asked.append(groups)
        return real(self, groups, **rest)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", spy)
    open_store(big[0]).read([0, 1, 63, 64, 300])
    assert asked == [[0], [1], [1]]


def test_row_groups_hold_64_pairs_or_so_many_tokens(tmp_path, monkeypatch):
    """200 pairs in one shard; the limit is set to what so many average pairs have."""
    identity = make_identity(num_rows=200, shard_size=200, max_length=64)
    report, _ = make_shard(identity, 0)
    tokens = (report.num_prompt_tokens + report.num_completion_tokens) / 200
    for limit, expected in ((0, 64), (int(tokens * 64), 64), (int(tokens * 90) + 1, 90), (1 << 18, 200)):
        monkeypatch.setattr("store.shard.ROW_GROUP_TOKENS", limit)
        make_store(tmp_path / str(limit), identity)
        footer = pq.read_metadata(tmp_path / str(limit) / part_name(0))
        assert footer.row_group(0).num_rows == expected, limit


def test_what_is_read_leaves_no_footer_behind(big):
    opened = open_store(big[0])
    opened.columns(["row"]), opened.read([1, 300]), opened.token_counts
    assert set(vars(opened)) == {"path", "manifest", "_starts", "token_counts"}
    assert set(vars(pickle.loads(pickle.dumps(opened)))) == {"path", "manifest"}


@pytest.mark.parametrize("position", [-1, NUM_ROWS - len(UNSCORABLE)])
def test_read_outside_the_store(big, position):
    with pytest.raises(IndexError, match="there are 495"):
        open_store(big[0]).read([0, position])


def read_some(opened, seed: int) -> bool:
    positions = random.Random(seed).choices(range(opened.num_pairs), k=50)
    rows = [row for row in range(NUM_ROWS) if row not in UNSCORABLE]
    return opened.read(positions)["row"].to_pylist() == [rows[position] for position in positions]


def test_many_threads_may_read(big):
    opened = open_store(big[0])
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(lambda seed: read_some(opened, seed), range(40)))


def exit_with(opened, seed: int) -> None:
    sys.exit(0 if read_some(opened, seed) else 1)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes_may_read(big, start):
    opened = open_store(big[0])
    assert read_some(opened, 0) and opened.token_counts  # what is cached and the threads started: both cross the fork
    processes = multiprocessing.get_context(start)
    workers = [processes.Process(target=exit_with, args=(opened, seed)) for seed in range(3 if start == "fork" else 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(600)
    assert [worker.exitcode for worker in workers] == [0] * len(workers)
    copy = pickle.loads(pickle.dumps(opened))
    assert copy == opened and read_some(copy, 1)


# --- what is refused


def test_paths_that_are_no_store(tmp_path):
    make_store(tmp_path / "shelf" / "think")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for name, message in (
        ("nowhere", "nowhere: no such folder. Make it with: python cli.py precompute"),
        ("shelf/thonk", "no such folder. .*/shelf/ has: think. Make it with"),
        ("shelf", "shelf/ is the shelf, not a dataset; on it: think. Name a dataset on it: --ref-store .*/shelf/think"),
        ("empty", "not a reference store; expected part-.* found an empty folder"),
        ("file", "a file, not a folder"),
        ("dangling", "a symbolic link to nothing"),
    ):
        for look in (open_store, verify):
            with pytest.raises(InputError, match=message):
                look(tmp_path / name)
    with pytest.raises(InputError, match="is the shelf, not a dataset; on it: "):
        open_store(Path(store.__file__).parent)


def test_unsealed_store(tmp_path):
    identity = make_identity(num_rows=256)
    prepare_store(tmp_path, identity)
    for index in set(range(64)) - {7, 19, 40}:
        publish_shard(tmp_path, identity, *make_shard(identity, index), PROVENANCE)
    message = (
        f"{tmp_path} is not sealed: 3 of 64 shards missing (7, 19, 40). "
        "Re-run: python cli.py precompute --dataset acme/prefs --split train --model acme/tiny --revision main "
        f"--max-length 64 --dtype float32 --shard-size 4 --ref-store {tmp_path}"
    )
    for look in (open_store, verify):
        with pytest.raises(StoreError) as error:
            look(tmp_path)
        assert str(error.value) == message
    for index in (7, 19, 40):
        publish_shard(tmp_path, identity, *make_shard(identity, index), PROVENANCE)
    with pytest.raises(StoreError, match="is not sealed: all 64 shards are there, _manifest.json is missing"):
        open_store(tmp_path)


def test_any_changed_byte_of_a_shard_is_found(tmp_path):
    make_store(tmp_path)
    path = tmp_path / part_name(1)
    data = path.read_bytes()
    positions = {*range(40), *range(len(data) - 40, len(data)), *random.Random(0).sample(range(len(data)), 60)}
    for position in sorted(positions):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        with pytest.raises(StoreError, match="part-00001.parquet"):
            open_store(tmp_path, check="sha256")
        assert [Path(finding.where).name for finding in verify(tmp_path)] == [part_name(1)]
    path.write_bytes(data)
    assert open_store(tmp_path, check="sha256").num_pairs == 10 and verify(tmp_path) == []


def test_a_changed_list_of_files_is_found_at_any_depth(tmp_path):
    make_store(tmp_path)
    data = (tmp_path / part_name(1)).read_bytes()

    def refused(message: str) -> None:
        for check in ("none", "footers", "sha256"):
            with pytest.raises(StoreError, match=message):
                open_store(tmp_path, check=check)
        assert verify(tmp_path)

    (tmp_path / part_name(1)).write_bytes(data + b"\0")
    refused(f"part-00001.parquet: altered shard; expected {len(data):,} bytes; found {len(data) + 1:,} bytes. Restore the file, or")
    (tmp_path / part_name(2)).unlink()
    refused(r"2 files are not as sealed: part-00001.parquet \(altered shard\), part-00002.parquet \(shard is missing\)")
    (tmp_path / part_name(1)).unlink()
    make_store(tmp_path.joinpath("again"))
    for name in (part_name(1), part_name(2)):
        (tmp_path / "again" / name).rename(tmp_path / name)
    assert verify(tmp_path) == []
    for extra in (part_name(3), "old.parquet", "part-00001 (copy).parquet"):
        (tmp_path / extra).write_bytes(data)
        refused("extra shard: the manifest does not list it")
        (tmp_path / extra).unlink()
    (tmp_path / "README.md").write_text("notes beside the shards are nobody's business")
    assert open_store(tmp_path).num_pairs == 10


def test_a_shard_of_another_store_is_found_by_its_footer(tmp_path):
    make_store(tmp_path / "a")
    make_store(tmp_path / "b", dtype="float16")
    foreign = (tmp_path / "b" / part_name(1)).read_bytes()
    size = (tmp_path / "a" / part_name(1)).stat().st_size
    (tmp_path / "a" / part_name(1)).write_bytes(foreign)
    assert len(foreign) == size, "the sizes must agree for the footer to be what betrays it"
    open_store(tmp_path / "a", check="none")
    with pytest.raises(StoreError, match="part-00001.parquet: made with another dtype"):
        open_store(tmp_path / "a")


def test_a_shard_that_vanishes_while_open(tmp_path):
    make_store(tmp_path)
    opened = open_store(tmp_path)
    (tmp_path / part_name(0)).unlink()
    with pytest.raises(StoreError, match="part-00000.parquet: cannot be read"):
        opened.read([0])


def test_opening_imports_nothing_heavy(tmp_path):
    make_store(tmp_path)
    program = """if True:
        import sys
        from store.reader import open_store
        open_store(sys.argv[1], check="sha256").lengths()
        print(*{"torch", "transformers", "datasets", "pandas", "duckdb", "pyarrow.dataset"} & set(sys.modules))
    """
    code = Path(store.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=code, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_manifest_of_something_else_is_refused(tmp_path):
    (tmp_path / MANIFEST).write_text('{"name": "my web app"}')
    with pytest.raises(StoreError, match="not a manifest of refdpo"):
        open_store(tmp_path)


def test_a_store_whose_manifest_has_the_former_name_opens_as_ever(tmp_path):
    """Made by an earlier version: read, checked, looked at, gone on with, mended and copied; it never gets a second manifest."""
    made = make_store(tmp_path / "old", num_rows=8, shard_size=4)
    (tmp_path / "old" / MANIFEST).rename(tmp_path / "old" / "manifest.json")
    old = tmp_path / "old"
    names = sorted(file.name for file in old.iterdir())
    assert open_store(old, check="sha256").manifest == made and verify(old) == []
    assert "sealed, 2 shards" in summary(old) and status(old).sealed and len(connect(old).sql("from pairs").fetchall()) == 8
    prepare_store(old, made.identity)
    assert seal(old, made.identity, {}, None) == made
    push(old, f"file://{tmp_path}/there")
    (tmp_path / "there" / MANIFEST).rename(tmp_path / "there" / "manifest.json")
    push(old, f"file://{tmp_path}/there")
    assert pull(f"file://{tmp_path}/there", tmp_path / "back") == made and (tmp_path / "back" / MANIFEST).exists()
    assert sorted(file.name for file in old.iterdir()) == names
    assert sorted(file.name for file in (tmp_path / "there").iterdir()) == sorted([*names, "README.md"])
    (old / part_name(1)).unlink()
    with pytest.raises(StoreError, match=r"part-00001.parquet: shard is missing.*delete it and \S+/old/manifest.json"):
        open_store(old)
