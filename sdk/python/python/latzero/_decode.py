"""Converts decoded JSON to the types that hints name, and describes them as JSON Schema. Values are
checked, not coerced. Types of other libraries have their own conversion and are not imported here.
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

from . import _latzero

Decoder = Callable[[Any, str], Any]
Schema = dict[str, Any]


class Kind(typing.NamedTuple):
    """What a hint means: how a value is checked and converted, and the same as JSON Schema."""

    decode: Decoder
    schema: Schema


class Mismatch(ValueError):
    """A value that is not of the type that a hint names."""


def _mismatch(place: str, expected: str, value: Any) -> Mismatch:
    return Mismatch(f"{place} is {type(value).__name__}, not {expected}")


def _same(value: Any, place: str) -> Any:
    return value


_ANY = Kind(_same, {})

_cache: dict[Any, Kind] = {}


def decoder(hint: Any) -> Decoder:
    """A function that converts a value to the type `hint`; `TypeError` if the type is not
    supported."""
    return kind(hint).decode


def kind(hint: Any) -> Kind:
    """What `hint` means; `TypeError` if the type is not supported."""
    try:
        found = _cache.get(hint)
    except TypeError:  # Not hashable, such as an `Annotated` with a list.
        return _make(hint)
    if found is None:
        # A type may refer to itself. Its schema then leaves open what is inside.
        _cache[hint] = Kind(lambda value, place: _cache[hint].decode(value, place), {})
        try:
            found = _cache[hint] = _make(hint)
        except BaseException:
            del _cache[hint]
            raise
    return found


def parameters(known: dict[str, Kind], defaults: dict[str, Any], is_open: bool) -> Schema:
    """The schema of an object with one field for each parameter of a function."""
    properties = {}
    for name, one in known.items():
        default = defaults.get(name)
        is_shown = name in defaults and _is_plain(default)
        properties[name] = {**one.schema, "default": default} if is_shown else one.schema
    return _object(properties, [name for name in known if name not in defaults], is_open)


def lift_definitions(schema: Schema) -> Schema:
    """`schema` with the definitions inside of it moved to its top, to which references point. If
    two differ that have one name, nothing is said."""
    definitions: Schema = {}

    def lift(inside: Any) -> Any:
        if isinstance(inside, list):
            return [lift(one) for one in inside]
        if not isinstance(inside, dict):
            return inside
        for name, one in inside.get("$defs", {}).items():
            if definitions.setdefault(name, one) != one:
                raise _Ambiguous
        return {key: lift(one) for key, one in inside.items() if key != "$defs"}

    try:
        lifted: Schema = lift(schema)
    except _Ambiguous:
        return {}
    return {**lifted, "$defs": definitions} if definitions else lifted


class _Ambiguous(Exception):
    """Two definitions have one name."""


def _object(properties: dict[str, Schema], required: list[str], is_open: bool = False) -> Schema:
    schema: Schema = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required
    if not is_open:
        schema["additionalProperties"] = False
    return schema


def _is_plain(value: Any) -> bool:
    """Whether a value is the same in JSON."""
    if type(value) is float:
        return value - value == 0  # Neither an infinity nor NaN.
    return type(value) in (str, int, bool, type(None))


def _one_of(values: list[Any]) -> Schema:
    return {"enum": values} if all(map(_is_plain, values)) else {}


def _make(hint: Any) -> Kind:
    if hint is Any or hint is object or hint is inspect.Parameter.empty:
        return _ANY
    if isinstance(hint, typing.TypeVar):
        return _ANY
    if isinstance(hint, typing.NewType):
        return kind(hint.__supertype__)
    if sys.version_info >= (3, 12) and isinstance(hint, typing.TypeAliasType):
        return kind(hint.__value__)
    if hint is None:
        hint = type(None)
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is typing.Annotated:
        return kind(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return _union([kind(a) for a in arguments], hint)
    if origin is typing.Literal:
        return Kind(_literal(arguments), _one_of(list(arguments)))
    if origin in (typing.Required, typing.NotRequired):
        return kind(arguments[0])
    if origin is None:
        origin = hint
    if not isinstance(origin, type):
        raise TypeError(f"a payload can't be decoded as {hint!r}")
    if origin is float:
        return Kind(_float, {"type": "number"})
    if origin is int:
        return Kind(_int, {"type": "integer"})
    if origin in _EXACT:
        return Kind(_exact(origin), _EXACT[origin])
    if issubclass(origin, list) or origin.__module__ == "collections.abc" and origin.__name__ in (
        "Sequence", "Iterable", "Collection", "MutableSequence",
    ):
        return _list(kind(arguments[0]) if arguments else _ANY)
    if origin is tuple:
        return _tuple(arguments)
    if origin in (set, frozenset):
        return _set(origin, kind(arguments[0]) if arguments else _ANY)
    if typing.is_typeddict(origin):
        return _typed_dict(origin, arguments)
    if issubclass(origin, dict) or origin.__module__ == "collections.abc":
        if len(arguments) != 2:
            return _dict(_ANY, _ANY)
        is_mapping = issubclass(origin, dict) or origin.__name__ in ("Mapping", "MutableMapping")
        # The keys of JSON's objects are of this type anyway.
        is_checked = is_mapping and arguments[0] is not str
        return _dict(kind(arguments[0]) if is_checked else _ANY, kind(arguments[1]))
    return _class(origin, arguments)


# Raw bytes are not JSON.
_EXACT: dict[type, Schema] = {
    str: {"type": "string"}, bool: {"type": "boolean"}, type(None): {"type": "null"}, bytes: {},
}


def _exact(of: type) -> Decoder:
    def decode(value: Any, place: str) -> Any:
        if type(value) is not of:
            raise _mismatch(place, "null" if of is type(None) else of.__name__, value)
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


def _union(kinds: list[Kind], hint: Any) -> Kind:
    decoders = [one.decode for one in kinds]
    schemas = [one.schema for one in kinds]

    def decode(value: Any, place: str) -> Any:
        for one in decoders:
            try:
                return one(value, place)
            except Mismatch:
                continue
        raise _mismatch(place, str(hint), value)

    if {} in schemas:
        return Kind(decode, {})
    if all(schema.keys() == {"type"} for schema in schemas):
        return Kind(decode, {"type": [schema["type"] for schema in schemas]})
    return Kind(decode, {"anyOf": schemas})


def _literal(values: tuple[Any, ...]) -> Decoder:
    def decode(value: Any, place: str) -> Any:
        for one in values:
            if type(one) is type(value) and one == value:
                return one
        raise Mismatch(f"{place} is {value!r}, not one of {', '.join(map(repr, values))}")

    return decode


def _list(items: Kind) -> Kind:
    item = items.decode

    def decode(value: Any, place: str) -> Any:
        if type(value) is not list:
            raise _mismatch(place, "list", value)
        if item is _same:
            return value
        return [item(one, f"{place}[{i}]") for i, one in enumerate(value)]

    schema: Schema = {"type": "array"}
    return Kind(decode, {**schema, "items": items.schema} if items.schema else schema)


def _tuple(arguments: tuple[Any, ...]) -> Kind:
    if len(arguments) == 2 and arguments[1] is Ellipsis or not arguments:
        items, schema = _list(kind(arguments[0]) if arguments else _ANY)
        return Kind(lambda value, place: tuple(items(value, place)), schema)
    kinds = [kind(a) for a in arguments]
    decoders = [one.decode for one in kinds]

    def decode(value: Any, place: str) -> Any:
        if type(value) is not list or len(value) != len(decoders):
            raise _mismatch(place, f"a list of {len(decoders)}", value)
        return tuple(d(v, f"{place}[{i}]") for i, (d, v) in enumerate(zip(decoders, value)))

    return Kind(decode, {
        "type": "array", "prefixItems": [one.schema for one in kinds],
        "minItems": len(kinds), "maxItems": len(kinds),
    })


def _set(of: Any, item: Kind) -> Kind:
    items, schema = _list(item)

    def decode(value: Any, place: str) -> Any:
        try:
            return of(items(value, place))
        except TypeError as error:
            # A list or an object is no element of a set.
            raise Mismatch(f"{place} can't be a {of.__name__}: {error}") from None

    return Kind(decode, schema)


def _dict(keys: Kind, values: Kind) -> Kind:
    name, item = keys.decode, values.decode

    def decode(value: Any, place: str) -> Any:
        if type(value) is not dict:
            raise _mismatch(place, "an object", value)
        if name is not _same:
            return {
                name(key, f"the key {key!r} of {place}"): item(one, f"{place}.{key}")
                for key, one in value.items()
            }
        if item is _same:
            return value
        return {key: item(one, f"{place}.{key}") for key, one in value.items()}

    schema: Schema = {"type": "object"}
    if keys.schema:
        schema["propertyNames"] = keys.schema
    if values.schema:
        schema["additionalProperties"] = values.schema
    return Kind(decode, schema)


def _fields(
    make: Callable[[dict[str, Any]], Any], fields: dict[str, Kind], required: list[str], name: str,
) -> Kind:
    known = {key: one.decode for key, one in fields.items()}

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
                raise Mismatch(f"{place} has the field {key!r}, but {name} has no such field")
            decoded[key] = field(one, f"{place}.{key}")
        return make(decoded)

    return Kind(decode, _object({key: one.schema for key, one in fields.items()}, required))


def _hints(of: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """The hints of a class, with `arguments` in place of its parameters. Those of a class with
    generic bases are left open: there one parameter may have several meanings."""
    hints = typing.get_type_hints(of)
    bases = [*of.__mro__[1:], *(typing.get_origin(b) or b for b in of.__dict__.get(_BASES, ()))]
    if any(base is not typing.Generic and _BASES in base.__dict__ for base in bases):
        return hints
    given: dict[Any, Any] = dict(zip(getattr(of, "__parameters__", ()), arguments))

    def fill(hint: Any) -> Any:
        if typing.get_origin(hint) is None:
            return given.get(hint, hint) if isinstance(hint, typing.TypeVar) else hint
        inside = getattr(hint, "__parameters__", ())
        return hint[tuple(given.get(one, one) for one in inside)] if inside else hint

    return {name: fill(hint) for name, hint in hints.items()}


_BASES = "__orig_bases__"


def _typed_dict(of: Any, arguments: tuple[Any, ...]) -> Kind:
    hints = _hints(of, arguments)
    fields = {key: kind(hint) for key, hint in hints.items()}
    required = [key for key in hints if key in of.__required_keys__]
    return _fields(lambda given: given, fields, required, of.__name__)


def _class(of: Any, arguments: tuple[Any, ...]) -> Kind:
    module = of.__module__
    if hasattr(of, "__dataclass_fields__") and not hasattr(of, "model_validate"):
        import dataclasses

        hints = _hints(of, arguments)
        fields = [f for f in dataclasses.fields(of) if f.init]
        kinds = {f.name: kind(hints[f.name]) for f in fields}
        required = [
            f.name for f in fields
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        return _fields(lambda given: of(**given), kinds, required, of.__name__)
    if hasattr(of, "model_validate"):
        return Kind(_other(_model(of), of), _schema(of.model_json_schema))
    if hasattr(of, "__struct_fields__") and "msgspec" in sys.modules:
        msgspec = sys.modules["msgspec"]
        schema = _schema(lambda: msgspec.json.schema(of))
        return Kind(_other(lambda value: msgspec.convert(value, of), of), schema)
    if "enum" in sys.modules and issubclass(of, sys.modules["enum"].Enum):
        return Kind(_other(of, of), _one_of([member.value for member in of]))
    if module == "uuid":
        return Kind(_other(of, of, str), {"type": "string", "format": "uuid"})
    if module == "datetime" and hasattr(of, "fromisoformat"):
        # Of its formats, JSON Schema has only some.
        return Kind(_other(of.fromisoformat, of, str), {"type": "string"})

    def decode(value: Any, place: str) -> Any:
        # Such as a block.
        if not isinstance(value, of):
            raise _mismatch(place, of.__name__, value)
        return value

    return Kind(decode, {})


def _model(of: Any) -> Callable[[Any], Any]:
    """How a pydantic model is made. From JSON, strict ones too take what JSON lacks as text."""

    def make(value: Any) -> Any:
        try:
            text = _latzero.json(value)
        except ValueError:  # There is a block in it.
            return of.model_validate(value)
        return of.model_validate_json(text)

    return make


def _schema(of: Callable[[], Schema]) -> Schema:
    """The schema that another library has for a type, if it has one."""
    try:
        return of()
    except Exception:
        return {}


def _other(convert: Callable[[Any], Any], of: Any, given: type = object) -> Decoder:
    def decode(value: Any, place: str) -> Any:
        if not isinstance(value, given):
            raise _mismatch(place, f"{of.__name__} as {given.__name__}", value)
        try:
            return convert(value)
        except (ValueError, TypeError) as error:
            raise Mismatch(f"{place} is no {of.__name__}: {error}") from error

    return decode
