"""Forks, signals and the end of the process."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading

import latzero
import latzero.testing
import pytest


def in_child(work):
    """Runs `work` in a forked child, which ends as a script does; returns its result."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, repr(work()).encode())
            os.close(write)
            latzero._app._close_all()
            os._exit(0)
        except BaseException as error:
            os.write(write, repr(error).encode())
            os._exit(1)
    os.close(write)
    with open(read) as said:
        told = said.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, told
    return told


def test_a_forked_child_has_its_own_connection(pair):
    serves, calls = pair
    serves.serve("double", lambda n: n * 2)
    before = calls.instance
    told = in_child(lambda: (calls.call("double", n=4, timeout=10), calls.instance))
    assert told.startswith("(8, ") and before not in told
    # The parent's connections still work.
    assert (calls.instance, calls.is_connected) == (before, True)
    assert calls.call("double", n=1) == 2 and serves.ping() >= 0


def test_a_child_that_does_not_use_it_ends_quietly(pair):
    serves, calls = pair
    serves.serve("f", lambda: 1)
    for end in (lambda: None, lambda: calls.close(), lambda: repr(serves)):
        in_child(end)
    assert calls.call("f") == 1 and len(calls.apps()["apps"]) >= 2


def test_the_server_sees_that_the_parent_ended(latzero_server, pair):
    """A child holds no copy of its parent's connection."""
    _, calls = pair
    [pool] = calls.joined
    script = (
        "import latzero, os, sys\n"
        "app = latzero.connect(sys.argv[1], transient=True)\n"
        "if os.fork() == 0:\n"
        "    sys.stdin.read()\n"
        "    os._exit(0)\n"
        "print('ready', flush=True)\n"
        "os._exit(0)\n"
    )
    watch = calls.watch(pool)
    parent = subprocess.Popen(
        [sys.executable, "-c", script, latzero_server.url("forks", pool)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )
    assert parent.stdout.readline() == b"ready\n"
    seen = [next(watch).event, next(watch).event]
    assert seen == ["app_online", "app_offline"]
    parent.communicate()


def test_blocks_in_a_child(pair):
    pytest.importorskip("numpy")
    makes, _ = pair
    block = makes.block("b", shape=4, dtype="u1", create=True)
    with block.write() as a:
        a[:] = 7

    def use():
        values = block.read().tolist()  # The mapping is the parent's.
        with pytest.raises(latzero.Disconnected):
            block.write_at(0, b"x")
        with makes.block("b").write() as a:
            a[0] = 1
        return values

    assert in_child(use) == "[7, 7, 7, 7]"
    assert block.read().tolist() == [1, 7, 7, 7]


def test_what_needs_the_parent_s_connection_raises_in_a_child(pair):
    makes, _ = pair
    mapped = makes.block("mapped", size=4, create=True)
    stored = makes.block("stored", size=4, create=True, kind="persistent")

    def ran(use):
        with pytest.raises(latzero.Disconnected) as raised:
            use()
        return raised.value.ran

    def publish():
        writing.__exit__(None, None, None)

    with mapped.writer() as writer:
        writing = writer.write()
        writing.__enter__()
        told = in_child(lambda: [ran(use) for use in (stored.read, mapped.wait, publish)])
        assert told == "['no', 'no', 'unknown']"
        publish()
    assert mapped.version == writing.version == 1


def _double(n):
    return _double.app.call("double", n=n, timeout=10)


def test_a_pool_of_processes(pair):
    serves, calls = pair
    serves.serve("double", lambda n: n * 2)
    _double.app = calls
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(_double, range(20)) == [n * 2 for n in range(20)]
    assert calls.call("double", n=1) == 2


def relay(address):
    """Listens in place of a server; returns the address, and what clients send, by connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    sent = []

    def copy(source, to, kept):
        while piece := source.recv(1 << 16):
            kept += piece
            to.sendall(piece)
        to.shutdown(socket.SHUT_WR)

    def accept():
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(address)
            sent.append(bytearray())
            for ends in ((client, server, sent[-1]), (server, client, bytearray())):
                threading.Thread(target=copy, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname(), sent


def envelopes(sent):
    """The session, id and nonce of each sealed message in what a client sent."""
    found = []
    while sent:
        length = int.from_bytes(sent[:4], "big")
        size = length & 0x7FFFFFFF
        frame, sent = sent[4:4 + size], sent[4 + size:]
        if length == size:
            continue
        envelope = bytes(frame[4 + int.from_bytes(frame[:4], "big"):])
        assert envelope[:4] == b"LZEV"
        at = 96
        for _ in ("name", "sender", "destination"):
            at += 4 + int.from_bytes(envelope[at:at + 4], "big")
        found.append((envelope[32:48], envelope[64:80], envelope[at:at + 24]))
    return found


def test_a_child_shares_no_session_and_no_nonce(latzero_server, tmp_path, monkeypatch):
    """Sealed with the same key, two messages with one nonce would reveal their content."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    program = latzero.testing.find_program()
    create = ["pools", "create", "--encrypted", "--socket", latzero_server.socket]
    for command in (["keys", "new"], create):
        subprocess.run([program, *command, "forked"], check=True, capture_output=True)
    host, port = latzero_server.address.rsplit(":", 1)
    (_, port), sent = relay((host, int(port)))
    keys = f"pool=forked&keys={tmp_path}/latzero/keys/forked&unbound"
    serves = latzero.connect(f"latzero://forked-serves?socket={latzero_server.socket}&{keys}")
    with serves, latzero.connect(f"latzero://forked-calls@127.0.0.1:{port}?{keys}") as calls:
        serves.serve("double", lambda n: n * 2)

        def use():
            return [calls.call("double", n=n, timeout=10) for n in range(20)]

        assert use() == list(range(0, 40, 2))
        children = [in_child(use), in_child(use)]
        assert children == [repr(use())] * 2
    parent, *others = map(envelopes, sent)
    assert [len(parent), *map(len, others)] == [40, 20, 20]
    sessions, ids, nonces = map(set, zip(*parent, *others[0], *others[1], strict=True))
    assert (len(sessions), len(ids), len(nonces)) == (3, 80, 80)


def test_threads_that_fork_at_the_same_time(latzero_server):
    """No child keeps its parent's connection."""
    script = """
import latzero, os, sys, threading
sys.setswitchinterval(1e-5)
apps = [latzero.connect(sys.argv[1] + str(n), transient=True) for n in range(3)]
kept = []
def fork():
    for _ in range(150):
        child = os.fork()
        if child == 0:
            os._exit(sum(app._connection is not None for app in apps))
        kept.append(os.waitpid(child, 0)[1])
threads = [threading.Thread(target=fork) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(kept), sum(kept))
"""
    ran = subprocess.run(
        # Newer Pythons warn of a fork beside threads.
        [sys.executable, "-W", "ignore", "-c", script, latzero_server.url("forks-")], timeout=60,
        capture_output=True, text=True,
    )
    assert (ran.stdout, ran.stderr) == ("450 0\n", "")


def test_a_fork_while_other_threads_call(pair):
    serves, calls = pair
    serves.serve("double", lambda n: n * 2)
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            calls.call("double", n=1)

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            assert in_child(lambda: calls.call("double", n=4, timeout=10)) == "8"
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_gunicorn_that_loads_the_app_before_it_forks(latzero_server, pair, tmp_path):
    pytest.importorskip("gunicorn")
    serves, _ = pair
    serves.serve("double", lambda n: n * 2)
    [pool] = serves.joined
    (tmp_path / "web.py").write_text(f'''
import latzero, os

app = latzero.connect({latzero_server.url("web", pool)!r})
first = app.instance

def application(environ, start_response):
    answer = app.call("double", n=21, timeout=20)
    start_response("200 OK", [("content-type", "text/plain")])
    return [f"{{answer}} {{os.getpid()}} {{app.instance}} {{first}}".encode()]
''')
    path = str(tmp_path / "web.sock")
    gunicorn = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", "--preload", "--workers", "2", "--bind",
         f"unix:{path}", "web:application"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )

    def get():
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(path)
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with client.makefile("rb") as answer:
                head, body = answer.read().split(b"\r\n\r\n")
        assert b" 200 OK" in head.splitlines()[0]
        return body.decode().split()

    try:
        booted = 0
        while booted < 2:
            booted += "Booting worker" in gunicorn.stderr.readline()
        answer, pid, instance, first = get()
        assert answer == "42" and instance != first
        # Another worker goes on where one was killed, and the parent's connection is open.
        os.kill(int(pid), signal.SIGKILL)
        answer, other, instance, _ = get()
        assert answer == "42" and other != pid
        [web] = [app for app in serves.apps()["apps"] if app["app_id"] == "web"]
        assert first in str(web) and instance in str(web)
    finally:
        gunicorn.terminate()
        _, said = gunicorn.communicate(timeout=60)
    assert gunicorn.returncode == 0 and "Traceback" not in said, said


