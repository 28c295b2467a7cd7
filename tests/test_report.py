"""The page about a blend: whole, self-contained, and deaf to what names say."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from scipy.special import expit

from featcache import FeatureCache
from heads import commands, fbeta_per_image
from heads.cli import main
from heads.commands import BlendConfig, FitConfig
from heads.cuts import apply_threshold
from heads.decisions import best_global_threshold
from heads.report import ReportConfig, report
from heads.report.contents import gather
from heads.storage import load
from tests import synthetic
from tests.reports import EVIL, NAMES, evil_blend, evil_page

VOID = {"meta", "img", "input", "br", "link"}


class Document(HTMLParser):
    """Elements in their order, each with its attributes and its text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data):
        for at in self._open:
            self.elements[at][2].append(data)

    def all(self, tag):
        return [(a, "".join(text)) for name, a, text in self.elements if name == tag]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return evil_page(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def found(path):
    return gather(str(path.parent / "blend.h5"))


@pytest.fixture(scope="module")
def html(path):
    return path.read_text("utf-8")


@pytest.fixture(scope="module")
def document(html):
    return Document(html)


def test_the_only_script_is_the_one_that_the_policy_allows(document):
    ((attributes, code),) = document.all("script")
    assert attributes == {}
    (policy,) = [a["content"] for a, _ in document.all("meta") if "http-equiv" in a]
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    for _, attributes, _ in document.elements:
        assert not [name for name in attributes if name.startswith("on")]


def test_nothing_is_loaded_from_anywhere(document):
    for _, attributes, _ in document.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/")), value
        assert "url(" not in attributes.get("style", "").replace("url(#", "")
    for _, style in document.all("style"):
        assert "url(" not in style
        assert "@import" not in style


def test_hostile_names_are_shown_as_they_are(document):
    text = "".join(t for _, t in document.all("body"))
    for name in NAMES:
        assert name in text
    assert "net0" + EVIL in text
    assert "<b>net1" in text
    ((_, title),) = document.all("title")
    assert title == f"About {EVIL}"
    ((_, heading),) = document.all("h1")
    assert heading == title


def test_ids_are_unique_and_references_lead_somewhere(document):
    ids = [a["id"] for _, a, _ in document.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes, _ in document.elements:
        for name, value in attributes.items():
            used = re.findall(r"url\(#([^)]+)\)", value or "")
            if name == "href" and value.startswith("#"):
                used.append(value[1:])
            if name == "aria-labelledby":
                used += value.split()
            assert set(used) <= set(ids)


def test_structure_for_those_who_cannot_see(document):
    ((attributes, _),) = document.all("html")
    assert attributes["lang"] == "en"
    assert len(document.all("main")) == len(document.all("nav")) == 1
    levels = [int(tag[1]) for tag, _, _ in document.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    pictures = document.all("svg")
    assert len(pictures) >= 6
    assert all(a["role"] == "img" and a["aria-label"] for a, _ in pictures)
    assert all(a["alt"] for a, _ in document.all("img"))
    assert all(a["scope"] == "col" for a, _ in document.all("th"))
    assert all(a["aria-label"] for a, _ in document.all("table"))


def test_pictures_take_their_colours_and_size_from_the_page(document):
    for attributes, _ in document.all("svg"):
        assert "width" not in attributes
        assert "viewbox" in attributes  # the parser lowers attribute names, a browser mends that
    drawn = [a for tag, a, _ in document.elements if tag in ("path", "text", "use")]
    colours = " ".join(a.get("style", "") for a in drawn)
    assert "currentColor" in colours
    assert "var(--blue)" in colours
    assert "#010203" not in colours


def test_the_picture_of_an_image_is_embedded_once(document):
    (image,) = [a for a, _ in document.all("img")]
    assert image["src"].startswith("data:image/jpeg;base64,")


def test_summary_holds_the_figures(found, document):
    tiles = [t for a, t in document.all("p") if a.get("class") == "figure"]
    values = found.score.fbeta
    assert tiles[0] == f"{values.mean():.3f}"
    assert tiles[1] == f"{found.unadapted.fbeta.mean():.3f}"
    assert tiles[2] == f"{values.mean() - found.unadapted.fbeta.mean():+.3f}"
    assert tiles[3] == "2"


def test_unadapted_is_the_mean_of_the_networks_own_last_layers(path):
    folder = path.parent / "caches"
    found = gather(str(path.parent / "blend.h5"), [str(folder)])
    assert [used.models for used in found.used] == [["<b>net0"], ["<b>net1"]] * 2
    sides = {}
    for name in ("stage_1", "validation"):
        caches = [FeatureCache(folder / name / f"net{m}.h5") for m in (0, 1)]
        margins = [cache.x("eval") @ cache.weight.T + cache.bias for cache in caches]
        sides[name] = np.mean([expit(m) for m in margins], axis=0), caches[0].labels.positives
    cut = best_global_threshold(*sides["validation"])[0]
    P, Y = sides["stage_1"]
    np.testing.assert_allclose(found.unadapted.proba, P, rtol=1e-6)
    assert found.unadapted.cut == pytest.approx(cut)
    assert found.unadapted.from_source
    np.testing.assert_allclose(found.unadapted.fbeta, fbeta_per_image(Y, apply_threshold(P, cut)))


def test_every_cache_is_told_with_its_provenance(path, document):
    summaries = [t for _, t in document.all("summary")]
    for name in ("stage_1/net0", "stage_1/net1", "validation/net1"):
        cache = path.parent / "caches" / f"{name}.h5"
        assert any(str(cache) in text for text in summaries)
    text = "".join(t for _, t in document.all("pre"))
    assert json.dumps(f"net0{EVIL}") in text
    assert "heads blend" in text


# ------------------------------------------------------------- what may be missing


def plain_head(folder, **more):
    target = folder / "target.h5"
    synthetic.write(target, synthetic.images(40, 3), shifted=True, views=2, **more)
    config = FitConfig(cache=str(target), out=str(folder / "head.h5"), dropout="0.3")
    commands.fit(config)
    return target, folder / "head.h5"


def test_a_head_alone_has_a_page_without_blend_and_images(tmp_path, capsys):
    _, head = plain_head(tmp_path)
    out = tmp_path / "page.html"
    assert main(["report", str(head), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    document = Document(out.read_text("utf-8"))
    titles = [t for _, t in document.all("h3")]
    assert "Weights in the blend" not in titles
    assert "Dropout rates" in titles
    assert document.all("img") == []


@pytest.mark.parametrize(("images", "told"), [(3, False), (10, True)])
def test_few_images_have_a_page_without_the_figure_that_needs_more(tmp_path, images, told):
    cache = tmp_path / "few.h5"
    synthetic.write(cache, synthetic.images(images, 3), shifted=True)
    head = tmp_path / "head.h5"
    commands.fit(FitConfig(cache=str(cache), out=str(head), dropout="0.3", cv=3))
    page = report(ReportConfig(content=str(head), out=str(tmp_path / "page.html")))
    text = page.read_text("utf-8")
    tiles = [t for _, t in Document(text).all("h3")]
    assert {"Without adaptation", "Labels an image"} < set(tiles)
    assert ("Mean F2 per image" in tiles, "Gain" in tiles) == (told, told)
    assert ("3 labelled images are too few to fit the decision anew" in text) is not told
    assert ("Every score is out of fold" in text) is told


def test_the_summary_tells_what_the_choice_is_worth_elsewhere(path, document, tmp_path):
    heads = [str(head) for head in path.parent.glob("<b>net*.h5")]
    commands.blend(BlendConfig(heads=heads, out=str(tmp_path / "chosen.h5"), cv=2))
    nested = load(str(tmp_path / "chosen.h5")).provenance["nested"]
    page = report(ReportConfig(content=str(tmp_path / "chosen.h5"), out=str(tmp_path / "p.html")))
    text = page.read_text("utf-8")
    assert f"{nested['score']:.4f}" in text
    assert "on images left out of the whole choice" in text
    assert "weights of the blend were chosen" not in path.read_text("utf-8")  # all weigh the same


def test_pictures_that_are_missing_are_counted(document):
    texts = [text for _, text in document.all("p") if "could not be read from --images" in text]
    assert texts
    assert "59 of 60 images" in texts[0]


def test_lost_caches_are_said_and_can_be_named(tmp_path):
    target, head = plain_head(tmp_path)
    elsewhere = tmp_path / "elsewhere" / "moved.h5"
    elsewhere.parent.mkdir()
    target.rename(elsewhere)
    lost = report(ReportConfig(content=str(head), out=str(tmp_path / "lost.html")))
    assert "pass --caches" in lost.read_text("utf-8")
    assert "not found there" in lost.read_text("utf-8")
    named = ReportConfig(
        content=str(head), out=str(tmp_path / "named.html"), caches=[str(elsewhere.parent)]
    )
    text = report(named).read_text("utf-8")
    assert "Without adaptation" in text
    assert "pass --caches" not in text
    assert not gather(str(head), [str(elsewhere)]).unadapted.from_source


def test_unknown_labels_and_labels_outside(tmp_path):
    _, head = plain_head(tmp_path, classes=[f"c{k}" for k in range(synthetic.K)])
    found = gather(str(head))
    found.oof.missed[:] = 1
    assert found.unadapted is not None
    page = report(ReportConfig(content=str(head), out=str(tmp_path / "a.html"), title="T"))
    assert "<title>T</title>" in page.read_text("utf-8")


def test_wrong_use_is_one_line(tmp_path, capsys):
    _, head = plain_head(tmp_path)
    out = tmp_path / "page.html"
    out.write_text("mine")
    assert main(["report", str(head), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    other = str(tmp_path / "other.html")
    assert main(["report", str(tmp_path / "none.h5"), "--out", other]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main(["report", str(head), "--out", other, "--images", str(tmp_path / "no")]) == 2
    assert "no such directory" in capsys.readouterr().err
    (tmp_path / "others").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "others" / "another.png")
    assert main(["report", str(head), "--out", other, "--images", str(tmp_path / "others")]) == 2
    assert "others: holds none of the labelled images, such as" in capsys.readouterr().err
    assert not (tmp_path / "other.html").exists()
    assert main(["report", str(head), "--out", other, "--count", "-1"]) == 2
    assert "--count -1" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(tmp_path, capsys, monkeypatch):
    _, head = plain_head(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["report", str(head), "--out", str(tmp_path / "x.html")]) == 2
    assert "featcache-heads[report]" in capsys.readouterr().err


def test_the_same_blend_gives_the_same_page(tmp_path):
    blend = evil_blend(tmp_path)
    pages = [
        report(ReportConfig(content=str(blend), out=str(tmp_path / name))).read_bytes()
        for name in ("a.html", "b.html")
    ]
    assert pages[0] == pages[1]
