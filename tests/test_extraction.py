"""Features are those of the network, in the right rows, however often extraction was stopped."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageOps

from featcache import FeatureCache, InputError, batches, extraction, training
from featcache.cli import main
from featcache.console import Interrupted
from featcache.extraction import Embedder, extract
from featcache.settings import ExtractionConfig, TrainingConfig
from featcache.views import generator
from tests import tiny

N = 38  # images; in batches of 4 and blocks of 8 rows
BLOCKS = 5
Settings = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images to extract, with labels, of which i007 and i030 cannot be read."""
    root = tmp_path_factory.mktemp("data")
    tiny.make_data(root, N, seed=1)
    (root / "images" / "i007.png").write_bytes(b"")
    (root / "images" / "i030.png").write_bytes(b"this is no image")
    return root


def train(root: Path, **changes: Any) -> Path:
    options = tiny.basic_training(root, root / "run") | {"epochs": 1}
    return training.train(TrainingConfig(**options | changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained network."""
    root = tmp_path_factory.mktemp("run")
    tiny.make_data(root, 64)
    return train(root)


@pytest.fixture(scope="module")
def nursery() -> Iterator[tiny.Nursery]:
    with tiny.Nursery() as nursery:
        yield nursery


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "ROWS_A_BLOCK", 8)


def basic(run: Path, data: Path, out: Path) -> dict[str, Any]:
    return {
        "run": str(run),
        "images": str(data / "images"),
        "labels": [str(data / "labels.csv")],
        "out": str(out),
        "views": "tests.tiny:shaken",
        "view_count": 2,
        "batch_size": 4,
        "device": "cpu",
        "workers": 0,
        "threads": 1,
    }


@pytest.fixture
def settings(run: Path, data: Path, tmp_path: Path) -> Settings:
    """Options of an extraction; the keyword arguments go before."""
    return lambda **changes: basic(run, data, tmp_path / "x.h5") | changes


def extracted(**options: Any) -> FeatureCache:
    return FeatureCache(extract(ExtractionConfig(**options)))


@pytest.fixture(scope="module")
def unbroken(run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    """The cache of the settings as they are, never stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "ROWS_A_BLOCK", 8)
        return extracted(**basic(run, data, tmp_path_factory.mktemp("unbroken") / "x.h5"))


def assert_same_cache(cache: FeatureCache, other: FeatureCache) -> None:
    assert cache.features.tobytes() == other.features.tobytes()
    assert cache.ids.tolist() == other.ids.tolist()
    assert cache.skipped == other.skipped
    assert cache.labels is not None
    assert other.labels is not None
    assert (cache.labels.positives != other.labels.positives).nnz == 0
    facts = [dict(c.provenance) for c in (cache, other)]
    for fact in facts:
        fact.pop("wall_seconds")
    assert facts[0] == facts[1]
    assert cache.verify() == []
    assert not list(cache.path.parent.glob("x.h5.*"))


# ----------------------------------------------------------------------- the numbers


def view_pixels(image: Image.Image, image_id: str, view: str) -> Image.Image:
    """What a view shows, written down once more."""
    side = 0.85 * tiny.SIDE
    rest = tiny.SIDE - side
    corners = {
        "close": (rest / 2, rest / 2),
        "top-left": (0, 0),
        "top-right": (rest, 0),
        "bottom-left": (0, rest),
        "bottom-right": (rest, rest),
    }
    if view == "eval":
        return image
    if view == "flip":
        return ImageOps.mirror(image)
    if view in corners:
        left, top = corners[view]
        box = (left, top, left + side, top + side)
        return image.resize(image.size, Image.Resampling.BILINEAR, box=box)
    rng = generator("tests.tiny:shaken", 5, image_id, view)
    return tiny.shaken(image, tiny.SIDE, rng)


def plain_network(run: Path) -> tiny.TinyNet:
    network = tiny.TinyNet(len(tiny.COLOURS))
    network.load_state_dict(safetensors.torch.load_file(run / "weights.safetensors"))
    return network.eval()


def plain_input(data: Path, cache: FeatureCache, view: str) -> torch.Tensor:
    """(n valid, 3, side, side), normalised by hand."""
    images = []
    for image_id in cache.ids[cache.valid].tolist():
        with Image.open(data / "images" / f"{image_id}.png") as image:
            images.append(np.asarray(view_pixels(image, image_id, view)))
    scaled = np.stack(images).transpose(0, 3, 1, 2) / np.float32(255)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    by_channel = (scaled - mean[:, None, None]) / std[:, None, None]
    return torch.from_numpy(by_channel.astype(np.float32))


@pytest.mark.parametrize(
    ("views", "names"),
    [
        ("eval", ["eval"]),
        (
            "tta",
            ["eval", "flip", "close", "top-left", "top-right", "bottom-left", "bottom-right"],
        ),
        ("tests.tiny:shaken", ["eval", "shaken-1", "shaken-2"]),
    ],
)
def test_features_are_those_of_a_plain_forward_pass(
    settings: Settings, run: Path, data: Path, views: str, names: list[str]
) -> None:
    counted = {} if ":" in views else {"view_count": 4}  # the default, where it says nothing
    cache = extracted(**settings(views=views, seed=5, **counted))
    assert cache.views.tolist() == names
    assert cache.shape == (N, len(names), 16)
    network = plain_network(run)
    for view in names:
        with torch.no_grad():
            expected = network.body(plain_input(data, cache, view)).numpy()
        # Half a unit in the last place of float16, and the rounding of float32 sums.
        np.testing.assert_allclose(
            cache.x(view)[cache.valid], expected, rtol=2**-11 + 1e-5, atol=1e-5
        )
    if len(names) > 1:
        differing = [not np.array_equal(cache.x("eval"), cache.x(view)) for view in names[1:]]
        assert all(differing)


def test_features_times_the_last_layer_give_the_logits(
    unbroken: FeatureCache, run: Path, data: Path
) -> None:
    assert unbroken.weight is not None
    assert unbroken.bias is not None
    network = plain_network(run)
    np.testing.assert_array_equal(unbroken.weight, network.last.weight.detach().numpy())
    np.testing.assert_array_equal(unbroken.bias, network.last.bias.detach().numpy())
    X = unbroken.x("eval")[unbroken.valid]
    with torch.no_grad():
        logits = network(plain_input(data, unbroken, "eval")).numpy()
    rounding = 2**-11 * np.abs(X) @ np.abs(unbroken.weight).T + 1e-4
    assert np.all(np.abs(X @ unbroken.weight.T + unbroken.bias - logits) <= rounding)


def test_a_network_that_changes_its_logits_is_refused(settings: Settings, tmp_path: Path) -> None:
    tiny.make_data(tmp_path, 24)
    run = train(tmp_path)
    config = run / "config.json"  # the factory does something else than when it was trained
    config.write_text(config.read_text().replace("tests.tiny:network", "tests.tiny:doubled"))
    out = tmp_path / "caches" / "x.h5"
    with pytest.raises(InputError, match=r"features @ W0\.T \+ b0 differ .* after its last linear"):
        extract(ExtractionConfig(**settings(run=str(run), out=str(out))))
    assert not out.parent.exists()


def test_the_self_check_bounds_the_error(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e-3 of max(1, |logit|), also for logits far from 1."""
    embedder = Embedder.load(ExtractionConfig(**settings()))
    pixels = torch.randint(0, 255, (6, 3, tiny.SIDE, tiny.SIDE), dtype=torch.uint8)
    real = embedder.forward
    for scale, error, fine in [(1, 5e-4, True), (1, 2e-3, False), (100, 5e-2, True)]:
        with torch.no_grad():
            embedder.layer.weight.zero_()
            embedder.layer.bias.fill_(scale)
        features, logits = real(pixels)
        assert logits.unique().tolist() == [scale]
        pair = features, logits + error
        monkeypatch.setattr(embedder, "forward", lambda pixels, pair=pair: pair)
        if fine:
            embedder.check(pixels)
        else:
            with pytest.raises(InputError, match="differ from the network's own logits"):
                embedder.check(pixels)


def test_features_beyond_float16_stop_the_extraction(
    settings: Settings, run: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    state = safetensors.torch.load_file(broken / "weights.safetensors")
    state["body.5.bias"][3] = 1e6
    safetensors.torch.save_file(state, broken / "weights.safetensors")
    with pytest.raises(InputError, match=r"image i000, view eval, dimension 3: .* no float16"):
        extract(ExtractionConfig(**settings(run=str(broken))))


# ---------------------------------------------------------------------- rows and images


def test_unreadable_images_keep_their_rows(unbroken: FeatureCache) -> None:
    assert unbroken.ids.tolist() == [f"i{row:03d}" for row in range(N)]
    assert np.flatnonzero(~unbroken.valid).tolist() == [7, 30]
    assert unbroken.skipped["i007"] == "the file is empty"
    assert "cannot identify image" in unbroken.skipped["i030"]
    blank = ~unbroken.features.any((1, 2))
    assert blank.tolist() == (~unbroken.valid).tolist()


def test_unreadable_images_change_no_other_row(
    settings: Settings, data: Path, unbroken: FeatureCache, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(data / "images", images)
    tiny.draw(["red"], np.random.default_rng(0)).save(images / "i007.png")
    (images / "i031.png").unlink()
    (images / "i031.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    cache = extracted(**settings(images=str(images)))
    assert np.flatnonzero(~cache.valid).tolist() == [30, 31]
    others = np.setdiff1d(np.arange(N), [7, 30, 31])
    assert cache.features[others].tobytes() == unbroken.features[others].tobytes()
    assert cache.features[7].any()


def test_no_readable_image_at_all(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in "abcdefg":
        (tmp_path / "images" / f"{name}.jpg").write_bytes(b"")
    cache = extracted(**settings(images=str(tmp_path / "images"), labels=[]))
    assert not cache.valid.any()
    assert not cache.features.any()
    assert list(cache.skipped) == list("abcdefg")


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(settings: Settings, unbroken: FeatureCache, workers: int) -> None:
    assert_same_cache(extracted(**settings(workers=workers)), unbroken)


def test_views_are_a_function_of_the_id_and_the_seed(
    settings: Settings, unbroken: FeatureCache, tmp_path: Path
) -> None:
    """Not of the row or of what else is in the batch, up to the rounding of sums."""
    (tmp_path / "ids.txt").write_text("i020\ni005\ni011\n")
    cache = extracted(**settings(ids=str(tmp_path / "ids.txt")))
    same = unbroken.select(["i020", "i005", "i011"])
    np.testing.assert_allclose(cache.x(), same.x(), rtol=2e-3, atol=1e-5)
    other = extracted(**settings(seed=1, overwrite=True))
    np.testing.assert_array_equal(other.x("eval"), unbroken.x("eval"))
    assert not np.allclose(other.x("shaken-1"), unbroken.x("shaken-1"), atol=1e-2)


def test_ids_give_the_rows(
    settings: Settings, unbroken: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their order; an id without a file keeps its row."""
    ids = ["i033", "nowhere", "i002", "../i003", "i007", "i001"]
    (tmp_path / "ids.csv").write_text("image_id,labels\n" + "".join(f"{i},x\n" for i in ids))
    cache = extracted(**settings(ids=str(tmp_path / "ids.csv")))
    assert "2 ids have no file (nowhere ../i003 ...)" in capsys.readouterr().out
    assert cache.ids.tolist() == ids
    assert cache.valid.tolist() == [True, False, True, False, False, True]
    assert cache.skipped["nowhere"] == "the file does not exist"
    assert cache.skipped["i007"] == "the file is empty"
    rows = np.flatnonzero(cache.valid)
    same = unbroken.select(cache.ids[rows])
    np.testing.assert_allclose(cache.x()[rows], same.x(), rtol=2e-3, atol=1e-5)
    assert cache.labels is not None
    assert unbroken.labels is not None
    labelled = unbroken.labels.select(ids)
    assert (cache.labels.positives != labelled.positives).nnz == 0
    assert cache.labels.known.tolist() == [True, False, True, False, True, True]


def test_a_cache_that_cannot_be_written_is_refused_before_anything_else(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "x.h5"
    with pytest.raises(InputError, match=rf"{out}: cannot be written .* is no folder\); choose"):
        extract(ExtractionConfig(**settings(out=str(out), run=str(tmp_path / "nowhere"))))


def test_ids_that_are_nowhere_are_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("mistaken\n")
    with pytest.raises(InputError, match=r"ids\.txt: none of its 1 ids .* 'mistaken'"):
        extract(ExtractionConfig(**settings(ids=str(tmp_path / "ids.txt"))))


# ----------------------------------------------------------------------------- labels


def test_labels_stand_beside_their_images(
    settings: Settings, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of other order than the images, some without an entry, some of unknown classes."""
    file = tmp_path / "some.csv"
    tiny.write_lists(
        file,
        {
            "i009": ["white", "purple"],
            "absent": ["red"],
            "i002": [],
            "i000": ["green", "blue"],
            "i007": ["red"],
        },
    )
    cache = extracted(**settings(labels=[str(file)]))
    printed = capsys.readouterr().out
    assert "4 of 38 images have labels; 1 labelled images are not among them (absent" in printed
    assert "1 labels are of no class of the network (purple)\n" in printed
    labels = cache.labels
    assert labels is not None
    assert cache.classes.tolist() == ["blue", "green", "red", "white"]
    assert np.flatnonzero(labels.known).tolist() == [0, 2, 7, 9]
    found = {i: cache.classes[row.indices].tolist() for i, row in enumerate(labels.positives)}
    assert {i: names for i, names in found.items() if names} == {
        0: ["blue", "green"],
        7: ["red"],
        9: ["white"],
    }
    assert np.flatnonzero(labels.outside).tolist() == [9]
    assert labels.unlisted == "negative"
    arguments = cache.training()
    assert arguments["X"].shape == (3, 3, 16)  # labelled and readable
    assert arguments["Y"].toarray().tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert arguments["mask"] is None


def test_unlisted_labels_can_be_unknown(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "human.csv"
    file.write_text(
        "ImageID,Source,LabelName,Confidence\n"
        "i000,verification,red,1\ni000,verification,blue,0\ni001,machine,green,0.7\n"
    )
    cache = extracted(**settings(labels=[str(file)], unlisted="unknown"))
    assert cache.labels is not None
    assert cache.labels.unlisted == "unknown"
    assert cache.provenance["unlisted"] == "unknown"
    arguments = cache.training()
    np.testing.assert_allclose(arguments["Y"].toarray(), [[0, 0, 1, 0], [0, 0.7, 0, 0]], atol=1e-3)
    assert (~arguments["mask"]).tolist() == [
        [True, False, True, False],
        [False, True, False, False],
    ]


def test_three_labels_of_no_class_are_named(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first ones of these images, neither refuted ones nor those of other images."""
    (tmp_path / "human.csv").write_text(
        "ImageID,Source,LabelName,Confidence\n"
        "elsewhere,human,azure,1\ni000,human,beige,0\ni000,human,red,1\ni001,human,rose,1\n"
        "i000,human,ecru,1\ni002,human,rose,1\ni001,human,amber,1\ni003,human,teal,1\n"
    )
    extracted(**settings(labels=[str(tmp_path / "human.csv")]))
    printed = capsys.readouterr().out
    assert "5 labels are of no class of the network (rose ecru amber ...)\n" in printed


def test_no_label_of_these_images_is_refused(settings: Settings, tmp_path: Path) -> None:
    tiny.write_lists(tmp_path / "other.csv", {"elsewhere": ["red"]})
    with pytest.raises(InputError, match=r"other\.csv: no image .* 'elsewhere'"):
        extract(ExtractionConfig(**settings(labels=[str(tmp_path / "other.csv")])))
    assert not list(tmp_path.glob("x.h5*"))


def test_labels_of_other_classes_alone_are_refused(settings: Settings, tmp_path: Path) -> None:
    """Names in place of ids, say: the cache would say that nothing is to be seen anywhere."""
    tiny.write_lists(tmp_path / "names.csv", {"i000": ["Red"], "i001": ["Green", "Blue"]})
    with pytest.raises(InputError, match=r"names\.csv: none of the 3 labels .* 4 classes .*'blue'"):
        extract(ExtractionConfig(**settings(labels=[str(tmp_path / "names.csv")])))
    assert not list(tmp_path.glob("x.h5*"))


@pytest.mark.parametrize("change", ["fewer", "order", "another"])
def test_classes_that_are_not_those_of_the_outputs_are_refused(
    settings: Settings, run: Path, tmp_path: Path, change: str
) -> None:
    """A label would stand at the output of another one."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    header, *lines = (other / "classes.csv").read_text().splitlines()
    changed = {"fewer": lines[1:], "order": lines[::-1], "another": ["pink,pink", *lines[1:]]}
    (other / "classes.csv").write_text("\n".join([header, *changed[change]]) + "\n")
    with pytest.raises(InputError, match=r"classes\.csv: [34] classes .* the 4 of .* put the file"):
        extract(ExtractionConfig(**settings(run=str(other))))


def test_without_labels(settings: Settings, unbroken: FeatureCache) -> None:
    cache = extracted(**settings(labels=[]))
    assert cache.labels is None
    assert cache.classes.tolist() == unbroken.classes.tolist()
    assert cache.features.tobytes() == unbroken.features.tobytes()
    with pytest.raises(InputError, match="has no labels"):
        cache.training()


# ------------------------------------------------------------------------ stop and go on


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> list[int]:
    """SIGINT arrives during the forward pass of that batch; returns the sizes of all batches."""
    seen: list[int] = []
    real = Embedder.__call__

    def call(embedder: Embedder, pixels: torch.Tensor) -> np.ndarray:
        seen.append(len(pixels))
        if len(seen) == batches:
            signal.raise_signal(signal.SIGINT)
        return real(embedder, pixels)

    monkeypatch.setattr(Embedder, "__call__", call)
    return seen


@pytest.mark.parametrize(("after", "kept"), [(1, 0), (2, 8), (3, 8), (9, 32)])
def test_stopped_extraction_goes_on_at_its_last_block(
    settings: Settings,
    unbroken: FeatureCache,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    after: int,
    kept: int,
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, after)
        with pytest.raises(Interrupted, match=f"stopped at {kept} of {N} images; the same command"):
            extract(ExtractionConfig(**settings()))
    seen = stop_after(monkeypatch, -1)
    capsys.readouterr()
    cache = extracted(**settings())
    assert (f"going on at {kept} of {N}" in capsys.readouterr().out) == (kept > 0)
    assert sum(seen) == N - kept
    assert_same_cache(cache, unbroken)


def test_a_stop_after_the_last_batch_comes_too_late(
    settings: Settings, unbroken: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 10)
    assert_same_cache(extracted(**settings()), unbroken)


def test_images_may_move_between_two_sittings(
    settings: Settings,
    data: Path,
    unbroken: FeatureCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            extract(ExtractionConfig(**settings()))
    shutil.copytree(data / "images", tmp_path / "elsewhere")
    cache = extracted(**settings(images=str(tmp_path / "elsewhere")))
    assert cache.features.tobytes() == unbroken.features.tobytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_sigint_and_kills_change_nothing(
    nursery: tiny.Nursery, settings: Settings, unbroken: FeatureCache, tmp_path: Path, workers: int
) -> None:
    """One sitting ends by a signal to its group, others by SIGKILL when a block was written."""
    code = """
extraction.ROWS_A_BLOCK = 8
journal = out / "x.h5.journal"
def lines():
    return len(journal.read_bytes().splitlines()) if journal.exists() else 0
endings = []
for number in (signal.SIGINT, signal.SIGKILL, signal.SIGKILL):
    before = max(lines(), 2)  # the first two tell of the file
    pid = child(
        lambda: (os.setsid(), cli.main(["extract", *options]))[1], errors=out / f"log{len(endings)}"
    )
    while lines() <= before:
        time.sleep(0.001)
    (os.killpg if number == signal.SIGINT else os.kill)(pid, number)
    endings.append(ended(pid))
answer = endings
"""
    options = settings(views="tests.tiny:sleepy", workers=workers)
    endings = nursery.run(code, out=tmp_path, options=tiny.options(**options))
    assert endings == [130, -signal.SIGKILL, -signal.SIGKILL]
    (line,) = (tmp_path / "log0").read_text().splitlines()
    assert "the same command goes on from there" in line
    assert not (tmp_path / "x.h5").exists()
    cache = extracted(**options)
    expected = extracted(**options | {"out": str(tmp_path / "whole" / "x.h5"), "workers": 0})
    for log in tmp_path.glob("log*"):
        log.unlink()
    assert_same_cache(cache, expected)
    assert cache.x("eval").tobytes() == unbroken.x("eval").tobytes()


@pytest.mark.slow
def test_random_kills_change_nothing(
    nursery: tiny.Nursery, settings: Settings, tmp_path: Path
) -> None:
    code = """
extraction.ROWS_A_BLOCK = 8
chance, done, k = random.Random(0), 0, 1
while done < 12:
    command = ["extract", *options, "--out", str(out / str(k) / "x.h5")]
    pid = child(lambda: cli.main(command))
    time.sleep(chance.uniform(0.1, 0.8))
    os.kill(pid, signal.SIGKILL)
    if ended(pid) == 0:
        k += 1
    else:
        done += 1
answer = k
"""
    options = settings(views="tests.tiny:sleepy")
    count = nursery.run(code, out=tmp_path, options=tiny.options(**options | {"out": None}))
    whole = extracted(**options)
    for k in range(1, count + 1):
        out = tmp_path / str(k) / "x.h5"
        if not out.exists() or out.with_name("x.h5.journal").exists():
            extract(ExtractionConfig(**options | {"out": str(out)}))
        assert FeatureCache(out).features.tobytes() == whole.features.tobytes()


@pytest.fixture
def begun(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Options of an extraction that was stopped on its way."""
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            extract(ExtractionConfig(**settings()))
    return settings


def assert_refused(options: dict[str, Any], *words: str) -> None:
    """Naming what differs, and without harm to what is there."""
    journal = Path(options["out"] + ".journal")
    before = journal.read_bytes()
    with pytest.raises(InputError, match=r"was begun with other settings.*--overwrite") as caught:
        extract(ExtractionConfig(**options))
    for word in words:
        assert word in str(caught.value)
    assert journal.read_bytes() == before


def test_other_settings_are_refused(
    begun: Settings, data: Path, tmp_path: Path, unbroken: FeatureCache
) -> None:
    assert_refused(begun(views="tta", view_count=4), "views.recipe", "tests.tiny:shaken", "tta")
    assert_refused(begun(seed=7), "views.seed", "0", "7")
    assert_refused(begun(view_count=3), "views.count", "2", "3")
    assert_refused(begun(batch_size=8), "batch_size", "4", "8")
    assert_refused(begun(precision="bf16"), "dtype", "float32", "bf16")
    assert_refused(begun(labels=[]), "contents")
    (tmp_path / "ids.txt").write_text("".join(f"i{k:03d}\n" for k in range(N - 1)))
    assert_refused(begun(ids=str(tmp_path / "ids.txt")), "ids")
    shutil.copytree(data / "images", tmp_path / "images")
    tiny.draw([], np.random.default_rng(3)).save(tmp_path / "images" / "i004.png")
    assert_refused(begun(images=str(tmp_path / "images")), "file_sizes", " bytes ")
    assert_refused(begun(hash_images=True), "file_contents", "(absent)")
    assert_same_cache(extracted(**begun()), unbroken)


def test_hashed_images_are_told_apart_where_sizes_are_not(
    settings: Settings,
    data: Path,
    unbroken: FeatureCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = tmp_path / "images"
    shutil.copytree(data / "images", images)
    options = settings(images=str(images), hash_images=True)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            extract(ExtractionConfig(**options))
    first = (images / "i000.png").read_bytes()
    other = bytearray(first)
    other[-20] ^= 1
    (images / "i000.png").write_bytes(other)
    assert_refused(options, "run.file_contents")
    (images / "i000.png").write_bytes(first)
    assert extracted(**options).features.tobytes() == unbroken.features.tobytes()


OWN = """
from PIL import ImageOps
SIDES = {sides}

def flipped(image, size, rng):
    return (ImageOps.mirror if SIDES else ImageOps.flip)(image).resize((size, size))
"""


def test_a_recipe_of_other_code_is_refused(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name says nothing of what it does by now."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(sides: bool, more: str = "") -> None:
        (tmp_path / "changing_views.py").write_text(OWN.format(sides=sides) + more)
        sys.modules.pop("changing_views", None)
        importlib.invalidate_caches()

    options = settings(views="changing_views:flipped")
    write(True)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            extract(ExtractionConfig(**options))
    write(False)
    assert_refused(options, "run.own_code.changing_views:flipped")
    write(True, more="# a comment changes nothing\n")
    cache = extracted(**options)
    assert set(cache.provenance["own_code"]) == {"changing_views:flipped", "tests.tiny:network"}
    sys.modules.pop("changing_views")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("change", ["grown", "gone"])
def test_images_that_change_meanwhile_stop_the_extraction(
    settings: Settings,
    data: Path,
    unbroken: FeatureCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    change: str,
) -> None:
    """Half of a file that is being copied must not become a bad image for good."""
    images = tmp_path / "images"
    shutil.copytree(data / "images", images)
    victim = images / "i035.png"
    whole = victim.read_bytes()
    options = settings(images=str(images), workers=workers)
    real = extraction.told

    def told(*arguments: Any) -> dict[str, Any]:
        found = real(*arguments)
        victim.write_bytes(whole + b"more") if change == "grown" else victim.unlink()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "told", told)
        with pytest.raises(InputError, match=r"i035\.png: changes while .*put it back") as caught:
            extract(ExtractionConfig(**options))
    assert "\n" not in str(caught.value)
    if change == "grown":
        assert_refused(options, "run.file_sizes")
    victim.write_bytes(whole)
    assert extracted(**options).features.tobytes() == unbroken.features.tobytes()


# A second signal may still reach torch while it tidies up, or while it opens files of its own
# to see whether more may be opened.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*DataLoaderIter:pytest.PytestUnraisableExceptionWarning",
    "ignore:Exception ignored in.*FileIO name=.*tmp:pytest.PytestUnraisableExceptionWarning",
)
def test_a_worker_that_is_ended_costs_a_block_and_one_line(
    settings: Settings,
    unbroken: FeatureCache,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = batches.decode

    def decode(path: Path) -> Image.Image:
        if Path(path).name == "i036.png":  # as the kernel does where memory ends
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path)

    words = ["extract", *tiny.options(**settings(workers=1))]
    with monkeypatch.context() as patch:
        patch.setattr(batches, "decode", decode)
        assert main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("featcache: a worker process was ended")
    assert "fewer --workers, the same command goes on" in line
    assert main(words) == 0
    assert "going on at" in capsys.readouterr().out
    assert_same_cache(FeatureCache(settings()["out"]), unbroken)


@pytest.mark.parametrize("hashed", [False, True])
def test_an_image_in_a_bad_sector_can_be_given_up(
    settings: Settings,
    data: Path,
    unbroken: FeatureCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    hashed: bool,
) -> None:
    """By the commands that the message names, and the rows that are done stay."""
    images = tmp_path / "some images"
    shutil.copytree(data / "images", images)
    options = settings(images=str(images), hash_images=hashed)
    real = Image.open

    def opened(path: Path, **how: Any) -> Image.Image:
        if Path(path).name == "i035.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", opened)
        with pytest.raises(InputError, match=r"i035\.png: cannot be read now: ") as caught:
            extract(ExtractionConfig(**options))
    commands = re.search(r"\((mv .*; truncate -s \d+ [^)]*)\)", str(caught.value))
    assert commands is not None
    subprocess.run(commands[1], shell=True, check=True)
    if hashed:
        assert "--hash-images must begin anew" in str(caught.value)
        assert_refused(options, "run.file_contents")
        return
    capsys.readouterr()
    cache = extracted(**options)
    assert f"going on at 32 of {N}" in capsys.readouterr().out
    others = np.arange(N) != 35
    assert cache.features[others].tobytes() == unbroken.features[others].tobytes()
    assert "cannot identify" in cache.skipped["i035"]
    assert not cache.features[35].any()


def test_other_weights_are_refused(begun: Settings, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    state = safetensors.torch.load_file(other / "weights.safetensors")
    state["last.bias"][0] += 2**-10
    safetensors.torch.save_file(state, other / "weights.safetensors")
    assert_refused(begun(run=str(other)), "network_id")
    cache = extracted(**begun(run=str(other), overwrite=True))
    assert cache.bias is not None
    np.testing.assert_array_equal(cache.bias, state["last.bias"].numpy())


def test_an_existing_cache_is_replaced_only_on_demand(
    settings: Settings, unbroken: FeatureCache
) -> None:
    old = extracted(**settings(views="eval", view_count=4))
    before = (old.path.stat().st_mtime_ns, old.path.read_bytes())
    with pytest.raises(InputError, match=r"x\.h5: exists already; pass --overwrite"):
        extract(ExtractionConfig(**settings()))
    assert (old.path.stat().st_mtime_ns, old.path.read_bytes()) == before
    assert_same_cache(extracted(**settings(overwrite=True)), unbroken)


# ------------------------------------------------------------------------- provenance


def test_provenance_says_what_made_the_features(
    unbroken: FeatureCache, run: Path, data: Path
) -> None:
    known = json.loads(json.dumps(dict(unbroken.provenance)))
    assert known["network"] == {
        "arch": "tests.tiny:network",
        "num_classes": 4,
        "kwargs": {},
        "layer": "last",
    }
    assert len(known["network_id"]) == 64
    assert known["preprocessing"] == json.loads((run / "config.json").read_text())["preprocessing"]
    assert known["views"] == {"recipe": "tests.tiny:shaken", "seed": 0, "count": 2}
    assert {"python", "numpy", "pillow", "timm", "torch", "torchvision"} <= set(known["versions"])
    assert (known["device"], known["dtype"], known["threads"]) == ("cpu", "float32", 1)
    assert known["batch_size"] == 4
    assert known["unlisted"] == "negative"
    assert known["run"] == str(run)
    assert known["images"] == str(data / "images")
    assert known["labels"] == [str(data / "labels.csv")]
    assert known["wall_seconds"] > 0


def test_caches_of_one_network_share_its_id(
    settings: Settings, unbroken: FeatureCache, tmp_path: Path
) -> None:
    tiny.make_data(tmp_path / "new", 24, seed=8, prefix="n")
    elsewhere = str(tmp_path / "new" / "images")
    options = {"views": "tta", "view_count": 4, "batch_size": 16}
    cache = extracted(**settings(images=elsewhere, labels=[], **options))
    assert cache.network_id == unbroken.network_id
    other = train(tmp_path / "new", validation="4", seed=1)
    options = {"views": "eval", "view_count": 4}
    again = extracted(**settings(run=str(other), out=str(tmp_path / "y.h5"), **options))
    assert again.network_id != unbroken.network_id


def test_an_existing_cache_is_refused_before_anything_is_looked_at(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "x.h5").write_bytes(b"")
    with pytest.raises(InputError, match=r"x\.h5: exists already; pass --overwrite"):
        extract(ExtractionConfig(**settings(images="nowhere", run="nowhere")))
