"""`cli.py precompute` around its workers: start them, then say what was made and what to type next. Imports nothing heavy until then."""

import json
import os
import sys
from pathlib import Path
from typing import NoReturn

import launch
from precompute.config import PrecomputeConfig
from precompute.report import describe
from quiet import importing
from stop import Stopped
from store.command import again, cli
from store.errors import RefdpoError
from store.manifest import Manifest, manifest_path


def start(config: PrecomputeConfig, num_workers: int | None) -> None:
    """Phase 1 with `num_workers` local processes, or as the one that a launcher made this. Ends the process where it started
    others. Raises what `worker.run` raises."""
    try:
        _start(config, num_workers)
    except KeyboardInterrupt:
        next_ = f"Run the same command again to go on: {again()}"
        raise Stopped("stopped by Ctrl-C: finished shards are kept", where=config.ref_store, next=next_) from None


def _start(config: PrecomputeConfig, num_workers: int | None) -> None:
    process = launch.launched()
    if process is None:
        num_workers = launch.num_local_processes(num_workers, default_without_gpu=1, gpus_per_process=config.gpus_per_worker)
        if num_workers > 1:
            end(config.ref_store, launch.run_workers(num_workers), config.show)
        process = launch.Process(rank=0, world=1, local_rank=0)
    with importing():
        from precompute.worker import run

    run(config, process)
    if process.world == 1:
        end(config.ref_store, 0, config.show)


def end(path: Path, code: int, show: str = "text") -> NoReturn:
    """Say what phase 1 made and what to type next; exit with `code`. RefdpoError where a shard is missing all the same."""
    if code == 0:
        if not manifest_path(path).exists():
            raise RefdpoError("not every shard is done", where=path, next=f"Run the same command again to go on: {again()}")
        manifest = Manifest.load(manifest_path(path))
        print(_event(manifest, path) if show == "json" else f"{describe(manifest, path)}\n{_next(manifest, path)}", flush=True)
    sys.exit(code)


def _event(manifest: Manifest, path: Path) -> str:
    counts = {
        "num_pairs": manifest.num_pairs,
        "num_rows": manifest.identity.num_rows,
        "num_unscorable": len(manifest.unscorable),
    }
    return json.dumps({"event": "sealed", "ref_store": str(path), **counts, "counts": manifest.counts})


def _next(manifest: Manifest, path: Path) -> str:
    template = manifest.command and manifest.command.chat_template
    if template is not None:
        template = os.path.relpath(Path(manifest.command.folder, template))
    train = first_of_train(path, template, manifest.provenance.get("layout"))
    return f"Next: {cli('train', *train)}\n      {cli('inspect', *train[:2])}"


def first_of_train(ref_store: Path, chat_template: Path | str | None, layout: str | None, more: tuple[str, ...] = ()) -> list[str]:
    """The options that phase 2 needs for a store, unless `more` has them. It cannot take from there the template's text, nor that packed
    refuses the model."""
    words = ["--ref-store", str(ref_store)]
    if chat_template is not None and "--chat-template" not in more:
        words += ["--chat-template", str(chat_template)]
    if layout == "padded" and "--layout" not in more:
        words += ["--layout", "padded"]
    return words
