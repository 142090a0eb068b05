"""The blocking interface against a real server."""

import dataclasses
import datetime
import enum
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import typing
import uuid

import latzero
import latzero.testing
import pytest
from latzero import _latzero


@pytest.mark.parametrize("value", [
    None, True, False, 0, -1, 2**63, 2**64 - 1, -(2**63), 0.1, 1e300, 5e-324, "", "ä\n\"\\\x01",
    [], {}, [1, [2, {"a": None}]], {"a": {"b": [1.5, "x"]}},
], ids=repr)
def test_json_round_trips_unchanged(latzero_server, value):
    with latzero.connect(latzero_server.url("json", "system"), transient=True) as app:
        back = app.call("echo", value)
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize("value, place", [
    ({"values": [1, 2, 3, float("nan")]}, "data.values[3]"),
    (2**64, "data:"), (-(2**63) - 1, "data:"), ([float("inf")], "data[0]"),
    ({"a": b"x"}, "send them whole"), ({1: 2}, "keys are str"), (object(), "object"),
], ids=repr)
def test_what_is_not_json_is_refused_before_it_is_sent(latzero_app, value, place):
    with pytest.raises(latzero.BadRequest) as raised:
        latzero_app.call("nobody", value)
    assert place in raised.value.message and raised.value.ran == "no"
    assert isinstance(raised.value, ValueError)


def nested(levels):
    data = []
    for _ in range(levels - 1):
        data = [data]
    return data


class Endless(enum.Enum):
    SELF = 1


Endless.SELF._value_ = Endless.SELF


def test_an_object_that_is_converted_to_itself_is_refused(latzero_app):
    with pytest.raises(latzero.BadRequest, match=r"data\.a: '.*Endless' can't be written as JSON"):
        latzero_app.call("nobody", a=Endless.SELF)


class Changes:
    """An iterator that changes a dict as it is written."""

    def __init__(self, change):
        self.change = change

    def __iter__(self):
        return self

    def __next__(self):
        self.change()
        raise StopIteration


@pytest.mark.parametrize("change", [
    lambda data: data.update(more=1), lambda data: data.pop("b"),
    lambda data: data.update(more=data.pop("a")),
], ids=["grows", "shrinks", "has another key"])
def test_a_dict_that_changes_while_it_is_written_is_refused(pair, change):
    serves, calls = pair

    def changing():
        data = {"a": Changes(lambda: change(data)), "b": 1}
        return data

    with pytest.raises(latzero.BadRequest, match="data: the dict changed while it was written"):
        calls.call("nobody", changing())
    serves.serve("changing", changing)
    for _ in range(2):
        with pytest.raises(latzero.HandlerFailed, match="the dict changed"):
            calls.call("changing")


def test_data_nests_as_deep_as_a_message_has_room_for(latzero_server):
    with latzero.connect(latzero_server.url("deep", "system"), transient=True) as app:
        assert app.call("echo", nested(128)) == nested(128)
        endless = {}
        endless["again"] = endless
        for data in (nested(129), nested(500), endless):
            with pytest.raises(latzero.BadRequest, match="deeper than 128 levels") as raised:
                app.call("echo", data)
            assert raised.value.ran == "no"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_travel_raw(pair, kind):
    serves, calls = pair
    serves.serve("back", lambda data, /: data[::-1])
    assert calls.call("back", kind(b"\x00\xff1")) == b"1\xff\x00"
    assert calls.reply("back", kind(b"ab")).bytes == b"ba"


def test_handlers_get_fields_by_name(pair):
    serves, calls = pair

    @serves.serve
    def area(width: int, height: int = 2) -> int:
        """Width by height."""
        return width * height

    assert calls.call("area", width=3) == 6
    assert calls.call("area", {"width": 3, "height": 5}) == 15
    for fields in ({}, {"width": 1, "depth": 2}):
        with pytest.raises(latzero.BadRequest):
            calls.call("area", fields)
    with pytest.raises(TypeError):
        calls.call("area", {"width": 1}, width=2)


