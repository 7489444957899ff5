"""How a rank's process ends: without what Python does after its exit handlers.

Gloo's threads run for as long as its groups exist, and DeepSpeed keeps those in its engine, its parameters and its modules:
`destroy_process_group` ends none of them. Where they still run when Python takes itself apart, the process can abort with everything written
(`terminate called without an active exception`), and its launcher reports a failure.
"""

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def leave() -> Iterator[None]:
    """Around all that a process does: if it joined other ranks, it ends right after its exit handlers, with the exit code it would have had.

    Enter it before torch is imported: handlers run last come first, and this one must be the last (Weights & Biases, for one, uploads in its
    own). After a traceback nothing is changed: its exit code says enough.
    """
    code = None

    def end() -> None:
        if code is not None and "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    atexit.register(end)
    try:
        yield
        code = 0
    except SystemExit as ended:
        code = ended.code
        raise
