"""LatZero for asyncio: the names of `latzero`, with methods that are awaited.

    async with latzero.aio.connect("latzero://me?pool=alpha") as app:
        print(await app.call("double", n=21))
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterable
from datetime import timedelta
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Literal

from . import _latzero
from ._app import (
    _CLOSE_SECONDS, _MISSING, _NO_OPTIONS, Answer, Event, Presence, Progress, Reply, _calling,
    _close_quietly, _current, _described, _describing, _into, _is_async, _live, _new_share,
    _options, _payload, _serving, _shared, is_handled_by,
)
from ._arrays import flat
from ._block import BlockInfo, Filling, Shares, _same, _seconds, begin, is_ours_alone
from ._block import options as _block_options
from ._errors import Cancelled, Failure, LatZeroError, Timeout
from ._latzero import AioRequest as Request
from ._lean import F, Generic, T, overload

if TYPE_CHECKING:
    from typing import Unpack

    from ._lean import AioServeOptions, Destination

__all__ = [
    "App", "Block", "Connecting", "Listening", "Parked", "Pending", "Request", "Stream", "connect",
]


# Larger copies are made on another thread.
_COPY_BYTES = 256 * 1024
_LONG = 3600.0
# A task that does not wait costs no turn of the loop.
_EAGER: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}


class _Loop:
    """The LatZero operations and apps of an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, is_own: bool = False) -> None:
        # Whether the loop is of the package, and runs for other handlers too.
        self._is_own = is_own
        # Weak: the event loop refers to this by its readers.
        self._weak_loop = weakref.ref(loop)
        self.inner: _latzero.Loop = _latzero.Loop(weakref.ref(self))
        # What keeps them until they end.
        self._tasks: dict[object, asyncio.Task[None]] = {}
        loop.add_reader(self.inner.fileno(), self.inner.rung)

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        loop = self._weak_loop()
        assert loop is not None, "the event loop runs this"
        return loop

    def drive(self, app: _latzero.App) -> None:
        """From now on this event loop reads the connection of an app."""
        # The descriptor stays the same when the app reconnects, and is readable too when the
        # connection accepts bytes that wait.
        descriptor, key = self.inner.drive(app)
        self._loop.add_reader(descriptor, self.inner.turn_of, key)

    def _undrive(self, descriptor: int) -> None:
        """The app has ended."""
        if not self._loop.is_closed():
            self._loop.remove_reader(descriptor)

    def _soon(self) -> None:
        """After what is ready now: calls that are made until then leave in one write."""
        self._loop.call_soon(self.inner.turn)

    def _later(self, seconds: float, key: int) -> None:
        """Deadlines of an app are to be checked."""
        self._loop.call_later(seconds, self.inner.timed, key)

    def start(self, op: _latzero.Op) -> asyncio.Future[Any]:
        """Starts an operation. Cancelling the future ends it early."""
        future, token = self._begin_op(op)

        def end(done: asyncio.Future[Any]) -> None:
            if done.cancelled():
                self.inner.cancel(token)

        if not future.done():
            future.add_done_callback(end)
        return future

    def check(self) -> asyncio.AbstractEventLoop:
        """The event loop, on which this must be called: nothing else reads the connections."""
        loop = asyncio.get_running_loop()
        if loop is not self._weak_loop():
            raise RuntimeError(
                "this app belongs to another event loop: connect on this one too, or use "
                "asyncio.run_coroutine_threadsafe with the app's loop"
            )
        return loop

    def _begin_op(self, op: _latzero.Op) -> tuple[asyncio.Future[Any], int]:
        future = self.check().create_future()
        return future, self.inner.start(op, future)

    async def run(self, op: _latzero.Op) -> Any:
        """Waits for an operation. It ends early if this does."""
        # Without a callback on the future, which would cost each operation a turn of the loop.
        future, token = self._begin_op(op)
        try:
            return await future
        except BaseException:
            self.cancel(token, future)
            raise

    def cancel(self, token: int, future: asyncio.Future[Any]) -> None:
        """Ends an operation early, unless its wait ended by its own result."""
        if not future.done() or future.cancelled():
            self.inner.cancel(token)

    def _begin(
        self, handler: Callable[[Any, Any], Any], request: Request, data: Any,
        answer: _latzero.Answer,
    ) -> asyncio.Task[None] | None:
        """Calls a plain handler. Returns a task if its result is to be awaited."""
        token = _current.set(request)
        try:
            result = handler(request, data)
            if type(result) in _PLAIN or not _is_pending(result):
                self.inner.send(answer, result)
                return None
            return self._begin_async(lambda *_: result, request, data, answer)
        except BaseException as error:
            self._fail(answer, error)
            return None
        finally:
            _current.reset(token)

    def _begin_async(
        self, handler: Callable[[Any, Any], Any], request: Request, data: Any,
        answer: _latzero.Answer,
    ) -> asyncio.Task[None]:
        """Begins the task of an `async` handler."""
        # The task has a copy of this context.
        token = _current.set(request)
        try:
            return self._spawn(_answer(self, handler, request, data, answer), answer)
        finally:
            _current.reset(token)

    def _fail(self, answer: _latzero.Answer, error: BaseException) -> None:
        """Answers with what a handler raised."""
        if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            # Nobody waits for that if it was the caller who cancelled.
            ended = Failure("handler_error", "the handler was cancelled before it answered")
            self.inner.fail(answer, ended)
            return
        self.inner.fail(answer, error)
        if not isinstance(error, Exception) and not self._is_own:
            # Ends the loop, as it does in a callback. A task that raised it as it was created, as
            # those of Python 3.12 may, would be reported as never retrieved too.
            self._loop.call_soon(_end_loop, error)

    def _cancel(self, task: asyncio.Task[None]) -> None:
        """Cancels the task of a handler."""
        if task.done():
            return
        work: Any = task.get_coro()
        if inspect.getcoroutinestate(work) == inspect.CORO_CREATED:
            # It will not begin, and so not end itself.
            for key in [key for key, other in self._tasks.items() if other is task]:
                self.ended(key)
        task.cancel()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that is kept until it ends."""
        task = self._spawn(work, work)
        task.add_done_callback(lambda _: self.ended(work))
        return task

    def _spawn(self, work: Coroutine[Any, Any, None], key: object) -> asyncio.Task[None]:
        """A task that is kept until `ended(key)`."""
        # Without a name, each would make one of its number.
        task = asyncio.Task(work, loop=self._weak_loop(), name="latzero", **_EAGER)
        if not task.done():
            self._tasks[key] = task
        return task

    def ended(self, key: object) -> None:
        self._tasks.pop(key, None)

    def close(self) -> None:
        """Releases everything."""
        if not self._loop.is_closed():
            self._loop.remove_reader(self.inner.fileno())
        self.inner.close()
        for task in list(self._tasks.values()):
            task.cancel()


class _Work:
    """The operations of an app on its event loop. All raise the refusal of a registration that was
    begun before them."""

    __slots__ = ("loop", "registering", "is_over")

    def __init__(self, loop: _Loop) -> None:
        self.loop: _Loop = loop
        # What is being registered, or was refused: the method and the name.
        self.registering: dict[asyncio.Future[Any], tuple[str, str]] = {}
        # Whether the app is closed. What that ended is no refusal.
        self.is_over: bool = False

    def check(self) -> asyncio.AbstractEventLoop:
        """The event loop, on which this must be called."""
        if self.registering:
            self.raise_refusal()
        return self.loop.check()

    def start(self, op: _latzero.Op) -> asyncio.Future[Any]:
        """Like `_Loop.start`."""
        self.check()
        return self.loop.start(op)

    def run(self, op: _latzero.Op) -> Coroutine[Any, Any, Any]:
        """Like `_Loop.run`."""
        if self.registering:
            self.raise_refusal()
        return self.loop.run(op)

    def raise_refusal(self) -> None:
        """Raises the error of a registration that the server or the client refused."""
        for future in [f for f in self.registering if f.done()]:
            error = None if future.cancelled() else future.exception()
            if error is not None and not self.is_over:
                raise error.with_traceback(None)
            del self.registering[future]


_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Loop] = weakref.WeakKeyDictionary()


def _of_running_loop() -> _Loop:
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "latzero.aio needs a running asyncio event loop; under trio, call latzero.connect in "
            "trio.to_thread.run_sync, and the app's methods too"
        ) from None
    found = _loops.get(loop)
    if found is None:
        found = _loops[loop] = _Loop(loop)
    return found


def _run(op: _latzero.Op) -> asyncio.Future[Any]:
    """Starts an operation on the running event loop."""
    return _of_running_loop().start(op)


# Results that are not awaited.
_PLAIN = frozenset((dict, list, str, int, float, bool, bytes, tuple, type(None)))


def _is_pending(result: Any) -> bool:
    """Whether a handler's result is to be awaited."""
    return (
        inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result)
    )


