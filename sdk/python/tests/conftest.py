"""Fixtures shared by all tests."""

import signal

import latzero
import pytest

# A shell starts its background jobs with SIGINT ignored, which the processes of the tests would
# inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def pair(latzero_server, request):
    """A handler's app and a caller's app, in a separate pool."""
    pool = "".join(c if c.isalnum() else "-" for c in request.node.name)[:60]
    with (
        latzero.connect(latzero_server.url(f"serves-{pool}", pool)) as serves,
        latzero.connect(latzero_server.url(f"calls-{pool}", pool)) as calls,
    ):
        yield serves, calls
