"""From pixels to a submission, through the command lines alone."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

import featcache.cli
import heads.cli
from featcache import FeatureCache

CLASSES = ["/m/red", "/m/green", "/m/blue", "/m/bar"]
COLOURS = [(230, 40, 40), (40, 200, 40), (60, 60, 240)]


def small_net(num_classes):
    """Three convolutions: the door for a network of one's own."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 48, 3, 1, 1), nn.BatchNorm2d(48), nn.ReLU(),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(48, num_classes),
    )  # fmt: skip


def draw(labels, dark, rng):
    """A 24 px image: a square of each colour at a random place, a white bar; dark is the shift."""
    pixels = rng.integers(60, 110, (24, 24, 3))
    for k, colour in enumerate(COLOURS):
        if labels[k]:
            y, x = rng.integers(0, 16, 2)
            pixels[y : y + 8, x : x + 8] = colour
    if labels[3]:
        pixels[:, rng.integers(4, 20)] = 250
    if dark:  # another camera: darker, and two channels swapped a little
        pixels = pixels * 0.55
        pixels = pixels @ np.array([[0.8, 0.2, 0.0], [0.2, 0.8, 0.0], [0.0, 0.0, 1.0]])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_images(folder: Path, n: int, dark: bool, rng) -> dict[str, list[str]]:
    """Images and the label sets of their ids."""
    folder.mkdir(parents=True)
    found = {}
    for i in range(n):
        labels = rng.random(4) < [0.5, 0.4, 0.3, 0.3]
        image_id = f"{folder.name}{i:04d}"
        draw(labels, dark, rng).save(folder / f"{image_id}.png")
        found[image_id] = [c for c, on in zip(CLASSES, labels, strict=True) if on]
    return found


def write_lists(path, labels, header=True):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        if header:
            writer.writerow(["image_id", "labels"])
        writer.writerows([i, " ".join(on)] for i, on in labels.items())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images of three domains with the challenge's label files."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    train = make_images(root / "train", 600, False, rng)
    stage_1 = make_images(root / "stage1", 260, True, rng)
    stage_2 = make_images(root / "stage2", 120, True, rng)
    with (root / "human.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageID", "Source", "LabelName", "Confidence"])
        writer.writerows([i, "verification", c, 1] for i, on in train.items() for c in on)
        writer.writerow(["gone", "verification", "/m/red", 1])
        writer.writerow(["train0000", "verification", "/m/untrainable", 1])
    (root / "trainable.csv").write_text("label_code\n" + "".join(f"{c}\n" for c in CLASSES))
    labelled = dict(list(stage_1.items())[:160])
    rest = dict(list(stage_1.items())[160:])
    write_lists(root / "tuning.csv", labelled, header=False)
    write_lists(root / "rest.csv", rest)
    write_lists(root / "solution.csv", stage_2)
    return root


def featcache_(*words):
    assert featcache.cli.main([str(w) for w in words]) == 0


def heads_(*words):
    assert heads.cli.main([str(w) for w in words]) == 0


def score(capsys, submission, labels):
    capsys.readouterr()
    heads_("score", submission, "--labels", labels)
    return float(capsys.readouterr().out.split()[2])


