"""Python imports this before a program's first line: the GPUs must exist before torch is imported."""

import os

if "MADE_UP_GPUS" in os.environ:
    from made_up_gpu import load  # noqa: F401
