"""Fixtures for all tests: offline, tiny models, one thread per process so that two cores suffice."""

import fcntl
import os
import signal
import sys
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    TRL_EXPERIMENTAL_SILENCE="1",
)
sys.path.insert(0, str(Path(__file__).parent))  # tests/tiny.py and the other helpers

import pytest
import tiny
from hypothesis import HealthCheck, settings

from demo.model import make_demo_model

# The same cases on each run, however slow the machine: a test that passes today passes tomorrow. REFDPO_FUZZ=10 looks for new ones.
settings.register_profile(
    "same", derandomize="REFDPO_FUZZ" not in os.environ, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")

# A shell that starts a command in the background has it ignore Ctrl-C, and so would every process that a test sends it to.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """Folder of a tiny random Llama-type model and its tokenizer."""
    return tiny.save(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def tiny_olmo3(tmp_path_factory) -> Path:
    """Folder of a tiny random OLMo-3-type model (sliding window, grouped queries) and its tokenizer."""
    return tiny.save(tmp_path_factory.mktemp("models") / "olmo3", kind="olmo3")


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory) -> Path:
    """The demo's model, made once for all processes that share the tests out among them; whatever lies in demo/model is left alone."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with open(folder / "demo-model.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait for the first, which is cheaper than making it too
        return make_demo_model(folder / "demo-model")
