"""How fast are features read from a cache, beside bare arrays, chunked HDF5, npy and Parquet?

Questions, each asked of the same numbers in every format, files in the page cache,
contestants taking turns:

read
    all features, as they are, into memory: at once, and some thousand rows at a time, as who
    computes on them reads; the copy of an array in memory shows what the machine allows;
rows
    1,000 rows in random order, as they are, by their numbers;
ids
    the same, by ids that are looked up, against the bare array by numbers;
x
    all features as float32; of the files that are mapped once more without the others.

``ratio`` is the time of the reference over that of the contestant: above 1 is faster
than the reference. Targets of the cache: read >= 0.9, x >= 0.9, rows >= 0.5. A file that is
opened anew costs a page fault for every row, whoever reads it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from benchmarks.measure import peer, report, take_turns
from featcache import FeatureCache

ROWS = 1000
RUN = 1024  # rows that are read one after another
CHUNK = 256  # rows of a chunk, a row group, and of what is written at once

Read = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Formats:
    """The same (n, d) float16 numbers as files of every format.

    Attributes
    ----------
    folder : Path
    shape : (n, d)
    ids : (n,) str
    """

    folder: Path
    shape: tuple[int, int]
    ids: np.ndarray

    def block(self, start: int, stop: int) -> np.ndarray:
        """Rows as a network with a rectifier might make them, about half of them zero."""
        n, d = self.shape
        rng = np.random.default_rng(start)
        values = rng.standard_normal((min(stop, n) - start, d), dtype=np.float32)
        return np.maximum(values, 0).astype(np.float16)

    def write(self) -> None:
        """All files but Parquet's, a block at a time."""
        n, d = self.shape
        bare = np.lib.format.open_memmap(self.folder / "x.npy", "w+", np.float16, self.shape)
        for start in range(0, n, CHUNK):
            bare[start : start + CHUNK] = self.block(start, start + CHUNK)
        bare.flush()
        kinds: dict[str, dict[str, Any]] = {
            "contiguous": {},
            "chunked": {"chunks": (CHUNK, d)},
            "gzip": {"chunks": (CHUNK, d), "compression": "gzip", "compression_opts": 1},
        }
        for name, options in kinds.items():
            with h5py.File(self.folder / f"{name}.h5", "w") as file:
                data = file.create_dataset("x", self.shape, np.float16, **options)
                for start in range(0, n, CHUNK):
                    data[start : start + CHUNK] = bare[start : start + CHUNK]
        FeatureCache.write(self.folder / "cache.h5", bare, self.ids)

    def write_parquet(self, arrow: Any, parquet: Any) -> None:
        """A column of lists of d half-precision numbers."""
        n, d = self.shape
        bare = np.load(self.folder / "x.npy", mmap_mode="r")
        kind = arrow.list_(arrow.float16(), d)
        schema = arrow.schema([("x", kind)])
        with parquet.ParquetWriter(
            self.folder / "x.parquet", schema, compression="none", use_dictionary=False
        ) as writer:
            for start in range(0, n, CHUNK):
                flat = arrow.array(np.ravel(bare[start : start + CHUNK]))
                column = arrow.FixedSizeListArray.from_arrays(flat, d)
                writer.write_table(arrow.table([column], schema=schema), CHUNK)


@dataclass(frozen=True)
class Readers:
    """One contestant: how it answers each question."""

    read: Read
    rows: Read
    x: Read


def contestants(formats: Formats, chosen: np.ndarray) -> dict[str, Readers]:
    """Every format, opened; the reference of each question first."""
    n, d = formats.shape
    path, folder = formats.folder / "cache.h5", formats.folder
    cache = FeatureCache(path)
    with h5py.File(path) as file:
        offset = file["features"].id.get_offset()
    bare = np.memmap(path, np.float16, "r", offset, formats.shape)
    npy = np.load(folder / "x.npy", mmap_mode="r")
    found = {
        "bare array": Readers(
            lambda: np.fromfile(path, np.float16, n * d, offset=offset).reshape(n, d),
            lambda: bare[chosen],
            lambda: bare.astype(np.float32),
        ),
        "FeatureCache": Readers(
            lambda: np.array(cache.features)[:, 0],
            lambda: cache.features[chosen][:, 0],
            lambda: cache.x("eval"),
        ),
        "npy": Readers(
            lambda: np.load(folder / "x.npy"), lambda: npy[chosen], lambda: npy.astype(np.float32)
        ),
    }
    for name in ("contiguous", "chunked", "gzip"):
        found[f"h5py {name}"] = _hdf5(h5py.File(folder / f"{name}.h5")["x"], chosen)
    arrow, parquet = peer("pyarrow"), peer("pyarrow.parquet")
    if arrow is not None and parquet is not None:
        formats.write_parquet(arrow, parquet)
        found["parquet"] = _parquet(folder / "x.parquet", parquet, chosen, d)
    return found


