"""Being told to stop: a signal is heard whatever the process is doing at that moment."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

TOLD_WHILE_FALLING_ASLEEP = """
import random, signal
from stop import StopRequest

chance = random.Random(0)
for _ in range(1000):
    request = StopRequest()
    signal.signal(signal.SIGALRM, request.hear)
    signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 6e-5))
    request.sleep(0.001)
    while not request.soon:
        pass
    request.sleep(3600)  # told already
    assert not request.now
    request.hear(signal.SIGTERM)
    assert request.now
print("heard all")
"""


def test_a_signal_that_comes_as_a_worker_falls_asleep_does_not_hang_it():
    """A handler must not wait for a lock that the code it interrupts holds; a worker that waits for others would never end."""
    command = [sys.executable, "-c", TOLD_WHILE_FALLING_ASLEEP]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=1200)
    assert done.stdout == "heard all\n", done.stderr
