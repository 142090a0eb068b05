"""Memory as arrays: numpy's where it is installed, else memoryviews. numpy is imported when the
first array is made."""

from __future__ import annotations

from ._lean import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    # The dtype, in numpy's notation, and the shape. The dtype of named fields is a list of their
    # names and types.
    Layout = tuple[Any, list[int]]

# A longer list of names has no place in the layout of a block.
_FIELDS_BYTES_MAX = 1024

# What `memoryview` calls the element types that it knows.
_FORMATS = {
    "b1": "?", "i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "i8": "q",
    "u8": "Q", "f4": "f", "f8": "d",
}


def numpy() -> Any:
    """The module, or `None` if it is not installed."""
    try:
        import numpy
    except ImportError:
        return None
    return numpy


# The kinds of numbers of the formats of buffers.
_KINDS = {"?": "b"} | dict.fromkeys("bhilqn", "i") | dict.fromkeys("BHILQN", "u")
_KINDS |= dict.fromkeys("efd", "f") | {"Zf": "c", "Zd": "c"}


def dtype_of(view: memoryview) -> str | None:
    """The dtype of a buffer's elements; `None` for what is no number."""
    kind = _KINDS.get(view.format.lstrip("@=<>!"))
    is_swapped = view.format[0] in ">!" and view.itemsize > 1
    return kind and f"{'>' if is_swapped else ''}{kind}{view.itemsize}"


def layout_of(shape: Any, dtype: Any) -> tuple[tuple[str, list[int], list[str]], int] | None:
    """The layout as it is sent, with the names of the last dimension; and its size in bytes.
    `None` if neither is given."""
    if shape is None and dtype is None:
        return None
    if shape is None or dtype is None:
        raise TypeError("a layout has both `shape` and `dtype`")
    import re

    shape = [shape] if isinstance(shape, int) else [int(length) for length in shape]
    fields: list[str] = []
    found = re.fullmatch(r"([<>|]?)([biufc])(\d+)", dtype) if isinstance(dtype, str) else None
    called = dtype if isinstance(dtype, str) else getattr(dtype, "name", None)
    # That of ml_dtypes may also be the class of its elements.
    if (called or getattr(dtype, "__name__", None)) in ("bf16", "bfloat16"):
        name, size = "bf16", 2
    elif found:
        size = int(found[3])
        name = f"{found[1] or ('|' if size == 1 else '<')}{found[2]}{size}"
    else:
        module = numpy()
        if module is None:
            raise TypeError(f"without numpy a dtype is written as '<f4', not {dtype!r}")
        described = module.dtype(dtype)
        name, size = described.str, described.itemsize
        fields = list(described.names or ())
        each = described[0] if fields else described
        in_order = [(name, each.str) for name in fields]
        # Numbers of one type without gaps: as one more dimension, whose places have names.
        if (
            fields and each.kind in "biufc" and len(repr(fields).encode()) <= _FIELDS_BYTES_MAX
            and described == module.dtype(in_order)
        ):
            name, size, shape = each.str, each.itemsize, [*shape, len(fields)]
        else:
            fields = []
    return (name, shape, fields), size * _product(shape)


def _product(lengths: list[int]) -> int:
    product = 1
    for length in lengths:
        product *= length
    return product


def array(buffer: Any, layout: Layout | None) -> Any:
    """The bytes of `buffer` in the given layout; as bytes if the size does not fit."""
    view: Any = memoryview(buffer)
    module = numpy()
    if module is not None:
        if layout is not None:
            dtype = _dtype(module, layout, view.nbytes)
            if dtype is not None and dtype.itemsize * _product(layout[1]) == view.nbytes:
                return module.ndarray(layout[1], dtype, buffer)
        return module.ndarray((view.nbytes,), "u1", buffer)
    if layout is None or view.nbytes == 0:
        return view
    name, shape = layout
    if isinstance(name, list):
        # Named fields are a dimension more.
        name, shape = name[0][1], [*shape, len(name)]
    format: Any = _FORMATS.get(name.lstrip("<|"))
    if format is None or name.startswith(">"):
        return view
    flat = view.cast("B").cast(format)
    return flat.cast("B").cast(format, shape) if len(flat) == _product(shape) else view


def _dtype(module: Any, layout: Layout, nbytes: int) -> Any:
    try:
        # numpy has no bf16: its elements are two bytes each.
        return module.dtype("V2" if layout[0] == "bf16" else layout[0])
    except TypeError:
        # Another type that it has no name for, as bytes of its size.
        count = _product(layout[1])
        return module.dtype(f"V{nbytes // count}") if count and nbytes % count == 0 else None
    except ValueError:
        return None  # Two fields have the same name.


def empty(nbytes: int, layout: Layout | None) -> Any:
    """New memory for that many bytes."""
    module = numpy()
    return array(bytearray(nbytes) if module is None else module.empty(nbytes, "u1"), layout)


def flat(target: Any) -> Any:
    """The bytes of an array, in place."""
    module = numpy()
    if module is not None and isinstance(target, module.ndarray):
        if not target.flags.c_contiguous:
            raise ValueError("the array is not contiguous")
        return target.reshape(-1).view("u1")
    return memoryview(target).cast("B")


def check_type(target: Any, nbytes: int, layout: Layout | None) -> None:
    """Refuses an array of numbers of another type or shape than the layout's. Bytes take anything,
    and one dimension takes all numbers of the type."""
    if target is None or layout is None:
        return
    module, shape = numpy(), tuple(layout[1])
    if module is None:
        target = memoryview(target)
        name = layout[0] if isinstance(layout[0], str) else ""
        has, wanted = dtype_of(target), name.lstrip("<|")
        is_bytes = has in (None, "u1") or wanted not in _FORMATS
    else:
        if not isinstance(target, module.ndarray):
            target = module.asarray(memoryview(target))
        has, wanted = target.dtype, _dtype(module, layout, nbytes)
        is_bytes = wanted is None or "V" in (wanted.kind, has.kind) or has in ("u1", "S1")
    if has != wanted:
        if not is_bytes:
            raise ValueError(f"`out` has the type {has}, the block has {wanted}")
    elif target.ndim > 1 and target.shape != shape:
        raise ValueError(f"`out` has the shape {target.shape}, the block has {shape}")


def close(target: Any) -> None:
    """Makes a later write through `target` an error."""
    if isinstance(target, memoryview):
        # Slices of it keep it open.
        try:
            target.release()
        except BufferError:
            pass
    else:
        target.flags.writeable = False


def part_of(part: slice | None, nbytes: int, layout: Layout | None) -> tuple[
    int, int, Layout | None
]:
    """The offset, length and layout of the rows of `part`."""
    if part is None:
        return 0, nbytes, layout
    if not isinstance(part, slice):
        raise TypeError(f"part is a slice of rows, such as slice(0, 10), not {part!r}")
    rows = layout[1][0] if layout and layout[1] else nbytes
    start, stop, step = part.indices(rows)
    if step != 1:
        raise ValueError("a part is a range of rows, without a step")
    row = nbytes // rows if rows else 0
    count = max(stop - start, 0)
    return start * row, count * row, layout and (layout[0], [count, *layout[1][1:]])
