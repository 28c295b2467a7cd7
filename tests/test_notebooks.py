"""The notebooks of examples/ run from top to bottom, as they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from scipy.special import logit

from examples import kanji
from examples.kanji.dataset import SOURCE_FONTS, image_id, in_font, read_kanji, read_sheet
from featcache import FeatureCache, Labels
from featcache.annotations import read_labels
from heads import DropoutRidge

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.stem: path for path in (ROOT / "examples").glob("*.ipynb")}
NETWORKS = ("slim32", "slim40", "wide32")
CLASSES = 30  # the most frequent ones, to be quick
FEATURES = 64


def outputs(notebook: Any) -> Iterator[Any]:
    for cell in notebook.cells:
        yield from cell.get("outputs", [])


def run(name: str, **environment: str) -> list[Any]:
    """Its outputs."""
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    # What the notebook opens is as from its own folder, as in Jupyter.
    client = NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOKS[name].parent)}}
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    return list(outputs(notebook))


def pictures(found: list[Any]) -> int:
    kinds = ("image/svg+xml", "image/png")
    return sum(any(kind in o.get("data", {}) for kind in kinds) for o in found)


def complaints(found: list[Any]) -> str:
    return "".join(o.text for o in found if o.output_type == "stream" and o.name == "stderr")


@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_notebooks_are_stored_without_what_they_gave(name: str) -> None:
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    nbformat.validate(notebook)
    assert not list(outputs(notebook))
    assert not any(cell.get("execution_count") for cell in notebook.cells)
    assert NOTEBOOKS[name].stat().st_size < 20_000


# ---------------------------------------------------------- instead of the quickstart's caches


def glyphs(font: str) -> dict[str, np.ndarray]:
    """Features of the images of a typeface by id: random projections of their pixels."""
    side = read_sheet(font)[:, ::3, ::3].reshape(-1, 256) / 255
    some = [k.character for k in read_kanji() if in_font(k, font)]
    return {image_id(font, c): row for c, row in zip(some, side, strict=False)}


def write_caches(folder: Path, data: Path) -> None:
    """Caches of random networks on the real images, in the folders of the quickstart."""
    source = read_labels(data / "train_human_labels.csv")
    held_out = (data / "validation_ids.txt").read_text().split()
    frequent = np.argsort(-np.asarray(source.positives.sum(axis=0)).ravel())[:CLASSES]
    classes = np.sort(source.classes[frequent])
    pixels = {font: glyphs(font) for font in ("gyosho", "sousyo", "soseki")}
    pixels["source"] = {i: row for font in SOURCE_FONTS for i, row in glyphs(font).items()}
    sets: dict[str, tuple[str, list[str], Labels | None]] = {
        "validation": ("source", held_out[::8], source),
        "gyosho_stage_1": (
            "gyosho",
            sorted(path.stem for path in (data / "gyosho" / "stage_1").iterdir())[:1200],
            read_labels(data / "gyosho" / "tuning_labels.csv"),
        ),
    }
    for font in ("sousyo", "soseki"):
        solution = read_labels(data / font / "stage_2_solution.csv")
        sets[f"{font}_stage_2"] = (font, solution.ids.tolist(), None)
    for seed, network in enumerate(NETWORKS):
        rng = np.random.default_rng(seed)
        projection = rng.normal(size=(256, FEATURES)) / 8

        def views(
            font: str, ids: list[str], P: np.ndarray = projection, rng: Any = rng
        ) -> np.ndarray:
            X = np.maximum(np.array([pixels[font][i] for i in ids]) @ P, 0)
            return np.stack([X, X + 0.1 * rng.normal(size=X.shape)], axis=1)

        ids = sets["validation"][1]
        Y = source.restrict(classes).select(ids).positives
        X = views("source", ids)[:, 0]
        fitted = DropoutRidge(0.5).fit(X, Y)
        weight = 8 * fitted.coef_
        bias = logit((np.asarray(Y.sum(axis=0)).ravel() + 0.5) / (len(ids) + 1))
        for name, (font, ids, labels) in sets.items():
            path = folder / name / f"{network}.h5"
            path.parent.mkdir(parents=True, exist_ok=True)
            FeatureCache.write(
                path,
                views(font, ids),
                ids,
                labels=labels,
                classes=classes,
                class_names=[chr(int(c[3:], 16)) for c in classes],
                weight=weight,
                bias=bias - weight @ X.mean(axis=0),
                provenance={"network": network},
            )


@pytest.mark.slow
def test_tour_of_heads(tmp_path: Path) -> None:
    data = kanji.unpack(tmp_path / "data", ("gyosho", "sousyo", "soseki"), lambda line: None)
    write_caches(tmp_path / "caches", data)
    # These features are poor: the best rate may well be at an end of the grid.
    quiet = "ignore:the best dropout:UserWarning"
    found = run("tour_of_heads", QUICKSTART=str(tmp_path), PYTHONWARNINGS=quiet)
    assert complaints(found) == ""
    assert pictures(found) == 7
    tables = [o for o in found if "<table" in o.get("data", {}).get("text/html", "")]
    assert len(tables) == 4  # caches, the head, labels, the domain
    assert sum("data:image/jpeg" in o.get("data", {}).get("text/html", "") for o in found) == 1


@pytest.mark.slow
def test_images_to_caches(tmp_path: Path) -> None:
    found = run("images_to_caches", TMPDIR=str(tmp_path))
    assert complaints(found) == ""
    assert pictures(found) == 4
    assert not list(tmp_path.glob("tmp*"))  # nothing is left but what torch keeps


@pytest.mark.slow
def test_bring_your_own() -> None:
    found = run("bring_your_own")
    assert complaints(found) == ""
    assert pictures(found) == 4


@pytest.mark.slow
def test_the_tour_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match="make quickstart"):
        run("tour_of_heads", QUICKSTART=str(tmp_path / "nowhere"))
