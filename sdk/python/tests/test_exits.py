"""The end of a process with everything open, in every way and many times: it is clean, and does not
hang. `EXITS=100 pytest tests/test_exits.py` looks longer."""

import os
import signal
import subprocess
import sys
import threading

import pytest

TIMES = int(os.environ.get("EXITS", "6"))
AT_ONCE = 6

BLOCKING = """
import latzero, os, signal, sys, threading, time
app = latzero.connect(sys.argv[1], transient=True)
way, me = sys.argv[2], app.app_id
inside = threading.Semaphore(0)
@app.serve
def endless(request: latzero.Request):
    inside.release()
    n = 0
    while True:
        yield n
        n += 1
@app.serve
def sleeps():
    inside.release()
    time.sleep(60)
@app.serve
async def awaits():
    import asyncio
    inside.release()
    await asyncio.Event().wait()
@app.serve
def interrupts():
    os.kill(os.getpid(), signal.SIGINT)
app.on("event", print)
app.on_state(lambda state: None)
events, watch, answers = app.events("event"), app.watch("default"), app.answers()
block = app.block(me, size=64, create=True)
shared, view = app.share(b"bytes"), block.view()
writing = block.write()
writing.__enter__()
stream = app.stream("endless", to=me)
next(stream)
pending = [app.submit(name, to=me, timeout=60) for name in ("sleeps", "awaits", "sleeps")]
parked = app.park("nobody", timeout=60)
for wait in (
    lambda: app.call("sleeps", to=me, timeout=60), lambda: block.wait(), lambda: next(events),
    lambda: block.lock(wait=60).__enter__(), lambda: next(answers),
):
    def run(wait=wait):
        try:
            wait()
        except (latzero.LatZeroError, StopIteration):
            pass  # The app was closed.
    threading.Thread(target=run, daemon=True).start()
for _ in range(5):
    assert inside.acquire(timeout=20)
begun = []
waits = app._closed.wait
def wait(timeout):
    # Inside of the wait: an interrupt before it is not the wait's.
    if not begun:
        begun.append(True)
        print("ready", flush=True)
        if way == "handler":
            begun.append(app.submit("interrupts", to=me))
    return waits(timeout)
app._closed.wait = wait
if way not in ("interrupted wait", "handler"):
    print("ready", flush=True)
if way == "exception":
    raise RuntimeError("the end")
elif way == "interrupt":
    # Python looks for a signal that comes just before a sleep only after it.
    while True:
        time.sleep(0.1)
elif way != "normal":
    try:
        app.wait()
    except latzero.Timeout:
        pass  # Handlers sleep for longer than a close waits.
"""

ASYNCIO = """
import asyncio, latzero, os, signal, sys, time
way = sys.argv[2]
inside = 0
async def main():
    global everything
    app = await latzero.aio.connect(sys.argv[1], transient=True)
    me = app.app_id
    @app.serve
    async def endless():
        global inside
        inside += 1
        n = 0
        while True:
            yield n
            n += 1
    @app.serve
    def sleeps():
        global inside
        inside += 1
        time.sleep(60)
    @app.serve
    async def awaits():
        global inside
        inside += 1
        await asyncio.Event().wait()
    @app.serve
    async def ends():
        sys.exit(4)
    app.on("event", print)
    app.on_state(lambda state: None)
    await app.ready()
    events, watch = await app.events("event"), await app.watch("default")
    block = await app.block(me, size=64, create=True)
    shared, view = await app.share(b"bytes"), await block.view()
    writing = block.write()
    await writing.__aenter__()
    stream = app.stream("endless", to=me)
    await anext(stream)
    pending = [app.submit(name, to=me, timeout=60) for name in ("sleeps", "awaits", "sleeps")]
    parked = await app.park("nobody", timeout=60)
    async def lock():
        await block.lock(wait=60).__aenter__()
    waits = [asyncio.ensure_future(wait) for wait in (
        app.call("awaits", to=me, timeout=60), block.wait(), anext(events), lock(),
        anext(app.answers()),
    )]
    everything = locals()
    while inside < 5:
        await asyncio.sleep(0.001)
    print("ready", flush=True)
    if way == "exception":
        raise RuntimeError("the end")
    elif way == "interrupt":
        while True:
            await asyncio.sleep(0.1)
    elif way == "interrupted wait":
        await app.wait()
    elif way == "handler":
        last = app.submit("ends", to=me)
        await app.wait()
asyncio.run(main())
"""

# How each way ends: the exit status, and the last line of the standard error output.
WAYS = {
    ("blocking", "normal"): (0, ""),
    ("blocking", "exception"): (1, "RuntimeError: the end"),
    ("blocking", "interrupt"): (-signal.SIGINT, "KeyboardInterrupt"),
    ("blocking", "interrupted wait"): (0, ""),
    ("blocking", "handler"): (0, ""),
    ("asyncio", "normal"): (0, ""),
    ("asyncio", "exception"): (1, "RuntimeError: the end"),
    ("asyncio", "interrupt"): (-signal.SIGINT, "KeyboardInterrupt"),
    ("asyncio", "interrupted wait"): (-signal.SIGINT, "KeyboardInterrupt"),
    ("asyncio", "handler"): (4, ""),
}


def line_of(process):
    """The next line that a process prints. One that prints none in time is killed."""
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        return process.stdout.readline()
    finally:
        watchdog.cancel()


@pytest.mark.parametrize(("face", "way"), WAYS)
def test_a_process_ends_with_everything_open(latzero_server, face, way):
    script = BLOCKING if face == "blocking" else ASYNCIO
    status, last = WAYS[face, way]

    def start(n):
        url = latzero_server.url(f"exit-{face}-{way.replace(' ', '-')}-{n}")
        return subprocess.Popen(
            [sys.executable, "-c", script, url, way], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )

    for first in range(0, TIMES, AT_ONCE):
        processes = [start(n) for n in range(first, min(first + AT_ONCE, TIMES))]
        try:
            for process in processes:
                said = line_of(process)
                assert said == "ready\n", process.communicate()
                if way.startswith("interrupt"):
                    process.send_signal(signal.SIGINT)
            for process in processes:
                _, errors = process.communicate(timeout=20)
                lines = errors.splitlines() or [""]
                assert (process.returncode, lines[-1]) == (status, last), errors
                assert last or not errors
                for word in ("Fatal", "panicked", "Exception ignored", "never retrieved"):
                    assert word not in errors, errors
        finally:
            for process in processes:
                process.kill()
                process.wait()
