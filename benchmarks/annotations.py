"""How long does it take to read the challenge's label files, how much memory, and the second time?

The files are generated in the sizes and formats of the challenge: 1.74 M images, 8.0 M human and
15.3 M machine rows (and 14.6 M boxes with --boxes), 19,987 classes of which 7,178 are trainable.
Each reading is a process of its own, of which the peak memory is taken.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import own_process, peak_memory, report
from featcache.datasets import hold_out
from featcache.labelcache import read_labels_cached

IMAGES, CLASSES, TRAINABLE = 1_743_042, 19_987, 7_178
ROWS = {"human": 8_036_466, "machine": 15_259_186, "boxes": 14_610_229}
HELD_OUT = 100_000
CHUNK = 200_000
TARGET_SECONDS, TARGET_GB = 180, 4


def class_ids() -> np.ndarray:
    """Class ids such as Open Images has."""
    digits = "0123456789bcdfghjklmnpqrstvwxyz_"
    names = []
    for k in range(CLASSES):
        letters = [digits[(k >> shift) % 32] for shift in (0, 5, 10)]
        names.append(f"/m/0{''.join(letters)}")
    return np.array(names)


def image_ids(n: int) -> np.ndarray:
    """16 hex digits each, all different, in no order."""
    numbers = np.random.default_rng(0).permutation(n).astype(np.uint64)
    mixed = numbers * np.uint64(0x9E3779B97F4A7C15)  # odd: one to one
    return np.array([f"{k:016x}" for k in mixed.tolist()])


def entries(kind: str, n: int, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Images, classes and confidences, sorted by image in chunks, as the files are."""
    rng = np.random.default_rng(list(ROWS).index(kind) + 1)
    for start in range(0, rows, CHUNK):
        count = min(CHUNK, rows - start)
        low, high = n * start // rows, max(n * (start + count) // rows, n * start // rows + 1)
        images = np.sort(rng.integers(low, high, count))
        classes = (CLASSES * rng.random(count) ** 4).astype(np.int64)  # few are frequent
        confidences = rng.integers(5, 11, count) if kind == "machine" else np.full(count, 10)
        yield images, classes, confidences


def write_file(path: Path, kind: str, n: int, rows: int) -> None:
    """A label file of the challenge."""
    ids, names = image_ids(n).tolist(), class_ids().tolist()
    text = {10: "1"} | {k: f"0.{k}" for k in range(5, 10)}
    source = {"human": "verification", "machine": "machine", "boxes": "xclick"}[kind]
    box = ",0.012500,0.195312,0.148438,0.587500,0,1,1,0,0" if kind == "boxes" else ""
    columns = ",XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
    with open(path, "w", encoding="ascii") as file:
        header = "ImageID,Source,LabelName,Confidence"
        file.write(header + (columns if box else "") + "\n")
        for images, classes, confidences in entries(kind, n, rows):
            parts = zip(images.tolist(), classes.tolist(), confidences.tolist(), strict=True)
            file.writelines(f"{ids[i]},{source},{names[k]},{text[c]}{box}\n" for i, k, c in parts)


def reading(folder: Path, kinds: Sequence[str]) -> dict[str, float]:
    """Seconds and peak bytes of one process that reads the files and holds images out."""
    begun = time.perf_counter()
    labels = read_labels_cached(
        [folder / f"{kind}.csv" for kind in kinds],
        classes=folder / "classes-trainable.csv",
        folder=folder / "cache",
    )
    read = time.perf_counter()
    held = hold_out(labels.ids, str(max(1, HELD_OUT * len(labels.ids) // IMAGES)))
    split = time.perf_counter()
    return {
        "seconds": read - begun,
        "hold out": split - read,
        "bytes": peak_memory(),
        "images": len(labels.ids),
        "positives": labels.positives.nnz,
        "held": int(held.sum()),
    }


def main() -> None:
    """Generate, read twice, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the size")
    parser.add_argument("--boxes", action="store_true", help="read the boxes as well")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    kinds = ["human", "machine", *["boxes"] * arguments.boxes]
    if arguments.folder:
        print(json.dumps(reading(arguments.folder, kinds)))
        return
    share = 10 if arguments.quick else 1
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in kinds:
            write_file(folder / f"{kind}.csv", kind, IMAGES // share, ROWS[kind] // share)
        trainable = "".join(f"{c}\n" for c in class_ids()[:TRAINABLE])
        (folder / "classes-trainable.csv").write_text(f"label_code\n{trainable}")
        count = sum(ROWS[kind] // share for kind in kinds)
        for time_of in ("first", "second"):
            words = ["--folder", name, *["--boxes"] * arguments.boxes]
            found = json.loads(own_process("benchmarks.annotations", *words))
            cached = sum(f.stat().st_size for f in (folder / "cache").iterdir())
            rows.append(
                {
                    "what": f"{' + '.join(kinds)}, {time_of} reading",
                    "rows": count,
                    "images": found["images"],
                    "seconds": found["seconds"],
                    "seconds a million rows": found["seconds"] / count * 1e6,
                    "hold out, seconds": found["hold out"],
                    "peak GB": found["bytes"] / 1e9,
                    "cache MB": cached / 1e6,
                    "target": f"<= {TARGET_SECONDS / share:g} s, <= {TARGET_GB} GB",
                }
            )
    name = "annotations_quick" if arguments.quick else "annotations"
    report(name, rows, "Reading the challenge's label files")


if __name__ == "__main__":
    main()
