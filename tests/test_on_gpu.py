"""The files of tests/on_gpu, each in a process that has GPUs: this machine's own, or else made-up ones (tests/made_up_gpu)."""

import os
import subprocess
import sys
from pathlib import Path

import made_up_gpu
import pytest
import torch

TESTS = Path(__file__).parent


def run_on_gpus(name: str, num_gpus: int = 3) -> None:
    if torch.cuda.is_available():
        env = dict(os.environ)
    elif made_up_gpu.possible():
        env = made_up_gpu.environment(num_gpus)
    else:
        pytest.skip("PyTorch is built for CUDA and there is no GPU; made-up ones need its build for CPUs")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS / "on_gpu" / name]
    done = subprocess.run(command, check=False, env=env, cwd=TESTS.parent, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    print(done.stdout)


def test_scoring():
    run_on_gpus("scoring.py")
