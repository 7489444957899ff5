"""Run a function in a process of its own: what it holds of a GPU, the context too, is free when it is done. Some GPUs take one process at a time."""

import multiprocessing
from collections.abc import Callable


def apart(work: Callable, *arguments):
    """What `work(*arguments)` returns. SystemExit where it exits or fails; its traceback is then printed. CUDA does not survive the fork: nothing may
    have touched it before."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        try:
            theirs.send((work(*arguments), None))
        except SystemExit as error:
            theirs.send((None, error.code or 1))

    process = context.Process(target=run)
    process.start()
    theirs.close()
    try:
        result, code = ours.recv()
    except EOFError:
        result, code = None, f"{work.__name__} failed"
    process.join()
    if code is not None:
        raise SystemExit(code)
    return result
