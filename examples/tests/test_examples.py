"""The examples that take several languages, and the notebook, run as their README says.

`cargo xtask test --examples` builds what they need, installs the Python package into the
environment of these tests, and names the npm packages and the Rust programs.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import latzero
import latzero.testing
import pytest

EXAMPLES = Path(__file__).parents[1]
RUST = Path(os.environ["EXAMPLES_PROGRAMS"])
PACKAGES = Path(os.environ["EXAMPLES_PACKAGES"])
SECONDS = 120

# A shell starts its background jobs with SIGINT ignored, which the programs would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """The examples in a directory into which the npm packages are installed, without a network."""
    place = tmp_path_factory.mktemp("examples")
    for name in ("classifier", "comeback", "frames", "notebook", "vault"):
        shutil.copytree(EXAMPLES / name, place / name)
    (place / "package.json").write_text('{"private": true}')
    install = ["npm", "install", "--offline", "--silent", "--ignore-scripts", "--no-audit",
               "--no-fund", "--cache", place / "cache", *PACKAGES.glob("*.tgz")]
    subprocess.run(install, cwd=place, check=True)
    return place


class Programs:
    """Starts programs, which end with their test."""

    def __init__(self, place, data_dir, stack):
        self._place, self._stack = place, stack
        self.env = {**os.environ, "LATZERO_DATA_DIR": data_dir}

    def command(self, name, *args):
        path = self._place / name
        first = {".py": [sys.executable, path], ".mjs": ["node", path]}
        return [*map(str, first.get(path.suffix, [RUST / name])), *map(str, args)]

    def start(self, name, *args):
        """Starts a program, and waits until it says that it is ready; what it said."""
        program = subprocess.Popen(
            self.command(name, *args), env=self.env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, text=True,
        )
        self._stack.callback(lambda: (program.kill(), program.wait(), program.stdout.close()))
        said = program.stdout.readline()
        assert said.startswith("ready"), said
        program.said = said
        return program

    def run(self, name, *args):
        """Runs a program to its end; what it wrote."""
        ran = subprocess.run(
            self.command(name, *args), env=self.env, stdin=subprocess.DEVNULL, timeout=SECONDS,
            capture_output=True, text=True,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout


@pytest.fixture
def server():
    with latzero.testing.server() as server:
        yield server


@pytest.fixture
def programs(place, server):
    with contextlib.ExitStack() as stack:
        yield Programs(place, server.data_dir, stack)


def test_messages_are_sorted_over_http(programs):
    classifier = programs.start("classifier/classifier.py")
    right, of = map(int, re.match(r"ready: (\d+) of (\d+) unseen", classifier.said).groups())
    assert of == 20 and right >= 16
    web = programs.start("classifier/web.mjs")
    url = web.said.split()[1]

    def post(body):
        request = urllib.request.Request(url, data=body.encode())
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return json.load(response)

    lines = (EXAMPLES / "classifier/messages.tsv").read_text().splitlines()
    topics, texts = zip(*(line.split("\t") for line in lines[::5]))
    found = [answer["topic"] for answer in post("\n".join(texts))]
    # Node makes the same vectors of them as Python.
    assert sum(map(str.__eq__, found, topics)) == right
    assert post("Where is my parcel?")[0]["topic"] == "delivery"
    with pytest.raises(urllib.error.HTTPError) as refused:
        post("\n")
    assert refused.value.code == 400
    classifier.send_signal(signal.SIGINT)
    classifier.wait(SECONDS)
    with pytest.raises(urllib.error.HTTPError) as refused:
        post("Where is my parcel?")
    assert json.load(refused.value)["code"] == "no_handler"


def mapped_files(pid):
    """The files of memory that a process has mapped, by device and inode."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {tuple(line.split()[3:5]) for line in maps if "/memfd:lz:" in line}