WAITS = {
    "call": "app.call('hangs', to='waits', timeout=60)",
    "stream": "next(app.stream('hangs', to='waits', timeout=60))",
    "events": "next(app.events('nothing'))",
    "watch": "[event for event in app.watch('default')]",
    "answers": "next(app.answers())",
    "pending": "app.submit('hangs', to='waits', timeout=60).result()",
    "parked": "app.park('nobody', timeout=60).answer()",
    "block": "app.block('b', size=1, create=True).wait()",
    "changes": "next(app.block('b', size=1, create=True).changes())",
    "lock": "b = app.block('b', size=1, create=True); l = b.lock(); l.__enter__(); "
    "b.lock(wait=60).__enter__()",
    "write": "b = app.block('b', size=1, create=True); l = b.lock(); l.__enter__(); "
    "b.write(wait=60).__enter__()",
    "connect": "silent = socket.create_server(('127.0.0.1', 0)); "
    "to = 'latzero://waits@%s:%d' % silent.getsockname(); "
    "latzero.connect(to, connect_timeout=60)",
    "asyncio": "asyncio.run(asyncio.wait_for(aio(), 60))",
}


@pytest.mark.parametrize("wait", WAITS)
def test_ctrl_c_ends_every_wait(latzero_server, wait):
    script = f"""
import asyncio, latzero, socket, sys, threading
async def aio():
    async with latzero.aio.connect(sys.argv[1]) as app:
        print("ready", flush=True)
        await app.call('hangs', to='waits', timeout=60)
release = threading.Event()
app = latzero.connect(sys.argv[1])
app.serve('hangs', lambda: release.wait(60))
try:
    if {wait != "asyncio"}:
        print("ready", flush=True)
    {WAITS[wait]}
except KeyboardInterrupt:
    release.set()
    print("interrupted", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, latzero_server.url("waits")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == ("interrupted\n", "", 0)


def test_wait_ends_by_ctrl_c_and_closes(latzero_server):
    script = (
        "import latzero, os, signal, sys\n"
        "app = latzero.connect(sys.argv[1])\n"
        "app.serve('f', lambda: 1)\n"
        "waits = app._closed.wait\n"
        "def wait(timeout):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return waits(timeout)\n"
        "app._closed.wait = wait\n"
        "app.wait()\n"
        "print(app)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, latzero_server.url("ends")], timeout=30,
        capture_output=True, text=True,
    )
    assert "closed" in ran.stdout and (ran.stderr, ran.returncode) == ("", 0)


@pytest.mark.parametrize("handler", [
    "def stop():\n    app.close()\n    return 7",
    "async def stop():\n    app.close()\n    return 7",
    "def stop():\n    yield 6\n    app.close()\n    return 7",
], ids=["plain", "async", "generator"])
def test_a_handler_that_closes_the_app_answers_before_the_process_ends(
    latzero_server, pair, handler
):
    _, calls = pair
    [pool] = calls.joined
    script = f"""
