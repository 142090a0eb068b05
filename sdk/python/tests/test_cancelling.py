"""Calls that are cancelled while others wait for them, parked calls whose caller goes on, calls in
flight over a fork, and errors of handlers that can't be sent as they are."""

import asyncio
import os
import queue
import threading
import time

import latzero
import latzero.aio
import pytest

# Handlers of these tests run for so long, unless their calls are cancelled.
RUNS = 20.0
# "At once", on a slow machine.
SOON = 5.0


def until_cancelled(request):
    """Waits until the call is cancelled; returns whether it was."""
    deadline = time.monotonic() + RUNS
    while not request.cancelled and time.monotonic() < deadline:
        time.sleep(0.01)
    return request.cancelled


@pytest.fixture
def held(pair):
    """The caller's app, and queues of what two handlers note: that they run, and whether they saw
    that they were cancelled."""
    serves, calls = pair
    notes = queue.Queue()

    @serves.serve
    def hold(request: latzero.Request):
        notes.put("runs")
        notes.put(until_cancelled(request))
        return "ran on"

    @serves.serve
    def holds(request: latzero.Request):
        yield 1
        notes.put("runs")
        notes.put(until_cancelled(request))

    return calls, notes


def in_thread(wait):
    """Runs `wait` on a thread; returns the thread and a list for what it raises or returns."""
    outcome = []

    def run():
        try:
            outcome.append(wait())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


@pytest.mark.parametrize("timeout", [None, RUNS])
def test_a_call_is_cancelled_while_another_thread_waits_for_its_answer(held, timeout):
    calls, notes = held
    pending = calls.submit("hold")
    thread, outcome = in_thread(lambda: pending.result(timeout))
    assert notes.get(timeout=SOON) == "runs"
    time.sleep(0.1)  # The thread waits.
    assert not pending.done()
    pending.cancel()
    assert notes.get(timeout=SOON) is True
    thread.join(SOON)
    assert isinstance(outcome[0], latzero.Cancelled) and outcome[0].ran == "unknown"
    assert pending.done()
    with pytest.raises(latzero.Cancelled):
        pending.result()


def test_a_thread_that_waits_gets_the_answer_though_another_asks_for_it(pair):
    serves, calls = pair
    may_end = threading.Event()
    serves.serve("late", lambda: may_end.wait(RUNS))
    pending = calls.submit("late")
    thread, outcome = in_thread(pending.result)
    for _ in range(20):
        assert not pending.done()
        time.sleep(0.01)
    may_end.set()
    while not pending.done():
        time.sleep(0.001)
    thread.join(SOON)
    assert outcome == [True] and pending.result() is True


def test_every_result_of_a_pending_call_is_the_same(pair):
    serves, calls = pair
    serves.serve("text", lambda: "text")
    call = calls.submit("text", into=int)
    for _ in range(2):
        with pytest.raises(latzero.BadRequest, match="the answer is str, not int"):
            call.result(SOON)
    call = calls.submit("text")
    while not call.done():
        calls.ping()
    call.cancel()
    assert [call.result(), call.result()] == ["text", "text"]


def test_a_stream_is_cancelled_while_another_thread_waits_for_its_next_item(held):
    calls, notes = held
    stream = calls.stream("holds")
    items = []
    thread, outcome = in_thread(lambda: items.extend(stream))
    assert notes.get(timeout=SOON) == "runs"
    time.sleep(0.1)  # The thread waits.
    assert stream.progress is None and stream.end is None
    stream.cancel()
    assert notes.get(timeout=SOON) is True
    thread.join(SOON)
    # As after a cancel by the thread itself.
    with pytest.raises(RuntimeError) as own:
        next(stream)
    assert items == [1]
    assert type(outcome[0]) is RuntimeError and str(outcome[0]) == str(own.value)


def test_a_stream_is_cancelled_while_another_thread_reads_its_items(pair):
    serves, calls = pair
    seen = queue.Queue()

    @serves.serve
    def ticks(request: latzero.Request):
        for n in range(int(RUNS / 0.01)):
            if request.cancelled:
                break
            yield n
            time.sleep(0.01)
        seen.put(request.cancelled)

    # More than one, because the cancel may come between two waits or during one.
    for _ in range(5):
        stream = calls.stream("ticks")
        items = []

        def read(stream=stream, items=items):
            for item in stream:
                items.append(item)

        thread, outcome = in_thread(read)
        while len(items) < 5:
            time.sleep(0.001)
        stream.cancel()
        thread.join(SOON)
        assert not thread.is_alive() and type(outcome[0]) is RuntimeError
        assert items == list(range(len(items)))


def run_on_loop(latzero_server, name, test):
    async def main():
        async with latzero.aio.connect(latzero_server.url(f"loop-{name}", name)) as app:
            await asyncio.wait_for(test(app), RUNS / 2)

    asyncio.run(main())