def test_a_handler_sees_its_request(pair):
    serves, calls = pair

    @serves.serve("who")
    def who(request: latzero.Request):
        assert latzero.request() is request
        return [request.name, request.origin[0], request.headers, request.key, request.attempt]

    got = calls.call("who", headers={"a": "b"}, key="k")
    assert got == ["who", calls.app_id, {"a": "b"}, "k", 1]


def test_an_exception_of_a_handler_reaches_the_caller(pair):
    serves, calls = pair

    @serves.serve
    def divide(a: float, b: float):
        if a == 0:
            raise latzero.Failure("zero", "nothing to divide", data={"a": a})
        return a / b

    with pytest.raises(latzero.HandlerFailed) as raised:
        calls.call("divide", a=1, b=0)
    error = raised.value
    assert (error.code, error.type) == ("handler_error", "ZeroDivisionError")
    assert "in divide" in error.remote_traceback
    assert error.remote_traceback[:9] in error.__notes__[0]
    with pytest.raises(latzero.HandlerFailed) as raised:
        calls.call("divide", a=0, b=1)
    assert (raised.value.code, raised.value.data) == ("zero", {"a": 0})


def test_an_answer_that_cannot_be_sent_is_a_failure_of_the_handler(pair):
    serves, calls = pair
    serves.serve("answers", lambda: {"v": [float("nan")]})

    @serves.serve
    def streams():
        yield 1
        yield object()

    @serves.serve
    async def waits():
        return 2**64

    for call, why in (
        (lambda: calls.call("answers"), r"data\.v\[0\]: NaN"),
        (lambda: list(calls.stream("streams")), "data: 'object' can't be written as JSON"),
        (lambda: calls.call("waits"), "data: integers reach"),
    ):
        match = f"the answer can't be sent: {why}"
        with pytest.raises(latzero.HandlerFailed, match=match) as raised:
            call()
        assert (raised.value.code, raised.value.type) == ("handler_error", "ValueError")


def test_the_error_of_a_handlers_own_call_is_an_exception_like_any_other(pair):
    serves, calls = pair
    serves.serve("late", lambda: serves.call("nothing"))
    with pytest.raises(latzero.HandlerFailed) as raised:
        calls.call("late")
    assert raised.value.type == "Unavailable" and "in call" in raised.value.remote_traceback

    @serves.serve
    def passes_on():
        try:
            serves.call("nothing")
        except latzero.LatZeroError as error:
            raise latzero.Failure(error.code, error.message) from error

    with pytest.raises(latzero.Unavailable):
        calls.call("passes_on")


@pytest.mark.parametrize("is_async", [False, True])
def test_a_handler_closes_its_app_and_answers(pair, is_async):
    serves, calls = pair

    def stop():
        serves.close()
        return "bye"

    async def stop_on_loop():
        return stop()

    serves.serve("stop", stop_on_loop if is_async else stop)
    assert calls.call("stop", timeout=20) == "bye"
    serves.wait()
    for thread in threading.enumerate():
        if thread.name == "latzero-close":
            thread.join()
    assert not serves.is_connected


@pytest.mark.parametrize("use", [
    lambda app, name: app.call(name), lambda app, name: app.emit(name),
    lambda app, name: app.submit(name), lambda app, name: app.park(name),
    lambda app, name: app.stream(name), lambda app, name: app.serve(name, lambda: None),
    lambda app, name: app.on(name, print), lambda app, name: app.join(name),
    lambda app, name: app.block(name), lambda app, name: app.watch(name),
])
def test_a_name_with_lone_surrogates_is_a_bad_request(pair, use):
    with pytest.raises(latzero.BadRequest, match="lone surrogates"):
        use(pair[0], "\ud800")


