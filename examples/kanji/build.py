"""Build the kanji data from Debian's packages: python -m examples.kanji.build --packages DIR.

DIR holds the unpacked packages named in LICENSES.md, e.g.::

    apt-get download fonts-ipafont-gothic fonts-ipaexfont-mincho fonts-motoya-l-maruberi \\
        fonts-yusei-magic fonts-reggae fonts-kiloji fonts-kouzan-mouhitsu \\
        fonts-aoyagi-soseki fonts-seto fonts-yozvox-yozfont-standard-kana kiten
    for f in *.deb; do dpkg -x "$f" DIR; done

Nobody needs to run this to use the data: its result ships in ``data/``.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.kanji.dataset import COLUMNS, DATA, FONTS, LEVELS, PARTS, SIDE, Kanji, in_font

FONT_FILES = {
    "gothic": "ipag.ttf",
    "mincho": "ipaexm.ttf",
    "maruberi": "MTLmr3m.ttf",
    "yusei": "YuseiMagic-Regular.ttf",
    "reggae": "ReggaeOne-Regular.ttf",
    "kiloji": "kiloji.ttf",
    "gyosho": "kouzan-mouhitsu-gyosho.ttf",
    "sousyo": "KouzanBrushFontSousyo.ttf",
    "soseki": "aoyagi-soseki.ttf",
    "seto": "setofont.ttf",
    "yozfont": "YOzRS_.ttf",
}
MISSING = {"牙"}  # not in every font
SUPERSAMPLING = 4
EM = 0.84  # of the image's side


def find(packages: Path, name: str) -> Path:
    """The one file of that name below the unpacked packages."""
    found = sorted(p for p in packages.rglob(name) if p.is_file())
    if not found:
        raise SystemExit(f"{packages}: no {name}; unpack the packages named in LICENSES.md there")
    return found[0]


def read_components(radkfile: Path) -> dict[str, list[str]]:
    """RADKFILE inverted: kanji -> the components that it is built of, in file order."""
    components: dict[str, list[str]] = {}
    component = ""
    for line in radkfile.read_text("euc-jp", errors="replace").splitlines():
        if line.startswith("$"):
            component = line.split()[1]
        elif line and not line.startswith("#"):
            for character in line.strip():
                components.setdefault(character, []).append(component)
    return components


def read_frequencies(kanjidic: Path) -> dict[str, int]:
    """KANJIDIC's newspaper ranks (F field): 1 is the most frequent of about 2,500."""
    ranks = {}
    for line in kanjidic.read_text("euc-jp", errors="replace").splitlines():
        if not line.startswith("#"):
            for field in line.split()[2:]:
                if field[0] == "F" and field[1:].isdigit():
                    ranks[line[0]] = int(field[1:])
    return ranks


def split(components: dict[str, list[str]], ranks: dict[str, int], seed: int = 0) -> list[Kanji]:
    """Assign each kanji to one part: common ones to training and validation, rare ones to stages.

    Common means: ranked in newspapers, then JIS level 1 (EUC-JP lead byte below 0xD0).
    """
    rng = np.random.default_rng(seed)
    characters = sorted(set(components) - MISSING)
    order = rng.permutation(len(characters))

    def rarity(i: int) -> tuple[int, bool, int]:
        character = characters[i]
        level_2 = character.encode("euc-jp")[0] >= 0xD0
        return ranks.get(character, 10_000), level_2, int(order[i])

    by_rarity = sorted(range(len(characters)), key=rarity)
    n_common = PARTS["train"] + PARTS["validation"]
    shuffled = [*rng.permutation(by_rarity[:n_common]), *rng.permutation(by_rarity[n_common:])]
    kanji = []
    start = 0
    for part, size in PARTS.items():
        chosen = sorted(characters[i] for i in shuffled[start : start + size])
        kanji += [Kanji(c, part, tuple(components[c])) for c in chosen]
        start += size
    return kanji


def render(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """One glyph as (SIDE, SIDE) uint8 levels, 0 = paper; its ink is centred."""
    side = SIDE * SUPERSAMPLING
    image = Image.new("L", (side, side), 0)
    left, top, right, bottom = font.getbbox(character)
    corner = ((side - left - right) / 2, (side - top - bottom) / 2)
    ImageDraw.Draw(image).text(corner, character, font=font, fill=255)
    grey = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    return np.round(grey * ((LEVELS - 1) / 255)).astype(np.uint8)


def sheet(glyphs: Iterator[np.ndarray], columns: int) -> Image.Image:
    """Glyphs side by side, row by row, as one grey picture: black ink on white."""
    tiles = list(glyphs)
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    grid = np.stack(tiles).reshape(-1, columns, SIDE, SIDE).transpose(0, 2, 1, 3)
    levels = grid.reshape(-1, columns * SIDE).astype(np.int64)
    return Image.fromarray((255 - levels * 255 // (LEVELS - 1)).astype(np.uint8))


def write_kanji(kanji: Iterable[Kanji], path: Path) -> None:
    """character,part,components: the labels and the split."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["character", "part", "components"])
        writer.writerows([k.character, k.part, " ".join(k.components)] for k in kanji)


def main() -> None:
    """Write the sheets and the table of kanji."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--packages", type=Path, required=True, help="unpacked Debian packages")
    parser.add_argument("--out", type=Path, default=DATA)
    arguments = parser.parse_args()
    components = read_components(find(arguments.packages, "radkfile"))
    kanji = split(components, read_frequencies(find(arguments.packages, "kanjidic")))
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_kanji(kanji, arguments.out / "kanji.csv")
    for name in FONTS:
        path = str(find(arguments.packages, FONT_FILES[name]))
        font = ImageFont.truetype(path, int(SIDE * SUPERSAMPLING * EM))
        glyphs = (render(font, k.character) for k in kanji if in_font(k, name))
        target = arguments.out / f"{name}.webp"
        sheet(glyphs, COLUMNS).convert("RGB").save(target, lossless=True, quality=100, method=6)
        print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
