"""Parks a job, kills the worker in the middle of it with SIGKILL, and starts the worker again."""

import subprocess
import sys
from pathlib import Path

import latzero

STEPS = 60


def start() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, Path(__file__).with_name("worker.py")])


with latzero.connect("latzero://customer?pool=jobs") as app:
    worker = start()
    try:
        # It is on the server's disk: this program could end here, and ask for the answer later.
        job = app.park("add_roots", steps=STEPS, redeliver=True, timeout=600)
        arrived = app.watch("jobs")
        while "place" not in [block["block_id"] for block in app.blocks()]:
            next(arrived)  # the worker makes the block when it is in the pool
        place = app.block("place", write=False)
        for version in place.changes():
            step = int(place.read()[0])
            if step >= 3:
                break
        worker.kill()
        worker.wait()
        print(f"the worker was killed at step {step} of {STEPS}", flush=True)
        worker = start()
        print(f"the sum of the roots is {job.answer():.3f}", flush=True)
    finally:
        worker.kill()
        worker.wait()
