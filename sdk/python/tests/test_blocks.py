"""Memory blocks, with and without numpy."""

import ctypes
import gc
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from array import array as numbers

import latzero
import latzero.testing
import pytest

np = pytest.importorskip("numpy")


@pytest.fixture
def blocks(pair):
    """A block of six floats, written by one app and read by the other."""
    makes, reads = pair
    block = makes.block("frame", shape=(2, 3), dtype="f4", create=True)
    return block, reads.block("frame", write=False)


def test_written_and_read(blocks):
    writes, reads = blocks
    assert (writes.shape, writes.dtype, writes.nbytes) == ((2, 3), "<f4", 24)
    assert writes.is_mapped and writes.is_live and writes.version == 0
    with writes.write() as a:
        assert a.shape == (2, 3) and a.dtype == "f4" and not a.any()
        a[:] = [[1, 2, 3], [4, 5, 6]]
        assert reads.version == 0
    assert reads.version == 1
    copy = reads.read()
    assert copy.tolist() == [[1, 2, 3], [4, 5, 6]]
    copy[0] = 0
    out = np.empty((2, 3), "f4")
    assert reads.read(out=out) is out and out[1, 2] == 6
    with pytest.raises(ValueError):
        reads.read(out=np.empty(5, "f4"))
    assert reads.read_at(20, 4) == np.float32(6).tobytes()


@pytest.mark.parametrize("keep", [True, False])
def test_initial_content_of_a_draft(blocks, keep):
    block, _ = blocks
    for n in range(1, 5):
        with block.write(keep=keep) as a:
            if keep:
                assert (a == n - 1).all()
            a[:] = n
        assert (block.read() == n).all()


def test_a_part_is_written(blocks):
    block, _ = blocks
    with block.write(keep=False) as a:
        a[:] = 1
    with block.write(part=slice(1, 2)) as rows:
        assert rows.shape == (1, 3) and (rows == 1).all()
        rows[:] = 2
    assert block.read().tolist() == [[1, 1, 1], [2, 2, 2]]


def test_an_exception_discards_the_version(blocks):
    block, reads = blocks
    with pytest.raises(ZeroDivisionError):
        with block.write() as a:
            a[:] = 9
            1 / 0
    assert reads.version == 0 and not reads.read().any()
    with block.write() as a:  # The lock was given back.
        assert not a.any()


def test_a_draft_s_array_ends_with_it(blocks):
    block, _ = blocks
    with block.write() as a:
        a[:] = 1
    with pytest.raises(ValueError, match="read-only"):
        a[:] = 2
    assert memoryview(a.base).readonly
    assert (block.read() == 1).all()


def test_views_are_read_only_and_report_their_end(blocks):
    writes, reads = blocks
    with writes.write() as a:
        a[:] = 1
    view = reads.view()
    array = view.array
    assert array.sum() == 6 and view.valid and not view.stale and view.version == 1
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    assert memoryview(view).readonly and bytes(view)[:4] == np.float32(1).tobytes()
    with pytest.raises(latzero.BlockError) as raised:
        with reads.view():
            for n in range(2):
                with writes.write() as a:
                    a[:] = n
    assert raised.value.code == "contended"
    assert not view.valid
    with reads.view() as array:
        assert (array == 1).all()


def ask_for_a_writable_buffer(owner):
    ask = ctypes.pythonapi.PyObject_GetBuffer
    ask.argtypes = [ctypes.py_object, ctypes.c_void_p, ctypes.c_int]
    PyBUF_WRITABLE = 1
    ask(owner, ctypes.create_string_buffer(256), PyBUF_WRITABLE)


