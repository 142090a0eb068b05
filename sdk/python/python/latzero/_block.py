"""Memory blocks in the blocking API."""

from __future__ import annotations

import os

from . import _arrays, _latzero
from ._errors import BlockError, Timeout
from ._lean import TYPE_CHECKING, Generic, T

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta
    from typing import Any

# How long one step of a wait without a timeout takes.
_LONG = 3600.0
# Whether writes after the end of a version are looked for.
_IS_DEBUG = os.environ.get("LATZERO_DEBUG") == "1"


# Longer than any wait, and less than what the binding takes.
_SECONDS_MAX = 1e15


def _seconds(time: float | timedelta | None) -> Any:
    if time is None:
        return None
    try:
        seconds = time if isinstance(time, (int, float)) else time.total_seconds()
        if not 0 <= seconds <= _SECONDS_MAX:
            raise ValueError(f"a time is a number of seconds from 0 on, not {seconds}")
        return seconds
    except AttributeError:
        raise TypeError(
            f"a time is a number of seconds or a timedelta, not {type(time).__name__}"
        ) from None


def _same(value: Any) -> Any:
    return value


class Listening(Generic[T]):
    """Arriving items: an iterator. Dropping it ends that, and so does `close`."""

    __slots__ = ("_inflow", "_make")

    def __init__(self, inflow: _latzero.Inflow, make: Callable[[Any], T]) -> None:
        self._inflow, self._make = inflow, make

    def __iter__(self) -> Listening[T]:
        return self

    def __next__(self) -> T:
        item = self._inflow.next().wait()
        if item is None:
            raise StopIteration
        return self._make(item[0])

    def close(self) -> None:
        """Stops listening. A thread that waits for the next item gets the end of the iteration."""
        self._inflow.close()