def test_errors_have_their_families(pair):
    _, calls = pair
    with pytest.raises(latzero.Unavailable) as raised:
        calls.call("nobody")
    error = raised.value
    assert (error.code, error.ran, error.retryable) == ("no_handler", "no", True)
    assert error.hint and str(error).startswith("no_handler: ")
    for _, family in _latzero.families():
        assert issubclass(getattr(latzero, family), latzero.LatZeroError)


def test_a_call_times_out(pair):
    serves, calls = pair
    release = threading.Event()
    serves.serve("slow", lambda: release.wait(30))
    with pytest.raises(latzero.Timeout) as raised:
        calls.call("slow", timeout=0.05)
    release.set()
    assert isinstance(raised.value, TimeoutError)


def test_streams(pair):
    serves, calls = pair

    @serves.serve
    def count(n: int):
        for i in range(n):
            yield i
        yield latzero.Progress(1.0)
        return "done"

    stream = calls.stream("count", n=300, window=4)
    assert list(stream) == list(range(300))
    assert stream.end == "done"


def test_leaving_a_stream_closes_its_generator(pair):
    serves, calls = pair
    closed = threading.Event()

    @serves.serve
    def forever():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    with calls.stream("forever", window=2) as stream:
        assert next(stream) == 1
    assert closed.wait(10)


def test_emits_reach_listeners(pair):
    listens, emits = pair
    events = listens.events("done")
    assert emits.emit("done", n=1, count=True) == 1
    event = next(events)
    assert (event.name, event.data, event.origin[0]) == ("done", {"n": 1}, emits.app_id)
    seen = []
    both = threading.Barrier(2)

    @listens.on("told")
    def told(event):
        seen.append(event.data)
        both.wait(10)

    emits.emit("told", 5)
    both.wait(10)
    assert seen == [5]


def test_a_handler_knows_calls_from_emits(pair):
    serves, calls = pair
    told = queue.SimpleQueue()

    @serves.serve
    def kind(request: latzero.Request):
        told.put(request.is_emit)
        return request.is_emit

    pending = calls.submit("kind")
    assert repr(pending).startswith("<latzero.Pending ")
    assert pending.result(10) is False
    assert repr(pending) == "<latzero.Pending done>"
    calls.emit("kind")
    assert (told.get(timeout=10), told.get(timeout=10)) == (False, True)


def test_other_threads_run_while_one_waits(pair):
    serves, calls = pair
    inside, release = threading.Event(), threading.Event()

    @serves.serve
    def hold():
        inside.set()
        return release.wait(10)

    got = []
    caller = threading.Thread(target=lambda: got.append(calls.call("hold")))
    caller.start()
    assert inside.wait(10)
    release.set()
    caller.join(10)
    assert got == [True]


def test_ctrl_c_ends_a_waiting_call(pair):
    serves, calls = pair
    inside, release = threading.Event(), threading.Event()

    @serves.serve
    def hold(request: latzero.Request):
        inside.set()
        release.wait(20)

    def interrupt():
        inside.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        calls.call("hold", timeout=20)
    assert time.monotonic() - began < 10
    release.set()
    # The connection still works.
    assert calls.ping() >= 0


def test_the_app_reconnects(latzero_server):
    with latzero.testing.server() as server, latzero.connect(server.url("again")) as app:
        app.serve("f", lambda: 1)
        told = queue.Queue()
        app.on_state(told.put)
        server.restart()
        # Before it has noticed the loss, a call fails.
        assert [told.get(timeout=30) for _ in range(2)] == ["disconnected", "connected"]
        assert app.call("f", to="again", timeout=10) == 1


def test_states_are_told(latzero_server):
    with latzero.testing.server() as server:
        app = latzero.connect(server.url("states"))
        told = queue.Queue()
        assert app.on_state(told.put) == told.put
        server.restart()
        assert [told.get(timeout=30) for _ in range(2)] == ["disconnected", "connected"]
        app.close()
        assert told.get(timeout=30) == "closed"


