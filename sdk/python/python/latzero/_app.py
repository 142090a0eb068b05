"""Connections in the blocking API."""

from __future__ import annotations

import atexit
import contextvars
import os
import sys
import weakref
from _thread import get_ident

from . import _latzero
from ._arrays import dtype_of, flat, numpy
from ._block import (
    Block, Listening, Shares, _same, _seconds, is_ours_alone, options as _block_options,
)
from ._errors import BadRequest, Cancelled, Disconnected, Failure, LatZeroError
from ._lean import TYPE_CHECKING, F, Generic, T, overload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import timedelta
    from typing import Any, Literal, Unpack

    from ._decode import Decoder, Kind
    from ._lean import Destination, ServeOptions

    # The pool, shape, dtype and size of a shared block.
    _ShareKey = tuple[str | None, Any, Any, int]

# Modules that only some programs need are imported where they are used: `import latzero` is to be
# quick.

_MISSING: Any = object()
_NONE_OF_THEM = (None,) * 8
_NO_OPTIONS: dict[str, Any] = {}
# How long `App.close` and the end of the process wait for running handlers.
_CLOSE_SECONDS = 5.0
_END_SECONDS = 1.0
# How often `App.wait` checks whether the app has ended.
_WAIT_SECONDS = 0.1
_current: contextvars.ContextVar[_latzero.Request] = contextvars.ContextVar("latzero_request")
_live: weakref.WeakSet[Any] = weakref.WeakSet()
_GENERATOR: type = type(_ for _ in ())


def request() -> _latzero.Request:
    """The request that the running handler answers; `LookupError` outside of a handler."""
    return _current.get()


def is_handled_by(app: Any) -> bool:
    """Whether this runs in a handler of `app`."""
    incoming = _current.get(None)
    return incoming is not None and incoming.app is app


class Progress:
    """Yielded by a streaming handler: a progress report."""

    __slots__ = ("value",)

    value: Any

    def __init__(self, value: Any) -> None:
        self.value = value


class Reply:
    """An answer with its headers."""

    __slots__ = ("data", "headers")

    data: Any
    headers: dict[str, str]

    def __init__(self, data: Any, headers: dict[str, str]) -> None:
        self.data, self.headers = data, headers

    @property
    def bytes(self) -> bytes | None:
        """The answer, if it is raw bytes."""
        return self.data if isinstance(self.data, bytes) else None

    def __repr__(self) -> str:
        return f"Reply({self.data!r}, headers={self.headers!r})"


class Event:
    """An emit as it arrived. `lost` is how many before it were dropped."""

    __slots__ = ("name", "pool", "origin", "headers", "lost", "_data", "_error")

    name: str
    pool: str
    origin: tuple[str, str]
    headers: dict[str, str]
    lost: int

    def __init__(self, fields: tuple[Any, ...]) -> None:
        self.name, self.pool, self._data, self._error, *rest = fields
        self.origin, self.headers, self.lost = rest

    @property
    def data(self) -> Any:
        """What was sent; raises `BadRequest` if it can't be read."""
        if self._error is not None:
            raise self._error
        return self._data

    def __repr__(self) -> str:
        data = repr(self._data) if self._error is None else str(self._error)
        return f"<latzero.Event {self.pool}/{self.name} from {self.origin[0]}: {data}>"


class Presence:
    """What happened in a pool: `app_online`, `app_offline`, `trigger_added` and so on. `lost` is
    how many before it were dropped."""

    __slots__ = ("event", "pool", "app_id", "instance", "fields", "lost")

    event: str
    pool: str | None
    app_id: str | None
    instance: str | None
    fields: dict[str, Any]
    lost: int

    def __init__(self, fields: tuple[Any, ...]) -> None:
        self.event, self.pool, self.app_id, self.instance, self.fields, self.lost = fields

    def __repr__(self) -> str:
        return f"<latzero.Presence {self.event} {self.pool} {self.app_id}>"


