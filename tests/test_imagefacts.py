"""Image sets are told apart by what they are, in order, and by nothing else."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from featcache import imagefacts
from featcache.errors import InputError
from featcache.imagefacts import (
    ABSENT,
    file_contents,
    file_sizes,
    refuse_changed,
    told_sizes,
)
from featcache.images import ImageSet, find_images


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    for name, data in (("a", b"1"), ("b", b"22"), ("c", b"333"), ("d", b"")):
        (tmp_path / f"{name}.jpg").write_bytes(data)
    return find_images(tmp_path)


def test_sizes_say_how_much_there_is(images: ImageSet) -> None:
    assert file_sizes(images).tolist() == [1, 2, 3, 0]
    before = told_sizes(images, file_sizes(images))
    assert before.startswith("4 files of 6 bytes ")
    images.path(1).unlink()
    assert file_sizes(images).tolist() == [1, ABSENT, 3, 0]
    assert told_sizes(images, file_sizes(images)).startswith("3 files of 4 bytes ")
    images.path(1).write_bytes(b"zz")
    assert told_sizes(images, file_sizes(images)) == before


def test_a_file_that_changes_is_refused_with_both_sizes(images: ImageSet) -> None:
    refuse_changed(images.path(2), 3)
    refuse_changed(images.directory / "none.jpg", ABSENT)
    with pytest.raises(InputError, match=r"c\.jpg: changes .*\(4 bytes at first, 3 bytes now\)"):
        refuse_changed(images.path(2), 4)
    with pytest.raises(InputError, match=r"\(none at first, 0 bytes now\); put it back"):
        refuse_changed(images.path(3), ABSENT)
    images.path(3).unlink()
    with pytest.raises(InputError, match=r"\(0 bytes at first, none now\).*--overwrite"):
        refuse_changed(images.path(3), 0)


@pytest.mark.parametrize("ahead", [1, 3, 256])
def test_contents_are_ids_and_bytes_in_order(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    monkeypatch.setattr(imagefacts, "_AHEAD", ahead)
    before = file_contents(images, 2)
    assert len({before, *(file_contents(images, threads) for threads in (0, 1, 4))}) == 1
    swapped = ImageSet(images.directory, images.ids, images.files[[1, 0, 2, 3]])
    reordered = ImageSet(images.directory, images.ids[::-1], images.files[::-1])
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for row in range(4):
        shutil.copy(images.path(row), moved)
    assert file_contents(find_images(moved), 2) == before
    found = {before, file_contents(swapped, 2), file_contents(reordered, 2)}
    images.path(2).write_bytes(b"334")
    found.add(file_contents(images, 2))
    images.path(2).unlink()
    found.add(file_contents(images, 2))
    assert len(found) == 5


def test_large_files_count_to_their_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    found = set()
    for data in (bytes(3 * 2**20), bytes(3 * 2**20 - 1), bytes(3 * 2**20 - 1) + b"x"):
        path.write_bytes(data)
        found.add(file_contents(find_images(tmp_path), 1))
    assert len(found) == 3


def test_a_file_that_cannot_be_read_now_has_no_hash(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read again later it would be another image, and what was begun be refused."""

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(InputError, match=r"cannot be read now.*run the same command again"):
        file_contents(images, 1)
