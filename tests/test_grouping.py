"""Images that belong together stay on one side of a fold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy.sparse import csr_matrix

from featcache import FeatureCache, Labels
from heads import adapting, commands
from heads.adapting import AdaptConfig
from heads.commands import FitConfig
from heads.grouping import group_codes, read_groups
from heads.storage import Head

SCENES, K, D = 60, 6, 80


def twins(path: Path, prefix: str, seed: int) -> Path:
    """Pictures a and b of each scene, nearly alike, with labels that no feature tells."""
    rng = np.random.default_rng(seed)
    scenes, Y = rng.normal(size=(SCENES, D)), rng.random((SCENES, K)) < 0.3
    ids = [f"{prefix}{scene}{which}" for which in "ab" for scene in range(SCENES)]
    features = np.concatenate([scenes, scenes + 0.01 * rng.normal(size=scenes.shape)])
    classes = [f"c{k}" for k in range(K)]
    labels = Labels(ids, classes, csr_matrix(np.tile(Y, (2, 1)).astype(np.float32)))
    FeatureCache.write(
        path,
        features[:, None].astype(np.float16),
        ids,
        labels=labels,
        classes=classes,
        weight=np.zeros((K, D), np.float32),
        bias=np.full(K, -1, np.float32),
        provenance={"network": "twins"},
    )
    return path


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Stage 1, validation, and the file that says which pictures are of one scene."""
    root = tmp_path_factory.mktemp("twins")
    rows = [f"{d}{s}{w},{d}{s}\n" for d in "tv" for s in range(SCENES) for w in "ab"]
    (root / "groups.csv").write_text("image_id,group\n" + "".join(rows))
    return twins(root / "t.h5", "t", 0), twins(root / "v.h5", "v", 1), root / "groups.csv"


def fitted(caches: tuple[Path, Path, Path], out: Path, grouped: bool, source: bool) -> Head:
    stage_1, validation, groups = caches
    both = {"source": str(validation), "source_weight": "1"} if source else {}
    given = {"groups": str(groups)} if grouped else {}
    return commands.fit(FitConfig(str(stage_1), str(out), dropout="0.05", cv=3, **both, **given))


@pytest.mark.parametrize("source", [False, True])
@pytest.mark.filterwarnings("ignore:.*did not converge")
def test_held_out_scores_do_not_know_a_twin(
    caches: tuple[Path, Path, Path], tmp_path: Path, source: bool
) -> None:
    leaking = fitted(caches, tmp_path / "leaking.h5", False, source)
    honest = fitted(caches, tmp_path / "honest.h5", True, source)
    for domain in leaking.oof:

        def margin(head: Head, domain: str = domain) -> float:
            """Mean probability of true labels minus that of false ones."""
            P, Y = head.oof[domain].proba, head.oof[domain].Y.toarray() > 0
            return float(P[Y].mean() - P[~Y].mean())

        assert margin(leaking) > 0.1
        assert margin(honest) < 0.05


def test_an_adapted_model_keeps_groups_together(
    caches: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    stage_1, validation, groups = caches
    config = {"cache": str(stage_1), "source": str(validation), "dropout": "0.3", "cv": 3}
    leaking = adapting.adapt(AdaptConfig(**config, out=str(tmp_path / "leaking.h5")))
    honest = adapting.adapt(
        AdaptConfig(**config, out=str(tmp_path / "honest.h5"), groups=str(groups))
    )
    assert leaking.provenance["score"] > honest.provenance["score"] + 0.05


def test_unlisted_images_are_groups_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "groups.csv"
    file.write_text("image_id,group\na,1\nb,c\nd,1\nz,9\n")
    # An image that has the name of a group is not in it.
    codes = group_codes(file, np.array(["a", "c", "b", "d", "e"]))
    assert_array_equal(codes, [0, 1, 2, 0, 3])
    assert read_groups(file) == {"a": "1", "b": "c", "d": "1", "z": "9"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,group\na,1\n", "line 1 is 'id,group'; expected image_id,group"),
        ("", "line 1 is ''"),
        ("image_id,group\na,1\nb\n", "line 3 is 'b'; expected an id and a group"),
        ("image_id,group\na,\n", "line 2 is 'a,'"),
        ("image_id,group\na,1\na,2\n", "line 3: image 'a' is in group '2' and, above, in '1'"),
        ("image_id,group\nother,1\n", "lists none of the 2 images, such as 'a'"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "groups.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"groups\.csv: ") as caught:
        group_codes(file, np.array(["a", "b"]))
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.csv: no such file; give a CSV file of image_id"):
        read_groups(tmp_path / "none.csv")
