"""Claims: at most one fresh claim per shard, and none that outlives its holder."""

import errno
import multiprocessing
import os
import signal
import time

import pytest
from store_samples import PROVENANCE, make_identity, make_shard, memory_folder

from store import claim as claims
from store import disk
from store.claim import CLAIM_EXPIRES_S, claim, claim_sealing
from store.errors import StoreError
from store.folder import prepare_store
from store.manifest import MANIFEST
from store.shard import publish_shard

processes = multiprocessing.get_context("fork")  # a fresh interpreter per worker would take most of the time here
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

SHARDS = 150


@pytest.fixture
def tmp_path():
    yield from memory_folder()


@pytest.fixture
def path(tmp_path):
    prepare_store(tmp_path, make_identity(num_rows=SHARDS, shard_size=1))
    return tmp_path


def age(held, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(held.path, (then, then))


def test_a_claim_excludes_until_released(path):
    held = claim(path, 0)
    assert claim(path, 0) is None
    assert claim(path, 1) is not None
    held.release()
    assert claim(path, 0) is not None


def test_a_finished_shard_cannot_be_claimed(path):
    identity = make_identity(num_rows=SHARDS, shard_size=1)
    publish_shard(path, identity, *make_shard(identity, 0), PROVENANCE)
    assert claim(path, 0) is None
    assert not list((path / disk.STAGING).glob("*.claim*"))


def test_a_shard_finished_while_it_was_being_claimed(path, monkeypatch):
    identity = make_identity(num_rows=SHARDS, shard_size=1)
    real = claims._create

    def too_late(claimed, signature):
        publish_shard(path, identity, *make_shard(identity, 0), PROVENANCE)
        real(claimed, signature)

    monkeypatch.setattr(claims, "_create", too_late)
    assert claim(path, 0) is None
    assert not list((path / disk.STAGING).glob("*.claim*"))


def test_a_claim_expires_unless_refreshed(path):
    held = claim(path, 0)
    age(held, CLAIM_EXPIRES_S - 60)
    assert claim(path, 0) is None
    age(held, CLAIM_EXPIRES_S + 60)
    held.refresh()
    assert claim(path, 0) is None
    age(held, CLAIM_EXPIRES_S + 60)
    taken = claim(path, 0)
    assert taken is not None and taken != held
    held.refresh()  # the first holder wakes up: the claim is no longer its
    held.release()
    assert claim(path, 0) is None
    taken.release()
    assert claim(path, 0) is not None


def test_a_claim_from_the_future_is_stale(path):
    """Somebody set the file server's clock back: without this the claim would hold for as long."""
    held = claim(path, 0)
    age(held, -CLAIM_EXPIRES_S - 60)
    assert claim(path, 0) is not None


def test_a_full_disk_leaves_no_claim_behind(path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreError, match="disk full"):
        claim(path, 0)
    monkeypatch.undo()
    assert claim(path, 0) is not None


def test_sealing_is_claimed_once(path):
    held = claim_sealing(path)
    assert held is not None and claim_sealing(path) is None
    held.release()
    (path / MANIFEST).write_text("{}")
    assert claim_sealing(path) is None


def test_a_claim_whose_writer_died_before_signing_it_expires(path):
    held = claim(path, 0)
    held.path.write_bytes(b"")
    assert claim(path, 0) is None
    age(held, CLAIM_EXPIRES_S + 60)
    assert claim(path, 0) is not None


def test_claims_of_a_sealed_store_are_gone(path):
    held = claim(path, 0)
    for file in (path / disk.STAGING).iterdir():
        file.unlink()
    (path / disk.STAGING).rmdir()
    held.refresh()
    held.release()
    assert claim(path, 1) is None


def claim_and_wait(path, ready):
    claim(path, 0)
    ready.set()
    time.sleep(600)


def test_a_killed_holder_loses_its_claim_at_once(path):
    ready = processes.Event()
    worker = processes.Process(target=claim_and_wait, args=(path, ready))
    worker.start()
    ready.wait()
    assert claim(path, 0) is None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert claim(path, 0) is not None


def test_a_stale_claim_is_taken_over_once(path, monkeypatch):
    """Two workers see it stale; one takes it over before the other acts on what it saw."""
    age(claim(path, 0), CLAIM_EXPIRES_S + 60)
    others = []
    real = claims._stale

    def judged(*arguments):
        monkeypatch.setattr(claims, "_stale", real)
        verdict = real(*arguments)
        others.append(claim(path, 0))
        return verdict

    monkeypatch.setattr(claims, "_stale", judged)
    assert claim(path, 0) is None
    assert others[0] is not None


def claim_all(path, barrier, won):
    mine = []
    barrier.wait()
    for index in range(SHARDS):
        if claim(path, index) is not None:
            mine.append(index)
    won.put(mine)
    barrier.wait()  # stay alive: a dead holder's claims may be taken over


@pytest.mark.parametrize("stale", [False, True])
def test_rivals_never_both_hold_a_fresh_claim(path, stale):
    if stale:
        for index in range(SHARDS):
            age(claim(path, index), CLAIM_EXPIRES_S + 60)
    barrier, won = processes.Barrier(4), processes.Queue()
    rivals = [processes.Process(target=claim_all, args=(path, barrier, won)) for _ in range(4)]
    for rival in rivals:
        rival.start()
    winners = sorted(index for _ in rivals for index in won.get())
    for rival in rivals:
        rival.join()
    assert winners == list(range(SHARDS))
