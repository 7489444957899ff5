"""Cases that need real processes under torchrun: a test launches a script of them once, the script runs each and writes what came out.

A script has functions `case_*`, which return what JSON can hold, and calls `run_cases` with its `globals()`.
"""

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def launch(script: str, folder: Path, *words: str, world: int, timeout: int, **environment: str) -> str:
    """`tests/{script} FOLDER WORDS…` in `world` processes of one thread each, offline; what it printed. AssertionError if one of them fails."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env |= environment
    env.pop("RANK", None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    command += [str(ROOT / "tests" / script), str(folder), *words]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def run_cases(functions: dict[str, Any], results: Path, only: str | None = None) -> None:
    """Every function named `case_*`, or the one named `only`, on all ranks. Rank 0 writes what they returned, and their seconds."""
    import torch.distributed

    found, seconds = {}, {}
    for name, case in list(functions.items()):
        if name == only if only is not None else name.startswith("case_"):
            started = time.time()
            found[name.removeprefix("case_")] = case()
            seconds[name] = round(time.time() - started, 1)
            gc.collect()
    if torch.distributed.get_rank() == 0:
        results.write_text(json.dumps(found | {"seconds": seconds}))
    torch.distributed.barrier()
