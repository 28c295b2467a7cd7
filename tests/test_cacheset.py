"""Caches of several networks and image sets: found, aligned, shown, or refused with both names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache import CacheSet, FeatureCache, InputError
from featcache.cli import main

IDS = {"stage_1": ["a", "b", "c"], "stage_2": ["d", "e"]}
WIDTH = {"resnet": 2, "pnasnet": 3}

Write = Callable[..., FeatureCache]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A cache of a network's features of some ids, below a folder ``caches``."""

    def write(name: str, network: str, ids: list[str], **more: Any) -> FeatureCache:
        path = tmp_path / "caches" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        d = WIDTH.get(network, 2)
        options: dict[str, Any] = {"weight": np.ones((2, d)), "provenance": {"network": network}}
        return FeatureCache.write(path, np.ones((len(ids), d)), ids, **(options | more))

    return write


@pytest.fixture
def caches(tmp_path: Path, write: Write) -> Path:
    """Two networks on two image sets; files of one network go by different names."""
    for network, (name, ids) in itertools.product(WIDTH, IDS.items()):
        file = f"{network}.h5" if name == "stage_1" else f"z{len(network)}.h5"
        write(f"{name}/{file}", network, ids)
    return tmp_path / "caches"


def refused(call: Callable[[], object], *parts: str) -> None:
    """One line that has all the parts."""
    with pytest.raises(InputError, match=re.escape(parts[0])) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def where(caches: CacheSet) -> list[tuple[str, list[str]]]:
    return [(cache.network_name, cache.ids.tolist()) for cache in caches]


# ------------------------------------------------------------------- finding


def test_networks_and_image_sets_are_found(caches: Path) -> None:
    found = CacheSet(caches)
    assert len(found) == 4
    assert found.image_sets == ["stage_1", "stage_2"]
    names = [found.network(network).caches[0].network_name for network in found.networks]
    assert names == ["pnasnet", "resnet"]
    one = found.image_set("stage_2")
    assert where(one) == [("pnasnet", ["d", "e"]), ("resnet", ["d", "e"])]
    assert one.image_sets == ["stage_2"]
    assert where(found.network("resnet")) == [("resnet", IDS["stage_1"]), ("resnet", ["d", "e"])]
    assert found["resnet", "stage_2"].path == caches / "stage_2" / "z6.h5"
    # Side by side, whatever the files are called.
    for pair in zip(found.image_set("stage_1"), found.image_set("stage_2"), strict=True):
        assert pair[0].network_id == pair[1].network_id


def test_linked_folders_are_looked_into_once(write: Write, tmp_path: Path) -> None:
    """Large caches often lie on another disk."""
    write("stage_1/resnet.h5", "resnet", ["a"])
    write("far/resnet.h5", "resnet", ["b"]).path.parent.rename(tmp_path / "far")
    folder = tmp_path / "caches"
    (folder / "a link").symlink_to(folder / "stage_1")
    (folder / "stage_2").symlink_to(tmp_path / "far")
    (folder / "stage_3").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "round").symlink_to(folder)
    (folder / "folder.h5").mkdir()
    found = CacheSet(folder)
    assert found.image_sets == ["stage_1", "stage_2"]
    assert where(found) == [("resnet", ["a"]), ("resnet", ["b"])]
    assert len(CacheSet(folder / "stage_2", recursive=False)) == 1
    refused(lambda: CacheSet(folder, recursive=False), "no .h5 file there")


def test_selections_of_one_file_are_kept_apart(write: Write) -> None:
    cache = write("s/resnet.h5", "resnet", ["a", "b", "c"])
    parts = [cache.select(["a"]), cache.select(["b", "c"])]
    found = CacheSet(
        [*parts, parts[0]], image_set=lambda part: "train" if len(part) == 1 else "validation"
    )
    assert found["resnet", "train"].ids.tolist() == ["a"]
    assert found["resnet", "validation"].ids.tolist() == ["b", "c"]
    assert len(found) == 2
    assert len(CacheSet([cache, FeatureCache(cache.path), cache.path, parts[0]])) == 2


def test_a_network_goes_by_its_id_or_the_beginning_or_its_name(caches: Path) -> None:
    found = CacheSet(caches)
    identity = found["resnet", "stage_1"].network_id
    assert identity is not None
    for name in (identity, identity[:8], "resnet"):
        assert found[name, "stage_1"].network_id == identity
        assert found.network(name).networks == [identity]


def test_a_name_goes_before_the_beginning_of_an_id(write: Write) -> None:
    ab = write("s/1.h5", "long name", ["a"], provenance={"network_id": "abc", "network": "x"})
    x = write("s/2.h5", "x", ["a"], provenance={"network_id": "012", "network": "ab"})
    found = CacheSet([ab, x])
    assert found["ab", "s"].network_id == "012"
    assert found["abc", "s"].network_id == "abc"


