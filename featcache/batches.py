"""Feed batches of decoded, rendered images, in an order that is a function of the seed alone."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from featcache.errors import BY_SIGNAL, WORKER_ENDED, InputError
from featcache.imagefacts import refuse_changed
from featcache.images import ImageSet, UnreadableImage, decode
from featcache.views import (
    Augmentation,
    Photo,
    Preprocessing,
    Recipe,
    augmentation,
    augmented,
    generator,
    to_array,
)

T = TypeVar("T")

_SIGNAL_SECONDS = 0.2


@dataclass(frozen=True)
class Batch:
    """What a worker hands over.

    Attributes
    ----------
    rows : ndarray of int64, shape (b,)
        Rows of the image set.
    pixels : tensor of uint8, shape (b, v, 3, size, size)
        Zeros where the image could not be read.
    reasons : list of b
        Why an image could not be read, None where it could.
    decoding, rendering : float
        Seconds that were spent on it.
    """

    rows: np.ndarray
    pixels: torch.Tensor
    reasons: list[str | None]
    decoding: float = 0.0
    rendering: float = 0.0

    @property
    def readable(self) -> np.ndarray:
        """(b,) bool."""
        return np.array([reason is None for reason in self.reasons])

    def plain(self) -> tuple[np.ndarray, torch.Tensor]:
        """Rows (b',) and first views (b', 3, size, size) of the images that could be read."""
        readable = self.readable
        if readable.all():  # no copy: from pinned memory a device fetches it by itself
            return self.rows, self.pixels[:, 0]
        return self.rows[readable], self.pixels[torch.from_numpy(readable), 0]

    def pin_memory(self) -> Batch:
        """Called by torch's loader, so that copies to a device need not wait for each other."""
        return replace(self, pixels=self.pixels.pin_memory())


class Item(NamedTuple):
    """One image of a batch; see :class:`Batch`."""

    row: int
    pixels: np.ndarray
    reason: str | None
    decoding: float = 0.0
    rendering: float = 0.0


def collate(items: Sequence[Item]) -> Batch:
    """Stack single images."""
    rows, pixels, reasons, decoding, rendering = zip(*items, strict=True)
    return Batch(
        np.array(rows),
        torch.from_numpy(np.stack(pixels)),
        list(reasons),
        sum(decoding),
        sum(rendering),
    )


class TrainingImages(Dataset[Item]):
    """Augmented images; an item is (epoch, row) and depends on (seed, epoch, image id) alone."""

    def __init__(
        self,
        images: ImageSet,
        preprocessing: Preprocessing,
        augmentation_name: str,
        seed: int,
        photo: Photo | None = None,
    ) -> None:
        self.images = images
        self.size = preprocessing.image_size
        self.name = augmentation_name
        self.preprocessing = preprocessing
        self.seed = seed
        self.photo = Photo() if photo is None else photo
        self._augment: Augmentation | None = None

    def __getitem__(self, item: tuple[int, int]) -> Item:
        epoch, row = item
        if self._augment is None:  # made in the worker: transforms need not be sent to it
            self._augment = augmentation(self.name, self.preprocessing, self.photo)
        try:
            image = decode(self.images.path(row))
        except UnreadableImage as error:
            return Item(row, np.zeros((1, 3, self.size, self.size), np.uint8), str(error))
        rng = generator("train", self.seed, epoch, self.images.ids[row])
        view = augmented(self._augment, image, self.size, rng, self.name)
        return Item(row, to_array(view)[None], None)