async def _answer(
    work: _Loop, handler: Callable[[Any, Any], Any], request: Request, data: Any,
    answer: _latzero.Answer,
) -> None:
    """Runs one handler that is to be awaited."""
    try:
        result = handler(request, data)
        if type(result) is CoroutineType:
            result = await result
        elif inspect.isasyncgen(result):
            try:
                async for item in result:
                    await _send(request, item)
            finally:
                await result.aclose()
            result = None
        elif inspect.isgenerator(result):
            result = await _stream(request, result)
        else:
            result = await result
        work.inner.send(answer, result)
    except BaseException as error:
        work._fail(answer, error)
        if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            raise
    finally:
        work.ended(answer)


async def _stream(request: Request, items: Any) -> Any:
    """Sends what a plain generator yields; returns its final answer."""
    try:
        while True:
            try:
                item = next(items)
            except StopIteration as end:
                return end.value
            await _send(request, item)
    finally:
        items.close()


async def _send(request: Request, item: Any) -> None:
    """Sends what a generator yielded."""
    if isinstance(item, Progress):
        await _run(request._report(item.value))
    else:
        await _run(request._item(item))


def _end_loop(error: BaseException) -> None:
    raise error


class LoopThread:
    """An event loop on a separate thread, for the async handlers of a blocking app."""

    def __init__(self, name: str) -> None:
        self.inner: _latzero.Loop
        self._ready = threading.Event()
        self._is_ended = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self._ready.wait()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        loop = _loops[self._loop] = _Loop(self._loop, is_own=True)
        self.inner = loop.inner
        self._ready.set()
        while not self._is_ended:
            try:
                self._loop.run_forever()
            except BaseException:
                # Such as a SystemExit in a task that a handler left: the handlers run on.
                threading.excepthook(
                    threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread()))
                )
        loop.close()
        try:
            # Also those that handlers left.
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()

    def close(self, within: float) -> None:
        """Ends the loop and everything that runs on it; waits for that for so many seconds."""
        self._is_ended = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(within)


