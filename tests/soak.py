"""Kill extractions at random moments, damage what they leave, and see that nothing is ever wrong.

``python -m tests.soak --kills 200`` runs it for long; the slow tests run twenty kills. A cache is
made in sittings. In each, one to three processes share the work; some or all of them are killed
by SIGKILL at a random moment, and now and then a bit is flipped in what they leave, or a file is
cut. Whatever comes out is compared with an unbroken run, byte by byte.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from featcache import FeatureCache, extraction
from featcache.extraction import extract
from featcache.settings import ExtractionConfig, TrainingConfig
from featcache.training import train
from tests import tiny

ROWS_A_BLOCK = 8
SITTINGS = """
extraction.ROWS_A_BLOCK = rows
chance = random.Random(seed)
tally = {"kills": 0, "sittings": 0, "caches": 0, "damages": 0, "errors": [], "done at kill": []}

def lines(path):
    return sum(p.read_bytes().count(b"block") for p in path.parent.glob("x.h5*.journal"))

def start(path, rank, world):
    def action():
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        return cli.main(["extract", *options, "--workers", str(chance.choice([0, 0, 1])),
                         "--out", str(path)])
    return child(action, errors=out / "errors")

def sitting(path):
    tally["sittings"] += 1
    world = chance.choice([1, 1, 2, 3])
    running = {start(path, rank, world): rank for rank in range(world)}
    time.sleep(chance.uniform(0, 0.2 + seconds / world))
    for pid in running if chance.random() < 0.5 else [chance.choice(list(running))]:
        os.kill(pid, signal.SIGKILL)
    tally["done at kill"].append(lines(path))
    for pid in running:
        status = ended(pid)
        tally["kills"] += status == -signal.SIGKILL
        assert status in (0, 2, -signal.SIGKILL), status
        if status == 2:
            tally["errors"].append((out / "errors").read_text().splitlines()[-1])
    (out / "errors").unlink(missing_ok=True)

def damage(path):
    parts = [p for p in path.parent.glob("x.h5*.partial") if p.stat().st_size]
    if parts and chance.random() < 0.2:
        part, tally["damages"] = chance.choice(parts), tally["damages"] + 1
        data = bytearray(part.read_bytes())
        if chance.random() < 0.7:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        else:
            del data[chance.randrange(len(data)):]
        part.write_bytes(data)

while tally["kills"] < kills:
    path = out / str(tally["caches"]) / "x.h5"
    while not path.exists() and tally["kills"] < kills:
        sitting(path)
        if not path.exists():
            damage(path)
    tally["caches"] += 1
answer = tally
"""


def options(run: Path, images: Path) -> dict[str, Any]:
    """Of an extraction that takes a while."""
    return {
        "run": str(run),
        "images": str(images / "images"),
        "labels": [str(images / "labels.csv")],
        "views": "tests.tiny:sleepy",
        "view_count": 1,
        "batch_size": 4,
        "device": "cpu",
        "threads": 1,
    }


def soak(root: Path, kills: int, seed: int = 0, n: int = 60) -> dict[str, Any]:
    """Make caches below `root`, `kills` times interrupted; what happened.

    Raises
    ------
    AssertionError
        If a cache is not that of an unbroken run, or something is left beside it.
    """
    tiny.make_data(root, n, seed=3)
    (root / "images" / "i007.png").write_bytes(b"")
    run = train(TrainingConfig(**tiny.basic_training(root, root / "run") | {"epochs": 1}))
    rows, extraction.ROWS_A_BLOCK = extraction.ROWS_A_BLOCK, ROWS_A_BLOCK
    try:
        made = options(run, root)
        whole = extract(ExtractionConfig(**made, out=str(root / "whole.h5"), workers=0))
        assert whole is not None
        with tiny.Nursery() as nursery:
            tally: dict[str, Any] = nursery.run(
                SITTINGS,
                out=root,
                options=tiny.options(**made),
                rows=ROWS_A_BLOCK,
                kills=kills,
                seed=seed,
                seconds=0.024 * n,
            )
        expected = FeatureCache(whole)
        for number in range(tally["caches"]):
            path = root / str(number) / "x.h5"
            if not path.exists() or list(path.parent.glob("x.h5*.journal")):
                extract(ExtractionConfig(**made, out=str(path), workers=0))
            assert_equal(FeatureCache(path), expected)
    finally:
        extraction.ROWS_A_BLOCK = rows
    return tally


def assert_equal(cache: FeatureCache, expected: FeatureCache) -> None:
    """Features, validity and origin; and nothing beside it but locks that nobody holds."""
    assert cache.features.tobytes() == expected.features.tobytes(), cache.path
    np.testing.assert_array_equal(cache.valid, expected.valid)
    assert cache.skipped == expected.skipped
    assert cache.verify() == []
    assert cache.provenance["fingerprint"] == expected.provenance["fingerprint"]
    names = {item.name for item in cache.path.parent.iterdir()} - {"x.h5"}
    assert all(name.endswith((".lock", ".gate")) for name in names), names


def main() -> None:
    """Soak and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = soak(Path(folder), arguments.kills, arguments.seed)
    done = tally.pop("done at kill")
    print(json.dumps(tally, indent=1))
    print(f"blocks done when killed: {min(done)} to {max(done)}, mean {np.mean(done):.1f}")
    print(f"{tally['caches']} caches, every one that of an unbroken run")


if __name__ == "__main__":
    main()