class Answer:
    """The answer to a parked call that nobody in this process waits for. `id` is the call's, which
    is unique in its `pool`; the server names that if it stored the answer. `lost` is how many
    before it were dropped."""

    __slots__ = ("id", "pool", "lost", "_reply", "_error")

    id: str
    pool: str | None
    lost: int

    def __init__(self, fields: tuple[Any, ...]) -> None:
        self.id, self.pool, reply, self._error, self.lost = fields
        self._reply = None if reply is None else Reply(*reply)

    def result(self) -> Any:
        """The answer; raises the error with which the handler or the server ended the call."""
        if self._error is not None:
            raise self._error
        assert self._reply is not None
        return self._reply.data

    def __repr__(self) -> str:
        return f"<latzero.Answer to {self.id!r}>"


def _payload(data: Any, fields: dict[str, Any]) -> Any:
    if data is _MISSING:
        return fields or None
    if fields:
        raise TypeError("data and keyword fields exclude each other")
    return data


def _refuse(message: str) -> Failure:
    return Failure("bad_message", message)


def _is_async(function: Callable[..., Any]) -> bool:
    import inspect

    call = getattr(function, "__call__", None)
    return any(
        inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f in (function, call)
    )


def _calling(
    timeout: float | timedelta | None, to: Destination, pool: str | None, key: str | None,
    headers: dict[str, str] | None, privileged: bool = False, idempotency_key: str | None = None,
    redeliver: bool = False, attempts: int | None = None, id: str | None = None,
) -> dict[str, Any]:
    """The options of a call, as the binding takes them."""
    is_plain = not (redeliver or privileged)
    given = (timeout, to, pool, key, headers, idempotency_key, attempts, id)
    if is_plain and given == _NONE_OF_THEM:
        return _NO_OPTIONS
    return {
        "timeout": _seconds(timeout), "to": to, "pool": pool, "key": key, "headers": headers,
        "privileged": privileged, "idempotency_key": idempotency_key, "redeliver": redeliver,
        "attempts": attempts, "id": id,
    }


def _serving(
    app: Any, function: Callable[..., Any], is_async: bool, pools: list[str] | None,
    strategy: str, concurrency: int | None, doc: str | None, schema: dict[str, Any] | bool,
    privileged: bool,
) -> tuple[Callable[[_latzero.Request, Any], Any], dict[str, Any]]:
    """`function` and the options of a handler, as the binding takes them."""
    import inspect

    run, derived = _adapt(function, is_async)
    about = doc if doc is not None else (inspect.getdoc(function) or "").split("\n\n")[0]
    return run, {
        "pools": pools, "strategy": strategy, "concurrency": concurrency, "doc": about or None,
        "schema": None if isinstance(schema, bool) else schema,
        "derived_schema": (derived or None) if schema is True else None,
        "privileged": privileged, "owner": weakref.ref(app), "is_async": is_async,
    }


def _listen(items: Iterable[Any], function: F, thread: str) -> F:
    """Calls `function` with each item, on a thread of this name."""
    import threading

    def run() -> None:
        for item in items:
            try:
                function(item)
            except Exception:
                threading.excepthook(
                    threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread()))
                )

    threading.Thread(target=run, name=thread, daemon=True).start()
    return function


class Stream(Generic[T]):
    """A streamed answer: iterate over its items. Dropping it, and leaving `with`, cancels the
    call."""

    __slots__ = ("_items", "_decode")

    def __init__(self, items: _latzero.Items, decode: Callable[[Any], T]) -> None:
        self._items, self._decode = items, decode

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

    def __iter__(self) -> Stream[T]:
        return self

    def __next__(self) -> T:
        item = self._items.next().wait()
        if item is None:
            raise StopIteration
        return self._decode(item[0])

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, *raised: object) -> None:
        self.cancel()


