"""From files to a cache: whatever an image file holds, every row is that of its own image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from featcache import FeatureCache
from featcache.cli import main
from featcache.images import UnreadableImage, decode
from tests.test_images import encoded, fuzz_seeds, mutated, noise, png_header

SIZE = 8


class MeanColour(nn.Module):
    """Its features are the mean of each channel, so that a row tells which image it is of."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.last = nn.Linear(3, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(x.mean((2, 3)))
        return logits


def mean_colour(num_classes: int) -> nn.Module:
    """For ``--arch``."""
    return MeanColour(num_classes)


Extract = Callable[..., FeatureCache]


@pytest.fixture
def extract(tmp_path: Path) -> Extract:
    """A cache of the files of a folder; the features are colours from 0 to 1."""
    torch.manual_seed(0)
    torch.save(MeanColour(2).state_dict(), tmp_path / "colour.pt")
    (tmp_path / "classes.csv").write_text("label_code\na\nb\n")
    words = ["--arch", f"{__name__}:mean_colour", "--weights", str(tmp_path / "colour.pt")]
    words += ["--classes", str(tmp_path / "classes.csv"), "--image-size", str(SIZE)]
    words += ["--mean", "0,0,0", "--std", "1,1,1", "--interpolation", "nearest"]
    assert main(["import", *words, "--out", str(tmp_path / "run")]) == 0

    def extract(images: Path, *more: str) -> FeatureCache:
        out = tmp_path / "x.h5"
        words = ["--run", str(tmp_path / "run"), "--images", str(images), "--out", str(out)]
        assert main(["extract", *words, "--device", "cpu", "--threads", "1", *more]) == 0
        return FeatureCache(out)

    return extract


def colour(k: int) -> tuple[int, int, int]:
    """Another one for every number below 4,096."""
    return 16 * (k % 16) + 3, 16 * (k // 16 % 16) + 5, 16 * (k // 256) + 7


def plain(k: int, kind: str = "PNG", **options: Any) -> bytes:
    return encoded(Image.new("RGB", (9, 7), colour(k)), kind, **options)


def turned(k: int) -> bytes:
    """A picture whose upper half has the colour, once it is turned as it asks to be."""
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    image = Image.new("RGB", (16, 8), (255, 255, 255))
    image.paste(colour(k), (0, 0, 8, 8))
    return encoded(image, "PNG", exif=exif)


def deep(k: int) -> bytes:
    """16 bits; grey, so the red of the colour in all channels."""
    return encoded(Image.fromarray(np.full((6, 6), 257 * colour(k)[0], np.uint16)), "PNG")


def film(k: int) -> bytes:
    others = [Image.new("RGB", (9, 7), "white")] * 2
    first = Image.new("RGB", (9, 7), colour(k))
    return encoded(first, "WEBP", save_all=True, append_images=others, lossless=True)


READABLE: dict[str, Callable[[int], bytes]] = {
    "animated": film,
    "cmyk": lambda k: encoded(Image.new("RGB", (9, 7), colour(k)).convert("CMYK"), "TIFF"),
    "deep": deep,
    "palette": lambda k: encoded(Image.new("RGB", (9, 7), colour(k)).quantize(2), "PNG"),
    "plain": plain,
    "turned": turned,
    "wide": lambda k: encoded(Image.new("RGB", (20_000, 8), colour(k)), "PNG"),
}
UNREADABLE: dict[str, tuple[bytes, str]] = {
    "bomb": (png_header(50_000, 50_000), "decompression bomb"),
    "empty": (b"", "the file is empty"),
    "html": (b"<html>404</html>", "cannot identify image file"),
    "truncated": (encoded(noise(40, 40), "JPEG")[:900], "truncated"),
    "zeros": (bytes(500), "cannot identify image file"),
}


def test_every_kind_of_file_keeps_its_row(
    extract: Extract, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    files = {name: make(k) for k, (name, make) in enumerate(READABLE.items())}
    files |= {name: content for name, (content, _) in UNREADABLE.items()}
    for name, content in files.items():
        (images / f"{name}.jpg").write_bytes(content)  # endings say nothing
    (tmp_path / "ids.txt").write_text("\n".join([*files, "nowhere"]))
    cache = extract(images, "--ids", str(tmp_path / "ids.txt"), "--workers", "0")
    assert cache.ids.tolist() == [*READABLE, *UNREADABLE, "nowhere"]
    assert cache.valid.tolist() == [True] * len(READABLE) + [False] * (len(UNREADABLE) + 1)
    rows = dict(zip(cache.ids.tolist(), cache.x("eval"), strict=True))
    for k, name in enumerate(READABLE):
        expected = np.array(colour(k)) / 255
        if name == "deep":
            expected[:] = expected[0]
        if name == "turned":
            expected = (expected + 1) / 2
        np.testing.assert_allclose(rows[name], expected, atol=2e-2 if name == "cmyk" else 1e-3)
    with h5py.File(cache.path) as file:
        skipped = file["skipped/id"].asstr()[:].tolist()
        reasons = file["skipped/reason"].asstr()[:].tolist()
    assert skipped == [*UNREADABLE, "nowhere"]
    for name, reason in zip(skipped, reasons, strict=True):
        assert UNREADABLE.get(name, (b"", "the file does not exist"))[1] in reason
        assert str(tmp_path) not in reason
        np.testing.assert_array_equal(rows[name], 0)
    capsys.readouterr()
    assert main(["info", str(cache.path)]) == 0
    text = capsys.readouterr().out
    assert "6 skipped" in text
    for name, reason in list(zip(skipped, reasons, strict=True))[:3]:
        assert f"{name}: {reason}"[:60] in text
    assert "and 3 more in .skipped" in text


def test_damaged_files_shift_no_row(extract: Extract, tmp_path: Path) -> None:
    """1,000 mutants among sound images, through worker processes."""
    images, rng, seeds = tmp_path / "images", np.random.default_rng(2), fuzz_seeds()
    images.mkdir()
    sound = set(range(0, 1250, 5))
    for k in range(1250):
        content = plain(k) if k in sound else mutated(seeds[k % len(seeds)], rng)
        (images / f"{k:04d}.jpg").write_bytes(content)
    cache = extract(images, "--workers", "2", "--batch-size", "50")
    assert cache.ids.tolist() == [f"{k:04d}" for k in range(1250)]
    expected = np.array([colour(k) for k in sorted(sound)]) / 255
    rows = sorted(sound)
    assert cache.valid[rows].all()
    np.testing.assert_allclose(cache.x("eval")[rows], expected, atol=1e-3)
    assert 50 < len(cache.skipped) < 950
    assert all(cache.skipped.values())
    for k in range(1250):  # one by one
        try:
            pixels = np.asarray(decode(images / f"{k:04d}.jpg").convert("RGB"))
        except UnreadableImage:
            assert not cache.valid[k]
            np.testing.assert_array_equal(cache.features[k], 0)
        else:
            assert cache.valid[k]
            low, high = pixels.min((0, 1)) / 255, pixels.max((0, 1)) / 255
            assert (cache.x("eval")[k] >= low - 1e-3).all()
            assert (cache.x("eval")[k] <= high + 1e-3).all()
    assert cache.verify() == []
