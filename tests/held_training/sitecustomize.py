"""See held_training() in tests/held.py. A rank asks twice before it trains and after each step whether it was told to stop; the first one
does not get its fifth answer before it was."""

import os
import time
from itertools import count

from stop import StopRequest

if os.environ.get("RANK") == "0" and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    asked, soon = count(1), StopRequest.soon.fget

    def soon_but_held(request: StopRequest) -> bool:
        if next(asked) == 5:
            while not soon(request):
                time.sleep(0.02)
            print("told to stop while held", flush=True)
            while os.environ["HELD_UNTIL"] == "killed":
                time.sleep(0.02)
        return soon(request)

    StopRequest.soon = property(soon_but_held)
