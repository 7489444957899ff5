"""Faults on purpose, and what becomes of the store: the numbers of docs/reliability.md.

    python benchmarks/faults.py                 the whole campaign (a quarter of an hour on one core); prints a Markdown table
    python benchmarks/faults.py --kills 20      a shorter one

Workers here are real processes that use store/ exactly as precompute does, with made-up scores in place of a model: what can go wrong between
a kill and a disk does not depend on where the numbers come from, and thousands of kills become affordable. The last line of the table
repeats it with the real command and a real model.
"""

import argparse
import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from store_samples import PROVENANCE, make_identity, make_shard

from store.claim import claim, claim_sealing
from store.errors import RefdpoError
from store.folder import missing_shards, prepare_store
from store.manifest import MANIFEST, Identity, manifest_path
from store.reader import open_store
from store.seal import seal
from store.shard import part_name, publish_shard
from store.verify import verify

processes = multiprocessing.get_context("fork")  # a fresh interpreter per worker would take most of the time


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    fault: str
    cases: int
    outcome: str


# --- a worker


def work(store: Path, identity: Identity, begin: float = 0.0, pace: float = 0.0) -> None:
    """precompute/worker.py's loop around store/: claim, score, publish, until nothing is missing; then seal. `pace`: seconds per shard."""
    prepare_store(store, identity)
    missing = missing_shards(store, identity)
    start = int(begin * len(missing))
    missing = missing[start:] + missing[:start]
    while missing:
        for index in missing:
            if (held := claim(store, index)) is None:
                continue
            try:
                time.sleep(pace)
                publish_shard(store, identity, *make_shard(identity, index), PROVENANCE)
            finally:
                held.release()
        missing = [index for index in missing if not (store / part_name(index)).exists()]
        if missing:
            time.sleep(0.002)
    while not manifest_path(store).exists() and claim_sealing(store) is None:
        time.sleep(0.002)
    seal(store, identity, {"layout": "packed"}, "demo")


def start(target: Callable, *arguments) -> multiprocessing.Process:
    """A process that runs `target` and exits with 3 for an `Error:` a user would see; any other exception is a traceback and 1."""

    def run() -> None:
        try:
            target(*arguments)
        except RefdpoError as error:
            print(f"Error: {error}", file=sys.stderr, flush=True)
            sys.exit(3)

    process = processes.Process(target=run)
    process.start()
    return process


def content(store: Path) -> dict[str, str]:
    """What a store holds, by file: hashes of the shards, and of the manifest without its provenance."""
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(store.glob("*.parquet"))}
    manifest = json.loads(manifest_path(store).read_text())
    manifest.pop("provenance")
    manifest.pop("sha256")
    found[MANIFEST] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return found


def check_whole(store: Path, expected: dict[str, str]) -> None:
    """The store is sealed, right, as the undisturbed one, and nothing else is in its folder."""
    assert verify(store) == [], f"{store}: verify found something"
    assert content(store) == expected, f"{store}: other bytes"
    left = sorted(path.name for path in store.iterdir() if path.name not in expected)
    assert not left, f"{store}: left behind {left}"


def undisturbed(folder: Path, identity: Identity) -> dict[str, str]:
    work(folder / "undisturbed", identity)
    return content(folder / "undisturbed")


# --- kills


