"""Several processes write one cache: the same bytes, whoever is there, dies or comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featcache import FeatureCache, InputError, extraction, training
from featcache.console import Interrupted
from featcache.embedding import Embedder, Features
from featcache.extraction import extract
from featcache.settings import ExtractionConfig, TrainingConfig
from featcache.shares import Share, share_from, shares_of
from featcache.writing import CacheContents, CacheWriter
from tests import tiny

N, D, ROWS = 23, 6, 4  # six blocks


def block(start: int, stop: int) -> tuple[np.ndarray, list[str | None]]:
    rows = np.arange(start, stop)[:, None, None]
    reasons = [f"bad {row}" if row % 11 == 3 else None for row in range(start, stop)]
    return np.sin(7.0 * rows + np.arange(D)), reasons


def writer(path: Path, rank: int = 0, world: int = 1, **changes: Any) -> CacheWriter:
    contents = CacheContents(
        np.array([f"image{row}" for row in range(N)]),
        ["eval"],
        D,
        classes=["a", "b"],
        weight=np.ones((2, D)),
        provenance={"network": "n"},
    )
    options: dict[str, Any] = {"fingerprint": {"net": "a"}, "block_rows": ROWS}
    return CacheWriter(path, contents, share=Share(rank, world), **options | changes)


def work(out: CacheWriter, count: int | None = None) -> list[int]:
    """Write the pending blocks, or some of them; their first rows."""
    starts = []
    for start, stop in out.pending()[:count]:
        out.write(start, *block(start, stop))
        starts.append(start)
    return starts


def finish(path: Path, rank: int, world: int) -> bool:
    with writer(path, rank, world) as out:
        work(out)
        out.finish()
        return out.finished


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    path = tmp_path_factory.mktemp("whole") / "x.h5"
    assert finish(path, 0, 1)
    return FeatureCache(path)


def assert_same(path: Path, whole: FeatureCache) -> None:
    cache = FeatureCache(path)
    assert cache.features.tobytes() == whole.features.tobytes()
    assert cache.skipped == whole.skipped
    assert dict(cache.provenance) == dict(whole.provenance)
    assert cache.verify() == []
    assert [item.name for item in path.parent.iterdir()] == [path.name]


# ------------------------------------------------------------------- writing


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_the_last_process_puts_the_cache_together(
    whole: FeatureCache, tmp_path: Path, order: tuple[int, ...]
) -> None:
    path = tmp_path / "x.h5"
    assert [finish(path, rank, 3) for rank in order] == [False, False, True]
    assert_same(path, whole)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 6, 9])
def test_every_row_is_made_once(whole: FeatureCache, tmp_path: Path, world: int) -> None:
    path, made = tmp_path / "x.h5", []
    for rank in range(world):
        with writer(path, rank, world) as out:
            made += work(out)
            out.finish()
    assert sorted(made) == [0, 4, 8, 12, 16, 20]
    assert_same(path, whole)


def test_a_process_keeps_its_own_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with writer(path, 1, 3) as out:
        assert work(out) == [4, 16]
    rows = 8 * D * 2
    sizes = {share.rank: share.beside(path, ".partial").stat().st_size for share in shares_of(path)}
    with writer(path, 0, 3):
        full = (tmp_path / "x.h5.partial").stat().st_size
    assert list(sizes) == [1]
    assert full - sizes[1] == N * D * 2 - rows


def test_nobody_finishes_while_another_is_at_work(whole: FeatureCache, tmp_path: Path) -> None:
    path, asked = tmp_path / "x.h5", []
    with writer(path, 1, 2) as slow:
        work(slow, 1)
        with writer(path, 0, 2) as out:
            work(out)

            def wait() -> bool:
                asked.append(out.rows_done())
                work(slow, 1)
                if len(slow.pending()) == 0:
                    slow.close()
                return True

            out.finish(wait=wait)
            assert out.finished
    assert asked == [16, 20]
    assert_same(path, whole)


def test_damaged_blocks_of_another_process_are_counted_once(
    whole: FeatureCache, tmp_path: Path
) -> None:
    path = tmp_path / "x.h5"
    with writer(path, 1, 2) as out:
        assert work(out) == [4, 12, 20]
    part = path.with_name("x.h5.rank1of2.partial")
    data = part.read_bytes()
    good = block(12, 16)[0].astype("<f2").reshape(4, D)[0].tobytes()
    assert data.count(good) == 1
    part.write_bytes(data.replace(good, good[::-1]))
    with writer(path) as out:
        assert out.rows_done() == 7
        for done, (start, stop) in zip((11, 15, 19, 23), out.pending(), strict=True):
            out.write(start, *block(start, stop))
            assert out.rows_done() == done
        out.finish()
    assert_same(path, whole)


def test_another_number_of_processes_goes_on(whole: FeatureCache, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    for rank in range(4):
        with writer(path, rank, 4) as out:
            assert work(out, 1) == [4 * rank]
    with writer(path, 1, 2) as out:
        assert out.rows_done() == 16
        assert work(out) == [20]
        out.finish()
        assert not out.finished
    with writer(path) as out:
        assert work(out) == [16]
        out.finish()
    assert_same(path, whole)


def test_a_single_process_takes_over_and_hands_over(whole: FeatureCache, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with writer(path) as out:
        assert work(out, 3) == [0, 4, 8]
    assert [finish(path, rank, 2) for rank in (0, 1)] == [False, True]
    assert_same(path, whole)


def test_a_flipped_bit_of_another_process_is_found(whole: FeatureCache, tmp_path: Path) -> None:
    """Before its row is counted as done, and before it is copied."""
    path = tmp_path / "x.h5"
    for rank in (1, 2):
        assert not finish(path, rank, 3)
    part = Share(1, 3).beside(path, ".partial")
    data = bytearray(part.read_bytes())
    at = data.rindex(np.float16(np.sin(7.0 * 16 + 5)).tobytes())
    data[at] ^= 1
    part.write_bytes(data)
    with writer(path, 0, 3) as out:
        work(out)
        with pytest.raises(InputError, match=r"1 blocks, the first at row 16, are not what was"):
            out.finish()
    with writer(path, 1, 2) as out:  # blocks 4, 12, 20 would be its own
        assert out.pending() == []
    with writer(path, 0, 1) as out:
        assert work(out) == [16]
        out.finish()
    assert_same(path, whole)


@pytest.mark.parametrize("what", ["partial", "journal"])
def test_lost_files_of_another_process_are_made_again(
    whole: FeatureCache, tmp_path: Path, what: str
) -> None:
    path = tmp_path / "x.h5"
    for rank in (1, 0):
        with writer(path, rank, 2) as out:
            work(out)
    Share(1, 2).beside(path, f".{what}").unlink()
    assert not finish(path, 0, 2) if what == "journal" else True
    assert finish(path, 1, 2)
    assert_same(path, whole)


def test_other_settings_are_refused_whoever_began(whole: FeatureCache, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with writer(path, 2, 3) as out:
        work(out)
    for rank, world in ((0, 1), (0, 3), (1, 3), (1, 2)):
        with pytest.raises(InputError, match=r"rank2of3\.partial: was begun.*\n.*\n +run\.net +a"):
            writer(path, rank, world, fingerprint={"net": "b"})
    with writer(path, 0, 2, fingerprint={"net": "b"}, overwrite=True) as out:
        work(out)
        # While a process is at work nobody gives its run up.
        with pytest.raises(InputError, match="is writing it already"):
            writer(path, 1, 2, overwrite=True)
    assert [share.rank for share in shares_of(path)] == [0]
    with writer(path, 1, 2, overwrite=True) as out:
        work(out)
    assert finish(path, 0, 2)
    assert_same(path, whole)


def test_one_that_comes_when_all_is_done_has_nothing_to_do(
    whole: FeatureCache, tmp_path: Path
) -> None:
    path = tmp_path / "x.h5"
    finish(path, 0, 1)
    before = path.stat().st_mtime_ns
    assert finish(path, 1, 2)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(InputError, match="exists already"):
        writer(path, 1, 2, fingerprint={"net": "b"})
    with pytest.raises(InputError, match="exists already"):
        writer(path)
    assert_same(path, whole)


def test_shares_come_from_the_environment() -> None:
    assert share_from({}) == Share(0, 1)
    assert share_from({"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}) == Share(2, 3)
    for rank, world in (("3", "3"), ("-1", "2"), ("x", "2"), ("0", "0"), ("1", "")):
        with pytest.raises(InputError, match=f"RANK={rank} WORLD_SIZE={world} in the environment"):
            share_from({"RANK": rank, "WORLD_SIZE": world})


# A process dies just before its k-th call that changes something on disk, or in the midst of it.
KILLER = """
import tests.test_ranks as ranks
whole = ranks.FeatureCache(Path(whole)).features.tobytes()
counts = []
for torn in (False, True):
    k = 1
    while True:
        path = out / f"{victim}{torn}{k}" / "x.h5"
        for rank in before:
            ranks.finish(path, rank, 3)
        def action():
            arm(k, torn)
            ranks.finish(path, victim, 3)
            return 0
        killed = ended(child(action)) != 0
        for rank in (*after, victim, *before):  # in another order than before
            if not path.exists() or list(path.parent.glob("x.h5.*journal")):
                ranks.finish(path, rank, 3)
        assert ranks.FeatureCache(path).features.tobytes() == whole, (k, torn)
        left = {item.name for item in path.parent.iterdir()} - {"x.h5"}
        assert all(name.endswith(".lock") for name in left), (k, torn, left)
        if not killed:
            break
        k += 1
    counts.append(k)
