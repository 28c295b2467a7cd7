"""What can be asked of training and of extraction; every field is a command-line option."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from featcache.console import option, required
from featcache.errors import InputError

# Smallest values that make sense.
LEAST_IN_TRAINING: dict[str, float] = {
    "image_size": 1,
    "epochs": 1,
    "batch_size": 1,
    "warmup_steps": 0,
    "patience": 0,
    "max_reductions": 0,
    "clip": 0,
    "micro_batch": 0,
    "randaugment": 0,
    "colour": 0,
    "workers": 0,
    "threads": 0,
    "checkpoint_minutes": 0,
    "seed": 0,
}
LEAST_IN_EXTRACTION: dict[str, float] = {
    "batch_size": 1,
    "workers": 0,
    "threads": 0,
    "domain_statistics": 0,
}
PRECISIONS = ("auto", "bf16", "float32")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
UNLISTED = ("negative", "unknown")
_LABEL_FILES = (
    "; CSV image_id,labels (class ids separated by spaces) or "
    "ImageID,Source,LabelName,Confidence (a label a row; confidence 0: it is not there); an id is "
    "the file's name without its ending"
)


@dataclass(frozen=True)
class TrainingConfig:
    """What a run is made of; every field is an option of ``featcache train``."""

    images: str = required("folder of image files, named by their ids", metavar="DIR")
    labels: list[str] = required(
        "label files; the first one to name a label of an image counts" + _LABEL_FILES,
        action="extend",
        nargs="+",
        metavar="CSV",
    )
    arch: str = required(
        "timm model name, or package.module:factory of your own: called with num_classes=K, "
        "it returns a network that ends in nn.Linear",
        metavar="NAME",
    )
    out: str = required(
        "folder of the run; the same command goes on where it stopped", metavar="RUN"
    )
    classes: str = option(
        "",
        "only these classes, in this order: a file label_code,description or label_code",
        metavar="CSV",
    )
    descriptions: str = option("", "names of classes: label_code,description", metavar="CSV")
    unlisted: str = option("negative", "what a label in no file means", choices=UNLISTED)
    validation: str = option(
        "0.1",
        "hold out: a number of images (chosen by a hash of the id), a share below 1, "
        "or a file of ids",
        metavar="N|FILE",
    )
    image_size: int = option(224, "side of the input in pixels")
    crop: float = option(1.0, "share of the shorter side that the plain view keeps")
    model_kwargs: list[str] = option(
        [], "keyword=value for the network's factory; repeat it", action="append", metavar="K=V"
    )
    augment: str = option(
        "photo", "none, photo, photo-strong, strong, or package.module:function", metavar="NAME"
    )
    least_area: float = option(0.35, "photo: share of the image that a random crop keeps at least")
    no_flip: bool = option(False, "photo: no mirror images")
    colour: float = option(0.3, "photo: how far brightness, contrast, saturation may go from 1")
    randaugment: int = option(0, "photo: magnitude of RandAugment, 1 to 30; 0: as --augment says")
    epochs: int = option(100, "passes over the training images at most")
    batch_size: int = option(256, "images a step, over all processes")
    micro_batch: int = option(
        0,
        "images in one forward pass of one process; gradients add up until a step has its images; "
        "0: all of a process's share at once",
    )
    optimizer: str = option("sgd", "timm optimiser name (sgd has Nesterov momentum)")
    lr: float = option(0.1, "learning rate after warm-up")
    momentum: float = option(0.9, "momentum, or the first beta of Adam's family")
    beta2: float = option(0.99, "second beta of Adam's family")
    weight_decay: float = option(1e-4, "weight decay, not on biases and norms")
    warmup_steps: int = option(500, "steps of linear warm-up")
    schedule: str = option(
        "plateau",
        "plateau: reduce when validation stops improving; cosine: to zero over --epochs",
        choices=["plateau", "cosine"],
    )
    monitor: str = option(
        "f2", "what of validation is to improve: mean F2 or loss", choices=["f2", "loss"]
    )
    patience: int = option(2, "plateau: evaluations without improvement before a reduction")
    reduction: float = option(0.1, "plateau: factor of a reduction")
    max_reductions: int = option(3, "plateau: stop at the next plateau after this many reductions")
    clip: float = option(0.0, "clip the norm of the gradient; 0: do not")
    loss: str = option(
        "bce",
        "bce: cross-entropy summed over classes; asymmetric: timm's, for which sure negatives "
        "hardly count",
        choices=["bce", "asymmetric"],
    )
    smoothing: float = option(0.0, "label smoothing")
    positive_weight: float = option(1.0, "what a missed positive costs against a false one")
    ema: float = option(
        0.0,
        "decay of a moving average of the weights, which is then validated and kept (0.9998, "
        "say; at first it is lower); 0: none",
    )
    precision: str = option(
        "auto",
        "auto is bf16 on CUDA, float32 on a CPU",
        choices=PRECISIONS,
    )
    gradient_checkpointing: bool = option(
        False, "compute activations twice instead of keeping them, where timm can: less memory"
    )
    compile: bool = option(False, "torch.compile the network: faster after minutes of waiting")
    device: str = option("auto", "auto, cpu or cuda", metavar="cpu|cuda")
    workers: int = option(2, "processes that decode and augment, for each process that trains")
    threads: int = option(0, "threads of torch on a CPU; 0: as torch chooses")
    label_cache: str = option(
        "",
        "folder that keeps large label files in a compact form "
        "(default: featcache/ in $XDG_CACHE_HOME or ~/.cache)",
        metavar="DIR",
    )
    checkpoint_minutes: float = option(10.0, "save at least this often, besides every epoch")
    seed: int = option(0, "of weights, order and augmentation")
    overwrite: bool = option(False, "begin anew and replace an existing run")

    def __post_init__(self) -> None:
        _refuse_smaller(self, LEAST_IN_TRAINING)
        if not 0 < self.lr < math.inf:
            raise InputError(f"--lr {self.lr}: give a positive number")
        if not 0 < self.reduction < 1:
            raise InputError(f"--reduction {self.reduction}: give a factor between 0 and 1")
        for name in ("smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: give a share from 0 to below 1")
        if not 0 < self.positive_weight < math.inf:
            raise InputError(f"--positive-weight {self.positive_weight}: give a positive number")
        self._refuse_senseless_photo()

    def _refuse_senseless_photo(self) -> None:
        if not 0 < self.least_area <= 1:
            raise InputError(f"--least-area {self.least_area}: give a share above 0, at most 1")
        if self.randaugment > 30:
            raise InputError(f"--randaugment {self.randaugment}: give at most 30")
        if self.augment in ("photo", "photo-strong"):
            return
        for name in ("least_area", "no_flip", "colour", "randaugment"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                flag = "--" + name.replace("_", "-")
                raise InputError(
                    f"{flag} says how --augment photo works, which --augment {self.augment} is not"
                )


# These may change between two sittings of one run without changing what it computes.
CHANGEABLE = frozenset(
    {"out", "overwrite", "workers", "checkpoint_minutes", "label_cache", "processes"}
)


@dataclass(frozen=True)
class ExtractionConfig:
    """What a cache is made of; every field is an option of ``featcache extract``."""

    run: str = required("folder of a trained network", metavar="RUN")
    images: str = required("folder of image files", metavar="DIR")
    out: str = required("the cache; the same command goes on where it stopped", metavar="CACHE.h5")
    labels: list[str] = option(
        [],
        "label files" + _LABEL_FILES,
        action="extend",
        nargs="+",
        metavar="CSV",
    )
    unlisted: str = option("negative", "what a label in no file means", choices=UNLISTED)
    ids: str = option(
        "", "only these images, in this order: a file with an id a line", metavar="FILE"
    )
    views: str = option(
        "eval",
        "eval; tta: mirror image and crops as well; strong: random ones; "
        "or package.module:function of an augmentation or recipe of your own",
        metavar="eval|tta|strong",
    )
    view_count: int = option(
        4, "views of strong, or of an augmentation of your own, beside the plain one"
    )
    batch_size: int = option(64, "images in a forward pass")
    precision: str = option("auto", "auto is bf16 on CUDA, float32 on a CPU", choices=PRECISIONS)
    device: str = option("auto", "auto, cpu or cuda", metavar="cpu|cuda")
    workers: int = option(2, "processes that decode and render")
    threads: int = option(0, "threads of torch on a CPU; 0: as torch chooses")
    seed: int = option(0, "of what is random: views, images that are looked at for statistics")
    domain_statistics: float = option(
        0.0,
        "share of these images' own statistics in batch normalisation, for images unlike those of "
        "training (0.5 is a good start); 0: as trained. The same for all image sets of a head",
        metavar="SHARE",
    )
    hash_images: bool = option(
        False, "tell images by all of their bytes, not by the sizes of their files alone"
    )
    overwrite: bool = option(False, "replace an existing cache")

    def __post_init__(self) -> None:
        _refuse_smaller(self, LEAST_IN_EXTRACTION)
        if not self.domain_statistics <= 1:
            raise InputError(
                f"--domain-statistics {self.domain_statistics}: give a share from 0 to 1"
            )
        # It is part of the network's id: 1 and 1.0 are one share.
        object.__setattr__(self, "domain_statistics", float(self.domain_statistics))
        default = type(self).__dataclass_fields__["view_count"].default
        if self.views in ("eval", "tta") and self.view_count != default:
            # Recorded, it would tell apart caches that are equal.
            raise InputError(
                f"--view-count {self.view_count} says how many random views there are, and --views "
                f"{self.views} has none; leave it out"
            )


@dataclass(frozen=True)
class ImportConfig:
    """What a run is made of without training; every field is an option of ``featcache import``."""

    arch: str = required(
        "timm model name, or package.module:factory of your own: called with num_classes=K, "
        "it returns a network that ends in nn.Linear",
        metavar="NAME",
    )
    weights: str = required(
        "the checkpoint: .safetensors, or a file of torch.save, of which only tensors and plain "
        "values are read",
        metavar="FILE",
    )
    classes: str = required(
        "the classes in the order of the network's outputs: a file label_code,description or "
        "label_code",
        metavar="CSV",
    )
    out: str = required("folder of the run", metavar="RUN")
    part: str = option(
        "",
        "the part of the checkpoint that holds the weights; without it the first of "
        "state_dict_ema, model_ema, state_dict, model, else all of it",
        metavar="KEY",
    )
    model_kwargs: list[str] = option(
        [], "keyword=value for the network's factory; repeat it", action="append", metavar="K=V"
    )
    image_size: int = option(224, "side of the input in pixels")
    crop: float = option(1.0, "share of the shorter side that the plain view keeps")
    interpolation: str = option("bilinear", "how images are resized", choices=INTERPOLATIONS)
    mean: str = option(
        "", "of each channel on the scale 0 to 1; without it timm's", metavar="R,G,B"
    )
    std: str = option("", "of each channel on the scale 0 to 1; without it timm's", metavar="R,G,B")
    overwrite: bool = option(False, "replace an existing run")


def parse_channels(flag: str, text: str) -> tuple[float, ...]:
    """``"0.5,0.5,0.5"`` -> floats; nothing of an empty text.

    Raises
    ------
    InputError
        If it is not three finite numbers.
    """
    try:
        values = tuple(float(word) for word in text.split(",")) if text else ()
    except ValueError:
        values = (math.nan,)
    if len(values) not in (0, 3) or not all(map(math.isfinite, values)):
        raise InputError(f"{flag} {text!r}: expected three numbers, such as 0.485,0.456,0.406")
    return values


@dataclass(frozen=True)
class MergeConfig:
    """How caches are joined; every field but `parts` is an option of ``featcache merge``."""

    parts: list[str]
    out: str = required("the cache that holds them all", metavar="CACHE.h5")
    mixed: bool = option(
        False,
        "join caches of one network although package versions, device, threads or batch sizes "
        "differ, which changes features by rounding",
    )
    overwrite: bool = option(False, "replace an existing cache")


@dataclass(frozen=True)
class ConcatConfig:
    """Whose features are put side by side; all but `caches` are options of ``featcache concat``."""

    caches: list[str]
    out: str = required("the cache of all features", metavar="CACHE.h5")
    overwrite: bool = option(False, "replace an existing cache")


def _refuse_smaller(config: object, least: dict[str, float]) -> None:
    for name, bound in least.items():
        value = getattr(config, name)
        if not value >= bound:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} {value}: give at least {bound:g}")


def parse_kwargs(pairs: list[str]) -> dict[str, Any]:
    """``["width=16", "act_layer=silu"]`` -> dict; values are JSON where they can be.

    Raises
    ------
    InputError
        If there is no equals sign.
    """
    kwargs: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--model-kwargs {pair!r}: expected keyword=value")
        try:
            kwargs[name] = json.loads(value)
        except json.JSONDecodeError:
            kwargs[name] = value
    return kwargs
