"""How does a head become the last layer of its network again, in one file that runs anywhere?

The file takes pixels (b, 3, s, s) uint8, as :class:`featcache.views.Preprocessing` makes them, and
gives ``probability`` (b, K) float32 and ``chosen`` (b, K) bool; normalisation is inside. What else
one must know (classes, threshold, preprocessing) is in it as JSON::

    program = torch.export.load("model.pt", extra_files=(extra := {"about.json": ""}))
    about = json.loads(extra["about.json"])
    probability, chosen = program.module()(pixels)

    session = onnxruntime.InferenceSession("model.onnx")
    about = json.loads(session.get_modelmeta().custom_metadata_map["about"])
    probability, chosen = session.run(None, {"pixels": pixels})
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from featcache.atomic import replacing
from featcache.errors import InputError, MissingExtra, reason_of
from featcache.networks import LastLayer, classifier, classifier_name, network_id
from featcache.runs import Run
from featcache.views import Preprocessing, normalise

ABOUT = "about.json"
_TOLERANCE = 1e-3  # of probabilities, between the network here and the one in the file
_TINY = 1e-7  # probabilities are kept this far from 0 and 1 before taking logits
_EXAMPLES = 2  # images that the program is traced with; of one image it would keep the number


@dataclass(frozen=True)
class TunedHead:
    """A head as arrays: p = squash(slope m + intercept), m = (W x + b) / sqrt(1 + pi/8 V x^2).

    Attributes
    ----------
    weight : (K, d)
    bias : (K,)
    threshold : float or (K,)
        Labels with p >= threshold are chosen.
    classes : (K,) str
        They must be those of the run.
    variance : (K, d) or None
        V, the variance of the margin for each squared feature; None: zero.
    slope, intercept : float
    clipped : bool
        Squash by clipping to [0, 1], not by the sigmoid.
    other : TunedHead or None
        With it the probability is share p + (1 - share) p of the other, whose threshold
        does not count.
    share : float
    moved : (K,) or None
        Added to the logits of the probability, in the end.
    """

    weight: np.ndarray
    bias: np.ndarray
    threshold: float | np.ndarray
    classes: np.ndarray
    variance: np.ndarray | None = None
    slope: float = 1.0
    intercept: float = 0.0
    clipped: bool = False
    other: TunedHead | None = None
    share: float = 1.0
    moved: np.ndarray | None = None


class _Tuned(nn.Module):
    """Takes the place of the last layer and makes probabilities."""

    weight: torch.Tensor
    bias: torch.Tensor
    variance: torch.Tensor | None
    moved: torch.Tensor | None

    def __init__(self, head: TunedHead, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled  # features are (b, d, 1, 1)
        self.slope, self.intercept, self.clipped = head.slope, head.intercept, head.clipped
        self.other = None if head.other is None else _Tuned(head.other, pooled)
        self.share = head.share
        for name in ("weight", "bias", "variance", "moved"):
            value = getattr(head, name)
            tensor = None if value is None else torch.from_numpy(np.array(value, np.float32))
            self.register_buffer(name, tensor)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = features.flatten(1) if self.pooled else features
        margin = nn.functional.linear(x, self.weight, self.bias)
        if self.variance is not None:
            noise = nn.functional.linear(x * x, self.variance)
            margin = margin / torch.sqrt(1 + (math.pi / 8) * noise)
        scaled = self.slope * margin + self.intercept
        p = scaled.clamp(0, 1) if self.clipped else torch.sigmoid(scaled)
        if self.other is not None:
            p = self.share * p + (1 - self.share) * self.other(features).flatten(1)
        if self.moved is not None:
            p = p.clamp(_TINY, 1 - _TINY)
            p = torch.sigmoid(torch.log(p) - torch.log(1 - p) + self.moved)
        return p[:, :, None, None] if self.pooled else p


class Exported(nn.Module):
    """Pixels to probabilities and label sets."""

    threshold: torch.Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, head: TunedHead) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing
        threshold = np.broadcast_to(np.asarray(head.threshold, np.float32), len(head.bias))
        self.register_buffer("threshold", torch.from_numpy(threshold.copy()))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probability = self.network(normalise(pixels, self.preprocessing))
        return probability, probability >= self.threshold


@dataclass(frozen=True)
class OwnLayer:
    """What a head must fit to: the last layer of a run's network.

    Attributes
    ----------
    weight : (K, d) float32
    network_id : str
    classes : (K,) str
    """

    weight: np.ndarray
    network_id: str
    classes: np.ndarray


def own_layer(run: Run, network: nn.Module) -> OwnLayer:
    """The last layer of a run's network, as its caches tell it."""
    layer = classifier(network, run.network)
    identity = network_id(network, run.preprocessing, classifier_name(network, run.network))
    return OwnLayer(layer.weight.detach().flatten(1).float().numpy(), identity, run.classes)