def test_a_view_is_a_buffer_with_a_type_and_a_shape(pair):
    makes, _ = pair
    for dtype, format in [("f4", "f"), ("i2", "h"), ("u8", "Q"), ("b1", "?"), ("f2", "e")]:
        block = makes.block(f"form-{dtype}", shape=(2, 3), dtype=dtype, create=True)
        with block.write() as a:
            a[1, 2] = 1
        view = block.view()
        shown = memoryview(view)
        assert (shown.format, shown.shape, shown.readonly) == (format, (2, 3), True)
        assert shown.itemsize * 6 == shown.nbytes == block.nbytes
        array = np.asarray(view)
        assert array.dtype == dtype and array.tolist() == block.read().tolist()
    with pytest.raises(BufferError, match="use `with block.write\\(\\)`"):
        ask_for_a_writable_buffer(view)
    # Read-only memory needs the version of DLPack that can say so.
    assert view.array.__dlpack__(max_version=(1, 0)) is not None
    with pytest.raises(BufferError):
        view.array.__dlpack__()
    # What `struct` has no letters for is bytes.
    block = makes.block("form-big", shape=4, dtype=">f4", create=True)
    assert memoryview(block.view()).shape == (16,)


def test_a_view_outlives_everything(latzero_server):
    with latzero.testing.server() as server:
        app = latzero.connect(server.url("makes"))
        block = app.block("b", shape=1000, dtype="u1", create=True)
        with block.write() as a:
            a[:] = 7
        view = block.view()
        part = view.array[10:20]
        block.resize(2000)
        assert view.stale and view.valid
        assert block.nbytes == 2000 and block.generation == 2 and block.read().nbytes == 2000
        block.remove()
        assert not block.is_live
        app.close()
    del app, block, view
    gc.collect()
    assert (part == 7).all()


def test_newer_versions_leave_copies_and_views_readable(blocks):
    writes, reads = blocks
    with writes.write() as a:
        a[:] = 1
    copy, view = reads.read(), reads.view()
    array = view.array
    with writes.write() as a:
        a[:] = 2
    # The block has two slots: the next version takes the other one.
    assert view.valid and (array == 1).all()
    with writes.write() as a:
        a[:] = 3
    assert not view.valid and not view.stale
    assert (copy == 1).all() and array.shape == (2, 3) and (reads.read() == 3).all()


def test_the_layout_says_what_a_read_gives(pair):
    app = pair[0]
    with app.block("grown", shape=(10,), dtype="f4", create="new") as block:
        block.resize(80)
        other = pair[1].block("grown")
        for of in (block, other):
            assert (of.shape, of.dtype, of.nbytes, of.read().nbytes) == (None, None, 80, 80)
        block.resize(40)
        assert (block.shape, block.dtype, block.read().shape) == ((10,), "<f4", (10,))


def test_named_fields_are_read_as_a_structured_dtype(pair):
    app, other = pair
    point = np.dtype([("x", "f4"), ("y", "f4")])
    block = app.block("points", shape=(3, 4), dtype=point, create="new")
    info = block.info()["layout"]
    assert info == {"dtype": "<f4", "shape": [3, 4, 2], "fields": ["x", "y"]}
    with block.write() as a:
        assert a.dtype == point and a.shape == (3, 4)
        a["y"][1] = 5
    # As others make it, and as it is asked for again.
    same = other.block("points", shape=block.shape, dtype=block.dtype)
    for of in (block, same):
        assert (of.shape, of.dtype) == ((3, 4), [("x", "<f4"), ("y", "<f4")])
        copy = of.read()
        assert copy.dtype == point and (copy["y"][1] == 5).all() and not copy["x"].any()
    with same.view() as a:
        assert a.dtype == point and a.shape == (3, 4) and a["y"].sum() == 20
        # The buffer has one more dimension: few consumers know named fields.
        assert np.asarray(same.view()).shape == (3, 4, 2)
    with block.write(part=slice(1, 2)) as a:
        assert a.shape == (1, 4) and a["y"].sum() == 20
    with pytest.raises(latzero.BlockError) as raised:
        other.block("points", shape=(3, 4), dtype=[("x", "f4"), ("z", "f4")])
    assert raised.value.code == "layout_mismatch"

    shared = app.share(np.zeros(2, point))
    assert shared.dtype == [("x", "<f4"), ("y", "<f4")]

    # Others stay bytes of their size.
    many = np.dtype([(f"a field with number {n}", "u1") for n in range(100)])
    for n, odd in enumerate([
        np.dtype([("x", "f4"), ("y", "f8")]), np.dtype([("x", "f4", 2)]), many,
        np.dtype({"names": ["x", "y"], "formats": ["f4", "f4"], "offsets": [4, 0]}),
    ]):
        block = app.block(f"odd-{n}", shape=5, dtype=odd, create="new")
        assert (block.dtype, block.shape) == (f"|V{odd.itemsize}", (5,))
        assert block.read().dtype == np.dtype(f"V{odd.itemsize}")


