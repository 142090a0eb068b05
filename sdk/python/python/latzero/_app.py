"""The face of a connection."""

from __future__ import annotations

import atexit
import contextvars
import inspect
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from . import _latzero
from ._errors import BadRequest, Disconnected, LatZeroError

F = TypeVar("F", bound=Callable[..., Any])
_MISSING: Any = object()
_current: contextvars.ContextVar[_latzero.Request] = contextvars.ContextVar("latzero_request")
_live: weakref.WeakSet[App] = weakref.WeakSet()


def request() -> _latzero.Request:
    """The request that the running handler answers; `LookupError` outside of a handler."""
    return _current.get()


class Progress:
    """Yielded by a streaming handler: a report of how far it is."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Reply:
    """An answer with its headers."""

    __slots__ = ("data", "headers")

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

    __slots__ = ("name", "pool", "data", "origin", "headers", "lost")

    def __init__(self, fields: list[Any]) -> None:
        self.name, self.pool, self.data, app_id, instance, self.headers, self.lost = fields
        self.origin: tuple[str, str] = (app_id, instance)

    def __repr__(self) -> str:
        return f"<latzero.Event {self.pool}/{self.name} from {self.origin[0]}: {self.data!r}>"


def _seconds(time: float | timedelta | None) -> float | None:
    return time.total_seconds() if isinstance(time, timedelta) else time


def _payload(data: Any, fields: dict[str, Any]) -> Any:
    if data is _MISSING:
        return fields or None
    if fields:
        raise TypeError("data and keyword fields exclude each other")
    return data


def _refuse(message: str) -> BadRequest:
    return BadRequest("bad_message", message, "no", None, "Fix what the message names.")


def _adapt(function: Callable[..., Any]) -> Callable[[_latzero.Request, Any], Any]:
    """`function` as the binding calls it: with the request and the payload."""
    signature = inspect.signature(function, eval_str=True)
    whole: str | None = None
    wants_request: dict[str, bool] = {}
    named: list[str] = []
    required: set[str] = set()
    takes_any = False
    for name, parameter in signature.parameters.items():
        positional = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
        if parameter.annotation is _latzero.Request:
            wants_request[name] = positional
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            takes_any = True
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            raise TypeError(f"a handler can't take *{name}: arguments of calls have names")
        elif positional:
            if whole is not None:
                raise TypeError("a handler takes one positional-only parameter, the payload")
            whole = name
        else:
            named.append(name)
            if parameter.default is inspect.Parameter.empty:
                required.add(name)
    if whole is not None and (named or takes_any):
        raise TypeError("a handler takes the whole payload, or its fields by name, not both")

    def run(incoming: _latzero.Request, data: Any) -> Any:
        arguments: list[Any] = []
        fields: dict[str, Any] = {}
        for name in signature.parameters:
            if name == whole:
                arguments.append(data)
            elif name in wants_request:
                if wants_request[name]:
                    arguments.append(incoming)
                else:
                    fields[name] = incoming
        if whole is None:
            given = {} if data is None else data
            if not isinstance(given, dict):
                kind = type(data).__name__
                raise _refuse(f"'{incoming.name}' takes an object of named arguments, not {kind}")
            missing = sorted(required - given.keys())
            if missing:
                raise _refuse(f"'{incoming.name}' misses the argument {missing[0]!r}")
            unknown = [key for key in given if key not in named]
            if unknown and not takes_any or any(key in wants_request for key in unknown):
                raise _refuse(f"'{incoming.name}' has no argument {unknown[0]!r}")
            fields.update(given)
        token = _current.set(incoming)
        try:
            result = function(*arguments, **fields)
        finally:
            _current.reset(token)
        # Other iterators are no streams.
        return result if inspect.isgenerator(result) or not hasattr(result, "__next__") else (
            list(result)
        )

    return run


class App:
    """A connection to the server, made by `latzero.connect`. Its methods may be called from any
    thread."""

    def __init__(self, inner: _latzero.App) -> None:
        self._inner = inner
        self._closed = threading.Event()
        self._listening: list[_latzero.Events] = []
        _live.add(self)

    app_id = property(lambda self: self._inner.app_id, doc="The AppID.")
    instance = property(lambda self: self._inner.instance, doc="The id of the live connection.")
    joined = property(lambda self: self._inner.joined, doc="The pools that the app is in.")
    is_connected = property(
        lambda self: self._inner.is_connected, doc="Whether there is a connection just now."
    )
    is_stored = property(
        lambda self: self._inner.is_stored,
        doc="Whether the server has on disk what the app registered.",
    )

    def __repr__(self) -> str:
        state = "closed" if self._closed.is_set() else (
            "connected" if self.is_connected else "disconnected"
        )
        return f"<latzero.App {self.app_id!r} in {', '.join(self.joined) or 'no pool'}, {state}>"

    def __reduce__(self) -> Any:
        raise TypeError("an App can't be pickled: connect in each process")

    def call(
        self, name: str, data: Any = _MISSING, /, *, timeout: float | timedelta | None = None,
        to: str | None = None, pool: str | None = None, key: str | None = None,
        headers: dict[str, str] | None = None, idempotency_key: str | None = None,
        redeliver: bool = False, **fields: Any,
    ) -> Any:
        """Calls the trigger `name` with `data`, or with the fields as an object; its answer."""
        options = {
            "timeout": _seconds(timeout), "to": to, "pool": pool, "key": key, "headers": headers,
            "idempotency_key": idempotency_key, "redeliver": redeliver,
        }
        return self._inner.call(name, _payload(data, fields), options)

    def reply(
        self, name: str, data: Any = _MISSING, /, *, timeout: float | timedelta | None = None,
        to: str | None = None, pool: str | None = None, key: str | None = None,
        headers: dict[str, str] | None = None, idempotency_key: str | None = None,
        redeliver: bool = False, **fields: Any,
    ) -> Reply:
        """As `call`, with the headers of the answer."""
        options = {
            "timeout": _seconds(timeout), "to": to, "pool": pool, "key": key, "headers": headers,
            "idempotency_key": idempotency_key, "redeliver": redeliver,
        }
        return Reply(*self._inner.reply(name, _payload(data, fields), options))

    def stream(
        self, name: str, data: Any = _MISSING, /, *, window: int = 64,
        timeout: float | timedelta | None = None, to: str | None = None, pool: str | None = None,
        key: str | None = None, headers: dict[str, str] | None = None, **fields: Any,
    ) -> _latzero.Stream:
        """Calls for a streamed answer: iterate over it. Dropping it cancels the call."""
        options = {
            "timeout": _seconds(timeout), "to": to, "pool": pool, "key": key, "headers": headers,
        }
        return self._inner.stream(name, _payload(data, fields), options, window)

    def emit(
        self, name: str, data: Any = _MISSING, /, *, one: bool = False, count: bool = False,
        to: str | None = None, pool: str | None = None, key: str | None = None,
        headers: dict[str, str] | None = None, **fields: Any,
    ) -> int | None:
        """Tells every handler of `name`, or `one`; with `count`, how many it went to."""
        options = {"to": to, "pool": pool, "key": key, "headers": headers}
        return self._inner.emit(name, _payload(data, fields), options, one, count)

    def serve(
        self, name: str | Callable[..., Any] | None = None, function: Any = None, *,
        pools: list[str] | None = None, strategy: str = "round_robin",
        concurrency: int | None = None, doc: str | None = None,
    ) -> Any:
        """Serves a trigger: `@app.serve`, `@app.serve("name")` or `app.serve("name", function)`."""
        if callable(name):
            name, function = None, name

        def register(function: F) -> F:
            if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
                raise TypeError("handlers are plain functions or generators, not async ones")
            about = doc if doc is not None else (inspect.getdoc(function) or "").split("\n\n")[0]
            self._inner.serve(name or function.__name__, _adapt(function), {
                "pools": pools, "strategy": strategy, "concurrency": concurrency,
                "doc": about or None,
            })
            return function

        return register if function is None else register(function)

    def unserve(self, name: str) -> None:
        """Serves `name` no longer. Calls that run are finished."""
        self._inner.unserve(name)

    def events(self, name: str) -> Iterator[Event]:
        """Emits of `name` as they arrive; listening begins now and stops when this is dropped."""
        events = self._inner.events(name)

        def iterate() -> Iterator[Event]:
            try:
                for fields in events:
                    yield Event(fields)
            finally:
                events.close()

        return iterate()

    def on(self, name: str, function: Any = None) -> Any:
        """Calls `function(event)` with each emit of `name`, on a thread of its own. A decorator,
        if no function is given. What it raises is reported to `sys.excepthook`'s stream."""

        def register(function: F) -> F:
            events = self._inner.events(name)

            def run() -> None:
                for fields in events:
                    try:
                        function(Event(fields))
                    except Exception:
                        threading.excepthook(
                            threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread()))
                        )

            threading.Thread(target=run, name=f"latzero-on-{name}", daemon=True).start()
            return function

        return register if function is None else register(function)

    def join(self, pool: str) -> None:
        """Joins a pool."""
        self._inner.join(pool)

    def leave(self, pool: str) -> None:
        """Leaves a pool."""
        self._inner.leave(pool)

    def request(self, message: dict[str, Any]) -> Any:
        """Asks the server for anything: a message of the protocol, without an `id`."""
        return self._inner.request(message)

    def apps(self) -> Any:
        """The apps that the server knows."""
        return self.request({"action": "app_list"})

    def pools(self) -> Any:
        """The pools that the server knows."""
        return self.request({"action": "pool_list"})

    def ping(self) -> float:
        """Seconds that the server took to answer."""
        return self._inner.ping()

    def wait(self) -> None:
        """Waits until the app is closed. Ctrl-C closes it, and is not raised."""
        try:
            while not self._closed.wait(0.1):
                pass
        except KeyboardInterrupt:
            self.close()

    def close(self) -> None:
        """Ends the connection, after the handlers that run."""
        if not self._closed.is_set():
            self._closed.set()
            self._inner.close()

    def __enter__(self) -> App:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def connect(
    url: str | None = None, *, pools: tuple[str, ...] | list[str] = (), exclusive: bool = False,
    takeover: bool = False, rehydrate: bool = False, transient: bool = False,
    meta: dict[str, Any] | None = None, reconnect: bool = True, handler_threads: int = 16,
    connect_timeout: float | timedelta = 5.0, call_timeout: float | timedelta = 30.0,
    tracebacks: bool = True,
) -> App:
    """Connects. Without `url`: `$LATZERO_URL`, else a transient AppID of the script's name and
    pid."""
    if url is None:
        url = os.environ.get("LATZERO_URL")
    if url is None:
        script = os.path.splitext(os.path.basename(sys.argv[0] or "python"))[0]
        name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in script)
        url, transient = f"latzero://{name or 'python'}-{os.getpid()}", True
    return App(_latzero.connect(url, {
        "pools": list(pools), "exclusive": exclusive, "takeover": takeover,
        "rehydrate": rehydrate, "transient": transient, "meta": meta, "reconnect": reconnect,
        "handler_threads": handler_threads, "connect_timeout": _seconds(connect_timeout),
        "call_timeout": _seconds(call_timeout), "tracebacks": tracebacks,
    }))


@atexit.register
def _close_all() -> None:
    for app in list(_live):
        try:
            app.close()
        except (Disconnected, LatZeroError):
            # The process ends, and the connection with it.
            pass
