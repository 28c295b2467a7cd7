"""Which means and variances do batch-normalised layers take on images unlike those of training?

Adaptive batch normalisation [1]_ lets every such layer take them from the images at hand, of which
no label is needed. Half and half is better than either alone, since heads are fitted on the
features of one domain and used on those of another. With a share s, of n images that are
looked at, a layer normalises by

    mean = (1 - a) mean_trained + a mean_images,   a = s n / (n + 32),

and likewise by the variance, so that few images say little [2]_. It is done once, before
anything is embedded. `mean_images` of a layer is that of what it sees while those before it
normalise each batch by the batch alone; so it depends a little on the batch size.

.. [1] Li, Wang, Shi, Hou, Liu (2018), "Adaptive Batch Normalization for practical domain
   adaptation", Pattern Recognition 80.
.. [2] Schneider, Rusak, Eck, Bringmann, Brendel, Bethge (2020), "Improving robustness against
   common corruptions by covariate shift adaptation", NeurIPS 33.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from featcache.batches import ViewImages, loader
from featcache.console import Interrupted, Progress, StopRequest
from featcache.embedding import Embedder
from featcache.errors import InputError
from featcache.images import ImageSet
from featcache.settings import ExtractionConfig
from featcache.views import Recipe

IMAGES = 4096  # that are looked at; of more, these at random
_AS_TRAINED = 32  # images that what was trained counts for


def shared_id(network_id: str, share: float) -> str:
    """By which heads tell features of a network with a share of each image set's statistics.

    The same for every image set, so that a head fitted on one serves the others; not that
    of the network as it was trained, whose features lie elsewhere.
    """
    if not share:
        return network_id
    return hashlib.sha256(f"{network_id} domain statistics {share!r}".encode()).hexdigest()


def normalised_layers(network: nn.Module) -> list[_BatchNorm]:
    """The layers that keep a running mean and variance.

    Raises
    ------
    InputError
        If there are none.
    """
    layers = [
        layer
        for layer in network.modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    ]
    if not layers:
        raise InputError(
            f"--domain-statistics: {type(network).__name__} has no batch normalisation that keeps "
            "a running mean and variance; leave the option out"
        )
    return layers


def take_statistics(
    embedder: Embedder,
    images: ImageSet,
    config: ExtractionConfig,
    sizes: np.ndarray | None = None,
    say: bool = True,
) -> int:
    """Let the network's layers take a share of the statistics of an image set, in place.

    Parameters
    ----------
    embedder : Embedder
    images : ImageSet
        Of more than :data:`IMAGES`, so many are drawn; plain views are looked at.
    config : ExtractionConfig
        Whose `domain_statistics` is s, in (0, 1], and whose `seed` is that of the draw.
    sizes : (n,) int, optional
        Of the files, which must not change meanwhile.
    say : bool
        Whether to show progress.

    Returns
    -------
    int
        Images that were looked at: n, those that can be read.

    Raises
    ------
    InputError
        If no layer takes any, or a file changes.
    Interrupted
        After SIGINT or SIGTERM.

    Notes
    -----
    One forward pass of each image. If it fails the network is as it was.
    """
    layers = normalised_layers(embedder.network)
    plain = ViewImages(images, Recipe("eval", 0, 0, embedder.run.preprocessing), sizes)
    trained = [tuple(values.clone() for values in _running(layer)) for layer in layers]
    a = 0.0
    try:
        with _training(layers):
            n = _look(embedder, layers, plain, config, say)
        taken = [
            not torch.equal(own, was)
            for layer, statistics in zip(layers, trained, strict=True)
            for own, was in zip(_running(layer), statistics, strict=True)
        ]
        if n and not any(taken):
            raise InputError(
                f"--domain-statistics {config.domain_statistics:g}: no layer of "
                f"{type(embedder.network).__name__} takes any, as if all were frozen; leave the "
                "option out"
            )
        a = config.domain_statistics * n / (n + _AS_TRAINED)
    finally:
        for layer, statistics in zip(layers, trained, strict=True):
            for own, was in zip(_running(layer), statistics, strict=True):
                own.copy_(was.lerp(own, a) if a else was)
    if say:
        few = "" if n > 1 else "; fewer than two can be read, so all stays as trained"
        print(f"batch normalisation: {a:.1%} of {n:,} images' own statistics{few}", flush=True)
    return n


def _running(layer: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


@contextmanager
def _training(layers: list[_BatchNorm]) -> Iterator[None]:
    """Layers that normalise by the batch and learn from it; what is inside them does not train."""
    before = [(layer.training, layer.momentum) for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, (training, momentum) in zip(layers, before, strict=True):
            layer.training, layer.momentum = training, momentum


def _look(
    embedder: Embedder,
    layers: list[_BatchNorm],
    plain: ViewImages,
    config: ExtractionConfig,
    say: bool,
) -> int:
    """Forward passes over the images that can be read, in batches of two at least."""
    total = len(plain.images)
    rows = np.random.default_rng(config.seed).permutation(total)[:IMAGES]
    size = max(2, config.batch_size)
    order = [some.tolist() for some in np.array_split(rows, -(-len(rows) // size))]
    progress = Progress(len(rows), "images looked at for statistics")
    n = 0
    with StopRequest() as stop:
        for batch in loader(plain, order, config.workers, embedder.device):
            pixels = batch.plain()[1]
            if len(pixels) > 1:
                n += len(pixels)
                for layer in layers:  # the mean over images: the first batch counts whole
                    layer.momentum = len(pixels) / n
                embedder.forward(pixels)
            if say:
                progress.advance(len(batch.rows))
            if stop.asked:
                progress.clear()
                raise Interrupted("stopped while looking at statistics; the same command goes on")
    progress.clear()
    return n
