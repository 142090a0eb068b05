"""What `LATZERO_DEBUG=1` changes: a version is written into private memory, whose bytes are copied
into the block when `with block.write()` ends. So a write through an array or slice that was kept
reaches nobody, and is reported."""

from __future__ import annotations

import atexit
import sys
import warnings
import weakref
import zlib


class Memory(bytearray):
    """The memory of one version. It lives as long as any array of it."""

    _block: str | None = None
    _sum = 0

    def end(self, block: str) -> None:
        """The version of this block was published or discarded."""
        self._block, self._sum = block, zlib.crc32(self)
        _ended.add(self)

    def check(self) -> None:
        """Warns if it was written since."""
        if self._block is None or zlib.crc32(self) == self._sum:
            return
        block, self._block = self._block, None
        warnings.warn(
            f"an array of block {block} was written after its `with block.write()` had ended; "
            "without LATZERO_DEBUG that would have changed what others read",
            ResourceWarning, stacklevel=2,
        )

    # By identity: a block's bytes are no key.
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.check()


_ended: weakref.WeakSet[Memory] = weakref.WeakSet()


@atexit.register
def _check_all() -> None:
    for memory in list(_ended):
        memory.check()