def put_back(run: Run, network: nn.Module, head: TunedHead) -> Exported:
    """The network with the head in the place of its last layer, which is changed in place.

    Raises
    ------
    InputError
        If classes or features differ.
    """
    if not np.array_equal(run.classes, head.classes):
        raise InputError(
            f"{run.path}: its {len(run.classes)} classes are not the {len(head.classes)} of the "
            "head, in their order; give the run that the head's caches were extracted with"
        )
    name = classifier_name(network, run.network)
    layer: LastLayer = classifier(network, run.network)
    features = layer.weight.shape[1]
    if head.weight.shape[1] != features:
        raise InputError(
            f"{run.path}: has {features} features, the head was fitted on {head.weight.shape[1]}"
        )
    parent, _, attribute = name.rpartition(".")
    tuned = _Tuned(head, pooled=isinstance(layer, nn.Conv2d))
    setattr(network.get_submodule(parent), attribute, tuned)
    return Exported(network, run.preprocessing, head).eval().requires_grad_(False)


def write_program(
    exported: Exported, out: str | os.PathLike[str], about: dict[str, Any], names: np.ndarray
) -> Path:
    """Write it as a torch program (``.pt``, ``.pt2``) or as ONNX (``.onnx``), checked first.

    Parameters
    ----------
    about : dict
        JSON; preprocessing, classes and threshold are added.
    names : (K,) str
        Of the classes.

    Raises
    ------
    InputError
        If the ending is another one, or the program does not do what the network does.
    MissingExtra
        If ONNX is asked for and not installed.
    """
    target = Path(out)
    if target.suffix not in (".pt", ".pt2", ".onnx"):
        raise InputError(f"{out}: ends in {target.suffix!r}; give a name that ends in .pt or .onnx")
    size = exported.preprocessing.image_size
    chance = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (_EXAMPLES, 3, size, size), generator=chance, dtype=torch.uint8)
    told = json.dumps(about | _facts(exported, names), ensure_ascii=False)
    with torch.no_grad(), _quiet():
        if target.suffix == ".onnx":
            _write_onnx(exported, pixels, target, told)
        else:
            _write_torch(exported, pixels, target, told)
    return target


def _facts(exported: Exported, names: np.ndarray) -> dict[str, Any]:
    threshold = exported.threshold.tolist()
    return {
        "threshold": threshold[0] if len(set(threshold)) == 1 else threshold,
        "names": names.tolist(),
        "preprocessing": asdict(exported.preprocessing),
        "input": "pixels: (b, 3, s, s) uint8, RGB, s = image_size of the preprocessing",
        "output": "probability (b, K) float32, chosen (b, K) bool",
    }


def _traced(exported: Exported, pixels: torch.Tensor) -> Any:
    batch = torch.export.Dim("batch")
    try:
        return torch.export.export(exported, (pixels,), dynamic_shapes=({0: batch},))
    except Exception as error:  # torch raises many kinds of its own
        raise InputError(f"this network cannot be exported by torch: {reason_of(error)}") from error


def _write_torch(exported: Exported, pixels: torch.Tensor, target: Path, told: str) -> None:
    program = _traced(exported, pixels)
    _compare(exported(pixels)[0], program.module()(pixels)[0], target)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={ABOUT: told})
    with replacing(target) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _write_onnx(exported: Exported, pixels: torch.Tensor, target: Path, told: str) -> None:
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ModuleNotFoundError as error:
            raise MissingExtra(package, "onnx") from error
    program = torch.onnx.export(
        _traced(exported, pixels),
        input_names=["pixels"],
        output_names=["probability", "chosen"],
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props["about"] = told
    with replacing(target) as temporary:
        program.save(temporary)
        try:
            import onnxruntime
        except ModuleNotFoundError:
            return  # it can be written without what runs it
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        found = session.run(["probability"], {"pixels": pixels.numpy()})[0]
        _compare(exported(pixels)[0], torch.from_numpy(found), target)


def _compare(wanted: torch.Tensor, found: torch.Tensor, target: Path) -> None:
    error = float((wanted - found).abs().max())
    if not error <= _TOLERANCE:
        raise InputError(
            f"{target}: not written, since its probabilities differ by {error:.2g} from those of "
            "the network; try the other format, .pt or .onnx"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch's exporters say about themselves is of no use to the caller."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
