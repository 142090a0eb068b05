"""LatZero: programs on one machine call each other's functions and send each other events.

    with latzero.connect("latzero://me?pool=alpha") as app:
        print(app.call("double", 21))
"""

from typing import Any

from ._app import (
    Answer, App, Event, Parked, Pending, Presence, Progress, Reply, Stream, connect, request,
)
from ._block import Block, writable
from ._errors import (
    BadRequest, BlockError, Cancelled, CryptoFailed, Disconnected, Failure, Forbidden,
    HandlerFailed, LatZeroError, ServerFailed, Timeout, Unavailable,
)
from ._latzero import Request, View, __version__

__all__ = [
    "Answer", "App", "BadRequest", "Block", "BlockError", "Cancelled", "CryptoFailed",
    "Disconnected", "Event", "Failure", "Forbidden", "HandlerFailed", "LatZeroError", "Parked",
    "Pending", "Presence", "Progress", "Reply", "Request", "ServerFailed", "Stream", "Timeout",
    "Unavailable", "View", "__version__", "aio", "connect", "request", "writable",
]


def __getattr__(name: str) -> Any:
    # asyncio takes longer to import than all else here.
    if name == "aio":
        import importlib

        return importlib.import_module(".aio", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
