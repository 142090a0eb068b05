"""The asyncio interface against a real server."""

import asyncio
import gc
import inspect
import subprocess
import sys
import threading
import time

import latzero
import latzero.aio
import latzero.testing
import pytest


def run(latzero_server, request, test):
    """Runs `test(serves, calls)` with two apps in a separate pool."""
    pool = "".join(c if c.isalnum() else "-" for c in request.node.name)[:60]

    async def main():
        async with (
            latzero.aio.connect(latzero_server.url(f"serves-{pool}", pool)) as serves,
            latzero.aio.connect(latzero_server.url(f"calls-{pool}", pool)) as calls,
        ):
            await asyncio.wait_for(test(serves, calls), 30)

    asyncio.run(main())


@pytest.fixture
def on_loop(latzero_server, request):
    """A decorator that runs a test with its two apps."""
    return lambda test: run(latzero_server, request, test)


def test_calls_and_handlers(on_loop):
    @on_loop
    async def test(serves, calls):
        @serves.serve
        async def double(n: int):
            await asyncio.sleep(0)
            assert latzero.request().name == "double"
            return n * 2

        @serves.serve
        def plain(n: int):
            assert threading.current_thread() is not threading.main_thread()
            return -n

        @serves.serve(inline=True)
        def inline(n: int, request: latzero.Request):
            assert threading.current_thread() is threading.main_thread()
            return [n, request.origin[0]]

        await serves.ready()
        assert await calls.call("double", n=4) == 8
        assert await calls.call("plain", n=4) == -4
        assert await calls.call("inline", n=4) == [4, calls.app_id]
        reply = await calls.reply("double", {"n": 1})
        assert reply.data == 2 and reply.headers == {}
        with pytest.raises(latzero.BadRequest):
            await calls.call("double", m=4)
        many = await asyncio.gather(*(calls.call("double", n=n) for n in range(200)))
        assert many == [n * 2 for n in range(200)]


def test_handlers_run_side_by_side(on_loop):
    @on_loop
    async def test(serves, calls):
        both = asyncio.Barrier(3)

        @serves.serve
        async def meet():
            async with asyncio.timeout(10):
                await both.wait()

        await serves.ready()
        await asyncio.gather(calls.call("meet"), calls.call("meet"), both.wait())


def test_errors(on_loop):
    @on_loop
    async def test(serves, calls):
        with pytest.raises(latzero.Unavailable):
            await calls.call("nobody")

        @serves.serve
        async def fails():
            raise KeyError("x")

        @serves.serve
        async def own():
            raise latzero.Failure("mine", data=[1])

        @serves.serve
        async def hangs():
            await asyncio.Event().wait()

        await serves.ready()
        with pytest.raises(latzero.HandlerFailed) as raised:
            await calls.call("fails")
        assert raised.value.type == "KeyError" and "in fails" in raised.value.remote_traceback
        with pytest.raises(latzero.HandlerFailed) as raised:
            await calls.call("own")
        assert (raised.value.code, raised.value.data) == ("mine", [1])
        with pytest.raises(TimeoutError):
            await calls.call("hangs", timeout=0.05)


def test_a_refusal_is_raised_later(on_loop):
    @on_loop
    async def test(serves, calls):
        serves.serve("not a name\n", lambda: None)
        for later in (
            serves.ready, serves.run, serves.ping,
            lambda: serves.call("x"), lambda: serves.emit("x"),
        ):
            with pytest.raises(latzero.BadRequest, match="invalid_name"):
                await later()
        await serves.unserve("not a name\n")
        await serves.ping()


def test_a_refusal_is_raised_by_all_that_waits(on_loop):
    @on_loop
    async def test(serves, calls):
        calls.serve("one", lambda: 1)
        await calls.ready()
        block = await serves.block("b", size=8, create=True)
        pending, stream = serves.submit("one"), serves.stream("one")
        held = await serves.park("one")
        states = []
        serves.on_state(states.append)
        serves.serve("not a name\n", lambda: None)
        for later in (
            pending.result, lambda: anext(stream), held.answer, block.read, block.info,
            block.view, block.write().__aenter__, lambda: anext(block.changes()),
            lambda: anext(serves.answers()), lambda: anext(serves.events("e")),
            lambda: anext(serves.watch(serves.joined[0])),
        ):
            with pytest.raises(latzero.BadRequest, match="invalid_name"):
                await later()
        await serves.unserve("not a name\n")
        assert (await pending.result(), await held.answer()) == (1, 1)
        await serves.close()
        while not states:
            await asyncio.sleep(0)


