"""The kanji data: what the files promise to hold."""

import csv
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from examples.kanji import augment, small_resnet
from examples.kanji.build import read_components, sheet, split
from examples.kanji.dataset import (
    DATA,
    FONTS,
    ORACLE_FONTS,
    PARTS,
    SIDE,
    SOURCE_FONTS,
    TARGET_FONTS,
    in_font,
    read_kanji,
    read_sheet,
    trainable_classes,
    unpack,
)
from featcache.annotations import read_classes, read_descriptions, read_labels
from featcache.images import find_images, read_ids


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """Source typefaces and one target typeface."""
    return unpack(tmp_path_factory.mktemp("kanji"), ["gyosho"], progress=lambda line: None)


def test_no_character_is_in_two_parts():
    kanji = read_kanji()
    characters = [k.character for k in kanji]
    assert len(set(characters)) == len(characters)
    assert Counter(k.part for k in kanji) == PARTS


def test_the_files_stay_small_and_carry_their_licences():
    assert sum(path.stat().st_size for path in DATA.iterdir()) <= 8_000_000
    licences = (DATA / "LICENSES.md").read_text("utf-8")
    for font in FONTS:
        assert f"{font}.webp" in licences
    assert "CC BY-SA 3.0" in licences


@pytest.mark.parametrize("font", FONTS)
def test_a_sheet_holds_its_characters_and_no_empty_glyph(font):
    glyphs = read_sheet(font)
    n = sum(in_font(k, font) for k in read_kanji())
    assert n <= len(glyphs) < n + 80
    assert glyphs.shape[1:] == (SIDE, SIDE)
    ink = (glyphs[:n] < 128).mean((1, 2))
    assert ink.min() > 0.005
    assert (glyphs[n:] == 255).all()


def test_typefaces_of_one_character_look_alike_more_than_two_characters_do():
    """A slip of one glyph between kanji.csv and the sheets would undo this."""
    kanji = read_kanji()
    common = [i for i, k in enumerate(kanji) if k.part == "train"][:300]
    gothic, mincho = (255.0 - read_sheet(f)[common] for f in ("gothic", "mincho"))
    left, right = (
        g.reshape(300, -1) - g.reshape(300, -1).mean(1, keepdims=True) for g in (gothic, mincho)
    )
    left /= np.linalg.norm(left, axis=1, keepdims=True)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    nearest = (left @ right.T).argmax(1)
    assert (nearest == np.arange(300)).mean() > 0.8


def test_every_typeface_holds_the_parts_that_it_is_used_for():
    kanji = read_kanji()
    for font in FONTS:
        parts = {k.part for k in kanji if in_font(k, font)}
        if font in SOURCE_FONTS:
            assert parts == {"train", "validation"}
        else:
            expected = set(PARTS) if font in ORACLE_FONTS else set(PARTS) - {"train", "validation"}
            assert parts == expected
    assert set(ORACLE_FONTS) < set(TARGET_FONTS)


def test_targets_shift_between_the_common_and_the_rare_characters():
    """Some labels are more than twice as frequent in Stage 1 as in training, or the reverse."""
    kanji = read_kanji()
    frequency = {}
    for part in ("train", "stage_1_labelled"):
        members = [k for k in kanji if k.part == part]
        counts = Counter(label for k in members for label in k.labels)
        frequency[part] = {label: count / len(members) for label, count in counts.items()}
    frequent = [label for label, f in frequency["train"].items() if f > 0.01]
    ratio = np.array(
        [frequency["stage_1_labelled"].get(c, 0.0) / frequency["train"][c] for c in frequent]
    )
    assert np.mean((ratio > 2) | (ratio < 0.5)) > 0.05


