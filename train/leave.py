"""How a rank's process ends: without what Python does after its exit handlers.

Gloo's threads run for as long as its groups exist, and DeepSpeed keeps those in its engine, its parameters and its modules:
`destroy_process_group` ends none of them. Where they still run when Python takes itself apart, the process can abort with everything written
(`terminate called without an active exception`), and its launcher reports a failure.
"""

import atexit
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from stop import Stopped


@contextmanager
def leave() -> Iterator[None]:
    """After a block that all ranks end together, done or stopped, this process ends right after its exit handlers, with the same exit code.

    Enter it before torch is imported: handlers run last come first, and this one must be the last (Weights & Biases, for one, uploads in its
    own). After an error nothing is changed: its exit code says enough.
    """
    code = None

    def end() -> None:
        if code is not None:
            logging.shutdown()  # its handler came before this one
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    atexit.register(end)
    try:
        yield
        code = 0
    except Stopped as stopped:
        code = stopped.exit_code
        raise
    except SystemExit as ended:
        code = ended.code
        raise