def test_named_fields_are_one_more_dimension_without_numpy(monkeypatch):
    monkeypatch.setattr(latzero._arrays, "numpy", lambda: None)
    layout = ([("x", "<f4"), ("y", "<f4")], [3])
    array = latzero._arrays.array(bytearray(24), layout)
    assert (array.shape, array.format) == ((3, 2), "f")
    assert latzero._arrays.layout_of([2, 2], "bf16") == (("bf16", [2, 2], []), 8)


def test_bf16_is_read_as_two_bytes_each(pair):
    class bfloat16:
        """As ml_dtypes calls the class of its elements."""

    app, other = pair
    for n, dtype in enumerate(["bf16", "bfloat16", bfloat16]):
        block = app.block(f"bf16-{n}", shape=(2, 3), dtype=dtype, create="new")
        assert (block.dtype, block.shape, block.nbytes) == ("bf16", (2, 3), 12)
        assert block.info()["layout"] == {"dtype": "bf16", "shape": [2, 3]}
        with block.write() as a:
            assert a.dtype == np.dtype("V2")
            a.view("u2")[:] = 0x3F80
        read = other.block(f"bf16-{n}", shape=(2, 3), dtype=block.dtype).read()
        assert read.dtype == np.dtype("V2") and read.shape == (2, 3)
        assert ((read.view("u2").astype("u4") << 16).view("f4") == 1.0).all()
    block.resize(24)
    assert (block.shape, block.dtype) == (None, None)
    assert app.block("bf16-none", shape=(0, 3), dtype="bf16", create=True).read().shape == (0, 3)


@pytest.mark.parametrize("end", ["resized", "removed", "killed", "closed"])
def test_what_stays_when_a_block_ends(end):
    with latzero.testing.server() as server:
        app = latzero.connect(server.url("app"))
        block = app.block("b", shape=4, dtype="u1", create=True)
        with block.write() as a:
            a[:] = 7
        view = block.view()
        writing = block.write()
        draft = writing.__enter__()
        draft[:] = 9
        if end == "resized":
            block.resize(8)
        elif end == "removed":
            block.remove()
        elif end == "killed":
            told = queue.Queue()
            app.on_state(told.put)
            server.kill()
            assert told.get(timeout=30) == "disconnected"
        else:
            block.close()
        if end == "closed":
            writing.__exit__(None, None, None)
        else:
            with pytest.raises(latzero.LatZeroError) as raised:
                writing.__exit__(None, None, None)
            assert raised.value.code == "lock_lost"
        assert view.array.tolist() == [7, 7, 7, 7]
        assert view.stale == (end in ("resized", "removed"))
        if end == "resized":
            assert block.is_live and block.read().tolist() == [7, 7, 7, 7, 0, 0, 0, 0]
        elif end != "closed":
            assert not block.is_live and block.read().tolist() == [7, 7, 7, 7]


def test_many_versions_under_one_lock(blocks):
    block, reads = blocks
    with block.writer() as writer:
        for n in range(1, 6):
            with writer.write(keep=False) as a:
                a[:] = n
        with pytest.raises(latzero.BlockError) as raised:
            reads.lock(wait=0).__enter__()
        assert raised.value.code == "locked"
    assert reads.version == 5 and (reads.read() == 5).all()


def test_waiting_for_versions(blocks):
    writes, reads = blocks
    with pytest.raises(latzero.Timeout):
        reads.wait(timeout=0.01)
    changes = reads.changes()
    seen = []
    waits = threading.Thread(target=lambda: seen.append(reads.wait(0, timeout=10)))
    waits.start()
    with writes.write() as a:
        a[:] = 1
    waits.join(10)
    assert seen == [1] and next(changes) == 1