def test_two_networks_of_one_name_are_told_apart_by_id(write: Write) -> None:
    for seed in (1, 2):
        write(f"s/{seed}.h5", "resnet", ["a"], weight=np.full((2, 2), seed))
    found = CacheSet(write("s/other.h5", "pnasnet", ["a"]).path.parent)
    identities = [cache.network_id for cache in found if cache.network_name == "resnet"]
    assert len(set(identities)) == 2
    refused(
        lambda: found["resnet", "s"],
        "network 'resnet' may be resnet (",
        *(str(identity)[:12] for identity in identities),
    )
    assert [found[identity, "s"].network_id for identity in identities] == identities


def test_image_sets_are_named_by_their_folders(write: Write, tmp_path: Path) -> None:
    write("top.h5", "resnet", ["a"])
    write("x/one.h5", "resnet", ["b"])
    write("x/y/two.h5", "resnet", ["c"])
    assert CacheSet(tmp_path / "caches").image_sets == ["caches", "x", "x/y"]
    assert CacheSet(tmp_path / "caches" / "x").image_sets == ["x", "y"]
    assert CacheSet(tmp_path / "caches" / "x" / "y" / "two.h5").image_sets == ["y"]
    assert CacheSet(tmp_path / "caches" / "x" / ".." / "x" / "y").image_sets == ["y"]
    assert where(CacheSet(tmp_path / "caches" / "x", recursive=False)) == [("resnet", ["b"])]


