"""Publishing and sealing: nothing wrong is written, nothing half-written is visible, whatever kills the writer."""

import errno
import gc
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from held import shard_held
from store_samples import PROVENANCE, make_identity, make_shard, make_store, memory_folder

from store import disk
from store.claim import claim
from store.errors import InputError, StoreError
from store.folder import missing_shards, prepare_store
from store.manifest import MANIFEST
from store.reader import open_store
from store.schema import SCHEMA
from store.seal import seal
from store.shard import finished_shards, part_name, parts_in, publish_shard, read_footer
from store.verify import verify

processes = multiprocessing.get_context("fork")  # a fresh interpreter per worker would take most of the time here
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture
def tmp_path():
    yield from memory_folder()


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in parts_in(path)}


def leftovers(path: Path) -> list[str]:
    return sorted(file.name for file in (path / disk.STAGING).iterdir() if file.name != "identity.json")


# --- one shard


def test_footers_that_were_read_do_not_stay_in_memory(tmp_path):
    """pyarrow's footer and its `schema` hold each other: a store of thousands of shards would keep hundreds of MB until the collector runs."""
    identity = make_identity()
    prepare_store(tmp_path, identity)
    report, table = make_shard(identity, 1)
    publish_shard(tmp_path, identity, report, table, {})
    gc.collect()
    gc.disable()
    try:
        before = sum(type(each) is pq.FileMetaData for each in gc.get_objects())
        read_footer(tmp_path / part_name(1))
        assert sum(type(each) is pq.FileMetaData for each in gc.get_objects()) == before
    finally:
        gc.enable()


def test_footer_says_what_the_shard_is(tmp_path):
    identity = make_identity()
    prepare_store(tmp_path, identity)
    report, table = make_shard(identity, 1, unscorable=(6,))
    assert publish_shard(tmp_path, identity, report, table, PROVENANCE)
    assert read_footer(tmp_path / part_name(1)) == (identity, report)
    assert pq.ParquetFile(tmp_path / part_name(1)).read().equals(table)
    assert finished_shards(tmp_path, identity) == {1}
    assert missing_shards(tmp_path, identity) == [0, 2]


def test_bytes_depend_on_the_content_alone(tmp_path):
    make_store(tmp_path / "a", num_rows=200, shard_size=100)
    identity = make_identity(num_rows=200, shard_size=100)
    prepare_store(tmp_path / "b", identity)
    for index in (1, 0):  # another order, other provenance, a table in pieces
        report, table = make_shard(identity, index)
        pieces = pa.concat_tables([table.slice(0, 33), table.slice(33)])
        publish_shard(tmp_path / "b", identity, report, pieces, {"host": "elsewhere", "seconds": 1e9})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_first_to_publish_wins(tmp_path):
    identity = make_identity()
    prepare_store(tmp_path, identity)
    assert publish_shard(tmp_path, identity, *make_shard(identity, 0, seed=0), PROVENANCE)
    first = contents(tmp_path)
    assert not publish_shard(tmp_path, identity, *make_shard(identity, 0, seed=1), {**PROVENANCE, "worker": "late"})
    assert contents(tmp_path) == first
    for index in (1, 2):
        publish_shard(tmp_path, identity, *make_shard(identity, index), PROVENANCE)
    assert seal(tmp_path, identity, {}, None).provenance["shards_by_worker"] == {"n1:0": 3}
    open_store(tmp_path, check="sha256")