def test_an_app_that_was_displaced_says_so_and_its_wait_raises(latzero_server):
    url = latzero_server.url("displaced")
    first = latzero.connect(url)
    told = queue.Queue()

    @first.on_state
    def tell(state):
        told.put(state)

    with latzero.connect(url, takeover=True):
        assert told.get(timeout=30) == "displaced"
        with pytest.raises(latzero.Forbidden) as raised:
            first.wait()
    assert raised.value.code == "app_in_use"
    first.close()
    first.wait()


def test_an_app_that_does_not_reconnect_ends_its_wait():
    with latzero.testing.server() as server:
        app = latzero.connect(server.url("once"), reconnect=False)
        told = queue.Queue()
        app.on_state(told.put)
        server.kill()
        with pytest.raises(latzero.Disconnected):
            app.wait()
        assert [told.get(timeout=30) for _ in range(2)] == ["disconnected", "closed"]


def test_an_app_counts_what_it_lost(pair):
    listens, emits = pair
    assert listens.lost == 0
    events = listens.events("news")
    for n in range(1030):
        emits.emit("news", n)
    # The server passes this on after the emits.
    listens.serve("last", lambda: None)
    emits.call("last")
    assert listens.lost == 6
    assert next(events).data == 0


def test_a_script_ends_with_an_open_app(latzero_server):
    script = (
        "import latzero, sys\n"
        "app = latzero.connect(sys.argv[1])\n"
        "app.serve('f', lambda: 1)\n"
        "app.on('e', print)\n"
        "assert 'numpy' not in sys.modules and 'asyncio' not in sys.modules\n"
        "print(repr(app))\n"
    )
    url = latzero_server.url("script")
    run = subprocess.run([sys.executable, "-c", script, url], timeout=30, capture_output=True)
    assert (run.returncode, run.stderr) == (0, b"")
    assert run.stdout == b"<latzero.App 'script' in default, connected>\n"


def test_many_calls_in_flight(pair):
    serves, calls = pair
    serves.serve("double", lambda n: n * 2)
    pending = [calls.submit("double", n=n) for n in range(100)]
    assert [call.result(10) for call in pending] == [n * 2 for n in range(100)]
    assert pending[0].done() and pending[0].result() == 0


def test_a_pending_call_is_cancelled(pair):
    serves, calls = pair
    inside, release = threading.Event(), threading.Event()
    requests = []

    @serves.serve
    def hold(request: latzero.Request):
        requests.append(request)
        inside.set()
        release.wait(10)

    call = calls.submit("hold")
    assert inside.wait(10) and not call.done()
    with pytest.raises(TimeoutError):
        call.result(0.01)
    call.cancel()
    with pytest.raises(latzero.Cancelled):
        call.result()
    # The handler's connection gets the notice before the reply to a later request.
    calls.ping(), serves.ping()
    assert requests[0].cancelled
    release.set()


def test_parked_calls(pair):
    serves, calls = pair
    parked = calls.park("bill", order=17, id="order-17", timeout=60)
    assert parked.id == "order-17"
    serves.serve("bill", lambda order: order + 1)
    assert parked.answer() == 18
    # Nobody waits for this answer.
    calls.park("bill", order=1, id="order-1", timeout=60)
    answer = next(calls.answers())
    assert (answer.id, answer.result(), answer.lost) == ("order-1", 2, 0)


def test_a_call_goes_to_one_instance(latzero_server):
    url = latzero_server.url("twice")
    with latzero.connect(url) as one, latzero.connect(url) as other:

        def which(request: latzero.Request):
            return request.app.instance

        for app in (one, other):
            app.serve("which", which)
        for app in (one, other, one):
            assert other.call("which", to=(app.app_id, app.instance)) == app.instance
        with pytest.raises(ValueError, match="no id of an instance"):
            one.call("which", to=("twice", "nobody"))