class BlockInfo:
    """The attributes of a block, which `Block` and `aio.Block` have."""

    __slots__ = ("_handle", "__weakref__")

    def __init__(self, handle: _latzero.Block) -> None:
        self._handle: _latzero.Block | None = handle

    @property
    def _inner(self) -> _latzero.Block:
        if self._handle is None:
            raise BlockError(
                "no_block", "the handle was closed", "no", None, "Open the block again."
            )
        return self._handle

    @property
    def id(self) -> str:
        """Its name."""
        return self._inner.id

    @property
    def pool(self) -> str:
        """Its pool."""
        return self._inner.pool

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self._inner.nbytes

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of its array, if it has a layout."""
        layout = self._inner.layout
        return tuple(layout[1]) if layout else None

    @property
    def dtype(self) -> str | list[tuple[str, str]] | None:
        """The element type in numpy's notation, if it has a layout: a list of pairs if it has named
        fields. `bf16` is read as two bytes each (`V2`)."""
        layout = self._inner.layout
        return layout[0] if layout else None

    @property
    def version(self) -> int:
        """Its newest version, as far as it is known without a request; 0 if never written."""
        return self._inner.version

    @property
    def generation(self) -> int:
        """Its generation, which grows with each resize."""
        return self._inner.generation

    @property
    def is_live(self) -> bool:
        """Whether the server is connected and has the block."""
        return self._inner.is_live

    @property
    def is_mapped(self) -> bool:
        """Whether its bytes are mapped into this process, rather than copied."""
        return self._inner.is_mapped

    def close(self) -> None:
        """Detaches from the block. Views stay readable."""
        self._handle = None

    def __repr__(self) -> str:
        if self._handle is None:
            return "<latzero.Block, closed>"
        what = f"{self.dtype} {self.shape}" if self.dtype else f"{self.nbytes} bytes"
        return f"<latzero.Block {self.pool}/{self.id}: {what}, version {self.version}>"

    def _read(self, out: Any) -> Any:
        """Copies the newest version."""
        while True:
            inner = self._inner
            nbytes, layout = inner.nbytes, inner.layout
            target = _arrays.empty(nbytes, layout) if out is None else out
            place = _arrays.flat(target)
            if place.nbytes != nbytes:
                raise ValueError(f"`out` has {place.nbytes} bytes, the block has {nbytes}")
            _arrays.check_type(out, nbytes, layout)
            try:
                inner.read_into(0, place)
            except BlockError as error:
                # It was resized in the meantime.
                if error.code == "out_of_range" and inner.nbytes != nbytes and out is None:
                    continue
                raise
            # Attaching to it again may show that another process has resized it.
            if inner.nbytes == nbytes:
                return target

    def _read_at(self, offset: int, length: int) -> bytes:
        target = bytearray(length)
        self._inner.read_into(offset, target)
        return bytes(target)


class Shares:
    """The blocks that `App.share` made last. One is filled again once nothing uses it: no handle,
    no view, and no call whose handler may still run."""

    __slots__ = ("_kept",)

    # How many are kept for each app.
    _COUNT_MAX = 4

    def __init__(self) -> None:
        self._kept: list[tuple[Any, _latzero.Block]] = []

    def take(self, key: Any) -> _latzero.Block | None:
        """One that nothing here uses any more; the server knows whether others do."""
        for entry in list(self._kept):
            if entry[0] == key and entry[1].is_free:
                try:
                    self._kept.remove(entry)
                except ValueError:
                    continue  # Another thread was faster.
                return entry[1]
        return None

    def keep(self, key: Any, kept: _latzero.Block) -> None:
        """Keeps one, and the newest of the others."""
        self._kept.append((key, kept))
        del self._kept[:-self._COUNT_MAX]

    def clear(self) -> None:
        """Keeps none."""
        self._kept.clear()


def is_ours_alone(info: dict[str, Any]) -> bool:
    """Whether no other app is attached to a block."""
    return bool(info["attachments_total"] == 1)


class Filling:
    """The array of a version that is being written, in place if the block is mapped."""

    __slots__ = ("array", "offset", "is_copy", "_slot", "_memory", "_name")

    def __init__(
        self, inner: _latzero.Block, target: Any, keep: bool, part: slice | None
    ) -> None:
        layout = inner.layout
        self.offset, length, layout = _arrays.part_of(part, inner.nbytes, layout)
        self._memory: Any = None
        if _IS_DEBUG:
            from ._debug import Memory

            self._slot, self.is_copy = None, True
            self._memory, self._name = Memory(length), f"{inner.pool}/{inner.id}"
            self.array = _arrays.array(self._memory, layout)
            return
        self._slot = None if target is None else target.expose(self.offset, length, keep)
        self.is_copy = self._slot is None
        if self._slot is not None:
            self.array = _arrays.array(self._slot, layout)
            return
        self.array = _arrays.empty(length, layout)

    def read(self, inner: _latzero.Block) -> None:
        """Copies the previous version, if the array is not in place."""
        inner.read_into(self.offset, _arrays.flat(self.array))

    def copy(self) -> bytes:
        """The bytes, if they are not in place."""
        return bytes(_arrays.flat(self.array))

    def close(self) -> None:
        """Makes later writes errors."""
        _arrays.close(self.array)
        if self._slot is not None:
            self._slot.close()
        if self._memory is not None:
            self._memory.end(self._name)


def begin(writer: _latzero.Writer) -> _latzero.Version | None:
    """Begins a version; `None` if it is written by copying."""
    return None if _IS_DEBUG else writer.begin()


class Write:
    """A version that is being written: `with block.write() as a: ...`. Leaving publishes it, an
    exception discards it. After that `version` is its number."""

    __slots__ = ("_inner", "_keep", "_wait", "_part", "_draft", "_filling", "version")

    def __init__(
        self, inner: _latzero.Block, keep: bool, wait: float, part: slice | None
    ) -> None:
        self._inner, self._keep, self._wait, self._part = inner, keep, wait, part
        self.version: int | None = None

    def __enter__(self) -> Any:
        self._draft = self._inner.draft(self._wait).wait()
        try:
            self._filling = Filling(self._inner, self._draft, self._keep, self._part)
            if self._keep and self._filling.is_copy:
                self._filling.read(self._inner)
        except BaseException:
            self._draft.abandon()
            raise
        return self._filling.array

    def __exit__(self, kind: Any, *raised: object) -> None:
        filling, draft = self._filling, self._draft
        bytes = filling.copy() if filling.is_copy and kind is None else None
        filling.close()
        if kind is not None:
            draft.abandon()
            return
        if bytes is not None:
            draft.write(filling.offset, bytes)
        self.version = draft.commit().wait()


class WriterWrite:
    """A version that is being written under a writer's lock; see `Write`."""

    __slots__ = ("_inner", "_writer", "_keep", "_part", "_version", "_filling", "version")

    def __init__(
        self, inner: _latzero.Block, writer: _latzero.Writer, keep: bool, part: slice | None
    ) -> None:
        self._inner, self._writer, self._keep, self._part = inner, writer, keep, part
        self.version: int | None = None

    def __enter__(self) -> Any:
        self._version = begin(self._writer)
        try:
            self._filling = Filling(self._inner, self._version, self._keep, self._part)
            if self._keep and self._filling.is_copy:
                self._filling.read(self._inner)
        except BaseException:
            self._abandon()
            raise
        return self._filling.array

    def _abandon(self) -> None:
        if self._version is not None:
            self._version.abandon()

    def __exit__(self, kind: Any, *raised: object) -> None:
        filling = self._filling
        bytes = filling.copy() if filling.is_copy and kind is None else None
        filling.close()
        if kind is not None:
            self._abandon()
        elif self._version is not None:
            self.version = self._version.publish()
        elif bytes is not None:
            self.version = self._writer.write(filling.offset, bytes).wait()


