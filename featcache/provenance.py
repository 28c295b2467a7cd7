"""What made the features, and what must be so again for a stopped run to go on?"""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torchvision

from featcache.console import Progress
from featcache.contents import plain
from featcache.domain_statistics import shared_id
from featcache.embedding import Embedder
from featcache.imagefacts import file_contents, told_sizes
from featcache.images import ImageSet
from featcache.networks import classifier_name, network_id
from featcache.outcome import recorded_run
from featcache.owncode import source_digest
from featcache.settings import ExtractionConfig
from featcache.views import Recipe


def versions() -> dict[str, str]:
    """Of everything that can change a feature's bits."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "timm": timm.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def own_code(arch: str, views: str) -> dict[str, str]:
    """Hashes of a user's own modules that make the network or the views; they have no version."""
    names = {"--arch": arch, "--views": views}
    return {name: source_digest(name, flag) for flag, name in names.items() if ":" in name}


def provenance(config: ExtractionConfig, embedder: Embedder, recipe: Recipe) -> dict[str, Any]:
    """What made the features, as JSON."""
    run = embedder.run
    layer = classifier_name(embedder.network, run.network)
    share = config.domain_statistics
    return {
        "network": asdict(run.network) | {"layer": layer},
        "network_id": shared_id(network_id(embedder.network, run.preprocessing, layer), share),
        "preprocessing": asdict(run.preprocessing),
        "views": {"recipe": recipe.name, "seed": recipe.seed, "count": recipe.count},
        **({"domain_statistics": share} if share else {}),
        "own_code": own_code(run.network.arch, recipe.name),
        "versions": versions(),
        "device": embedder.device.type,
        "dtype": embedder.precision,
        "threads": torch.get_num_threads(),
        "batch_size": config.batch_size,
        "run": str(config.run),
        "images": str(config.images),
        "labels": [str(path) for path in config.labels],
        "ids": str(config.ids),
    }


def told(
    config: ExtractionConfig,
    embedder: Embedder,
    recipe: Recipe,
    images: ImageSet,
    sizes: np.ndarray,
) -> dict[str, Any]:
    """What a run may only be gone on with: the fingerprint.

    Where the image set lies and how it was asked for may change; what it is may not. The
    number of threads is that of the run, if it was begun already and nothing else differs.
    """
    facts = provenance(config, embedder, recipe)
    found = {k: v for k, v in facts.items() if k not in ("images", "labels", "ids", "run")}
    found["file_sizes"] = told_sizes(images, sizes)
    if config.hash_images:
        progress = Progress(len(images), "images hashed")
        found["file_contents"] = file_contents(images, config.workers, progress.advance)
        progress.clear()
    begun = recorded_run(config.out)
    if not config.threads and "threads" in begun:
        as_begun = plain(found | {"threads": begun["threads"]})
        if as_begun == begun:
            torch.set_num_threads(begun["threads"])
            return dict(as_begun)
    return found