def test_bytes_through_the_server(blocks):
    block, _ = blocks
    assert block.write_at(0, b"abcd") == 1
    assert block.cas(0, b"abcd", b"efgh") is None
    assert block.cas(0, b"abcd", b"ijkl") == b"efgh"
    assert block.read_at(0, 4) == b"efgh"
    with pytest.raises(latzero.BlockError) as raised:
        block.write_at(0, b"x", if_version=1)
    assert raised.value.code == "version_conflict"
    with block.lock(lease=5) as lock:
        assert lock.is_held and lock.fence > 0
        lock.renew()
    assert not lock.is_held


@pytest.mark.parametrize("how", ["tcp", "persistent"])
def test_blocks_that_are_not_mapped_are_copied(latzero_server, how):
    url = latzero_server.url("copies")
    if how == "tcp":
        url = f"latzero://copies@{latzero_server.address}?pool=default"
    with latzero.connect(url, transient=True) as app:
        kind = "persistent" if how == "persistent" else "shared"
        block = app.block(f"b-{how}", shape=4, dtype="i8", create="new", kind=kind)
        with block.write() as a:
            a[:] = 1
        with block.write(part=slice(2, 4)) as rows:
            rows += 1
        with block.writer() as writer, writer.write() as a:
            a[0] = 5
        assert block.read().tolist() == [5, 1, 2, 2]
        if how == "tcp":
            with pytest.raises(latzero.LatZeroError) as raised:
                block.view()
            assert raised.value.code == "storage"
        else:
            assert block.flush() == block.version
        block.remove()


def test_a_block_is_an_argument(pair):
    serves, calls = pair

    @serves.serve
    def mean(frame, request: latzero.Request):
        assert isinstance(frame, latzero.Block) and request.block(frame.id).id == frame.id
        with frame.view() as a:
            return float(a.mean())

    @serves.serve
    def fill(frame, value: float):
        with frame.write() as a:
            a[:] = value

    block = calls.block("frame", shape=(100, 100), dtype="f4", create=True)
    with block.write() as a:
        a[:] = 2
    assert calls.call("mean", frame=block) == 2
    calls.call("fill", frame=latzero.writable(block), value=3)
    assert (block.read() == 3).all()
    with pytest.raises(latzero.LatZeroError):
        calls.call("fill", frame=block, value=4)
    assert calls.call("mean", frame=calls.share(np.arange(5, dtype="f8"))) == 2
    with pytest.raises(latzero.BadRequest, match="blocks travel only with calls"):
        calls.emit("mean", frame=block)


def test_a_block_is_pickled_as_its_name(blocks):
    block, reads = blocks
    with block.write() as a:
        a[:] = 3
    again = pickle.loads(pickle.dumps(block))
    assert (again.id, again.pool, again.read().sum()) == (block.id, block.pool, 18)
    with again.write() as a:
        a[:] = 4
    assert reads.read().sum() == 24
    # Through the app of the same name.
    assert pickle.loads(pickle.dumps(reads))._inner.app_id == reads._inner.app_id


def test_a_pickled_block_is_opened_in_another_process(latzero_server, blocks):
    block, _ = blocks
    with block.write() as a:
        a[:] = 3
    script = (
        "import latzero, pickle, sys\n"
        "data = sys.stdin.buffer.read()\n"
        "try:\n"
        "    pickle.loads(data)\n"
        "except RuntimeError as error:\n"
        "    assert 'connect first' in str(error)\n"
        "app = latzero.connect(sys.argv[1])\n"
        "print(pickle.loads(data).read().sum())\n"
    )
    url = latzero_server.url("unpickles", block.pool)
    ran = subprocess.run(
        [sys.executable, "-c", script, url], input=pickle.dumps(block), capture_output=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"18.0\n", b"")


