"""Label files: every format, their precedence, and the faults that must be named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from featcache.annotations import (
    Labels,
    read_classes,
    read_descriptions,
    read_labels,
    read_submission,
    write_labels,
)
from featcache.errors import InputError

TABLE = "ImageID,Source,LabelName,Confidence\n"
BOXES = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax\n"
SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=50)


@pytest.fixture
def write(tmp_path):
    """Write a file and return its path."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def as_dict(labels: Labels, matrix: csr_matrix | None = None) -> dict[str, dict[str, float]]:
    """{image: {class: confidence}}, whatever the order of rows and columns."""
    matrix = labels.positives if matrix is None else matrix
    out: dict[str, dict[str, float]] = {name: {} for name in labels.ids.tolist()}
    coo = matrix.tocoo()
    for row, col, value in zip(coo.row, coo.col, coo.data, strict=True):
        out[str(labels.ids[row])][str(labels.classes[col])] = round(float(value), 6)
    return out


# ------------------------------------------------------------------- formats


def test_plain_lists(write):
    path = write("labels.csv", "image_id,labels\nb,/m/2 /m/1\na,\nc,/m/1\n")
    labels = read_labels([path])
    assert labels.ids.tolist() == ["b", "a", "c"]
    assert labels.classes.tolist() == ["/m/1", "/m/2"]
    assert as_dict(labels) == {"b": {"/m/1": 1, "/m/2": 1}, "a": {}, "c": {"/m/1": 1}}
    assert labels.negatives is None
    assert labels.known.tolist() == [True] * 3
    assert labels.outside.tolist() == [0] * 3
    assert labels.positives.dtype == np.float32
    assert labels.outside.dtype == np.int32


def test_lists_without_a_header(write):
    path = write("tuning_labels.csv", "2b,/m/a /m/b\n1a,/m/a\n")
    assert as_dict(read_labels(path)) == {"2b": {"/m/a": 1, "/m/b": 1}, "1a": {"/m/a": 1}}


def test_table_with_soft_and_refuted_labels(write):
    path = write("human.csv", TABLE + "i,verification,/m/a,1\ni,machine,/m/b,0.7\nj,x,/m/a,0\n")
    labels = read_labels([path], unlisted="unknown")
    assert as_dict(labels) == {"i": {"/m/a": 1, "/m/b": 0.7}, "j": {}}
    assert as_dict(labels, labels.negatives) == {"i": {}, "j": {"/m/a": 1}}
    assert labels.unlisted == "unknown"


def test_columns_of_a_table_are_found_by_name(write):
    path = write("t.csv", "Confidence,LabelName,IsSure,ImageID\n0.5,/m/a,yes,i\n")
    assert as_dict(read_labels(path)) == {"i": {"/m/a": 0.5}}


def test_boxes_are_positive_labels(write):
    path = write(
        "boxes.csv", BOXES + "i,x,/m/a,1,0,1,0,1\ni,x,/m/a,1,.2,.4,0,1\ni,x,/m/b,1,0,1,0,1"
    )
    assert as_dict(read_labels(path)) == {"i": {"/m/a": 1, "/m/b": 1}}


def test_classes_that_are_only_refuted_are_no_columns(write):
    path = write("t.csv", TABLE + "i,x,/m/a,1\ni,x,/m/b,0\n")
    labels = read_labels(path)
    assert labels.classes.tolist() == ["/m/a"]
    assert labels.negatives is None


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_quotes_line_endings_and_byte_order_mark(write, ending, mark):
    lines = ["image_id,labels", '"a, b",/m/1 /m/2', '"say ""c""","/m/1"', ""]
    labels = read_labels(write("labels.csv", mark + ending.join(lines)))
    assert as_dict(labels) == {"a, b": {"/m/1": 1, "/m/2": 1}, 'say "c"': {"/m/1": 1}}


def test_class_lists_and_descriptions(write):
    classes = write("classes.csv", "label_code\n/m/b\n/m/a\n")
    names = write("names.csv", 'label_code,description\n/m/a,Apple\n/m/c,"Cat, big"\n')
    assert read_classes(classes).tolist() == ["/m/b", "/m/a"]
    assert read_classes(names).tolist() == ["/m/a", "/m/c"]
    assert read_descriptions(names) == {"/m/a": "Apple", "/m/c": "Cat, big"}
    labels = read_labels(write("l.csv", "image_id,labels\ni,/m/a\n"), classes, names)
    assert labels.classes.tolist() == ["/m/b", "/m/a"]
    assert labels.names is not None
    assert labels.names.tolist() == ["/m/b", "Apple"]


