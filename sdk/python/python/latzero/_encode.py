"""Converts objects to JSON's types. Called for objects that the binding does not know."""

from __future__ import annotations

import datetime
import enum
import sys
import uuid
from types import GeneratorType
from typing import Any

from . import _latzero
from ._block import BlockInfo


def plain(value: Any) -> Any:
    """`value` as JSON's types, or as JSON text; `TypeError` if its type is not supported."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    fields = getattr(type(value), "__dataclass_fields__", None)
    if fields is not None:
        import dataclasses

        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    # Of pydantic, which is faster than a walk over what it would return.
    if hasattr(type(value), "model_dump_json"):
        return _latzero.Json(value.model_dump_json())
    if hasattr(type(value), "__struct_fields__") and "msgspec" in sys.modules:
        return sys.modules["msgspec"].to_builtins(value)
    if isinstance(value, BlockInfo):
        return value._inner
    # Such as what `map` returns. A generator is a stream.
    if hasattr(value, "__next__") and not isinstance(value, GeneratorType):
        return list(value)
    raise TypeError(type(value).__qualname__)
