"""Find image files and decode them without surprises."""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import shlex
import stat
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from featcache.errors import InputError
from featcache.folders import walk

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
# Pillow goes by content, not by ending, and knows formats that run other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Trouble of the machine, which may have passed when the command is run again.
_PERMISSION = frozenset({errno.EACCES, errno.EPERM})
_TROUBLE = "EIO EMFILE ENFILE ENOMEM ESTALE ETIMEDOUT ENOTCONN ENOKEY EKEYEXPIRED EKEYREVOKED"
MACHINE_ERRORS = _PERMISSION | {
    getattr(errno, name) for name in _TROUBLE.split() if hasattr(errno, name)
}


class UnreadableImage(Exception):
    """The bytes of an image file could not be turned into pixels; the message says why."""


@dataclass(frozen=True)
class ImageSet:
    """Image files below one directory.

    Attributes
    ----------
    directory : Path
        What the files are relative to.
    ids : ndarray of str, shape (n,)
        File names without their ending.
    files : ndarray of str, shape (n,)
        Paths relative to ``directory``.
    """

    directory: Path
    ids: np.ndarray
    files: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, row: int) -> Path:
        """Where the image of a row is."""
        return self.directory / str(self.files[row])

    def select(self, ids: Sequence[str] | np.ndarray) -> tuple[ImageSet, list[str]]:
        """The images of some ids, in that order, and the ids that have no file."""
        rows = {image_id: row for row, image_id in enumerate(self.ids.tolist())}
        wanted = [str(image_id) for image_id in ids]
        found = [rows[i] for i in wanted if i in rows]
        missing = [i for i in wanted if i not in rows]
        return ImageSet(self.directory, self.ids[found], self.files[found]), missing


def _refuse_folder(error: OSError) -> None:
    """It would be left out and nothing be said."""
    raise InputError(f"{error.filename}: cannot be listed: {error.strerror}; check its permissions")


def _refuse_no_text(folder: str, stem: str) -> None:
    """Bytes that are no text could not become an id of a cache, nor be named in a list of ids."""
    try:
        stem.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{folder!a}: the file name {stem!a} is not valid UTF-8; rename it"
        ) from None


def find_images(directory: str | os.PathLike[str]) -> ImageSet:
    """All image files below a directory, sorted by id (the file name without its ending).

    Folders that links lead to count as well, each once.

    Raises
    ------
    InputError
        If the directory does not exist, holds no image file or a folder that cannot be
        listed, or two files have one id.
    """
    root = Path(directory)
    if not root.is_dir():
        raise InputError(f"{root}: no such directory of images; check --images")
    found: list[tuple[str, str]] = []
    for folder, names in walk(root, _refuse_folder):
        for name in names:
            stem, ending = os.path.splitext(name)
            if ending.lower() in EXTENSIONS:
                _refuse_no_text(folder, stem)
                found.append((stem, os.path.relpath(os.path.join(folder, name), root)))
    if not found:
        known = " ".join(sorted(EXTENSIONS))
        raise InputError(f"{root}: no image files below it; looked for {known}")
    found.sort()
    for (left, left_file), (right, right_file) in pairwise(found):
        if left == right:
            raise InputError(
                f"{root}: two files have the id {left!r}: {left_file} and {right_file}; "
                "remove or rename one"
            )
    ids, files = zip(*found, strict=True)
    return ImageSet(root, np.array(ids), np.array(files))


def read_ids(path: str | os.PathLike[str]) -> list[str]:
    """Ids from a text file, one a line; only the first comma-separated field of a line counts.

    Raises
    ------
    InputError
        If the file is missing, empty, has a line without an id, or names an id twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read as a list of ids ({reason}); check it") from error
    ids = [next(csv.reader([line]))[0].strip() for line in lines if line.strip()]
    if ids and ids[0].lower() in {"imageid", "image_id", "id"}:
        ids = ids[1:]
    if not ids:
        raise InputError(f"{path}: no ids in it; expected one id a line")
    if "" in ids:
        raise InputError(f"{path}: a line has nothing before its comma; expected one id a line")
    if len(set(ids)) < len(ids):
        twice = next(i for i, count in Counter(ids).items() if count > 1)
        raise InputError(f"{path}: the id {twice!r} stands twice; remove one")
    return ids


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Deep greyscale to 8 bits, keeping the relation of the values."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F" and values.size and np.isfinite(values).all() and values.max() <= 1.0:
        scaled = values * 255.0
    elif image.mode.startswith("I"):
        scaled = values / 257.0 if values.size and values.max() > 255 else values
    else:
        scaled = values
    return Image.fromarray(np.nan_to_num(scaled).clip(0, 255).round().astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    transparent = "transparency" in image.info
    if image.mode in ("RGB", "L") and not transparent:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bits(image)
    if transparent or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data say; damaged EXIF data are no reason to give up the pixels."""
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:  # says nothing of the file
        raise
    except Exception:  # Pillow raises whatever damaged EXIF makes it stumble over
        return image


def refuse_trouble(path: str | os.PathLike[str], error: Exception) -> None:
    """Does nothing where the file itself is at fault.

    Raises
    ------
    InputError
        If `error` is trouble of the machine; says how to go on, also without the image.
    """
    code = error.errno if isinstance(error, OSError) else None
    memory = isinstance(error, MemoryError) or code == errno.ENOMEM
    if not memory and code not in MACHINE_ERRORS:
        return
    why = (error.strerror if isinstance(error, OSError) else None) or "not enough memory"
    remedy = "mend that"
    if memory:
        remedy = "free memory or take fewer --workers"
    elif code in _PERMISSION:
        remedy = "check its permissions"
    line = f"{path}: cannot be read now: {why}; {remedy} and run the same command again"
    if memory or code == errno.EIO:  # which may be so for ever
        with contextlib.suppress(OSError):
            size, name = os.path.getsize(path), shlex.quote(str(path))
            # Without the file, or with one of another size, what was begun could not go on.
            line += (
                "; or give this image up: with as many zero bytes in its place (mv "
                f"{name} {name}.bad; truncate -s {size} {name}) it becomes an unreadable one "
                "(what was begun with --hash-images must begin anew)"
            )
    raise InputError(line) from error


def decode(path: str | os.PathLike[str]) -> Image.Image:
    """Decode one image file, upright, as mode RGB or L; of an animation its first frame.

    Deep greys are scaled to 8 bits, transparency is laid on white, CMYK and palettes are converted.

    Raises
    ------
    UnreadableImage
        Missing, empty, truncated, damaged, not an image, or so large that decoding it
        could exhaust memory (Pillow's limit for decompression bombs).
    InputError
        The disk, the network or the system failed, memory or a permission is missing: no
        fault of the image, which must not be marked as bad for good.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns from half its hard limit on; below the limit the image is used.
            warnings.simplefilter("ignore")
            if stat.S_ISFIFO(os.stat(path).st_mode):  # would be waited for, for ever
                raise OSError("a pipe, no file")
            with Image.open(path, formats=FORMATS) as image:
                image.load()
                return _to_rgb(_upright(image))
    except Exception as error:  # damaged bytes make Pillow's decoders raise almost anything
        refuse_trouble(path, error)
        if isinstance(error, FileNotFoundError):
            reason = "the file does not exist"
        elif isinstance(error, OSError) and os.path.isfile(path) and not os.path.getsize(path):
            reason = "the file is empty"
        else:
            reason = str(error).replace(str(path), "the file") or type(error).__name__
        raise UnreadableImage(" ".join(reason.split())) from error
