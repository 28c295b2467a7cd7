"""Blocks reach the writer whole and in order; what goes wrong there is raised here."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from featcache import FeatureCache, InputError
from featcache.batches import Batch
from featcache.embedding import Features
from featcache.filling import BackgroundWriter, Stages
from featcache.writing import CacheContents, CacheWriter

D, ROWS, BLOCKS = 3, 4, 6


@pytest.fixture
def writer(tmp_path: Path) -> CacheWriter:
    ids = np.array([f"i{row}" for row in range(ROWS * BLOCKS)])
    contents = CacheContents(ids, ["eval"], D)
    return CacheWriter(tmp_path / "x.h5", contents, fingerprint={}, block_rows=ROWS)


def features(start: int, n: int) -> Features:
    values = torch.arange(start * D, (start + n) * D, dtype=torch.float32)
    return Features(values.reshape(n, 1, D), seconds=2.0)


def test_batches_become_blocks(writer: CacheWriter, tmp_path: Path) -> None:
    stages = Stages(workers=0)
    with writer:
        with BackgroundWriter(writer, stages) as out:
            for start, _ in writer.pending():
                reasons: list[str | None] = [None, None, None, "bad"]
                out.write(start, [features(start, 3), features(start + 3, 1)], reasons)
        assert writer.pending() == []
        cache = FeatureCache(writer.finish())
    expected = np.arange(ROWS * BLOCKS * D, dtype=np.float32).reshape(-1, 1, D)
    expected[3::4] = 0
    np.testing.assert_array_equal(cache.x(), expected)
    assert len(cache.skipped) == BLOCKS
    assert stages.forward == 4.0 * BLOCKS
    assert stages.writing > 0


def test_what_the_writer_raises_is_raised_here(writer: CacheWriter) -> None:
    """At the next block or at the end, and blocks after it are not written."""
    before = set(threading.enumerate())
    broken = Features(torch.full((ROWS, 1, D), 1e6))
    none: list[str | None] = [None] * ROWS

    def hand_over() -> None:
        with BackgroundWriter(writer, Stages(0)) as out:
            for start, _ in writer.pending():
                out.write(start, [broken if start == ROWS else features(start, ROWS)], none)

    with writer:
        with pytest.raises(InputError, match=r"image i4, view eval, dimension 0"):
            hand_over()
        assert writer.pending()[0] == (ROWS, 2 * ROWS)
        assert len(writer.pending()) == BLOCKS - 1
    assert set(threading.enumerate()) <= before


def test_an_error_of_ours_is_kept_and_what_was_handed_over_is_written(writer: CacheWriter) -> None:
    none: list[str | None] = [None] * ROWS

    def fail() -> None:
        with BackgroundWriter(writer, Stages(0)) as out:
            for start in (0, ROWS):
                out.write(start, [features(start, ROWS)], none)
            raise KeyError("ours")

    with writer:
        with pytest.raises(KeyError, match="ours"):
            fail()
        assert len(writer.pending()) == BLOCKS - 2


def test_few_blocks_wait(writer: CacheWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is being written, two wait, the one who hands over the fourth waits himself."""
    go, handed = threading.Event(), []
    real = writer.write
    monkeypatch.setattr(writer, "write", lambda *block: (go.wait(), real(*block)))
    none: list[str | None] = [None] * ROWS

    def hand_over(out: BackgroundWriter) -> None:
        for start, _ in writer.pending():
            out.write(start, [features(start, ROWS)], none)
            handed.append(start)

    with writer, BackgroundWriter(writer, Stages(0)) as out:
        thread = threading.Thread(target=hand_over, args=(out,))
        thread.start()
        limit = time.monotonic() + 30
        while len(handed) < 3 and time.monotonic() < limit:
            time.sleep(0.01)
        thread.join(0.1)
        assert len(handed) == 3
        go.set()
        thread.join()
    assert len(handed) == BLOCKS


def test_the_bottleneck_is_the_greatest_share(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(workers=4, begun=100.0)
    for _ in range(2):
        stages.count(Batch(np.arange(8), torch.zeros(8), [None] * 8, 10.0, 6.0))
    stages.forward, stages.writing = 9.9, 0.5
    monkeypatch.setattr(time, "monotonic", lambda: 110.0)
    assert stages.busy() == ("busy: decode 50% + render 30% of 4 workers, forward 99%, write 5%")
    assert stages.images == 16
    stages.workers = 0
    assert "decode 200% + render 120%, forward" in stages.busy()


def test_torch_pins_a_batch_by_its_own_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinning itself needs a GPU."""
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    batch = Batch(np.arange(2), torch.zeros(2, 1, dtype=torch.uint8), [None, "bad"], 1.0, 2.0)
    pinned = pin_memory(batch)
    assert isinstance(pinned, Batch)
    assert pinned.pixels.tolist() == [[1], [1]]
    assert (pinned.reasons, pinned.decoding, pinned.rendering) == ([None, "bad"], 1.0, 2.0)
