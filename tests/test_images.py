"""Finding image files, and decoding whatever they hold: pixels or a reason, never a surprise."""

from __future__ import annotations

import errno
import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from featcache.errors import InputError
from featcache.imagefacts import file_contents
from featcache.images import UnreadableImage, decode, find_images, read_ids

Write = Callable[[str, bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file, with its folders, and return its path."""

    def write(name: str, content: bytes = b"") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int = 13, width: int = 17, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 9))
        + chunk(b"IEND", b"")
    )


def gif_without_pixels() -> bytes:
    """A GIF whose only frame is 0 x 0 pixels large."""
    data = bytearray(encoded(Image.new("L", (4, 4)), "GIF"))
    frame = data.rindex(b",")
    data[frame + 5 : frame + 9] = bytes(4)
    return bytes(data)


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(decode(path))


# ------------------------------------------------------------------- finding


def test_files_are_found_in_all_folders_and_sorted_by_id(write: Write, tmp_path: Path) -> None:
    names = ["z/b.jpg", "a/deep/er/c.PNG", "a.JPEG", "z/d.tar.webp", "10.bmp", "9.Gif"]
    for name in [*names, "notes.txt", "a.csv", ".jpg", "x.jpg.partial", "folder.jpg/e.tiff"]:
        write(name, b"")
    images = find_images(str(tmp_path))
    assert images.ids.tolist() == ["10", "9", "a", "b", "c", "d.tar", "e"]
    assert len(images) == 7
    for row, image_id in enumerate(images.ids):
        assert images.path(row).is_file()
        assert images.path(row).stem == image_id
    assert images.files[3] == os.path.join("z", "b.jpg")


@pytest.mark.parametrize("second", ["other/x.jpg", "x.PNG", "x.jpeg"])
def test_two_files_of_one_id_are_refused(write: Write, tmp_path: Path, second: str) -> None:
    write("x.jpg", b"")
    write("between.jpg", b"")
    write(second, b"")
    with pytest.raises(InputError, match="'x'") as caught:
        find_images(tmp_path)
    assert "x.jpg" in str(caught.value)
    assert second in str(caught.value)


def test_ids_that_differ_in_case_are_two(write: Write, tmp_path: Path) -> None:
    write("one/A.jpg", b"")
    write("two/a.jpg", b"")
    assert find_images(tmp_path).ids.tolist() == ["A", "a"]


def test_no_directory_no_images(write: Write, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        find_images(tmp_path / "absent")
    with pytest.raises(InputError, match="no such directory"):
        find_images(write("file.jpg", b""))
    (tmp_path / "empty").mkdir()
    write("text/readme.txt", b"")
    for name in ("empty", "text"):
        with pytest.raises(InputError, match=f"{name}: no image files"):
            find_images(tmp_path / name)


def test_a_folder_that_cannot_be_listed_is_not_left_out(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("open/a.jpg", b"")
    write("locked/b.jpg", b"")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="locked: cannot be listed: Permission denied"):
        find_images(tmp_path)


def test_links_to_folders_are_followed_and_lead_into_no_circle(
    write: Write, tmp_path: Path
) -> None:
    """A set that is put together of links must not be found empty, or half."""
    images = write("images/a.jpg", b"1").parent
    write("elsewhere/b.jpg", b"2")
    (images / "more").symlink_to(tmp_path / "elsewhere")
    (images / "once more").symlink_to(tmp_path / "elsewhere")
    (images / "round").symlink_to(images)
    (tmp_path / "elsewhere" / "back").symlink_to(images)
    found = find_images(images)
    assert found.ids.tolist() == ["a", "b"]
    assert [found.path(row).read_bytes() for row in range(2)] == [b"1", b"2"]


def test_select_keeps_the_order_asked_for(write: Write, tmp_path: Path) -> None:
    for name in ("a.jpg", "in/b.png", "c.jpg"):
        write(name, b"")
    images = find_images(tmp_path)
    some, missing = images.select(["c", "nowhere", "b", "c"])
    assert some.ids.tolist() == ["c", "b", "c"]
    assert missing == ["nowhere"]
    assert [some.path(row).name for row in range(3)] == ["c.jpg", "b.png", "c.jpg"]
    again, missing = images.select(np.array(["a"]))
    assert (again.ids.tolist(), missing) == (["a"], [])
    nothing, missing = images.select(["x", "y"])
    assert (len(nothing), missing) == (0, ["x", "y"])


# ---------------------------------------------------------------- lists of ids


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        (b"b\na\n", ["b", "a"]),
        (b"\xef\xbb\xbfb\r\na", ["b", "a"]),
        (b"ImageID,Source\nb,verification\na,machine\n", ["b", "a"]),
        (b"\xef\xbb\xbfimage_id,labels\nb,/m/1 /m/2\na,\n", ["b", "a"]),
        (b"  b \n\n\na\t\n\n", ["b", "a"]),
        ("é,1\n名前,2\n".encode(), ["é", "名前"]),
        (b"a\nid\n", ["a", "id"]),
        (b'"a, b",1\n"c ""d"""\n', ["a, b", 'c "d"']),
    ],
)
def test_lists_of_ids(write: Write, content: bytes, ids: list[str]) -> None:
    assert read_ids(write("ids.txt", content)) == ids


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no ids"),
        (b"\n \n", "no ids"),
        (b"image_id\n", "no ids"),
        (b"a\nb\nc\nb\n", "'b' stands twice"),
        (b"a,1\n,2\n", "nothing before its comma"),
        (b"\xff\xfe\x00a", "cannot be read"),
    ],
)
def test_bad_lists_of_ids(write: Write, content: bytes, message: str) -> None:
    path = write("ids.txt", content)
    with pytest.raises(InputError, match=message) as caught:
        read_ids(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_list_of_ids(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_ids(path)


# -------------------------------------------------------------------- decoding


def test_colours_and_greys_come_as_they_are(write: Write) -> None:
    image = noise()
    assert decode(write("a.png", encoded(image, "PNG"))).mode == "RGB"
    np.testing.assert_array_equal(pixels_of(write("a.bmp", encoded(image, "BMP"))), image)
    grey = image.convert("L")
    decoded = decode(str(write("g.png", encoded(grey, "PNG"))))
    assert decoded.mode == "L"
    np.testing.assert_array_equal(decoded, grey)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_files_are_unreadable(write: Write, kind: str, share: float) -> None:
    whole = encoded(noise(40, 40), kind)
    assert decode(write("whole", whole)).size == (40, 40)
    with pytest.raises(UnreadableImage):
        decode(write("cut", whole[: int(share * len(whole))]))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>404 Not Found</html>", "cannot identify image file"),
        (b"\0" * 1000, "cannot identify image file"),
        (b"\xff\xd8\xff", "cannot identify image file"),
        (png_header(60_000, 60_000), "exceeds limit"),
        (b"P6 0 7 255\n", "cannot identify image file"),
        (gif_without_pixels(), "tile cannot extend outside image"),
    ],
)
def test_what_is_no_image(write: Write, content: bytes, reason: str) -> None:
    path = write("fake.jpg", content)
    with pytest.raises(UnreadableImage, match=reason) as caught:
        decode(path)
    assert "\n" not in str(caught.value)
    assert str(path.parent) not in str(caught.value)