@pytest.mark.parametrize("name, doc, error", [
    ("not a name\n", None, "invalid_name"), ("name", "x" * 100_000, "too_large"),
], ids=["name", "doc"])
def test_leaving_an_app_raises_a_refusal(latzero_server, name, doc, error):
    async def main():
        async with latzero.aio.connect(latzero_server.url("leaves"), transient=True) as app:
            app.serve(name, lambda: None, doc=doc)

    with pytest.raises(latzero.BadRequest, match=error):
        asyncio.run(main())


def test_run_serves_until_the_app_is_closed(on_loop):
    @on_loop
    async def test(serves, calls):
        serves.serve("served", lambda: 1)
        runs = asyncio.create_task(serves.run())
        await asyncio.sleep(0)
        # Both wait for the registration, and one that gives up leaves it to the other.
        gives_up = asyncio.create_task(serves.ready())
        await asyncio.sleep(0)
        gives_up.cancel()
        await serves.ready()
        assert await calls.call("served", timeout=10) == 1
        assert not runs.done()
        serves.serve("late", lambda: None)
        await serves.close()
        await asyncio.wait_for(runs, 10)


def test_a_handler_closes_its_app_and_answers(on_loop):
    @on_loop
    async def test(serves, calls):
        @serves.serve
        async def stop():
            await serves.close()
            return "bye"

        runs = asyncio.create_task(serves.run())
        assert await calls.call("stop", timeout=20) == "bye"
        await runs
        assert not serves.is_connected


def test_cancelling_a_task_cancels_the_call_and_its_handler(on_loop):
    @on_loop
    async def test(serves, calls):
        inside, cancelled = asyncio.Event(), asyncio.Event()

        @serves.serve
        async def hangs():
            inside.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        await serves.ready()
        task = asyncio.create_task(calls.call("hangs"))
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await cancelled.wait()
        assert await calls.ping() >= 0


def test_answers_find_their_calls_while_others_are_cancelled(on_loop):
    import random

    @on_loop
    async def test(serves, calls):
        @serves.serve
        async def later(n: int):
            await asyncio.sleep(n % 7 / 1000)
            return n

        await serves.ready()
        rng = random.Random(4)

        async def one(n):
            assert await calls.call("later", n=n) == n
            return n

        for _ in range(10):
            tasks = [asyncio.create_task(one(n)) for n in range(200)]
            cancelled = set()
            for _ in range(6):
                await asyncio.sleep(rng.random() / 400)
                for n in rng.sample(range(200), 20):
                    if tasks[n].cancel():
                        cancelled.add(n)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for n, result in enumerate(results):
                is_cancelled = isinstance(result, asyncio.CancelledError)
                assert is_cancelled and n in cancelled or result == n


def test_streams(on_loop):
    @on_loop
    async def test(serves, calls):
        closed = asyncio.Event()

        @serves.serve
        async def count(n: int, request: latzero.aio.Request):
            await request.progress("begun")
            try:
                for i in range(n):
                    yield i
                yield latzero.Progress(1.0)
            finally:
                closed.set()

        await serves.ready()
        items = calls.stream("count", n=300, window=4)
        assert [item async for item in items] == list(range(300))
        closed.clear()
        async with calls.stream("count", n=10**9, window=2) as items:
            async for item in items:
                if item == 5:
                    break
        await closed.wait()
        # Giving up a wait leaves the stream usable.
        items = calls.stream("count", n=1)
        assert [item async for item in items] == [0]


def test_events_and_presence(on_loop):
    @on_loop
    async def test(serves, calls):
        events = await serves.events("done")
        told = asyncio.Queue()
        serves.on("told", told.put)
        await serves.ready()
        assert await calls.emit("done", n=1, count=True) == 1
        event = await anext(events)
        assert (event.data, event.origin[0]) == ({"n": 1}, calls.app_id)
        await calls.emit("told", 5)
        assert (await told.get()).data == 5
        [pool] = calls.joined
        watch = await calls.watch(pool)
        await serves.unserve("nothing")
        await serves.leave(pool)
        event = await anext(watch)
        assert event.app_id == serves.app_id


