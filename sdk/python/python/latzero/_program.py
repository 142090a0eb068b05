"""Where the program `latzero` is."""

from __future__ import annotations

import os


def find_program() -> str:
    """The program `latzero`: `$LATZERO_BIN`, else beside the interpreter, else on the `PATH`."""
    named = os.environ.get("LATZERO_BIN")
    if named:
        return named
    # Few programs need these.
    import shutil
    import sysconfig

    beside = os.path.join(sysconfig.get_path("scripts"), "latzero")
    found = beside if os.path.exists(beside) else shutil.which("latzero")
    if found is None:
        raise FileNotFoundError("the program `latzero` is not installed; name it in LATZERO_BIN")
    return found