def test_pixels_to_submission(world, tmp_path, capsys):
    for seed, name in enumerate(("first", "second")):
        featcache_(
            "train", "--images", world / "train", "--labels", world / "human.csv",
            "--classes", world / "trainable.csv", "--validation", 120,
            "--arch", "tests.test_pipeline:small_net", "--image-size", 24, "--augment", "none",
            "--epochs", 6, "--batch-size", 32, "--optimizer", "adamw", "--lr", 0.01,
            "--schedule", "cosine", "--warmup-steps", 5, "--workers", 0, "--threads", 1,
            "--seed", seed, "--out", tmp_path / "runs" / name,
        )  # fmt: skip
        run = tmp_path / "runs" / name
        sets = {
            "validation": ("train", ["--labels", world / "human.csv"]),
            "stage_1": ("stage1", ["--labels", world / "tuning.csv"]),
            "stage_2": ("stage2", []),
        }
        sets["validation"][1].extend(["--ids", run / "validation_ids.txt"])
        for image_set, (images, more) in sets.items():
            featcache_(
                "extract", "--run", run, "--images", world / images, "--workers", 0,
                "--threads", 1, "--views", "strong", "--view-count", 2, *more,
                "--out", tmp_path / image_set / f"{name}.h5",
            )  # fmt: skip
        featcache_("verify", tmp_path / "stage_1" / f"{name}.h5")
        for method in ("logistic", "ridge"):
            stage_1 = tmp_path / "stage_1" / f"{name}.h5"
            head = tmp_path / f"{name}_{method}"
            heads_("fit", stage_1, "--method", method, "--out", f"{head}.h5")
            source = tmp_path / "validation" / f"{name}.h5"
            heads_(
                "fit", stage_1, "--method", method, "--source", source, "--out", f"{head}_both.h5"
            )
    assert "1 labelled images have no file" in capsys.readouterr().out
    blend = tmp_path / "blend.h5"
    heads_("blend", *sorted(tmp_path.glob("*_*.h5")), "--out", blend)
    for content, caches, labels, least in (
        (blend, "stage_1", "rest.csv", 0.75),
        (blend, "stage_2", "solution.csv", 0.75),
        (tmp_path / "first_ridge.h5", "stage_2", "solution.csv", 0.7),
    ):
        submission = tmp_path / f"{content.stem}_{caches}.csv"
        heads_("predict", content, "--caches", tmp_path / caches, "--out", submission)
        assert score(capsys, submission, world / labels) > least
    ids = FeatureCache(tmp_path / "stage_2" / "first.h5").ids
    with (tmp_path / "blend_stage_2.csv").open(newline="") as file:
        assert [row["image_id"] for row in csv.DictReader(file)] == ids.tolist()


@pytest.mark.slow
def test_the_quickstart_adapts_to_a_brush_script(tmp_path, monkeypatch):
    """One epoch of one narrow network: far from the full figures, but the order must be right."""
    from benchmarks import measure, transfer
    from examples.quickstart import Recipe, quickstart

    recovery = quickstart(tmp_path, recipes=(Recipe("tiny", 16, 32, 2, 3e-3),))
    recovery.save()
    rows = {row.model: row for row in recovery.rows if row.network == "tiny"}
    stage_1 = "gyosho_stage_1"
    unadapted = rows["unadapted, source cut"].scores[stage_1].mean()
    adapted = rows["logistic on Stage 1"].scores[stage_1].mean()
    oracle = rows["oracle (labels of that typeface)"].scores[stage_1].mean()
    assert unadapted + 0.03 < adapted < oracle
    blend = next(r for r in recovery.rows if (r.network, r.model) == ("blend", "adapted heads"))
    with (tmp_path / "recovery.csv").open(encoding="utf-8", newline="") as file:
        saved = [
            float(row["f2"])
            for row in csv.DictReader(file)
            if (row["network"], row["model"], row["domain"])
            == ("blend", "adapted heads", "Stage 1 gyosho")
        ]
    assert saved == [pytest.approx(blend.scores[stage_1].mean(), abs=1e-4)]
    assert (tmp_path / "recovery.png").stat().st_size > 10_000
    assert recovery.table().count("\n") == len(recovery.rows)

    # The benchmark of transfer goes on from here.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(transfer, "RESULTS", tmp_path / "results")
    command = f"--quick --jobs 1 --networks tiny --shifts none --quickstart {tmp_path}"
    words = [*command.split(), "--caches", str(tmp_path / "transfer")]
    monkeypatch.setattr("sys.argv", ["python -m benchmarks transfer", *words])
    transfer.main()
    with (tmp_path / "results" / "transfer_quick.csv").open(encoding="utf-8") as file:
        assert "; python -m benchmarks transfer --quick" in file.readline()
        found = {
            row["model"]: float(row["F2"])
            for row in csv.DictReader(file)
            if row["group"] == "Stage 1"
        }
    ours = found["ours (+ number of labels)"]
    assert found["unadapted, source cut"] < ours < found["oracle (labels of that domain)"]
    assert "torch dropout head, Adam" in found
    assert (tmp_path / "results" / "transfer_quick.png").exists()
