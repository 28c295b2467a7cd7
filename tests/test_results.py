"""What notebooks show: tables of labels, galleries, fitted estimators; all text is escaped."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import sklearn
from PIL import Image

from heads import (
    Blend,
    DropoutLogisticCV,
    DropoutRidgeCV,
    GlobalThreshold,
    TwoDomainCV,
    fbeta_per_image,
    gallery,
    label_table,
)
from heads.markup import Markup, element, table
from heads.metrics import average_precision

EVIL = "<script>alert('x')</script>"


class Elements(HTMLParser):
    """Tags with their attributes, and the texts of cells and headings."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self._open = [], [], []
        self.feed(html)
        self.close()
        assert self._open == [], "elements that were not closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"img", "input", "meta", "br", "link"}:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in {"script", "style"}:
            self.texts.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


# ------------------------------------------------------------------- markup


def test_children_and_attributes_are_escaped_unless_they_are_markup():
    inner = element("b", EVIL)
    html = element("a", "1 < 2", inner, href='"><script>', hidden=True, title=None, class_="x")
    assert html == (
        '<a href="&quot;&gt;&lt;script&gt;" hidden class="x">1 &lt; 2'
        "<b>&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;</b></a>"
    )
    assert isinstance(html, Markup)


def test_cells_keep_what_they_sort_by():
    html = table("all", {"name": ["b", EVIL], "n": [1234, 5], "score": [0.123456, np.nan]})
    found = Elements(html)
    assert found.count("script") == 0
    assert [a["data-sort"] for tag, a in found.tags if "data-sort" in a] == [
        "1234.0",
        "0.123456",
        "5.0",
        "nan",
    ]
    assert "1,234" in found.texts
    assert EVIL in found.texts


# -------------------------------------------------------------- table of labels


def scored(n=40, K=6, seed=0):
    rng = np.random.default_rng(seed)
    Y = (rng.random((n, K)) < 0.3).astype(float)
    Y[:, -1] = 0  # a label without positives
    return Y, rng.random((n, K)), np.clip(0.4 * Y + 0.6 * rng.random((n, K)), 0, 1)


def test_contributions_add_up_to_the_mean_fbeta_of_images_with_labels():
    Y, before, after = scored()
    missed = np.r_[2, np.zeros(39, int)]
    found = label_table(Y, before, after, beta=1, missed=missed).columns
    for when, P in (("before", before), ("after", after)):
        sets = GlobalThreshold(beta=1).fit(P, Y, missed=missed).predict(P)
        values = fbeta_per_image(Y, sets, 1, missed=missed, empty=0.0)
        assert found[f"F {when}"].sum() == pytest.approx(values.mean())
        np.testing.assert_allclose(found[f"AP {when}"], average_precision(Y, P, None))
    np.testing.assert_allclose(found["F change"], found["F after"] - found["F before"])
    np.testing.assert_array_equal(found["target"], Y.sum(0))
    assert np.isnan(found["AP before"][-1])


def test_contribution_by_hand_at_given_cuts():
    Y = np.array([[1, 1], [0, 1]])
    P = np.array([[0.9, 0.2], [0.6, 0.7]])
    found = label_table(Y, P, cuts=(0.5, None)).columns
    # Image 0: one of two found, 5 / (4 * 2 + 1); image 1: one true of two predicted, 5 / (4 + 2).
    np.testing.assert_allclose(found["F before"], [5 / 9 / 2, 5 / 6 / 2])
    assert "F after" not in found


def test_unknown_entries_do_not_count():
    Y, before, after = scored()
    hidden = Y.copy()
    hidden[3, 1] = np.nan
    mask = np.isnan(hidden)
    by_nan = label_table(hidden, before, after).columns
    by_mask = label_table(Y, before, after, mask=mask).columns
    assert by_nan["target"][1] == Y[:, 1].sum() - Y[3, 1]
    for key in by_nan:
        np.testing.assert_array_equal(by_nan[key], by_mask[key])


def test_sorting_puts_missing_values_last_both_ways():
    Y, before, after = scored()
    found = label_table(Y, before, after, names=list("cbadef"), Y_source=Y[:10])
    np.testing.assert_array_equal(np.sort(found.columns["source"]), np.sort(Y[:10].sum(0)))
    down, up = found.sort("AP after"), found.sort("AP after", ascending=True)
    assert down.columns["label"][-1] == up.columns["label"][-1] == 5
    assert (np.diff(down.columns["AP after"][:-1]) <= 0).all()
    assert (np.diff(up.columns["AP after"][:-1]) >= 0).all()
    assert found.sort("name", ascending=True).columns["name"].tolist() == list("abcdef")
    with pytest.raises(ValueError, match="no column 'x'"):
        found.sort("x")