def further_readings(formats: Formats) -> dict[str, Read]:
    """A cache read in runs of rows, and the copy of an array that is in memory already."""
    cache = FeatureCache(formats.folder / "cache.h5")
    loaded = np.array(cache.features)[:, 0]

    def in_runs() -> np.ndarray:
        features = cache.features[:, 0]
        read = np.empty(features.shape, features.dtype)
        for start in range(0, len(read), RUN):
            read[start : start + RUN] = features[start : start + RUN]
        return read

    return {f"FeatureCache, {RUN:,} rows at a time": in_runs, "array in memory": loaded.copy}


def _hdf5(data: Any, chosen: np.ndarray) -> Readers:
    order = np.argsort(chosen)
    back = np.argsort(order)
    increasing = chosen[order]  # h5py takes no other order
    return Readers(
        lambda: data[...],
        lambda: data[increasing][back],
        lambda: data.astype(np.float32)[...],
    )


def _parquet(path: Path, parquet: Any, chosen: np.ndarray, d: int) -> Readers:
    file = parquet.ParquetFile(path, memory_map=True)

    def array(table: Any) -> np.ndarray:
        column = table.column("x").combine_chunks()
        return column.flatten().to_numpy(zero_copy_only=True).reshape(-1, d)

    def rows() -> np.ndarray:
        groups, place = np.unique(chosen // CHUNK, return_inverse=True)
        read = array(file.read_row_groups(groups.tolist(), use_threads=False))
        return read[place * CHUNK + chosen % CHUNK]

    return Readers(
        lambda: array(file.read(use_threads=False)),
        rows,
        lambda: array(file.read(use_threads=False)).astype(np.float32),
    )


def looked_up(formats: Formats, chosen: np.ndarray) -> dict[str, Read]:
    """Ways to rows that go by ids, whose places must be found first."""
    path = formats.folder / "cache.h5"
    cache, bare = FeatureCache(path), np.load(formats.folder / "x.npy", mmap_mode="r")
    row_of = {name: row for row, name in enumerate(formats.ids.tolist())}
    ids = formats.ids[chosen].tolist()
    return {
        "bare array, by numbers": lambda: bare[chosen],
        "bare array and a dict of ids": lambda: bare[[row_of[name] for name in ids]],
        "FeatureCache.select": lambda: cache.select(ids).features[:, 0],
        "npy, opened anew": lambda: np.load(formats.folder / "x.npy", mmap_mode="r")[chosen],
        "FeatureCache.select, opened anew": lambda: FeatureCache(path).select(ids).features[:, 0],
    }


def main() -> None:
    """Write the files, ask every question, check that all answers are equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="8,000 x 512, three repeats")
    options = parser.parse_args()
    n, d, repeats = options.images, options.features, options.repeats
    if options.quick:
        n, d, repeats = 8000, 512, 3
    chosen = np.random.default_rng(0).choice(n, min(ROWS, n), replace=False)
    ids = np.array([f"{i:024x}" for i in range(n)])
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        formats = Formats(Path(name), (n, d), ids)
        formats.write()
        known = contestants(formats, chosen)
        for question in ("read", "rows", "x"):
            asked = {who: getattr(readers, question) for who, readers in known.items()}
            if question == "read":
                asked |= further_readings(formats)
            rows += ask(question, asked, repeats)
        # By themselves: whoever follows one that reads gigabytes finds no memory at hand.
        mapped = {who: known[who].x for who in ("bare array", "FeatureCache", "npy")}
        rows += ask("x, files that are mapped", mapped, 2 * repeats)
        rows += ask("ids", looked_up(formats, chosen), 5 * repeats)
    title = f"Reading {n:,} x {d:,} features, files in the page cache"
    report("cache_io_quick" if options.quick else "cache_io", rows, title)


def ask(question: str, asked: dict[str, Read], repeats: int) -> list[dict[str, object]]:
    """A row a contestant; the first one is the reference."""
    reference = next(iter(asked))
    expected = asked[reference]()
    for who, read in asked.items():  # warms the page cache, too
        if not np.array_equal(read(), expected):
            raise SystemExit(f"{question}: {who} reads other numbers than {reference}")
    del expected
    times = take_turns(_discarding(asked), repeats)
    return [
        {
            "question": question,
            "contestant": who,
            "ms": times[who].median * 1e3,
            "least to greatest s": times[who].spread,
            "ratio": times[reference].median / times[who].median,
        }
        for who in asked
    ]


def _discarding(asked: dict[str, Read]) -> dict[str, Callable[[], None]]:
    """The same without results: gigabytes of an earlier answer would cost the later ones memory."""

    def discard(read: Read) -> Callable[[], None]:
        def call() -> None:
            read()

        return call

    return {who: discard(read) for who, read in asked.items()}


if __name__ == "__main__":
    main()
