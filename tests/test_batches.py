"""Batches: their order, their pixels whatever the workers, and images that cannot be read."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featcache import batches
from featcache.batches import (
    Batch,
    TrainingImages,
    ViewImages,
    epoch_batches,
    loader,
    row_batches,
    steps_per_epoch,
)
from featcache.errors import InputError
from featcache.images import ImageSet, decode, find_images
from featcache.views import Preprocessing, Recipe

ROOT = Path(__file__).parents[1]
SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=80)
SMALL = Preprocessing(image_size=12)
CPU = torch.device("cpu")

# Workers are forked by a process with threads (Python 3.12 warns), on machines that may
# have fewer cores than workers (torch warns).
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


def write_images(folder: Path, names: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        seed = int.from_bytes(name.encode(), "little")
        pixels = np.random.default_rng(seed).integers(0, 256, (15, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    """Ten images, a to j."""
    return find_images(write_images(tmp_path / "images", list("abcdefghij")))


def gathered(batches: Iterator[Batch]) -> tuple[np.ndarray, torch.Tensor, list[str | None]]:
    """Rows, pixels and reasons of all batches, one after the other."""
    made = list(batches)
    return (
        np.concatenate([batch.rows for batch in made]),
        torch.cat([batch.pixels for batch in made]),
        [reason for batch in made for reason in batch.reasons],
    )


def training_pixels(
    images: ImageSet, order: list[list[tuple[int, int]]], seed: int = 0, workers: int = 0
) -> tuple[np.ndarray, torch.Tensor, list[str | None]]:
    dataset = TrainingImages(images, SMALL, "photo", seed)
    return gathered(loader(dataset, order, workers, CPU))


# ----------------------------------------------------------------------- order


@SETTINGS
@given(
    n=st.integers(1, 60),
    batch_size=st.integers(1, 25),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
    skip=st.integers(0, 8),
)
def test_an_epoch_is_a_permutation_in_full_batches(
    n: int, batch_size: int, seed: int, epoch: int, skip: int
) -> None:
    batches = list(epoch_batches(n, batch_size, seed, epoch))
    assert len(batches) == steps_per_epoch(n, batch_size)
    rows = [row for batch in batches for _, row in batch]
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(range(n))
    assert {e for batch in batches for e, _ in batch} == {epoch}
    if n < batch_size:
        assert [len(batch) for batch in batches] == [n]
    else:
        assert {len(batch) for batch in batches} == {batch_size}
        assert n - len(rows) < batch_size
    assert list(epoch_batches(n, batch_size, seed, epoch, skip)) == batches[skip:]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(row for batch in epoch_batches(50, 10, seed, epoch) for _, row in batch)
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_what_one_epoch_leaves_out_another_takes() -> None:
    left_out = []
    for epoch in range(20):
        rows = {row for batch in epoch_batches(19, 10, 0, epoch) for _, row in batch}
        left_out.append(frozenset(range(19)) - rows)
    assert {len(rows) for rows in left_out} == {9}
    assert frozenset.intersection(*left_out) == frozenset()


def test_blocks_are_cut_one_by_one() -> None:
    assert row_batches([(0, 5), (5, 7), (20, 24)], 2) == [
        [0, 1],
        [2, 3],
        [4],
        [5, 6],
        [20, 21],
        [22, 23],
    ]
    assert row_batches([], 3) == []


@SETTINGS
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    batch_size=st.integers(1, 9),
    data=st.data(),
)
def test_batches_do_not_depend_on_the_blocks_that_are_done(
    lengths: list[int], batch_size: int, data: st.DataObject
) -> None:
    ends = np.cumsum(lengths).tolist()
    blocks = list(zip([0, *ends[:-1]], ends, strict=True))
    everything = row_batches(blocks, batch_size)
    assert [row for batch in everything for row in batch] == list(range(ends[-1]))
    assert max(map(len, everything)) <= batch_size
    pending = [block for block in blocks if data.draw(st.booleans())]
    for batch in row_batches(pending, batch_size):
        assert batch in everything


# ---------------------------------------------------------------------- pixels


def test_workers_change_nothing(images: ImageSet) -> None:
    order = list(epoch_batches(10, 3, 5, 2))
    recipe = Recipe("strong", 1, 2, SMALL)
    rows = row_batches([(0, 7), (7, 10)], 3)
    trained, viewed = [], []
    for workers in (0, 1, 2):
        trained.append(training_pixels(images, order, 5, workers))
        viewed.append(gathered(loader(ViewImages(images, recipe), rows, workers, CPU)))
    for made in (trained, viewed):
        for other in made[1:]:
            np.testing.assert_array_equal(other[0], made[0][0])
            assert torch.equal(other[1], made[0][1])
    assert trained[0][0].tolist() == [row for batch in order for _, row in batch]
    assert viewed[0][0].tolist() == list(range(10))
    assert trained[0][1].shape == (9, 1, 3, 12, 12)
    assert viewed[0][1].shape == (10, 3, 3, 12, 12)
    assert viewed[0][1].dtype == torch.uint8


def test_views_are_those_of_the_recipe(images: ImageSet) -> None:
    recipe = Recipe("tta", 0, 0, SMALL)
    _, pixels, _ = gathered(loader(ViewImages(images, recipe), [[4, 1], [7]], 0, CPU))
    made = recipe.augmentations()
    for k, row in enumerate((4, 1, 7)):
        expected = recipe.render(decode(images.path(row)), str(images.ids[row]), made)
        np.testing.assert_array_equal(pixels[k].numpy(), expected)


def test_an_image_is_decoded_once_for_all_its_views(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def counted(path: Path) -> Image.Image:
        opened.append(path.stem)
        return decode(path)

    monkeypatch.setattr("featcache.batches.decode", counted)
    recipe = Recipe("strong", 0, 16, SMALL)
    _, pixels, _ = gathered(loader(ViewImages(images, recipe), [[4, 1], [7]], 0, CPU))
    assert pixels.shape[:2] == (3, 17)
    assert opened == images.ids[[4, 1, 7]].tolist()


def test_augmentation_is_a_function_of_seed_epoch_and_id(images: ImageSet, tmp_path: Path) -> None:
    def of(some: ImageSet, image_id: str, epoch: int = 0, seed: int = 0) -> bytes:
        row = some.ids.tolist().index(image_id)
        return training_pixels(some, [[(epoch, row)]], seed)[1].numpy().tobytes()

    here = of(images, "c")
    others = find_images(write_images(tmp_path / "others", ["zz", "c", "b2"]))
    assert of(others, "c") == here
    assert training_pixels(images, [[(0, 5), (0, 2)]])[1][1].numpy().tobytes() == here
    assert len({here, of(images, "c", epoch=1), of(images, "c", seed=1)}) == 3

    Image.open(images.path(2)).save(tmp_path / "others" / "renamed.png")
    renamed = find_images(tmp_path / "others")
    assert of(renamed, "renamed") != here


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_keeps_its_row_and_moves_no_other(
    images: ImageSet, workers: int
) -> None:
    order = [[(0, 3), (0, 0), (0, 1)], [(0, 9), (0, 2)]]
    rows = row_batches([(0, 10)], 4)
    recipe = Recipe("strong", 0, 1, SMALL)
    before = training_pixels(images, order)
    views_before = gathered(loader(ViewImages(images, recipe), rows, 0, CPU))
    images.path(0).write_bytes(b"not an image")
    images.path(9).unlink()
    after = training_pixels(images, order, workers=workers)
    views_after = gathered(loader(ViewImages(images, recipe), rows, workers, CPU))
    for whole, damaged in ((before, after), (views_before, views_after)):
        np.testing.assert_array_equal(damaged[0], whole[0])
        for k, row in enumerate(damaged[0].tolist()):
            if row in (0, 9):
                assert not damaged[1][k].any()
            else:
                assert torch.equal(damaged[1][k], whole[1][k])
        reasons = dict(zip(damaged[0].tolist(), damaged[2], strict=True))
        assert {row for row, reason in reasons.items() if reason} == {0, 9}
        assert "cannot identify" in str(reasons[0])
        assert reasons[9] == "the file does not exist"
        assert set(whole[2]) == {None}


def test_the_mask_of_readable_images(images: ImageSet) -> None:
    images.path(1).write_bytes(b"")
    (batch,) = loader(ViewImages(images, Recipe("eval", 0, 0, SMALL)), [[0, 1, 2]], 0, CPU)
    assert batch.readable.tolist() == [True, False, True]
    assert batch.readable.dtype == bool
    assert batch.rows.dtype == np.int64


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["own_batches:too_wide", "own_batches:absent"])
def test_what_is_wrong_with_an_augmentation_is_one_line_from_a_worker_too(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, name: str
) -> None:
    (tmp_path / "own_batches.py").write_text(
        "def too_wide(image, size, rng):\n    return image.resize((size + 1, size))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    datasets: list[Any] = [
        TrainingImages(images, SMALL, name, 0),
        ViewImages(images, Recipe(name, 0, 1, SMALL)),
    ]
    for dataset, order in zip(datasets, ([[(0, 0)]], [[0]]), strict=True):
        with pytest.raises(InputError) as caught:
            list(loader(dataset, order, workers, CPU))
        assert str(caught.value).startswith(f"augmentation '{name}'")
        assert "\n" not in str(caught.value)


# --------------------------------------------------------------------- signals

# macOS has no sigwaitinfo: workers there cannot know a signal of their parent from one to the
# whole group, and what is tested here does not exist (see batches._leave_signals_to_parent).
KNOWS_SENDERS = pytest.mark.skipif(
    not hasattr(signal, "sigwaitinfo"), reason="the system does not tell who sent a signal"
)


@KNOWS_SENDERS
def test_signals_from_others_do_not_end_a_worker(images: ImageSet) -> None:
    order = [[row] for row in range(10)] * 3  # more than the worker prepares in advance
    batches = loader(ViewImages(images, Recipe("eval", 0, 0, SMALL)), order, 1, CPU)
    others = set(multiprocessing.active_children())
    rows = next(batches).rows.tolist()
    (worker,) = set(multiprocessing.active_children()) - others
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGINT)
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    rows += [int(row) for _ in range(9) for row in next(batches).rows]
    assert rows == list(range(10))
    os.kill(worker.pid, signal.SIGTERM)  # from the parent
    worker.join(30)
    status = worker.exitcode
    worker.kill()  # else a failure would keep the tests from ending
    assert status == 0


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (EOFError(), True),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), True),
        (FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0."), False),
        (RuntimeError("fault"), False),
    ],
)
def test_a_worker_that_is_gone_is_told_from_faults(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch, error: Exception, told: bool
) -> None:
    def fail(source: object) -> None:
        raise error

    monkeypatch.setattr(batches.DataLoader, "__iter__", fail)
    dataset = ViewImages(images, Recipe("eval", 0, 0, Preprocessing(image_size=12)))
    source = loader(dataset, [[0]], 1, torch.device("cpu"))
    with pytest.raises(InputError if told else type(error)) as caught:
        next(source)
    assert ("fewer --workers" in str(caught.value)) == told


ENDS_IN_AN_ERROR = """
import sys, torch
from torch.utils.data import DataLoader
from featcache.batches import ViewImages, loader
from featcache.images import find_images
from featcache.views import Preprocessing, Recipe
images = find_images(sys.argv[1])
dataset = ViewImages(images, Recipe("eval", 0, 0, Preprocessing(image_size=12)))
batches = loader(dataset, [[row] for row in range(10)] * 9, 1, torch.device("cpu"))
next(batches)
def work(held):  # the traceback keeps the frame and the workers until Python ends
    raise RuntimeError("fault")
work(batches)
"""


@pytest.mark.slow
@KNOWS_SENDERS
def test_a_process_that_fails_is_not_kept_waiting_by_its_workers(images: ImageSet) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ENDS_IN_AN_ERROR, str(images.directory)],
        cwd=ROOT,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith(b"RuntimeError: fault")
