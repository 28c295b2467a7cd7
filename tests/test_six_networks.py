"""The six networks of the challenge learn from real images, and their features are extracted."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from examples.kanji import CROP, unpack
from featcache import FeatureCache
from featcache.extraction import extract
from featcache.networks import FACTS, cpu_has_bf16
from featcache.settings import ExtractionConfig, TrainingConfig
from featcache.training import train

STEPS, BATCH, SIDE = 20, 8, 64


@pytest.fixture(scope="module")
def kanji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples' images, and in `few.csv` the labels of 96 of them."""
    root = unpack(tmp_path_factory.mktemp("kanji"), [], progress=lambda line: None)
    held_out = set((root / "validation_ids.txt").read_text().split())
    label_sets: dict[str, list[str]] = {}
    with (root / "train_human_labels.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            label_sets.setdefault(row["ImageID"], []).append(row["LabelName"])
    training = [i for i in label_sets if i not in held_out][: BATCH * STEPS // 2]
    few = [*training, *sorted(held_out)[:16]]
    rows = [f"{i},{' '.join(label_sets[i])}\n" for i in few]
    (root / "few.csv").write_text("image_id,labels\n" + "".join(rows))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("arch", FACTS)
def test_twenty_steps_on_real_images(arch: str, kanji: Path, tmp_path: Path) -> None:
    config = TrainingConfig(
        images=str(kanji / "train"),
        labels=[str(kanji / "few.csv")],
        classes=str(kanji / "classes-trainable.csv"),
        validation=str(kanji / "validation_ids.txt"),
        arch=arch,
        image_size=SIDE,
        crop=CROP,
        augment="examples.kanji:augment",
        epochs=2,
        batch_size=BATCH,
        optimizer="adamw",
        lr=1e-3,
        warmup_steps=5,
        precision="bf16" if cpu_has_bf16() else "float32",
        device="cpu",
        workers=0,
        out=str(tmp_path / "run"),
    )
    run = train(config)
    with (run / "log.csv").open(newline="") as file:
        first, second = (float(row["train_loss"]) for row in csv.DictReader(file))
    assert np.isfinite(second)
    assert second < 0.95 * first
    (tmp_path / "ids.txt").write_text("".join(f"{i}\n" for i in held_out_ids(run)))
    options = {"run": str(run), "images": str(kanji / "train"), "ids": str(tmp_path / "ids.txt")}
    path = extract(
        ExtractionConfig(
            **options, views="tta", device="cpu", workers=0, out=str(tmp_path / "cache.h5")
        )
    )
    assert path is not None
    cache = FeatureCache(path)
    assert cache.features.shape == (16, len(cache.views), FACTS[arch].features)
    assert cache.valid.all()
    assert cache.x("eval").std(0).max() > 0
    assert cache.provenance["network"]["arch"] == arch


def held_out_ids(run: Path) -> list[str]:
    return (run / "validation_ids.txt").read_text().split()