# ---------------------------------------------------------------- precedence


def test_earlier_files_go_before_later_ones(write):
    human = write("human.csv", TABLE + "i,h,/m/a,0\ni,h,/m/b,1\n")
    machine = write(
        "machine.csv", TABLE + "i,m,/m/a,0.9\ni,m,/m/b,0.6\ni,m,/m/c,0.8\nj,m,/m/a,0.5\n"
    )
    boxes = write("boxes.csv", BOXES + "j,x,/m/a,1,0,1,0,1\nk,x,/m/a,1,0,1,0,1\n")
    labels = read_labels([human, machine, boxes])
    assert labels.ids.tolist() == ["i", "j", "k"]
    assert as_dict(labels) == {"i": {"/m/b": 1, "/m/c": 0.8}, "j": {"/m/a": 0.5}, "k": {"/m/a": 1}}
    assert as_dict(labels, labels.negatives) == {"i": {"/m/a": 1}, "j": {}, "k": {}}
    turned = read_labels([machine, human])
    assert as_dict(turned)["i"] == {"/m/a": 0.9, "/m/b": 0.6, "/m/c": 0.8}


def test_true_labels_outside_the_class_list_are_counted_once(write):
    classes = write("classes.csv", "label_code\n/m/a\n")
    human = write("human.csv", TABLE + "i,h,/m/a,1\ni,h,/m/x,1\ni,h,/m/y,0\nj,h,/m/y,0\n")
    machine = write("machine.csv", TABLE + "i,m,/m/x,0.5\ni,m,/m/z,0.5\nj,m,/m/y,0.9\n")
    labels = read_labels([human, machine], classes)
    assert as_dict(labels) == {"i": {"/m/a": 1}, "j": {}}
    # x and z of i; y was refuted by the file that goes first.
    assert labels.outside.tolist() == [2, 0]


entries = st.lists(
    st.tuples(st.sampled_from("ijk"), st.sampled_from("abcd"), st.sampled_from([0.0, 0.5, 1.0])),
    min_size=1,
    max_size=12,
)


@SETTINGS
@given(files=st.lists(entries, min_size=1, max_size=3), listed=st.sets(st.sampled_from("abcd")))
def test_merging_equals_a_dictionary(tmp_path_factory, files, listed):
    folder = tmp_path_factory.mktemp("merge")
    expected: dict[tuple[str, str], float] = {}
    for number, rows in enumerate(files):
        text = TABLE + "".join(f"{image},s,{label},{value}\n" for image, label, value in rows)
        (folder / f"{number}.csv").write_text(text)
        best: dict[tuple[str, str], float] = {}
        for image, label, value in rows:
            best[image, label] = max(value, best.get((image, label), 0.0))
        expected = best | expected
    listed = listed or {"a"}
    (folder / "classes.csv").write_text("\n".join(["label_code", *sorted(listed)]))
    labels = read_labels([folder / f"{k}.csv" for k in range(len(files))], folder / "classes.csv")
    images = {image for rows in files for image, _, _ in rows}
    assert set(labels.ids.tolist()) == images
    got = as_dict(labels)
    refuted = as_dict(labels, labels.negatives) if labels.negatives is not None else {}
    for row, image in enumerate(labels.ids.tolist()):
        mine = {label: v for (i, label), v in expected.items() if i == image}
        assert got[image] == {c: v for c, v in mine.items() if v and c in listed}
        assert set(refuted.get(image, {})) == {c for c, v in mine.items() if not v and c in listed}
        assert labels.outside[row] == sum(v > 0 for c, v in mine.items() if c not in listed)


