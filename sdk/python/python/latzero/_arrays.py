"""Memory as arrays: numpy's where it is installed, else memoryviews. numpy is imported when the
first array is made."""

from __future__ import annotations

from ._lean import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

Layout = tuple[str, list[int]]

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


def layout_of(shape: Any, dtype: Any) -> tuple[Layout, int] | None:
    """The layout, and its size in bytes; `None` if neither is given."""
    if shape is None and dtype is None:
        return None
    if shape is None or dtype is None:
        raise TypeError("a layout has both `shape` and `dtype`")
    import re

    shape = [shape] if isinstance(shape, int) else [int(length) for length in shape]
    found = re.fullmatch(r"([<|]?)([biufc])(\d+)", dtype) if isinstance(dtype, str) else None
    if found:
        size = int(found[3])
        name = f"{found[1] or ('|' if size == 1 else '<')}{found[2]}{size}"
    else:
        module = numpy()
        if module is None:
            raise TypeError(f"without numpy a dtype is written as '<f4', not {dtype!r}")
        described = module.dtype(dtype)
        name, size = described.str, described.itemsize
    return (name, shape), size * _product(shape)


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
    format: Any = _FORMATS.get(layout[0].lstrip("<|"))
    if format is None or layout[0].startswith(">"):
        return view
    flat = view.cast("B").cast(format)
    return flat.cast("B").cast(format, layout[1]) if len(flat) == _product(layout[1]) else view


def _dtype(module: Any, layout: Layout, nbytes: int) -> Any:
    try:
        return module.dtype(layout[0])
    except TypeError:
        # A type that numpy has no name for, such as bf16: as bytes of its size.
        count = _product(layout[1])
        return module.dtype(f"V{nbytes // count}") if count and nbytes % count == 0 else None


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
    rows = layout[1][0] if layout and layout[1] else nbytes
    start, stop, step = part.indices(rows)
    if step != 1:
        raise ValueError("a part is a range of rows, without a step")
    row = nbytes // rows if rows else 0
    count = max(stop - start, 0)
    return start * row, count * row, layout and (layout[0], [count, *layout[1][1:]])
