"""A small residual network and an augmentation for images of single characters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFilter

if TYPE_CHECKING:
    from torch import nn


CROP = 0.82  # of the pictures' side; the ink of the printed typefaces fills three quarters


def small_resnet(num_classes: int, width: int = 32, **kwargs: Any) -> nn.Module:
    """timm's resnet10t with channels (W, 2W, 4W, 8W) and no max-pooling: for 32 to 64 pixels.

    Parameters
    ----------
    num_classes : int
        Outputs of the last layer.
    width : int
        Channels W of the first stage; the embedding has 8 W dimensions.
    **kwargs
        Passed on to ``timm.create_model``.
    """
    import timm
    from torch import nn

    network = timm.create_model(
        "resnet10t",
        pretrained=False,
        num_classes=num_classes,
        channels=(width, 2 * width, 4 * width, 8 * width),
        stem_type="deep",
        stem_width=16,
        **kwargs,
    )
    network.maxpool = nn.Identity()
    return network


def augment(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """What may happen to a written character: tilt, slant, size, place, stroke weight, ink, noise.

    A mirror image of a character is another character, so nothing is flipped.
    """
    zoom = CROP * min(image.size) / size
    angle = math.radians(rng.uniform(-8, 8))
    scale_x, scale_y = np.exp(rng.uniform(-0.22, 0.08, 2)) / zoom
    shear_x, shear_y = rng.uniform(-0.1, 0.1, 2)
    shift_x, shift_y = rng.uniform(-0.06, 0.06, 2) * min(image.size)
    cos, sin = math.cos(angle), math.sin(angle)
    a, b = (cos + shear_x * sin) / scale_x, (sin + shear_x * cos) / scale_x
    d, e = (shear_y * cos - sin) / scale_y, (cos + shear_y * sin) / scale_y
    c = image.width / 2 + shift_x - (a + b) * size / 2
    f = image.height / 2 + shift_y - (d + e) * size / 2
    image = image.transform(
        (size, size),
        Image.Transform.AFFINE,
        (a, b, c, d, e, f),
        Image.Resampling.BILINEAR,
        fillcolor=image.getpixel((0, 0)),
    )
    weight = rng.random()
    if weight < 0.5:  # thicker or thinner strokes, blended so that the change is gradual
        kind = ImageFilter.MinFilter(3) if weight < 0.25 else ImageFilter.MaxFilter(3)
        image = Image.blend(image, image.filter(kind), rng.uniform(0.2, 0.9))
    pixels = np.asarray(image, np.float32)
    contrast, brightness = rng.uniform(0.7, 1.2), rng.uniform(-20, 20)
    noise = rng.normal(0.0, rng.uniform(0, 15), (size, size, 1)[: pixels.ndim]).astype(np.float32)
    pixels = (pixels - 128) * contrast + 128 + brightness + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
