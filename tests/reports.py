"""A blend whose names are hostile, and the page about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from heads import commands
from heads.commands import BlendConfig, FitConfig
from heads.report import ReportConfig, report
from tests import synthetic

EVIL = "<script>document.title='stolen'</script>"
NAMES = [EVIL, '"><img src=x onerror="document.title=1">', "$x$ </svg><script>", "猫 & co"]


def evil_blend(folder: Path, views: int = 1) -> Path:
    """A blend of heads of two networks, one of them fitted on both domains; returns its path."""
    stage_1, validation = synthetic.images(60, 1), synthetic.images(50, 2)
    # What a name may be: a class, an image, a network, a file.
    stage_1.ids[0] = EVIL.replace("/", "\\")
    names = [*NAMES, *[f"label {k}" for k in range(4, synthetic.K)]]
    heads = []
    for network in (0, 1):
        options: dict[str, Any] = {
            "class_names": names,
            "provenance": {"network": f"net{network}{EVIL}"},
        }
        target = folder / "caches" / "stage_1" / f"net{network}.h5"
        source = folder / "caches" / "validation" / f"net{network}.h5"
        synthetic.write(target, stage_1, network, shifted=True, **options)
        synthetic.write(source, validation, network, **options)
        both = {"source": str(source), "source_weight": "0.1,1"} if network else {}
        config = FitConfig(
            cache=str(target), out=str(folder / f"<b>net{network}.h5"), dropout="0.1,0.5", **both
        )
        commands.fit(config)
        heads.append(config.out)
    blend = folder / "blend.h5"
    commands.blend(BlendConfig(heads=heads, out=str(blend), method="uniform"))
    return blend


def evil_page(folder: Path, **more: Any) -> Path:
    """The page, with a picture of one image."""
    images = folder / "images"
    images.mkdir()
    Image.new("RGB", (30, 20), "green").save(images / f"{synthetic.images(60, 1).ids[1]}.png")
    config = ReportConfig(
        content=str(evil_blend(folder)),
        out=str(folder / "report.html"),
        images=str(images),
        title=f"About {EVIL}",
        count=60,
        **more,
    )
    return report(config)