class Writer:
    """Writes many versions under one lock: `with block.writer() as w:`."""

    __slots__ = ("_inner", "_wait", "_writer")

    def __init__(self, inner: _latzero.Block, wait: float) -> None:
        self._inner, self._wait = inner, wait
        self._writer: _latzero.Writer | None = None

    def __enter__(self) -> Writer:
        self._writer = self._inner.writer(self._wait).wait()
        return self

    def write(self, *, keep: bool = True, part: slice | None = None) -> WriterWrite:
        """The next version; see `Block.write`."""
        if self._writer is None:
            raise RuntimeError("write inside of `with block.writer() as w:`")
        return WriterWrite(self._inner, self._writer, keep, part)

    def __exit__(self, *raised: object) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Lock:
    """A block's lock: `with block.lock():`."""

    __slots__ = ("_inner", "_arguments", "_lock")

    def __init__(
        self, inner: _latzero.Block, shared: bool, wait: float, lease: float | None
    ) -> None:
        self._inner, self._arguments = inner, (shared, wait, lease)
        self._lock: _latzero.Lock | None = None

    def __enter__(self) -> Lock:
        self._lock = self._inner.lock(*self._arguments).wait()
        return self

    @property
    def _held(self) -> _latzero.Lock:
        if self._lock is None:
            raise RuntimeError("the lock is held inside of `with block.lock():`")
        return self._lock

    @property
    def fence(self) -> int:
        """The lock's fence: larger than those of all earlier locks of this block."""
        return self._held.fence

    @property
    def is_held(self) -> bool:
        """Whether it is still held, as far as this process knows."""
        return self._lock is not None and self._lock.is_held

    def renew(self, lease: float | timedelta | None = None) -> None:
        """Renews its lease. A lock without a lease is held until the connection ends."""
        self._held.renew(_seconds(lease)).wait()

    def __exit__(self, kind: Any, *raised: object) -> None:
        held, self._lock = self._held, None
        if kind is None:
            held.unlock().wait()
        else:
            held.close()


