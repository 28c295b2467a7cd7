"""Labels that were kept are those that would be read, and never those of another file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache import InputError, labelcache
from featcache.annotations import Labels, read_labels
from featcache.datasets import load_data
from featcache.entries import Entries
from featcache.labelcache import default_folder, read_labels_cached
from featcache.settings import TrainingConfig

HEADER = "ImageID,Source,LabelName,Confidence\n"
HUMAN = HEADER + "a,v,/m/1,1\na,v,/m/2,0\nü,v,/m/3,1\n"
MACHINE = HEADER + "a,m,/m/2,0.9\na,m,/m/4,0.6\nb,m,/m/1,0.5\nb,m,/m/1,0.7\nb,m,/m/2,0.8\n"
BOXES = "ImageID,Source,LabelName,Confidence,XMin\nb,x,/m/5,1,0.5\na,x,/m/1,1,0.2\n"
LISTS = "image_id,labels\nempty,\nb,/m/1 /m/9\n"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """All formats; even the smallest is kept."""
    monkeypatch.setattr(labelcache, "LEAST_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    texts = {"human": HUMAN, "machine": MACHINE, "boxes": BOXES, "lists": LISTS}
    for name, text in texts.items():
        (tmp_path / f"{name}.csv").write_text(text, encoding="utf-8")
    return [tmp_path / f"{name}.csv" for name in texts]


def assert_same(labels: Labels, expected: Labels) -> None:
    assert labels.ids.tolist() == expected.ids.tolist()
    assert labels.classes.tolist() == expected.classes.tolist()
    assert labels.unlisted == expected.unlisted
    np.testing.assert_array_equal(labels.outside, expected.outside)
    np.testing.assert_array_equal(labels.positives.toarray(), expected.positives.toarray())
    assert labels.positives.dtype == expected.positives.dtype
    assert (labels.negatives is None) == (expected.negatives is None)
    if labels.negatives is not None and expected.negatives is not None:
        np.testing.assert_array_equal(labels.negatives.toarray(), expected.negatives.toarray())


def read_again(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> Labels:
    """Labels that must come out of what is kept."""
    with monkeypatch.context() as patch:
        patch.setattr(Entries, "read", lambda paths: pytest.fail("a file was parsed again"))
        return read_labels_cached(*arguments, **options)


def test_the_second_reading_is_the_first(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kept"
    expected = read_labels(files)
    assert_same(read_labels_cached(files, folder=folder), expected)
    assert_same(read_again(monkeypatch, files, folder=folder), expected)
    assert len(list(folder.iterdir())) == 1


def test_human_before_machine_before_boxes(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_labels_cached(files[:3], folder=tmp_path)
    labels = read_again(monkeypatch, files[:3], folder=tmp_path, unlisted="unknown")
    table = labels.positives.toarray()
    found = {
        (i, k): round(float(table[row, column]), 3)
        for row, i in enumerate(labels.ids)
        for column, k in enumerate(labels.classes)
        if table[row, column]
    }
    assert found == {
        ("a", "/m/1"): 1.0, ("a", "/m/4"): 0.6, ("ü", "/m/3"): 1.0, ("b", "/m/1"): 0.7,
        ("b", "/m/5"): 1.0, ("b", "/m/2"): 0.8,
    }  # fmt: skip
    assert labels.negatives is not None
    row, column = labels.negatives.nonzero()
    assert (labels.ids[row].tolist(), labels.classes[column].tolist()) == (["a"], ["/m/2"])


def test_any_class_list_goes_with_what_is_kept(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_labels_cached(files, folder=tmp_path)
    (tmp_path / "classes.csv").write_text("label_code,description\n/m/5,five\n/m/1,one\n")
    classes = tmp_path / "classes.csv"
    labels = read_again(monkeypatch, files, classes=classes, descriptions=classes, folder=tmp_path)
    assert_same(labels, read_labels(files, classes=classes))
    assert labels.names is not None
    assert labels.names.tolist() == ["five", "one"]


@pytest.mark.parametrize("change", ["bytes", "order", "fewer"])
def test_other_files_are_read(files: list[Path], tmp_path: Path, change: str) -> None:
    read_labels_cached(files, folder=tmp_path / "kept")
    if change == "bytes":  # of the same length and age
        before = files[1].stat()
        files[1].write_text(MACHINE.replace("0.6", "0.8"))
        os.utime(files[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    other = {"bytes": files, "order": files[::-1], "fewer": files[:3]}[change]
    assert_same(read_labels_cached(other, folder=tmp_path / "kept"), read_labels(other))
    assert len(list((tmp_path / "kept").iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped", "lacking"])
def test_what_is_damaged_is_made_again(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    folder = tmp_path / "kept"
    expected = read_labels_cached(files, folder=folder)
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    if damage == "lacking":
        with open(kept, "wb") as file:
            np.savez(file, ids=np.zeros(1, np.uint8))
    else:
        kept.write_bytes(
            {"cut": whole[:-30], "empty": b"", "text": b"no", "flipped": bytes(flipped)}[damage]
        )
    assert_same(read_labels_cached(files, folder=folder), expected)
    assert kept.read_bytes() == whole
    assert_same(read_again(monkeypatch, files, folder=folder), expected)


def test_a_folder_that_cannot_be_written_is_said_and_no_error(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    labels = read_labels_cached(files, folder=tmp_path / "file" / "kept")
    assert_same(labels, read_labels(files))
    (line,) = capsys.readouterr().out.splitlines()
    assert "labels cannot be kept" in line


def test_faults_of_the_files_are_told_as_ever(files: list[Path], tmp_path: Path) -> None:
    files[1].write_text(MACHINE.replace("0.6", "many"))
    for paths in (files, [tmp_path / "absent.csv"]):
        with pytest.raises(InputError) as plain:
            read_labels(paths)
        with pytest.raises(InputError) as cached:
            read_labels_cached(paths, folder=tmp_path / "kept")
        assert str(cached.value) == str(plain.value)
    assert not (tmp_path / "kept").exists()


def test_a_comma_after_a_class_id_is_told_with_its_line_every_time(
    files: list[Path], tmp_path: Path
) -> None:
    files[0].write_text('image_id,labels\na,"/m/1, /m/2"\n')
    for _ in range(2):
        with pytest.raises(InputError, match=r", line 2: .* spaces alone, got '/m/1,'"):
            read_labels_cached(files, folder=tmp_path / "kept")


def test_small_files_leave_nothing(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelcache, "LEAST_BYTES", 10**6)
    read_labels_cached(files)
    assert not default_folder().exists()


def test_training_keeps_them_where_it_is_told(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        (tmp_path / "images" / f"{name}.png").write_bytes(b"")
    options = {
        "images": str(tmp_path / "images"), "labels": [str(f) for f in files], "arch": "resnet18",
        "out": str(tmp_path / "run"), "validation": "1",
    }  # fmt: skip
    load_data(TrainingConfig(**options))
    assert len(list(default_folder().iterdir())) == 1
    load_data(TrainingConfig(**options | {"label_cache": str(tmp_path / "elsewhere")}))
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from("abcdé"),
            st.sampled_from(["/m/1", "/m/2", "/m/3"]),
            st.sampled_from([0.0, 0.5, 0.7, 1.0]),
        ),
        min_size=1,
        max_size=20,
    ),
    distinct=st.booleans(),
)
def test_packing_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, float]], distinct: bool
) -> None:
    root = tmp_path_factory.mktemp("packed")
    text = "".join(f"{i},s,{k},{c}\n" for i, k, c in rows)
    if distinct:  # more different confidences than a byte counts
        text += "".join(f"x{k},s,/m/1,{(k + 1) / 1000}\n" for k in range(300))
    (root / "l.csv").write_text(HEADER + text, encoding="utf-8")
    entries = Entries.read([root / "l.csv"])
    with open(root / "l.npz", "wb") as file:
        arrays: dict[str, Any] = {**entries.pack()}
        np.savez(file, **arrays)
    again = Entries.unpack(root / "l.npz")
    assert again is not None
    assert dict(again.ids) == dict(entries.ids)
    assert dict(again.classes) == dict(entries.classes)
    np.testing.assert_array_equal(again.keys, entries.keys)
    np.testing.assert_array_equal(again.confidences, entries.confidences)
    assert again.confidences.dtype == np.float32
