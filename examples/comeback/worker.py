"""A worker that adds up square roots in many steps, and may be killed at any of them.

It keeps its place in a persistent block. When it starts again it is the same app to the server,
which gives it the job that it had not finished, and it goes on from the step that it had reached.
"""

import math
import os

import latzero

STEP = 100_000

app = latzero.connect("latzero://worker?pool=jobs")
print(f"worker {os.getpid()}: I am {app.app_id}", flush=True)

# The number of the step, and the sum of the steps before it.
place = app.block("place", shape=2, dtype="f8", create=True, kind="persistent")


@app.serve(concurrency=1)
def add_roots(steps: int, request: latzero.Request) -> float:
    step, total = place.read()
    print(f"worker {os.getpid()}: attempt {request.attempt}, from step {step:.0f}", flush=True)
    while step < steps:
        first = int(step) * STEP
        total += sum(map(math.sqrt, range(first, first + STEP)))
        step += 1
        with place.write(keep=False) as a:  # both numbers become visible at once
            a[:] = step, total
    with place.write(keep=False) as a:
        a[:] = 0
    return float(total)


app.wait()