def test_unpacked_files_are_those_of_the_challenge(unpacked):
    train = find_images(unpacked / "train")
    assert len(train) == 6 * 3300
    assert {len(i) for i in train.ids} == {16}
    labels = read_labels(
        [unpacked / "train_human_labels.csv"], classes=unpacked / "classes-trainable.csv"
    )
    assert set(labels.ids) == set(train.ids)
    assert set(read_ids(unpacked / "validation_ids.txt")) < set(train.ids)
    assert set(read_classes(unpacked / "classes-trainable.csv")) < set(
        read_descriptions(unpacked / "class-descriptions.csv")
    )
    stage_1 = find_images(unpacked / "gyosho" / "stage_1")
    assert {len(i) for i in stage_1.ids} == {24}
    tuning = read_labels([unpacked / "gyosho" / "tuning_labels.csv"])
    solution = read_labels([unpacked / "gyosho" / "stage_1_solution.csv"])
    assert len(tuning.ids) == 1000
    assert len(solution.ids) == 950
    assert set(tuning.ids) | set(solution.ids) == set(stage_1.ids)
    assert not set(tuning.ids) & set(solution.ids)


def test_trainable_classes_have_training_images_and_others_count_as_outside(unpacked):
    kanji = read_kanji()
    counts = Counter(label for k in kanji if k.part == "train" for label in k.labels)
    trainable = trainable_classes(kanji)
    assert all(counts[c] >= 3 for c in trainable)
    solution = read_labels(
        [unpacked / "gyosho" / "stage_1_solution.csv"], classes=unpacked / "classes-trainable.csv"
    )
    rest = [k for k in kanji if k.part == "stage_1_rest"]
    assert solution.outside.sum() == sum(c not in set(trainable) for k in rest for c in k.labels)
    assert solution.outside.sum() > 0


def test_unpacking_twice_changes_nothing(unpacked):
    some = sorted((unpacked / "train").iterdir())[0]
    before = some.stat().st_mtime_ns
    unpack(unpacked, ["gyosho"], progress=lambda line: pytest.fail(line))
    assert some.stat().st_mtime_ns == before


def test_images_csv_names_every_image(unpacked):
    with (unpacked / "images.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    on_disk = {p.stem for p in unpacked.rglob("*.png")}
    assert {row["image_id"] for row in rows} == on_disk


def test_split_puts_the_frequent_characters_into_training_and_validation(monkeypatch):
    parts = {"train": 4, "validation": 2, "stage_1_labelled": 2, "stage_1_rest": 1, "stage_2": 1}
    monkeypatch.setattr("examples.kanji.build.PARTS", parts)
    components = {c: ["一"] for c in "亜唖娃阿哀愛挨姶逢葵"}
    ranks = {c: r for r, c in enumerate("葵逢姶挨愛哀")}
    kanji = split(components, ranks)
    assert Counter(k.part for k in kanji) == parts
    common = {k.character for k in kanji if k.part in ("train", "validation")}
    assert common == set(ranks)


def test_components_are_read_from_radkfile(tmp_path):
    path = tmp_path / "radkfile"
    path.write_bytes("# comment\n$ 一 1\n亜唖\n阿\n$ 口 3\n唖\n".encode("euc-jp"))
    assert read_components(path) == {"亜": ["一"], "唖": ["一", "口"], "阿": ["一"]}


def test_a_sheet_is_read_back_as_it_was_written():
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 4, (7, SIDE, SIDE), dtype=np.uint8)
    grey = np.asarray(sheet(iter(levels), columns=3))
    back = grey.reshape(-1, SIDE, 3, SIDE).transpose(0, 2, 1, 3).reshape(-1, SIDE, SIDE)
    np.testing.assert_array_equal(255 - back[:7].astype(int), levels.astype(int) * 255 // 3)


def test_augmentation_depends_on_the_generator_alone_and_keeps_the_paper_light():
    glyph = Image.fromarray(read_sheet("gothic")[0])
    first = np.asarray(augment(glyph, 32, np.random.default_rng(1)))
    again = np.asarray(augment(glyph, 32, np.random.default_rng(1)))
    other = np.asarray(augment(glyph, 32, np.random.default_rng(2)))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first.shape == (32, 32)
    corners = [np.asarray(augment(glyph, 32, np.random.default_rng(s)))[0, 0] for s in range(50)]
    assert np.median(corners) > 150


def test_the_network_embeds_in_eight_times_its_width():
    network = small_resnet(num_classes=5, width=8)
    assert network.get_classifier().in_features == 64
    assert network.get_classifier().out_features == 5