# -------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "empty"),
        ("image_id,labels\n", "no rows"),
        (TABLE, "no rows"),
        ("image,labels\nx,/m/a\n", "line 1: expected 'image_id,labels'"),
        ("ImageID,Source,LabelName\ni,h,/m/a\n", "line 1: expected one column Confidence"),
        ("LabelName,Confidence\n/m/a,1\n", "line 1: expected one column ImageID"),
        (TABLE + "i,h,/m/a,1\ni,h,/m/a\n", "line 3: expected 4 fields, got 3"),
        (TABLE + "i,h,/m/a,1.5\n", "line 2: expected a Confidence in [0, 1], got '1.5'"),
        (TABLE + "i,h,/m/a,-0.1\n", "line 2: expected a Confidence"),
        (TABLE + "i,h,/m/a,nan\n", "line 2: expected a Confidence"),
        (TABLE + "i,h,/m/a,high\n", "line 2: expected a Confidence in [0, 1], got 'high'"),
        (TABLE + "i,h,/m/a,\n", "line 2: expected a Confidence"),
        (TABLE + ",h,/m/a,1\n", "line 2: expected an image id, got an empty field"),
        (TABLE + "i,h,,1\n", "line 2: expected a class id, got an empty field"),
        (TABLE + "i,h,golf ball,1\n", "line 2: expected a class id without spaces"),
        (TABLE + " i,h,/m/a,1\n", "line 2: expected an image id"),
        (TABLE + f"{'i' * 300},h,/m/a,1\n", "line 2: expected an image id of at most 255"),
        (BOXES + "i,h,/m/a,0,0,1,0,1\n", "line 2: expected a Confidence above 0"),
        ("image_id,labels\ni,/m/a\nj,/m/a,/m/b\n", "line 3: expected 2 fields"),
        ("image_id,labels\ni,/m/a\n\nj,\ni,/m/b\n", "line 5: expected each image once, got i"),
        ("i,/m/a\ni,/m/b\n", "line 2: expected each image once, got i"),
        ("label_code\n/m/a\n", "line 1: expected labels of images, got a list of classes"),
        (b"image_id,labels\ni,/m/a\n\xff,/m/a\n", "line 3: expected UTF-8"),
        ('image_id,labels\ni,/m/a\n"j"x,/m/a\n', "line 3: expected comma-separated fields"),
        ('image_id,labels\ni,"/m/a\nj,/m/a\n', "expected comma-separated fields"),
        ('image_id,labels\n"i\nj",/m/a,3\n', "line 3: expected 2 fields"),
    ],
)
def test_a_wrong_label_file_is_refused(write, content, expected):
    path = write("labels.csv", content)
    with pytest.raises(InputError) as error:
        read_labels([path])
    message = str(error.value)
    assert message.startswith(str(path))
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "empty"),
        ("label_code\n", "no rows"),
        ("/m/a\n/m/b\n", "line 1: expected 'label_code,description' or 'label_code'"),
        ("label_code\n/m/a\n/m/b\n/m/a\n", "line 4: expected each class once, got /m/a"),
        ("label_code\n/m/a,Apple\n", "line 2: expected 1 fields, got 2"),
        ("label_code\ngolf ball\n", "line 2: expected a class id without spaces"),
    ],
)
def test_a_wrong_class_list_is_refused(write, content, expected):
    path = write("classes.csv", content)
    with pytest.raises(InputError, match=r"classes\.csv") as error:
        read_classes(path)
    assert expected in str(error.value)


def test_descriptions_need_their_column(write):
    path = write("classes.csv", "label_code\n/m/a\n")
    with pytest.raises(InputError, match="line 1: expected 'label_code,description', got"):
        read_descriptions(path)


def test_paths_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.csv: no such file"):
        read_labels([tmp_path / "nowhere.csv"])
    with pytest.raises(InputError, match="cannot be read"):
        read_labels([tmp_path])
    with pytest.raises(InputError, match="no label file"):
        read_labels([])


@pytest.mark.parametrize("content", ["image_id,labels\ni,/m/a\n{}\n", "h,/m/a\ni,/m/a\n{}\n"])
@pytest.mark.parametrize("row", ['j,"/m/a, /m/b"', "j,/m/a; /m/b", 'j,"/m/b , /m/a"'])
def test_class_ids_separated_by_more_than_spaces_are_refused(write, content, row):
    """The comma would become part of a class id, which no list of classes has."""
    path = write("labels.csv", content.format(row))
    sign = ";" if ";" in row else ","
    expected = rf"labels\.csv, line 3: .* spaces alone, got '\S*{sign}'; take the '{sign}' away"
    with pytest.raises(InputError, match=expected):
        read_labels([path])
    with pytest.raises(InputError, match=expected):
        read_labels([path], write("classes.csv", "label_code\n/m/a\n/m/b\n"))


