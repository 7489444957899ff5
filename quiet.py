"""The libraries' imports: their loading bars and advice are not about a command of this project, and what they make is no garbage."""

import atexit
import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def _quiet_libraries() -> None:
    """From here on, until the process ends."""
    warnings.simplefilter("ignore", FutureWarning)
    for name in ("DeepSpeed", "accelerate"):  # accelerate's loggers are below that name, and would pass over a filter there
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()


@contextmanager
def importing() -> Iterator[None]:
    """Around the imports of a command; from there on the libraries are quiet.

    They make a million objects that stay until the process ends: Python does not look for garbage among them, neither inside of the block, where
    that is a fifth of the time, nor after it, where each search would take half a second."""
    gc.disable()
    try:
        _quiet_libraries()
        yield
    finally:
        gc.enable()
        gc.freeze()
        atexit.register(gc.unfreeze)  # libraries count what is left at the end