def test_presence_is_watched(latzero_server, pair):
    _, calls = pair
    [pool] = calls.joined
    watch = calls.watch(pool)
    with latzero.connect(latzero_server.url("comes", pool)):
        event = next(watch)
    assert (event.event, event.app_id, event.pool) == ("app_online", "comes", pool)


@pytest.mark.parametrize("is_stream", [False, True])
def test_async_handlers_of_a_blocking_app(pair, is_stream):
    serves, calls = pair
    if is_stream:
        @serves.serve("f")
        async def f(n: int):
            for i in range(n):
                yield i
        assert list(calls.stream("f", n=3)) == [0, 1, 2]
    else:
        import asyncio

        both = asyncio.Barrier(2)

        @serves.serve("f")
        async def f(n: int):
            await both.wait()
            assert latzero.request().name == "f"
            return n
        pending = [calls.submit("f", n=n) for n in (1, 2)]
        assert [call.result(10) for call in pending] == [1, 2]


def test_a_task_that_a_handler_left_ends_with_the_app(latzero_server):
    import asyncio

    ended = threading.Event()

    async def stays():
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with latzero.connect(latzero_server.url("leaves-tasks"), transient=True) as app:
        @app.serve
        async def leaves():
            app.task = asyncio.ensure_future(stays())
            await asyncio.sleep(0)

        app.call("leaves")
    assert ended.is_set()
    assert "latzero-leaves-tasks" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_a_task_that_exits_does_not_end_the_loop(latzero_server, monkeypatch, error):
    import asyncio

    seen = queue.Queue()
    monkeypatch.setattr(threading, "excepthook", lambda given: seen.put(given.exc_value))

    async def exits():
        raise error

    with latzero.connect(latzero_server.url("exits-in-task"), transient=True) as app:
        @app.serve
        async def leaves():
            app.task = asyncio.ensure_future(exits())

        app.call("leaves")
        assert seen.get(timeout=20) is error
        app.call("leaves", timeout=20)
        assert seen.get(timeout=20) is error


@dataclasses.dataclass
class Item:
    name: str
    count: int = 1
    tags: list[str] = dataclasses.field(default_factory=list)


class Color(enum.Enum):
    RED = "red"


class Order(typing.TypedDict):
    item: Item
    color: typing.NotRequired[Color]


def test_hints_decode_arguments_and_answers(pair):
    serves, calls = pair

    @serves.serve
    def take(item: Item, at: datetime.datetime, id: uuid.UUID | None = None) -> Item:
        assert isinstance(item, Item) and isinstance(at, datetime.datetime)
        return dataclasses.replace(item, count=item.count + (id is not None))

    @serves.serve
    def whole(order: Order, /):
        assert isinstance(order["item"], Item) and order["color"] is Color.RED
        return order

    at = datetime.datetime(2026, 1, 2)
    got = calls.call("take", item=Item("a"), at=at, id=uuid.uuid4(), into=Item)
    assert got == Item("a", 2)
    back = calls.call("whole", {"item": Item("b"), "color": Color.RED}, into=Order)
    assert back == {"item": Item("b"), "color": Color.RED}
    with pytest.raises(latzero.BadRequest, match="the answer is dict, not list"):
        calls.call("whole", {"item": Item("b"), "color": "red"}, into=list[Item])
    for wrong, place in [
        ({"name": 1}, "item.name is int, not str"), ({}, "misses the field 'name'"),
        ({"name": "a", "size": 1}, "'size'"), ({"name": "a", "tags": [1]}, r"tags\[0\]"),
        ({"name": "a", "count": True}, "item.count is bool"), (5, "item is int, not Item"),
    ]:
        with pytest.raises(latzero.BadRequest, match=place):
            calls.call("take", item=wrong, at=at)
    with pytest.raises(latzero.BadRequest, match="no datetime"):
        calls.call("take", item=Item("a"), at="yesterday")