@pytest.mark.parametrize("is_plain", [True, False])
def test_a_handler_of_emits_has_a_bounded_number_of_them(on_loop, is_plain):
    @on_loop
    async def test(serves, calls):
        go, seen = threading.Event(), []

        def plain(n: int, request: latzero.Request):
            assert go.wait(20)
            seen.append(request.lost)

        async def task(n: int, request: latzero.aio.Request):
            while not go.is_set():
                await asyncio.sleep(0.01)
            seen.append(request.lost)

        serves.serve("slow", plain if is_plain else task)
        await serves.ready()

        async def handled(count):
            while len(seen) < count:
                await asyncio.sleep(0.01)

        for n in range(2000):
            await calls.emit("slow", n=n)
        while serves.lost < 2000 - 1024:
            await asyncio.sleep(0.01)
        go.set()
        await handled(1024)
        await calls.emit("slow", n=0)
        await handled(1025)
        assert (len(seen), sum(seen), serves.lost) == (1025, 2000 - 1024, 2000 - 1024)


def test_many_in_flight_and_parked(on_loop):
    @on_loop
    async def test(serves, calls):
        parked = await calls.park("bill", order=17, id="order-17", timeout=60)
        serves.serve("bill", lambda order: order + 1)
        assert await parked.answer() == 18
        await calls.park("bill", order=1, id="order-1", timeout=60)
        answer = await anext(calls.answers())
        assert (answer.id, answer.result()) == ("order-1", 2)
        pending = [calls.submit("bill", order=n) for n in range(50)]
        assert [await call.result(10) for call in pending] == list(range(1, 51))

        @serves.serve
        async def hang():
            await asyncio.Event().wait()

        await serves.ready()
        hangs = calls.submit("hang")
        hangs.cancel()
        with pytest.raises(latzero.Cancelled):
            await hangs.result()


def test_blocks(on_loop):
    np = pytest.importorskip("numpy")

    @on_loop
    async def test(serves, calls):
        @serves.serve
        async def mean(frame):
            assert isinstance(frame, latzero.aio.Block)
            async with frame.view() as a:
                return float(a.mean())

        await serves.ready()
        block = await calls.block("frame", shape=(10, 10), dtype="f4", create=True)
        async with block.write() as a:
            a[:] = 2
        assert await calls.call("mean", frame=block) == 2
        assert (await block.read()).sum() == 200 and await block.read_at(0, 2) == b"\0\0"
        async with block.writer() as writer:
            for n in range(3):
                async with writer.write(keep=False) as a:
                    a[:] = n
        assert block.version == 4
        waits = asyncio.create_task(block.wait(timeout=10))
        changes = await block.changes()
        change = asyncio.create_task(anext(changes))
        await asyncio.sleep(0)
        with pytest.raises(ZeroDivisionError):
            async with block.write():
                1 / 0
        await block.write_at(0, b"abcd")
        assert await waits == 5 and await change in (4, 5)
        view = await block.view()
        assert view.version == 5
        async with block.lock() as lock:
            assert lock.is_held
        ids = set()
        for _ in range(3):
            shared = await calls.share(np.arange(5, dtype="f8"))
            assert await calls.call("mean", frame=shared) == 2
            ids.add(shared.id)
            del shared
        assert len(ids) == 1
        await block.resize(800)
        assert view.stale and (await block.info())["size"] == 800
        await block.remove()


def test_use_from_another_loop_is_an_error(latzero_server):
    async def connect():
        return await latzero.aio.connect(latzero_server.url("loops"), transient=True)

    async def use(app):
        with pytest.raises(RuntimeError, match="another event loop"):
            await app.call("nobody")

    app = asyncio.run(connect())
    asyncio.run(use(app))


def test_all_that_an_app_made_belongs_to_its_loop(latzero_server):
    pytest.importorskip("numpy")

    async def make():
        app = await latzero.aio.connect(latzero_server.url("made"), transient=True)
        block = await app.block("made", size=8, create=True)
        return app, block, app.stream("nobody"), block.lock(), await app.events("e")

    async def use(app, block, stream, lock, events):
        for work in (
            lambda: block.read(), lambda: block.read_at(0, 1), lambda: block.info(),
            lambda: anext(stream), lambda: lock.__aenter__(), lambda: anext(events),
            lambda: block.write().__aenter__(), lambda: app.ping(), lambda: app.close(),
        ):
            with pytest.raises(RuntimeError, match="another event loop"):
                await asyncio.wait_for(work(), 10)

    made = asyncio.run(make())
    asyncio.run(use(*made))


