"""Which images are held out, and that images and labels stay together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.datasets import hold_out, load_data
from featcache.errors import InputError
from featcache.settings import TrainingConfig

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=80)
IDS = np.array([f"{k:04x}" for k in range(400)])
NAMES = st.text("abcdef0123456789", min_size=1, max_size=6)


def held_out(ids: Any, validation: str) -> set[str]:
    ids = np.array(sorted(ids))
    return set(ids[hold_out(ids, validation)].tolist())


# -------------------------------------------------------------------- hold out


@pytest.mark.parametrize(
    ("validation", "count"),
    [("1", 1), ("40", 40), ("399", 399), ("40.0", 40), ("1e2", 100), ("0.1", 40), ("0.999", 400)],
)
def test_numbers_and_shares(validation: str, count: int) -> None:
    if count == len(IDS):
        with pytest.raises(InputError, match="400 of 400"):
            hold_out(IDS, validation)
        return
    held = hold_out(IDS, validation)
    assert (held.shape, held.dtype) == ((400,), bool)
    assert held.sum() == count


def test_the_choice_does_not_follow_the_order_of_the_ids() -> None:
    held = hold_out(IDS, "100")
    for quarter in np.split(held, 4):
        assert 12 <= quarter.sum() <= 40
    order = np.random.default_rng(0).permutation(400)
    np.testing.assert_array_equal(hold_out(IDS[order], "100"), held[order])


def test_the_choice_stays_what_it_is_in_all_versions() -> None:
    ids = np.array([f"i{k}" for k in range(12)])
    assert ids[hold_out(ids, "4")].tolist() == ["i0", "i4", "i6", "i10"]


@SETTINGS
@given(
    old=st.sets(NAMES, min_size=6, max_size=30), added=st.sets(NAMES, max_size=30), data=st.data()
)
def test_of_the_old_images_none_enters_when_files_are_added(
    old: set[str], added: set[str], data: st.DataObject
) -> None:
    # With a number, an added image takes the place of exactly one old one or stays outside.
    count = data.draw(st.integers(1, len(old) - 1))
    before, after = held_out(old, str(count)), held_out(old | added, str(count))
    assert len(before) == len(after) == count
    assert after & old <= before
    assert len(before - after) == len(after - old)


@SETTINGS
@given(names=st.sets(NAMES, min_size=4, max_size=30), data=st.data())
def test_larger_choices_contain_smaller_ones(names: set[str], data: st.DataObject) -> None:
    # So with a share, files added make old images enter in one fixed order only.
    few = data.draw(st.integers(1, len(names) - 2))
    more = data.draw(st.integers(few + 1, len(names) - 1))
    assert held_out(names, str(few)) < held_out(names, str(more))
    share = (few + 0.25) / len(names)
    assert held_out(names, str(share)) == held_out(names, str(few))


def test_a_file_of_ids(tmp_path: Path) -> None:
    path = tmp_path / "validation.txt"
    path.write_text("0003\nnot an image\n0001\n")
    assert np.flatnonzero(hold_out(IDS, str(path))).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ("0", "0 of 400"),
        ("400", "400 of 400"),
        ("1000000", "400 of 400"),
        ("0.0001", "0 of 400"),
        ("1e300", "400 of 400"),
        ("-40", "give a whole number"),
        ("-0.1", "give a whole number"),
        ("1.5", "give a whole number"),
        ("nan", "give a whole number"),
        ("inf", "give a whole number"),
        ("", "neither a number nor an existing file"),
        ("absent.txt", "neither a number nor an existing file"),
        ("10%", "neither a number nor an existing file"),
    ],
)
def test_what_cannot_be_held_out(validation: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        hold_out(IDS, validation)
    assert "--validation" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_ids_that_fit_nothing_or_everything(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("other\n")
    with pytest.raises(InputError, match=r"ids\.txt: none of its ids is a labelled image"):
        hold_out(IDS, str(path))
    path.write_text("\n".join(IDS))
    with pytest.raises(InputError, match="400 of 400"):
        hold_out(IDS, str(path))


# ---------------------------------------------------------------------- images


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    """Six labelled images, two labelled ones without a file, one file without a label."""
    for name in ("d.jpg", "a.png", "deep/c.jpg", "b.jpg", "f.jpg", "e.jpg", "unlabelled.jpg"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")  # decoded by nobody here
    (tmp_path / "labels.csv").write_text(
        "image_id,labels\nd,/m/1\ngone,/m/2\nb,/m/2 /m/9\na,/m/1 /m/2\nlost,\nc,\ne,/m/3\nf,/m/1\n"
    )
    (tmp_path / "held.txt").write_text("e\nb\nlost\n")
    return TrainingConfig(
        images=str(tmp_path / "images"),
        labels=[str(tmp_path / "labels.csv")],
        arch="resnet101",
        out=str(tmp_path / "run"),
        validation=str(tmp_path / "held.txt"),
    )


def changed(config: TrainingConfig, **values: Any) -> TrainingConfig:
    return TrainingConfig(**{**vars(config), **values})


def test_images_and_labels_stay_together(config: TrainingConfig) -> None:
    data = load_data(config)
    assert sorted(data.train.ids) == ["a", "c", "d", "f"]
    assert sorted(data.validation.ids) == ["b", "e"]
    assert data.missing == ["gone", "lost"]
    truth = {
        "a": {"/m/1", "/m/2"},
        "b": {"/m/2", "/m/9"},
        "c": set(),
        "d": {"/m/1"},
        "e": {"/m/3"},
        "f": {"/m/1"},
    }
    sides = ((data.train, data.train_labels), (data.validation, data.validation_labels))
    for images, labels in sides:
        assert labels.ids.tolist() == images.ids.tolist()
        assert labels.classes.tolist() == ["/m/1", "/m/2", "/m/3", "/m/9"]
        assert labels.known.all()
        for row, image_id in enumerate(images.ids.tolist()):
            assert images.path(row).is_file()
            assert images.path(row).stem == image_id
            found = labels.classes[labels.positives[[row]].indices]
            assert set(found.tolist()) == truth[image_id]


def test_labels_outside_the_classes_are_counted(config: TrainingConfig, tmp_path: Path) -> None:
    (tmp_path / "classes.csv").write_text("label_code\n/m/2\n/m/1\n")
    data = load_data(changed(config, classes=str(tmp_path / "classes.csv")))
    assert data.train_labels.classes.tolist() == ["/m/2", "/m/1"]
    outside = dict(zip(data.validation.ids.tolist(), data.validation_labels.outside, strict=True))
    assert outside == {"b": 1, "e": 1}
    assert data.train_labels.outside.sum() == 0


@pytest.mark.parametrize("unlisted", ["negative", "unknown"])
def test_what_absence_means_is_passed_on(config: TrainingConfig, unlisted: str) -> None:
    data = load_data(changed(config, unlisted=unlisted))
    assert data.train_labels.unlisted == data.validation_labels.unlisted == unlisted


def test_only_labelled_images_with_a_file_are_counted(config: TrainingConfig) -> None:
    data = load_data(changed(config, validation="0.5"))
    assert len(data.train) == len(data.validation) == 3
    with pytest.raises(InputError, match="6 of 6"):
        load_data(changed(config, validation="6"))


def test_labels_of_other_images_are_refused(config: TrainingConfig, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("image_id,labels\nq1.jpg,/m/1\nq2.jpg,/m/2\n")
    with pytest.raises(InputError, match=r"none of the 2 labelled images is there.*'q1\.jpg'"):
        load_data(config)


def test_an_empty_label_file_is_refused(config: TrainingConfig, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("image_id,labels\n")
    with pytest.raises(InputError):
        load_data(config)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("d,/m/1", "d,/m/2"),  # another label
        ("c,\n", "c,/m/1\n"),  # one more
        ("e,/m/3", "e,/m/1"),  # of a held-out image
        ("f,/m/1", "g,/m/1"),  # an image less
        ("/m/9", "/m/8"),  # another class
    ],
)
def test_the_digest_tells_other_data(
    config: TrainingConfig, tmp_path: Path, old: str, new: str
) -> None:
    digest = load_data(config).digest()
    assert load_data(changed(config, out="elsewhere", epochs=3)).digest() == digest
    labels = tmp_path / "labels.csv"
    labels.write_text(labels.read_text().replace(old, new))
    assert load_data(config).digest() != digest


def test_the_digest_tells_the_sides_apart(config: TrainingConfig, tmp_path: Path) -> None:
    digest = load_data(config).digest()
    (tmp_path / "held.txt").write_text("e\nd\n")
    assert load_data(config).digest() != digest