@pytest.mark.parametrize("hint, value, expected", [
    (float, 1, 1.0), (int | None, None, None), (tuple[int, str], [1, "a"], (1, "a")),
    (tuple[int, ...], [1, 2], (1, 2)), (set[int], [1, 1], {1}),
    (dict[str, float], {"a": 1}, {"a": 1.0}),
    (typing.Literal["a", 1], 1, 1), (bytes, b"x", b"x"), (typing.Any, [1], [1]),
    (list, [1, "a"], [1, "a"]), (datetime.date, "2026-01-02", datetime.date(2026, 1, 2)),
], ids=repr)
def test_types_that_hints_may_name(hint, value, expected):
    from latzero._decode import decoder

    got = decoder(hint)(value, "x")
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize("hint, value", [
    (int, 1.0), (int, True), (str, 1), (bool, 1), (float, "1"), (int | str, None),
    (typing.Literal["a", 1], True), (tuple[int, int], [1]), (Color, "blue"), (uuid.UUID, 5),
], ids=repr)
def test_types_are_checked_and_not_coerced(hint, value):
    from latzero._decode import Mismatch, decoder

    with pytest.raises(Mismatch, match="^x is"):
        decoder(hint)(value, "x")


def schema_of(app, name):
    return app.trigger(app.joined[0], name).get("schema")


def test_hints_become_the_schema_of_a_trigger(pair):
    serves, calls = pair

    @serves.serve
    def take(item: Item, n: int, request: latzero.Request, at: float | None = None, note="-"):
        return None

    tags = {"type": "array", "items": {"type": "string"}}
    fields = {"name": {"type": "string"}, "count": {"type": "integer"}, "tags": tags}
    item = {
        "type": "object", "properties": fields, "required": ["name"],
        "additionalProperties": False,
    }
    assert schema_of(calls, "take") == {
        "type": "object",
        "properties": {
            "item": item, "n": {"type": "integer"},
            "at": {"type": ["number", "null"], "default": None}, "note": {"default": "-"},
        },
        "required": ["item", "n"],
        "additionalProperties": False,
    }

    @serves.serve
    def some(a: int, **rest):
        return None

    @serves.serve
    def whole(order: Order, /):
        return None

    @serves.serve
    def anything(data, /):
        return None

    assert "additionalProperties" not in schema_of(calls, "some")
    assert schema_of(calls, "whole") == {
        "type": "object", "properties": {"item": item, "color": {"enum": ["red"]}},
        "required": ["item"], "additionalProperties": False,
    }
    assert schema_of(calls, "anything") is None


def test_a_schema_may_be_given_or_left_out(pair):
    serves, calls = pair

    def double(n: int):
        return n * 2

    serves.serve("given", double, schema={"title": "n"})
    serves.serve("none", double, schema=False)
    assert schema_of(calls, "given") == {"title": "n"}
    assert schema_of(calls, "none") is None
    with pytest.raises(latzero.LatZeroError, match="trigger_schema_bytes_max"):
        serves.serve("large", double, schema={"title": "n" * 5000})

    # One that is derived is no reason to refuse a handler.
    def long(a: typing.Literal["a" * 5000]):
        return 1

    serves.serve("long", long)
    assert schema_of(calls, "long") is None
    assert calls.call("long", a="a" * 5000) == 1


@dataclasses.dataclass
class Tree:
    parts: "list[Tree]"


@pytest.mark.parametrize("hint, schema", [
    (None, {"type": "null"}), (bool, {"type": "boolean"}), (bytes, {}), (typing.Any, {}),
    (list, {"type": "array"}), (set[int], {"type": "array", "items": {"type": "integer"}}),
    (dict, {"type": "object"}),
    (dict[str, str], {"type": "object", "additionalProperties": {"type": "string"}}),
    (tuple[int, str], {
        "type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}],
        "minItems": 2, "maxItems": 2,
    }),
    (int | list[int], {
        "anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}],
    }),
    (int | typing.Any, {}), (typing.Literal["a", 1], {"enum": ["a", 1]}),
    (typing.Literal[Color.RED], {}), (uuid.UUID, {"type": "string", "format": "uuid"}),
    (datetime.date, {"type": "string"}),
    (Tree, {
        "type": "object", "properties": {"parts": {"type": "array"}}, "required": ["parts"],
        "additionalProperties": False,
    }),
], ids=repr)
def test_the_schema_of_a_hint(hint, schema):
    from latzero._decode import kind

    assert kind(hint).schema == schema


