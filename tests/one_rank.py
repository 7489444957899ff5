"""Run `train` inside the test's own process, as the only rank of a launcher, and leave no trace of it for the tests that follow."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_rank() -> Iterator[None]:
    """RANK, WORLD_SIZE and LOCAL_RANK are set inside; accelerate's state and the environment are as before after it.

    The process group stays: DeepSpeed keeps handles to it all over the place, and a second run in this process uses it again.
    """
    before = dict(os.environ)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    try:
        yield
    finally:
        from accelerate.state import AcceleratorState
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        AcceleratorState._reset_state(reset_partial_state=True)
        unset_hf_deepspeed_config()
        os.environ.clear()
        os.environ.update(before)
