"""The peer of the shared scenarios in Python: it reads one command per line and writes one answer
per line. `peer.py` speaks for `latzero`, `peer.py aio` for `latzero.aio`. The commands are listed
in conformance/scenarios/README.md.

It uses only public names. Commands are coroutines in both modes: in the blocking mode nothing in
them ever waits for a loop, so a thread runs each to its end in one step.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import threading
import traceback
from collections import defaultdict
from typing import Any

import latzero

IS_AIO = sys.argv[1:] == ["aio"]
EXACT = 2**53 - 1
LONG = 3600.0
# How often a plain handler looks whether its call was cancelled.
LOOK = 0.002


async def got(value: Any) -> Any:
    """The value, or what it resolves to."""
    return await value if inspect.isawaitable(value) else value


async def enter(manager: Any) -> Any:
    return await manager.__aenter__() if IS_AIO else manager.__enter__()


async def leave(manager: Any, *raised: Any) -> None:
    if IS_AIO:
        await manager.__aexit__(*raised)
    else:
        manager.__exit__(*raised)


async def following(items: Any) -> Any:
    """The next item of an iterator of either kind."""
    try:
        item = await items.__anext__() if IS_AIO else next(items)
    except (StopIteration, StopAsyncIteration):
        return {"over": True}
    return {"item": item}


class Board:
    """What commands and handlers share."""

    def __init__(self) -> None:
        self.notes: dict[str, list[Any]] = defaultdict(list)
        self.permits: dict[str, int] = defaultdict(int)
        self.changed = threading.Condition()
        self.is_over = False

    def release(self, of: str) -> None:
        with self.changed:
            self.permits[of] += 1
            self.changed.notify_all()

    def end(self) -> None:
        with self.changed:
            self.is_over = True
            self.changed.notify_all()

    def take(self, of: str) -> bool:
        if self.permits[of] > 0:
            self.permits[of] -= 1
            return True
        return False

    def wait(self, of: str, request: Any = None) -> bool:
        """Waits for `release`; whether that came before the end."""
        with self.changed:
            while not self.take(of):
                if self.is_over or request is not None and request.cancelled:
                    return False
                self.changed.wait(LOOK)
        return True

    async def waiting(self, of: str) -> bool:
        """As `wait`, for a task."""
        while not self.take(of):
            if self.is_over:
                return False
            await asyncio.sleep(LOOK)
        return True


board = Board()


class Peer:
    def __init__(self) -> None:
        self.apps: dict[str, Any] = {}
        self.blocks: dict[str, Any] = {}
        self.things: dict[str, Any] = {}

    def read(self, value: Any) -> Any:
        """A value of a command; tags become what they stand for."""
        if isinstance(value, list):
            return [self.read(item) for item in value]
        if not isinstance(value, dict):
            return value
        if len(value) == 1:
            [(tag, inside)] = value.items()
            if tag == "$bytes":
                return bytes.fromhex(inside)
            if tag == "$int":
                return int(inside)
            if tag == "$float":
                return float(inside)
            if tag == "$block":
                return self.blocks[inside]
            if tag == "$writable":
                return latzero.writable(self.blocks[inside])
            if tag == "$nested":
                nested: list[Any] = []
                for _ in range(inside - 1):
                    nested = [nested]
                return nested
        return {key: self.read(item) for key, item in value.items()}

    def calling(self, command: Any, *options: str) -> tuple[tuple[str, Any], dict[str, Any]]:
        """The arguments of a call."""
        names = (
            "to", "pool", "key", "headers", "idempotency_key", "redeliver", "attempts",
            "privileged", *options,
        )
        given = {name: command[name] for name in names if name in command}
        if "timeout_ms" in command:
            given["timeout"] = command["timeout_ms"] / 1000
        return (command["name"], self.read(command.get("data"))), given

    async def run(self, command: Any) -> Any:
        what = getattr(self, "do_" + command["do"])
        app = self.apps.get(command.get("app"))
        return await what(command, app)

    async def do_connect(self, command: Any, _: Any) -> Any:
        options = dict(command.get("options", {}))
        # Always so in Python.
        options.pop("bigint", None)
        options.pop("strict", None)
        if "call_timeout_ms" in options:
            options["call_timeout"] = options.pop("call_timeout_ms") / 1000
        connect = latzero.aio.connect if IS_AIO else latzero.connect
        app = self.apps[command["app"]] = await got(connect(command["url"], **options))
        return {"app_id": app.app_id}

    async def do_state(self, command: Any, app: Any) -> Any:
        return {
            "app_id": app.app_id, "joined": app.joined, "is_connected": app.is_connected,
            "is_stored": app.is_stored,
        }

    async def do_instance(self, command: Any, app: Any) -> Any:
        return app.instance

    async def do_close(self, command: Any, app: Any) -> Any:
        del self.apps[command["app"]]
        await got(app.close())

    async def do_join(self, command: Any, app: Any) -> Any:
        await got(app.join(command["pool"]))

    async def do_leave(self, command: Any, app: Any) -> Any:
        await got(app.leave(command["pool"]))

    async def do_apps(self, command: Any, app: Any) -> Any:
        return await got(app.apps())

    async def do_pools(self, command: Any, app: Any) -> Any:
        return await got(app.pools())

    async def do_trigger(self, command: Any, app: Any) -> Any:
        return await got(app.trigger(command["pool"], command["name"]))

    async def do_request(self, command: Any, app: Any) -> Any:
        return await got(app.request(command["message"]))

    async def do_ping(self, command: Any, app: Any) -> Any:
        return await got(app.ping()) < LONG

    async def do_call(self, command: Any, app: Any) -> Any:
        arguments, options = self.calling(command)
        return show(await got(app.call(*arguments, **options)))

    async def do_reply(self, command: Any, app: Any) -> Any:
        arguments, options = self.calling(command)
        reply = await got(app.reply(*arguments, **options))
        return {"data": show(reply.data), "headers": reply.headers}

    async def do_submit(self, command: Any, app: Any) -> Any:
        arguments, options = self.calling(command)
        self.things[command["as"]] = await got(app.submit(*arguments, **options))

    async def do_result(self, command: Any, app: Any) -> Any:
        return show(await got(self.things.pop(command["of"]).result()))

    async def do_park(self, command: Any, app: Any) -> Any:
        arguments, options = self.calling(command, "id")
        parked = self.things[command["as"]] = await got(app.park(*arguments, **options))
        return parked.id

    async def do_answer(self, command: Any, app: Any) -> Any:
        return show(await got(self.things.pop(command["of"]).answer()))

    async def do_answers(self, command: Any, app: Any) -> Any:
        self.things[command["as"]] = await got(app.answers())

    async def do_stream(self, command: Any, app: Any) -> Any:
        arguments, options = self.calling(command, "window")
        self.things[command["as"]] = await got(app.stream(*arguments, **options))

    async def do_next(self, command: Any, app: Any) -> Any:
        found = await following(self.things[command["of"]])
        if "item" in found:
            found["item"] = item_of(found["item"])
        return found

    async def do_progress(self, command: Any, app: Any) -> Any:
        return show(self.things[command["of"]].progress)

    async def do_end(self, command: Any, app: Any) -> Any:
        return show(self.things[command["of"]].end)

    async def do_cancel(self, command: Any, app: Any) -> Any:
        self.things.pop(command["of"]).cancel()

    async def do_forget(self, command: Any, app: Any) -> Any:
        del self.things[command["of"]]

    async def do_emit(self, command: Any, app: Any) -> Any:
        names = ("to", "pool", "headers", "one", "count", "privileged")
        given = {name: command[name] for name in names if name in command}
        return await got(app.emit(command["name"], self.read(command.get("data")), **given))

    async def do_events(self, command: Any, app: Any) -> Any:
        self.things[command["as"]] = await got(app.events(command["name"]))

    async def do_listen(self, command: Any, app: Any) -> Any:
        notes = board.notes[command["as"]]
        app.on(command["name"], lambda event: notes.append(show(event.data)))
        if IS_AIO:
            await app.ready()

    async def do_watch(self, command: Any, app: Any) -> Any:
        self.things[command["as"]] = await got(app.watch(command["pool"]))

    async def do_serve(self, command: Any, app: Any) -> Any:
        name = command["name"]
        handlers = LoopHandlers(name) if IS_AIO else Handlers(name)
        names = ("pools", "strategy", "concurrency", "doc", "schema", "privileged")
        options = {key: command[key] for key in names if key in command}
        app.serve(name, getattr(handlers, command["as"]), **options)
        if IS_AIO:
            await app.ready()

    async def do_unserve(self, command: Any, app: Any) -> Any:
        await got(app.unserve(command["name"]))

    async def do_notes(self, command: Any, app: Any) -> Any:
        return list(board.notes[command["of"]])

    async def do_release(self, command: Any, app: Any) -> Any:
        board.release(command["of"])

    async def do_block(self, command: Any, app: Any) -> Any:
        names = (
            "shape", "dtype", "size", "create", "write", "pool", "kind", "slots", "lifetime",
            "readable_by", "writable_by",
        )
        options = {name: command[name] for name in names if name in command}
        self.blocks[command["as"]] = await got(app.block(command["id"], **options))

    async def do_blocks(self, command: Any, app: Any) -> Any:
        return [block["block_id"] for block in await got(app.blocks(command.get("pool")))]

    async def do_about(self, command: Any, app: Any) -> Any:
        block = self.blocks[command["block"]]
        return {
            "id": block.id, "pool": block.pool, "nbytes": block.nbytes, "version": block.version,
            "generation": block.generation, "is_live": block.is_live,
            "is_mapped": block.is_mapped, "dtype": block.dtype,
            "shape": None if block.shape is None else list(block.shape),
        }

    async def do_read(self, command: Any, app: Any) -> Any:
        return numbers(await got(self.blocks[command["block"]].read()))

    async def do_read_at(self, command: Any, app: Any) -> Any:
        block = self.blocks[command["block"]]
        return show(await got(block.read_at(command["offset"], command["length"])))

    async def do_view(self, command: Any, app: Any) -> Any:
        view = await got(self.blocks[command["block"]].view())
        self.things[command["as"]] = view
        return {"version": view.version}

    async def do_seen(self, command: Any, app: Any) -> Any:
        view = self.things[command["of"]]
        return {"values": numbers(view.array), "valid": view.valid, "stale": view.stale}

    async def do_write(self, command: Any, app: Any) -> Any:
        values = command["values"]
        at = command.get("at", 0)
        options = {"keep": command.get("keep", True)}
        if "wait_ms" in command:
            options["wait"] = command["wait_ms"] / 1000
        if command.get("part"):
            options["part"] = slice(at, at + len(values))
            at = 0
        write = self.blocks[command["block"]].write(**options)
        array = await enter(write)
        try:
            for place, value in enumerate(values, at):
                array[place] = value
            if hold := command.get("hold"):
                board.notes[hold].append("holds")
                if IS_AIO:
                    await board.waiting(hold)
                else:
                    board.wait(hold)
            if command.get("fail"):
                raise RuntimeError("told to fail")
        except RuntimeError as error:
            await leave(write, RuntimeError, error, None)
            raise
        await leave(write, None, None, None)
        return write.version

    async def do_write_many(self, command: Any, app: Any) -> Any:
        version = None
        writer = await enter(self.blocks[command["block"]].writer())
        for values in command["versions"]:
            write = writer.write(keep=False)
            array = await enter(write)
            for place, value in enumerate(values):
                array[place] = value
            await leave(write, None, None, None)
            version = write.version
        await leave(writer, None, None, None)
        return version

    async def do_write_at(self, command: Any, app: Any) -> Any:
        options = {"if_version": command["if_version"]} if "if_version" in command else {}
        return await got(self.blocks[command["block"]].write_at(
            command["offset"], self.read(command["data"]), **options
        ))

    async def do_cas(self, command: Any, app: Any) -> Any:
        return show(await got(self.blocks[command["block"]].cas(
            command["offset"], self.read(command["expected"]), self.read(command["data"])
        )))

    async def do_lock(self, command: Any, app: Any) -> Any:
        options: dict[str, Any] = {"shared": command.get("shared", False)}
        for name in ("wait", "lease"):
            if f"{name}_ms" in command:
                options[name] = command[f"{name}_ms"] / 1000
        lock = self.blocks[command["block"]].lock(**options)
        await enter(lock)
        self.things[command["as"]] = lock
        return {"fence": lock.fence}

    async def do_renew(self, command: Any, app: Any) -> Any:
        lock = self.things[command["of"]]
        await got(lock.renew(command["lease_ms"] / 1000))
        return lock.is_held

    async def do_holds(self, command: Any, app: Any) -> Any:
        return self.things[command["of"]].is_held

    async def do_unlock(self, command: Any, app: Any) -> Any:
        await leave(self.things.pop(command["of"]), None, None, None)

    async def do_wait(self, command: Any, app: Any) -> Any:
        timeout = command.get("timeout_ms")
        return await got(self.blocks[command["block"]].wait(
            command.get("beyond"), None if timeout is None else timeout / 1000
        ))

    async def do_changes(self, command: Any, app: Any) -> Any:
        self.things[command["as"]] = await got(self.blocks[command["block"]].changes())

    async def do_resize(self, command: Any, app: Any) -> Any:
        await got(self.blocks[command["block"]].resize(command["size"]))

    async def do_flush(self, command: Any, app: Any) -> Any:
        return await got(self.blocks[command["block"]].flush())

    async def do_remove(self, command: Any, app: Any) -> Any:
        await got(self.blocks[command["block"]].remove())

    async def do_info(self, command: Any, app: Any) -> Any:
        return await got(self.blocks[command["block"]].info())

    async def do_close_block(self, command: Any, app: Any) -> Any:
        self.blocks.pop(command["block"]).close()

    async def do_reset(self, command: Any, app: Any) -> Any:
        global board
        board.end()
        self.things.clear()
        self.blocks.clear()
        while self.apps:
            _, app = self.apps.popitem()
            try:
                await got(app.close())
            except latzero.LatZeroError:
                pass  # The server may have been killed.
        board = Board()


def numbers(array: Any) -> list[Any]:
    return list(array.tolist())


def show(value: Any) -> Any:
    """A value for an answer, with tags for what JSON can't say everywhere."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"$bytes": bytes(value).hex()}
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > EXACT:
        return {"$int": str(value)}
    if isinstance(value, list):
        return [show(item) for item in value]
    if isinstance(value, dict):
        return {key: show(item) for key, item in value.items()}
    return value


