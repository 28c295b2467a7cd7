"""Dump the penultimate embeddings of an image set into a cache."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torchvision

from featcache import batches
from featcache.annotations import Labels, read_labels
from featcache.console import Progress
from featcache.contents import plain
from featcache.embedding import Embedder
from featcache.errors import InputError
from featcache.filling import fill
from featcache.imagefacts import file_contents, file_sizes, told_sizes
from featcache.images import ImageSet, find_images, read_ids
from featcache.networks import classifier_name, network_id
from featcache.outcome import is_at_rest, recorded_run, refuse_existing
from featcache.owncode import source_digest
from featcache.runs import CLASSES, Run
from featcache.settings import ExtractionConfig
from featcache.shares import share_from
from featcache.views import Recipe
from featcache.writing import CacheContents, CacheWriter

IMAGES_OF_CHECK = 8
# About, as a block is a whole number of batches. A stop loses less than one, and several
# processes share out blocks: a thousand images are enough for eight of them.
ROWS_A_BLOCK = 128


def choose_images(config: ExtractionConfig) -> tuple[ImageSet, list[str]]:
    """The rows of the cache; ids without a file keep their row and become unreadable ones."""
    images = find_images(config.images)
    if not config.ids:
        return images, []
    ids = read_ids(config.ids)
    found, missing = images.select(ids)
    if not len(found):
        raise InputError(
            f"{config.ids}: none of its {len(ids):,} ids is an image below {config.images} "
            f"(the first is {ids[0]!r}); an id is the name of a file without its ending"
        )
    if missing:  # a name that does not exist is decoded as such: the row stays, invalid
        names = dict(zip(found.ids.tolist(), found.files.tolist(), strict=True))
        files = [names.get(i, f"{i}.missing") for i in ids]
        found = ImageSet(images.directory, np.array(ids), np.array(files))
    return found, missing


def choose_labels(
    config: ExtractionConfig, run: Run, images: ImageSet, say: bool = True
) -> Labels | None:
    """Labels of the rows in the classes of the network; says how many images have none."""
    if not config.labels:
        return None
    labels = read_labels(
        config.labels,
        classes=run.path / CLASSES,
        unlisted="unknown" if config.unlisted == "unknown" else "negative",
    )
    unused = ~np.isin(labels.ids, images.ids)
    selected = labels.select(images.ids)
    inside = sum(m.nnz for m in (selected.positives, selected.negatives) if m is not None)
    outside = int(selected.outside.sum())
    if say:
        print(
            f"{int(selected.known.sum()):,} of {len(images):,} images have labels"
            f"; {int(unused.sum()):,} labelled images are not among them"
            + (f" ({' '.join(labels.ids[unused][:3])} ...)" if unused.any() else "")
            + f"; {outside:,} labels are of no class of the network" * bool(outside),
            flush=True,
        )
    if not selected.known.any():
        raise InputError(
            f"{config.labels[0]}: no image below {config.images} has an entry in it; "
            f"its first id is {str(labels.ids[0])!r}"
        )
    if outside and not inside:
        raise InputError(
            f"{config.labels[0]}: none of the {outside:,} labels of these images is one of the "
            f"{len(run.classes):,} classes in {run.path / CLASSES} (the first there is "
            f"{str(run.classes[0])!r}); labels must be class ids of this network"
        )
    return selected


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


def extract(config: ExtractionConfig) -> Path | None:
    """Write a cache of one network and one image set, or go on with one that was stopped.

    Parameters
    ----------
    config : ExtractionConfig
        Everything; ``config.out`` is the cache.

    Returns
    -------
    Path or None
        The cache; None in one of several processes that leaves the last steps to another.

    Raises
    ------
    InputError
        Wrong input, an existing cache, or an unfinished one of other settings.
    Interrupted
        After Ctrl-C or SIGTERM; what is written is kept.

    Notes
    -----
    An unreadable image keeps its row (``valid`` False). The composition of a batch is a
    function of the row index alone, so a resumed extraction equals an unbroken one.
    Under ``torchrun`` (RANK and WORLD_SIZE in the environment) each process makes every
    WORLD_SIZE-th block; see :mod:`featcache.shares`.
    """
    share = share_from(os.environ)
    if share.world == 1 and is_at_rest(config.out):  # else it may be ours, just finished
        refuse_existing(Path(config.out), config.overwrite)
    if config.threads:
        torch.set_num_threads(config.threads)
    embedder = Embedder.load(config)
    run = embedder.run
    recipe = Recipe(config.views, config.seed, config.view_count, run.preprocessing)
    images, missing = choose_images(config)
    if missing and not share.rank:
        print(
            f"{len(missing):,} ids have no file ({' '.join(missing[:3])} ...); "
            "their rows will be marked invalid",
            flush=True,
        )
    sizes = file_sizes(images)
    fingerprint = told(config, embedder, recipe, images, sizes)
    check_network(embedder, images, config.batch_size)
    weight, bias = embedder.head
    contents = CacheContents(
        ids=images.ids,
        views=list(recipe.augmentations()),
        dim=weight.shape[1],
        labels=choose_labels(config, run, images, say=not share.rank),
        classes=run.classes,
        class_names=run.names,
        weight=weight,
        bias=bias,
        provenance=provenance(config, embedder, recipe),
    )
    writer = CacheWriter(
        config.out,
        contents,
        fingerprint=fingerprint,
        block_rows=config.batch_size * max(1, ROWS_A_BLOCK // config.batch_size),
        overwrite=config.overwrite,
        share=share,
    )
    with writer:
        for message in writer.messages:
            print(message, flush=True)
        fill(writer, embedder, batches.ViewImages(images, recipe, sizes), config, share)
        if not writer.finished:
            print(
                f"{config.out}: process {share.rank} of {share.world} has made its images; "
                f"{writer.rows_done():,} of {len(images):,} are there; the last process to "
                "finish puts them together, and the same command makes what one that died has left",
                flush=True,
            )
    return writer.path if writer.finished else None


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


def check_network(embedder: Embedder, images: ImageSet, batch_size: int) -> None:
    """Let the network check itself on the first few images that can be read.

    Before anything is written, so that a refusal leaves nothing behind.
    """
    few = min(batch_size, IMAGES_OF_CHECK)
    plain = batches.ViewImages(images, Recipe("eval", 0, 0, embedder.run.preprocessing))
    for rows in batches.row_batches([(0, len(images))], few):
        batch = batches.collate([plain[row] for row in rows])
        if batch.readable.any():
            embedder.check(batch.pixels[torch.from_numpy(batch.readable), 0])
            return


def provenance(config: ExtractionConfig, embedder: Embedder, recipe: Recipe) -> dict[str, Any]:
    """What made the features, as JSON."""
    run = embedder.run
    layer = classifier_name(embedder.network, run.network)
    return {
        "network": asdict(run.network) | {"layer": layer},
        "network_id": network_id(embedder.network, run.preprocessing, layer),
        "preprocessing": asdict(run.preprocessing),
        "views": {"recipe": recipe.name, "seed": recipe.seed, "count": recipe.count},
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
