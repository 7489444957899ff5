"""Python imports this before a program's first line: the GPUs must exist before torch is imported."""

import gc
import os

if "MADE_UP_GPUS" in os.environ:
    gc.set_threshold(50_000, 20, 100)  # a tenth of the seconds that imports take is looking for garbage where there is none
    from made_up_gpu import load  # noqa: F401