def test_three_languages_share_one_mapping_of_a_frame(programs):
    denoise = programs.start("frames/denoise.py")
    describe = programs.start("frames/describe.mjs")
    camera = subprocess.Popen(
        programs.command("frames", 100), env=programs.env, stdout=subprocess.PIPE, text=True
    )
    try:
        line = r"frame \d+: mean (\S+), noise (\S+) -> (\S+), \d+ ms\n"
        mean, before, after = map(float, re.fullmatch(line, camera.stdout.readline()).groups())
        assert 0 < mean < 1 and 0.055 < before < 0.06 and after < before / 2.5
        # A handler has the block mapped while it works on a frame, and one frame follows another.
        shared = set()
        pids = (camera.pid, denoise.pid, describe.pid)
        while not shared and camera.poll() is None:
            shared = set.intersection(*map(mapped_files, pids))
        assert len(shared) == 1
    finally:
        camera.kill()
        camera.wait()
        camera.stdout.close()


def test_a_killed_worker_comes_back_as_itself(programs):
    said = programs.run("comeback/main.py")
    lives = re.findall(r"worker (\d+): I am (\w+)\n", said)
    begins = re.findall(r"worker (\d+): attempt (\d), from step (\d+)\n", said)
    [(step, steps)] = re.findall(r"killed at step (\d+) of (\d+)\n", said)
    assert len(lives) == 2 and lives[0][0] != lives[1][0]
    assert lives[0][1] == lives[1][1]
    assert [pid for pid, _ in lives] == [pid for pid, _, _ in begins]
    assert begins[0][1:] == ("1", "0")
    assert begins[1][1] == "2" and int(step) <= int(begins[1][2]) < int(steps)
    total = sum(n**0.5 for n in range(int(steps) * 100_000))
    [answer] = re.findall(r"the sum of the roots is (\S+)\n", said)
    assert float(answer) == pytest.approx(total)


def files_with(data_dir, text):
    files = [path for path in Path(data_dir).rglob("*") if path.is_file()]
    return [path.name for path in files if text in path.read_bytes()]


def test_an_encrypted_pool_is_read_by_its_members_alone(programs, server, tmp_path):
    keys = tmp_path / "vault.keys"
    latzero_program = latzero.find_program()
    env = {**programs.env, "XDG_STATE_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    programs.env = env
    for command in (
        ["keys", "new", "vault", "--file", keys],
        ["pools", "create", "vault", "--encrypted", "--keys", keys],
    ):
        subprocess.run([latzero_program, *command], env=env, check=True, capture_output=True)
    programs.start("vault/ledger.py", keys)
    programs.start("vault/auditor.mjs", keys)
    said = programs.run("vault", keys).splitlines()
    assert said[0] == "the ledger has 1 secret"
    assert said[1] == 'the auditor says: {"different":14,"letters":27}'
    assert said[2] == "the ledger says: no_secret: there is no secret called 'window'"
    assert said[3].endswith("waits on the server's disk")
    assert said[4].startswith("an app without keys: unauthenticated: ")

    # The same call in a pool that is not encrypted is on the disk for everybody to read.
    secret = b"the third brick on the left"
    assert files_with(server.data_dir, secret) == []
    with latzero.connect(server.url("owner-plain")) as app:
        app.park("bury", secret=secret.decode())
        assert files_with(server.data_dir, secret) != []


def test_checkers_of_types_accept_the_examples():
    files = sorted(path for path in EXAMPLES.glob("*/*.py") if path.parent.name != "tests")
    assert len(files) >= 5
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--scripts-are-modules", *files],
        capture_output=True, text=True, timeout=SECONDS,
    )
    assert ran.returncode == 0, ran.stdout


def test_the_notebook_shows_what_it_says(place, server, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("LATZERO_DATA_DIR", server.data_dir)
    # Jupyter starts its kernels over files of the user; these are a private place for them.
    monkeypatch.setenv("HOME", str(place))
    notebook = nbformat.read(place / "notebook/latzero.ipynb", as_version=4)
    nbformat.validate(notebook)

    def outputs():
        """What each cell shows, as text."""
        return [
            [
                output.get("text") or output.get("data", {}).get("text/plain")
                for output in cell.get("outputs", [])
            ]
            for cell in notebook.cells
        ]

    written = outputs()
    assert sum(map(len, written)) >= 5
    nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3").execute()
    assert outputs() == written