def test_an_app_is_not_pickled(latzero_app):
    with pytest.raises(TypeError, match="connect in each process"):
        pickle.dumps(latzero_app)


def test_how_blocks_are_opened(pair):
    makes, others = pair
    with pytest.raises(latzero.BlockError):
        others.block("nothing")
    with pytest.raises(TypeError):
        makes.block("b", create=True)
    makes.block("b", size=10, create="new", readable_by=[others.app_id])
    with pytest.raises(latzero.BlockError):
        makes.block("b", size=10, create="new")
    assert makes.block("b", size=10, create=True).read().nbytes == 10
    block = others.block("b")  # For reading: more is not allowed.
    with pytest.raises(latzero.Forbidden):
        block.write().__enter__()
    assert [b["block_id"] for b in makes.blocks()] == ["b"]
    block.close()
    with pytest.raises(latzero.BlockError, match="closed"):
        block.read()


def test_without_numpy(latzero_server):
    script = """
import sys
sys.modules["numpy"] = None
import latzero
app = latzero.connect(sys.argv[1], transient=True)
block = app.block("plain", shape=(2, 2), dtype="<i4", create=True)
with block.write() as a:
    assert (a.format, a.shape) == ("i", (2, 2)), (a.format, a.shape)
    a[1, 1] = 7
try:
    a[0, 0] = 1
except ValueError:
    pass
else:
    sys.exit("the array of a draft outlived it")
assert block.read().tolist() == [[0, 0], [0, 7]]
with block.view() as a:
    assert a.readonly and a[1, 1] == 7
block.remove()
"""
    run = subprocess.run(
        [sys.executable, "-c", script, latzero_server.url("plain")], timeout=30,
        capture_output=True, text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_many_blocks_leave_nothing(latzero_app):
    import os

    def count():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), sum(1 for _ in open("/proc/self/maps"))

    def use():
        block = latzero_app.block("one", size=4096, create=True)
        with block.write() as a:
            a[:] = 1
        with block.view() as a:
            assert a[0] == 1

    use()
    before = count()
    for _ in range(10_000):
        use()
    after = count()
    assert after[0] <= before[0] + 2 and after[1] <= before[1] + 4


def test_share_uses_a_block_again_once_its_call_was_answered(pair):
    serves, calls = pair
    serves.serve("sum", lambda frame: float(frame.read().sum()))
    seen = set()
    for n in range(5):
        block = calls.share(np.full(100, n, "f4"))
        seen.add(block.id)
        assert calls.call("sum", frame=block) == 100 * n
        del block
    assert len(seen) == 1
    # Not while a handle or a view of it exists, and not for another size or type.
    first = calls.share(np.zeros(100, "f4"))
    view = first.view()
    others = [calls.share(np.ones(n, t)) for n, t in ((100, "f4"), (50, "f8"), (400, "u1"))]
    assert len({first.id, *(other.id for other in others)}) == 4
    first_id = first.id
    del first
    assert calls.share(np.ones(100, "f4")).id != first_id
    assert view.array.sum() == 0 and view.valid
    assert calls.share(b"bytes").nbytes == 5


@pytest.mark.parametrize("shared, dtype, shape", [
    (numbers("f", [1, 2, 3]), "<f4", (3,)),
    (numbers("l", [1, 2]), "<i8", (2,)),
    (memoryview(numbers("h", range(6))).cast("B").cast("h", (2, 3)), "<i2", (2, 3)),
    (memoryview(numbers("i", range(6)))[::2], "<i4", (3,)),
    (np.float32(1.5), "<f4", ()),
    (np.array(3.5), "<f8", ()),
    (numbers("b", [-1, 2]), "|i1", (2,)),
    ((ctypes.c_int * 2)(1, 2), "<i4", (2,)),
    ((ctypes.c_double * 2 * 1)((1, 2)), "<f8", (1, 2)),
    ((ctypes.c_bool * 2)(True, False), "|b1", (2,)),
    (memoryview(np.array([1, 2], ">i4")), ">i4", (2,)),
    (memoryview(np.array([1, 2], "c8").real), "<f4", (2,)),
    (memoryview(np.array([[1, 2]], "u1")), "|u1", (1, 2)),
    (b"bytes", None, None),
    (bytearray(b"bytes"), None, None),
    (memoryview(b"bytes")[::2], None, None),
])
def test_share_keeps_the_type_and_shape_of_any_buffer(pair, shared, dtype, shape):
    serves, calls = pair
    serves.serve("read", lambda frame: [frame.dtype, frame.shape, frame.read().tolist()])
    expected = np.array(shared).tolist() if dtype else list(bytes(shared))
    shape = None if shape is None else list(shape)
    assert calls.call("read", frame=calls.share(shared)) == [dtype, shape, expected]


