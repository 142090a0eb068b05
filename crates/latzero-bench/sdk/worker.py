"""One process of `cargo xtask bench sdk` in Python: a caller, a handler, or both ends of a peer.

    worker.py KIND ADDRESS

`ADDRESS` is that of the server: the path of LatZero's socket, a URL of NATS, a path for the others.
It prints `ready`. A caller then reads one order per line, as JSON, and answers each with a line of
figures. A handler serves until it is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import sys
import threading
import time
from typing import Any

DATA = {"id": 1234, "name": "sensor-a", "values": [1.5, 2.5, 3.5], "ok": True}
POOL = "bench"
clock = time.perf_counter_ns


def say(answer: Any) -> None:
    print(json.dumps(answer) if isinstance(answer, dict) else answer, flush=True)


def median(times: list[int]) -> int:
    return sorted(times)[len(times) // 2]


def orders() -> Any:
    say("ready")
    for line in sys.stdin:
        yield json.loads(line)


def one_at_a_time(order: Any, call: Any) -> Any:
    for _ in range(order["warmup"]):
        call()
    times = []
    for _ in range(order["calls"]):
        begin = clock()
        call()
        times.append(clock() - begin)
    return {"p50_ns": median(times)}


async def one_after_another(order: Any, call: Any) -> Any:
    for _ in range(order["warmup"]):
        await call()
    times = []
    for _ in range(order["calls"]):
        begin = clock()
        await call()
        times.append(clock() - begin)
    return {"p50_ns": median(times)}


def rate(calls: int, begin: int) -> Any:
    return {"per_second": calls / (clock() - begin) * 1e9}


async def in_flight(order: Any, call: Any) -> Any:
    """Keeps calls in flight, each by a task that makes one after another."""

    async def turn(count: int) -> None:
        for _ in range(count):
            await call()

    async def turns(calls: int) -> None:
        each = calls // order["window"]
        await asyncio.gather(*(turn(each) for _ in range(order["window"])))

    await turns(order["warmup"])
    begin = clock()
    await turns(order["calls"])
    return rate(order["calls"], begin)


def threads(order: Any, call: Any) -> Any:
    def turn(count: int) -> None:
        for _ in range(count):
            call()

    def turns(calls: int) -> None:
        each = calls // order["window"]
        all = [threading.Thread(target=turn, args=(each,)) for _ in range(order["window"])]
        for thread in all:
            thread.start()
        for thread in all:
            thread.join()

    turns(order["warmup"])
    begin = clock()
    turns(order["calls"])
    return rate(order["calls"], begin)


def obey(call: Any) -> None:
    for order in orders():
        say((threads if order["load"] == "threads" else one_at_a_time)(order, call))


async def obey_on_loop(call: Any) -> None:
    for order in orders():
        load = in_flight if order["load"] == "in_flight" else one_after_another
        say(await load(order, call))


# LatZero.


def url(path: str, app: str) -> str:
    return f"latzero://{app}?socket={path}&pool={POOL}"


def latzero_caller(path: str, trigger: str) -> None:
    import latzero

    with latzero.connect(url(path, "py-caller"), transient=True) as app:
        obey(lambda: app.call(trigger, DATA))


def aio_caller(path: str, trigger: str) -> None:
    import latzero

    async def main() -> None:
        async with latzero.aio.connect(url(path, "aio-caller"), transient=True) as app:
            await obey_on_loop(lambda: app.call(trigger, DATA))

    asyncio.run(main())


def uvloop_caller(path: str, trigger: str) -> None:
    import uvloop

    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    aio_caller(path, trigger)


def latzero_handler(path: str, trigger: str) -> None:
    import latzero

    with latzero.connect(url(path, f"serves-{trigger}"), transient=True) as app:

        @app.serve(trigger)
        def echo(data: Any, /) -> Any:
            return data

        say("ready")
        app.wait()


def aio_handler(path: str, trigger: str, inline: bool = False) -> None:
    import latzero

    async def main() -> None:
        async with latzero.aio.connect(url(path, f"serves-{trigger}"), transient=True) as app:
            if inline:
                app.serve(trigger, lambda data, /: data, inline=True)
            else:

                @app.serve(trigger)
                async def echo(data: Any, /) -> Any:
                    return data

            await app.ready()
            say("ready")
            await app.wait()

    asyncio.run(main())


def inline_handler(path: str, trigger: str) -> None:
    aio_handler(path, trigger, inline=True)


# A client as one writes it by hand: frames of JSON, answers found by their ids, errors raised.


def frame(message: Any) -> bytes:
    text = json.dumps(message, separators=(",", ":")).encode()
    return struct.pack(">I", len(text)) + text


def handshake(app: str) -> bytes:
    return frame({"action": "handshake", "app_id": app, "pools": [POOL], "transient": True})


def call_of(id: str, trigger: str) -> Any:
    return {"action": "trigger", "id": id, "process": trigger, "data": DATA, "ttl": 30_000}


def response_of(message: Any) -> Any:
    if message.get("status") == "error":
        raise RuntimeError(message["error"])
    return message.get("response")


class Bare:
    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.received = bytearray()
        self.next = 0
        self.socket.sendall(handshake("bare-caller"))
        self.receive()

    def receive(self) -> Any:
        received = self.received
        while len(received) < 4 or len(received) < 4 + int.from_bytes(received[:4]):
            arrived = self.socket.recv(65536)
            if not arrived:
                raise EOFError
            received += arrived
        end = 4 + int.from_bytes(received[:4])
        message = json.loads(bytes(received[4:end]))
        del received[:end]
        return message

    def call(self, trigger: str) -> Any:
        self.next += 1
        id = str(self.next)
        self.socket.sendall(frame(call_of(id, trigger)))
        while True:
            message = self.receive()
            if message.get("in_reply_to") == id:
                return response_of(message)


def bare_caller(path: str, trigger: str) -> None:
    bare = Bare(path)
    obey(lambda: bare.call(trigger))


class BareLoop(asyncio.Protocol):
    """The same for asyncio."""

    def __init__(self) -> None:
        self.received = b""
        self.pending: dict[str, asyncio.Future[Any]] = {}
        self.next = 0
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.pending["hello"] = self.loop.create_future()
        hello = {"action": "handshake", "id": "hello", "app_id": "bare-loop", "pools": [POOL]}
        transport.write(frame(hello))

    def data_received(self, data: bytes) -> None:
        self.received += data
        start = 0
        while len(self.received) >= start + 4:
            end = start + 4 + int.from_bytes(self.received[start:start + 4])
            if len(self.received) < end:
                break
            message = json.loads(self.received[start + 4:end])
            start = end
            future = self.pending.pop(message.get("in_reply_to"), None)
            if future is None or future.done():
                continue
            try:
                future.set_result(response_of(message))
            except RuntimeError as error:
                future.set_exception(error)
        self.received = self.received[start:]

    def call(self, trigger: str) -> Any:
        self.next += 1
        id = str(self.next)
        future = self.pending[id] = self.loop.create_future()
        self.transport.write(frame(call_of(id, trigger)))
        return future


def bare_aio_caller(path: str, trigger: str) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        _, bare = await loop.create_unix_connection(BareLoop, path)
        await bare.pending["hello"]
        await obey_on_loop(lambda: bare.call(trigger))

    asyncio.run(main())


# What people use now.


def nats_handler(address: str, trigger: str) -> None:
    import nats

    async def main() -> None:
        client = await nats.connect(address)

        async def echo(message: Any) -> None:
            await message.respond(json.dumps(json.loads(message.data)).encode())

        await client.subscribe(trigger, cb=echo)
        await client.flush()
        say("ready")
        await asyncio.Event().wait()

    asyncio.run(main())


def nats_caller(address: str, trigger: str) -> None:
    import nats

    async def main() -> None:
        client = await nats.connect(address)

        async def call() -> Any:
            reply = await client.request(trigger, json.dumps(DATA).encode(), timeout=30)
            return json.loads(reply.data)

        await obey_on_loop(call)

    asyncio.run(main())


def redis_handler(path: str, trigger: str) -> None:
    import redis

    client = redis.Redis(unix_socket_path=path, socket_timeout=None)
    say("ready")
    while True:
        popped = client.blpop([trigger], timeout=0)
        client.rpush(f"{trigger}-answers", json.dumps(json.loads(popped[1])))


def redis_caller(path: str, trigger: str) -> None:
    import redis

    client = redis.Redis(unix_socket_path=path, socket_timeout=None)

    def call() -> Any:
        client.rpush(trigger, json.dumps(DATA))
        return json.loads(client.blpop([f"{trigger}-answers"], timeout=30)[1])

    obey(call)


def zmq_handler(path: str, _: str) -> None:
    import zmq

    answers = zmq.Context().socket(zmq.REP)
    answers.bind(f"ipc://{path}")
    say("ready")
    while True:
        answers.send_json(answers.recv_json())


def zmq_caller(path: str, _: str) -> None:
    import zmq

    asks = zmq.Context().socket(zmq.REQ)
    asks.connect(f"ipc://{path}")

    def call() -> Any:
        asks.send_json(DATA)
        return asks.recv_json()

    obey(call)


def echo_pipe(end: Any) -> None:
    while True:
        end.send(end.recv())


def child(answer: Any) -> Any:
    """Starts a child that answers what comes through a pipe, until this process has ended."""
    import multiprocessing

    ours, theirs = multiprocessing.Pipe()

    def work() -> None:
        # Its copy would keep the pipe open.
        ours.close()
        with contextlib.suppress(EOFError, OSError):
            answer(theirs)

    multiprocessing.get_context("fork").Process(target=work, daemon=True).start()
    theirs.close()
    return ours


def pipe_caller(*_: str) -> None:
    """Both ends: a child of this process answers."""
    ours = child(echo_pipe)

    def call() -> Any:
        ours.send(DATA)
        return ours.recv()

    obey(call)


# Blocks. An order names one of these measurements.

LARGE = 256 << 20


def timed(times: int, act: Any) -> list[int]:
    found = []
    for _ in range(times):
        begin = clock()
        act()
        found.append(clock() - begin)
    return found


def block_handler(path: str, trigger: str) -> None:
    """Answers the last byte of the block that it is given."""
    import latzero

    with latzero.connect(url(path, f"serves-{trigger}"), transient=True) as app:

        @app.serve(trigger)
        def last(frame: Any) -> int:
            return int(frame.view().array[-1])

        say("ready")
        app.wait()


def block_caller(path: str, trigger: str) -> None:
    import latzero

    with latzero.connect(url(path, "block-caller"), transient=True) as app:
        large = app.block("large", shape=LARGE, dtype="u1", create=True)
        with large.write(keep=False) as array:
            array[:] = 7

        # The handler answers what it read in the block, so it certainly had it.
        def call() -> None:
            assert app.call(trigger, frame=large) == 7

        huge = app.block("huge", shape=1 << 30, dtype="u1", create=True)
        with huge.write(keep=False, part=slice(0, 4096)) as array:
            array[:] = 1

        def attach() -> None:
            block = app.block("huge")
            assert block.view().array[0] == 1
            block.close()

        measures = {"argument": call, "attach": attach, "view": lambda: huge.view().array}
        for order in orders():
            act = measures[order["load"]]
            timed(order["warmup"], act)
            say({"p50_ns": median(timed(order["calls"], act))})


def last_of_pipe(end: Any) -> None:
    while True:
        end.send(end.recv()[-1])


def large_pipe_caller(*_: str) -> None:
    """Sends the same array to a child, pickled, which answers its last byte."""
    import numpy

    ours = child(last_of_pipe)
    array = numpy.full(LARGE, 7, "u1")

    def call() -> None:
        ours.send(array)
        assert ours.recv() == 7

    for order in orders():
        say({"p50_ns": median(timed(order["calls"], call))})


def large_redis_caller(path: str, _: str) -> None:
    """Sets the bytes and gets them, which is all that another process would do."""
    import numpy
    import redis

    client = redis.Redis(unix_socket_path=path, socket_timeout=None)
    array = numpy.full(LARGE, 7, "u1")

    def call() -> None:
        client.set("large", array.data)
        assert numpy.frombuffer(client.get("large"), "u1")[-1] == 7

    for order in orders():
        say({"p50_ns": median(timed(order["calls"], call))})


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
