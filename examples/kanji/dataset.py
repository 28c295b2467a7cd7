"""The kanji data set: real multi-label images with a shift of domain and of targets.

An image is one character in one typeface; its labels are the components
(radicals) that the character is built of; a domain is a typeface. Six printed
typefaces are the source; brush scripts are what nobody trained on. The split is
by character, so no character is in two parts, and the stages hold the rarer ones.
"""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

DATA = Path(__file__).parent / "data"
SIDE = 48  # pixels
LEVELS = 4  # grey levels kept
COLUMNS = 80  # glyphs in a row of a sheet

SOURCE_FONTS = ("gothic", "mincho", "maruberi", "yusei", "reggae", "kiloji")
ORACLE_FONTS = ("gyosho", "sousyo", "soseki")
TARGET_FONTS = (*ORACLE_FONTS, "seto", "yozfont")
FONTS = (*SOURCE_FONTS, *TARGET_FONTS)

PARTS = {
    "train": 2800,
    "validation": 500,
    "stage_1_labelled": 1000,
    "stage_1_rest": 950,
    "stage_2": 1100,
}
FOLDERS = {
    "train": "source",
    "validation": "source",
    "stage_1_labelled": "stage_1",
    "stage_1_rest": "stage_1",
    "stage_2": "stage_2",
}
MIN_POSITIVES = 3  # training characters that a trainable class needs
COMPLETE = "COMPLETE"  # written last
GROUPS = "groups.csv"


@dataclass(frozen=True)
class Kanji:
    """A character, the part of the split that it belongs to, and its components."""

    character: str
    part: str
    components: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        """Class ids, in the order of the components."""
        return [class_id(c) for c in self.components]


def in_font(kanji: Kanji, font: str) -> bool:
    """Whether the data hold this character in that typeface."""
    common = kanji.part in ("train", "validation")
    if font in SOURCE_FONTS:
        return common
    return not common or font in ORACLE_FONTS


def class_id(component: str) -> str:
    """A class id in the manner of Open Images: /k/ and the code point."""
    return f"/k/{ord(component):05x}"


def image_id(font: str, character: str) -> str:
    """16 hex digits for images of the source typefaces, 24 for all others."""
    digest = hashlib.sha256(f"{font}/{character}".encode()).hexdigest()
    return digest[: 16 if font in SOURCE_FONTS else 24]


def read_kanji() -> list[Kanji]:
    """All characters in the order of the sheets."""
    with (DATA / "kanji.csv").open(encoding="utf-8", newline="") as file:
        return [
            Kanji(row["character"], row["part"], tuple(row["components"].split()))
            for row in csv.DictReader(file)
        ]


def read_sheet(font: str) -> np.ndarray:
    """(n, SIDE, SIDE) uint8, black ink on white; at least as many as the font's characters."""
    with Image.open(DATA / f"{font}.webp") as image:
        grey = np.asarray(image.convert("L"))
    grid = grey.reshape(-1, SIDE, COLUMNS, SIDE).transpose(0, 2, 1, 3)
    return grid.reshape(-1, SIDE, SIDE)


def trainable_classes(kanji: Sequence[Kanji]) -> list[str]:
    """Class ids with at least MIN_POSITIVES training characters, sorted."""
    counts: dict[str, int] = {}
    for k in kanji:
        if k.part == "train":
            for label in k.labels:
                counts[label] = counts.get(label, 0) + 1
    return sorted(label for label, count in counts.items() if count >= MIN_POSITIVES)