def test_a_class_id_may_end_in_a_comma_where_the_list_of_classes_has_it(write):
    path = write("labels.csv", 'image_id,labels\ni,"yes, no"\n')
    labels = read_labels([path], write("classes.csv", 'label_code\n"yes,"\nno\n'))
    assert as_dict(labels) == {"i": {"yes,": 1, "no": 1}}
    table = write("table.csv", TABLE + 'i,h,"yes,",1\n')  # a field of its own: nothing to mistake
    assert as_dict(read_labels([table])) == {"i": {"yes,": 1}}


def test_a_fault_in_any_file_names_that_file(write):
    good = write("good.csv", "image_id,labels\ni,/m/a\n")
    bad = write("bad.csv", TABLE + "i,h,/m/a,2\n")
    with pytest.raises(InputError, match=r"bad\.csv, line 2"):
        read_labels([good, bad])


# ------------------------------------------------------- submissions, writing


def test_submission_is_read_and_other_formats_are_refused(write):
    path = write("submission.csv", "image_id,labels\nb,\na,/m/2 /m/1\n")
    labels = read_submission(path)
    assert labels.ids.tolist() == ["b", "a"]
    assert as_dict(labels) == {"b": {}, "a": {"/m/1": 1, "/m/2": 1}}
    for name, content in [("tuning.csv", "b,/m/a\n"), ("table.csv", TABLE + "i,h,/m/a,1\n")]:
        with pytest.raises(InputError, match="line 1: expected the header 'image_id,labels'"):
            read_submission(write(name, content))


def test_an_empty_submission_has_rows_but_no_classes(write):
    labels = read_submission(write("s.csv", "image_id,labels\na,\nb,\n"))
    assert labels.positives.shape == (2, 0)


ids_and_sets = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8),
    st.lists(st.text("/mabc,\"'é", min_size=1, max_size=5), max_size=4, unique=True),
    min_size=1,
    max_size=6,
)


@SETTINGS
@given(content=ids_and_sets)
def test_what_is_written_is_read_back(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("round") / "s.csv"
    write_labels(path, list(content), list(content.values()))
    labels = read_submission(path)
    assert labels.ids.tolist() == list(content)
    assert {image: set(found) for image, found in as_dict(labels).items()} == {
        image: set(labels) for image, labels in content.items()
    }


def test_written_bytes(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("old")
    write_labels(path, np.array(["b", "a"]), [["/m/2", "/m/1"], []])
    assert path.read_bytes() == b"image_id,labels\nb,/m/2 /m/1\na,\n"
    assert os.listdir(tmp_path) == ["s.csv"]


@pytest.mark.parametrize(
    ("ids", "sets", "expected"),
    [
        (["a", "a"], [[], []], "image id 'a' is given twice"),
        (["a"], [["golf ball"]], "class id without spaces"),
        (["a"], [[""]], "class id, got an empty field"),
        (["a", "b"], [[]], "2 ids but 1 label sets"),
        (["a\nb"], [[]], "expected an image id"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, ids, sets, expected):
    path = tmp_path / "s.csv"
    path.write_text("old")
    with pytest.raises(InputError, match=expected):
        write_labels(path, ids, sets)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["s.csv"]


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s.csv"
    path.write_text("old")

    def broken(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(InputError, match="No space left"):
        write_labels(path, ["a"], [["/m/1"]])
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["s.csv"]


# ------------------------------------------------------------------ the value


def example() -> Labels:
    return Labels(
        ids=["i", "j", "k"],
        classes=["a", "b", "c"],
        positives=csr_matrix(np.array([[1, 0.5, 0], [0, 0, 1], [0, 0, 0]])),
        negatives=csr_matrix(np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]])),
        names=["A", "B", "C"],
        outside=np.array([0, 2, 1]),
    )


def test_select_orders_rows_and_marks_strangers():
    labels = example().select(["k", "z", "i"])
    assert labels.ids.tolist() == ["k", "z", "i"]
    assert labels.known.tolist() == [True, False, True]
    assert labels.outside.tolist() == [1, 0, 0]
    assert labels.positives.toarray().tolist() == [[0, 0, 0], [0, 0, 0], [1, 0.5, 0]]
    assert labels.negatives is not None
    assert labels.negatives.toarray().tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 1]]
    again = labels.select(["z", "k"])
    assert again.known.tolist() == [False, True]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("positives", csr_matrix(np.array([[0.5], [0], [1], [0]]))),
        ("negatives", csr_matrix(np.array([[1], [0], [0], [0]]))),
        ("known", np.array([True, True, False, True])),
        ("outside", np.array([0, 0, 3, 0])),
    ],
)
def test_select_refuses_two_answers(part, value):
    """Which one is right, nobody knows."""
    same = {
        "positives": csr_matrix((4, 1)),
        "negatives": csr_matrix((4, 1)),
        "known": np.ones(4, bool),
        "outside": np.zeros(4),
    }
    ids = ["a", "b", "a", "b"]
    assert Labels(ids, ["k"], **same).select(["b", "a"]).ids.tolist() == ["b", "a"]
    labels = Labels(ids, ["k"], **same | {part: value})
    assert labels.select(["b", "z"]).ids.tolist() == ["b", "z"]
    with pytest.raises(InputError, match="image a has several rows that differ; keep one"):
        labels.select(["b", "a"])


