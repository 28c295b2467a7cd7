"""Fill a cache: decode, render, forward, write, each at its own pace.

Worker processes decode and render, this process feeds the network, a thread writes. Between
them wait a few batches and at most two blocks, so that memory does not depend on the number
of images.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np

from featcache.batches import Batch, ViewImages, loader, row_batches
from featcache.console import Interrupted, Progress, StopRequest, duration
from featcache.embedding import Embedder, Features
from featcache.settings import ExtractionConfig
from featcache.shares import Share
from featcache.writing import CacheWriter

_WAITING_BLOCKS = 2
_WAIT_SECONDS = 0.25
_LOOK_SECONDS = 2.0  # between two looks at what other processes have done


@dataclass
class Stages:
    """Seconds that each stage was busy; those of several workers are added up."""

    workers: int
    images: int = 0
    decoding: float = 0.0
    rendering: float = 0.0
    forward: float = 0.0
    writing: float = 0.0
    begun: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.begun

    def count(self, batch: Batch) -> None:
        """Take in what the workers say of a batch."""
        self.images += len(batch.rows)
        self.decoding += batch.decoding
        self.rendering += batch.rendering

    def busy(self) -> str:
        """The share of its time that each stage was busy: the greatest is the bottleneck."""
        elapsed = max(self.elapsed, 1e-9)
        hands = elapsed * max(1, self.workers)
        who = f" of {self.workers} workers" if self.workers > 1 else ""
        return (
            f"busy: decode {self.decoding / hands:.0%} + render {self.rendering / hands:.0%}{who}, "
            f"forward {self.forward / elapsed:.0%}, write {self.writing / elapsed:.0%}"
        )


@dataclass
class _Block:
    start: int
    features: list[Features]
    reasons: list[str | None]


class BackgroundWriter:
    """Hands blocks to a writer in a thread of its own, in order.

    A context manager: at its end all blocks that were handed over are durable, or what
    the writer raised is raised here.
    """

    def __init__(self, writer: CacheWriter, stages: Stages) -> None:
        self._writer, self._stages = writer, stages
        self._blocks: queue.Queue[_Block | None] = queue.Queue(_WAITING_BLOCKS)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def write(self, start: int, features: list[Features], reasons: list[str | None]) -> None:
        """Hand a block over; waits while two others wait."""
        if not self._thread.is_alive():  # not before: the loader forks its workers first
            self._thread.start()
        self._blocks.put(_Block(start, features, reasons))
        self._raise()

    def _work(self) -> None:
        while (block := self._blocks.get()) is not None:
            if self._error is None:  # else take and drop, so that nobody waits for room
                try:
                    self._write(block)
                except BaseException as error:
                    self._error = error

    def _write(self, block: _Block) -> None:
        features = [some.numpy() for some in block.features]
        self._stages.forward += sum(some.busy() for some in block.features)
        begun = time.perf_counter()
        self._writer.write(block.start, np.concatenate(features), block.reasons)
        self._stages.writing += time.perf_counter() - begun

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread.is_alive():
            self._blocks.put(None)
            self._thread.join()
        if kind is None:
            self._raise()


class _Whole:
    """Progress of all processes together, shown by the first of them."""

    def __init__(self, writer: CacheWriter, share: Share) -> None:
        self._writer, self._share = writer, share
        self._elsewhere = writer.rows_elsewhere()
        self._ours = writer.rows_done() - self._elsewhere
        self._next = time.monotonic() + _LOOK_SECONDS
        self.progress = Progress(len(writer.contents.ids), "images", writer.rows_done())

    def advance(self, count: int, note: str) -> None:
        """Count images of ours, and now and then those that the others have made."""
        if self._share.rank:
            return
        self._ours += count
        if self._share.world > 1 and time.monotonic() >= self._next:
            self._next = time.monotonic() + _LOOK_SECONDS
            self._elsewhere = self._writer.rows_elsewhere()
        new = self._ours + self._elsewhere - self.progress.done
        self.progress.advance(max(0, new), note)


def fill(
    writer: CacheWriter,
    embedder: Embedder,
    images: ViewImages,
    config: ExtractionConfig,
    share: Share,
) -> None:
    """Compute and write every block of ours that is not durable yet, and finish the cache.

    Raises
    ------
    Interrupted
        After SIGINT or SIGTERM; what is written is kept.
    """
    n, done = len(images.images), writer.rows_done()
    if done and not share.rank:
        print(f"{config.out}: going on at {done:,} of {n:,} images", flush=True)
    whole = _Whole(writer, share)
    stages = Stages(config.workers)
    with StopRequest() as stop:

        def stopped() -> Interrupted:
            whole.progress.clear()
            return Interrupted(
                f"stopped at {writer.rows_done():,} of {n:,} images; "
                "the same command goes on from there"
            )

        def wait() -> bool:
            """Rank 0 stays to show the progress of the others, and puts the cache together."""
            if share.rank:
                return False
            if stop.asked:
                raise stopped()
            whole.advance(0, "waiting for the other processes")
            time.sleep(_WAIT_SECONDS)
            return True

        with BackgroundWriter(writer, stages) as out:
            complete = _feed(writer.pending(), embedder, images, config, stages, out, whole, stop)
        if not complete:
            raise stopped()
        if stages.images and not share.rank:
            whole.progress.print(
                f"{config.out}: {whole.progress.describe()} in {duration(stages.elapsed)} "
                f"({stages.busy()})"
            )
        writer.finish({"wall_seconds": round(stages.elapsed, 2)}, wait)
        whole.progress.clear()


def _feed(
    pending: Sequence[tuple[int, int]],
    embedder: Embedder,
    images: ViewImages,
    config: ExtractionConfig,
    stages: Stages,
    out: BackgroundWriter,
    whole: _Whole,
    stop: StopRequest,
) -> bool:
    """Images through the network, block by block; False if asked to stop."""
    order = row_batches(pending, config.batch_size)
    source = loader(images, order, config.workers, embedder.device)
    for start, end in pending:
        features: list[Features] = []
        reasons: list[str | None] = []
        while len(reasons) < end - start:
            if stop.asked:
                return False
            batch = next(source)
            features.append(embedder(batch.pixels))
            reasons += batch.reasons
            stages.count(batch)
            whole.advance(len(batch.reasons), stages.busy())
        out.write(start, features, reasons)
    return True