class Listening(Generic[T]):
    """Arriving items: an async iterator. It begins to listen when it is awaited, which returns it,
    or else with the first item that is asked for. Dropping it ends that, and so does `aclose`."""

    __slots__ = ("_work", "_begin", "_make", "_beginning", "_inflow")

    def __init__(
        self, work: _Work, begin: Callable[[], Coroutine[Any, Any, Any]] | None,
        make: Callable[[Any], T], inflow: _latzero.Inflow | None = None,
    ) -> None:
        self._work, self._begin, self._make, self._inflow = work, begin, make, inflow
        # Several tasks may ask for the first item at the same time.
        self._beginning = asyncio.Lock()

    async def _listen(self) -> Listening[T]:
        async with self._beginning:
            if self._begin is not None:
                inflow = await self._begin()
                # It may have been closed in the meantime.
                if self._begin is not None:
                    self._inflow = inflow
                # It holds the app.
                self._begin = None
        return self

    def __await__(self) -> Generator[Any, None, Listening[T]]:
        return self._listen().__await__()

    def __aiter__(self) -> Listening[T]:
        return self

    async def __anext__(self) -> T:
        if self._begin is not None:
            await self._listen()
        item = None
        if self._inflow is not None:
            item = await self._work.run(self._inflow.next())
        if item is None:
            await self.aclose()
            raise StopAsyncIteration
        return self._make(item[0])

    async def aclose(self) -> None:
        """Stops listening. A task that waits for the next item gets the end of the iteration."""
        self._begin = None
        if self._inflow is not None:
            self._inflow.close()
            self._inflow = None


class Stream(Generic[T]):
    """A streamed answer: iterate over its items. Dropping it, and leaving `async with`, cancels
    the call."""

    __slots__ = ("_work", "_items", "_decode")

    def __init__(self, work: _Work, items: _latzero.Items, decode: Callable[[Any], T]) -> None:
        self._work, self._items, self._decode = work, items, decode

    @property
    def progress(self) -> Any:
        """The newest progress report that was not read yet, else `None`."""
        return self._items.progress

    @property
    def end(self) -> Any:
        """The handler's final answer after the last item, else `None`."""
        return self._items.end

    def cancel(self) -> None:
        """Cancels the call."""
        self._items.cancel()

    def __aiter__(self) -> Stream[T]:
        return self

    async def __anext__(self) -> T:
        item = await self._work.run(self._items.next())
        if item is None:
            raise StopAsyncIteration
        return self._decode(item[0])

    async def __aenter__(self) -> Stream[T]:
        return self

    async def __aexit__(self, *raised: object) -> None:
        self.cancel()


class Pending(Generic[T]):
    """A call that was sent. Dropping it cancels the call."""

    __slots__ = ("_work", "_future", "_decode", "__weakref__")

    def __init__(
        self, work: _Work, future: asyncio.Future[Any], decode: Callable[[Any], T]
    ) -> None:
        self._work, self._future, self._decode = work, future, decode
        weakref.finalize(self, future.cancel).atexit = False

    def done(self) -> bool:
        """Whether `result` returns or raises at once."""
        return self._future.done()

    async def result(self, timeout: float | timedelta | None = None) -> T:
        """Waits for the answer; raises the error if the call failed. `TimeoutError` if it takes
        longer than `timeout`; the call then continues."""
        if not self._future.done():
            await asyncio.wait([self._future], timeout=_seconds(timeout))
        self._work.check()
        if not self._future.done():
            raise TimeoutError("the answer did not come in this time")
        if self._future.cancelled():
            raise Cancelled("cancelled", "the call was cancelled", "unknown", None)
        return self._decode(self._future.result())

    def __repr__(self) -> str:
        return f"<latzero.aio.Pending {'done' if self.done() else 'waits for its answer'}>"

    def cancel(self) -> None:
        """Cancels the call."""
        self._future.cancel()


class Parked:
    """A call that the server stores until it is answered. The call continues if this is dropped:
    `App.answers` then returns its answer."""

    __slots__ = ("_work", "_inner")

    def __init__(self, work: _Work, inner: _latzero.Parked) -> None:
        self._work, self._inner = work, inner

    @property
    def id(self) -> str:
        """The call's id, by which `App.answers` names it."""
        return self._inner.id

    async def answer(self) -> Any:
        """Waits for the answer, which is returned once: after that this raises `BadRequest`. A
        wait that was cancelled may be repeated."""
        return await self._work.run(self._inner.answer())

    def cancel(self) -> None:
        """Cancels the call. A task that waits for its answer gets `Cancelled` at once."""
        self._inner.cancel()


class Write:
    """A version that is being written: `async with block.write() as a: ...`. Leaving publishes it,
    an exception discards it. After that `version` is its number."""

    __slots__ = ("_work", "_inner", "_keep", "_wait", "_part", "_draft", "_filling", "version")

    def __init__(
        self, work: _Work, inner: _latzero.Block, keep: bool, wait: float, part: slice | None
    ) -> None:
        self._work, self._inner = work, inner
        self._keep, self._wait, self._part = keep, wait, part
        self.version: int | None = None

    async def __aenter__(self) -> Any:
        self._draft = await self._work.run(self._inner.draft(self._wait))
        try:
            self._filling = await _fill(self._inner, self._draft, self._keep, self._part)
        except BaseException:
            self._draft.abandon()
            raise
        return self._filling.array

    async def __aexit__(self, kind: Any, *raised: object) -> None:
        filling, draft = self._filling, self._draft
        bytes = filling.copy() if filling.is_copy and kind is None else None
        filling.close()
        if kind is not None:
            draft.abandon()
            return
        if bytes is not None:
            draft.write(filling.offset, bytes)
        self.version = await self._work.run(draft.commit())