def item_of(item: Any) -> Any:
    if isinstance(item, latzero.Event):
        return {
            "name": item.name, "pool": item.pool, "data": show(item.data),
            "origin": item.origin[0], "lost": item.lost, "headers": item.headers,
        }
    if isinstance(item, latzero.Presence):
        return {
            "event": item.event, "pool": item.pool, "app_id": item.app_id,
            "name": item.fields.get("name"),
        }
    if isinstance(item, latzero.Answer):
        try:
            return {"id": item.id, "result": show(item.result())}
        except latzero.LatZeroError as error:
            return {"id": item.id, "error": describe(error)}
    return show(item)


def describe(error: BaseException) -> dict[str, Any]:
    if isinstance(error, latzero.LatZeroError):
        described = {
            "code": error.code, "message": error.message, "ran": error.ran, "data": error.data,
            "family": type(error).__name__, "retryable": error.retryable,
        }
        if isinstance(error, latzero.HandlerFailed):
            described["type"], described["traceback"] = error.type, error.remote_traceback
        return described
    if str(error) == "told to fail":
        return {"code": "other", "message": str(error)}
    return {"code": "peer", "message": "".join(traceback.format_exception(error))}


class Common:
    """Handlers that are the same in both modes."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def notes(self) -> list[Any]:
        return board.notes[self.name]

    def echo(self, data: Any, /) -> Any:
        return data

    def double(self, n: int) -> int:
        return 2 * n

    typed = double

    def about(self, data: Any, /, *, request: latzero.Request) -> Any:
        left = request.time_left
        return {
            "name": request.name, "pool": request.pool, "origin": request.origin[0],
            "headers": request.headers, "key": request.key, "attempt": request.attempt,
            "data": show(data), "has_time": left is not None and left < LONG,
        }

    def fail(self, message: str) -> None:
        raise ArithmeticError(message)

    def refuse(self, code: str, message: str, data: Any = None) -> None:
        raise latzero.Failure(code, message, data=data)

    def record(self, data: Any, /, *, request: latzero.Request) -> None:
        self.notes.append({
            "data": show(data), "origin": request.origin[0], "headers": request.headers,
        })

    def counted(self, n: int, fail_at: Any, progress: bool) -> Any:
        for i in range(n):
            if i == fail_at:
                raise ArithmeticError("told to fail")
            if progress:
                yield latzero.Progress({"of": n, "done": i})
            yield {"i": i}


class Handlers(Common):
    """Plain functions and generators, for the blocking app."""

    def hold(self, request: latzero.Request) -> Any:
        self.notes.append({"started": request.attempt})
        if board.wait(self.name, request):
            return {"attempt": request.attempt}
        self.notes.append("cancelled")
        raise latzero.Failure("cancelled", "nobody wants the answer")

    def count(self, n: int, fail_at: Any = None, progress: bool = False) -> Any:
        yield from self.counted(n, fail_at, progress)
        return {"sent": n}

    def bytes(self) -> Any:
        for i in range(3):
            yield bytes([i, i])
        return b"\xff"

    def endless(self) -> Any:
        sent = 0
        try:
            while True:
                yield sent
                sent += 1
                self.notes[:] = [sent]
        finally:
            self.notes.append("closed")

    def via(self, name: str, data: Any, request: latzero.Request) -> Any:
        return {"via": request.app.call(name, data)}

    def sum(self, frame: Any) -> Any:
        return {"sum": sum(numbers(frame.read())), "is_mapped": frame.is_mapped}

    def fill(self, frame: Any, value: Any) -> Any:
        with frame.write(keep=False) as array:
            for place in range(len(array)):
                array[place] = value
        return frame.version


class LoopHandlers(Common):
    """Coroutines and async generators, for the app of a loop."""

    async def hold(self, request: latzero.Request) -> Any:
        notes = self.notes
        notes.append({"started": request.attempt})
        try:
            if await board.waiting(self.name):
                return {"attempt": request.attempt}
        except asyncio.CancelledError:
            notes.append("cancelled")
            raise
        raise latzero.Failure("cancelled", "the peer is reset")

    async def count(self, n: int, fail_at: Any = None, progress: bool = False) -> Any:
        for item in self.counted(n, fail_at, progress):
            yield item

    async def bytes(self) -> Any:
        for i in range(3):
            yield bytes([i, i])

    async def endless(self) -> Any:
        notes, sent = self.notes, 0
        try:
            while True:
                yield sent
                sent += 1
                notes[:] = [sent]
        finally:
            notes.append("closed")

    async def via(self, name: str, data: Any, request: latzero.Request) -> Any:
        return {"via": await request.app.call(name, data)}

    async def sum(self, frame: Any) -> Any:
        return {"sum": sum(numbers(await frame.read())), "is_mapped": frame.is_mapped}

    async def fill(self, frame: Any, value: Any) -> Any:
        async with frame.write(keep=False) as array:
            for place in range(len(array)):
                array[place] = value
        return frame.version


peer = Peer()
output = threading.Lock()


def say(number: int, answer: dict[str, Any]) -> None:
    line = json.dumps({"number": number, **answer}) + "\n"
    with output:
        sys.stdout.write(line)
        sys.stdout.flush()


async def obey(line: str) -> None:
    command = json.loads(line)
    try:
        answer = {"ok": await peer.run(command)}
    except Exception as error:
        answer = {"error": describe(error)}
    say(command["number"], answer)


def obey_at_once(line: str) -> None:
    """Runs a command that never waits for a loop."""
    try:
        obey(line).send(None)
    except StopIteration:
        return
    raise AssertionError(f"this waited for a loop: {line}")


def main() -> None:
    for line in sys.stdin:
        threading.Thread(target=obey_at_once, args=(line,), daemon=True).start()
    os._exit(0)


async def main_of_loop() -> None:
    loop = asyncio.get_running_loop()
    tasks = set()
    reader = asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        task = loop.create_task(obey(line.decode()))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    os._exit(0)


if IS_AIO:
    asyncio.run(main_of_loop())
else:
    main()
