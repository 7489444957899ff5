"""Loading bars and advice of the libraries are not about a command of this project."""

import logging
import warnings


def quiet_libraries() -> None:
    """From here on, until the process ends."""
    warnings.simplefilter("ignore", FutureWarning)
    for name in ("DeepSpeed", "accelerate"):  # accelerate's loggers are below that name, and would pass over a filter there
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