async def _fill(
    inner: _latzero.Block, target: Any, keep: bool, part: slice | None
) -> Filling:
    if keep and inner.nbytes > _COPY_BYTES:
        filling = await asyncio.to_thread(Filling, inner, target, keep, part)
    else:
        filling = Filling(inner, target, keep, part)
    if keep and filling.is_copy:
        # It may ask the server, whose answer this thread reads.
        await asyncio.to_thread(filling.read, inner)
    return filling


class WriterWrite:
    """A version that is being written under a writer's lock; see `Write`."""

    __slots__ = (
        "_work", "_inner", "_writer", "_keep", "_part", "_version", "_filling", "version",
    )

    def __init__(
        self, work: _Work, inner: _latzero.Block, writer: _latzero.Writer, keep: bool,
        part: slice | None,
    ) -> None:
        self._work, self._inner, self._writer = work, inner, writer
        self._keep, self._part = keep, part
        self.version: int | None = None

    async def __aenter__(self) -> Any:
        self._version = begin(self._writer)
        try:
            self._filling = await _fill(self._inner, self._version, self._keep, self._part)
        except BaseException:
            self._abandon()
            raise
        return self._filling.array

    def _abandon(self) -> None:
        if self._version is not None:
            self._version.abandon()

    async def __aexit__(self, kind: Any, *raised: object) -> None:
        filling = self._filling
        bytes = filling.copy() if filling.is_copy and kind is None else None
        filling.close()
        if kind is not None:
            self._abandon()
        elif self._version is not None:
            self.version = self._version.publish()
        elif bytes is not None:
            self.version = await self._work.run(self._writer.write(filling.offset, bytes))


class Writer:
    """Writes many versions under one lock: `async with block.writer() as w:`."""

    __slots__ = ("_work", "_inner", "_wait", "_writer")

    def __init__(self, work: _Work, inner: _latzero.Block, wait: float) -> None:
        self._work, self._inner, self._wait = work, inner, wait
        self._writer: _latzero.Writer | None = None

    async def __aenter__(self) -> Writer:
        self._writer = await self._work.run(self._inner.writer(self._wait))
        return self

    def write(self, *, keep: bool = True, part: slice | None = None) -> WriterWrite:
        """The next version; see `Block.write`."""
        if self._writer is None:
            raise RuntimeError("write inside of `async with block.writer() as w:`")
        return WriterWrite(self._work, self._inner, self._writer, keep, part)

    async def __aexit__(self, *raised: object) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Lock:
    """A block's lock: `async with block.lock():`."""

    __slots__ = ("_work", "_inner", "_arguments", "_lock")

    def __init__(
        self, work: _Work, inner: _latzero.Block, shared: bool, wait: float, lease: float | None
    ) -> None:
        self._work, self._inner, self._arguments = work, inner, (shared, wait, lease)
        self._lock: _latzero.Lock | None = None

    async def __aenter__(self) -> Lock:
        self._lock = await self._work.run(self._inner.lock(*self._arguments))
        return self

    @property
    def _held(self) -> _latzero.Lock:
        if self._lock is None:
            raise RuntimeError("the lock is held inside of `async with block.lock():`")
        return self._lock

    @property
    def fence(self) -> int:
        """The lock's fence: larger than those of all earlier locks of this block."""
        return self._held.fence

    @property
    def is_held(self) -> bool:
        """Whether it is still held, as far as this process knows."""
        return self._lock is not None and self._lock.is_held

    async def renew(self, lease: float | timedelta | None = None) -> None:
        """Renews its lease. A lock without a lease is held until the connection ends."""
        await self._work.run(self._held.renew(_seconds(lease)))

    async def __aexit__(self, kind: Any, *raised: object) -> None:
        held, self._lock = self._held, None
        if kind is None:
            await self._work.run(held.unlock())
        else:
            held.close()


class _View:
    """A view that is about to be taken: awaitable, and an async context manager."""

    __slots__ = ("_work", "_inner", "_view")

    def __init__(self, work: _Work, inner: _latzero.Block) -> None:
        self._work, self._inner = work, inner

    def __await__(self) -> Generator[Any, None, _latzero.View]:
        return self._work.run(self._inner.view()).__await__()

    async def __aenter__(self) -> Any:
        self._view = await self
        return self._view.__enter__()

    async def __aexit__(self, *raised: object) -> None:
        self._view.__exit__(*raised)


