"""The folder of a trained network: what is in it, and how it is read and written.

========================  ============================================================
``config.json``           everything that the run was resolved to
``classes.csv``           ``label_code,description`` in the order of the outputs
``validation_ids.txt``    images held out
``missing_images.txt``    ids of the label files that have no image file
``unreadable_images.csv`` images that could not be decoded, and why
``log.csv``               a row for each evaluation
``curves.png``            the same as a picture (where matplotlib is installed)
``README.md``             what was trained, on what, and how well it does
``checkpoint.pt``         all that is needed to go on
``weights.safetensors``   the best weights so far
``bad_batch.txt``         images of the step that ended the run since its loss was not finite
========================  ============================================================
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from featcache.annotations import read_descriptions
from featcache.atomic import replacing, write_atomically
from featcache.errors import InputError, reason_of
from featcache.networks import NetworkSpec
from featcache.views import Preprocessing

CONFIG = "config.json"
CLASSES = "classes.csv"
VALIDATION_IDS = "validation_ids.txt"
MISSING = "missing_images.txt"
UNREADABLE = "unreadable_images.csv"
LOG = "log.csv"
CURVES = "curves.png"
CARD = "README.md"
CHECKPOINT = "checkpoint.pt"
WEIGHTS = "weights.safetensors"
BAD_BATCH = "bad_batch.txt"
FILES = (
    CONFIG, CLASSES, VALIDATION_IDS, MISSING, UNREADABLE, LOG, CURVES, CARD, BAD_BATCH, CHECKPOINT,
    WEIGHTS,
)  # fmt: skip
FORMAT = 1  # of config.json
CLASS_IDS = "class_ids"  # the key of :func:`digest` in it


@dataclass(frozen=True)
class Run:
    """A trained network on disk, ready to extract with.

    Attributes
    ----------
    path : Path
        The folder.
    network : NetworkSpec
        How to build it.
    preprocessing : Preprocessing
        How images become its input.
    classes, names : ndarray of str, shape (K,)
        Class ids and their names in the order of the outputs.
    config : dict
        All of ``config.json``.
    """

    path: Path
    network: NetworkSpec
    preprocessing: Preprocessing
    classes: np.ndarray
    names: np.ndarray
    config: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """Read the folder.

        Raises
        ------
        InputError
            If it is not the folder of a run that has weights.
        """
        root = Path(path)
        config = read_config(root)
        if not (root / WEIGHTS).is_file():
            raise InputError(f"{root}: no {WEIGHTS} yet; let `featcache train` reach an evaluation")
        names = read_descriptions(root / CLASSES)
        try:
            preprocessing = config["preprocessing"]
            channels = {key: tuple(preprocessing[key]) for key in ("mean", "std")}
            network = NetworkSpec(**config["network"])
            resolved = Preprocessing(**preprocessing | channels)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{root / CONFIG}: damaged (no {reason_of(error)}); train or import it again with "
                "--overwrite"
            ) from error
        ids = list(names)
        if len(ids) != network.num_classes or config.get(CLASS_IDS, digest(ids)) != digest(ids):
            raise InputError(
                f"{root / CLASSES}: {len(ids):,} classes that are not, in this order, the "
                f"{network.num_classes:,} of the network's outputs; put the file of training back"
            )
        return cls(root, network, resolved, np.array(ids), np.array(list(names.values())), config)

    def load_network(self) -> nn.Module:
        """The network with its trained weights, in evaluation mode.

        Raises
        ------
        InputError
            If the weights do not fit the network.
        """
        network = self.network.build()
        weights = self.path / WEIGHTS
        try:
            network.load_state_dict(safetensors.torch.load_file(weights))
        except (RuntimeError, safetensors.SafetensorError) as error:
            raise InputError(
                f"{weights}: does not fit --arch {self.network.arch!r} ({reason_of(error)})"
            ) from error
        return network.eval()


def digest(class_ids: Iterable[str]) -> str:
    """SHA-256 of class ids in their order, by which ``config.json`` knows ``classes.csv``."""
    return hashlib.sha256("\n".join(class_ids).encode()).hexdigest()


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of the folder of a run.

    Raises
    ------
    InputError
        If there is none, or it is not what training writes.
    """
    file = path / CONFIG
    if not file.is_file():
        raise InputError(
            f"{path}: no {CONFIG} there; give the --out of `featcache train` or `import`"
        )
    try:
        config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: damaged ({error}); train again with --overwrite") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise InputError(
            f"{file}: not the format {FORMAT} that this version of featcache writes; "
            "give the folder of a run, or train again into another --out"
        )
    return config


@contextmanager
def _serialising(path: Path) -> Iterator[Path]:
    """Like ``replacing``, for libraries that report a full disk in exceptions of their own."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except (RuntimeError, safetensors.SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free
        raise InputError(
            f"{path}: cannot be written ({reason_of(error)}); the disk has {free:,} bytes free; "
            "make room, then run the same command again"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    write_atomically(path, text.encode("utf-8"))


def write_rows(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a small CSV file whole or not at all."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    write_text(path, buffer.getvalue())


def save_weights(path: Path, network: nn.Module) -> None:
    """The state dict as safetensors."""
    # Copies, since safetensors refuses tensors that share memory (tied weights).
    state = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in network.state_dict().items()
    }
    with _serialising(path) as temporary:
        safetensors.torch.save_file(state, temporary)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """A checkpoint, whole or not at all."""
    with _serialising(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """A checkpoint; only tensors and plain values are accepted.

    Raises
    ------
    InputError
        If the file is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise InputError(
            f"{path}: not a readable checkpoint ({reason_of(error)}); train with --overwrite"
        ) from error
    return state
