"""The pytest plugin: `latzero_server`, one per session, and `latzero_app` and `latzero_aio_app`,
connected to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from . import App, connect, testing

if TYPE_CHECKING:
    from . import aio


@pytest.fixture(scope="session")
def latzero_server() -> Iterator[testing.Server]:
    with testing.server() as server:
        yield server


@pytest.fixture
def latzero_app(latzero_server: testing.Server) -> Iterator[App]:
    with connect(latzero_server.url("pytest"), transient=True) as app:
        yield app


@pytest.fixture
def latzero_aio_app(latzero_server: testing.Server) -> aio.Connecting:
    """Connects on the test's own event loop, whatever runs it: `async with latzero_aio_app as app`,
    or `app = await latzero_aio_app`."""
    from . import aio

    return aio.connect(latzero_server.url("pytest-aio"), transient=True)
