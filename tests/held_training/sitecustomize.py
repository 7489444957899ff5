"""See held_training() in tests/held.py. A rank asks twice before it trains and after each step whether it was told to stop; the first one
does not get its fifth answer before it was. What it asks in an evaluation is not counted."""

import os
import sys
import time
from itertools import count

from stop import StopRequest

if os.environ.get("RANK") == "0" and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    asked, soon = count(1), StopRequest.soon.fget

    def soon_but_held(request: StopRequest) -> bool:
        in_evaluation = sys._getframe(2).f_code.co_name == "on_prediction_step"
        if not in_evaluation and next(asked) == 5:
            while not soon(request):
                time.sleep(0.02)
            print("told to stop while held", flush=True)
            while os.environ["HELD_UNTIL"] == "killed":
                time.sleep(0.02)
        return soon(request)

    StopRequest.soon = property(soon_but_held)