class Pending(Generic[T]):
    """A call that was sent. Dropping it cancels the call."""

    __slots__ = ("_op", "_decode", "_result")

    def __init__(self, op: _latzero.Op, decode: Callable[[Any], T]) -> None:
        self._op, self._decode = op, decode
        self._result: tuple[Any, Exception | None] | None = None
        op.poll()

    def done(self) -> bool:
        """Whether `result` returns or raises at once."""
        return self._result is not None or self._op.poll()

    def result(self, timeout: float | timedelta | None = None) -> T:
        """Waits for the answer; raises the error if the call failed. `TimeoutError` if it takes
        longer than `timeout`; the call then continues."""
        if self._result is None:
            seconds = _seconds(timeout)
            try:
                waited = (self._op.wait(),) if seconds is None else self._op.wait_within(seconds)
            except LatZeroError as raised:
                outcome: tuple[Any, Exception | None] = None, raised
            else:
                if waited is None:
                    raise TimeoutError("the answer did not come in this time")
                try:
                    outcome = self._decode(waited[0]), None
                except Exception as raised:
                    outcome = None, raised
            # Another thread may have cancelled the call in the meantime.
            if self._result is None:
                self._result = outcome
        value: Any = self._result[0]
        error = self._result[1]
        if error is not None:
            raise error
        result: T = value
        return result

    def __repr__(self) -> str:
        return f"<latzero.Pending {'done' if self.done() else 'waits for its answer'}>"

    def cancel(self) -> None:
        """Cancels the call, unless it is done. A thread that waits for its answer gets `Cancelled`
        at once."""
        if self._result is None and self._op.drop():
            self._result = None, Cancelled("cancelled", "the call was cancelled", "unknown", None)


class Parked:
    """A call that the server stores until it is answered. The call continues if this is dropped:
    `App.answers` then returns its answer."""

    __slots__ = ("_inner",)

    def __init__(self, inner: _latzero.Parked) -> None:
        self._inner = inner

    @property
    def id(self) -> str:
        """The call's id, by which `App.answers` names it."""
        return self._inner.id

    def answer(self) -> Any:
        """Waits for the answer, which is returned once: after that this raises `BadRequest`. A
        wait that Ctrl-C ends may be repeated."""
        return self._inner.answer().wait()

    def cancel(self) -> None:
        """Cancels the call. A thread that waits for its answer gets `Cancelled` at once."""
        self._inner.cancel()


def _stepped(incoming: _latzero.Request, items: Any) -> Iterator[Any]:
    """The generator of a handler, each step of which and whose end have the request as the current
    one."""
    # Between the steps the thread may do something else.
    try:
        while True:
            token = _current.set(incoming)
            try:
                item = next(items)
            except StopIteration as end:
                return end.value
            finally:
                _current.reset(token)
            yield item
    finally:
        token = _current.set(incoming)
        try:
            items.close()
        finally:
            _current.reset(token)


def _into(into: Any) -> Callable[[Any], Any]:
    """A function that converts an answer to what the caller wants."""
    if into is None:
        return _same
    from ._decode import Mismatch, decoder

    decode = decoder(into)

    def read(value: Any) -> Any:
        try:
            return decode(value, "the answer")
        except Mismatch as error:
            raise BadRequest(
                "bad_message", str(error), "unknown", value, "Ask for what the handler answers."
            ) from None

    return read