def test_a_stream_of_asyncio_is_cancelled_while_a_task_waits_for_its_next_item(
    held, latzero_server
):
    calls, notes = held

    async def test(app):
        stream = app.stream("holds")
        assert await anext(stream) == 1
        waits = asyncio.create_task(anext(stream))
        await asyncio.to_thread(notes.get, timeout=SOON)
        stream.cancel()
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(waits, SOON)
        assert await asyncio.to_thread(notes.get, timeout=SOON) is True

        pending = app.submit("hold")
        waits = asyncio.create_task(pending.result())
        await asyncio.to_thread(notes.get, timeout=SOON)
        pending.cancel()
        with pytest.raises(latzero.Cancelled):
            await asyncio.wait_for(waits, SOON)
        assert await asyncio.to_thread(notes.get, timeout=SOON) is True

    run_on_loop(latzero_server, calls.joined[0], test)


# How each iterator is made, of an app and a block of it. In asyncio, some are awaited.
LISTENINGS = {
    "events": lambda app, block: app.events("quiet"),
    "watch": lambda app, block: app.watch(app.joined[0]),
    "answers": lambda app, block: app.answers(),
    "changes": lambda app, block: block.changes(),
}


def rest(items):
    """Reads items until the end; returns how that came."""
    for _ in items:
        pass
    return "the end"


@pytest.mark.parametrize("kind", LISTENINGS)
def test_an_iterator_is_closed_while_another_thread_waits_for_its_next_item(pair, kind):
    serves, calls = pair
    items = LISTENINGS[kind](calls, calls.block("closes", size=8, create=True))
    thread, outcome = in_thread(lambda: rest(items))
    time.sleep(0.1)  # The thread waits.
    items.close()
    thread.join(SOON)
    assert outcome == ["the end"]
    assert next(items, None) is None
    if kind == "events":
        assert not serves.emit("quiet", count=True)


def test_a_listener_of_states_ends_with_its_source(latzero_app):
    states = latzero._block.Listening(latzero_app._inner.states(), str)
    thread, outcome = in_thread(lambda: rest(states))
    time.sleep(0.1)  # The thread waits.
    with pytest.raises(RuntimeError, match="another thread or task waits"):
        next(states)
    states.close()
    thread.join(SOON)
    assert outcome == ["the end"]


@pytest.mark.parametrize("kind", [*LISTENINGS, "states"])
def test_an_iterator_of_asyncio_is_closed_while_a_task_waits_for_its_next_item(
    latzero_server, kind
):
    async def test(app):
        block = await app.block("closes", size=8, create=True)
        if kind == "states":
            items = latzero.aio.Listening(app._work, None, str, app._inner.states())
        else:
            items = LISTENINGS[kind](app, block)

        async def read():
            async for _ in await items:
                pass
            return "the end"

        waits = asyncio.create_task(read())
        await asyncio.sleep(0.1)  # The task waits.
        await items.aclose()
        assert await asyncio.wait_for(waits, SOON) == "the end"
        assert await anext(items, None) is None
        if kind == "events":
            assert not await app.emit("quiet", count=True)

    run_on_loop(latzero_server, f"closes-{kind}", test)


