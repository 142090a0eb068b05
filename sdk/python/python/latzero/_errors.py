"""The exceptions: one class per family of error codes."""

from __future__ import annotations

from ._lean import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "LatZeroError", "Unavailable", "Timeout", "Cancelled", "Disconnected", "HandlerFailed",
    "Forbidden", "BadRequest", "BlockError", "ServerFailed", "CryptoFailed", "Failure",
]

_TRACEBACK_BYTES_MAX = 16 * 1024


class LatZeroError(Exception):
    """An error. `code` is one of the codes in docs/errors.md, or one that a handler chose."""

    code: str
    message: str
    ran: str | None
    data: Any
    hint: str | None

    def __init__(
        self, code: str, message: str, ran: str | None = None, data: Any = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(code, message, ran, data, hint)
        self.code, self.message, self.ran, self.data, self.hint = code, message, ran, data, hint

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"

    @property
    def retryable(self) -> bool:
        """Whether the call certainly did not run and may succeed later."""
        return self.ran == "no" and isinstance(self, Unavailable)


class Unavailable(LatZeroError):
    """Nobody can take the call now."""


class Timeout(LatZeroError, TimeoutError):
    """The time ended before the answer came."""


class Cancelled(LatZeroError):
    """The call was cancelled."""


class Disconnected(LatZeroError, ConnectionError):
    """The connection, or the handler's, ended."""


class HandlerFailed(LatZeroError):
    """The handler raised, or answered with a code of its own."""

    def __init__(
        self, code: str, message: str, ran: str | None = None, data: Any = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(code, message, ran, data, hint)
        if self.remote_traceback:
            self.add_note("The handler's traceback:\n" + self.remote_traceback.rstrip())

    def _of_exception(self, key: str) -> str | None:
        value = self.data.get(key) if isinstance(self.data, dict) else None
        return value if isinstance(value, str) else None

    @property
    def type(self) -> str | None:
        """The class of the exception that the handler raised."""
        return self._of_exception("type")

    @property
    def remote_traceback(self) -> str | None:
        """The handler's traceback, as text."""
        return self._of_exception("traceback")


class Forbidden(LatZeroError, PermissionError):
    """The server does not allow it."""


class BadRequest(LatZeroError, ValueError):
    """The request is wrong as it is."""


class BlockError(LatZeroError):
    """Something about a block."""


class ServerFailed(LatZeroError):
    """The server can't do it: a quota, its disk, or a bug."""


class CryptoFailed(LatZeroError):
    """Keys or sealed data are wrong."""


class Failure(Exception):
    """Raised by a handler to answer with a code of its own."""

    code: str
    message: str
    data: Any

    def __init__(self, code: str, message: str = "", *, data: Any = None) -> None:
        super().__init__(code, message)
        self.code, self.message, self.data = code, message, data

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def describe(error: BaseException, tracebacks: bool) -> tuple[str, str, Any]:
    """Code, message and data of the answer of a handler that raised `error`."""
    if isinstance(error, Failure):
        return error.code, error.message, error.data
    data = {"type": _sendable(type(error).__qualname__), "message": _sendable(str(error))}
    if tracebacks:
        import traceback

        text = _sendable("".join(traceback.format_exception(error))).encode()
        data["traceback"] = text[-_TRACEBACK_BYTES_MAX:].decode(errors="ignore")
    return "handler_error", f"{data['type']}: {data['message']}", data


def _sendable(text: str) -> str:
    """`text` with its surrogates replaced, because UTF-8 can't encode them."""
    return text.encode(errors="replace").decode()
