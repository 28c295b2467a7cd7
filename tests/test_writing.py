"""Caches come out whole and the same, whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from featcache import FeatureCache, InputError, Labels
from featcache.writing import CacheContents, CacheWriter

# What is written is a function of the row alone. The same text is a module here
# and a program in other processes, which can then be killed.
WORKER = '''
import os, signal, sys, time
import numpy as np
from featcache.writing import CacheContents, CacheWriter

N, V, D, ROWS = 23, 2, 6, 4

def block(start, stop):
    rows = np.arange(start, stop)[:, None, None]
    features = np.sin(7.0 * rows + 3.0 * np.arange(V)[:, None] + np.arange(D))
    return features, [f"bad {row}" if row % 11 == 3 else None for row in range(start, stop)]

def contents(**changes):
    parts = dict(ids=np.array([f"image{row}" for row in range(N)]), views=["eval", "flip"], dim=D)
    return CacheContents(**parts | changes)

def writer(path, **changes):
    options = dict(fingerprint={"network_id": "net-a", "threads": 2}, block_rows=ROWS)
    return CacheWriter(path, contents(), **options | changes)

def run(path, pause=0.0, **changes):
    with writer(path, **changes) as out:
        for start, stop in out.pending():
            time.sleep(pause)
            out.write(start, *block(start, stop))
        out.finish({"seconds": 1.5})

def in_child(action):
    """Run `action` in a forked process; its exit status, negative if killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

if __name__ == "__main__":
    run(sys.argv[1], pause=float(sys.argv[2]))
