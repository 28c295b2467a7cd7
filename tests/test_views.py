"""Views of an image: their geometry, and that nothing but their keys decides what they show."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featcache.errors import InputError
from featcache.views import (
    Photo,
    Preprocessing,
    Recipe,
    augmentation,
    checked,
    generator,
    normalise,
    to_array,
    view_recipe,
)

ROOT = Path(__file__).parents[1]
SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=60)
SMALL = Preprocessing(image_size=24)
MODULE = '''
"""Augmentations and recipes of a user's own."""
from functools import partial
from torchvision.transforms import v2
from featcache.views import from_torchvision, view_recipe


def turned(image, size, rng):
    return image.rotate(float(rng.uniform(-90, 90))).resize((size, size))


def too_wide(image, size, rng):
    return image.resize((size + 1, size))


def failing(image, size, rng):
    raise ZeroDivisionError("of my own")


def no_image(image, size, rng):
    return rng.random((size, size))


constant = 3


@view_recipe
def zooms(preprocessing):
    views = {f"zoom{c}": partial(zoom, preprocessing, c) for c in (0.9, 0.5)}
    return views | {"turned": turned}


def zoom(preprocessing, crop, image, size, rng):
    return preprocessing.frame(image, crop)


@view_recipe
def needs_more(preprocessing):
    return {"": preprocessing.depth}