class Block(BlockInfo):
    """A block that this app is attached to, returned by `App.block`."""

    __slots__ = ("_work",)

    def __init__(self, handle: _latzero.Block, work: _Work | None = None) -> None:
        super().__init__(handle)
        # A block that came with a request has no app here.
        self._work = work or _Work(_of_running_loop())

    def __reduce__(self) -> Any:
        raise TypeError(
            "a latzero.aio.Block can't be pickled, because opening it takes an await: send its id "
            "and open it there"
        )

    async def read(self, out: Any = None) -> Any:
        """A private copy of the newest version: an array, or a `memoryview` without numpy. `out`
        is filled instead of new memory."""
        self._work.check()
        return await asyncio.to_thread(self._read, out)

    async def read_at(self, offset: int, length: int) -> bytes:
        """Some bytes of the newest version."""
        self._work.check()
        return await asyncio.to_thread(self._read_at, offset, length)

    def view(self) -> _View:
        """The newest version in place, read-only: `v = await block.view()`, or
        `async with block.view() as a:`, which raises `BlockError` (`contended`) on leaving if the
        version was overwritten in the meantime."""
        return _View(self._work, self._inner)

    def write(
        self, *, keep: bool = True, wait: float | timedelta = 1.0, part: slice | None = None
    ) -> Write:
        """The next version, under the block's lock: `async with block.write() as a:`. With `keep`
        the array starts as a copy of the previous version; otherwise it has old bytes and all must
        be written. `part` selects rows. The array and its slices must not be used later."""
        return Write(self._work, self._inner, keep, _seconds(wait), part)

    def writer(self, *, wait: float | timedelta = 1.0) -> Writer:
        """Takes the lock for many versions: `async with block.writer() as w:`, then
        `w.write()`."""
        return Writer(self._work, self._inner, _seconds(wait))

    async def write_at(self, offset: int, data: bytes, *, if_version: int | None = None) -> int:
        """Writes bytes through the server; returns the version. With `if_version` the block must
        have that version."""
        return await self._work.run(self._inner.write_at(offset, bytes(data), if_version))

    async def cas(self, offset: int, expected: bytes, data: bytes) -> bytes | None:
        """Writes `data` and returns `None` if the block has the bytes `expected` there; else
        returns the bytes that it has."""
        return await self._work.run(self._inner.cas(offset, bytes(expected), bytes(data)))

    def lock(
        self, *, shared: bool = False, wait: float | timedelta = 1.0,
        lease: float | timedelta | None = None,
    ) -> Lock:
        """The block's lock: `async with block.lock():`."""
        return Lock(self._work, self._inner, shared, _seconds(wait), _seconds(lease))

    async def wait(
        self, beyond: int | None = None, timeout: float | timedelta | None = None
    ) -> int:
        """Waits for a version newer than `beyond`, or than the present one; returns the version."""
        inner = self._inner
        beyond = inner.version if beyond is None else beyond
        if timeout is not None:
            return await self._work.run(inner.wait(beyond, _seconds(timeout)))
        while True:
            try:
                return await self._work.run(inner.wait(beyond, _LONG))
            except Timeout:
                continue

    def changes(self) -> Listening[int]:
        """An async iterator over new versions, from the first read on, or from now on if it is
        awaited. If several appear between two reads, it returns the newest."""
        return Listening(self._work, lambda: self._work.run(self._inner.changes()), _same)

    async def resize(self, nbytes: int) -> None:
        """Changes the size of the block, which gets a new generation."""
        await self._work.run(self._inner.resize(nbytes))

    async def flush(self) -> int:
        """Flushes a persistent block to disk; returns the version on disk."""
        return await self._work.run(self._inner.flush())

    async def remove(self) -> None:
        """Removes the block, even if others are attached."""
        await self._work.run(self._inner.remove())

    async def info(self) -> dict[str, Any]:
        """The full description of the block by the server."""
        return await self._work.run(self._inner.info())

    async def __aenter__(self) -> Block:
        return self

    async def __aexit__(self, *raised: object) -> None:
        self.close()