def _adapt(
    function: Callable[..., Any], is_async: bool
) -> tuple[Callable[[_latzero.Request, Any], Any], dict[str, Any]]:
    """`function` as the binding calls it, with the request and the payload; and the schema of the
    payload."""
    import inspect

    from ._decode import Mismatch, kind, lift_definitions, parameters
    from ._decode import _same as _any

    signature = inspect.signature(function, eval_str=True)
    whole: str | None = None
    wants_request: dict[str, bool] = {}
    defaults: dict[str, Any] = {}
    takes_any = False
    kinds: dict[str, Kind] = {}
    for name, parameter in signature.parameters.items():
        positional = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
        hint = parameter.annotation
        if isinstance(hint, type) and issubclass(hint, _latzero.Request):
            wants_request[name] = positional
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            takes_any = True
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            raise TypeError(f"a handler can't take *{name}: arguments of calls have names")
        elif positional:
            if whole is not None:
                raise TypeError("a handler takes one positional-only parameter, the payload")
            whole = name
            kinds[name] = kind(hint)
        else:
            kinds[name] = kind(hint)
            if parameter.default is not inspect.Parameter.empty:
                defaults[name] = parameter.default
    if whole is not None and (len(kinds) > 1 or takes_any):
        raise TypeError("a handler takes the whole payload, or its fields by name, not both")
    decoders = {name: one.decode for name, one in kinds.items()}
    names, required = decoders.keys(), decoders.keys() - defaults.keys()
    schema = lift_definitions(
        kinds[whole].schema if whole else parameters(kinds, defaults, takes_any)
    )

    # Those that are passed by position, in their order; the payload is `None` here.
    positions = [
        None if name == whole else name for name in signature.parameters
        if name == whole or wants_request.get(name)
    ]
    by_name = [name for name, is_positional in wants_request.items() if not is_positional]

    def check(incoming: _latzero.Request, given: Any) -> None:
        if not isinstance(given, dict):
            got = type(given).__name__
            raise _refuse(f"'{incoming.name}' takes an object of named arguments, not {got}")
        missing = sorted(required - given.keys())
        if missing:
            raise _refuse(f"'{incoming.name}' misses the argument {missing[0]!r}")
        unknown = [key for key in given if key not in decoders]
        if unknown and not takes_any or any(key in wants_request for key in unknown):
            raise _refuse(f"'{incoming.name}' has no argument {unknown[0]!r}")

    def arguments(incoming: _latzero.Request, data: Any) -> tuple[list[Any], dict[str, Any]]:
        try:
            if whole is not None:
                value = decoders[whole](data, whole)
                fields = {}
            else:
                value, given = None, {} if data is None else data
                if type(given) is not dict or given.keys() != names:
                    check(incoming, given)
                fields = {
                    key: decoders[key](value, key) if key in decoders else value
                    for key, value in given.items()
                }
        except Mismatch as error:
            raise _refuse(f"'{incoming.name}': {error}") from None
        for name in by_name:
            fields[name] = incoming
        return [value if name is None else incoming for name in positions], fields

    def run(incoming: _latzero.Request, data: Any) -> Any:
        given, fields = arguments(incoming, data)
        token = _current.set(incoming)
        try:
            result = function(*given, **fields)
        finally:
            _current.reset(token)
        return _stepped(incoming, result) if type(result) is _GENERATOR else result

    def run_whole(incoming: _latzero.Request, data: Any) -> Any:
        # The shortest way for a function of the payload alone.
        token = _current.set(incoming)
        try:
            result = function(data)
        finally:
            _current.reset(token)
        return _stepped(incoming, result) if type(result) is _GENERATOR else result

    def run_async(incoming: _latzero.Request, data: Any) -> Any:
        # The event loop has set the current request.
        given, fields = arguments(incoming, data)
        return function(*given, **fields)

    takes_all = whole is not None and not wants_request and decoders[whole] is _any
    if is_async:
        return (lambda _, data: function(data)) if takes_all else run_async, schema
    return run_whole if takes_all else run, schema