@pytest.mark.parametrize("dtype", ["c8", "c16"])
def test_share_keeps_complex_numbers(latzero_app, dtype):
    for numbers in (np.array([1, 2j], dtype), memoryview(np.array([1, 2j], dtype))):
        assert latzero_app.share(numbers).read().tolist() == [1, 2j]


@pytest.mark.parametrize("array, why", [
    (np.array([{}]), "an array of object"), (np.ma.masked_equal([1, 2], 2), "a masked array"),
    (np.datetime64("2026-11-28"), r"an array of datetime64\[D\]"),
    (np.str_("a"), "an array of <U1"), (np.array(["a", "b"]), "an array of <U1"),
])
def test_share_refuses_what_is_no_number(latzero_app, array, why):
    with pytest.raises(TypeError, match=f"{why} can't be shared"):
        latzero_app.share(array)


@pytest.mark.parametrize("number", [-1, 2**64])
def test_offsets_and_sizes_out_of_range_are_bad_requests(pair, number):
    block = pair[0].block("small", size=8, create=True)
    for use in (
        lambda: block.read_at(number, 1), lambda: block.write_at(number, b"x"),
        lambda: block.write_at(0, b"x", if_version=number), lambda: block.cas(number, b"x", b"y"),
        lambda: block.wait(number, 0), lambda: block.resize(number),
        lambda: pair[0].stream("x", window=number),
    ):
        with pytest.raises(latzero.BadRequest, match=f"{number} is out of range"):
            use()


def test_share_leaves_a_block_alone_that_a_handler_may_still_read(pair):
    serves, calls = pair
    inside, release, read = threading.Event(), threading.Event(), queue.Queue()

    @serves.serve
    def late(frame):
        inside.set()
        assert release.wait(20)
        read.put(frame.read().tolist())

    block = calls.share(np.full(3, 1, "u1"))
    call = calls.submit("late", frame=block)
    assert inside.wait(20)
    first = block.id
    del block
    assert calls.share(np.full(3, 2, "u1")).id != first
    # A cancelled call's handler runs on.
    call.cancel()
    assert calls.share(np.full(3, 3, "u1")).id != first
    release.set()
    assert read.get(timeout=20) == [1, 1, 1]

    # Neither while another app is attached to it.
    block = calls.share(np.full(3, 4, "u1"))
    first, theirs = block.id, serves.block(block.id)
    del block
    assert calls.share(np.full(3, 5, "u1")).id != first
    assert theirs.read().tolist() == [4, 4, 4]


def test_share_makes_another_block_after_a_restart():
    with latzero.testing.server() as server, latzero.connect(server.url("shares")) as app:
        app.serve("sum", lambda frame: float(frame.read().sum()))
        for n in range(3):
            block = app.share(np.full(10, n, "f4"))
            assert app.call("sum", frame=block, to="shares") == 10 * n
            del block
            server.restart()
            deadline = time.monotonic() + 20
            while True:
                try:
                    app.ping()
                    break
                except latzero.Disconnected:
                    assert time.monotonic() < deadline, "the app does not reconnect"