class App:
    """A connection to the server, made by `latzero.aio.connect`. It belongs to one event loop."""

    def __init__(self, inner: _latzero.App) -> None:
        self._connection: _latzero.App = inner
        self._loop = asyncio.get_running_loop()
        self._closed = asyncio.Event()
        self._work = _Work(_of_running_loop())
        self._work.loop.drive(inner)
        self._shares = Shares()
        _live.add(self)

    def _forked(self, descriptor: int | None) -> None:
        """In a forked child: releases the parent's connection without a message to the server."""
        self._connection.leak()
        self._work.loop.inner.leak()
        if descriptor is not None:
            _close_quietly(descriptor)
        self._closed.set()

    def _end(self) -> None:
        """At the end of the process: the connection ends with it."""

    @property
    def _inner(self) -> _latzero.App:
        self._work.loop.check()
        return self._connection

    @property
    def app_id(self) -> str:
        """The AppID."""
        return self._connection.app_id

    @property
    def instance(self) -> str | None:
        """The id of the current connection."""
        return self._connection.instance

    @property
    def joined(self) -> list[str]:
        """The pools that the app is in."""
        return self._connection.joined

    @property
    def is_connected(self) -> bool:
        """Whether the app is connected now."""
        return self._connection.is_connected

    @property
    def is_stored(self) -> bool:
        """Whether the app's registration is on the server's disk."""
        return self._connection.is_stored

    @property
    def lost(self) -> int:
        """How many events and answers were dropped so far because they were not read in time. The
        `lost` of an event or answer says how many were dropped just before it."""
        return self._connection.lost

    def __repr__(self) -> str:
        state = "closed" if self._closed.is_set() else (
            "connected" if self.is_connected else "disconnected"
        )
        pools = ", ".join(self.joined) or "no pool"
        return f"<latzero.aio.App {self.app_id!r} in {pools}, {state}>"

    def __reduce__(self) -> Any:
        raise TypeError("an App can't be pickled: connect in each process")

    @overload
    async def call(self, name: str, data: Any = ..., /, *, into: type[T], **options: Any) -> T: ...

    @overload
    async def call(
        self, name: str, data: Any = _MISSING, /, *, into: Any = None,
        timeout: float | timedelta | None = None, to: Destination = None, pool: str | None = None,
        key: str | None = None, headers: dict[str, str] | None = None,
        idempotency_key: str | None = None, redeliver: bool = False, attempts: int | None = None,
        privileged: bool = False, **fields: Any,
    ) -> Any: ...

    async def call(
        self, name: str, data: Any = _MISSING, /, *, into: Any = None,
        timeout: float | timedelta | None = None, to: Destination = None, pool: str | None = None,
        key: str | None = None, headers: dict[str, str] | None = None,
        idempotency_key: str | None = None, redeliver: bool = False, attempts: int | None = None,
        privileged: bool = False, **fields: Any,
    ) -> Any:
        """Calls the trigger `name` with `data`, or with the fields as an object; returns the
        answer. Cancelling the task cancels the call. The options are those of
        `latzero.App.call`."""
        if (
            timeout is None and to is None and pool is None and key is None and headers is None
            and idempotency_key is None and attempts is None and not redeliver and not privileged
        ):
            options = _NO_OPTIONS
        else:
            options = _calling(
                timeout, to, pool, key, headers, privileged, idempotency_key, redeliver, attempts
            )
        if data is _MISSING:
            data = fields or None
        elif fields:
            data = _payload(data, fields)
        read = None if into is None else _into(into)
        # Like `_Loop.run`, which would cost another coroutine.
        if self._work.registering:
            self._work.raise_refusal()
        work = self._work.loop
        future = work.check().create_future()
        token = work.inner.call(self._connection, name, data, options, future)
        try:
            result = await future
        except BaseException:
            work.cancel(token, future)
            raise
        return result if read is None else read(result)

    async def reply(
        self, name: str, data: Any = _MISSING, /, *, timeout: float | timedelta | None = None,
        to: Destination = None, pool: str | None = None, key: str | None = None,
        headers: dict[str, str] | None = None, idempotency_key: str | None = None,
        redeliver: bool = False, attempts: int | None = None, privileged: bool = False,
        **fields: Any,
    ) -> Reply:
        """Like `call`, but returns the answer with its headers."""
        options = _calling(
            timeout, to, pool, key, headers, privileged, idempotency_key, redeliver, attempts
        )
        op = self._inner.reply_op(name, _payload(data, fields), options)
        return Reply(*await self._work.run(op))

    @overload
    def submit(
        self, name: str, data: Any = ..., /, *, into: type[T], **options: Any
    ) -> Pending[T]: ...

    @overload
    def submit(
        self, name: str, data: Any = _MISSING, /, *, into: Any = None,
        timeout: float | timedelta | None = None, to: Destination = None, pool: str | None = None,
        key: str | None = None, headers: dict[str, str] | None = None,
        idempotency_key: str | None = None, redeliver: bool = False, attempts: int | None = None,
        privileged: bool = False, **fields: Any,
    ) -> Pending[Any]: ...

    def submit(
        self, name: str, data: Any = _MISSING, /, *, into: Any = None,
        timeout: float | timedelta | None = None, to: Destination = None, pool: str | None = None,
        key: str | None = None, headers: dict[str, str] | None = None,
        idempotency_key: str | None = None, redeliver: bool = False, attempts: int | None = None,
        privileged: bool = False, **fields: Any,
    ) -> Pending[Any]:
        """Like `call`, but only sends the call: one task can have many calls in flight."""
        options = _calling(
            timeout, to, pool, key, headers, privileged, idempotency_key, redeliver, attempts
        )
        op = self._inner.call_op(name, _payload(data, fields), options)
        return Pending(self._work, self._work.loop.start(op), _into(into))

    async def park(
        self, name: str, data: Any = _MISSING, /, *, timeout: float | timedelta | None = None,
        to: Destination = None, pool: str | None = None, key: str | None = None,
        headers: dict[str, str] | None = None, idempotency_key: str | None = None,
        redeliver: bool = False, attempts: int | None = None, privileged: bool = False,
        id: str | None = None, **fields: Any,
    ) -> Parked:
        """Sends a call that the server stores on disk until a handler answers it; returns once
        it is stored, also if a handler is free."""
        options = _calling(
            timeout, to, pool, key, headers, privileged, idempotency_key, redeliver, attempts, id
        )
        op = self._inner.park(name, _payload(data, fields), options)
        return Parked(self._work, await self._work.run(op))

    def answers(self) -> Listening[Answer]:
        """Answers to parked calls that nobody in this process waits for, including calls of
        earlier processes of the app."""
        return Listening(self._work, None, Answer, self._inner.answers())

    @overload
    def stream(
        self, name: str, data: Any = ..., /, *, into: type[T], **options: Any
    ) -> Stream[T]: ...

    @overload
    def stream(
        self, name: str, data: Any = _MISSING, /, *, into: Any = None, window: int = 64,
        timeout: float | timedelta | None = None, to: Destination = None, pool: str | None = None,
        key: str | None = None, headers: dict[str, str] | None = None, privileged: bool = False,
        **fields: Any,
    ) -> Stream[Any]: ...

    def stream(
        self, name: str, data: Any = _MISSING, /, *, into: Any = None, window: int = 64,
        timeout: float | timedelta | None = None, to: Destination = None, pool: str | None = None,
        key: str | None = None, headers: dict[str, str] | None = None, privileged: bool = False,
        **fields: Any,
    ) -> Stream[Any]:
        """Calls for a streamed answer: iterate over it. Dropping it cancels the call."""
        options = _calling(timeout, to, pool, key, headers, privileged)
        items = self._inner.stream(name, _payload(data, fields), options, window)
        return Stream(self._work, items, _into(into))

    async def emit(
        self, name: str, data: Any = _MISSING, /, *, one: bool = False, count: bool = False,
        to: Destination = None, pool: str | None = None, key: str | None = None,
        headers: dict[str, str] | None = None, privileged: bool = False, **fields: Any,
    ) -> int | None:
        """Sends an event to every handler of `name`, or to `one`. With `count` it returns how
        many."""
        options = {
            "to": to, "pool": pool, "key": key, "headers": headers, "privileged": privileged,
        }
        op = self._inner.emit_op(name, _payload(data, fields), options, one, count)
        return await self._work.run(op)

    @overload
    def serve(self, name: F, /) -> F: ...
    @overload
    def serve(
        self, name: str | None = None, function: None = None, **options: Unpack[AioServeOptions]
    ) -> Callable[[F], F]: ...
    @overload
    def serve(self, name: str, function: F, **options: Unpack[AioServeOptions]) -> F: ...

    def serve(
        self, name: str | Callable[..., Any] | None = None, function: Any = None, *,
        pools: list[str] | None = None, strategy: str = "round_robin",
        concurrency: int | None = None, doc: str | None = None,
        schema: dict[str, Any] | bool = True, privileged: bool = False, inline: bool = False,
    ) -> Any:
        """Serves a trigger: `@app.serve`, `@app.serve("name")` or `app.serve("name", function)`.
        `async` functions run as tasks of the loop, others on threads, or with `inline` on the
        loop, which also awaits what they return. It is registered in the background; `await
        app.ready()` waits for that. The trigger's `doc` and `schema`, which other apps see, come
        from the docstring and the hints, unless they are given here; `schema=False` is none. The
        other options are those of `latzero.App.serve`."""
        if callable(name):
            name, function = None, name

        def register(function: F) -> F:
            is_async = _is_async(function)
            run, options = _serving(
                self, function, is_async, pools, strategy, concurrency, doc, schema, privileged
            )
            on_loop = self._work.loop.inner if inline or is_async else None
            served = name or function.__name__
            self._register(("serve", served), self._inner.serve(served, run, options, on_loop))
            return function

        return register if function is None else register(function)

    def _register(self, what: tuple[str, str], op: _latzero.Op) -> asyncio.Future[Any]:
        self._forget_refusal(what)
        future = self._work.loop.start(op)
        self._work.registering[future] = what
        return future

    def _forget_refusal(self, what: tuple[str, str]) -> None:
        known = self._work.registering
        for future in [f for f, of in known.items() if of == what and f.done()]:
            del known[future]

    async def ready(self) -> None:
        """Waits until everything is registered; raises the error if the server refuses. So does all
        else that is awaited later, until the name is registered again or `unserve` gives it up."""
        # Several tasks may wait for that, and one that no longer does leaves it to the others.
        while self._work.registering:
            await asyncio.wait(self._work.registering)
            self._work.raise_refusal()

    async def unserve(self, name: str) -> None:
        """Stops serving `name`. Running calls are finished."""
        self._forget_refusal(("serve", name))
        await self.ready()
        await self._work.run(self._inner.unserve(name))

    def events(self, name: str) -> Listening[Event]:
        """An async iterator over emits of `name` as they arrive. Listening begins with the first
        read, or now if this is awaited, and stops when it is dropped."""
        return Listening(self._work, lambda: self._work.run(self._inner.events(name)), Event)

    @overload
    def on(self, name: str, function: None = None) -> Callable[[F], F]: ...
    @overload
    def on(self, name: str, function: F) -> F: ...

    def on(self, name: str, function: Any = None) -> Any:
        """Calls `function(event)` with each emit of `name`, and awaits what it returns. Without a
        function it is a decorator. Exceptions are reported to the loop's exception handler. It is
        registered in the background; `await app.ready()` waits for that."""

        def register(function: F) -> F:
            listening = self._register(("on", name), self._inner.events(name))

            async def run() -> None:
                try:
                    inflow = await asyncio.shield(listening)
                except LatZeroError:
                    return  # `ready` raises it.
                await self._listen(inflow, Event, function, repr(name))

            self._work.loop.spawn(run())
            return function

        return register if function is None else register(function)

    async def _listen(
        self, inflow: _latzero.Inflow, make: Callable[[Any], Any], function: Callable[..., Any],
        what: str,
    ) -> None:
        """Calls `function` with each item."""
        # Goes on after a refusal, which the program's own waits raise.
        async for item in Listening(_Work(self._work.loop), None, make, inflow):
            try:
                result = function(item)
                if inspect.isawaitable(result):
                    await result
            except Exception as error:
                self._loop.call_exception_handler({
                    "message": f"a function that listens to {what} failed", "exception": error,
                })

    @overload
    def on_state(self, function: None = None) -> Callable[[F], F]: ...
    @overload
    def on_state(self, function: F) -> F: ...

    def on_state(self, function: Any = None) -> Any:
        """Calls `function(state)` when the connection changes, and awaits what it returns: with
        `"disconnected"` and `"connected"` when it was lost and made again, and at the end with
        `"displaced"` if another instance took the app over, else `"closed"`. Without a function it
        is a decorator. Exceptions are reported to the loop's exception handler."""

        def register(function: F) -> F:
            listening = self._listen(self._inner.states(), _same, function, "the state")
            self._work.loop.spawn(listening)
            return function

        return register if function is None else register(function)

    def watch(self, pool: str) -> Listening[Presence]:
        """An async iterator over apps and triggers of a pool that appear and disappear, from the
        first read on, or from now on if this is awaited."""
        return Listening(self._work, lambda: self._work.run(self._inner.watch(pool)), Presence)

    async def block(
        self, id: str, *, shape: int | Iterable[int] | None = None, dtype: Any = None,
        size: int | None = None, create: bool | Literal["new"] = False, write: bool | None = None,
        pool: str | None = None, kind: str = "shared", consistency: str = "snapshot",
        slots: int = 2, readable_by: Iterable[str] | None = None,
        writable_by: Iterable[str] | None = None, lifetime: str = "pool",
    ) -> Block:
        """Attaches to the memory block `id`. With `create` the block is created, unless there is
        one of this size and layout; with `create="new"` it must not exist. `write=False` attaches
        for reading, `True` for writing too, and `None` for writing if that is allowed. The other
        options are those of `latzero.App.block`."""
        options = _block_options(
            shape, dtype, size, create, write, pool, kind, consistency, slots, readable_by,
            writable_by, lifetime,
        )
        return Block(await self._work.run(self._inner.block(id, options)), self._work)

    async def blocks(self, pool: str | None = None) -> list[dict[str, Any]]:
        """The memory blocks of a pool, as the server describes them."""
        return await self._work.run(self._inner.blocks(pool))

    async def share(self, array: Any, *, pool: str | None = None) -> Block:
        """Copies an array into a block with a generated name, as an argument of calls. Once the
        `Block` and its views are gone, and its calls were answered, a later `share` of this size
        uses it again."""
        key, data = _shared(array, pool)
        kept = self._shares.take(key)
        if kept is not None:
            try:
                if is_ours_alone(await self._work.run(kept.info())):
                    return await self._fill(key, kept, data)
            except LatZeroError:
                pass  # It ended with an earlier connection.
        made = await self._work.run(self._inner.block(*_new_share(key)))
        return await self._fill(key, made.kept(), data)

    async def _fill(self, key: Any, kept: _latzero.Block, data: memoryview) -> Block:
        block = Block(kept.lend(), self._work)
        async with block.write(keep=False) as target:
            flat(target)[:] = data
        self._shares.keep(key, kept)
        return block

    async def join(self, pool: str) -> None:
        """Joins a pool."""
        await self._work.run(self._inner.join(pool))

    async def leave(self, pool: str) -> None:
        """Leaves a pool."""
        await self._work.run(self._inner.leave(pool))

    async def request(self, message: dict[str, Any]) -> Any:
        """Sends any request to the server: a message of the protocol, without an `id`."""
        return await self._work.run(self._inner.request(message))

    async def apps(self) -> Any:
        """The apps that the server knows."""
        return await self.request({"action": "app_list"})

    async def pools(self) -> Any:
        """The pools that the server knows."""
        return await self.request({"action": "pool_list"})

    async def trigger(self, pool: str, name: str) -> dict[str, Any] | None:
        """What the server knows of a trigger: its `doc`, its `schema`, its handlers and more.
        `None` if nobody serves it."""
        return _described(await self.request(_describing(pool, name)))

    async def ping(self) -> float:
        """How many seconds the server took to respond."""
        return await self._work.run(self._inner.ping())

    async def wait(self) -> None:
        """Waits until the app is closed. It raises the error if the server refuses a registration.
        If the app ended otherwise, because another instance took it over or it does not reconnect,
        it raises the reason."""
        await self.ready()
        await self._work.loop.run(self._connection.ended())
        ended = self._connection.end_error
        if ended is not None and not self._closed.is_set():
            raise ended

    async def run(self) -> None:
        """Serves until the app is closed: waits until what `serve` and `on` began is registered,
        and then as `wait` does."""
        await self.wait()

    async def close(self) -> None:
        """Closes the connection, after waiting up to five seconds for running handlers. In a
        handler of this app it returns at once, and the app closes when the handler has answered."""
        if is_handled_by(self):
            self._work.loop.spawn(self._close())
        else:
            await self._close()

    async def _close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._work.is_over = True
            self._shares.clear()
            for future in self._work.registering:
                future.cancel()
            await self._work.loop.run(self._inner.close_op())

    async def __aenter__(self) -> App:
        return self

    async def __aexit__(self, kind: Any, *raised: object) -> None:
        try:
            if kind is None and self._work.registering and not self._closed.is_set():
                # While it is not connected, nobody answers.
                await asyncio.wait(self._work.registering, timeout=_CLOSE_SECONDS)
                self._work.raise_refusal()
        finally:
            await self.close()


