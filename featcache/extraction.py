"""Dump the penultimate embeddings of an image set into a cache."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featcache import batches
from featcache.annotations import Labels, labels_of
from featcache.atomic import refuse_unwritable
from featcache.domain_statistics import normalised_layers, take_statistics
from featcache.embedding import Embedder
from featcache.entries import Entries
from featcache.errors import InputError
from featcache.filling import fill
from featcache.imagefacts import file_sizes
from featcache.images import ImageSet, find_images, read_ids
from featcache.outcome import is_at_rest, refuse_existing
from featcache.provenance import provenance, told
from featcache.runs import CLASSES, Run
from featcache.settings import ExtractionConfig
from featcache.shares import share_from
from featcache.views import Recipe
from featcache.writing import CacheContents, CacheWriter

IMAGES_OF_CHECK = 8
# About, as a block is a whole number of batches. A stop loses less than one, and several
# processes share out blocks: a thousand images are enough for eight of them.
ROWS_A_BLOCK = 128


def choose_images(config: ExtractionConfig, say: bool = True) -> ImageSet:
    """The rows of the cache; ids without a file keep their row and become unreadable ones."""
    images = find_images(config.images)
    if not config.ids:
        return images
    ids = read_ids(config.ids)
    found, missing = images.select(ids)
    if not len(found):
        raise InputError(
            f"{config.ids}: none of its {len(ids):,} ids is an image below {config.images} "
            f"(the first is {ids[0]!r}); an id is the name of a file without its ending"
        )
    if not missing:
        return found
    if say:
        print(
            f"{len(missing):,} ids have no file ({' '.join(missing[:3])} ...); "
            "their rows will be marked invalid",
            flush=True,
        )
    # A name that does not exist is decoded as such: the row stays, invalid.
    names = dict(zip(found.ids.tolist(), found.files.tolist(), strict=True))
    files = [names.get(i, f"{i}.missing") for i in ids]
    return ImageSet(images.directory, np.array(ids), np.array(files))


def choose_labels(
    config: ExtractionConfig, run: Run, images: ImageSet, say: bool = True
) -> Labels | None:
    """Labels of the rows in the classes of the network; says how many images have none."""
    if not config.labels:
        return None
    entries = Entries.read(config.labels)
    labels = labels_of(
        entries,
        classes=run.path / CLASSES,
        unlisted="unknown" if config.unlisted == "unknown" else "negative",
    )
    unused = ~np.isin(labels.ids, images.ids)
    selected = labels.select(images.ids)
    inside = sum(m.nnz for m in (selected.positives, selected.negatives) if m is not None)
    outside = int(selected.outside.sum())
    if say:
        strange = entries.strange(run.classes, images.ids) if outside else []
        print(
            f"{int(selected.known.sum()):,} of {len(images):,} images have labels"
            f"; {int(unused.sum()):,} labelled images are not among them"
            + (f" ({' '.join(labels.ids[unused][:3])} ...)" if unused.any() else "")
            + f"; {outside:,} labels are of no class of the network" * bool(outside)
            + (f" ({' '.join(strange[:3])}{' ...' * (len(strange) > 3)})" if strange else ""),
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


def contents_of(
    embedder: Embedder,
    recipe: Recipe,
    images: ImageSet,
    labels: Labels | None,
    facts: Mapping[str, Any],
) -> CacheContents:
    """Everything in the cache but the features."""
    weight, bias = embedder.head
    return CacheContents(
        ids=images.ids,
        views=list(recipe.augmentations()),
        dim=weight.shape[1],
        labels=labels,
        classes=embedder.run.classes,
        class_names=embedder.run.names,
        weight=weight,
        bias=bias,
        provenance=facts,
    )


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
    refuse_unwritable(config.out)
    if config.threads:
        torch.set_num_threads(config.threads)
    embedder = Embedder.load(config)
    run = embedder.run
    recipe = Recipe(config.views, config.seed, config.view_count, run.preprocessing)
    images = choose_images(config, say=not share.rank)
    sizes = file_sizes(images)
    fingerprint = told(config, embedder, recipe, images, sizes)
    check_network(embedder, images, config.batch_size)
    if config.domain_statistics:
        normalised_layers(embedder.network)  # before anything is written
    contents = contents_of(
        embedder,
        recipe,
        images,
        choose_labels(config, run, images, say=not share.rank),
        provenance(config, embedder, recipe),
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
        if config.domain_statistics and writer.pending():
            take_statistics(embedder, images, config, sizes, say=not share.rank)
        fill(writer, embedder, batches.ViewImages(images, recipe, sizes), config, share)
        if not writer.finished:
            print(
                f"{config.out}: process {share.rank} of {share.world} has made its images; "
                f"{writer.rows_done():,} of {len(images):,} are there; the last process to "
                "finish puts them together, and the same command makes what one that died has left",
                flush=True,
            )
    return writer.path if writer.finished else None


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