def memory():
    """Bytes of this process."""
    with open("/proc/self/statm") as of:
        return int(of.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("face", ["a busy thread", "a busy loop"])
def test_a_call_that_is_cancelled_before_its_handler_begins_leaves_nothing(
    latzero_server, pair, face
):
    serves, calls = pair
    inside, go = threading.Event(), threading.Event()

    def hold(data, /):
        inside.set()
        go.wait(RUNS)

    async def hold_loop(data, /):
        hold(data)

    def cancel_many(ping):
        held = calls.submit("hold", to=served)
        assert inside.wait(RUNS)
        before = memory()
        for _ in range(200):
            call = calls.submit("hold", bytes(1 << 20), to=served)
            calls.ping(), ping()  # It has arrived.
            call.cancel()
        calls.ping()
        grown = memory() - before
        go.set()
        held.result(RUNS)
        return grown

    async def main():
        url = latzero_server.url(served, calls.joined[0])
        async with latzero.aio.connect(url, handler_threads=1) as app:
            app.serve("hold", hold, concurrency=4)
            await app.ready()
            loop = asyncio.get_running_loop()

            def ping():
                asyncio.run_coroutine_threadsafe(app.ping(), loop).result(RUNS)

            return await asyncio.to_thread(cancel_many, ping)

    if face == "a busy thread":
        served = "busy-thread"
        grown = asyncio.run(main())
    else:
        served = serves.app_id
        serves.serve("hold", hold_loop, concurrency=4)
        grown = cancel_many(serves.ping)
    assert grown < 50 << 20


def test_an_iterator_that_is_closed_as_it_begins_does_not_listen(latzero_server):
    async def test(app):
        items = app.events("quiet")
        begins = asyncio.create_task(anext(items, "the end"))
        await asyncio.sleep(0)
        await items.aclose()
        assert await asyncio.wait_for(begins, SOON) == "the end"
        assert not await app.emit("quiet", count=True)

    run_on_loop(latzero_server, "closes-early", test)


# Asks for the calls of the app that the server has.
STORED = {"action": "parked_list"}


def test_a_parked_call_is_cancelled_while_a_thread_waits_for_its_answer(held):
    calls, notes = held
    for name in ("hold", "nobody-serves-it"):
        parked = calls.park(name, id=f"waits-{name}")
        thread, outcome = in_thread(parked.answer)
        if name == "hold":
            assert notes.get(timeout=SOON) == "runs"
        time.sleep(0.1)  # The thread waits.
        parked.cancel()
        thread.join(SOON)
        assert isinstance(outcome[0], latzero.Cancelled)
        with pytest.raises(latzero.Cancelled):
            parked.answer()
        if name == "hold":
            assert notes.get(timeout=SOON) is True
    deadline = time.monotonic() + SOON
    while calls.request(STORED)["parked"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_parked_call_of_asyncio_is_cancelled_while_a_task_waits(held, latzero_server):
    calls, notes = held

    async def test(app):
        parked = await app.park("hold")
        # A wait that ends early may be repeated.
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(parked.answer(), 0.1)
        waits = asyncio.create_task(parked.answer())
        assert await asyncio.to_thread(notes.get, timeout=SOON) == "runs"
        parked.cancel()
        with pytest.raises(latzero.Cancelled):
            await asyncio.wait_for(waits, SOON)
        assert await asyncio.to_thread(notes.get, timeout=SOON) is True
        with pytest.raises(latzero.Cancelled):
            await parked.answer()
        while (await app.request(STORED))["parked"]:
            await asyncio.sleep(0.01)

    run_on_loop(latzero_server, calls.joined[0], test)


def test_the_answer_of_a_parked_call_is_taken_once(pair, latzero_server):
    serves, calls = pair
    serves.serve("seven", lambda: 7)
    parked = calls.park("seven", id="once")
    assert parked.answer() == 7
    parked.cancel()  # Too late.
    with pytest.raises(latzero.BadRequest, match="'once' was taken") as raised:
        parked.answer()
    assert raised.value.ran is None

    async def test(app):
        parked = await app.park("seven", id="once")
        assert await parked.answer() == 7
        with pytest.raises(latzero.BadRequest, match="'once' was taken"):
            await parked.answer()

    run_on_loop(latzero_server, calls.joined[0], test)


def test_park_returns_once_the_call_is_stored_although_a_handler_is_free(held, latzero_server):
    calls, notes = held
    began = time.monotonic()
    parked = calls.park("hold")
    assert time.monotonic() - began < SOON
    assert notes.get(timeout=SOON) == "runs"
    parked.cancel()
    assert notes.get(timeout=SOON) is True

    async def test(app):
        parked = await asyncio.wait_for(app.park("hold"), SOON)
        assert await asyncio.to_thread(notes.get, timeout=SOON) == "runs"
        parked.cancel()
        assert await asyncio.to_thread(notes.get, timeout=SOON) is True

    run_on_loop(latzero_server, calls.joined[0], test)


def test_the_answer_of_a_parked_call_waits_for_the_next_life_of_its_caller(
    pair, latzero_server
):
    serves, calls = pair
    may_end = threading.Event()

    @serves.serve
    def late():
        may_end.wait(RUNS)
        return 7

    url = latzero_server.url("comes-back", calls.joined[0])
    with latzero.connect(url) as first:
        first.park("late", id="job")
    may_end.set()
    with latzero.connect(url) as second:
        thread, outcome = in_thread(lambda: next(second.answers()))
        thread.join(SOON)
    assert (outcome[0].id, outcome[0].result()) == ("job", 7)


def in_child(work):
    """The result of `work` in a forked child, as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = str(work())
        except BaseException as error:
            text = repr(error)
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as result:
        text = result.read()
    os.waitpid(child, 0)
    return text


def test_what_is_in_flight_at_a_fork_may_have_run(pair):
    serves, calls = pair
    may_end = threading.Event()

    @serves.serve
    def slow():
        may_end.wait(RUNS)
        return 5

    @serves.serve
    def items():
        yield 1
        may_end.wait(RUNS)
        yield 2

    pending, parked, stream = calls.submit("slow"), calls.park("slow"), calls.stream("items")
    assert next(stream) == 1
    unsent = calls.stream("items")

    def ran(wait):
        with pytest.raises(latzero.Disconnected) as raised:
            wait()
        return raised.value.ran

    def work():
        found = [ran(wait) for wait in (pending.result, lambda: next(stream), parked.answer)]
        # What a child cancels is the parent's still.
        pending.cancel()
        stream.cancel()
        return [*found, ran(lambda: next(unsent))]

    assert in_child(work) == str(["unknown", "unknown", "unknown", "no"])
    may_end.set()
    assert (pending.result(), next(stream), parked.answer()) == (5, 2, 5)


class Silent(Exception):
    def __str__(self):
        raise RuntimeError("it has no text")

    __repr__ = __str__


class Odd:
    def __repr__(self):
        return "odd" * 10_000


@pytest.mark.parametrize("data, is_sent", [
    ({"s": {1}}, False), (b"raw", False), (Odd(), False), ({"a": float("nan")}, False),
    ({"a": "\ud800b"}, False), (Silent(), False), ({"a": [1]}, True), (None, True),
])
def test_a_code_of_ones_own_arrives_whatever_its_data_is(pair, data, is_sent):
    serves, calls = pair

    @serves.serve
    def fail():
        raise latzero.Failure("mycode", "m\ud800", data=data)

    with pytest.raises(latzero.HandlerFailed) as raised:
        calls.call("fail")
    error = raised.value
    assert (error.code, error.data) == ("mycode", data if is_sent else None)
    assert error.message.startswith("m?" if is_sent else "m? (its data can't be sent: ")


@pytest.mark.parametrize("error, message", [
    (ValueError("a\ud800"), "a?"), (Silent(), "<exception str() failed>"),
], ids=["surrogate", "silent"])
def test_an_exception_without_a_proper_text_arrives_with_its_traceback(pair, error, message):
    serves, calls = pair

    @serves.serve
    def fail():
        raise error

    with pytest.raises(latzero.HandlerFailed) as raised:
        calls.call("fail")
    data, name = raised.value.data, type(error).__name__
    assert (raised.value.code, data["type"], data["message"]) == ("handler_error", name, message)
    assert raised.value.message == f"{name}: {message}"
    assert "raise error" in raised.value.remote_traceback


def test_an_async_handler_that_is_cancelled_by_itself_answers(latzero_server):
    with latzero.connect(latzero_server.url("cancels-itself"), transient=True) as app:

        @app.serve
        async def cancels():
            raise asyncio.CancelledError

        @app.serve
        async def cancelled_inside():
            inside = asyncio.ensure_future(asyncio.sleep(60))
            asyncio.get_running_loop().call_soon(inside.cancel)
            await inside

        for name in ["cancels", "cancelled_inside"]:
            with pytest.raises(latzero.HandlerFailed, match="cancelled before it answered"):
                app.call(name, to=app.app_id)


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_an_exit_in_an_async_handler_fails_its_own_call_only(latzero_server, raised):
    with latzero.connect(latzero_server.url("exits"), transient=True) as app:

        @app.serve
        async def leave():
            raise raised

        @app.serve
        async def one():
            return 1

        with pytest.raises(latzero.HandlerFailed):
            app.call("leave", to=app.app_id)
        assert app.call("one", to=app.app_id) == 1


def test_waits_for_a_block_end_when_the_app_is_closed(latzero_server):
    app = latzero.connect(latzero_server.url("waits"), transient=True)
    block = app.block("waited", size=8, create=True)
    ended = queue.Queue()

    def wait():
        with pytest.raises(latzero.Disconnected, match="the app was closed"):
            block.wait(timeout=60)
        ended.put(True)

    thread = threading.Thread(target=wait)
    thread.start()
    app.close()
    assert ended.get(timeout=30)
    thread.join()

    async def main():
        app = await latzero.aio.connect(latzero_server.url("waits-too"), transient=True)
        block = await app.block("waited-too", size=8, create=True)
        waiting = asyncio.ensure_future(block.wait(timeout=60))
        await asyncio.sleep(0)
        await app.close()
        with pytest.raises(latzero.Disconnected, match="the app was closed"):
            await asyncio.wait_for(waiting, 30)

    asyncio.run(main())


def test_a_finished_stream_has_its_end_also_after_its_with(pair):
    serves, calls = pair

    @serves.serve
    def count():
        yield 1
        return "done"

    with calls.stream("count") as stream:
        assert list(stream) == [1]
    assert (stream.end, stream.progress) == ("done", None)


def test_a_writer_gives_its_lock_back_whoever_has_its_versions(latzero_server):
    with latzero.connect(latzero_server.url("writes"), transient=True) as app:
        block = app.block("written", size=8, create=True)
        with block.writer() as writer:
            version = writer.write(keep=False)
            with version as target:
                target[:] = 7
        with block.lock(wait=0):
            pass


def test_one_pool_is_not_taken_for_a_list_of_letters(latzero_server):
    with pytest.raises(TypeError, match="pools is a list"):
        latzero.connect(latzero_server.url("letters"), pools="alpha")