def test_events_presence_and_changes_are_async_iterators(on_loop):
    @on_loop
    async def test(serves, calls):
        # Without an await it listens from the first read on.
        async def first(items):
            async for item in items:
                return item

        event = asyncio.ensure_future(first(serves.events("done")))
        while not await calls.emit("done", n=1, count=True):
            await asyncio.sleep(0.01)
        assert (await event).data == {"n": 1}

        pool = serves.joined[0]
        seen = asyncio.ensure_future(first(calls.watch(pool)))
        await asyncio.sleep(0.2)
        serves.serve("served", lambda: None)
        # Of that trigger, or of the events that nobody reads any more.
        assert (await seen).event in ("trigger_added", "trigger_removed")

        block = await serves.block("iterated", size=8, create=True)
        version = asyncio.ensure_future(first((await calls.block("iterated")).changes()))
        await asyncio.sleep(0.2)
        await block.write_at(0, bytes(8))
        assert await version == block.version

        # An await returns the same one, and dropping it ends it.
        events = serves.events("again")
        assert not await calls.emit("again", count=True)
        assert await events is events and await events is events
        assert await calls.emit("again", n=2, count=True) == 1
        assert (await anext(events)).data == {"n": 2}
        # A wait that ends early does not end it.
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(events), 0.05)
        assert await calls.emit("again", n=3, count=True) == 1
        assert (await anext(events)).data == {"n": 3}
        del events
        gc.collect()
        while await calls.emit("again", count=True):
            await asyncio.sleep(0.01)

        events = await serves.events("closed")
        await events.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        while await calls.emit("closed", count=True):
            await asyncio.sleep(0.01)


def native_threads():
    import pathlib

    names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if name.startswith("latzero")]


def test_the_loop_itself_reads_and_answers(latzero_server):
    async def main():
        async with latzero.aio.connect(latzero_server.url("alone"), transient=True) as app:
            thread = threading.get_ident()

            @app.serve
            async def here():
                return threading.get_ident()

            await app.ready()
            # The thread that connected ends a little later.
            while "latzero-connect" in [name.strip() for name in native_threads()]:
                await asyncio.sleep(0.01)
            before = native_threads()
            assert await app.call("here", to="alone") == thread
            return before, native_threads()

    # Threads of earlier tests end a little later than their apps.
    while "latzero" in [name.strip() for name in native_threads()]:
        gc.collect()
        time.sleep(0.01)
    before, after = asyncio.run(main())
    assert before == after and "latzero" not in [name.strip() for name in after]


def test_more_than_a_socket_takes_at_once(on_loop):
    @on_loop
    async def test(serves, calls):
        @serves.serve
        async def echo(data, /):
            return data

        await serves.ready()
        long = b"x" * 4_000_000
        assert await calls.call("echo", long) == long
        # While it is sent, and received, others have their turn.
        many = await asyncio.gather(*(calls.call("echo", long[:500_000 + n]) for n in range(12)))
        assert [len(data) for data in many] == [500_000 + n for n in range(12)]


@pytest.mark.parametrize("end", ["close", "drop"])
def test_a_loop_forgets_an_app_that_has_ended(latzero_server, end):
    import os

    async def main():
        loop = asyncio.get_running_loop()

        async def once():
            app = await latzero.aio.connect(latzero_server.url("forgets"), transient=True)
            app.serve("f", lambda: None)
            await app.ready()
            if end == "close":
                await app.close()

        await once()
        gc.collect()
        async with asyncio.timeout(20):
            while latzero.aio._loops[loop].inner.apps:
                await asyncio.sleep(0.01)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            await once()
        gc.collect()
        async with asyncio.timeout(20):
            while latzero.aio._loops[loop].inner.apps:
                await asyncio.sleep(0.01)
        assert len(os.listdir("/proc/self/fd")) <= before

    asyncio.run(main())