def test_the_name_of_a_lone_relative_folder(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(caches / "stage_1")
    assert CacheSet(".").image_sets == ["stage_1"]
    assert CacheSet(["../stage_2", "."]).image_sets == ["stage_1", "stage_2"]


def test_image_sets_may_be_named_otherwise(write: Write, tmp_path: Path) -> None:
    for network, (name, ids) in itertools.product(WIDTH, IDS.items()):
        write(f"{name}-{network}.h5", network, ids)
    flat = tmp_path / "caches"
    refused(lambda: CacheSet(flat).image_set("caches"), "are of one network and image set")
    found = CacheSet(flat, image_set=lambda cache: cache.path.stem.split("-")[0])
    assert found.image_sets == ["stage_1", "stage_2"]
    assert found["pnasnet", "stage_2"].path.name == "stage_2-pnasnet.h5"


def test_lists_of_caches_and_places(caches: Path) -> None:
    one = caches / "stage_1" / "resnet.h5"
    part = FeatureCache(caches / "stage_2" / "z6.h5").select(["e"])
    found = CacheSet([str(one), one, part, caches / "stage_1"])  # each file once
    assert where(found) == [
        ("pnasnet", IDS["stage_1"]),
        ("resnet", IDS["stage_1"]),
        ("resnet", ["e"]),
    ]
    assert where(CacheSet(part)) == [("resnet", ["e"])]


def test_caches_without_a_network_id(write: Write) -> None:
    cache = write("s/a.h5", "", ["a"], provenance={"network_id": None})
    found = CacheSet(cache)
    assert found.networks == [None]
    assert found[None, "s"].path == cache.path
    assert "without id" in str(found)


# ------------------------------------------------------------------- faults


def test_what_is_not_there_is_said_with_what_is(caches: Path, tmp_path: Path) -> None:
    found = CacheSet(caches)
    refused(lambda: found.image_set("stage_3"), "image set 'stage_3'", "'stage_1', 'stage_2'")
    identity = str(found["resnet", "stage_1"].network_id)[:12]
    for call in (lambda: found.network("vgg"), lambda: found["vgg", "stage_1"]):
        refused(call, "no cache of network vgg", f"{caches}/stage_1/resnet.h5 ({identity})")
    part = CacheSet([caches / "stage_1", caches / "stage_2" / "z6.h5"])
    refused(
        lambda: part["pnasnet", "stage_2"],
        "network 'pnasnet' has no cache of image set 'stage_2'",
        "it has 'stage_1'",
    )
    (tmp_path / "empty").mkdir()
    refused(lambda: CacheSet(tmp_path / "empty"), f"{tmp_path}/empty: no .h5 file there")
    refused(lambda: CacheSet([]), "an empty list: no .h5 file there")
    refused(lambda: CacheSet(tmp_path / "gone.h5"), f"{tmp_path}/gone.h5: no such file")
    (caches / "stage_1" / "notes.h5").write_bytes(b"notes")
    refused(lambda: CacheSet(caches), "notes.h5: not a readable cache")


def test_unfinished_caches_are_left_out(caches: Path) -> None:
    for name in ("new.h5.partial", "new.h5.journal", "new.h5.lock"):
        (caches / "stage_1" / name).write_bytes(b"")
    assert len(CacheSet(caches)) == 4


def test_two_caches_of_a_network_and_an_image_set(caches: Path, write: Write) -> None:
    write("stage_1/again.h5", "resnet", IDS["stage_1"])
    found = CacheSet(caches)
    for call in (
        lambda: found.image_set("stage_1"),
        lambda: found.network("resnet"),
        lambda: found["resnet", "stage_1"],
    ):
        refused(call, f"{caches}/stage_1/resnet.h5 and {caches}/stage_1/again.h5 are of one")
    # What is not concerned can still be used.
    assert len(found.image_set("stage_2")) == 2
    assert found["pnasnet", "stage_1"].network_name == "pnasnet"


@pytest.mark.parametrize(
    ("ids", "difference"),
    [
        (["a", "c", "b"], "(the same in another order: number 1 is 'c' and 'b')"),
        (["a", "b", "other"], "(number 2 is 'other' and 'c')"),
        (["a", "b"], "2 images and 3"),
    ],
)
def test_other_ids_in_one_image_set(
    caches: Path, write: Write, ids: list[str], difference: str
) -> None:
    write("stage_1/resnet.h5", "resnet", ids, overwrite=True)
    found = CacheSet(caches)
    refused(
        lambda: found.image_set("stage_1"),
        f"{caches}/stage_1/resnet.h5: its images are not those of {caches}/stage_1/pnasnet.h5",
        difference,
        "write both with the same ids in one order (extract: the same --images and --ids)",
    )
    assert "other images" in str(found)
    assert len(found.network("resnet")) == 2


def test_other_classes(caches: Path, write: Write) -> None:
    write("stage_1/resnet.h5", "resnet", IDS["stage_1"], classes=["1", "0"], overwrite=True)
    found = CacheSet(caches)
    refused(
        lambda: found.image_set("stage_1"),
        f"{caches}/stage_1/resnet.h5: its classes are not those of {caches}/stage_1/pnasnet.h5",
        "(the same in another order: number 0 is '1' and '0')",
    )
    refused(lambda: found.network("resnet"), "its classes are not those of")
    # A cache that says nothing of classes contradicts none.
    bare = write("stage_2/bare.h5", "bare", IDS["stage_2"], weight=None)
    assert bare.classes.tolist() == []
    assert len(CacheSet(caches).image_set("stage_2")) == 3


# ------------------------------------------------------------------ showing


class Texts(HTMLParser):
    """Cells of a table by rows, and every tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_the_table_is_networks_by_image_sets(caches: Path, write: Write) -> None:
    write("stage_1/resnet.h5", "resnet", list("abc"), reasons=[None, "bad", None], overwrite=True)
    (caches / "stage_2" / "z7.h5").unlink()
    found = CacheSet(caches)
    title, header, *rows = str(found).splitlines()
    assert title.startswith("3 caches of 2 networks and 2 image sets")
    assert header.split() == ["network", "id", "features", "stage_1", "stage_2"]
    ids = {cache.network_name: str(cache.network_id)[:12] for cache in found}
    cells = [re.split("  +", row) for row in rows]
    assert cells == [
        ["pnasnet", ids["pnasnet"], "3", "3 x 1", "-"],
        ["resnet", ids["resnet"], "2", "3 x 1, 1 skipped", "2 x 1"],
    ]
    assert repr(found) == str(found)
    assert Texts(found._repr_html_()).rows == [header.split(), *cells]


def test_a_long_table_is_cut_and_says_so(write: Write) -> None:
    for k in range(64):
        write(f"s/{k}.h5", f"net{k:02d}", ["a"])
    found = CacheSet(write("s/last.h5", "zzz", ["a"]).path.parent)
    lines = str(found).splitlines()
    assert len(lines) == 1 + 1 + 60 + 1
    assert lines[-1] == "... and 5 more networks in .networks"
    assert "5 more networks" in found._repr_html_()


def test_names_are_shown_in_notebooks_and_never_obeyed(write: Write) -> None:
    evil = "<script>alert('&amp;')</script>"
    cache = write("s<b>/a.h5", evil, ["a"])
    for html in (cache._repr_html_(), CacheSet(cache)._repr_html_()):
        texts = Texts(html)
        assert set(texts.tags) <= {"div", "table", "thead", "tbody", "tr", "th", "td"}
        assert evil in [cell for row in texts.rows for cell in row]
    assert "s<b>" in Texts(CacheSet(cache)._repr_html_()).rows[0]


def test_a_cache_in_a_notebook(write: Write) -> None:
    cache = write("s/a.h5", "resnet", ["a", "b"], reasons=[None, "empty"])
    rows = dict(Texts(cache._repr_html_()).rows)
    assert rows == {
        "network": "resnet",
        "images": "2 images, 1 skipped",
        "features": "1 view of 2 features",
        "classes": "2 classes",
        "labels": "no labels",
    }


def test_info_of_a_folder(caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(caches)]) == 0
    assert capsys.readouterr().out == f"{CacheSet(caches)}\n"


def test_one_key_is_refused(caches: Path) -> None:
    refused(lambda: CacheSet(caches)["A"], "['A']: give network and image set", ".network(")
