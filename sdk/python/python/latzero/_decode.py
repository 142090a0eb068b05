"""Converts decoded JSON to the types that hints name. Values are checked, not coerced. Types of
other libraries have their own conversion and are not imported here."""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

Decoder = Callable[[Any, str], Any]


class Mismatch(ValueError):
    """A value that is not of the type that a hint names."""


def _mismatch(place: str, expected: str, value: Any) -> Mismatch:
    return Mismatch(f"{place} is {type(value).__name__}, not {expected}")


def _same(value: Any, place: str) -> Any:
    return value


_cache: dict[Any, Decoder] = {}


def decoder(hint: Any) -> Decoder:
    """A function that converts a value to the type `hint`; `TypeError` if the type is not
    supported."""
    try:
        found = _cache.get(hint)
    except TypeError:  # Not hashable, such as an `Annotated` with a list.
        return _make(hint)
    if found is None:
        # A type may refer to itself.
        _cache[hint] = lambda value, place: _cache[hint](value, place)
        try:
            found = _cache[hint] = _make(hint)
        except BaseException:
            del _cache[hint]
            raise
    return found


def _make(hint: Any) -> Decoder:
    if hint is Any or hint is object or hint is inspect.Parameter.empty:
        return _same
    if isinstance(hint, typing.TypeVar):
        return _same
    if hint is None:
        hint = type(None)
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is typing.Annotated:
        return decoder(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return _union([decoder(a) for a in arguments], hint)
    if origin is typing.Literal:
        return _literal(arguments)
    if origin in (typing.Required, typing.NotRequired):
        return decoder(arguments[0])
    if origin is None:
        origin = hint
    if not isinstance(origin, type):
        raise TypeError(f"a payload can't be decoded as {hint!r}")
    if origin is float:
        return _float
    if origin is int:
        return _int
    if origin in (str, bool, bytes, type(None)):
        return _exact(origin)
    if issubclass(origin, list) or origin.__module__ == "collections.abc" and origin.__name__ in (
        "Sequence", "Iterable", "Collection", "MutableSequence",
    ):
        return _list(decoder(arguments[0]) if arguments else _same)
    if origin is tuple:
        return _tuple(arguments)
    if origin in (set, frozenset):
        return _set(origin, decoder(arguments[0]) if arguments else _same)
    if typing.is_typeddict(origin):
        return _typed_dict(origin)
    if issubclass(origin, dict) or origin.__module__ == "collections.abc":
        return _dict(decoder(arguments[1]) if len(arguments) == 2 else _same)
    return _class(origin)


def _exact(kind: type) -> Decoder:
    def decode(value: Any, place: str) -> Any:
        if type(value) is not kind:
            raise _mismatch(place, "null" if kind is type(None) else kind.__name__, value)
        return value

    return decode


def _int(value: Any, place: str) -> Any:
    if type(value) is not int:
        raise _mismatch(place, "int", value)
    return value


def _float(value: Any, place: str) -> Any:
    # JSON does not distinguish 1 from 1.0.
    if type(value) is not float and type(value) is not int:
        raise _mismatch(place, "float", value)
    return float(value)


def _union(decoders: list[Decoder], hint: Any) -> Decoder:
    def decode(value: Any, place: str) -> Any:
        for one in decoders:
            try:
                return one(value, place)
            except Mismatch:
                continue
        raise _mismatch(place, str(hint), value)

    return decode


def _literal(values: tuple[Any, ...]) -> Decoder:
    def decode(value: Any, place: str) -> Any:
        for one in values:
            if type(one) is type(value) and one == value:
                return one
        raise Mismatch(f"{place} is {value!r}, not one of {', '.join(map(repr, values))}")

    return decode


def _list(item: Decoder) -> Decoder:
    def decode(value: Any, place: str) -> Any:
        if type(value) is not list:
            raise _mismatch(place, "list", value)
        if item is _same:
            return value
        return [item(one, f"{place}[{i}]") for i, one in enumerate(value)]

    return decode


def _tuple(arguments: tuple[Any, ...]) -> Decoder:
    if len(arguments) == 2 and arguments[1] is Ellipsis or not arguments:
        items = _list(decoder(arguments[0]) if arguments else _same)
        return lambda value, place: tuple(items(value, place))
    decoders = [decoder(a) for a in arguments]

    def decode(value: Any, place: str) -> Any:
        if type(value) is not list or len(value) != len(decoders):
            raise _mismatch(place, f"a list of {len(decoders)}", value)
        return tuple(d(v, f"{place}[{i}]") for i, (d, v) in enumerate(zip(decoders, value)))

    return decode


def _set(kind: Any, item: Decoder) -> Decoder:
    items = _list(item)
    return lambda value, place: kind(items(value, place))


def _dict(item: Decoder) -> Decoder:
    def decode(value: Any, place: str) -> Any:
        if type(value) is not dict:
            raise _mismatch(place, "an object", value)
        if item is _same:
            return value
        return {key: item(one, f"{place}.{key}") for key, one in value.items()}

    return decode


def _fields(
    make: Callable[[dict[str, Any]], Any], known: dict[str, Decoder], required: set[str],
    name: str,
) -> Decoder:
    def decode(value: Any, place: str) -> Any:
        if type(value) is not dict:
            raise _mismatch(place, name, value)
        for key in required:
            if key not in value:
                raise Mismatch(f"{place} misses the field {key!r} of {name}")
        decoded = {}
        for key, one in value.items():
            field = known.get(key)
            if field is None:
                raise Mismatch(f"{place} has the field {key!r}, which {name} has not")
            decoded[key] = field(one, f"{place}.{key}")
        return make(decoded)

    return decode


def _typed_dict(kind: Any) -> Decoder:
    hints = typing.get_type_hints(kind)
    known = {key: decoder(hint) for key, hint in hints.items()}
    return _fields(lambda fields: fields, known, set(kind.__required_keys__), kind.__name__)


def _class(kind: Any) -> Decoder:
    module = kind.__module__
    if hasattr(kind, "__dataclass_fields__") and not hasattr(kind, "model_validate"):
        import dataclasses

        hints = typing.get_type_hints(kind)
        fields = [f for f in dataclasses.fields(kind) if f.init]
        known = {f.name: decoder(hints[f.name]) for f in fields}
        required = {
            f.name for f in fields
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        return _fields(lambda given: kind(**given), known, required, kind.__name__)
    if hasattr(kind, "model_validate"):
        return _other(kind.model_validate, kind)
    if hasattr(kind, "__struct_fields__") and "msgspec" in sys.modules:
        convert = sys.modules["msgspec"].convert
        return _other(lambda value: convert(value, kind), kind)
    if "enum" in sys.modules and issubclass(kind, sys.modules["enum"].Enum):
        return _other(kind, kind)
    if module == "uuid":
        return _other(kind, kind, str)
    if module == "datetime" and hasattr(kind, "fromisoformat"):
        return _other(kind.fromisoformat, kind, str)

    def decode(value: Any, place: str) -> Any:
        # Such as a block.
        if not isinstance(value, kind):
            raise _mismatch(place, kind.__name__, value)
        return value

    return decode


def _other(convert: Callable[[Any], Any], kind: Any, given: type = object) -> Decoder:
    def decode(value: Any, place: str) -> Any:
        if not isinstance(value, given):
            raise _mismatch(place, f"{kind.__name__} as {given.__name__}", value)
        try:
            return convert(value)
        except (ValueError, TypeError) as error:
            raise Mismatch(f"{place} is no {kind.__name__}: {error}") from error

    return decode
