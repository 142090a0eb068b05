"""The wheel as it was installed: its program, its versions, and what importing it costs."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import latzero
import latzero.testing
import pytest

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def python(script, **env):
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60,
        env={**os.environ, **env},
    )


def test_the_package_and_the_program_have_one_version():
    import tomllib

    version = tomllib.loads(PYPROJECT.read_text())["project"]["version"]
    assert latzero.__version__ == importlib.metadata.version("latzero") == version
    said = subprocess.run([latzero.find_program(), "--version"], capture_output=True, text=True)
    assert said.stdout == f"latzero {version}\n"


def test_a_binding_of_another_version_is_refused():
    ran = python(
        "import sys, types\n"
        "import latzero._latzero as binding\n"
        "for name in list(sys.modules):\n"
        "    if name == 'latzero' or name.startswith('latzero.'):\n"
        "        del sys.modules[name]\n"
        "old = types.ModuleType('latzero._latzero')\n"
        "old.__dict__.update({**vars(binding), '__version__': '0.0.9'})\n"
        "sys.modules['latzero._latzero'] = old\n"
        "import latzero\n"
    )
    assert ran.returncode == 1 and "ImportError: latzero" in ran.stderr and "0.0.9" in ran.stderr


def test_where_the_program_is(tmp_path, monkeypatch):
    monkeypatch.setenv("LATZERO_BIN", "/somewhere/latzero")
    assert latzero.find_program() == latzero.testing.find_program() == "/somewhere/latzero"
    monkeypatch.delenv("LATZERO_BIN")
    # The one that was installed with the package.
    beside = Path(sys.executable).parent / "latzero"
    assert os.path.samefile(latzero.find_program(), beside)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(FileNotFoundError, match="LATZERO_BIN"):
        latzero.find_program()
    (tmp_path / "bin").mkdir()
    shutil.copy(beside, tmp_path / "bin/latzero")
    assert latzero.find_program() == str(tmp_path / "bin/latzero")


# What programs that only call do not need, and what takes longer to import than all of the package.
SLOW = [
    "ast", "asyncio", "collections", "contextlib", "dataclasses", "datetime", "enum", "functools",
    "importlib.util", "inspect", "json", "logging", "multiprocessing", "numpy", "pickle", "re",
    "shutil", "socket", "subprocess", "tempfile", "threading", "traceback", "typing", "uuid",
]


def test_importing_it_imports_nothing_that_is_slow():
    # Without what this installation's start imports itself.
    ran = python(
        "import sys\n"
        "before = set(sys.modules)\n"
        "import latzero\n"
        f"print(sorted(set({SLOW}) & (set(sys.modules) - before)))\n"
    )
    assert (ran.stdout, ran.stderr) == ("[]\n", "")


def test_hints_may_subscript_the_classes(latzero_app):
    assert latzero.Stream[int].__origin__ is latzero.Stream
    assert latzero.Pending[int].__args__ == (int,)


def test_a_second_interpreter_of_a_process_is_refused():
    # Python 3.13 has another name for it, and returns the error.
    ran = python(
        "import latzero\n"
        "try:\n"
        "    import _interpreters as interpreters\n"
        "except ImportError:\n"
        "    import _xxsubinterpreters as interpreters\n"
        "failed = interpreters.run_string(interpreters.create(), 'import latzero')\n"
        "if failed is not None:\n"
        "    raise SystemExit(failed.formatted)\n"
    )
    assert "ImportError" in ran.stderr and ran.returncode == 1


def test_one_line_calls_the_server(latzero_server):
    line = "import latzero; print(latzero.connect(pools=['system']).call('echo', x=42))"
    ran = python(line, LATZERO_DATA_DIR=latzero_server.data_dir)
    assert (ran.stdout, ran.stderr) == ("{'x': 42}\n", "")


def test_decorated_functions_keep_their_types(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text("""
import latzero, latzero.aio

def blocking(app: latzero.App) -> None:
    @app.serve
    def double(n: int) -> int:
        return n * 2

    @app.serve("shout", concurrency=3)
    def shout(text: str) -> str:
        return text.upper()

    @app.on("done")
    def done(event: latzero.Event) -> None:
        double("three")

def asynchronous(app: latzero.aio.App) -> None:
    @app.serve(inline=True)
    def plain(n: int) -> int:
        return n
    plain("three")
    app.serve("other", plain, inline="no")

def converted(app: latzero.App) -> str | None:
    number: int = app.call("count", {"of": 1}, into=int, timeout=1.0)
    app.submit("count", into=int).result().upper()
    for items in app.stream("lists", into=list[int]):
        items.clear().upper()
    app.call("count", timeout="soon")
    maybe: str | None = app.call("maybe", into=str | None)
    return maybe or number

async def awaited(app: latzero.aio.App) -> None:
    (await app.call("count", into=int)).upper()
    (await app.submit("count", into=int).result()).upper()
    async for item in app.stream("count", into=int):
        item.upper()
""")
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "use.py"], cwd=tmp_path,
        capture_output=True, text=True, timeout=300,
    )
    found = [line.split(":")[1] for line in ran.stdout.splitlines() if ": error:" in line]
    expected = ["15", "21", "22", "26", "28", "28", "29", "31", "34", "35", "37"]
    assert found == expected, ran.stdout