def test_models_of_other_libraries_are_data(pair):
    pydantic, msgspec = pytest.importorskip("pydantic"), pytest.importorskip("msgspec")

    class Model(pydantic.BaseModel):
        name: str
        at: datetime.date

    class Struct(msgspec.Struct):
        id: int
        tags: list[str] = []

    serves, calls = pair

    @serves.serve
    def take(model: Model, struct: Struct) -> Model:
        assert isinstance(struct, Struct) and struct.id == 7
        return model.model_copy(update={"name": model.name + "!"})

    model = Model(name="a", at=datetime.date(2026, 1, 2))
    got = calls.call("take", model=model, struct=Struct(7, ["x"]), into=Model)
    assert got == Model(name="a!", at=datetime.date(2026, 1, 2))
    with pytest.raises(latzero.BadRequest, match="model"):
        calls.call("take", model={"name": 1}, struct=Struct(7))
    with pytest.raises(latzero.BadRequest, match="struct"):
        calls.call("take", model=model, struct={"id": "seven"})


def test_models_are_sent_as_the_text_that_they_write(latzero_server):
    pydantic = pytest.importorskip("pydantic")

    class Model(pydantic.BaseModel):
        text: str = "a\"\\\u00e4\n" + "9" * 40
        number: typing.Any = 1.5
        inner: typing.Any = None

        @pydantic.field_serializer("inner", when_used="json")
        def inner_text(self, value):
            return value

    class Constants(Model):
        model_config = pydantic.ConfigDict(ser_json_inf_nan="constants")

    class Many(pydantic.RootModel[list[int]]):
        pass

    url = latzero_server.url("models", "system")
    with latzero.connect(url, transient=True) as app:
        for model in (
            Model(), Model(number=2**64 - 1), Model(number=-(2**63)), Model(number=1e300),
            Model(inner={"a": [Model()]}), Many([1, 2]), Model(inner=nested(127)),
        ):
            plain = model.model_dump(mode="json")
            assert app.call("echo", model) == plain
        assert app.call("echo", {"a": [Model(), Many([])]}) == {"a": [Model().model_dump(), []]}
        # What the configuration says.
        assert app.call("echo", Model(number=float("nan")))["number"] is None

        for data, place in (
            (Constants(number=float("nan")), "data: "),
            ({"in": [1, Constants(number=float("inf"))]}, r"data\.in\[1\]: "),
            ([Model(number=2**64)], r"data\[0\]: integers reach"),
            ({"in": Model(number=-(2**63) - 1)}, "data.in: integers reach"),
            (Model(inner=nested(128)), "data: .*levels"),
            ([[Model(inner=nested(126))]], r"data\[0\]\[0\]: .*levels"),
        ):
            with pytest.raises(latzero.BadRequest, match=f"^bad_message: {place}") as raised:
                app.call("echo", data)
            assert raised.value.ran == "no"


