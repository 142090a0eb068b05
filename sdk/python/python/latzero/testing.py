"""A private server for tests: `with latzero.testing.server() as server: ...`"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from urllib.parse import quote

from ._program import find_program

__all__ = ["Server", "find_program", "server"]


# What a server prints when it is ready: its pin if it speaks TLS, its address and its socket.
_READY = re.compile(r"latzero ready .*?(?: pin (\S+))? (?:tcp|tls)://(\S+) unix:(\S+)")


def _environment() -> dict[str, str]:
    """The environment without settings of servers, such as the socket of another one."""
    return {
        name: value for name, value in os.environ.items()
        if name == "LATZERO_BIN" or not name.startswith("LATZERO_")
    }


class Server:
    """A running server with its own data directory and port."""

    address: str
    """Its TCP address: host and port."""
    socket: str
    """The path of its Unix socket."""
    pin: str | None
    """The pin of its certificate, if it was started with `--tls`."""
    data_dir: str
    """Its data directory, which is removed with it."""

    def __init__(self, *args: str) -> None:
        self._args = args
        self.data_dir = tempfile.mkdtemp(prefix="latzero-")
        try:
            self._start()
        except BaseException:
            shutil.rmtree(self.data_dir, ignore_errors=True)
            raise

    def _start(self) -> None:
        self._child = subprocess.Popen(
            [find_program(), "start", "--port", "0", "--log-level", "warn", "--data-dir",
             self.data_dir, *self._args],
            env=_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        )
        assert self._child.stdout is not None
        for line in self._child.stdout:
            found = _READY.match(line)
            if found:
                self.pin, self.address, self.socket = found.groups()
                return
        raise RuntimeError(f"the server did not start (status {self._child.wait()})")

    def url(self, app_id: str, pool: str = "default") -> str:
        """The address for the app `app_id`."""
        return f"latzero://{app_id}?socket={quote(self.socket)}&pool={pool}"

    def kill(self) -> None:
        """Kills the server, as a crash does."""
        self._child.kill()
        self._child.wait()
        assert self._child.stdout is not None
        self._child.stdout.close()

    def restart(self) -> None:
        """Kills the server and starts it again, with the same data."""
        self.kill()
        self._start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *raised: object) -> None:
        self.kill()
        shutil.rmtree(self.data_dir, ignore_errors=True)

    def __repr__(self) -> str:
        return f"<latzero.testing.Server pid {self._child.pid} at {self.socket}>"


def server(*args: str) -> Server:
    """Starts a server; `args` are further arguments of `latzero start`."""
    return Server(*args)
