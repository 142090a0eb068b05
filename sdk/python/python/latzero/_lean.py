"""What the modules that `import latzero` loads use of `typing`, which takes longer to import than
all of them together."""

from __future__ import annotations

# Checkers of types take this name to be true.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Generic as Generic, TypeVar

    F = TypeVar("F", bound=Callable[..., Any])
    T = TypeVar("T")
else:
    F = T = None

    class Generic:
        """A class that can be subscripted, as `Stream[int]` in a hint."""

        __slots__ = ()
        __class_getitem__ = classmethod(type(list[int]))