def test_calls_and_handlers_go_on_after_a_restart():
    async def main():
        with latzero.testing.server() as server:
            async with (
                latzero.aio.connect(server.url("serves")) as serves,
                latzero.aio.connect(server.url("calls")) as calls,
            ):
                @serves.serve
                async def double(n: int):
                    return n * 2

                @serves.serve
                def plain(n: int):
                    return -n

                await serves.ready()
                for _ in range(3):
                    assert await calls.call("double", n=2) == 4
                    await asyncio.to_thread(server.restart)
                    async with asyncio.timeout(30):
                        while True:
                            try:
                                assert await calls.call("plain", n=2) == -2
                                break
                            except latzero.LatZeroError:
                                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_plain_functions_run_on_as_many_threads_as_asked(latzero_server):
    async def main():
        url = latzero_server.url("threads")
        async with latzero.aio.connect(url, transient=True, handler_threads=3) as app:
            together, seen = threading.Barrier(3), set()

            @app.serve
            def meet():
                seen.add(threading.get_ident())
                together.wait(20)

            await app.ready()
            await asyncio.gather(*(app.call("meet", to="threads") for _ in range(9)))
            assert len(seen) == 3

    asyncio.run(main())


def test_a_child_of_a_running_loop_leaves_the_parent_s_connection(latzero_server):
    import os

    async def main():
        async with latzero.aio.connect(latzero_server.url("forking"), transient=True) as app:
            app.serve("double", lambda n: n * 2, inline=True)
            await app.ready()
            for _ in range(5):
                child = os.fork()
                if child == 0:
                    try:
                        del app
                        gc.collect()
                        os._exit(0)
                    finally:
                        os._exit(1)
                _, status = await asyncio.to_thread(os.waitpid, child, 0)
                assert status == 0
                assert await app.call("double", n=2, to="forking") == 4

    asyncio.run(main())


def test_without_an_event_loop_an_error_names_the_way(latzero_server):
    # As under trio, whose loop is not asyncio's.
    connecting = latzero.aio.connect(latzero_server.url("trio")).__await__()
    with pytest.raises(RuntimeError, match="latzero.connect in trio.to_thread.run_sync"):
        connecting.send(None)


def test_states_are_told():
    async def main():
        with latzero.testing.server() as server:
            app = await latzero.aio.connect(server.url("states"))
            told = asyncio.Queue()
            app.on_state(told.put)
            # Not on this thread, which the loop needs to see the loss.
            await asyncio.to_thread(server.restart)
            for state in ("disconnected", "connected"):
                assert await asyncio.wait_for(told.get(), 30) == state
            await app.close()
            assert await asyncio.wait_for(told.get(), 30) == "closed"
            assert app.lost == 0
            await app.wait()

    asyncio.run(main())


def test_an_app_that_was_displaced_ends_its_wait(latzero_server):
    url = latzero_server.url("aio-displaced")

    async def main():
        first = await latzero.aio.connect(url)
        told = asyncio.Queue()

        @first.on_state
        def tell(state):
            told.put_nowait(state)

        async with latzero.aio.connect(url, takeover=True):
            with pytest.raises(latzero.Forbidden):
                await asyncio.wait_for(first.wait(), 30)
            assert await asyncio.wait_for(told.get(), 30) == "displaced"
        await first.close()

    asyncio.run(main())


def test_a_block_is_not_pickled(on_loop):
    import pickle

    @on_loop
    async def test(serves, calls):
        block = await calls.block("b", size=8, create=True)
        with pytest.raises(TypeError, match="send its id"):
            pickle.dumps(block)


def test_the_fixture_connects_on_the_test_s_loop(latzero_aio_app):
    async def main():
        async with latzero_aio_app as app:
            assert isinstance(app, latzero.aio.App) and await app.ping() >= 0

    asyncio.run(main())


def test_it_runs_under_anyio_on_asyncio(latzero_server):
    anyio = pytest.importorskip("anyio")

    async def main():
        async with latzero.aio.connect(latzero_server.url("anyio", "anyio")) as app:

            @app.serve
            async def slow(n: int):
                await anyio.sleep(0.01)
                return n * 2

            @app.serve
            async def hangs():
                try:
                    await anyio.sleep_forever()
                finally:
                    ended.set()

            ended = anyio.Event()
            await app.ready()
            got = []

            async def call(n):
                got.append(await app.call("slow", n=n))

            async with anyio.create_task_group() as group:
                for n in range(10):
                    group.start_soon(call, n)
            assert sorted(got) == list(range(0, 20, 2))

            # The end of a scope cancels its call, and that its handler.
            with anyio.move_on_after(0.1) as scope:
                await app.call("hangs")
            assert scope.cancelled_caught
            with anyio.fail_after(10):
                await ended.wait()

    anyio.run(main, backend="asyncio")