import latzero, sys
app = latzero.connect(sys.argv[1])
@app.serve
{handler}
print("ready", flush=True)
app.wait()
"""
    for n in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", script, latzero_server.url(f"stops-{n}", pool)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        assert process.stdout.readline() == "ready\n"
        if "yield" in handler:
            stream = calls.stream("stop")
            assert (list(stream), stream.end) == ([6], 7)
        else:
            assert calls.call("stop") == 7
        assert (*process.communicate(timeout=30), process.returncode) == ("", "", 0)


def test_an_exception_ends_a_script_with_everything_open(latzero_server):
    script = """
import asyncio, latzero, sys, threading
app = latzero.connect(sys.argv[1])
inside = threading.Event()
@app.serve
def hangs(request: latzero.Request):
    inside.set()
    while not request.cancelled:
        request.progress(1)
@app.serve
async def also():
    await asyncio.Event().wait()
app.on("e", print)
events, watch = app.events("e"), app.watch("default")
block = app.block("everything", size=8, create=True)
view = block.view()
writing = block.write()
writing.__enter__()
stream = app.stream("hangs", to=app.app_id)
call = app.submit("also", to=app.app_id)
next_item = app.submit("hangs", to=app.app_id)
inside.wait(10)
raise SystemExit(3)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, latzero_server.url("everything")], timeout=60,
        capture_output=True, text=True,
    )
    assert (ran.returncode, ran.stderr) == (3, "")