nothing = view_recipe(lambda preprocessing: {})
a_list = view_recipe(lambda preprocessing: [turned])
plain_again = view_recipe(lambda preprocessing: {"eval": turned})
no_function = view_recipe(lambda preprocessing: {"flip": "mirror"})
blurred = from_torchvision(v2.Compose([v2.RandomResizedCrop(24), v2.GaussianBlur(5)]))
'''


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an importable module with augmentations."""
    (tmp_path / "own_views.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_views"


def picture(seed: int = 0, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    """Smooth colours, so that every augmentation has something to change."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def rendered(recipe: Recipe, image: Image.Image, image_id: str) -> dict[str, np.ndarray]:
    made = recipe.augmentations()
    return dict(zip(made, recipe.render(image, image_id, made), strict=True))


# -------------------------------------------------------------------- geometry


@SETTINGS
@given(
    side=st.integers(1, 30),
    margins=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    place=st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
)
def test_a_frame_of_whole_pixels_is_a_naive_crop(
    side: int, margins: tuple[int, int], place: tuple[float, float], interpolation: str
) -> None:
    width, height = side + 2 * margins[0], side + 2 * margins[1]
    image = picture(size=(width, height))
    left, top = int(2 * margins[0] * place[0]), int(2 * margins[1] * place[1])
    expected = np.asarray(image)[top : top + side, left : left + side]
    preprocessing = Preprocessing(image_size=side, interpolation=interpolation)
    framed = preprocessing.frame(image, crop=side / min(width, height), at=place)
    assert framed.size == (side, side)
    # The product of the quotient may miss a whole number by one rounding.
    np.testing.assert_allclose(np.asarray(framed).astype(int), expected, atol=1)


def test_without_a_crop_the_centre_of_the_longer_side_stays() -> None:
    pixels = np.zeros((4, 10, 3), np.uint8)
    pixels[:, 3:7] = 200
    image = Image.fromarray(pixels)
    assert (np.asarray(Preprocessing(image_size=4).frame(image)) == 200).all()
    upright = image.transpose(Image.Transpose.TRANSPOSE)
    assert (np.asarray(Preprocessing(image_size=4).frame(upright)) == 200).all()


def test_the_crop_of_the_preprocessing_is_the_default() -> None:
    image = picture(size=(20, 20))
    framed = Preprocessing(image_size=10, crop=0.5).frame(image)
    np.testing.assert_array_equal(framed, np.asarray(image)[5:15, 5:15])
    assert Preprocessing(image_size=20).frame(image, 1.0).tobytes() == image.tobytes()


@SETTINGS
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    crop=st.sampled_from([1.0, 0.875, 0.5, 0.01]),
)
def test_the_centre_is_a_square_in_the_middle(size: tuple[int, int], crop: float) -> None:
    image = picture(size=size)
    centre = Preprocessing(image_size=8, crop=crop).centre(image)
    side = centre.width
    assert centre.size == (side, side)
    assert abs(side - crop * min(size)) <= 0.5 or side == 1
    left, top = (image.width - side) // 2, (image.height - side) // 2
    expected = np.asarray(image)[top : top + side, left : left + side]
    np.testing.assert_array_equal(centre, expected)


def test_strong_views_show_nothing_outside_the_plain_one() -> None:
    pixels = np.zeros((40, 90, 3), np.uint8)
    pixels[..., 0] = 255  # red all around
    pixels[8:32, 33:57] = (100, 110, 120)  # resizing looks two pixels beyond the frame
    image = Image.fromarray(pixels)
    preprocessing = Preprocessing(image_size=16, crop=0.5)
    assert (np.asarray(preprocessing.frame(image)) == (100, 110, 120)).all()
    recipe = Recipe("strong", 0, 40, preprocessing)
    views = recipe.render(image, "a", recipe.augmentations()).astype(int)
    assert not ((views[:, 0] > 200) & (views[:, 1] < 50)).any()


@pytest.mark.parametrize("crop", [1.0, 0.85, 0.6])
@pytest.mark.parametrize("at", [(0.5, 0.5), (0.0, 1.0), (0.3, 0.0)])
@pytest.mark.parametrize("size", [16, 37, 90])
def test_a_ramp_stays_a_ramp(crop: float, at: tuple[float, float], size: int) -> None:
    # Pixel j of the frame lies at left + (j + 1/2) side / size; a ramp shows where that is.
    width, height = 120, 60
    ramp = np.broadcast_to(2 * np.arange(width, dtype=np.uint8), (height, width))
    framed = Preprocessing(image_size=size).frame(Image.fromarray(ramp.copy()), crop, at)
    side = height * crop
    x = (width - side) * at[0] + (np.arange(size) + 0.5) * side / size - 0.5
    inside = slice(4, size - 4)
    expected = np.broadcast_to(2 * x, (size, size))[inside, inside]
    np.testing.assert_allclose(np.asarray(framed, dtype=float)[inside, inside], expected, atol=1)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 500), (1, 1), (2, 3)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", ["none", "photo", "photo-strong", "strong"])
def test_images_of_any_shape(size: tuple[int, int], mode: str, name: str) -> None:
    image = picture(size=size, mode=mode)
    made = augmentation(name, SMALL)(image, 24, generator("any"))
    assert made.size == (24, 24)
    assert to_array(made).shape == (3, 24, 24)


# ---------------------------------------------------------------------- arrays


def test_layout_of_arrays() -> None:
    image = picture(size=(5, 4))
    array = to_array(image)
    assert (array.shape, array.dtype) == ((3, 4, 5), np.uint8)
    for y in range(4):
        for x in range(5):
            assert tuple(array[:, y, x].tolist()) == image.getpixel((x, y))
    grey = image.convert("L")
    np.testing.assert_array_equal(to_array(grey), np.stack([np.asarray(grey)] * 3))
    palette = image.quantize(4)
    np.testing.assert_array_equal(to_array(palette), to_array(palette.convert("RGB")))


def test_normalise() -> None:
    preprocessing = Preprocessing(mean=(0.5, 0.4, 0.1), std=(0.25, 0.2, 0.5))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
    pixels[0, 0, 0, :2] = 0, 255
    mean, std = np.array([0.5, 0.4, 0.1]), np.array([0.25, 0.2, 0.5])
    expected = (pixels / 255.0 - mean[:, None, None]) / std[:, None, None]
    result = normalise(torch.from_numpy(pixels), preprocessing)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=2e-6)


# ---------------------------------------------------------------------- chance


def test_generators_are_functions_of_all_their_keys() -> None:
    keys: list[tuple[object, ...]] = [
        ("a", 0),
        ("a", 1),
        ("b", 0),
        (0, "a"),
        ("a",),
        ("a", 0, 0),
        ("a0",),
        ("", "a", 0),
    ]
    draws = [tuple(generator(*key).integers(2**62, size=4)) for key in keys]
    assert len(set(draws)) == len(keys)
    np.random.default_rng(0).random()
    assert [tuple(generator(*key).integers(2**62, size=4)) for key in keys] == draws


def test_draws_stay_what_they_are_in_all_versions() -> None:
    # Runs that are stopped and caches that are taken up rely on it.
    raw = [generator(*keys).bit_generator.random_raw() for keys in (("a",), ("train", 0, 1, "é"))]
    assert raw == [3032838489708147381, 3937817066157511128]


def test_draws_look_uniform() -> None:
    first = np.array([generator("u", k).random() for k in range(2000)])
    assert abs(first.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.07


RECIPES = [
    ("eval", 0),
    ("tta", 0),
    ("strong", 3),
    ("own_views:turned", 2),
    ("own_views:zooms", 0),
    ("own_views:blurred", 1),
]
IDS = ["a", "0b12", "日本"]


def fingerprints(ids: list[str]) -> dict[str, str]:
    """sha256 of every view, and of a few draws, by name; run here and in another process."""
    made = {}
    for name, count in RECIPES:
        recipe = Recipe(name, 7, count, SMALL)
        for image_id in ids:
            views = rendered(recipe, picture(len(image_id)), image_id)
            for view, pixels in views.items():
                key = f"{name} {image_id} {view}"
                made[key] = hashlib.sha256(pixels.tobytes()).hexdigest()
    made["draws"] = str(generator("x", 1, "y").random(3).tolist())
    return made


SCRIPT = """
import json, random, sys
import numpy, torch
from tests.test_views import IDS, fingerprints
random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
torch.rand(3)
print(json.dumps(fingerprints(IDS[::-1])))
"""


def test_views_are_the_same_in_another_order_and_process(own_module: str, tmp_path: Path) -> None:
    here = fingerprints(IDS)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]),
        "PYTHONHASHSEED": "12345",
    }
    there = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, check=True
    )
    assert json.loads(there.stdout) == here
    assert len(here) == 1 + len(IDS) * (1 + 7 + 4 + 3 + 4 + 2)


@pytest.mark.parametrize(
    "name", ["eval", "tta", "strong", "own_views:turned", "own_views:zooms", "own_views:blurred"]
)
def test_views_neither_read_nor_move_global_generators(
    name: str, own_module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError(f"CUDA was seeded with {seed}")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    recipe = Recipe(name, 0, 3, SMALL)
    first = rendered(recipe, picture(), "a")
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    again = rendered(recipe, picture(), "a")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]
    torch.default_generator.manual_seed(99)
    torch.rand(10)
    moved = rendered(recipe, picture(), "a")
    for view, pixels in first.items():
        np.testing.assert_array_equal(again[view], pixels)
        np.testing.assert_array_equal(moved[view], pixels)


@pytest.mark.parametrize("name", ["photo", "photo-strong", "strong"])
def test_augmentations_take_their_chance_from_the_generator(name: str) -> None:
    augment = augmentation(name, SMALL)
    made = [to_array(augment(picture(), 24, generator("draw", k))).tobytes() for k in (1, 2, 1)]
    assert made[0] == made[2] != made[1]


@pytest.mark.parametrize("name", ["strong", "own_views:turned", "own_views:blurred"])
def test_random_views_differ_by_seed_id_and_name_but_not_by_count(
    name: str, own_module: str
) -> None:
    image = picture()
    three = rendered(Recipe(name, 0, 3, SMALL), image, "a")
    stem = name.rpartition(":")[2]
    assert list(three) == ["eval", f"{stem}-1", f"{stem}-2", f"{stem}-3"]
    one = rendered(Recipe(name, 0, 1, SMALL), image, "a")
    for view, pixels in one.items():
        np.testing.assert_array_equal(pixels, three[view])
    others = [
        rendered(Recipe(name, 1, 1, SMALL), image, "a"),
        rendered(Recipe(name, 0, 1, SMALL), image, "b"),
    ]
    for other in others:
        np.testing.assert_array_equal(other["eval"], one["eval"])
    random_views = [views[f"{stem}-1"].tobytes() for views in (one, *others)]
    random_views += [three[f"{stem}-{k}"].tobytes() for k in (2, 3)]
    assert len(set(random_views)) == 5


# --------------------------------------------------------------------- recipes


def test_the_plain_view_comes_first(own_module: str) -> None:
    image = picture()
    plain = to_array(SMALL.frame(image))
    for name, count in RECIPES:
        recipe = Recipe(name, 3, count, SMALL)
        made = recipe.augmentations()
        assert next(iter(made)) == "eval"
        pixels = recipe.render(image, "a", made)
        assert (pixels.shape, pixels.dtype) == ((len(made), 3, 24, 24), np.uint8)
        np.testing.assert_array_equal(pixels[0], plain)


def test_a_recipe_of_ones_own_names_its_views(own_module: str) -> None:
    image = picture()
    views = rendered(Recipe("own_views:zooms", 0, 0, SMALL), image, "a")
    assert list(views) == ["eval", "zoom0.9", "zoom0.5", "turned"]
    for crop in (0.9, 0.5):
        np.testing.assert_array_equal(views[f"zoom{crop}"], to_array(SMALL.frame(image, crop)))
    other = rendered(Recipe("own_views:zooms", 1, 5, SMALL), image, "a")
    np.testing.assert_array_equal(other["zoom0.5"], views["zoom0.5"])
    assert not np.array_equal(other["turned"], views["turned"])  # by the seed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "returned dict; it must return a dict of augmentations"),
        ("a_list", "returned list; it must return a dict of augmentations"),
        ("plain_again", "has the view 'eval': function"),
        ("no_function", "has the view 'flip': str"),
        ("needs_more", "AttributeError: 'Preprocessing' object has no attribute 'depth'"),
    ],
)
def test_a_recipe_without_views_is_refused(own_module: str, name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Recipe(f"own_views:{name}", 0, 1, SMALL).augmentations()
    assert f"'own_views:{name}'" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_views_of_a_running_script(monkeypatch: pytest.MonkeyPatch) -> None:
    main = sys.modules["__main__"]
    mine = view_recipe(lambda preprocessing: {"small": lambda image, size, rng: image})
    monkeypatch.setattr(main, "mine", mine, raising=False)
    assert list(Recipe("__main__:mine", 0, 0, SMALL).augmentations()) == ["eval", "small"]


def test_crops_and_mirror_image() -> None:
    image = picture(size=(20, 20))
    pixels = to_array(image)
    close = 17 / 20  # of the shorter side: whole pixels, so that nothing is interpolated
    views = rendered(Recipe("tta", 0, 0, Preprocessing(image_size=17)), image, "a")
    assert list(views) == [
        "eval",
        "flip",
        "close",
        "top-left",
        "top-right",
        "bottom-left",
        "bottom-right",
    ]
    assert close == 0.85
    np.testing.assert_array_equal(views["flip"], views["eval"][:, :, ::-1])
    np.testing.assert_array_equal(views["top-left"], pixels[:, :17, :17])
    np.testing.assert_array_equal(views["top-right"], pixels[:, :17, 3:])
    np.testing.assert_array_equal(views["bottom-left"], pixels[:, 3:, :17])
    np.testing.assert_array_equal(views["bottom-right"], pixels[:, 3:, 3:])
    other = rendered(Recipe("tta", 1, 5, Preprocessing(image_size=17)), image, "b")
    for view, expected in views.items():
        np.testing.assert_array_equal(other[view], expected)


def test_strong_views_are_never_mirrored() -> None:
    # Left is darker than right; what a step of the recipe blackens or erases may make them equal.
    pixels = np.full((48, 48, 3), 60, np.uint8)
    pixels[:, 24:] = 150
    recipe = Recipe("strong", 0, 60, Preprocessing(image_size=48))
    views = recipe.render(Image.fromarray(pixels), "a", recipe.augmentations())
    left, right = views[..., :16].mean((1, 2, 3)), views[..., 32:].mean((1, 2, 3))
    assert (right > left).mean() > 0.9
    assert (right >= left - 1).all()


def test_an_augmentation_that_fails_or_makes_something_else_is_named(own_module: str) -> None:
    wide = Recipe("own_views:too_wide", 0, 1, SMALL)
    with pytest.raises(InputError, match=r"own_views:too_wide.* 25 x 24 .* 24 x 24"):
        rendered(wide, picture(), "a")
    none = Recipe("own_views:no_image", 0, 1, SMALL)
    with pytest.raises(InputError, match=r"own_views:no_image.* ndarray"):
        rendered(none, picture(), "a")
    failing = Recipe("own_views:failing", 0, 1, SMALL)
    with pytest.raises(InputError, match=r"own_views:failing.*ZeroDivisionError: of my own"):
        rendered(failing, picture(), "a")
    image = picture(size=(24, 24))
    assert checked(image, 24, "fine") is image


@pytest.mark.parametrize(
    "name",
    [
        "nonsense",
        "",
        "no_such_module_here:f",
        "own_views:absent",
        "own_views:constant",
        "own_views:",
        ":turned",
        ".own_views:turned",
    ],
)
def test_unknown_names_are_refused_in_one_line(name: str, own_module: str) -> None:
    with pytest.raises(InputError) as caught:
        augmentation(name, SMALL)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError) as caught:
        Recipe(name, 0, 1, SMALL).augmentations()
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["strong", "own_views:turned"])
def test_a_random_recipe_needs_views(name: str, own_module: str) -> None:
    with pytest.raises(InputError, match="--view-count 0"):
        Recipe(name, 0, 0, SMALL).augmentations()


def mean_mirrored(flip: bool) -> float:
    """Share of renderings of a picture with a dark left half whose right half is darker."""
    picture = Image.new("RGB", (40, 40), (200, 200, 200))
    picture.paste((20, 20, 20), (0, 0, 20, 40))
    augment = Photo(least_area=1.0, flip=flip, colour=0.0).augmentation(40)
    shown = [np.asarray(augment(picture, 40, np.random.default_rng(s)), int) for s in range(40)]
    return float(np.mean([image[:, :10].mean() > image[:, 30:].mean() for image in shown]))


def test_photo_flips_one_in_two_or_none() -> None:
    assert 0.25 < mean_mirrored(True) < 0.75
    assert mean_mirrored(False) == 0


def test_photo_changes_colours_as_far_as_it_may() -> None:
    grey = Image.new("RGB", (32, 32), (100, 100, 100))

    def levels(**options: Any) -> np.ndarray:
        augment = Photo(**options).augmentation(32)
        return np.array(
            [np.asarray(augment(grey, 32, np.random.default_rng(s))).mean() for s in range(60)]
        )

    assert np.ptp(levels(colour=0.0)) == 0
    assert 20 < np.ptp(levels(colour=0.3)) <= 61
    assert np.ptp(levels(colour=0.0, randaugment=10)) > 0


def test_the_strong_photo_is_a_photo_with_randaugment() -> None:
    preprocessing = Preprocessing(24)
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (30, 30, 3)).astype(np.uint8)
    )

    def shown(name: str, photo: Photo | None = None) -> np.ndarray:
        augment = augmentation(name, preprocessing, photo)
        return np.stack([augment(picture, 24, np.random.default_rng(s)) for s in range(8)])

    np.testing.assert_array_equal(shown("photo-strong"), shown("photo", Photo(randaugment=9)))
    np.testing.assert_array_equal(
        shown("photo-strong", Photo(randaugment=4)), shown("photo", Photo(randaugment=4))
    )
    np.testing.assert_array_equal(shown("photo"), shown("photo", Photo()))
