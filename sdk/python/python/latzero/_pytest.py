"""The pytest plugin: `latzero_server`, one per session, and `latzero_app`, connected to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import App, connect, testing


@pytest.fixture(scope="session")
def latzero_server() -> Iterator[testing.Server]:
    with testing.server() as server:
        yield server


@pytest.fixture
def latzero_app(latzero_server: testing.Server) -> Iterator[App]:
    with connect(latzero_server.url("pytest"), transient=True) as app:
        yield app