def _write_csv(path: Path, header: Sequence[str] | None, rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if header is not None:
            writer.writerow(header)
        writer.writerows(rows)


def _write_images(directory: Path, font: str, kanji: Sequence[Kanji]) -> None:
    """One PNG an image, below train/ for source typefaces, FONT/FOLDER/ for the others."""
    glyphs = read_sheet(font)
    for k, glyph in zip((k for k in kanji if in_font(k, font)), glyphs, strict=False):
        folder = "train" if font in SOURCE_FONTS else f"{font}/{FOLDERS[k.part]}"
        path = directory / folder / f"{image_id(font, k.character)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(glyph).save(path, compress_level=1)


def _write_source_labels(directory: Path, kanji: Sequence[Kanji]) -> None:
    """The challenge's files for training, and the ids of the validation images."""
    common = [k for k in kanji if in_font(k, SOURCE_FONTS[0])]
    _write_csv(
        directory / "train_human_labels.csv",
        ["ImageID", "Source", "LabelName", "Confidence"],
        (
            [image_id(font, k.character), "verification", label, 1]
            for font in SOURCE_FONTS
            for k in common
            for label in k.labels
        ),
    )
    held_out = [k.character for k in common if k.part == "validation"]
    _write_csv(
        directory / "validation_ids.txt",
        None,
        ([image_id(font, c)] for font in SOURCE_FONTS for c in held_out),
    )
    names = sorted({c for k in kanji for c in k.components})
    _write_csv(
        directory / "class-descriptions.csv",
        ["label_code", "description"],
        ([class_id(c), c] for c in names),
    )
    _write_csv(
        directory / "classes-trainable.csv",
        ["label_code"],
        ([label] for label in trainable_classes(kanji)),
    )


def _write_target_labels(directory: Path, font: str, kanji: Sequence[Kanji]) -> None:
    """Tuning labels (no header), sample submissions, and the solutions for scoring."""

    def rows(*parts: str, truth: bool = True) -> list[list[str]]:
        return [
            [image_id(font, k.character), " ".join(k.labels) if truth else ""]
            for k in kanji
            if k.part in parts
        ]

    header = ["image_id", "labels"]
    here = directory / font
    _write_csv(here / "tuning_labels.csv", None, rows("stage_1_labelled"))
    for stage, parts in {
        "stage_1": ("stage_1_labelled", "stage_1_rest"),
        "stage_2": ("stage_2",),
    }.items():
        sample = here / f"{stage}_sample_submission.csv"
        _write_csv(sample, header, rows(*parts, truth=False))
    _write_csv(here / "stage_1_solution.csv", header, rows("stage_1_rest"))
    _write_csv(here / "stage_2_solution.csv", header, rows("stage_2"))
    if font in ORACLE_FONTS:
        _write_csv(here / "source_labels.csv", header, rows("train", "validation"))


def unpack(
    directory: str | os.PathLike[str],
    target_fonts: Sequence[str] = TARGET_FONTS,
    progress: Callable[[str], None] = print,
) -> Path:
    """Write the data as image files and label files in the challenge's own formats.

    Parameters
    ----------
    directory : path
        Created; files already complete there are kept as they are.
    target_fonts : sequence of str
        Typefaces to unpack beside the six source typefaces.
    progress : callable
        Called with a line for each typeface.

    Returns
    -------
    Path
        ``directory``, with ``train/*.png``, ``train_human_labels.csv``,
        ``classes-trainable.csv``, ``class-descriptions.csv``, ``validation_ids.txt``,
        ``images.csv`` (image_id, font, character, part), ``groups.csv`` (the images of a
        character) and a folder for each target typeface.
    """
    root = Path(directory)
    kanji = read_kanji()
    fonts = (*SOURCE_FONTS, *target_fonts)
    done = root / COMPLETE
    complete = done.exists() and (root / GROUPS).exists()
    if complete and set(done.read_text("utf-8").split()) >= set(fonts):
        return root
    root.mkdir(parents=True, exist_ok=True)
    for font in fonts:
        _write_images(root, font, kanji)
        progress(f"unpacked {font}: {sum(in_font(k, font) for k in kanji):,} images")
    _write_source_labels(root, kanji)
    for font in target_fonts:
        _write_target_labels(root, font, kanji)
    _write_csv(
        root / "images.csv",
        ["image_id", "font", "character", "part"],
        (
            [image_id(font, k.character), font, k.character, k.part]
            for font in fonts
            for k in kanji
            if in_font(k, font)
        ),
    )
    _write_csv(  # of one character in several typefaces: the same components
        root / GROUPS,
        ["image_id", "group"],
        ([image_id(f, k.character), k.character] for f in fonts for k in kanji if in_font(k, f)),
    )
    for name in ("LICENSES.md",):
        shutil.copyfile(DATA / name, root / name)
    done.write_text("\n".join(fonts) + "\n", encoding="utf-8")
    return root