class ViewImages(Dataset[Item]):
    """All views of an image; an item is a row.

    With the `sizes` that the files had at the beginning, one that has another by now stops it.
    """

    def __init__(self, images: ImageSet, recipe: Recipe, sizes: np.ndarray | None = None) -> None:
        self.images = images
        self.recipe = recipe
        self.sizes = sizes
        self._augmentations: dict[str, Augmentation] | None = None

    def __getitem__(self, row: int) -> Item:
        if self._augmentations is None:
            self._augmentations = self.recipe.augmentations()
        begun = time.perf_counter()
        image, reason = self._decoded(self.images.path(row))
        if self.sizes is not None:
            refuse_changed(self.images.path(row), int(self.sizes[row]))
        decoded = time.perf_counter()
        if image is None:
            size = self.recipe.preprocessing.image_size
            views = np.zeros((len(self._augmentations), 3, size, size), np.uint8)
        else:
            views = self.recipe.render(image, str(self.images.ids[row]), self._augmentations)
        return Item(row, views, reason, decoded - begun, time.perf_counter() - decoded)

    @staticmethod
    def _decoded(path: Path) -> tuple[Image.Image | None, str | None]:
        """The image, or why there is none."""
        try:
            return decode(path), None
        except UnreadableImage as error:
            return None, str(error)


def epoch_batches(
    n: int, batch_size: int, seed: int, epoch: int, skip: int = 0
) -> Iterator[list[tuple[int, int]]]:
    """Shuffled (epoch, row) items of one epoch in full batches, leaving out the first ``skip``.

    The last n mod batch_size images of the order are left to another epoch, unless
    there is no full batch at all.
    """
    order = np.random.default_rng([seed, epoch]).permutation(n)
    for step in range(skip, steps_per_epoch(n, batch_size)):
        rows = order[step * batch_size : (step + 1) * batch_size]
        yield [(epoch, int(row)) for row in rows]


def dealt_out(
    steps: Iterable[list[T]], size: int, rank: int = 0, world: int = 1
) -> Iterator[list[T]]:
    """The batches of all steps cut into parts of `size`, of which every `world`-th is ours.

    Which images a part holds does not depend on the number of processes.
    """
    for step in steps:
        parts = [step[start : start + size] for start in range(0, len(step), size)]
        yield from parts[rank::world]


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Full batches in n images, at least one."""
    return max(1, n // batch_size)


class Clocked(Iterator[T]):
    """An iterator, and the seconds that its user has waited for it."""

    def __init__(self, source: Iterator[T]) -> None:
        self._source = source
        self.waited = 0.0

    def __next__(self) -> T:
        begun = time.perf_counter()
        try:
            return next(self._source)
        finally:
            self.waited += time.perf_counter() - begun


def row_batches(blocks: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Rows of the blocks cut into batches; a function of the blocks alone."""
    return [
        list(range(first, min(first + batch_size, stop)))
        for start, stop in blocks
        for first in range(start, stop, batch_size)
    ]


def _leave_signals_to_parent(worker: int) -> None:
    """Signals to the whole group reach workers too; the parent alone decides what to do.

    A SIGTERM that the parent itself sends must end a worker: Python's exit after an error
    sends it and then waits for the worker, for ever if it were ignored.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell the sender
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def obey_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()


def loader(
    dataset: Dataset[Any], batches: Any, workers: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Batches in order, decoded by worker processes (none: in this process).

    Raises
    ------
    InputError
        As the dataset does, in one line; or if the system has ended a worker.
    """
    source = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_parent,
        prefetch_factor=4 if workers else None,
    )
    try:
        yield from source
    except InputError as error:
        if not workers:
            raise
        # torch makes the worker's traceback part of the message; ours is at its end. The frames
        # of torch's own traceback would keep the workers alive.
        message = str(error).strip().rpartition(f"{InputError.__name__}: ")[2]
        raise InputError(message) from error.with_traceback(None)
    except (ConnectionError, EOFError, FileNotFoundError, RuntimeError) as error:
        if not workers or not _tells_of_an_end(error):
            raise
        # The signal comes soon after a broken connection; while torch tidies up, the error that
        # its handler raises would be shown as one that is ignored.
        with contextlib.suppress(RuntimeError):
            time.sleep(_SIGNAL_SECONDS)
        raise InputError(WORKER_ENDED) from error.with_traceback(None)


def _tells_of_an_end(error: Exception) -> bool:
    """Whether a worker is gone: a signal says so, or what it was to send cannot be fetched."""
    if isinstance(error, RuntimeError):
        return str(error).startswith(BY_SIGNAL)
    return "in DataLoader worker process" not in str(error)  # where its own errors come from