def test_select_of_nothing():
    labels = example().select([])
    assert labels.positives.shape == (0, 3)
    assert len(labels.known) == 0


def test_restrict_reorders_drops_and_adds_classes():
    labels = example().restrict(["c", "z", "a"])
    assert labels.classes.tolist() == ["c", "z", "a"]
    assert labels.names is not None
    assert labels.names.tolist() == ["C", "z", "A"]
    assert labels.positives.toarray().tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert labels.positives.has_sorted_indices
    assert labels.negatives is not None
    assert labels.negatives.toarray().tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert labels.outside.tolist() == [1, 2, 1]
    assert labels.outside.dtype == np.int32


def test_true_labels_are_never_lost_by_restricting():
    labels = example()
    for classes in ([], ["b"], ["x"], ["b", "a", "c"]):
        kept = labels.restrict(classes)
        total = np.diff(kept.positives.indptr) + kept.outside
        assert total.tolist() == (np.diff(labels.positives.indptr) + labels.outside).tolist()


def test_a_matrix_with_repeated_entries_is_added_up():
    parts = csr_matrix((np.array([0.25, 0.5]), np.array([0, 0]), np.array([0, 2])), shape=(1, 1))
    assert Labels(["i"], ["a"], parts).positives.toarray().tolist() == [[0.75]]
    assert parts.nnz == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ids": ["i"]}, "positives has shape"),
        ({"classes": ["a", "b", "a"]}, "class a is listed twice"),
        ({"positives": csr_matrix(np.full((3, 3), 2.0))}, "confidence 2.0"),
        ({"positives": csr_matrix(np.full((3, 3), -1.0))}, "confidence -1.0"),
        ({"positives": csr_matrix(np.eye(3) * np.nan)}, "confidence nan"),
        ({"negatives": csr_matrix(np.eye(3))}, "a of image i is both positive and negative"),
        ({"negatives": csr_matrix((2, 3))}, "negatives has shape"),
        ({"known": np.ones(2, bool)}, "known has shape"),
        ({"outside": np.array([0, 0, -1])}, "outside has -1"),
        ({"names": ["A"]}, "names has shape"),
        ({"unlisted": "maybe"}, "unlisted is 'maybe'"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change, expected):
    labels = example()
    fields = {name: getattr(labels, name) for name in Labels.__dataclass_fields__}
    with pytest.raises(InputError, match=expected):
        Labels(**(fields | change))


def test_memory_of_repeated_entries_stays_small(write):
    """A million entries of few pairs merge into those pairs."""
    rows = "".join(f"i{k % 100},m,/m/{k % 7},0.5\n" for k in range(1400))
    labels = read_labels([write("a.csv", TABLE + rows), write("b.csv", TABLE + rows)])
    assert labels.positives.nnz == 700