class Connecting:
    """A connection that is about to be made: awaitable, and an async context manager."""

    __slots__ = ("_arguments", "_app")

    def __init__(self, arguments: tuple[str, dict[str, Any]]) -> None:
        self._arguments = arguments

    async def _connect(self) -> App:
        return App(await _run(_latzero.connecting(*self._arguments)))

    def __await__(self) -> Generator[Any, None, App]:
        return self._connect().__await__()

    async def __aenter__(self) -> App:
        self._app = await self._connect()
        return self._app

    async def __aexit__(self, *raised: object) -> None:
        await self._app.__aexit__(*raised)


def connect(
    url: str | None = None, *, pools: Iterable[str] = (), exclusive: bool = False,
    takeover: bool = False, rehydrate: bool = False, transient: bool = False,
    meta: dict[str, Any] | None = None, reconnect: bool = True, handler_threads: int = 16,
    connect_timeout: float | timedelta = 5.0, call_timeout: float | timedelta = 30.0,
    tracebacks: bool = True,
) -> Connecting:
    """Connects: `app = await connect(…)`, or `async with connect(…) as app:`. Without `url`:
    `$LATZERO_URL`, else a transient AppID of the script's name and pid. The options are those of
    `latzero.connect`."""
    return Connecting(_options(
        url, pools, exclusive, takeover, rehydrate, transient, meta, reconnect, handler_threads,
        connect_timeout, call_timeout, tracebacks,
    ))