def test_an_async_handler_that_never_ends_does_not_hold_up_the_end(latzero_server):
    script = """
import asyncio, latzero, sys, threading
app = latzero.connect(sys.argv[1], transient=True)
inside = threading.Event()
@app.serve
async def stubborn():
    while True:
        inside.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
call = app.submit("stubborn", to=app.app_id)
inside.wait()
sys.exit(3)
"""
    url = latzero_server.url("stubborn")
    ran = subprocess.run([sys.executable, "-c", script, url], timeout=60, capture_output=True)
    assert (ran.returncode, ran.stderr) == (3, b"")


@pytest.mark.parametrize("work", ["request.progress(1)", "time.sleep(0.001)"])
def test_a_handler_that_never_ends_does_not_crash_the_end(latzero_server, work):
    script = f"""
import latzero, sys, threading, time
class Slow:
    # The interpreter ends slowly, and the handler reconnects in the meantime.
    def __del__(self, sleep=time.sleep):
        sleep(0.2)
app = latzero.connect(sys.argv[1], transient=True)
app.on("nothing", print)
inside = threading.Event()
@app.serve
def endless(request: latzero.Request):
    inside.set()
    while True:
        try:
            {work}
        except latzero.LatZeroError:
            pass
call = app.submit("endless", to=app.app_id)
inside.wait()
slow = sys.modules["slow"] = Slow()
sys.exit(3)
"""
    url = latzero_server.url(f"endless-{len(work)}")
    ran = subprocess.run([sys.executable, "-c", script, url], timeout=60, capture_output=True)
    assert (ran.returncode, ran.stderr) == (3, b"")


# More are made before a release: a million.
CALLS = int(os.environ.get("TEST_CALLS", "100000"))


@pytest.mark.parametrize("face", ["blocking", "asyncio"])
def test_many_calls_keep_memory_and_descriptors_flat(latzero_server, face):
    script = """
import asyncio, gc, latzero, os, sys
def serve(app):
    @app.serve
    def double(n: int):
        return {"n": 2 * n, "text": "x" * 100}
def check(answers):
    assert [answer["n"] for answer in answers] == [2 * n for n in range(100)]
def used():
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))
def blocking(count):
    for _ in range(count // 100):
        pending = [app.submit("double", n=n) for n in range(100)]
        check([call.result() for call in pending])
    return used()
async def asynchronous(count):
    for _ in range(count // 100):
        check(await asyncio.gather(*(app.call("double", n=n) for n in range(100))))
    return used()
def compare(before, after):
    print(before, after)
    assert after[0] <= before[0] + 8e6 and after[1] <= before[1], (before, after)
url, face, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
async def main():
    global app
    async with latzero.aio.connect(url) as app:
        serve(app)
        await app.ready()
        compare(await asynchronous(20_000), await asynchronous(calls))
if face == "asyncio":
    asyncio.run(main())
else:
    with latzero.connect(url) as app:
        serve(app)
        compare(blocking(20_000), blocking(calls))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, latzero_server.url(f"many-{face}"), face, str(CALLS)],
        timeout=300 + CALLS / 1000, capture_output=True, text=True,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    print("bytes and descriptors before and after:", ran.stdout)