def test_two_event_loops_of_a_process_call_each_other(latzero_server):
    both = threading.Barrier(2)
    failed = []

    async def main(name, other):
        async with latzero.aio.connect(latzero_server.url(name, "two-loops")) as app:

            @app.serve(name)
            async def serves(n: int):
                await asyncio.sleep(0)
                return [threading.current_thread().name, n]

            await app.ready()
            await asyncio.to_thread(both.wait, 20)
            calls = (app.call(other, n=n) for n in range(500))
            got = await asyncio.wait_for(asyncio.gather(*calls), 20)
            assert got == [[other, n] for n in range(500)]
            await asyncio.to_thread(both.wait, 20)

    def run(name, other):
        try:
            asyncio.run(main(name, other))
        except BaseException as error:
            failed.append(error)
            both.abort()

    names = ("one-loop", "other-loop")
    threads = [
        threading.Thread(target=run, args=pair, name=pair[0]) for pair in (names, names[::-1])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed and not any(thread.is_alive() for thread in threads)


def test_uvloop_is_an_event_loop_like_others(latzero_server):
    uvloop = pytest.importorskip("uvloop")

    async def main():
        async with latzero.aio.connect(latzero_server.url("uv"), transient=True) as app:

            @app.serve
            async def double(n: int):
                await asyncio.sleep(0)
                return n * 2

            await app.ready()
            many = await asyncio.gather(*(app.call("double", n=n, to="uv") for n in range(100)))
            assert many == [n * 2 for n in range(100)]

    uvloop.run(main())


def test_a_loop_that_ends_leaves_nothing(latzero_server):
    import os

    async def main():
        app = await latzero.aio.connect(latzero_server.url("ends"), transient=True)
        hangs = asyncio.create_task(app.call("nobody", timeout=60))
        await asyncio.wait([hangs])
        hangs.exception()
        await app.close()

    asyncio.run(main())
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        asyncio.run(main())
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_script_ends_with_an_open_app(latzero_server):
    script = """
import asyncio, sys, latzero
async def main():
    global app
    app = await latzero.aio.connect(sys.argv[1])
    @app.serve
    async def f():
        await asyncio.Event().wait()
    await app.ready()
    call = app.submit("f", to="open")
    await app.ping()
asyncio.run(main())
print("end")
"""
    url = latzero_server.url("open")
    ran = subprocess.run([sys.executable, "-c", script, url], timeout=30, capture_output=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"end\n", b"")


# Names in one interface that the other lacks, and why.
ONLY_IN_AIO = {("App", "ready"), ("App", "run")}
# Differences between single methods.
PARAMETERS_ONLY_IN_AIO = {("App", "serve"): {"inline"}}


@pytest.mark.parametrize("name", ["App", "Block", "Stream", "Pending", "Parked"])
def test_both_interfaces_have_the_same_names(name):
    sync, aio = getattr(latzero, name), getattr(latzero.aio, name)

    def public(kind):
        return {n for n in dir(kind) if not n.startswith("_")}

    assert public(aio) - public(sync) == {m for c, m in ONLY_IN_AIO if c == name}
    assert not public(sync) - public(aio)
    for method in sorted(public(sync)):
        theirs = getattr(aio, method)
        if not callable(theirs):
            continue
        mine = inspect.signature(getattr(sync, method)).parameters
        theirs = dict(inspect.signature(theirs).parameters)
        for extra in PARAMETERS_ONLY_IN_AIO.get((name, method), ()):
            del theirs[extra]
        assert [(p.name, p.kind, p.default, p.annotation) for p in mine.values()] == [
            (p.name, p.kind, p.default, p.annotation) for p in theirs.values()
        ], method
    assert inspect.signature(latzero.connect).parameters == (
        inspect.signature(latzero.aio.connect).parameters
    )
