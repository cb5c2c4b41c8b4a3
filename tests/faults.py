"""train.py with faults in the middle of its steps: after the gradients, before the optimizer.

    FAULTS='[{"after": 0, "step": 4, "rank": 1, "do": "kill"}]' python tests/faults.py FLAGS

after       the fault happens in a process that continues from the checkpoint of this step
step, rank  where it happens; steps are counted from 1
do          sleep: be late by 3 seconds
            kill: the process ends like one that is out of memory
            wait: create `file`, and wait for a signal
"""
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from vtp_min.dist import rank                                              # noqa: E402
from vtp_min.run import Run                                                # noqa: E402

faults = json.loads(os.environ["FAULTS"])
agree = Run.agree
steps = 0                  # of this process


def agree_after_faults(run, losses, grad_norm):
    global steps
    steps += 1
    for fault in faults:
        place = fault["after"], fault["step"], fault["rank"]
        if place == (run.step, run.step + steps, rank()):
            happen(run, fault)
    return agree(run, losses, grad_norm)


def happen(run, fault):
    if fault["do"] == "sleep":
        time.sleep(3)
    elif fault["do"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault["do"] == "wait":
        Path(fault["file"]).touch()
        while not run.stop_requested:
            time.sleep(0.05)


Run.agree = agree_after_faults
sys.argv[0] = str(ROOT / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