def test_no_file_and_no_plain_file(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="the file does not exist"):
        decode(tmp_path / "absent.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(UnreadableImage, match="directory"):
        decode(tmp_path / "folder.jpg")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImage, match="a pipe, no file"):
        decode(tmp_path / "pipe.jpg")
    images = find_images(tmp_path)
    assert file_contents(images, 1) == file_contents(images, 1)


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    name = tmp_path / os.fsdecode(b"\xff\xfe.png")
    try:
        name.write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    with pytest.raises(InputError, match=r"'\\udcff\\udcfe' is not valid UTF-8; rename it"):
        find_images(tmp_path)


CODES = [errno.EIO, errno.EMFILE, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ENOTCONN]


@pytest.mark.parametrize("code", CODES)
def test_trouble_of_the_machine_is_no_fault_of_the_image(
    write: Write, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = write("fine.png", encoded(noise(), "PNG"))

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fail)
        with pytest.raises(InputError, match=re.escape(os.strerror(code))) as caught:
            decode(path)
    assert str(path) in str(caught.value)
    assert "run the same command again" in str(caught.value)
    np.testing.assert_array_equal(pixels_of(path), noise())


@pytest.mark.parametrize("name", ["ENOKEY", "EKEYEXPIRED"])
def test_a_locked_folder_is_no_fault_of_the_image(
    write: Write, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if not hasattr(errno, name):
        pytest.skip("this system has no such error")
    test_trouble_of_the_machine_is_no_fault_of_the_image(write, monkeypatch, getattr(errno, name))


def test_too_little_memory_is_no_fault_of_the_image(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("large.png", encoded(noise(), "PNG"))

    def fail(image: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(InputError, match=r"large\.png: .*: not enough memory; .*fewer --workers"):
        decode(path)


def test_whatever_a_decoder_raises_is_a_reason(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("odd.png", encoded(noise(), "PNG"))

    def fail(image: Image.Image) -> None:
        assert image.size == (0, 0), "of a decoder"

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(UnreadableImage, match="of a decoder"):
        decode(path)


def test_large_images_are_used_and_bombs_are_not(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    # Pillow warns above its limit and refuses above twice the limit.
    assert decode(write("large.png", encoded(noise(10, 15), "PNG"))).size == (15, 10)
    with pytest.raises(UnreadableImage, match="limit of 200 pixels"):
        decode(write("bomb.png", encoded(noise(10, 21), "PNG")))


def test_a_very_wide_image(write: Write) -> None:
    image = Image.new("RGB", (20_000, 1), (1, 2, 3))
    assert decode(write("wide.jpg", encoded(image, "JPEG"))).size == (20_000, 1)


def test_cmyk(write: Write) -> None:
    image = Image.new("RGB", (16, 16), (200, 60, 20)).convert("CMYK")
    decoded = decode(write("print.jpg", encoded(image, "JPEG", quality=95)))
    assert decoded.mode == "RGB"
    np.testing.assert_allclose(np.asarray(decoded).astype(int)[8, 8], (200, 60, 20), atol=6)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_and_not_clipped(write: Write, kind: str) -> None:
    deep = np.array([[0, 2570, 32_896, 65_535, 257, 65_000]], np.uint16)
    decoded = decode(write("deep", encoded(Image.fromarray(deep), kind)))
    assert decoded.mode == "L"
    assert np.asarray(decoded).tolist() == [[0, 10, 128, 255, 1, 253]]


def test_16_bits_of_a_portable_greymap(write: Write) -> None:
    data = b"P5 4 1 65535\n" + np.array([0, 514, 65_535, 25_700], ">u2").tobytes()
    assert pixels_of(write("a.pgm", data)).tolist() == [[0, 2, 255, 100]]


def test_floating_point_greys(write: Write) -> None:
    values = np.array([[0.0, 0.2, 1.0]], np.float32)
    unit = write("unit.tif", encoded(Image.fromarray(values), "TIFF"))
    assert pixels_of(unit).tolist() == [[0, 51, 255]]
    bytes_ = write("bytes.tif", encoded(Image.fromarray(values * 200), "TIFF"))
    assert pixels_of(bytes_).tolist() == [[0, 40, 200]]
    strange = np.array([[np.nan, -np.inf, np.inf, -3, 7]], np.float32)
    path = write("strange.tif", encoded(Image.fromarray(strange), "TIFF"))
    assert pixels_of(path).tolist() == [[0, 0, 255, 0, 7]]


def test_one_bit(write: Write) -> None:
    bits = np.array([[True, False, True], [False, False, True]])
    decoded = decode(write("fax.png", encoded(Image.fromarray(bits), "PNG")))
    assert decoded.mode in ("RGB", "L")
    assert np.asarray(decoded.convert("L")).tolist() == (bits * 255).tolist()


def test_transparency_is_laid_on_white(write: Write) -> None:
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    path = write("rgba.png", encoded(Image.fromarray(rgba), "PNG"))
    np.testing.assert_array_equal(pixels_of(path), [[[10, 20, 30], [255] * 3, [127] * 3]])
    path = write("rgba.webp", encoded(Image.fromarray(rgba), "WEBP", lossless=True))
    np.testing.assert_array_equal(pixels_of(path), [[[10, 20, 30], [255] * 3, [127] * 3]])
    alpha = np.array([[255, 0]], np.uint8)
    la = Image.merge("LA", [Image.new("L", (2, 1), 50), Image.fromarray(alpha)])
    path = write("la.png", encoded(la, "PNG"))
    np.testing.assert_array_equal(pixels_of(path), [[[50] * 3, [255] * 3]])


def palette_image() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([9, 8, 7, 200, 100, 0, 0, 0, 250])
    image.putdata([0, 1, 2])
    return image


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palettes(write: Write, kind: str) -> None:
    colours = [[9, 8, 7], [200, 100, 0], [0, 0, 250]]
    plain = decode(write("plain", encoded(palette_image(), kind)))
    assert np.asarray(plain).tolist() == [colours]
    one_clear = decode(write("clear", encoded(palette_image(), kind, transparency=1)))
    assert np.asarray(one_clear).tolist() == [[colours[0], [255] * 3, colours[2]]]


def test_a_palette_with_an_alpha_of_each_colour(write: Write) -> None:
    path = write("p.png", encoded(palette_image(), "PNG", transparency=bytes([255, 0, 51])))
    assert pixels_of(path).tolist() == [[[9, 8, 7], [255] * 3, [204, 204, 254]]]


def test_one_colour_declared_transparent(write: Write) -> None:
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    path = write("rgb.png", encoded(rgb, "PNG", transparency=(1, 2, 3)))
    assert pixels_of(path).tolist() == [[[255] * 3, [4, 5, 6]]]
    grey = Image.fromarray(np.array([[70, 80]], np.uint8))
    path = write("grey.png", encoded(grey, "PNG", transparency=80))
    assert pixels_of(path).tolist() == [[[70] * 3, [255] * 3]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(write: Write, kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("#c80000", "#00c800", "#0000c8")]
    options = {"lossless": True} if kind == "WEBP" else {}
    path = write(
        "film", encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    )
    with Image.open(path) as film:
        assert getattr(film, "n_frames", 1) == 3
    np.testing.assert_array_equal(pixels_of(path), np.asarray(frames[0]))


# What a viewer does with the stored pixels, by the EXIF standard.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation(write: Write, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = noise(5, 9)
    stored = np.asarray(image)
    upright = UPRIGHT[orientation](stored)
    path = write("a.png", encoded(image, "PNG", exif=exif))
    np.testing.assert_array_equal(pixels_of(path), upright)
    path = write("a.webp", encoded(image, "WEBP", exif=exif, lossless=True))
    np.testing.assert_array_equal(pixels_of(path), upright)
    path = write("a.jpg", encoded(image, "JPEG", exif=exif))
    assert pixels_of(path).shape == upright.shape


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01",
        b"Exif\0\0",
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_data_do_not_cost_the_pixels(write: Write, kind: str, exif: bytes) -> None:
    image = noise(8, 6)
    assert decode(write("a", encoded(image, kind, exif=exif))).size == (6, 8)


def test_no_program_is_started_for_an_image(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "started"
    ghostscript = write("bin/gs", f"#!/bin/sh\necho run >> {started}\n".encode())
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(ghostscript.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    header = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    path = write("holiday.jpg", header)
    with pytest.raises(UnreadableImage):
        decode(path)
    assert not started.exists()
    with Image.open(path) as image, suppress(OSError):
        image.load()
    assert started.exists()  # so the trap works


# ------------------------------------------------------------------------ fuzz


def fuzz_seeds() -> list[bytes]:
    image = noise()
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
    return [
        encoded(image, "JPEG", exif=exif),
        encoded(image, "JPEG", progressive=True),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image, "PNG", exif=exif),
        encoded(image.quantize(8), "PNG", transparency=3),
        encoded(Image.fromarray(deep), "PNG"),
        encoded(image, "WEBP", exif=exif),
        encoded(image.convert("RGBA"), "WEBP", lossless=True),
    ]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, flipped, left out or doubled, more often near the beginning."""
    mutant = bytearray(data)
    kind = rng.integers(5)
    for _ in range(rng.integers(1, 5)):
        if not mutant:
            break
        at = int(rng.integers(len(mutant)) * rng.random())
        length = int(rng.integers(1, 20))
        if kind == 0:
            mutant[at] = int(rng.integers(256))
        elif kind == 1:
            mutant[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            del mutant[at + 1 :]
        elif kind == 3:
            del mutant[at : at + length]
        else:
            mutant[at:at] = mutant[at : at + length]
    return bytes(mutant)


def test_damaged_bytes_give_pixels_or_a_reason(write: Write) -> None:
    rng = np.random.default_rng(0)
    seeds = fuzz_seeds()
    count = 1000
    readable, reasons = 0, []
    for k in range(count):
        path = write("mutant.jpg", mutated(seeds[k % len(seeds)], rng))
        try:
            image = decode(path)
        except UnreadableImage as error:
            reasons.append(str(error))
        else:
            assert image.mode in ("RGB", "L")
            assert np.asarray(image).size > 0
            readable += 1
    assert all(reason and "\n" not in reason for reason in reasons)
    assert min(readable, len(reasons)) > count // 20


def test_too_little_memory_to_turn_an_image_leaves_none_unturned(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write("a.png", encoded(Image.new("RGB", (6, 8)), "PNG", exif=exif))

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "transpose", no_memory)
    with pytest.raises(InputError, match=r"a\.png"):
        decode(path)