def random_kills(folder: Path, kills: int, seed: int = 0, num_shards: int = 24) -> Result:
    """SIGKILL random workers at random moments; killed ones are replaced, and their number changes, until the store is sealed."""
    rng = random.Random(seed)
    identity = make_identity(num_rows=num_shards, shard_size=1)
    expected = undisturbed(folder, identity)
    killed = stores = 0
    while killed < kills:
        store = folder / f"killed-{stores}"
        workers: list[multiprocessing.Process] = []
        while not manifest_path(store).exists() or any(worker.is_alive() for worker in workers):
            wanted = rng.randint(1, 6)
            workers = [worker for worker in workers if worker.is_alive()]
            while len(workers) < wanted and not manifest_path(store).exists():
                workers.append(start(work, store, identity, rng.random(), 0.002))
            time.sleep(rng.random() * 0.06)
            alive = [worker for worker in workers if worker.is_alive()]
            if alive and killed < kills and rng.random() < 0.8:
                victim = rng.choice(alive)
                os.kill(victim.pid, signal.SIGKILL)
                victim.join()
                killed += victim.exitcode == -signal.SIGKILL
            for worker in workers:
                assert worker.exitcode in (None, 0, -signal.SIGKILL), f"a worker failed with {worker.exitcode}"
        work(store, identity)  # one more run, as after any interruption: it has nothing to do but tidy up
        check_whole(store, expected)
        shutil.rmtree(store)
        stores += 1
    return Result(
        f"SIGKILL of random workers at random moments, 1 to 6 workers, {stores} stores", killed, "every store sealed, same bytes"
    )


PATCHED = {
    os: ("link", "replace", "rename", "unlink", "mkdir", "fsync", "utime", "rmdir", "open", "listdir", "scandir"),
    os.path: (),
}
"""System calls through which store/ changes the disk, or looks at it."""


class Interfere:
    """Count this process's calls into the file system and do something at one of them: `action(name)` before it, or after it."""

    def __init__(self, at: int, action: Callable[[str], None], after: bool = False, only: tuple[str, ...] | None = None):
        self.at, self.action, self.after, self.calls = at, action, after, 0
        for module, names in PATCHED.items():
            for name in names:
                if only is None or name in only:
                    setattr(module, name, self._wrap(name, getattr(module, name)))
        if only is None or "write" in only:
            import builtins

            builtins.open = self._wrap("write", builtins.open)

    def _wrap(self, name: str, function):
        def called(*arguments, **options):
            mine = self.calls
            self.calls += 1
            if mine == self.at and not self.after:
                self.action(name)
            result = function(*arguments, **options)
            if mine == self.at and self.after:
                self.action(name)
            return result

        return called


def _killed_at(store: Path, identity: Identity, at: int, after: bool) -> None:
    Interfere(at, lambda name: os.kill(os.getpid(), signal.SIGKILL), after)
    work(store, identity)


def kill_at_every_call(folder: Path, num_shards: int = 2) -> Result:
    """A worker killed immediately before, and after, each of its file system calls in turn; another one finishes."""
    identity = make_identity(num_rows=num_shards, shard_size=1)
    expected = undisturbed(folder, identity)
    cases = 0
    for after in (False, True):
        for at in range(100_000):
            store = folder / f"call-{at}-{after}"
            worker = start(_killed_at, store, identity, at, after)
            worker.join()
            if worker.exitcode == 0:  # fewer calls than that
                break
            assert worker.exitcode == -signal.SIGKILL, worker.exitcode
            work(store, identity)
            check_whole(store, expected)
            shutil.rmtree(store)
            cases += 1
    return Result("SIGKILL before and after each file system call of a worker", cases, "every store sealed, same bytes")


def _failing_at(store: Path, identity: Identity, at: int, number: int) -> None:
    def fail(name: str) -> None:
        raise OSError(number, os.strerror(number))

    Interfere(at, fail, only=("link", "replace", "fsync", "mkdir", "write", "open"))
    work(store, identity)


def fail_every_call(
    folder: Path, numbers: tuple[int, ...] = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT)
) -> Result:
    """Each write, fsync, link, rename and mkdir of a worker fails in turn, with each error; another worker finishes."""
    identity = make_identity(num_rows=2, shard_size=1)
    expected = undisturbed(folder, identity)
    cases = refused = 0
    for number in numbers:
        for at in range(100_000):
            store = folder / f"fail-{at}-{number}"
            worker = start(_failing_at, store, identity, at, number)
            worker.join()
            if worker.exitcode not in (0, 3):
                raise AssertionError(f"call {at} failing with {os.strerror(number)}: exit code {worker.exitcode}")
            refused += worker.exitcode == 3
            partial = {path.name for path in store.glob("*.parquet")} - set(expected) if store.exists() else set()
            assert not partial, partial
            work(store, identity)
            check_whole(store, expected)
            shutil.rmtree(store)
            if worker.exitcode == 0 and at > 200:
                break
            cases += 1
            if worker.exitcode == 0 and _calls(folder, identity) <= at:
                break
    return Result(
        f"writing, fsync, link, mkdir failing ({', '.join(errno.errorcode[n] for n in numbers)})",
        cases,
        f"{refused} clear errors, the rest harmless; then same bytes",
    )


