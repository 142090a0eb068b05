"""LatZero: programs on one machine call each other's functions and send each other events.

    with latzero.connect("latzero://me?pool=alpha") as app:
        print(app.call("double", 21))
"""

from __future__ import annotations

from . import _latzero
from ._app import (
    Answer, App, Event, Parked, Pending, Presence, Progress, Reply, Stream, connect, request,
)
from ._block import Block, Listening, writable
from ._errors import (
    BadRequest, BlockError, Cancelled, CryptoFailed, Disconnected, Failure, Forbidden,
    HandlerFailed, LatZeroError, ServerFailed, Timeout, Unavailable,
)
from ._latzero import Request, View
from ._lean import TYPE_CHECKING
from ._program import find_program

if TYPE_CHECKING:
    from typing import Any

    from . import aio as aio

__all__ = [
    "Answer", "App", "BadRequest", "Block", "BlockError", "Cancelled", "CryptoFailed",
    "Disconnected", "Event", "Failure", "Forbidden", "HandlerFailed", "LatZeroError", "Listening",
    "Parked", "Pending", "Presence", "Progress", "Reply", "Request", "ServerFailed", "Stream",
    "Timeout", "Unavailable", "View", "__version__", "aio", "connect", "find_program", "request",
    "writable",
]

__version__ = "0.1.0"

if _latzero.__version__ != __version__:
    raise ImportError(
        f"latzero {__version__} was installed over another version: its binding "
        f"{_latzero.__file__} has version {_latzero.__version__}. Install the package again."
    )

_latzero.check_interpreter()


def __getattr__(name: str) -> Any:
    # asyncio takes longer to import than all else here.
    if name == "aio":
        import importlib

        return importlib.import_module(".aio", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