'''


@pytest.fixture(scope="session")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("worker") / "worker.py"
    path.write_text(WORKER)
    return path


@pytest.fixture(scope="session")
def worker(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("worker", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def whole(worker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an unbroken run."""
    path = tmp_path_factory.mktemp("whole") / "x.h5"
    worker.run(path)
    return path


def start_python(script: Path, code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process that has the worker at hand and one thread."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(script.parent)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def python(script: Path, code: str, *arguments: object) -> str:
    process = start_python(script, code, *arguments)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def everything(path: Path) -> tuple[bytes, list[bool], dict[str, str]]:
    with h5py.File(path) as file:
        reasons = dict(
            zip(
                file["skipped/id"].asstr()[:].tolist(),
                file["skipped/reason"].asstr()[:].tolist(),
                strict=True,
            )
        )
        return file["features"][:].tobytes(), file["valid"][:].tolist(), reasons


def feature_offset(path: Path) -> int:
    with h5py.File(path) as file:
        return int(file["features"].id.get_offset())


def write_some(out: CacheWriter, worker: ModuleType, count: int) -> None:
    for start, stop in out.pending()[:count]:
        out.write(start, *worker.block(start, stop))


def interrupt(out: CacheWriter, worker: ModuleType, count: int) -> None:
    with out:
        write_some(out, worker, count)
        raise KeyboardInterrupt


def flip_bit(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 4]))


# ------------------------------------------------------------------- content


def test_file_has_what_was_written(worker: ModuleType, whole: Path) -> None:
    features, reasons = worker.block(0, worker.N)
    bad = [row for row, reason in enumerate(reasons) if reason is not None]
    expected = features.astype(np.float16)
    expected[bad] = 0
    with h5py.File(whole) as file:
        np.testing.assert_array_equal(file["features"][:], expected)
        assert np.flatnonzero(~file["valid"][:]).tolist() == bad == [3, 14]
        assert file["skipped/id"].asstr()[:].tolist() == ["image3", "image14"]
        assert file["skipped/reason"].asstr()[:].tolist() == ["bad 3", "bad 14"]
        assert file["ids"].asstr()[:].tolist() == [f"image{row}" for row in range(worker.N)]
        starts, hashes = file["blocks/start"][:].tolist(), file["blocks/sha256"].asstr()[:]
        assert starts == [0, 4, 8, 12, 16, 20]
        for start, stop, digest in zip(starts, [*starts[1:], worker.N], hashes, strict=True):
            assert hashlib.sha256(file["features"][start:stop].tobytes()).hexdigest() == digest
        provenance = json.loads(file.attrs["provenance"])
    assert provenance["seconds"] == 1.5
    assert list(whole.parent.iterdir()) == [whole]


@settings(derandomize=True, deadline=None, database=None, max_examples=25)
@given(data=st.data())
def test_order_and_interruptions_change_nothing(
    worker: ModuleType, whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("shuffled") / "x.h5"
    done = False
    while not done:
        with worker.writer(path) as out:
            order = data.draw(st.permutations(out.pending()))
            count = data.draw(st.integers(1, len(order)))
            for start, stop in order[:count]:
                out.write(start, *worker.block(start, stop))
            assert out.pending() == sorted(order[count:])
            done = count == len(order)
            if done:
                out.finish({})
    assert everything(path) == everything(whole)


def test_partial_is_no_cache_and_stays_after_an_exception(
    worker: ModuleType, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.h5"
    with pytest.raises(KeyboardInterrupt):
        interrupt(worker.writer(path), worker, 2)
    assert not path.exists()
    with pytest.raises(InputError, match=r"only the unfinished x\.h5\.partial is there"):
        FeatureCache(path)
    with pytest.raises(InputError, match=r"x\.h5\.partial: an unfinished cache"):
        FeatureCache(tmp_path / "x.h5.partial")
    with worker.writer(path) as out:
        assert out.messages == []
        assert out.pending() == [(8, 12), (12, 16), (16, 20), (20, 23)]
    worker.run(path)
    assert everything(path) == everything(whole)


def test_without_resume_nothing_is_taken_over_or_left(worker: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with worker.writer(path) as out:
        write_some(out, worker, 3)
    out = worker.writer(path, resume=False)
    assert len(out.pending()) == 6
    with pytest.raises(KeyboardInterrupt):
        interrupt(out, worker, 1)
    assert list(tmp_path.iterdir()) == []


def test_features_from_elsewhere_give_up_no_extraction_in_silence(
    worker: ModuleType, tmp_path: Path
) -> None:
    """Days of work may be in it."""
    path = tmp_path / "x.h5"
    with worker.writer(path) as out:
        write_some(out, worker, 3)
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}
    assert sorted(before) == ["x.h5.journal", "x.h5.partial"]
    with pytest.raises(InputError, match=r"x\.h5\.partial: was begun with other settings; pass "):
        FeatureCache.write(path, np.ones((2, 3)), ["a", "b"])
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == before
    FeatureCache.write(path, np.ones((2, 3)), ["a", "b"], overwrite=True)
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_write_has_left_may_go(worker: ModuleType, tmp_path: Path) -> None:
    path, features = tmp_path / "x.h5", np.ones((2, 3))

    class Deadly:
        shape, dtype = features.shape, features.dtype

        def __getitem__(self, rows: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    status = worker.in_child(lambda: FeatureCache.write(path, Deadly(), ["a", "b"]))
    assert status == -signal.SIGKILL
    assert (tmp_path / "x.h5.partial").exists()
    FeatureCache.write(path, features, ["a", "b"])
    assert list(tmp_path.iterdir()) == [path]


def test_existing_target_is_kept_until_the_end(worker: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    path.write_bytes(b"old")
    with pytest.raises(InputError, match=r"x\.h5: exists already; pass --overwrite"):
        worker.writer(path)
    assert list(tmp_path.iterdir()) == [path]
    with worker.writer(path, overwrite=True) as out:
        write_some(out, worker, 6)
        assert path.read_bytes() == b"old"
        out.finish({})
    assert FeatureCache(path).shape == (worker.N, worker.V, worker.D)
    with pytest.raises(InputError, match="is a folder"):
        worker.writer(tmp_path, overwrite=True)


def test_an_old_target_with_equal_features_is_not_taken_for_the_new(
    worker: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "x.h5"
    worker.run(path)
    options: dict[str, Any] = {"fingerprint": {"network_id": "net-b"}, "overwrite": True}
    with worker.writer(path, **options) as out:
        write_some(out, worker, 6)
    (tmp_path / "x.h5.partial").unlink()
    with worker.writer(path, **options) as out:
        assert len(out.pending()) == 6


def test_misuse_is_refused(worker: ModuleType, tmp_path: Path) -> None:
    features, reasons = worker.block(0, 4)
    with worker.writer(tmp_path / "x.h5") as out:
        with pytest.raises(ValueError, match="begins no pending block"):
            out.write(2, features, reasons)
        with pytest.raises(ValueError, match="expected"):
            out.write(0, features[:3], reasons[:3])
        with pytest.raises(ValueError, match="expected"):
            out.write(0, features, reasons[:3])
        out.write(0, features, reasons)
        with pytest.raises(ValueError, match="begins no pending block"):
            out.write(0, features, reasons)
        with pytest.raises(ValueError, match="5 blocks are not written yet"):
            out.finish({})
    with pytest.raises(ValueError, match="is closed"):
        out.write(4, features, reasons)
    with pytest.raises(InputError, match="block_rows"):
        worker.writer(tmp_path / "y.h5", block_rows=0)


@pytest.mark.parametrize("value", [1e6, -1e6, np.nan, np.inf])
def test_a_feature_that_is_no_float16_is_named(
    worker: ModuleType, tmp_path: Path, value: float
) -> None:
    features, _ = worker.block(4, 8)
    features[2, 1, 5] = value
    with worker.writer(tmp_path / "x.h5") as out:
        with pytest.raises(InputError, match=r"image6, view flip, dimension 5: feature"):
            out.write(4, features, [None] * 4)
        assert (4, 8) in out.pending()
        # The features of an image that could not be read are nobody's concern.
        out.write(4, features, [None, None, "not an image", None])
        assert (4, 8) not in out.pending()


def test_largest_float16_is_kept(tmp_path: Path) -> None:
    contents = CacheContents(ids=np.array(["a"]), views=["eval"], dim=3)
    features = np.array([[[65504.0, -65504.0, 1e-9]]])
    with CacheWriter(tmp_path / "x.h5", contents, fingerprint={}) as out:
        out.write(0, features, [None])
        cache = FeatureCache(out.finish())
    np.testing.assert_array_equal(cache.features, features.astype(np.float16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": np.array([], dtype=str)}, "no images"),
        ({"views": []}, "at least one view"),
        ({"views": ["eval", "eval"]}, "names of views that differ"),
        ({"dim": 0}, "at least one view"),
        ({"classes": ["a", "a"]}, "'a' is listed twice"),
        ({"bias": np.zeros(3)}, "a bias without a weight"),
        ({"classes": ["a", "b"], "weight": np.zeros((3, 6))}, r"\(3, 6\), expected \(2, 6\)"),
        ({"classes": ["a"], "class_names": ["one", "two"]}, "class_names has shape"),
        ({"ids": np.array(["\udce9"])}, "not valid Unicode"),
    ],
)
def test_contents_that_disagree_are_refused(
    worker: ModuleType, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        CacheWriter(tmp_path / "x.h5", worker.contents(**changes), fingerprint={})
    assert not (tmp_path / "x.h5.partial").exists()


def test_labels_of_other_images_or_classes_are_refused(tmp_path: Path) -> None:
    labels = Labels(["a", "b"], ["k", "l"], csr_matrix((2, 2)))
    for ids, classes, message in (
        (["a", "c"], ["k", "l"], r"number 1 is 'b' of the labels, 'c'.*labels\.select\(ids\)"),
        (["a", "b"], ["k"], r"2 of the labels, 1 of the cache.*labels\.restrict"),
    ):
        contents = CacheContents(np.array(ids), ["eval"], 2, labels, np.array(classes))
        with pytest.raises(InputError, match=message):
            CacheWriter(tmp_path / "x.h5", contents, fingerprint={})


def test_memory_is_bounded_by_a_block(tmp_path: Path) -> None:
    n, d = 512, 2**15
    contents = CacheContents(np.arange(n).astype(str), ["eval"], d)
    options: dict[str, Any] = {"fingerprint": {}, "block_rows": 16}  # 1 MiB of 32
    block, none = np.ones((16, 1, d), np.float16), [None] * 16
    tracemalloc.start()
    try:
        with CacheWriter(tmp_path / "x.h5", contents, **options) as out:
            for start, _ in out.pending()[:-1]:
                out.write(start, block, none)
        with CacheWriter(tmp_path / "x.h5", contents, **options) as out:
            out.write(n - 16, block, none)
            FeatureCache(out.finish()).verify()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20


# -------------------------------------------------------------------- damage


def test_flipped_bits_are_found_and_made_again(
    worker: ModuleType, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.h5"
    with worker.writer(path) as out:
        write_some(out, worker, 4)
    partial = tmp_path / "x.h5.partial"
    row_bytes = worker.V * worker.D * 2
    flip_bit(partial, feature_offset(partial) + 9 * row_bytes + 1)
    with worker.writer(path) as out:
        assert out.pending() == [(8, 12), (16, 20), (20, 23)]
        assert len(out.messages) == 1
        assert "rows 8 to 11" in out.messages[0]
    worker.run(path)
    assert everything(path) == everything(whole)


def test_bits_that_flip_before_the_end_stop_it(
    worker: ModuleType, whole: Path, tmp_path: Path
) -> None:
    path, partial = tmp_path / "x.h5", tmp_path / "x.h5.partial"
    with worker.writer(path) as out:
        write_some(out, worker, 6)
        flip_bit(partial, feature_offset(partial))
        with pytest.raises(InputError, match="the first at row 0, are not what was written"):
            out.finish({})
        assert out.pending() == [(0, 4)]
    assert not path.exists()
    worker.run(path)
    assert everything(path) == everything(whole)


@pytest.mark.parametrize("kept", ["nothing", "100 bytes", "10 rows", "all but one byte"])
def test_cut_partial_is_rebuilt(worker: ModuleType, whole: Path, tmp_path: Path, kept: str) -> None:
    path, partial = tmp_path / "x.h5", tmp_path / "x.h5.partial"
    with worker.writer(path) as out:
        write_some(out, worker, 6)
    start, row_bytes = feature_offset(partial), worker.V * worker.D * 2
    size, saved = {
        "nothing": (0, 0),
        "100 bytes": (100, 0),
        "10 rows": (start + 10 * row_bytes, 2),
        "all but one byte": (start + worker.N * row_bytes - 1, 5),
    }[kept]
    os.truncate(partial, size)
    with worker.writer(path) as out:
        assert f"{saved} of 6 blocks could be saved" in out.messages[0]
        assert len(out.pending()) == 6 - saved
    worker.run(path)
    assert everything(path) == everything(whole)


def test_absent_partial_is_rebuilt(worker: ModuleType, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with worker.writer(path) as out:
        write_some(out, worker, 3)
    (tmp_path / "x.h5.partial").unlink()
    worker.run(path)
    assert everything(path) == everything(whole)


def test_journal_may_be_cut_anywhere(worker: ModuleType, whole: Path, tmp_path: Path) -> None:
    path, journal = tmp_path / "x.h5", tmp_path / "x.h5.journal"
    with worker.writer(path) as out:
        write_some(out, worker, 2)
    text = journal.read_bytes()
    last = text.rindex(b"\n", 0, -1) + 1
    for length in [0, 1, text.index(b"\n"), *range(last, len(text), 7)]:
        folder = tmp_path / str(length)
        folder.mkdir()
        shutil.copy(tmp_path / "x.h5.partial", folder)
        (folder / "x.h5.journal").write_bytes(text[:length])
        with worker.writer(folder / "x.h5") as out:
            assert len(out.pending()) == (5 if length >= last else 6)
            write_some(out, worker, 6)
        with worker.writer(folder / "x.h5") as out:
            assert out.pending() == []  # what was appended can be read
        worker.run(folder / "x.h5")
        assert everything(folder / "x.h5") == everything(whole)


def test_damaged_line_is_not_believed(worker: ModuleType, whole: Path, tmp_path: Path) -> None:
    path, journal = tmp_path / "x.h5", tmp_path / "x.h5.journal"
    with worker.writer(path) as out:
        write_some(out, worker, 3)
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b'"stop": 8', b'"stop": 9')
    lines[4] = b"\xff\x00 no JSON\n"
    journal.write_bytes(b"".join(lines))
    with worker.writer(path) as out:
        assert out.pending()[0] == (4, 8)
        assert len(out.pending()) == 5
    worker.run(path)
    assert everything(path) == everything(whole)


# --------------------------------------------------------------- other settings


def test_another_fingerprint_is_refused_side_by_side(
    worker: ModuleType, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.h5"
    first = {"network_id": "net-a", "view": {"seed": 1, "zoom": 1.5}, "old": True}
    second = {"network_id": "net-b", "view": {"seed": 2, "zoom": 1.5}, "new": [1, 2]}
    with worker.writer(path, fingerprint=first) as out:
        write_some(out, worker, 2)
    with pytest.raises(InputError) as caught:
        worker.writer(path, fingerprint=second)
    head, _, *table = str(caught.value).splitlines()
    assert "x.h5.partial" in head
    assert "--overwrite" in head
    assert "another --out" in head
    assert [line.split() for line in table] == [
        ["run.network_id", "net-a", "net-b"],
        ["run.new", "(absent)", "[1,", "2]"],
        ["run.old", "true", "(absent)"],
        ["run.view.seed", "1", "2"],
    ]
    with worker.writer(path, fingerprint=first) as out:
        assert len(out.pending()) == 4  # the refusal harmed nothing
    with worker.writer(path, fingerprint=second, overwrite=True) as out:
        assert len(out.pending()) == 6
        write_some(out, worker, 6)
        out.finish({})
    assert everything(path) == everything(whole)


def test_long_values_are_shown_from_where_they_differ(worker: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with worker.writer(path, fingerprint={"id": "z" * 500 + "left" + "y" * 99}):
        pass
    with pytest.raises(InputError, match=r"\.\.\.z+lefty+\.\.\. +\.\.\.z+righty+\.\.\.") as caught:
        worker.writer(path, fingerprint={"id": "z" * 500 + "right" + "y" * 99})
    assert max(map(len, str(caught.value).splitlines()[1:])) < 100


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("ids", {"ids": np.array([f"picture{row}" for row in range(23)])}),
        ("views", {"views": ["eval", "zoom"]}),
        ("dim", {"dim": 7}),
        ("classes", {"classes": ["a"]}),
        ("head", {"classes": ["a"], "weight": np.ones((1, 6))}),
    ],
)
def test_other_contents_are_refused(
    worker: ModuleType, tmp_path: Path, part: str, changes: dict[str, Any]
) -> None:
    path = tmp_path / "x.h5"
    options: dict[str, Any] = {"fingerprint": {}, "block_rows": worker.ROWS}
    CacheWriter(path, worker.contents(), **options).close()
    with pytest.raises(InputError, match=rf"contents\.{part} "):
        CacheWriter(path, worker.contents(**changes), **options)
    with pytest.raises(InputError, match=r"contents\.block_rows +4 +5"):
        CacheWriter(path, worker.contents(), fingerprint={}, block_rows=5)
    CacheWriter(path, worker.contents(provenance={"now": 2}), **options).close()


def test_other_labels_are_refused(tmp_path: Path) -> None:
    matrix = csr_matrix(np.eye(3, dtype=np.float32))

    def attempt(**changes: Any) -> None:
        labels = Labels(
            **{"ids": list("abc"), "classes": list("klm"), "positives": matrix} | changes
        )
        contents = CacheContents(np.array(list("abc")), ["eval"], 2, labels)
        CacheWriter(tmp_path / "x.h5", contents, fingerprint={}).close()

    attempt()
    attempt()
    for changes in (
        {"positives": csr_matrix(np.fliplr(np.eye(3)))},
        {"positives": matrix * 0.5},
        {"negatives": csr_matrix(np.fliplr(np.eye(3)) * (1 - np.eye(3)))},
        {"known": np.array([True, True, False])},
        {"unlisted": "unknown"},
        {"outside": np.array([0, 1, 0])},
    ):
        with pytest.raises(InputError, match=r"contents\.labels "):
            attempt(**changes)


# --------------------------------------------------------------------- locks


def test_second_process_is_refused_until_the_first_is_killed(
    script: Path, worker: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "x.h5"
    code = (
        "import sys, time, worker\n"
        "with worker.writer(sys.argv[1]):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)"
    )
    with start_python(script, code, path) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        for _ in range(2):
            with pytest.raises(InputError, match=rf"x\.h5: is being .* process \({holder.pid} on"):
                worker.writer(path)
        holder.kill()
    with worker.writer(path) as out:
        assert len(out.pending()) == 6
    assert not (tmp_path / "x.h5.lock").exists()


def test_second_writer_of_one_process_is_refused_and_frees_nothing(
    script: Path, worker: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "x.h5"
    code = (
        "import sys, worker\n"
        "try: worker.writer(sys.argv[1])\n"
        "except ValueError as error: print(error)"
    )
    with worker.writer(path):
        with pytest.raises(InputError, match=r"x\.h5: this process .* is writing it already"):
            worker.writer(path)
        assert "is being written by another process" in python(script, code, path)
        with worker.writer(tmp_path / "y.h5"):
            pass
    assert python(script, code, path) == ""


def test_a_lock_never_has_two_holders(script: Path, tmp_path: Path) -> None:
    """Three processes take and release it all the time; the file is removed at each release."""
    code = """
import os, sys
from pathlib import Path
import worker
from featcache import InputError
from featcache.journal import Lock
lock, flag = Path(sys.argv[1]) / "lock", Path(sys.argv[1]) / "flag"
def compete():
    held = 0
    while held < 100:
        try:
            mine = Lock(lock, lock)
        except InputError:
            continue
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
        held += 1
        os.unlink(flag)
        mine.release()
children = []
for _ in range(3):
    children.append(os.fork())
    if children[-1] == 0:
        try:
            compete()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
"""
    assert python(script, code, tmp_path) == ""


def test_child_that_outlives_the_writer_holds_nothing(
    script: Path, worker: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "x.h5"
    code = (
        "import os, signal, sys, time, worker\n"
        "out = worker.writer(sys.argv[1])\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    time.sleep(600)\n"
        "    os._exit(0)\n"
        "print(child, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    with start_python(script, code, path) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            assert process.wait(60) == -signal.SIGKILL
            os.kill(child, 0)  # still there
            worker.run(path)
        finally:
            os.kill(child, signal.SIGKILL)
    assert FeatureCache(path).verify() == []


# ----------------------------------------------------------------- full disks


def test_file_size_limit_shows_at_once_and_later(script: Path, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    code = """
import resource, sys
from pathlib import Path
import h5py
import worker
from featcache import InputError
path = Path(sys.argv[1])
def limit(nbytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))
limit(1000)
try:
    worker.writer(path)
except InputError as error:
    print(error)
limit(resource.RLIM_INFINITY)
assert list(path.parent.iterdir()) == [], list(path.parent.iterdir())
try:
    with worker.writer(path) as out:
        # As a full disk does: it stops in the middle of a block.
        with h5py.File(f"{path}.partial") as file:
            offset = file["features"].id.get_offset()
        limit(offset + 2 * 4 * worker.V * worker.D * 2 + 50)
        for start, stop in out.pending():
            out.write(start, *worker.block(start, stop))
except InputError as error:
    print(error)
limit(resource.RLIM_INFINITY)
with worker.writer(path) as out:
    print(out.pending(), out.messages)
worker.run(path)
"""
    first, second, third = python(script, code, path).splitlines()
    for message in (first, second):
        assert "x.h5.partial" in message
        assert "bytes are needed" in message
        assert "free" in message
    assert third == "[(8, 12), (12, 16), (16, 20), (20, 23)] []"
    assert everything(path) == everything(whole)


def test_full_disk_shows_before_the_first_block(
    worker: ModuleType, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def unsupported(handle: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    path = tmp_path / "x.h5"
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"bytes are needed, the disk has [\d,]+ free"):
        worker.writer(path)
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with monkeypatch.context() as context:
        usage = shutil.disk_usage(tmp_path)
        context.setattr(shutil, "disk_usage", lambda path: usage._replace(free=200))
        with pytest.raises(InputError, match=r"bytes are needed, the disk has 200 free"):
            worker.writer(path)
    assert list(tmp_path.iterdir()) == []
    worker.run(path)
    assert everything(path) == everything(whole)


@pytest.mark.parametrize("call", ["pwrite", "write", "fsync"])
def test_failing_calls_lose_one_block_at_most(
    worker: ModuleType, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The disk fills up at each call in turn; every failure is followed by another attempt."""
    path, real, fail = tmp_path / "x.h5", getattr(os, call), False

    def sometimes(handle: int, *arguments: Any) -> Any:
        if not fail:
            return real(handle, *arguments)
        if call != "fsync":  # a part of it was still written
            real(handle, bytes(arguments[0])[:10], *arguments[1:])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, sometimes)
    with worker.writer(path) as out:
        for start, stop in out.pending()[:4]:
            fail = True
            with pytest.raises(InputError, match="make room"):
                out.write(start, *worker.block(start, stop))
            fail = False
            out.write(start, *worker.block(start, stop))
    with worker.writer(path) as out:
        assert len(out.pending()) == 2
        assert out.messages == []
    worker.run(path)
    assert everything(path) == everything(whole)


# --------------------------------------------------------------------- kills

# Kills the process just before its k-th call that changes something on disk, or in
# the middle of it: half of the bytes written, or what HDF5 has in memory flushed.
KILLER = """
import os, signal, sys
from pathlib import Path
import h5py
import worker
from featcache import FeatureCache

worker.ROWS = 8
os.fsync = lambda handle: None  # what a killed process has written is not lost; only slow

def arm(k, torn):
    left = [k]
    def due(half):
        left[0] -= 1
        if left[0] == 0:
            if torn:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
    def hook(owner, name, half):
        real = getattr(owner, name)
        def hooked(*args, **kwargs):
            due(lambda: half(real, *args))
            return real(*args, **kwargs)
        setattr(owner, name, hooked)
    def nothing(real, *args): pass
    for name in ("fsync", "replace", "unlink", "posix_fallocate", "ftruncate"):
        hook(os, name, nothing)
    for name in ("write", "pwrite"):
        hook(os, name, lambda real, fd, data, *at: real(fd, bytes(data)[: len(data) // 2], *at))
    def flush(real, group, *args): group.file.flush()
    hook(h5py.Group, "create_dataset", flush)
    hook(h5py.Group, "__setitem__", flush)
    hook(h5py.AttributeManager, "__setitem__", nothing)
    hook(h5py.File, "close", flush)

def killed(path, k, torn, **options):
    def action():
        arm(k, torn)
        worker.run(path, **options)
    code = worker.in_child(action)
    assert code in (0, -signal.SIGKILL), code
    return code != 0

def again(path, **options):
    assert worker.in_child(lambda: worker.run(path, **options)) == 0

def read(path):
    cache = FeatureCache(path)
    return cache.features.tobytes(), cache.skipped

root, whole = Path(sys.argv[1]), read(sys.argv[2])
"""


def test_a_kill_at_any_call_changes_nothing(script: Path, whole: Path, tmp_path: Path) -> None:
    code = """
for torn in (False, True):
    k = 1
    while killed(path := root / f"{k}-{torn}" / "x.h5", k, torn):
        if not path.exists() or path.with_name("x.h5.journal").exists():
            again(path)  # otherwise it had come to its end
        assert read(path) == whole, (k, torn)
        assert {item.name for item in path.parent.iterdir()} <= {"x.h5", "x.h5.lock"}
        k += 1
    print(k)
"""
    counts = [int(line) for line in python(script, KILLER + code, tmp_path, whole).split()]
    assert min(counts) > 30  # 3 blocks of 4 calls, and those of the beginning and the end


def test_a_kill_at_any_call_leaves_the_old_file_or_the_new(
    script: Path, worker: ModuleType, whole: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old.h5"
    FeatureCache.write(old, np.zeros((3, 2)), ["a", "b", "c"])
    code = """
import shutil
old, k = read(sys.argv[3]), 1
while True:
    path = root / str(k) / "x.h5"
    path.parent.mkdir()
    shutil.copy(sys.argv[3], path)
    if not killed(path, k, True, overwrite=True):
        break
    assert read(path) in (old, whole), k
    again(path, overwrite=True)
    assert read(path) == whole, k
    k += 1
print(k)
"""
    assert int(python(script, KILLER + code, tmp_path, whole, old)) > 30


def test_a_kill_at_any_call_of_a_resumed_run_changes_nothing(
    script: Path, whole: Path, tmp_path: Path
) -> None:
    """The first run dies while HDF5 completes the file, so that the second must rebuild it.

    It does so with the same HDF5, or with one that lays the file out otherwise.
    """
    code = """
import shutil
from dataclasses import replace
from featcache import layout
first = root / "first" / "x.h5"
def dies_while_finishing():
    def hooked(file, name, value):
        real(file, name, value)
        if name == "blocks/start":
            file.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    real, h5py.Group.__setitem__ = h5py.Group.__setitem__, hooked
    worker.run(first)
assert worker.in_child(dies_while_finishing) == -signal.SIGKILL
create = layout.create
def create_otherwise(path, contents, rows):
    return create(path, replace(contents, classes=["c" * 999]), rows)
for how in (create, create_otherwise):
    layout.create = how
    k = 1
    while True:
        path = root / f"{k}-{how.__name__}" / "x.h5"
        shutil.copytree(first.parent, path.parent)
        if not killed(path, k, True):
            break
        if path.with_name("x.h5.journal").exists():
            with worker.writer(path) as out:
                assert out.pending() == [], (k, out.pending())  # not a block is made twice
            again(path)
        assert read(path) == whole, k
        k += 1
    print(k)
"""
    counts = [int(line) for line in python(script, KILLER + code, tmp_path, whole).split()]
    assert min(counts) > 12


@pytest.mark.parametrize("kills", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_random_kills_change_nothing(
    script: Path, worker: ModuleType, whole: Path, tmp_path: Path, kills: int
) -> None:
    chance, paths = random.Random(kills), [tmp_path / "0.h5"]
    for _ in range(kills):
        with start_python(script, WORKER, paths[-1], 0.15) as process:
            time.sleep(chance.uniform(0.3, 0.9))
            process.kill()
        if paths[-1].exists():  # it came to its end: begin another one
            paths.append(tmp_path / f"{len(paths)}.h5")
    for path in paths:
        if not path.exists() or path.with_name(f"{path.name}.journal").exists():
            worker.run(path)
        assert everything(path) == everything(whole)
        assert FeatureCache(path).verify() == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"file: no folder, and cannot become one .*--out"):
        FeatureCache.write(tmp_path / "file" / "x.h5", np.eye(2), ["a", "b"])
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