class Block(BlockInfo):
    """A block that this app is attached to, returned by `App.block`. It is pickled as its name:
    unpickling opens it again, through an app of the process that unpickles it."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return _reopen, (self.id, self.pool, self._inner.app_id)

    def read(self, out: Any = None) -> Any:
        """A private copy of the newest version: an array, or a `memoryview` without numpy. `out`
        is filled instead of new memory."""
        return self._read(out)

    def read_at(self, offset: int, length: int) -> bytes:
        """Some bytes of the newest version."""
        return self._read_at(offset, length)

    def view(self) -> _latzero.View:
        """The newest version in place, read-only. `with block.view() as a:` raises `BlockError`
        (`contended`) on leaving if the version was overwritten in the meantime."""
        return self._inner.view().wait()

    def write(
        self, *, keep: bool = True, wait: float | timedelta = 1.0, part: slice | None = None
    ) -> Write:
        """The next version, under the block's lock: `with block.write() as a:`. With `keep` the
        array starts as a copy of the previous version; otherwise it has old bytes and all must be
        written. `part` selects rows. The array and its slices must not be used later."""
        return Write(self._inner, keep, _seconds(wait), part)

    def writer(self, *, wait: float | timedelta = 1.0) -> Writer:
        """Takes the lock for many versions: `with block.writer() as w:`, then `w.write()`."""
        return Writer(self._inner, _seconds(wait))

    def write_at(self, offset: int, data: bytes, *, if_version: int | None = None) -> int:
        """Writes bytes through the server; returns the version. With `if_version` the block must
        have that version."""
        return self._inner.write_at(offset, bytes(data), if_version).wait()

    def cas(self, offset: int, expected: bytes, data: bytes) -> bytes | None:
        """Writes `data` and returns `None` if the block has the bytes `expected` there; else
        returns the bytes that it has."""
        return self._inner.cas(offset, bytes(expected), bytes(data)).wait()

    def lock(
        self, *, shared: bool = False, wait: float | timedelta = 1.0,
        lease: float | timedelta | None = None,
    ) -> Lock:
        """The block's lock: `with block.lock():`."""
        return Lock(self._inner, shared, _seconds(wait), _seconds(lease))

    def wait(
        self, beyond: int | None = None, timeout: float | timedelta | None = None
    ) -> int:
        """Waits for a version newer than `beyond`, or than the present one; returns the version."""
        inner = self._inner
        beyond = inner.version if beyond is None else beyond
        if timeout is not None:
            return inner.wait_here(beyond, _seconds(timeout))
        while True:
            try:
                return inner.wait_here(beyond, _LONG)
            except Timeout:
                continue

    def changes(self) -> Listening[int]:
        """An iterator over new versions. If several appear between two reads, it returns the
        newest."""
        return Listening(self._inner.changes().wait(), _same)

    def resize(self, nbytes: int) -> None:
        """Changes the size of the block, which gets a new generation."""
        self._inner.resize(nbytes).wait()

    def flush(self) -> int:
        """Flushes a persistent block to disk; returns the version on disk."""
        return self._inner.flush().wait()

    def remove(self) -> None:
        """Removes the block, even if others are attached."""
        self._inner.remove().wait()

    def info(self) -> dict[str, Any]:
        """The full description of the block by the server."""
        return self._inner.info().wait()

    def __enter__(self) -> Block:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _reopen(id: str, pool: str, app_id: str) -> Block:
    """Opens a pickled block: through the app with the AppID of the one that it was opened with, as
    in a forked process, else through one in its pool."""
    from ._app import open_apps

    apps = open_apps()
    same = [app for app in apps if app.app_id == app_id]
    for app in same or [app for app in apps if pool in app.joined]:
        return app.block(id, pool=pool)
    raise RuntimeError(
        f"a block of pool '{pool}' was unpickled, but no latzero.App of this process is in that "
        "pool: connect first, for example in the initializer of a pool of processes"
    )


def writable(block: Any) -> Any:
    """Marks a block in the data of a call: its handler may write it."""
    return _latzero.Writable(block._inner)


def options(
    shape: Any, dtype: Any, size: int | None, create: bool | str, write: bool | None,
    pool: str | None, kind: str, consistency: str, slots: int, readable_by: Any,
    writable_by: Any, lifetime: str,
) -> dict[str, Any]:
    """The options with which the binding opens a block."""
    found = _arrays.layout_of(shape, dtype)
    if create not in (False, True, "new"):
        raise ValueError(f"create is False, True or 'new', not {create!r}")
    if found and size is not None and size != found[1]:
        raise ValueError(f"size is {size}, but the layout takes {found[1]} bytes")
    if create and not found and size is None:
        raise TypeError("a new block takes `shape` and `dtype`, or `size`")
    if size is None:
        size = found[1] if found else 0
    return {
        "layout": found and found[0], "size": size, "write": write, "pool": pool, "kind": kind,
        "create": {False: None, True: "attach", "new": "new"}[create],
        "consistency": consistency, "slots": slots, "lifetime": lifetime,
        "readable_by": None if readable_by is None else list(readable_by),
        "writable_by": None if writable_by is None else list(writable_by),
    }