def in_debug(latzero_server, body, url):
    """Runs a script with a block `b` of four bytes, which is called `url`, under LATZERO_DEBUG."""
    script = (
        "import latzero, numpy as np, sys, gc\n"
        "app = latzero.connect(sys.argv[1], transient=True)\n"
        "b = app.block(app.app_id, shape=4, dtype='u1', create=True)\n" + body
    )
    ran = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", script, latzero_server.url(url)],
        capture_output=True, text=True, timeout=60, env={**os.environ, "LATZERO_DEBUG": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, ran.stderr


@pytest.mark.parametrize("end", ["del s", "b.read()", "sys.exit()"])
@pytest.mark.parametrize("how", ["b.write()", "w.write(keep=False)"])
def test_debug_finds_a_write_after_the_end(latzero_server, end, how):
    name = f"debug-{len(end)}-{len(how)}"
    out, err = in_debug(latzero_server, f"""
w = b.writer()
if {how[0] == "w"}:
    w.__enter__()
with {how} as a:
    a[:] = 1
    s = a[1:]
w.__exit__()
s[:] = 9
print(b.read().tolist(), a.flags.writeable, flush=True)
del a
{end}
""", name)
    assert out == "[1, 1, 1, 1] False\n"
    assert f"ResourceWarning: an array of block default/{name} was written after" in err


def test_debug_changes_nothing_else(latzero_server):
    out, err = in_debug(latzero_server, """
with b.write() as a:
    a[:] = [1, 2, 3, 4]
with b.write(part=slice(1, 3)) as a:
    assert a.tolist() == [2, 3]
    a *= 2
with b.writer() as w:
    with w.write() as a:
        a += 1
try:
    with b.write() as a:
        a[:] = 0
        1 / 0
except ZeroDivisionError:
    pass
print(b.read().tolist(), b.version)
""", "debug-else")
    assert (out, err) == ("[2, 5, 7, 5] 3\n", "")


def test_read_fills_no_array_of_another_type(latzero_server):
    with latzero.connect(latzero_server.url("fills"), transient=True) as app:
        block = app.block("filled", shape=3, dtype="i4", create=True)
        for wrong in ["f4", ">i4"]:
            with pytest.raises(ValueError, match="has the type"):
                block.read(out=np.zeros(3, wrong))
        with pytest.raises(ValueError, match="has the type"):
            block.read(out=numbers("f", [0] * 3))
        assert block.read(out=numbers("i", [0] * 3)) == numbers("i", [0] * 3)
        assert block.read(out=np.zeros(3, "i4")).dtype == "i4"
        assert block.read(out=np.zeros(12, "u1")).nbytes == 12
        assert block.read(out=bytearray(12)) == bytes(12)


def test_read_fills_no_array_of_another_shape(latzero_server):
    with latzero.connect(latzero_server.url("fills"), transient=True) as app:
        block = app.block("shaped", shape=(2, 3), dtype="i4", create=True)
        with pytest.raises(ValueError, match=r"has the shape \(3, 2\)"):
            block.read(out=np.zeros((3, 2), "i4"))
        for out in (np.zeros((2, 3), "i4"), np.zeros(6, "i4"), np.zeros((24, 1), "u1")):
            assert block.read(out=out) is out


def test_a_part_is_a_slice(blocks):
    with pytest.raises(TypeError, match="part is a slice of rows"):
        blocks[0].write(part=1).__enter__()


@pytest.mark.parametrize("options", [
    {"kind": "zz"}, {"consistency": "zz"}, {"lifetime": "zz"},
], ids=str)
def test_a_word_that_an_option_does_not_have_is_named(latzero_server, options):
    with latzero.connect(latzero_server.url("words"), transient=True) as app:
        name, = options
        with pytest.raises(ValueError, match=f"{name} is [a-z ]+, not zz"):
            app.block("worded", size=8, create=True, **options)


@pytest.mark.parametrize("time", [-1, float("nan"), float("inf")])
def test_a_time_is_a_number_from_0_on(latzero_server, time):
    with latzero.connect(latzero_server.url("times"), transient=True) as app:
        with pytest.raises(ValueError, match="from 0 on"):
            app.call("any", timeout=time)
        with pytest.raises(ValueError, match="from 0 on"):
            latzero.connect(latzero_server.url("times-too"), connect_timeout=time)
