"""Whatever happens, a sealed store is right and an unsealed one continues. The short form of benchmarks/faults.py, and faults of other kinds."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner
from held import shard_held
from store_samples import PROVENANCE, make_identity, make_shard, make_store, memory_folder

import cli
from benchmarks import faults
from store import claim as claims
from store import disk
from store.claim import CLAIM_EXPIRES_S, claim
from store.errors import StoreError
from store.folder import prepare_store
from store.manifest import MANIFEST
from store.reader import open_store
from store.seal import seal
from store.shard import part_name, publish_shard
from store.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

ROOT = Path(__file__).parents[1]
NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting and changing the user need root")


@pytest.fixture
def tmp_path():
    yield from memory_folder()


# --- kills, failing calls, damage


def test_random_kills_change_nothing(tmp_path):
    assert faults.random_kills(tmp_path, kills=12, seed=1, num_shards=12).cases == 12


def test_a_kill_at_any_call_into_the_file_system_changes_nothing(tmp_path):
    assert faults.kill_at_every_call(tmp_path, num_shards=1).cases > 30


def test_a_failing_call_is_an_error_line_and_nothing_is_half_written(tmp_path):
    assert faults.fail_every_call(tmp_path, numbers=(errno.EIO,)).cases > 20


def test_all_damage_is_found(tmp_path):
    assert sum(result.cases for result in faults.damage_everything(tmp_path, flips=20)) > 150


# --- disks


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "none", str(folder)], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@needs_root
def test_a_full_disk_keeps_what_is_finished_and_goes_on_when_there_is_space(small_disk, tmp_path):
    identity, store = make_identity(num_rows=120, shard_size=4), small_disk / "store"
    with pytest.raises(StoreError, match="disk full or quota reached while writing.*Finished shards are kept"):
        faults.work(store, identity)
    published = list(store.glob("*.parquet"))
    assert 0 < len(published) < 30 and not list((store / disk.STAGING).glob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    faults.work(store, identity)
    assert faults.content(store) == faults.undisturbed(tmp_path, identity)


@needs_root
def test_a_read_only_disk_is_refused_by_name_yet_a_sealed_store_on_it_can_be_used(small_disk):
    identity, store = make_identity(), small_disk / "store"
    make_store(store, identity)
    prepare_store(small_disk / "unsealed", identity)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError, match="cannot write here; found read-only file system.*Choose a --ref-store"):
        faults.work(small_disk / "unsealed", identity)
    faults.work(store, identity)
    assert verify(store) == [] and open_store(store, check="sha256").num_pairs == 10


@needs_root
def test_lost_permission_is_refused_by_name(tmp_path, capfd):
    """As another user: root may do everything."""
    tmp_path.chmod(0o755)
    identity, store = make_identity(), tmp_path / "store"
    make_store(store, identity)
    (store / MANIFEST).unlink()
    (store / part_name(1)).unlink()

    def as_nobody():
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        faults.work(store, identity)

    for mode in (0o644, 0o600):
        (store / part_name(0)).chmod(mode)
        worker = faults.start(as_nobody)
        worker.join()
        assert worker.exitcode == 3
        assert re.search(
            "Error: .*(cannot write here; found permission denied|may not be read|not a readable)", capfd.readouterr().err
        )
    faults.work(store, identity)
    assert verify(store) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_hard_links_is_served_by_rename(tmp_path, monkeypatch, number):
    def no_links(source, target, **options):
        raise OSError(number, os.strerror(number))

    expected = faults.undisturbed(tmp_path, make_identity())
    monkeypatch.setattr(os, "link", no_links)
    faults.work(tmp_path / "store", make_identity())
    faults.check_whole(tmp_path / "store", expected)


# --- several jobs, clocks, what a dead host leaves


def test_two_jobs_of_another_identity_at_once_one_wins_and_the_other_is_refused(tmp_path):
    for round in range(5):
        store = tmp_path / str(round)
        jobs = [
            faults.start(faults.work, store, make_identity(num_rows=16, dtype=dtype), 0.0, 0.001)
            for dtype in ("float32", "bfloat16", "float32")
        ]
        for job in jobs:
            job.join()
        codes = [job.exitcode for job in jobs]
        assert codes in ([0, 3, 0], [3, 0, 3])
        assert verify(store) == []
        assert open_store(store).identity.dtype == ("float32" if codes[0] == 0 else "bfloat16")


@pytest.mark.parametrize("jump", [-10 * 86400, -CLAIM_EXPIRES_S - 60, CLAIM_EXPIRES_S + 60, 10 * 86400], ids="{:+d} s".format)
def test_a_clock_that_jumps_costs_work_at_most(tmp_path, jump):
    """Every claim in hand suddenly looks far older, or from the future; the holders, alive, publish all the same."""
    identity = make_identity(num_rows=12, shard_size=1)
    expected = faults.undisturbed(tmp_path, identity)
    store = tmp_path / "store"
    workers = [faults.start(faults.work, store, identity, 0.3 * i, 0.005) for i in range(3)]
    while any(worker.is_alive() for worker in workers):
        with contextlib.suppress(FileNotFoundError):  # claims come and go
            for path in (store / disk.STAGING).glob("*.claim-*"):
                os.utime(path, (time.time() + jump, time.time() + jump))
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    faults.check_whole(store, expected)


def test_what_a_dead_host_left_is_taken_over_when_its_claims_expire(tmp_path, monkeypatch):
    identity = make_identity(num_rows=6, shard_size=1)
    expected = faults.undisturbed(tmp_path, identity)
    store = tmp_path / "store"
    prepare_store(store, identity)
    publish_shard(store, identity, *make_shard(identity, 0), PROVENANCE)
    for index in (1, 2):
        held = claim(store, index)
        held.path.write_text(json.dumps({"host": "gone", "pid": os.getpid()}))
    held.path.write_text("")  # killed before it had signed
    for name in (
        "part-00001.parquet.gone.7.12345678.tmp",
        "part-00001.parquet.gone.7.12345678.json",
        "manifest.json.gone.7.12345678.tmp",
    ):
        (store / disk.STAGING / name).write_bytes(b'{"size": 17, ')
    assert claim(store, 1) is None  # it may be alive, for all this host can know
    monkeypatch.setattr(claims, "CLAIM_EXPIRES_S", 0.3)
    faults.work(store, identity)
    faults.check_whole(store, expected)


def test_a_claim_that_somebody_forged_is_no_traceback(tmp_path):
    prepare_store(tmp_path, make_identity())
    for nonsense in (
        "[]",
        "{}",
        '{"host": 1, "pid": "x"}',
        json.dumps({"host": os.uname().nodename, "pid": 10**30}),
        '{"host": null}',
        "\udcff",
    ):
        path = claim(tmp_path, 0).path
        path.write_bytes(nonsense.encode(errors="surrogateescape"))
        os.utime(path, (0, 0))
        again = claim(tmp_path, 0)
        assert again is not None
        again.release()


# --- where stores lie


@pytest.mark.parametrize("name", ["with space", "Größe-データ-🙂", "quote'\"s", "-dash", "new\nline", "percent%20$HOME"])
def test_a_store_on_any_path(tmp_path, name):
    store = tmp_path / name / "store"
    faults.work(store, make_identity())
    assert verify(store) == []
    for command in (["inspect", "--sql", "select count(*) as n from tokens"], ["inspect"], ["verify"], ["status"]):
        result = CliRunner().invoke(cli.main, [command[0], "--ref-store", str(store), *command[1:]])
        assert result.exit_code == 0, result.output


def test_symlinked_moved_and_copied_stores(tmp_path):
    real, link = tmp_path / "scratch" / "real", tmp_path / "link"
    real.mkdir(parents=True)
    link.symlink_to(real)
    faults.work(link, make_identity())
    expected = faults.content(real)
    assert verify(link) == [] and link.is_symlink() and open_store(link, check="sha256").num_pairs == 10
    real.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "copied")
    for place in ("moved", "copied"):
        faults.check_whole(tmp_path / place, expected)
        assert open_store(tmp_path / place, check="sha256").read([9, 0]).num_rows == 2


# --- models, tokenizers, rows that are not what they were


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"prompt": f"Why {word}?", "chosen": f" Because {word}.", "rejected": f" Not {word}!"}
    for word in ("fox", "dog", "list", "answer", "user", "42")
]


def precompute(rows: Path, model: Path, store: Path, *more: str):
    options = {
        "--dataset": rows,
        "--model": model,
        "--max-length": 64,
        "--dtype": "float32",
        "--shard-size": 2,
        "--ref-store": store,
    }
    return CliRunner().invoke(cli.main, ["precompute", *(str(word) for pair in options.items() for word in pair), *more])


def refused(result, *words: str) -> None:
    assert result.exit_code in (1, 2), result.output
    errors = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1 and "Traceback" not in result.output, result.output
    for word in words:
        assert word in errors[0], errors[0]


def files(store: Path) -> dict[str, str]:
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in store.rglob("*") if path.is_file()
    }


@pytest.fixture
def half_done(tmp_path, tiny_llama):
    """A store with its last shard and manifest missing: the next run wants to go on with it."""
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    result = precompute(rows, tiny_llama, tmp_path / "store")
    assert result.exit_code == 0, result.output
    whole = files(tmp_path / "store")
    for name in (MANIFEST, part_name(2)):
        (tmp_path / "store" / name).unlink()
    return rows, tiny_llama, tmp_path / "store", whole


def test_changed_inputs_are_refused_by_name(half_done, tmp_path):
    rows, model, store, whole = half_done
    before = files(store)
    edited = [dict(row) for row in ROWS]
    edited[3]["rejected"] += " "
    swapped = [*ROWS[:4], ROWS[5], ROWS[4]]
    for changed, words in (
        (edited, ["dataset (its rows differ)", "dataset_fingerprint"]),
        (swapped, ["dataset (its rows differ)", "dataset_fingerprint"]),
        ([*ROWS, ROWS[0]], ["dataset (its rows differ)", "number of rows", "num_rows 7", "num_rows 6"]),
    ):
        refused(precompute(write_rows(tmp_path / "changed.jsonl", changed), model, store), *words)

    one_merge = tmp_path / "one-merge"
    shutil.copytree(model, one_merge)
    tokenizer = json.loads((one_merge / "tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]
    (one_merge / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(precompute(rows, one_merge, store), "made with another tokenizer", "tokenizer_sha256")

    one_bit = tmp_path / "one-bit"
    shutil.copytree(model, one_bit)
    weights = bytearray((one_bit / "model.safetensors").read_bytes())
    weights[-1000] ^= 1
    (one_bit / "model.safetensors").write_bytes(weights)
    refused(precompute(rows, one_bit, store), "made with another model (its weights differ)", str(one_bit), str(model))

    assert {name: digest for name, digest in files(store).items() if not name.startswith(".staging")} == before
    assert precompute(rows, model, store).exit_code == 0
    assert {name: digest for name, digest in files(store).items() if name != MANIFEST} == {
        n: d for n, d in whole.items() if n != MANIFEST
    }


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_model_that_fails_on_some_rows_never_gets_them_into_a_store(tmp_path, value, layout):
    """The embedding of the token for `4` is broken: only row 5 has it. Its shard is not written, the others are."""
    model = tiny.make_model("qwen2")
    tokenizer = tiny.make_tokenizer()
    four = tokenizer.convert_tokens_to_ids("4")
    used = {token for row in ROWS[:4] for text in row.values() for token in tokenizer(text)["input_ids"]}
    assert four not in used
    model.get_input_embeddings().weight[four] = float(value)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    if layout == "packed":  # the self-test draws random tokens and may meet the broken one: that refusal is right too
        result = precompute(rows, tmp_path / "model", tmp_path / "store", "--layout", layout)
        refused(result, "nan")
    else:
        refused(
            precompute(rows, tmp_path / "model", tmp_path / "store", "--layout", layout),
            "refused to write a wrong shard",
            "row 5",
            "nan",
        )
        assert sorted(path.name for path in (tmp_path / "store").glob("*.parquet")) == [part_name(0), part_name(1)]
    assert not (tmp_path / "store" / MANIFEST).exists()


# --- told to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_worker_told_to_stop_releases_its_claims_and_says_how_to_go_on(tmp_path, tiny_llama, number):
    """SIGTERM drops the shard at hand, SIGUSR1 finishes it; either way exit code 75 and nothing that the next run has to wait for."""
    rows = write_rows(tmp_path / "rows.jsonl", [row | {"chosen": row["chosen"] * 40} for row in ROWS * 20])
    argv = [
        "--dataset",
        rows,
        "--model",
        tiny_llama,
        "--max-length",
        512,
        "--dtype",
        "float32",
        "--shard-size",
        1,
        "--tokens-per-batch",
        16,
    ]
    argv = [sys.executable, ROOT / "cli.py", "precompute", *argv, "--ref-store", tmp_path / "store", "--num-workers", 2]
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with shard_held(tmp_path / "store", 0):
        run = subprocess.Popen([str(word) for word in argv], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not list((tmp_path / "store").glob("*.parquet")):
            assert run.poll() is None, run.communicate()[1]
            time.sleep(0.01)
        run.send_signal(number)
        _, err = run.communicate(timeout=600)
    assert run.returncode == 75, err
    assert f"stopped by {number.name}" in err and "Run the same command again" in err and "Traceback" not in err
    staging = tmp_path / "store" / disk.STAGING
    assert not list(staging.glob("*.claim-*")) and not list(staging.glob("*.tmp"))
    assert 0 < len(list((tmp_path / "store").glob("*.parquet"))) < 120


def test_sealing_is_done_by_one_worker_while_the_others_wait(tmp_path):
    identity = make_identity()
    prepare_store(tmp_path, identity)
    for index in range(identity.num_shards):
        publish_shard(tmp_path, identity, *make_shard(identity, index), PROVENANCE)
    held = claims.claim_sealing(tmp_path)
    assert held is not None and claims.claim_sealing(tmp_path) is None
    seal(tmp_path, identity, {}, None)
    held.release()
    assert claims.claim_sealing(tmp_path) is None