def _calls(folder: Path, identity: Identity, _known: dict = {}) -> int:  # noqa: B006 (a cache)
    """How many such calls an undisturbed worker makes."""
    if identity not in _known:
        counter = processes.Value("i", 0)

        def count() -> None:
            seen = Interfere(-1, lambda name: None, only=("link", "replace", "fsync", "mkdir", "write", "open"))
            work(folder / "counted", identity)
            counter.value = seen.calls

        worker = processes.Process(target=count)
        worker.start()
        worker.join()
        shutil.rmtree(folder / "counted")
        _known[identity] = counter.value
    return _known[identity]


# --- damage


def found(store: Path) -> bool:
    """Both `verify` and opening for training notice. Anything but an error of ours propagates: that would be a traceback."""
    try:
        by_verify = bool(verify(store))
    except RefdpoError:
        by_verify = True
    try:
        open_store(store, check="sha256")
        by_train = False
    except RefdpoError:
        by_train = True
    return by_verify and by_train


def damages(store: Path, other: Path, flips: int | None, seed: int = 0) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """(kind, what to do to a copy of the store): `flips` random bytes of each file changed by a random bit (None: every byte), besides
    every way to cut, lengthen, double, swap and lose its files. `other` is another store of the same shape."""
    rng = random.Random(seed)
    names = sorted(path.name for path in store.iterdir())
    for name in names:
        size = (store / name).stat().st_size
        places = (
            range(size)
            if flips is None
            else sorted({0, 3, size - 1, size - 4, size - 8, *(rng.randrange(size) for _ in range(flips))})
        )
        for place in places:
            bit = 1 << rng.randrange(8)
            yield "one bit flipped", lambda copy, name=name, place=place, bit=bit: _flip(copy / name, place, bit)
        for length in sorted({0, 1, 4, size // 2, size - 8, size - 1, *(rng.randrange(size) for _ in range(5))}):
            yield "cut short", lambda copy, name=name, length=length: os.truncate(copy / name, length)
        for more in (b"\0", b"PAR1", (store / name).read_bytes()):
            yield "lengthened or doubled", lambda copy, name=name, more=more: _append(copy / name, more)
        yield "deleted", lambda copy, name=name: (copy / name).unlink()
        yield "replaced by that of another store", lambda copy, name=name: _copy(other / name, copy / name)
        for second in names:
            if second != name:
                yield (
                    "replaced by another file of the store",
                    lambda copy, name=name, second=second: _copy(store / second, copy / name),
                )
        yield "zeroed", lambda copy, name=name, size=size: (copy / name).write_bytes(b"\0" * size)
        yield "a folder in its place", lambda copy, name=name: ((copy / name).unlink(), (copy / name).mkdir())
        yield "a pipe in its place", lambda copy, name=name: ((copy / name).unlink(), os.mkfifo(copy / name))
        yield (
            "a link to nothing in its place",
            lambda copy, name=name: ((copy / name).unlink(), (copy / name).symlink_to("nowhere")),
        )
        yield (
            "a link to a device in its place",
            lambda copy, name=name: ((copy / name).unlink(), (copy / name).symlink_to("/dev/zero")),
        )
    shard = names[-1]
    for extra in ("part-00099.parquet", "part-000000.parquet", "more.parquet"):
        yield "an extra shard", lambda copy, extra=extra: _copy(store / shard, copy / extra)


def _flip(path: Path, place: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ bit]))


