"""LatZero: programs on one machine call each other's functions and send each other events.

    with latzero.connect("latzero://me?pool=alpha") as app:
        print(app.call("double", 21))
"""

from ._app import App, Event, Progress, Reply, connect, request
from ._errors import (
    BadRequest, BlockError, Cancelled, CryptoFailed, Disconnected, Failure, Forbidden,
    HandlerFailed, LatZeroError, ServerFailed, Timeout, Unavailable,
)
from ._latzero import Request, Stream, __version__

__all__ = [
    "App", "BadRequest", "BlockError", "Cancelled", "CryptoFailed", "Disconnected", "Event",
    "Failure", "Forbidden", "HandlerFailed", "LatZeroError", "Progress", "Reply", "Request",
    "ServerFailed", "Stream", "Timeout", "Unavailable", "__version__", "connect", "request",
]