answer = counts
"""


@pytest.fixture(scope="module")
def nursery() -> Iterator[tiny.Nursery]:
    with tiny.Nursery() as nursery:
        yield nursery


@pytest.mark.parametrize(("before", "victim", "after"), [((), 1, (0, 2)), ((0, 1), 2, ())])
def test_a_kill_at_any_call_changes_nothing(
    nursery: tiny.Nursery,
    whole: FeatureCache,
    tmp_path: Path,
    before: tuple[int, ...],
    victim: int,
    after: tuple[int, ...],
) -> None:
    """Of a process that does its share, and of the one that puts all together."""
    counts = nursery.run(
        KILLER, out=tmp_path, whole=str(whole.path), before=before, victim=victim, after=after
    )
    assert min(counts) > 4


# ---------------------------------------------------------------- extraction


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    tiny.make_data(root, 38, seed=1)
    (root / "images" / "i007.png").write_bytes(b"")
    options = tiny.basic_training(root, root / "run") | {"epochs": 1}
    training.train(TrainingConfig(**options))
    return root


Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(extraction, "ROWS_A_BLOCK", 8)
    options = {
        "run": str(run / "run"),
        "images": str(run / "images"),
        "labels": [str(run / "labels.csv")],
        "out": str(tmp_path / "x.h5"),
        "views": "tests.tiny:shaken",
        "view_count": 2,
        "batch_size": 4,
        "device": "cpu",
        "workers": 0,
        "threads": 1,
    }
    return lambda **changes: options | changes


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int, **options: Any) -> Path | None:
    with monkeypatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", str(world))
        return extract(ExtractionConfig(**options))


def test_ranks_make_the_cache_of_a_single_process(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    single = extract(ExtractionConfig(**settings(out=str(tmp_path / "single" / "x.h5"))))
    assert single is not None
    capsys.readouterr()
    made = [as_rank(monkeypatch, rank, 3, **settings()) for rank in (2, 0, 1)]
    assert made == [None, None, tmp_path / "x.h5"]
    printed = capsys.readouterr().out
    assert "process 2 of 3 has made its images; 8 of 38 are there" in printed
    assert printed.count("images have labels") == 1
    caches = FeatureCache(single), FeatureCache(tmp_path / "x.h5")
    facts = [dict(cache.provenance) for cache in caches]
    assert all(fact.pop("wall_seconds") is not None for fact in facts)
    assert facts[0] == facts[1]
    assert caches[0].features.tobytes() == caches[1].features.tobytes()
    assert caches[0].skipped == caches[1].skipped != {}
    assert caches[1].verify() == []


def test_a_rank_that_dies_is_resumed_alone(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen, real = [], Embedder.__call__

    def call(embedder: Embedder, pixels: Any) -> Features:
        seen.append(len(pixels))
        if len(seen) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(embedder, pixels)

    monkeypatch.setattr(Embedder, "__call__", call)
    with pytest.raises(Interrupted, match="stopped at 8 of 38 images"):
        as_rank(monkeypatch, 1, 2, **settings())
    assert as_rank(monkeypatch, 0, 2, **settings()) is None
    before = len(seen)
    assert as_rank(monkeypatch, 1, 2, **settings()) == tmp_path / "x.h5"
    assert sum(seen[before:]) == 8  # the second of its two blocks


def test_the_recorded_number_of_threads_is_used(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    try:
        assert as_rank(monkeypatch, 1, 2, **settings(threads=2)) is None
        torch.set_num_threads(1)
        with pytest.raises(InputError, match=r"threads +2 +1"):
            as_rank(monkeypatch, 0, 2, **settings(threads=1))
        with pytest.raises(InputError, match=r"view"):
            as_rank(monkeypatch, 0, 2, **settings(threads=0, views="eval", view_count=4))
        assert torch.get_num_threads() == 1
        assert as_rank(monkeypatch, 0, 2, **settings(threads=0)) == tmp_path / "x.h5"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert FeatureCache(tmp_path / "x.h5").provenance["threads"] == 2


@pytest.mark.slow
def test_torchrun(settings: Settings, tmp_path: Path) -> None:
    """Killed as a whole, then gone on with by another number of processes."""
    options = settings(views="tests.tiny:sleepy", out=str(tmp_path / "out" / "x.h5"))
    whole = extract(ExtractionConfig(**options | {"out": str(tmp_path / "whole.h5")}))
    assert whole is not None
    # Rows of a block are fixed by the program; small blocks need a small program.
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom featcache import cli, extraction\n"
        "extraction.ROWS_A_BLOCK = 8\nsys.exit(cli.main())\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.ROOT)}

    def start(n: int) -> subprocess.Popen[bytes]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n)]
        # Before Python 3.12 torchrun takes --run for one of its own options, unless -- is before.
        command = [*launcher, "--", str(program), "extract", *tiny.options(**options)]
        with open(tmp_path / f"log{n}", "wb") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    first = start(2)
    limit = time.monotonic() + 120
    while not list((tmp_path / "out").glob("x.h5*journal")) and time.monotonic() < limit:
        time.sleep(0.05)
    time.sleep(0.3)
    first.send_signal(signal.SIGTERM)
    first.wait(60)
    assert not (tmp_path / "out" / "x.h5").exists()
    assert start(3).wait(120) == 0, (tmp_path / "log3").read_text()
    cache = FeatureCache(tmp_path / "out" / "x.h5")
    assert cache.features.tobytes() == FeatureCache(whole).features.tobytes()
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["x.h5"]
    assert cache.provenance["threads"] == 1