def _append(path: Path, more: bytes) -> None:
    with open(path, "ab") as file:
        file.write(more)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def damage_everything(folder: Path, flips: int | None) -> list[Result]:
    """Damage a copy in every way; verify and train must both refuse it. The undamaged copy passes."""
    identity = make_identity(num_rows=6, shard_size=2)
    store, other = folder / "whole", folder / "other"
    work(store, identity)
    prepare_store(other, make_identity(num_rows=6, shard_size=2, weights_sha256="e5" * 32))
    for index in range(identity.num_shards):
        publish_shard(
            other,
            make_identity(num_rows=6, shard_size=2, weights_sha256="e5" * 32),
            *make_shard(identity, index, seed=1),
            PROVENANCE,
        )
    seal(other, make_identity(num_rows=6, shard_size=2, weights_sha256="e5" * 32), {"layout": "packed"}, "demo")
    cases: dict[str, int] = {}
    copy = folder / "copy"
    names = [path.name for path in store.iterdir()]
    for kind, damage in damages(store, other, flips):
        copy.mkdir()
        for name in names:
            shutil.copyfile(store / name, copy / name)
        damage(copy)
        assert found(copy), f"not found: {kind}, kept in {copy}"
        shutil.rmtree(copy)
        cases[kind] = cases.get(kind, 0) + 1
    assert not found(store)
    return [Result(f"sealed store: {kind}", count, "found by verify and by train, each time") for kind, count in cases.items()]


# --- the real command


def real_kills(folder: Path, kills: int, seed: int = 0) -> Result:
    """The same with `cli.py precompute --dataset demo` and its model, killed after some of its shards."""
    rng = random.Random(seed)
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def command(store: Path, workers: int) -> list[str]:
        options = ["--dataset", "demo", "--shard-size", "1", "--tokens-per-batch", "512", "--num-workers", str(workers)]
        return [sys.executable, str(ROOT / "cli.py"), "precompute", *options, "--ref-store", str(store)]

    quiet = {"env": env, "cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command(folder / "real", 1), check=True, **quiet)
    expected = content(folder / "real")
    store, killed = folder / "real-killed", 0
    while not manifest_path(store).exists():
        before = len(list(store.glob("*.parquet")))
        group = subprocess.Popen(command(store, rng.randint(1, 3)), start_new_session=True, **quiet)
        if killed < kills:
            target = before + rng.randint(0, 2 * (len(expected) - before) // max(1, kills - killed))
            while group.poll() is None and len(list(store.glob("*.parquet"))) < min(target, len(expected) - 1):
                time.sleep(0.002)
            if group.poll() is None:
                os.killpg(group.pid, signal.SIGKILL)
                killed += 1
        group.wait()
    check_whole(store, expected)
    return Result("the real command and model: SIGKILL of all its workers", killed, "sealed, same bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000, help="random SIGKILLs of light workers")
    parser.add_argument("--real-kills", type=int, default=6, help="SIGKILLs of the real command")
    parser.add_argument("--flips", type=int, help="bytes flipped per file; default: every byte of every file")
    options = parser.parse_args()
    results: list[tuple[Result, float]] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as memory:
        steps = {
            "kills": lambda folder: [random_kills(folder, options.kills)],
            "calls": lambda folder: [kill_at_every_call(folder)],
            "failures": lambda folder: [fail_every_call(folder)],
            "damage": lambda folder: damage_everything(folder, options.flips),
            "real": lambda folder: [real_kills(folder, options.real_kills)] if options.real_kills else [],
        }
        for name, step in steps.items():
            folder = Path(memory) / name
            folder.mkdir()
            began = time.monotonic()
            done = step(folder)
            results += [(result, (time.monotonic() - began) / len(done)) for result in done]
            print(
                f"{name}: {sum(result.cases for result in done):,} cases, {time.monotonic() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    print("| fault | cases | outcome |\n|---|---:|---|")
    for result, _ in results:
        print(f"| {result.fault} | {result.cases:,} | {result.outcome} |")


if __name__ == "__main__":
    main()