def cell(name: str, row: int, change):
    """A function that changes one value of a table."""

    def spoil(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = change(values[row])
        field = SCHEMA.field(name)
        return table.set_column(table.column_names.index(name), field, pa.array(values, field.type))

    return spoil


def empty_chosen(table: pa.Table) -> pa.Table:
    for name, nothing in (("chosen_ids", []), ("chosen_token_logps", []), ("num_chosen_tokens", 0), ("ref_chosen_logps", 0.0)):
        table = cell(name, 0, lambda _, nothing=nothing: nothing)(table)
    return table


def in_float64(table: pa.Table) -> pa.Table:
    column = table["chosen_token_logps"].cast(pa.list_(pa.float64()))
    return table.set_column(table.column_names.index("chosen_token_logps"), "chosen_token_logps", column)


# The shard holds rows 4 to 7.
WRONG = {
    "a nan log-prob": (cell("chosen_token_logps", 2, lambda v: [math.nan, *v[1:]]), "row 6 .*chosen_token_logps: nan at token 0"),
    "an infinite sum": (cell("ref_rejected_logps", 1, lambda v: -math.inf), "row 5 .*column ref_rejected_logps: -inf"),
    "another sum": (cell("ref_chosen_logps", 3, lambda v: v + 1e-4), "row 7 .*ref_chosen_logps is .*its tokens sum to"),
    "a count too many": (cell("num_prompt_tokens", 0, lambda v: v + 1), "row 4 .*num_prompt_tokens is .*prompt_ids has"),
    "a log-prob too few": (cell("rejected_token_logps", 0, lambda v: v[:-1]), "row 4 .*num_rejected_tokens is .*token_logps has"),
    "no completion": (empty_chosen, "row 4 .*chosen is empty"),
    "a negative id": (cell("prompt_ids", 1, lambda v: [-100, *v[1:]]), "row 5 .*prompt_ids has -100"),
    "a null": (cell("chosen_token_logps", 1, lambda v: [None, *v[1:]]), "column chosen_token_logps: has nulls"),
    "a row twice": (lambda t: pa.concat_tables([t[:1], t[:3]]), "rows 7: neither scored nor listed.*rows 4: more than once"),
    "a row of another block": (cell("row", 3, lambda v: 8), "rows 7: neither scored.*rows 8: outside the block"),
    "another order": (lambda t: t.take([1, 0, 2, 3]), "rows are not in ascending order"),
    "a pair missing": (lambda t: t[1:], "report says 4 pairs, the table has 3"),
    "float64 log-probs": (in_float64, "column chosen_token_logps should be"),
    "a column missing": (lambda t: t.drop_columns(["row"]), "column row is missing"),
    "a column more": (lambda t: t.append_column("beta", pa.array([0.1] * 4)), "unknown column beta"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_shard_is_refused_and_leaves_nothing(tmp_path, kind):
    spoil, message = WRONG[kind]
    identity = make_identity()
    prepare_store(tmp_path, identity)
    report, table = make_shard(identity, 1)
    with pytest.raises(StoreError, match=message):
        publish_shard(tmp_path, identity, report, spoil(table), PROVENANCE)
    assert contents(tmp_path) == {} and leftovers(tmp_path) == []


def test_a_sequence_beyond_max_length_is_refused(tmp_path):
    report, table = make_shard(make_identity(), 0)
    identity = make_identity(max_length=8)
    prepare_store(tmp_path, identity)
    with pytest.raises(StoreError, match="row 0 .*tokens, max_length is 8"):
        publish_shard(tmp_path, identity, report, table, PROVENANCE)


@pytest.mark.parametrize("failing", ["tmp", "json", "parquet"])
def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch, failing):
    """The disk refuses the shard's bytes, its sidecar, or the final name."""
    identity = make_identity()
    prepare_store(tmp_path, identity)

    def refuse(*paths) -> None:
        if str(paths[-1]).endswith(failing):
            raise OSError(errno.EIO, "Input/output error")

    real_fsync, real_link = os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda fd: refuse(os.readlink(f"/proc/self/fd/{fd}")) or real_fsync(fd))
    monkeypatch.setattr(os, "link", lambda source, target: refuse(target) or real_link(source, target))
    with pytest.raises(StoreError, match="part-00000.parquet: cannot be written; found .*Input/output error"):
        publish_shard(tmp_path, identity, *make_shard(identity, 0), PROVENANCE)
    assert contents(tmp_path) == {} and leftovers(tmp_path) == []


def test_file_systems_without_links(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    make_store(tmp_path)
    assert verify(tmp_path) == []
    before = contents(tmp_path)
    assert not publish_shard(tmp_path, make_identity(), *make_shard(make_identity(), 0, seed=1), PROVENANCE)
    assert contents(tmp_path) == before


# --- the folder


def test_where_a_store_may_be_made(tmp_path):
    identity = make_identity()
    prepare_store(tmp_path / "deep" / "new", identity)
    prepare_store(tmp_path / "deep" / "new", identity)  # a second worker
    (tmp_path / "empty").mkdir()
    prepare_store(tmp_path / "empty", identity)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    prepare_store(tmp_path / "link", identity)
    make_store(tmp_path / "sealed")
    for path in ("empty", "sealed"):
        with pytest.raises(StoreError, match="made with another max length"):
            prepare_store(tmp_path / path, make_identity(max_length=7))


def test_two_runs_of_different_identity_cannot_share_a_folder(tmp_path, monkeypatch):
    """Both find the folder empty; the second to write is told."""
    real = disk.write_new

    def too_late(path, data):
        monkeypatch.setattr(disk, "write_new", real)
        prepare_store(tmp_path, make_identity(max_length=50))
        real(path, data)

    monkeypatch.setattr(disk, "write_new", too_late)
    with pytest.raises(StoreError, match="expected max_length 60 .this run.; found max_length 50"):
        prepare_store(tmp_path, make_identity(max_length=60))


def test_where_no_store_is_made(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    make_store(tmp_path / "shelf" / "think")
    make_store(tmp_path / "shelf" / "chat")
    for path, message in (
        ("thesis", "neither empty nor a reference store; nothing was touched; found chapter.tex"),
        ("file", "a file, not a folder"),
        ("shelf", "shelf/ is the shelf, not a dataset; on it: chat, think"),
    ):
        with pytest.raises(InputError, match=message):
            prepare_store(tmp_path / path, make_identity())
    assert [file.name for file in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    code = Path(disk.__file__).parent
    with pytest.raises(InputError, match="store/ is the shelf, not a dataset; on it: "):
        prepare_store(code, make_identity())


def test_other_peoples_parquet_is_left_alone(tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "part-00000.parquet")
    with pytest.raises(StoreError, match="part-00000.parquet: not a shard of refdpo"):
        prepare_store(tmp_path, make_identity())
    assert [file.name for file in tmp_path.iterdir()] == ["part-00000.parquet"]


def test_a_foreign_or_damaged_shard_stops_the_worker(tmp_path):
    identity = make_identity()
    make_store(tmp_path, identity)
    good = (tmp_path / part_name(1)).read_bytes()
    for data, message in (
        (good[: len(good) // 2], "not a readable Parquet file"),
        (b"", "not a readable Parquet file"),
        ((tmp_path / part_name(0)).read_bytes(), "footer and file disagree"),
    ):
        (tmp_path / part_name(1)).write_bytes(data)
        with pytest.raises(StoreError, match=f"part-00001.parquet: {message}"):
            finished_shards(tmp_path, identity)
    (tmp_path / part_name(1)).write_bytes(good)
    with pytest.raises(StoreError, match="dtype bfloat16 .this run.*dtype float32 .there"):
        finished_shards(tmp_path, make_identity(dtype="bfloat16"))


def test_shards_survive_the_loss_of_the_manifest(tmp_path):
    """What the error messages advise: delete a shard and the manifest, run again."""
    identity = make_identity()
    make_store(tmp_path)
    before = contents(tmp_path)
    for gone in ([MANIFEST], [MANIFEST, part_name(2)], [part_name(0)]):
        for name in gone:
            (tmp_path / name).unlink()
        prepare_store(tmp_path, identity)
        for index in missing_shards(tmp_path, identity):
            held = claim(tmp_path, index)
            publish_shard(tmp_path, identity, *make_shard(identity, index), PROVENANCE)
            held.release()
        seal(tmp_path, identity, {}, "demo")
        assert contents(tmp_path) == before and verify(tmp_path) == []


# --- sealing


def test_sealing_needs_every_shard(tmp_path):
    identity = make_identity(num_rows=60)
    prepare_store(tmp_path, identity)
    for index in set(range(15)) - {3, 7}:
        publish_shard(tmp_path, identity, *make_shard(identity, index), PROVENANCE)
    message = r"is not sealed: 2 of 15 shards missing \(3, 7\). Re-run: python cli.py precompute --dataset acme/prefs "
    with pytest.raises(StoreError, match=message):
        seal(tmp_path, identity, {}, None)
    assert not (tmp_path / MANIFEST).exists()


def test_sealing_trusts_sidecars_only_when_they_fit(tmp_path, monkeypatch):
    identity = make_identity(num_rows=16)
    prepare_store(tmp_path, identity)
    for index in range(4):
        publish_shard(tmp_path, identity, *make_shard(identity, index), PROVENANCE)
    notes = sorted((tmp_path / disk.STAGING).glob("part-*.json"))
    notes[0].unlink()
    notes[1].write_text("{}")
    other = json.loads(notes[2].read_text())
    notes[2].write_text(json.dumps({**other, "size": other["size"] + 1, "sha256": "0" * 64}))
    hashed = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or real(file, name))
    manifest = seal(tmp_path, identity, {}, None)
    assert sorted(Path(name).name for name in hashed) == [part_name(0), part_name(1), part_name(2)]
    assert manifest.provenance["shards_without_provenance"] == 3
    assert [shard.sha256 for shard in manifest.shards] == [hashlib.sha256(data).hexdigest() for data in contents(tmp_path).values()]
    assert not (tmp_path / disk.STAGING).exists()
    assert seal(tmp_path, identity, {}, None) == manifest  # again: the same


def test_sealing_while_another_worker_finishes_it(tmp_path, monkeypatch):
    """The other one removes the staging folder under our hands."""
    make_store(tmp_path)
    (tmp_path / MANIFEST).unlink()
    real = disk.write_new

    def too_late(path, data):
        monkeypatch.setattr(disk, "write_new", real)
        seal(tmp_path, make_identity(), {"layout": "padded"}, None)
        real(path, data)

    monkeypatch.setattr(disk, "write_new", too_late)
    assert seal(tmp_path, make_identity(), {"layout": "packed"}, None).provenance["layout"] == "padded"


def seal_at_once(path, barrier):
    barrier.wait()
    seal(path, make_identity(), {}, None)


def test_workers_may_seal_at_once(tmp_path):
    for round in range(4):
        path = tmp_path / str(round)
        make_store(path)
        (path / MANIFEST).unlink()
        barrier = processes.Barrier(3)
        workers = [processes.Process(target=seal_at_once, args=(path, barrier)) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
        assert verify(path) == [] and not (path / disk.STAGING).exists()


# --- kill -9


def die_at(path: Path, event: int) -> None:
    """From here on this process is killed at its `event`-th file operation inside `path`."""
    operations = {"open", "os.link", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.scandir"}
    seen = 0

    def count(name: str, arguments: tuple) -> None:
        nonlocal seen
        if name in operations and str(path) in str(arguments[0]):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def make_and_die(path: Path, event: int) -> None:
    """Make a whole store, but be killed on the way."""
    die_at(path, event)
    make_store(path, num_rows=8)


def make_without_opening_final_names(path: Path) -> None:
    def watch(name: str, arguments: tuple) -> None:
        final = name == "open" and str(arguments[0]).startswith(str(path)) and Path(arguments[0]).parent == path
        if final and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            os._exit(5)

    sys.addaudithook(watch)
    make_store(path)


def test_final_names_are_never_written_to(tmp_path):
    """A file under its final name is complete because it got that name complete."""
    worker = processes.Process(target=make_without_opening_final_names, args=(tmp_path / "s",))
    worker.start()
    worker.join()
    assert worker.exitcode == 0


def check_survivor(path: Path, expected: dict[str, bytes]) -> None:
    """What a kill left is either nothing or right, and a re-run completes it."""
    present = contents(path) if path.exists() else {}
    assert all(data == expected[name] for name, data in present.items())
    if (path / MANIFEST).exists():
        assert verify(path) == []
    make_store(path, num_rows=8)
    assert contents(path) == expected and verify(path) == []


def test_killed_at_every_file_operation(tmp_path):
    make_store(tmp_path / "whole", num_rows=8)
    expected = contents(tmp_path / "whole")
    event, killed = 0, True
    while killed:
        event += 1
        path = tmp_path / f"killed-{event}"
        worker = processes.Process(target=make_and_die, args=(path, event))
        worker.start()
        worker.join()
        killed = worker.exitcode == -signal.SIGKILL
        assert killed or worker.exitcode == 0
        check_survivor(path, expected)
    assert event > 25


def work(path: Path, identity) -> None:
    """A worker as precompute has them: claim, score, publish, seal."""
    prepare_store(path, identity)
    while missing := missing_shards(path, identity):
        for index in missing:
            if held := claim(path, index):
                publish_shard(path, identity, *make_shard(identity, index), PROVENANCE)
                held.release()
    seal(path, identity, {}, "demo")


def work_and_die(path: Path, identity, event: int) -> None:
    die_at(path, event)
    work(path, identity)


def test_killed_at_random_while_others_work(tmp_path):
    """Two of three, wherever the others are then. The third is spared and must finish, alone if need be."""
    identity = make_identity(num_rows=120, max_length=400)
    work(tmp_path / "whole", identity)
    chance = random.Random(0)
    for round in range(5):
        path = tmp_path / str(round)
        with shard_held(path, chance.randrange(identity.num_shards)):  # till both are dead there is something left to ask for
            spared = processes.Process(target=work, args=(path, identity))
            victims = [processes.Process(target=work_and_die, args=(path, identity, chance.randrange(1, 150))) for _ in range(2)]
            for worker in (*victims, spared):
                worker.start()
            for victim in victims:
                victim.join()
                assert victim.exitcode == -signal.SIGKILL
        spared.join()
        assert spared.exitcode == 0
        assert contents(path) == contents(tmp_path / "whole") and verify(path) == []


# --- disks that refuse


def mount(arguments: list[str], where: Path) -> None:
    if os.geteuid() != 0 or subprocess.run(["mount", *arguments, str(where)], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs root and mount")


def test_disk_full_keeps_what_is_finished(tmp_path):
    identity = make_identity(num_rows=40, shard_size=10, max_length=2000)
    mount(["-t", "tmpfs", "-o", "size=300k", "refdpo-test"], tmp_path)
    try:
        path = tmp_path / "store"
        prepare_store(path, identity)
        with pytest.raises(StoreError, match=r"part-0000\d.parquet: disk full .* while writing. Finished shards are kept"):
            for index in range(4):
                publish_shard(path, identity, *make_shard(identity, index), PROVENANCE)
        done = finished_shards(path, identity)
        assert done and len(done) < 4
        assert not list((path / disk.STAGING).glob("*.tmp")) and len(list((path / disk.STAGING).glob("part-*.json"))) == len(done)
        subprocess.run(["mount", "-o", "remount,size=3m", str(tmp_path)], check=True)
        work(path, identity)
        assert verify(path) == []
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_read_only_folder(tmp_path):
    identity = make_identity()
    make_store(tmp_path / "sealed")
    prepare_store(tmp_path / "begun", identity)
    mount(["--bind", str(tmp_path)], tmp_path)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path)], check=True)
        for attempt in (
            lambda: prepare_store(tmp_path / "new", identity),
            lambda: claim(tmp_path / "begun", 0),
            lambda: publish_shard(tmp_path / "begun", identity, *make_shard(identity, 0), PROVENANCE),
        ):
            with pytest.raises(StoreError, match="cannot write here; found read-only file system. Choose a --ref-store"):
                attempt()
        prepare_store(tmp_path / "sealed", identity)  # nothing to do, hence nothing to write
        assert open_store(tmp_path / "sealed", check="sha256").num_pairs == 10 and verify(tmp_path / "sealed") == []
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