def test_table_of_labels_in_a_notebook_is_escaped():
    Y, before, after = scored()
    names = [EVIL, *"bcdef"]
    found = Elements(label_table(Y, before, after, names=names)._repr_html_())
    assert found.count("tr") == 7
    assert found.count("script") == 1  # its own
    assert EVIL in found.texts


def test_wrong_shapes_are_refused():
    Y, before, after = scored()
    with pytest.raises(ValueError, match="names has length 2"):
        label_table(Y, before, names=["a", "b"])
    with pytest.raises(ValueError, match="P_after has shape"):
        label_table(Y, before, after[:3])
    with pytest.raises(ValueError, match="Y has shape"):
        label_table(Y[:3], before)
    with pytest.raises(ValueError, match="ids has length"):
        gallery(["a"], Y, before)
    with pytest.raises(ValueError, match="names has length 1"):
        gallery(range(40), Y, before, names=["a"])


# ---------------------------------------------------------------------- gallery


def test_gallery_tells_right_from_wrong_and_unsure():
    Y = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 1, 0]])
    P = np.array([[0.99, 0, 0], [0.98, 0, 0], [0.9, 0.8, 0.2], [0, 0.45, 0.02]])
    found = gallery(list("abcd"), Y, P, names=["x", "y", "z"], count=1, beta=1)
    ((right,), (wrong,), (unsure,)) = found.pictures.values()
    assert (right.id, right.hits, right.missed, right.extra) == ("a", ["x"], [], [])
    assert (wrong.id, wrong.hits, wrong.missed, wrong.extra) == ("b", [], ["y"], ["x"])
    assert unsure.id == "d"
    assert right.score == 1
    assert wrong.score == 0


def test_gallery_shows_given_sets_and_each_image_once():
    Y, _, P = scored()
    rule = GlobalThreshold(min_labels=1).fit(P, Y)
    ids = [f"i{i}" for i in range(40)]
    found = gallery(ids, Y, P, sets=rule.predict(P), count=30)
    shown = [p for kind in found.pictures.values() for p in kind]
    assert len({p.id for p in shown}) == len(shown) == 40
    values = fbeta_per_image(Y, rule.predict(P))
    for p in shown:
        row = int(p.id[1:])
        assert p.score == values[row]
        assert sorted(map(int, p.hits + p.missed)) == np.flatnonzero(Y[row]).tolist()


def test_gallery_embeds_the_images_that_can_be_read(tmp_path):
    Y, _, P = scored(n=4)
    Image.new("RGB", (400, 300), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    ids = ["a", "b", EVIL, "../a"]
    from_folder = gallery(ids, Y, P, images=tmp_path)
    assert set(from_folder.thumbnails) == {"a"}
    assert set(gallery(ids, Y, P, images={"a": tmp_path / "a.png"}).thumbnails) == {"a"}
    html = Elements(from_folder._repr_html_())
    ((_, image),) = [item for item in html.tags if item[0] == "img"]
    assert image["src"].startswith("data:image/jpeg;base64,")
    assert image["alt"] == "image a"
    assert html.count("script") == 1
    assert EVIL in html.texts


def test_gallery_is_the_function_whichever_module_was_imported_before():
    code = "import heads.galleries, heads.labeltable; from heads import gallery, label_table; "
    code += "print(callable(gallery) and callable(label_table))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True"


def test_gallery_without_images_has_no_pictures():
    Y, _, P = scored()
    found = gallery(range(40), Y, P)
    assert found.thumbnails == {}
    assert Elements(found._repr_html_()).count("img") == 0
    assert {len(kind) for kind in found.pictures.values()} == {8}


# -------------------------------------------------------------------- estimators


def fitted():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 5))
    Y = (X[:, :3] + rng.normal(size=(60, 3)) > 0).astype(float)
    head = DropoutLogisticCV([0.1, 0.5], cv=3).fit(X, Y)
    both = TwoDomainCV(DropoutRidgeCV([0.2, 0.5], cv=3), source_weights=(0.0, 1.0))
    both.fit(X, Y, source=(X[::-1] + 0.1, Y[::-1]))
    blend = Blend().fit([head.oof_predict_proba_, both.oof_predict_proba_], Y)
    return {"Dropout rates": head, "Weight of the source": both, "models have a weight": blend}


def test_fitted_estimators_show_their_results_beside_the_diagram():
    for words, estimator in fitted().items():
        bundle = estimator._repr_mimebundle_()
        assert words in bundle["text/html"]
        assert words in estimator._repr_html_()
        assert bundle["text/html"].startswith(sklearn.clone(estimator)._repr_html_()[:20])
        fresh = sklearn.clone(estimator)
        assert words not in fresh._repr_html_()
        with sklearn.config_context(display="text"):
            assert not hasattr(estimator, "_repr_html_")
            assert "text/html" not in estimator._repr_mimebundle_()