class App:
    """A connection to the server, made by `latzero.connect`. Its methods may be called from any
    thread."""

    def __init__(self, arguments: tuple[str, dict[str, Any]]) -> None:
        import threading

        self._arguments = arguments
        self._lock = threading.RLock()
        self._open()
        self._connection: _latzero.App | None = _latzero.connect(*arguments)
        _live.add(self)

    def _open(self) -> None:
        import threading

        self._closed = threading.Event()
        # The thread that closes the app, once one does, in a list of one.
        self._closing: dict[str, list[int]] = {}
        self._loop: Any = None
        self._shares = Shares()

    @property
    def _inner(self) -> _latzero.App:
        found = self._connection
        if found is None:
            # In a forked child, which opens its own connection when it needs one.
            with self._lock:
                if self._connection is None:
                    if self._closing:
                        raise Disconnected("disconnected", "the app is closed", "no", None)
                    self._connection = _latzero.connect(*self._arguments)
                found = self._connection
        return found

    def _forked(self, descriptor: int | None) -> None:
        """In a forked child: releases the parent's connection without a message to the server."""
        import threading

        inner = self._connection
        if inner is not None:
            inner.leak()
            if descriptor is not None:
                _close_quietly(descriptor)
        was_closed = bool(self._closing)
        self._lock = threading.RLock()
        self._connection = None
        self._open()
        if was_closed:
            self._close(None)

    @property
    def app_id(self) -> str:
        """The AppID."""
        return self._inner.app_id

    @property
    def instance(self) -> str | None:
        """The id of the current connection."""
        return self._inner.instance

    @property
    def joined(self) -> list[str]:
        """The pools that the app is in."""
        return self._inner.joined

    @property
    def is_connected(self) -> bool:
        """Whether the app is connected now."""
        return self._inner.is_connected

    @property
    def is_stored(self) -> bool:
        """Whether the app's registration is on the server's disk."""
        return self._inner.is_stored

    @property
    def lost(self) -> int:
        """How many events and answers were dropped so far because they were not read in time. The
        `lost` of an event or answer says how many were dropped just before it."""
        return self._inner.lost

    def __repr__(self) -> str:
        inner = self._connection
        if inner is None:
            return "<latzero.App of a forked process, not connected yet>"
        state = "closed" if self._closed.is_set() else (
            "connected" if inner.is_connected else "disconnected"
        )
        return f"<latzero.App {inner.app_id!r} in {', '.join(inner.joined) or 'no pool'}, {state}>"

    def __reduce__(self) -> Any:
        raise TypeError("an App can't be pickled: connect in each process")

    @overload
    def call(self, name: str, data: Any = ..., /, *, into: type[T], **options: Any) -> T: ...

    @overload
    def call(
        self, name: str, data: Any = _MISSING, /, *, into: Any = None,
        timeout: float | timedelta | None = None, to: Destination = None, pool: str | None = None,
        key: str | None = None, headers: dict[str, str] | None = None,
        idempotency_key: str | None = None, redeliver: bool = False, attempts: int | None = None,
        privileged: bool = False, **fields: Any,
    ) -> Any: ...

    def call(
        self, name: str, data: Any = _MISSING, /, *, into: Any = None,
        timeout: float | timedelta | None = None, to: Destination = None, pool: str | None = None,
        key: str | None = None, headers: dict[str, str] | None = None,
        idempotency_key: str | None = None, redeliver: bool = False, attempts: int | None = None,
        privileged: bool = False, **fields: Any,
    ) -> Any:
        """Calls the trigger `name` with `data`, or with the fields as an object; returns the
        answer, as a value of the type `into`.

        `timeout` is seconds or a `timedelta`. `to` is an AppID, or an AppID and an instance. `pool`
        is needed where the app is in several. `key` is that of a sticky trigger. The handler gets
        `headers` unchanged. Calls of one app with the same `idempotency_key` run once. With
        `redeliver` another handler gets the call if its handler is lost, `attempts` times in all.
        `privileged` signs it, for privileged triggers of encrypted pools."""
        # The shortest way for the most frequent calls: each function that is called costs.
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
        connection = self._connection or self._inner
        if into is None:
            return connection.call(name, data, options)
        read = _into(into)
        return read(connection.call(name, data, options))

    def reply(
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
        return Reply(*self._inner.reply(name, _payload(data, fields), options))

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
        """Like `call`, but only sends the call: one thread can have many calls in flight."""
        options = _calling(
            timeout, to, pool, key, headers, privileged, idempotency_key, redeliver, attempts
        )
        return Pending(self._inner.call_op(name, _payload(data, fields), options), _into(into))

    def park(
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
        return Parked(self._inner.park(name, _payload(data, fields), options).wait())

    def answers(self) -> Listening[Answer]:
        """Answers to parked calls that nobody in this process waits for, including calls of
        earlier processes of the app."""
        return Listening(self._inner.answers(), Answer)

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
        return Stream(items, _into(into))

    def emit(
        self, name: str, data: Any = _MISSING, /, *, one: bool = False, count: bool = False,
        to: Destination = None, pool: str | None = None, key: str | None = None,
        headers: dict[str, str] | None = None, privileged: bool = False, **fields: Any,
    ) -> int | None:
        """Sends an event to every handler of `name`, or to `one`. With `count` it returns how
        many."""
        options = {
            "to": to, "pool": pool, "key": key, "headers": headers, "privileged": privileged,
        }
        return self._inner.emit(name, _payload(data, fields), options, one, count)

    @overload
    def serve(self, name: F, /) -> F: ...
    @overload
    def serve(
        self, name: str | None = None, function: None = None, **options: Unpack[ServeOptions]
    ) -> Callable[[F], F]: ...
    @overload
    def serve(self, name: str, function: F, **options: Unpack[ServeOptions]) -> F: ...

    def serve(
        self, name: str | Callable[..., Any] | None = None, function: Any = None, *,
        pools: list[str] | None = None, strategy: str = "round_robin",
        concurrency: int | None = None, doc: str | None = None,
        schema: dict[str, Any] | bool = True, privileged: bool = False,
    ) -> Any:
        """Serves a trigger: `@app.serve`, `@app.serve("name")` or `app.serve("name", function)`.
        Plain functions and generators run on threads; `async` ones on one event loop, on a thread
        that the app starts for them. The trigger's `doc` and `schema`, which other apps see, come
        from the docstring and the hints, unless they are given here; `schema=False` is none.

        `pools` are those in which it is served, all by default. `strategy` says which handler gets
        a call: `round_robin`, `random`, `least_busy`, or `sticky` by the call's `key`.
        `concurrency` is how many calls this process takes at a time. A `privileged` trigger takes
        only calls that a writer of an encrypted pool signed."""
        if callable(name):
            name, function = None, name

        def register(function: F) -> F:
            is_async = _is_async(function)
            run, options = _serving(
                self, function, is_async, pools, strategy, concurrency, doc, schema, privileged
            )
            loop = self._async_loop() if is_async else None
            self._inner.serve(name or function.__name__, run, options, loop).wait()
            return function

        return register if function is None else register(function)

    def _async_loop(self) -> _latzero.Loop:
        """The event loop of async handlers, created when it is first needed."""
        with self._lock:
            if self._loop is None:
                from .aio import LoopThread

                self._loop = LoopThread(f"latzero-{self.app_id}")
            return self._loop.inner

    def unserve(self, name: str) -> None:
        """Stops serving `name`. Running calls are finished."""
        self._inner.unserve(name).wait()

    def events(self, name: str) -> Listening[Event]:
        """Emits of `name` as they arrive; listening begins now and stops when this is dropped."""
        return Listening(self._inner.events(name).wait(), Event)

    @overload
    def on(self, name: str, function: None = None) -> Callable[[F], F]: ...
    @overload
    def on(self, name: str, function: F) -> F: ...

    def on(self, name: str, function: Any = None) -> Any:
        """Calls `function(event)` with each emit of `name`, on a separate thread. Without a
        function it is a decorator. Exceptions are reported to `threading.excepthook`."""

        def register(function: F) -> F:
            return _listen(self.events(name), function, f"latzero-on-{name}")

        return register if function is None else register(function)

    @overload
    def on_state(self, function: None = None) -> Callable[[F], F]: ...
    @overload
    def on_state(self, function: F) -> F: ...

    def on_state(self, function: Any = None) -> Any:
        """Calls `function(state)` when the connection changes, on a separate thread: with
        `"disconnected"` and `"connected"` when it was lost and made again, and at the end with
        `"displaced"` if another instance took the app over, else `"closed"`. Without a function it
        is a decorator. Exceptions are reported to `threading.excepthook`."""

        def register(function: F) -> F:
            return _listen(Listening(self._inner.states(), _same), function, "latzero-on-state")

        return register if function is None else register(function)

    def watch(self, pool: str) -> Listening[Presence]:
        """Apps and triggers of a pool that appear and disappear, from now on."""
        return Listening(self._inner.watch(pool).wait(), Presence)

    def block(
        self, id: str, *, shape: int | Iterable[int] | None = None, dtype: Any = None,
        size: int | None = None, create: bool | Literal["new"] = False, write: bool | None = None,
        pool: str | None = None, kind: str = "shared", consistency: str = "snapshot",
        slots: int = 2, readable_by: Iterable[str] | None = None,
        writable_by: Iterable[str] | None = None, lifetime: str = "pool",
    ) -> Block:
        """Attaches to the memory block `id`. With `create` the block is created, unless there is
        one of this size and layout; with `create="new"` it must not exist. `write=False` attaches
        for reading, `True` for writing too, and `None` for writing if that is allowed.

        A layout is a `shape` and a `dtype`; else `size` is in bytes. `kind` is `shared`, or
        `persistent`: a file that outlives the machine's restarts. `consistency` is `snapshot`, with
        a number of `slots` for versions, or `raw`: one slot, written in place. `readable_by` and
        `writable_by` are the apps that may. The `lifetime` is that of the `pool`, or ends with the
        last that is `attached`."""
        options = _block_options(
            shape, dtype, size, create, write, pool, kind, consistency, slots, readable_by,
            writable_by, lifetime,
        )
        return Block(self._inner.block(id, options).wait())

    def blocks(self, pool: str | None = None) -> list[dict[str, Any]]:
        """The memory blocks of a pool, as the server describes them."""
        return self._inner.blocks(pool).wait()

    def share(self, array: Any, *, pool: str | None = None) -> Block:
        """Copies an array into a block with a generated name, as an argument of calls. Once the
        `Block` and its views are gone, and its calls were answered, a later `share` of this size
        uses it again."""
        key, data = _shared(array, pool)
        kept = self._shares.take(key)
        if kept is not None:
            try:
                if is_ours_alone(kept.info().wait()):
                    return self._fill(key, kept, data)
            except LatZeroError:
                pass  # It ended with an earlier connection.
        made = self._inner.block(*_new_share(key)).wait()
        return self._fill(key, made.kept(), data)

    def _fill(self, key: Any, kept: _latzero.Block, data: memoryview) -> Block:
        block = Block(kept.lend())
        with block.write(keep=False) as target:
            flat(target)[:] = data
        self._shares.keep(key, kept)
        return block

    def join(self, pool: str) -> None:
        """Joins a pool."""
        self._inner.join(pool).wait()

    def leave(self, pool: str) -> None:
        """Leaves a pool."""
        self._inner.leave(pool).wait()

    def request(self, message: dict[str, Any]) -> Any:
        """Sends any request to the server: a message of the protocol, without an `id`."""
        return self._inner.request(message).wait()

    def apps(self) -> Any:
        """The apps that the server knows."""
        return self.request({"action": "app_list"})

    def pools(self) -> Any:
        """The pools that the server knows."""
        return self.request({"action": "pool_list"})

    def trigger(self, pool: str, name: str) -> dict[str, Any] | None:
        """What the server knows of a trigger: its `doc`, its `schema`, its handlers and more.
        `None` if nobody serves it."""
        return _described(self.request(_describing(pool, name)))

    def ping(self) -> float:
        """How many seconds the server took to respond."""
        return self._inner.ping().wait()

    def wait(self) -> None:
        """Waits until the app is closed. Ctrl-C closes it, and is not raised. If the app ended
        otherwise, because another instance took it over or it does not reconnect, this raises the
        reason."""
        try:
            while not self._closed.wait(_WAIT_SECONDS):
                ended = self._inner.end_error
                if ended is not None and not self._closing:
                    raise ended
        except KeyboardInterrupt:
            self.close()

    def close(self) -> None:
        """Closes the connection, after waiting up to five seconds for running handlers. In a
        handler of this app it returns at once, and the app closes when the handler has answered."""
        if is_handled_by(self):
            import threading

            # The process does not end before that, though threads of handlers are daemons.
            threading.Thread(
                target=self._close, args=(None,), name="latzero-close", daemon=False
            ).start()
        else:
            self._close(None)

    def _end(self) -> None:
        """At the end of the process."""
        self._close(_END_SECONDS)

    def _close(self, within: float | None) -> None:
        this = [get_ident()]
        first = self._closing.setdefault("by", this)
        if first is not this:
            # A signal may close it again on the thread that does so already.
            if first != this:
                self._closed.wait(within)
            return
        self._shares.clear()
        try:
            if self._connection is not None:
                self._connection.close(within)
        finally:
            try:
                if self._loop is not None:
                    self._loop.close(_CLOSE_SECONDS if within is None else within)
            finally:
                self._closed.set()

    def __enter__(self) -> App:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _describing(pool: str, name: str) -> dict[str, Any]:
    """The request for what the server knows of a trigger."""
    return {"action": "pool_info", "pool": pool, "trigger": name}


def _described(info: Any) -> dict[str, Any] | None:
    """The one trigger in the answer to such a request."""
    return next(iter(info["triggers"]), None)


def _shared(array: Any, pool: str | None) -> tuple[_ShareKey, memoryview]:
    """The key of the blocks that an array, bytes or another buffer can be shared in, and its
    bytes."""
    module = numpy()
    is_bytes = isinstance(array, bytes)  # As numpy's are too.
    if module is not None and not is_bytes and isinstance(array, (module.ndarray, module.generic)):
        if isinstance(array, module.ma.MaskedArray):
            raise TypeError("a masked array can't be shared: share its `data`, or its `filled()`")
        whole = module.asarray(array)
        if whole.dtype.hasobject or whole.dtype.kind in "MmU":
            raise TypeError(f"an array of {whole.dtype} can't be shared: it has no numbers")
        data = memoryview(module.ascontiguousarray(whole).reshape(-1).view("u1"))
        return (pool, whole.shape, whole.dtype, len(data)), data
    view = memoryview(array)
    data = (view if view.c_contiguous else memoryview(view.tobytes())).cast("B")
    dtype = dtype_of(view)
    # Such as bytes.
    if dtype == "u1" and view.ndim == 1:
        dtype = None
    shape = None if dtype is None else view.shape
    return (pool, shape, dtype, len(data)), data


def _new_share(key: _ShareKey) -> tuple[str, dict[str, Any]]:
    """A name and the options for a new block of a key."""
    pool, shape, dtype, size = key
    return f"share-{os.urandom(16).hex()}", _block_options(
        shape, dtype, size, "new", None, pool, "shared", "snapshot", 2, None, None, "attached",
    )


def _options(
    url: str | None, pools: Iterable[str], exclusive: bool, takeover: bool, rehydrate: bool,
    transient: bool, meta: dict[str, Any] | None, reconnect: bool, handler_threads: int,
    connect_timeout: float | timedelta, call_timeout: float | timedelta, tracebacks: bool,
) -> tuple[str, dict[str, Any]]:
    """The address and the options for the binding."""
    if isinstance(pools, str):
        raise TypeError(f"pools is a list of names, such as [{pools!r}]")
    if url is None:
        url = os.environ.get("LATZERO_URL")
    if url is None:
        script = os.path.splitext(os.path.basename(sys.argv[0] or "python"))[0]
        name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in script)
        url, transient = f"latzero://{name or 'python'}-{os.getpid()}", True
    return url, {
        "pools": list(pools), "exclusive": exclusive, "takeover": takeover,
        "rehydrate": rehydrate, "transient": transient, "meta": meta, "reconnect": reconnect,
        "handler_threads": handler_threads, "connect_timeout": _seconds(connect_timeout),
        "call_timeout": _seconds(call_timeout), "tracebacks": tracebacks,
    }


def connect(
    url: str | None = None, *, pools: Iterable[str] = (), exclusive: bool = False,
    takeover: bool = False, rehydrate: bool = False, transient: bool = False,
    meta: dict[str, Any] | None = None, reconnect: bool = True, handler_threads: int = 16,
    connect_timeout: float | timedelta = 5.0, call_timeout: float | timedelta = 30.0,
    tracebacks: bool = True,
) -> App:
    """Connects. Without `url`: `$LATZERO_URL`, else a transient AppID of the script's name and pid.

    `pools` are further pools to join. An `exclusive` app is the only instance; `takeover` displaces
    others. `rehydrate` takes the pools and triggers that the server remembers, and of a `transient`
    app it remembers nothing. `meta` is shown in listings of apps. `reconnect` connects again after
    a loss. `handler_threads` is how many plain functions run at a time. `connect_timeout` and
    `call_timeout` are seconds or a `timedelta`. `tracebacks` sends those of handlers to callers."""
    return App(_options(
        url, pools, exclusive, takeover, rehydrate, transient, meta, reconnect, handler_threads,
        connect_timeout, call_timeout, tracebacks,
    ))


def open_apps() -> list[App]:
    """The apps of this process that are open."""
    return [app for app in list(_live) if isinstance(app, App) and not app._closing]


# The apps of both APIs that may be open, and their descriptors, for each thread that forks.
_forking: dict[int, list[tuple[Any, int | None]]] = {}


def _close_quietly(descriptor: int) -> None:
    """Replaces a socket with one that has no other end."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, descriptor, inheritable=False)
    os.close(null)


def _before_fork() -> None:
    found = _forking[get_ident()] = []
    for app in list(_live):
        connection = app._connection
        found.append((app, connection and connection.descriptor))


def _after_fork_in_parent() -> None:
    _forking.pop(get_ident(), None)


def _after_fork_in_child() -> None:
    _latzero.forked()
    for app, descriptor in _forking.pop(get_ident(), ()):
        app._forked(descriptor)
    _forking.clear()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)


@atexit.register
def _close_all() -> None:
    for app in list(_live):
        try:
            app._end()
        except LatZeroError:
            # The process ends, and the connection with it.
            pass
