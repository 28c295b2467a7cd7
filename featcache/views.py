"""Deterministic renderings of an image: its views, and the augmentations that make them.

An *augmentation* is a function ``(image, size, rng) -> image``: from a decoded PIL image
(mode RGB or L) to one of ``size`` x ``size`` pixels, drawing all its chance from the
numpy generator ``rng``. The same functions serve training and extraction.
A *recipe* is a list of named views, of which the first is always ``eval``.

Both can be a user's own: any name that is asked for may be ``package.module:attribute``
(of a script or notebook that runs: ``__main__:attribute``). An augmentation makes
``--view-count`` views of each image; a recipe, marked as such, names its views::

    # my_views.py, used by --views my_views:zooms and --views my_views:blurred
    from torchvision.transforms import v2
    from featcache.views import from_torchvision, view_recipe

    @view_recipe
    def zooms(preprocessing):
        return {
            f"zoom{crop}": lambda image, size, rng, crop=crop: preprocessing.frame(image, crop)
            for crop in (0.9, 0.7, 0.5)
        }

    blurred = from_torchvision(
        v2.Compose([v2.RandomResizedCrop(224), v2.GaussianBlur(9, (0.1, 3.0))])
    )

An unfinished cache is only gone on with while the code of that module (the one file, but
for its comments) is what it was; see :mod:`featcache.owncode`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from featcache.errors import InputError
from featcache.owncode import load_object

Augmentation = Callable[[Image.Image, int, np.random.Generator], Image.Image]
_MARK = "__featcache_view_recipe__"
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """How a decoded image becomes the network's input; recorded in every run and cache.

    Attributes
    ----------
    image_size : int
        Side of the square input in pixels.
    crop : float
        Share of the resized shorter side that the central crop keeps.
    interpolation : str
        ``nearest``, ``bilinear``, ``bicubic`` or ``lanczos``.
    mean, std : tuple of float
        Of each channel, on the scale [0, 1].
    """

    image_size: int = 224
    crop: float = 1.0
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def centre(self, image: Image.Image) -> Image.Image:
        """The part that the plain view shows, at its own resolution; a square of whole pixels."""
        side = max(1, round(min(image.size) * self.crop))
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        return image if box == (0, 0, *image.size) else image.crop(box)

    def frame(
        self, image: Image.Image, crop: float | None = None, at: tuple[float, float] = (0.5, 0.5)
    ) -> Image.Image:
        """Cut the square of ``crop`` times the shorter side at a relative place and resize it."""
        size = self.image_size
        crop = self.crop if crop is None else crop
        if image.size == (size, size) and crop == 1.0:
            return image
        side = min(image.size) * crop
        left, top = (image.width - side) * at[0], (image.height - side) * at[1]
        box = (left, top, left + side, top + side)
        return image.resize((size, size), RESAMPLING[self.interpolation], box=box)


def to_array(image: Image.Image) -> np.ndarray:
    """(3, h, w) uint8; grey images are repeated over the channels."""
    pixels = np.asarray(image.convert("RGB") if image.mode not in ("RGB", "L") else image)
    if pixels.ndim == 2:
        return np.broadcast_to(pixels, (3, *pixels.shape))
    return pixels.transpose(2, 0, 1)


def normalise(pixels: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """(b, 3, h, w) uint8 -> float32 on the same device: (x / 255 - mean) / std."""
    mean, std = (
        # Filled on the device: a copy to it would wait for all that it has been given to do.
        torch.stack([torch.full((1, 1), value, device=pixels.device) for value in values]) * 255
        for values in (preprocessing.mean, preprocessing.std)
    )
    return (pixels.float() - mean) / std


def generator(*keys: object) -> np.random.Generator:
    """A generator that is a function of the keys alone, on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, keys)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def from_torchvision(transform: Callable[[Image.Image], Image.Image]) -> Augmentation:
    """An augmentation of a transform that draws from torch's global generator.

    That is seeded for the call and then restored; only that of the CPU, since
    torch.manual_seed would reseed, and not restore, those of CUDA.
    """

    def augment(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
        del size  # fixed when the transform was made
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            result: Image.Image = transform(image)
        return result

    return augment


@dataclass(frozen=True)
class Photo:
    """How much the augmentation ``photo`` does.

    Attributes
    ----------
    least_area : float
        Share of the image that a random crop keeps at least.
    flip : bool
        Whether one image in two is mirrored.
    colour : float
        How far brightness, contrast and saturation may go from 1.
    randaugment : int
        Magnitude of two random operations of RandAugment, 0 to 30; 0: none.
    """

    least_area: float = 0.35
    flip: bool = True
    colour: float = 0.3
    randaugment: int = 0

    def augmentation(self, size: int) -> Augmentation:
        """Random resized crop, mirror image, colour, RandAugment."""
        steps: list[Any] = [v2.RandomResizedCrop(size, scale=(self.least_area, 1), antialias=True)]
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        steps.append(v2.ColorJitter(*[self.colour] * 3))
        if self.randaugment:
            steps.append(v2.RandAugment(num_ops=2, magnitude=self.randaugment))
        return from_torchvision(v2.Compose(steps))


def strong(preprocessing: Preprocessing) -> Augmentation:
    """Of what the plain view shows: a mild crop, RandAugment, one time in four an erased patch.

    There is no mirror image: it would be wrong for writing and for anything with sides.
    """
    size = preprocessing.image_size
    return from_torchvision(
        v2.Compose(
            [
                v2.RGB(),
                preprocessing.centre,
                v2.RandomResizedCrop(size, scale=(0.7, 1.0), ratio=(0.85, 1.18), antialias=True),
                v2.RandAugment(num_ops=2, magnitude=6),
                v2.PILToTensor(),
                v2.RandomErasing(p=0.25, scale=(0.02, 0.12), value=128),
                v2.ToPILImage(),
            ]
        )
    )


def augmentation(
    name: str, preprocessing: Preprocessing, photo: Photo | None = None
) -> Augmentation:
    """``none``, ``photo``, ``photo-strong``, ``strong``, or ``package.module:function``.

    ``photo`` says how much the two of that name do; ``photo-strong`` has RandAugment at 9
    where it says nothing of it.

    Raises
    ------
    InputError
        If there is no such augmentation.
    """
    size = preprocessing.image_size
    photo = Photo() if photo is None else photo
    if ":" in name:
        found: Augmentation = load_object(name, "augmentation")
        return found
    if name == "none":
        return lambda image, size, rng: preprocessing.frame(image)
    if name == "photo":
        return photo.augmentation(size)
    if name == "photo-strong":
        return replace(photo, randaugment=photo.randaugment or 9).augmentation(size)
    if name == "strong":
        return strong(preprocessing)
    raise InputError(
        f"augmentation {name!r} is unknown; "
        "use none, photo, photo-strong, strong or package.module:function"
    )


def _tta(preprocessing: Preprocessing) -> dict[str, Augmentation]:
    """Mirror image, a closer crop in the centre and in the four corners."""
    close = 0.85 * preprocessing.crop
    corners = {
        "top-left": (0, 0),
        "top-right": (1, 0),
        "bottom-left": (0, 1),
        "bottom-right": (1, 1),
    }
    views: dict[str, Augmentation] = {
        "flip": lambda image, size, rng: ImageOps.mirror(preprocessing.frame(image)),
        "close": lambda image, size, rng: preprocessing.frame(image, close),
    }
    for name, at in corners.items():
        views[name] = _crop(preprocessing, close, at)
    return views


def _crop(preprocessing: Preprocessing, crop: float, at: tuple[float, float]) -> Augmentation:
    return lambda image, size, rng: preprocessing.frame(image, crop, at)


RecipeFunction = Callable[[Preprocessing], Mapping[str, Augmentation]]


def view_recipe(function: RecipeFunction) -> RecipeFunction:
    """Mark a function of the preprocessing, which returns augmentations by the name of the view.

    It is no augmentation, then: ``--views package.module:function`` takes the views that
    it names, once each, after ``eval``.
    """
    setattr(function, _MARK, True)
    return function


def _own_views(name: str, count: int, preprocessing: Preprocessing) -> dict[str, Augmentation]:
    """Views of a user's own recipe, or `count` of a user's own augmentation."""
    found = load_object(name, "augmentation")
    if not getattr(found, _MARK, False):
        return _repeated(found, name.rpartition(":")[2], count)
    try:
        views = found(preprocessing)
    except Exception as error:  # somebody else's code
        raise InputError(f"view recipe {name!r}: {type(error).__name__}: {error}") from error
    if not isinstance(views, Mapping) or not views:
        raise InputError(
            f"view recipe {name!r} returned {type(views).__name__}; it must return a dict of "
            "augmentations by the name of the view"
        )
    for view, augment in views.items():
        if not isinstance(view, str) or view == "eval" or not callable(augment):
            raise InputError(
                f"view recipe {name!r} has the view {view!r}: {type(augment).__name__}; give "
                "functions (image, size, rng) -> image by names other than 'eval', which is there"
            )
    return dict(views)


def _repeated(augment: Augmentation, stem: str, count: int) -> dict[str, Augmentation]:
    if count < 1:
        raise InputError(f"--view-count {count}: a random recipe needs at least 1")
    return {f"{stem}-{k}": augment for k in range(1, count + 1)}


@dataclass(frozen=True)
class Recipe:
    """Named views of an image; the first is the plain ``eval`` view.

    Attributes
    ----------
    name : str
        ``eval``, ``tta`` (mirror image and crops), ``strong`` (random), or
        ``package.module:function`` of an augmentation or a :func:`view_recipe`.
    seed : int
        Of everything random in the views.
    count : int
        Views of ``strong`` or of an augmentation beside the plain one.
    preprocessing : Preprocessing
        Of the network.
    """

    name: str
    seed: int
    count: int
    preprocessing: Preprocessing

    def augmentations(self) -> dict[str, Augmentation]:
        """What makes each view, by the view's name, in order.

        Raises
        ------
        InputError
            If there is no such recipe, a random one is to have no views, or a user's own
            names none.
        """
        views = {"eval": augmentation("none", self.preprocessing)}
        if self.name == "tta":
            views |= _tta(self.preprocessing)
        elif self.name == "strong":
            views |= _repeated(strong(self.preprocessing), "strong", self.count)
        elif ":" in self.name:
            views |= _own_views(self.name, self.count, self.preprocessing)
        elif self.name != "eval":
            raise InputError(
                f"view recipe {self.name!r} is unknown; "
                "use eval, tta, strong or package.module:function"
            )
        return views

    def render(
        self, image: Image.Image, image_id: str, augmentations: dict[str, Augmentation]
    ) -> np.ndarray:
        """All views of one decoded image, (v, 3, size, size) uint8.

        A view depends on (recipe, seed, image id, name of the view) alone.
        """
        size = self.preprocessing.image_size
        rendered = np.empty((len(augmentations), 3, size, size), np.uint8)
        for k, (view, augment) in enumerate(augmentations.items()):
            rng = generator(self.name, self.seed, image_id, view)
            rendered[k] = to_array(augmented(augment, image, size, rng, self.name))
        return rendered


def augmented(
    augment: Augmentation, image: Image.Image, size: int, rng: np.random.Generator, name: str
) -> Image.Image:
    """The image as the augmentation of that name renders it.

    Raises
    ------
    InputError
        If the augmentation, which may be a user's own, fails or makes something else.
    """
    try:
        result = augment(image, size, rng)
    except Exception as error:
        raise InputError(f"augmentation {name!r}: {type(error).__name__}: {error}") from error
    return checked(result, size, name)


def checked(image: Image.Image, size: int, name: str) -> Image.Image:
    """What an augmentation has made, if it is an image of the promised size.

    Raises
    ------
    InputError
        Naming the augmentation and what it made instead.
    """
    if not isinstance(image, Image.Image):
        raise InputError(
            f"augmentation {name!r} made a {type(image).__name__}; it must return a PIL image"
        )
    if image.size != (size, size):
        raise InputError(
            f"augmentation {name!r} made an image of {image.width} x {image.height} pixels; "
            f"it must return {size} x {size}"
        )
    return image
