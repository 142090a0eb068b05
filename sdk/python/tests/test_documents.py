"""The examples in the documentation, run as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def code(document: str, language: str) -> str:
    """All code blocks of a language in one text, at the line numbers that they have there."""
    lines, inside = [], False
    for line in (ROOT / document).read_text().splitlines():
        fence = re.match(r"```(\w*)$", line)
        if fence:
            inside = fence[1] == language and not inside
        lines.append(line if inside and not fence else "")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("document, language", [
    ("docs/python.md", "python"), ("docs/coming-from.md", "python"), ("README.md", "py"),
    ("sdk/python/README.md", "python"),
])
def test_examples_run(latzero_server, tmp_path, document, language):
    script = tmp_path / "example.py"
    script.write_text(code(document, language))
    # The examples name no server: they use the server of the data directory.
    env = {**os.environ, "LATZERO_DATA_DIR": latzero_server.data_dir}
    run = subprocess.run(
        [sys.executable, script], env=env, timeout=60, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    if document in ("README.md", "docs/python.md"):
        assert run.stdout.startswith("{'x': 42}\n")
