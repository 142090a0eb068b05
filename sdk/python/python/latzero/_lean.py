"""What the modules that `import latzero` loads use of `typing`, which takes longer to import than
all of them together."""

from __future__ import annotations

# Checkers of types take this name to be true.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Generic as Generic, TypedDict, TypeVar, overload as overload

    F = TypeVar("F", bound=Callable[..., Any])
    T = TypeVar("T")

    # An app, or one instance of it: its AppID and its id, as in `Request.origin`.
    Destination = str | tuple[str, str] | None

    class ServeOptions(TypedDict, total=False):
        """The options of `App.serve`."""

        pools: list[str] | None
        strategy: str
        concurrency: int | None
        doc: str | None
        schema: dict[str, Any] | bool
        privileged: bool

    class AioServeOptions(ServeOptions, total=False):
        """Those of asyncio."""

        inline: bool
else:
    F = T = None

    def overload(function):
        """Says nothing at run time."""
        return function

    class Generic:
        """A class that can be subscripted, as `Stream[int]` in a hint."""

        __slots__ = ()
        __class_getitem__ = classmethod(type(list[int]))
