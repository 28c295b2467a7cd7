"""What do the images look like on which a model is right, wrong, or unsure?"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from featcache.errors import InputError
from heads.cuts import apply_threshold, best_global_threshold
from heads.expected import expected_fbeta_sets
from heads.inputs import Matrix, check_probabilities, check_truth, without
from heads.markup import Markup, element, in_notebook, joined
from heads.metrics import fbeta_per_image

_SIDE = 192  # pixels of a thumbnail's longer side
_LABELS = 8  # of each kind that are written out
TITLES = {
    "right": "Right, and sure of it",
    "wrong": "Wrong, and sure of it",
    "uncertain": "Most uncertain",
}


@dataclass(frozen=True)
class Picture:
    """An image of a gallery.

    Attributes
    ----------
    id : str
    hits, missed, extra : list of str
        Labels that are true and predicted, true only, predicted only; known labels alone.
    score, expected : float
        Its F-beta, and the F-beta that its probabilities promise.
    """

    id: str
    hits: list[str]
    missed: list[str]
    extra: list[str]
    score: float
    expected: float


@dataclass(frozen=True)
class Gallery:
    """Pictures by kind: "right", "wrong" and "uncertain"; shows itself in a notebook.

    Attributes
    ----------
    pictures : dict of list of Picture
    beta : float
    thumbnails : dict of str
        ``data:`` URLs of the images that were found, by id.
    """

    pictures: dict[str, list[Picture]]
    beta: float = 2
    thumbnails: dict[str, str] = field(default_factory=dict, repr=False)

    def markup(self, level: int = 3) -> Markup:
        """HTML with headings of that level."""
        parts = []
        for kind, pictures in self.pictures.items():
            parts.append(element(f"h{level}", TITLES[kind]))
            cards = [self._card(picture) for picture in pictures]
            parts.append(element("ul", *cards, class_="gallery") if cards else _none())
        return joined(parts)

    def _card(self, picture: Picture) -> Markup:
        url = self.thumbnails.get(picture.id)
        rows = []
        kinds = (("hit", "right", picture.hits), ("missed", "missed", picture.missed))
        for class_, title, labels in (*kinds, ("extra", "wrongly predicted", picture.extra)):
            if labels:
                names = ", ".join(labels[:_LABELS])
                more = f" and {len(labels) - _LABELS} more" if len(labels) > _LABELS else ""
                rows.append(element("dt", title))
                rows.append(element("dd", element("span", names, class_=class_), more))
        if not rows:
            rows = [element("dt", "no label"), element("dd", "none true, none predicted")]
        score = f"F{self.beta:g} {picture.score:.2f}, expected {picture.expected:.2f}"
        return element(
            "li",
            url is not None and element("img", src=url, alt=f"image {picture.id}"),
            element("div", picture.id, class_="id"),
            element("div", score),
            element("dl", *rows),
        )

    def _repr_html_(self) -> str:
        return in_notebook(self.markup())


def _none() -> Markup:
    return element("p", "none")


def gallery(
    ids: Sequence[str] | np.ndarray,
    Y: Matrix,
    P: np.ndarray,
    images: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    *,
    names: Sequence[str] | np.ndarray | None = None,
    sets: csr_matrix | None = None,
    beta: float = 2,
    count: int = 8,
    mask: Matrix | None = None,
    missed: np.ndarray | None = None,
) -> Gallery:
    """Images that show what a model knows and what it does not.

    *Right* and *wrong* are those of the best and of the worst F-beta, those first whose
    probabilities promise most; *uncertain* those whose best label set promises least. No image is
    shown twice.

    Parameters
    ----------
    ids : (n,)
    Y : (n, K), dense or sparse, {0, 1}
        True labels; NaN (dense) is unknown.
    P : (n, K)
        Probabilities, out of fold if the model was fitted on these images.
    images : folder, or mapping of id to file, optional
        Where the image files are (``<id>.jpg`` and other endings, also in folders below);
        those found are embedded as thumbnails. Needs Pillow.
    names : (K,), optional
        Of the labels.
    sets : (n, K) CSR, optional
        Predicted labels; by default those at the best global cut of these rows.
    count : int
        Images of each kind at most.
    mask, missed : optional
        See :func:`heads.fbeta_per_image`.

    Returns
    -------
    Gallery

    Raises
    ------
    ValueError
        If shapes disagree.
    """
    P = check_probabilities(P)
    truth, unknown = check_truth(Y, mask, P.shape)
    if len(ids) != len(P):
        raise ValueError(f"ids has length {len(ids)}, but P has {len(P)} rows")
    labels = np.arange(P.shape[1]).astype(str) if names is None else np.asarray(names, str)
    if len(labels) != P.shape[1]:
        raise ValueError(f"names has length {len(labels)}, but P has {P.shape[1]} labels")
    if sets is None:
        cut = best_global_threshold(P, truth, beta, unknown, missed=missed)[0]
        sets = apply_threshold(P, cut)
    chosen = without(csr_matrix(sets, dtype=np.float64), unknown)
    score = fbeta_per_image(truth, chosen, beta, missed=missed)
    expected = expected_fbeta_sets(P, beta).expected

    def picture(row: int) -> Picture:
        true, predicted = _labels(truth, row), _labels(chosen, row)
        return Picture(
            str(ids[row]),
            labels[sorted(true & predicted)].tolist(),
            labels[sorted(true - predicted)].tolist(),
            labels[sorted(predicted - true)].tolist(),
            float(score[row]),
            float(expected[row]),
        )

    rows = _choose(score, expected, count)
    pictures = {kind: [picture(row) for row in found] for kind, found in rows.items()}
    shown = [p.id for kind in pictures.values() for p in kind]
    return Gallery(pictures, beta, {} if images is None else _thumbnails(images, shown))


def _labels(matrix: csr_matrix, row: int) -> set[int]:
    return set(matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]].tolist())


def _choose(score: np.ndarray, expected: np.ndarray, count: int) -> dict[str, list[int]]:
    """Rows of each kind, no row twice: the sure ones first."""
    n, middle = len(score), float(np.median(score)) if len(score) else 0.0
    orders = {
        "right": (np.lexsort((-expected, -score)), score >= middle),
        "wrong": (np.lexsort((-expected, score)), score < middle),
        "uncertain": (np.argsort(expected, kind="stable"), np.ones(n, bool)),
    }
    free = np.ones(n, bool)
    rows: dict[str, list[int]] = {}
    for kind, (order, fits) in orders.items():
        rows[kind] = [row for row in order.tolist() if free[row] and fits[row]][:count]
        free[rows[kind]] = False
    return rows


# -------------------------------------------------------------------- thumbnails


def _thumbnails(
    images: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]], ids: Sequence[str]
) -> dict[str, str]:
    """``data:`` URLs of the images that have a file that can be read."""
    try:
        from featcache.images import UnreadableImage, decode, find_images
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "thumbnails need Pillow: pip install 'featcache-heads[report]'"
        ) from error
    if isinstance(images, Mapping):
        files = {name: Path(images[name]) for name in ids if name in images}
    else:
        found, _ = find_images(images).select(list(ids))
        files = {str(name): found.path(row) for row, name in enumerate(found.ids)}
    urls = {}
    for name, file in files.items():
        try:
            image = decode(file)
        except (UnreadableImage, InputError):  # nor one that cannot be read just now
            continue  # the card stays, without a picture
        image = image.convert("RGB")
        image.thumbnail((_SIDE, _SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        urls[name] = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return urls
