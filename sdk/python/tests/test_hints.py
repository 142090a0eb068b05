"""What hints of keys mean, times of a wrong type, and the request inside of generators."""

import asyncio
import collections.abc
import dataclasses
import enum
import threading
import typing
import uuid

import latzero
import latzero.aio
import pytest
from latzero._decode import Mismatch, decoder, kind


class Colour(enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


UserId = typing.NewType("UserId", str)


@pytest.mark.parametrize("hint", [
    dict[int, int], dict[float, int], dict[bool, int], dict[int, typing.Any], dict[Number, int],
    typing.Dict[int, int], collections.abc.Mapping[int, int],
    collections.abc.MutableMapping[int, int], dict[typing.Literal[1], int],
    dict[typing.Literal["2"], int], dict[Colour, int], dict[uuid.UUID, int],
])
def test_keys_that_do_not_match_their_hint_are_refused(hint):
    with pytest.raises(Mismatch, match="^the key '1' of the answer is "):
        decoder(hint)({"1": 1}, "the answer")
    with pytest.raises(Mismatch, match=r"^the key '1' of the answer\[0\] is "):
        decoder(list[hint])([{"1": 1}], "the answer")
    assert decoder(hint)({}, "the answer") == {}


@pytest.mark.parametrize("hint", [
    dict, dict[str, int], dict[typing.Any, int], dict[object, int], dict[int | str, int],
    dict[typing.Literal["1", "2"], int], dict[UserId, int], dict[typing.TypeVar("K"), int],
    collections.abc.Mapping[str, int], dict[typing.Annotated[str, "a name"], int],
])
def test_keys_that_match_their_hint_stay(hint):
    assert decoder(hint)({"1": 1}, "the answer") == {"1": 1}


def test_keys_become_what_their_hint_names():
    id = uuid.uuid4()
    assert decoder(dict[Colour, int])({"red": 1}, "it") == {Colour.RED: 1}
    assert decoder(dict[uuid.UUID, int])({str(id): 1}, "it") == {id: 1}
    assert kind(dict[Colour, int]).schema == {
        "type": "object", "propertyNames": {"enum": ["red"]},
        "additionalProperties": {"type": "integer"},
    }
    assert kind(dict[str, int]).schema == {
        "type": "object", "additionalProperties": {"type": "integer"},
    }


def test_what_is_no_element_of_a_set_is_a_bad_message(pair):
    serves, calls = pair

    @serves.serve
    def takes(values: set[list[int]]):
        return len(values)

    assert calls.call("takes", values=[]) == 0
    with pytest.raises(latzero.BadRequest, match="values can't be a set"):
        calls.call("takes", values=[[1]])


T = typing.TypeVar("T")
S = typing.TypeVar("S")


@dataclasses.dataclass
class Two(typing.Generic[T, S]):
    first: T
    rest: list[S]
    next: "Two[T, S] | None" = None


@dataclasses.dataclass
class Lists(Two[list[T], S]):
    last: T | None = None


class Named(typing.TypedDict, typing.Generic[T]):
    name: T


def test_the_arguments_of_generic_classes_are_checked():
    decode = decoder(Two[int, str])
    found = decode({"first": 1, "rest": ["a"], "next": {"first": 2, "rest": []}}, "x")
    assert found == Two(1, ["a"], Two(2, []))
    for wrong, place in (
        ({"first": "a", "rest": []}, "x.first is str, not int"),
        ({"first": 1, "rest": [1]}, r"x.rest\[0\] is int, not str"),
        ({"first": 1, "rest": [], "next": {"first": "a", "rest": []}}, "x.next"),
    ):
        with pytest.raises(Mismatch, match=place):
            decode(wrong, "x")
    with pytest.raises(Mismatch, match="x.name is int, not str"):
        decoder(Named[str])({"name": 1}, "x")
    # One parameter with two meanings is left open.
    assert decoder(Lists[int, str])({"first": [1], "rest": []}, "x") == Lists([1], [])


def test_the_keys_of_answers_and_arguments_are_checked(pair):
    serves, calls = pair

    @serves.serve
    def same(data, /):
        return data

    @serves.serve
    def counts(by: dict[int, int]):
        return by

    with pytest.raises(latzero.BadRequest, match="the key '1' of the answer is str, not int"):
        calls.call("same", {"1": 1}, into=dict[int, int])
    assert calls.call("same", {"1": 1}, into=dict[str, int]) == {"1": 1}
    with pytest.raises(latzero.BadRequest, match="the key '1' of by is str, not int") as caught:
        calls.call("counts", by={"1": 1})
    assert caught.value.code == "bad_message"


def test_times_of_a_wrong_type_are_type_errors(pair):
    _, calls = pair
    for call in (
        lambda: calls.call("nobody", timeout="x"), lambda: calls.submit("nobody", timeout=[1]),
        lambda: calls.stream("nobody", timeout="x"), lambda: latzero.connect(call_timeout="x"),
        lambda: latzero.aio.connect(connect_timeout="x"),
    ):
        with pytest.raises(TypeError, match="a number of seconds or a timedelta, not (str|list)"):
            call()


def test_generators_have_their_request(pair):
    serves, calls = pair
    ended = threading.Event()
    seen = []

    @serves.serve
    def named(n: int):
        try:
            for _ in range(n):
                yield latzero.request().name
            return latzero.request().pool
        finally:
            seen.append(latzero.request().name)
            ended.set()

    @serves.serve
    def whole(data, /):
        yield latzero.request().name

    @serves.serve
    def outside():
        try:
            return latzero.request().name
        finally:
            seen.append("outside")

    @serves.serve
    async def on_a_loop():
        yield latzero.request().name

    with calls.stream("named", n=3) as items:
        assert list(items) == ["named"] * 3
        assert items.end == serves.joined[0]
    assert ended.wait(10) and seen == ["named"]
    assert list(calls.stream("whole", 1)) == ["whole"]
    assert list(calls.stream("on_a_loop")) == ["on_a_loop"]
    assert calls.call("outside") == "outside"

    # Also at its end, when the caller goes.
    ended.clear()
    with calls.stream("named", n=10**9) as items:
        assert next(items) == "named"
    assert ended.wait(10) and seen == ["named", "outside", "named"]


def test_the_request_of_a_generator_stays_in_its_steps():
    from latzero._app import _adapt

    def handler():
        try:
            yield latzero.request()
        finally:
            ends.append(latzero.request())

    ends = []
    run, _ = _adapt(handler, False)
    first, second = object(), object()
    one, other = run(first, None), run(second, None)
    assert (next(one), next(other)) == (first, second)
    with pytest.raises(LookupError):
        latzero.request()
    other.close()
    del one
    assert ends == [second, first]


def test_generators_of_asyncio_have_their_request(latzero_server):
    async def main():
        url = latzero_server.url("aio-generators", "aio-generators")
        async with latzero.aio.connect(url) as app:
            main_thread = threading.current_thread()
            ended = asyncio.Event()

            @app.serve
            def plain():
                yield latzero.request().name

            @app.serve(inline=True)
            def inline(n: int):
                assert threading.current_thread() is main_thread
                try:
                    for _ in range(n):
                        yield latzero.request().name
                    yield latzero.Progress(1.0)
                    return "done"
                finally:
                    assert latzero.request().name == "inline"
                    ended.set()

            @app.serve(inline=True)
            def fails():
                yield 1
                raise latzero.Failure("broken", "it broke")

            @app.serve(inline=True)
            def awaited(n: int):
                async def later():
                    await asyncio.sleep(0.01)
                    return [latzero.request().name, n]

                return later()

            await app.ready()
            assert await app.call("awaited", n=5) == ["awaited", 5]
            assert [item async for item in app.stream("plain")] == ["plain"]
            items = app.stream("inline", n=200)
            assert [item async for item in items] == ["inline"] * 200
            assert items.end == "done" and items.progress == 1.0
            await asyncio.wait_for(ended.wait(), 10)

            # It is closed when the caller goes.
            ended.clear()
            async with app.stream("inline", n=10**9) as items:
                assert await anext(items) == "inline"
            await asyncio.wait_for(ended.wait(), 10)

            items = app.stream("fails")
            assert await anext(items) == 1
            with pytest.raises(latzero.HandlerFailed, match="it broke"):
                await anext(items)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_model_that_can_not_be_written_is_a_bad_request(latzero_server):
    pydantic = pytest.importorskip("pydantic")

    class Raw(pydantic.BaseModel):
        v: bytes

    with latzero.connect(latzero_server.url("models"), transient=True) as app:
        with pytest.raises(latzero.BadRequest, match=r"^bad_message: data\.m: ") as raised:
            app.call("any", m=Raw(v=b"\xff"))
        assert type(raised.value.__cause__).__name__ == "PydanticSerializationError"