def test_models_are_described_with_their_definitions(pair):
    pydantic, msgspec = pytest.importorskip("pydantic"), pytest.importorskip("msgspec")

    class Part(pydantic.BaseModel):
        n: int

    class Whole(pydantic.BaseModel, strict=True):
        id: uuid.UUID
        parts: tuple[Part, ...]

    class Struct(msgspec.Struct):
        id: int

    serves, calls = pair

    @serves.serve
    def take(whole: Whole, others: list[Struct]) -> str:
        return f"{whole.id} {whole.parts[0].n} {others[0].id}"

    whole = Whole(id=uuid.UUID(int=5), parts=(Part(n=6),))
    assert calls.call("take", whole=whole, others=[Struct(7)]) == f"{whole.id} 6 7"
    schema = schema_of(calls, "take")
    assert schema["properties"]["others"]["items"] == {"$ref": "#/$defs/Struct"}
    parts = schema["properties"]["whole"]["properties"]["parts"]
    assert parts["items"] == {"$ref": "#/$defs/Part"}
    assert schema["$defs"].keys() == {"Part", "Struct"}
    assert schema["$defs"]["Part"]["properties"]["n"]["type"] == "integer"

    class Part(pydantic.BaseModel):
        other: str

    class Another(pydantic.BaseModel):
        parts: list[Part]

    @serves.serve
    def ambiguous(whole: Whole, another: Another) -> None:
        pass

    assert schema_of(calls, "ambiguous") is None


def test_what_cannot_be_read_is_raised_where_it_is_used_and_the_rest_arrives(latzero_server):
    # Python has no such number; others send it as they like.
    unreadable = "1e999"
    with (
        latzero.connect(latzero_server.url("listens"), transient=True) as app,
        latzero.connect(latzero_server.url("sends"), transient=True) as other,
    ):
        heard = queue.Queue()
        app.on("news", lambda event: heard.put(event.data))
        events = app.events("news")
        reported = queue.Queue()
        before, threading.excepthook = threading.excepthook, reported.put
        try:
            program = [latzero.find_program(), "emit", "default/news"]
            at = ["--socket", latzero_server.socket]
            subprocess.run([*program, unreadable, *at], check=True, timeout=30)
            other.emit("news", 2)
            assert heard.get(timeout=30) == 2
        finally:
            threading.excepthook = before
        assert isinstance(reported.get(timeout=30).exc_value, latzero.BadRequest)
        first = next(events)
        with pytest.raises(latzero.BadRequest, match="could not be read"):
            first.data
        assert next(events).data == 2
        events.close()


def test_an_answer_that_cannot_be_read_says_that_the_handler_may_have_run(latzero_server):
    with latzero.connect(latzero_server.url("asks"), transient=True) as app:
        serving = subprocess.Popen(
            [latzero.find_program(), "serve", "default/huge", "--socket", latzero_server.socket,
             "--", "echo", "1e999"],
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 30
            while app.trigger("default", "huge") is None and time.monotonic() < deadline:
                pass
            with pytest.raises(latzero.BadRequest) as caught:
                app.call("huge")
            assert caught.value.ran == "unknown"
        finally:
            serving.kill()
            serving.wait()


def test_the_server_of_a_test_takes_no_settings_from_the_environment(monkeypatch, tmp_path):

    monkeypatch.setenv("LATZERO_SOCKET", str(tmp_path / "other.sock"))
    monkeypatch.setenv("LATZERO_ENABLE_TLS", "true")
    with latzero.testing.server() as server:
        assert server.socket.startswith(server.data_dir)
        assert server.pin is None


@pytest.mark.parametrize("options, error, message", [
    ({"attempts": -1}, ValueError, "attempts: -1 is out of range"),
    ({"attempts": 2**40}, ValueError, "attempts: 1099511627776 is out of range"),
    ({"to": ("a",)}, TypeError, "to: "),
    ({"to": ["a", "b"]}, TypeError, "to: "),
    ({"key": "\ud800"}, latzero.BadRequest, "key: the text has lone surrogates"),
    ({"pool": "\ud800"}, latzero.BadRequest, "pool: the text has lone surrogates"),
    ({"headers": {"a": "\ud800"}}, latzero.BadRequest, "headers: the text has lone surrogates"),
    ({"headers": {"a": 1}}, TypeError, "headers: "),
], ids=str)
def test_a_wrong_option_is_named(latzero_server, options, error, message):
    with latzero.connect(latzero_server.url("options"), transient=True) as app:
        with pytest.raises(error, match=message):
            app.call("any", **options)
