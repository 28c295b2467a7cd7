"""Full disks, cut files, flipped bits and kills: an extraction says so or ends as if unbroken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from featcache import FeatureCache, extraction
from featcache.cli import main
from featcache.extraction import extract
from featcache.settings import ExtractionConfig, TrainingConfig
from featcache.training import train
from tests import soak, tiny

N = 38  # images, in batches of 4 and blocks of 8 rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, labels and a trained network."""
    root = tmp_path_factory.mktemp("data")
    tiny.make_data(root, N, seed=1)
    (root / "images" / "i007.png").write_bytes(b"")
    train(TrainingConfig(**tiny.basic_training(root, root / "run") | {"epochs": 1}))
    return root


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "ROWS_A_BLOCK", 8)


@pytest.fixture
def settings(data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    options = soak.options(data / "run", data) | {"out": str(tmp_path / "x.h5"), "workers": 0}
    options["views"] = "tests.tiny:shaken"
    return lambda **changes: options | changes


@pytest.fixture
def unbroken(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> FeatureCache:
    path = extract(ExtractionConfig(**settings(out=str(tmp_path / "unbroken" / "x.h5"))))
    assert path is not None
    return FeatureCache(path)


@pytest.fixture(scope="module")
def nursery() -> Iterator[tiny.Nursery]:
    with tiny.Nursery() as nursery:
        yield nursery


# Stops, by the signal `number`, after `blocks` blocks; `limit`: no file may grow beyond.
STOPPED = """
import resource
from featcache import writing
extraction.ROWS_A_BLOCK = 8
def action():
    left, real = [blocks], writing.CacheWriter.write
    def write(writer, *arguments):
        real(writer, *arguments)
        left[0] -= 1
        if left[0] == 0:
            if grow is None:
                os.kill(os.getpid(), number)
            size = os.path.getsize(f"{writer.path}.journal") + grow
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    writing.CacheWriter.write = write
    return cli.main(["extract", *options])
answer = ended(child(action, errors=out / "errors"))
"""


def stopped(
    nursery: tiny.Nursery, options: dict[str, Any], blocks: int, grow: int | None = None
) -> tuple[int, str]:
    """Exit status and errors of an extraction that is killed, or finds no room, on its way."""
    out = Path(options["out"]).parent
    status = nursery.run(
        STOPPED, out=out, options=tiny.options(**options), blocks=blocks, grow=grow, number=9
    )
    errors = (out / "errors").read_text()
    (out / "errors").unlink()
    return status, errors


def test_a_file_size_limit_on_the_way(
    nursery: tiny.Nursery,
    settings: Callable[..., dict[str, Any]],
    unbroken: FeatureCache,
    tmp_path: Path,
) -> None:
    """As with a full disk: the block that does not fit is not counted, and is made later."""
    status, errors = stopped(nursery, settings(), blocks=2, grow=100)
    assert status == 2
    (line,) = errors.splitlines()
    for word in ("x.h5.partial", "more bytes are needed", "free", "make room", "same command"):
        assert word in line
    assert not (tmp_path / "x.h5").exists()
    assert extract(ExtractionConfig(**settings())) == tmp_path / "x.h5"
    assert FeatureCache(tmp_path / "x.h5").features.tobytes() == unbroken.features.tobytes()
    assert not list(tmp_path.glob("x.h5.*"))


@pytest.mark.parametrize("row", [None, 0, 5, 20])
def test_a_cut_partial_file(
    nursery: tiny.Nursery,
    settings: Callable[..., dict[str, Any]],
    unbroken: FeatureCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    row: int | None,
) -> None:
    assert stopped(nursery, settings(), blocks=3) == (-9, "")
    partial = tmp_path / "x.h5.partial"
    begin = None if row is None else partial.read_bytes().index(unbroken.features[row].tobytes())
    os.truncate(partial, begin or 0)
    capsys.readouterr()
    assert main(["extract", *tiny.options(**settings())]) == 0
    saved = (row or 0) // 8
    assert f"{saved} of 3 blocks could be saved" in capsys.readouterr().out
    assert FeatureCache(tmp_path / "x.h5").features.tobytes() == unbroken.features.tobytes()


def test_flipped_bits_on_the_way_and_at_the_end(
    nursery: tiny.Nursery,
    settings: Callable[..., dict[str, Any]],
    unbroken: FeatureCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert stopped(nursery, settings(), blocks=3) == (-9, "")
    partial = tmp_path / "x.h5.partial"
    flip(partial, unbroken.features[9].tobytes())
    capsys.readouterr()
    assert main(["extract", *tiny.options(**settings())]) == 0
    assert "rows 8 to 15 are not what was written there; they are made again" in (
        capsys.readouterr().out
    )
    path = tmp_path / "x.h5"
    assert FeatureCache(path).features.tobytes() == unbroken.features.tobytes()
    flip(path, unbroken.features[20].tobytes())
    assert main(["verify", str(path)]) == 1
    assert "damaged in rows 16 to 23; extract it again with --overwrite" in capsys.readouterr().out
    assert main(["extract", *tiny.options(**settings(overwrite=True))]) == 0
    assert main(["verify", str(path)]) == 0


def flip(path: Path, row: bytes) -> None:
    """A bit of the row."""
    data = bytearray(path.read_bytes())
    data[data.index(row)] ^= 16
    path.write_bytes(data)


# Runs in a mount namespace of its own, where an unprivileged user may mount a small tmpfs.
SMALL_DISK = """
import os, shutil, sys
from pathlib import Path
import numpy as np
from featcache import FeatureCache, InputError
from featcache.writing import CacheContents, CacheWriter

disk = Path(sys.argv[1])
contents = CacheContents(np.array([f"i{k}" for k in range(320)]), ["eval"], 512)
def attempt(path, ballast):
    try:
        with CacheWriter(path, contents, fingerprint={}, block_rows=1) as out:
            if ballast:  # others fill the disk meanwhile
                fill(ballast)
            for start, stop in out.pending():
                out.write(start, np.full((1, 1, 512), start), [None])
            FeatureCache(out.finish())
            return "done"
    except InputError as error:
        return str(error)
def fill(path):
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
fill(disk / "other")
first = attempt(disk / "x.h5", None)
assert "bytes are needed" in first and "make room" in first, first
assert [item.name for item in disk.iterdir()] == ["other"], list(disk.iterdir())
(disk / "other").unlink()
second = attempt(disk / "x.h5", disk / "other")  # the features have their room, the journal not
assert "bytes are needed" in second, second
(disk / "other").unlink()
assert attempt(disk / "x.h5", None) == "done"
cache = FeatureCache(disk / "x.h5")
assert (cache.features[:, 0, 0] == np.arange(320)).all() and cache.verify() == []
"""


def small_disk(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command while `folder` is a disk of 4 MiB."""
    mount = f"mount -t tmpfs -o size=4m tmpfs {folder} && exec "
    words = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount + '"$0" "$@"', *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.ROOT)}
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def test_a_full_disk(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or small_disk(tmp_path, "true").returncode:
        pytest.skip("this system lets no user mount a small file system")
    done = small_disk(tmp_path, sys.executable, "-c", SMALL_DISK, str(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_twenty_kills_of_single_processes_and_ranks(tmp_path: Path) -> None:
    tally = soak.soak(tmp_path, kills=20, seed=1, n=40)
    assert tally["kills"] >= 20
    assert tally["caches"] < tally["sittings"]
