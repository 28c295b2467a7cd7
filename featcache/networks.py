"""Build image networks, and tell the last linear layer and what feeds it."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

from featcache.errors import InputError, reason_of
from featcache.owncode import load_object
from featcache.views import Preprocessing, normalise


@dataclass(frozen=True)
class Facts:
    """What is known of an architecture, so that nobody has to find it out again.

    Attributes
    ----------
    features : int
        Width of the embedding, after pooling and before the last layer.
    channels_last : bool
        Whether its convolutions are faster in channels-last order of memory.
    checkpointing : bool
        Whether timm can compute its activations twice instead of keeping them.
    kwargs : dict
        What its factory is given for training unless the user says otherwise.
    """

    features: int
    channels_last: bool = True
    checkpointing: bool = True
    kwargs: dict[str, Any] = field(default_factory=dict)


# The six of the challenge. Dropout before the last layer is that of the papers: 0.5 of NASNet and
# PNASNet, 0.2 of SENet, none of the others. timm's NASNet and PNASNet have no auxiliary heads, so
# there is nothing to turn off.
FACTS: dict[str, Facts] = {
    "pnasnet5large": Facts(4320, checkpointing=False, kwargs={"drop_rate": 0.5}),
    "nasnetalarge": Facts(4032, checkpointing=False, kwargs={"drop_rate": 0.5}),
    "senet154": Facts(2048, channels_last=False, kwargs={"drop_rate": 0.2}),
    "resnet152": Facts(2048),
    "resnet101": Facts(2048),
    "densenet121": Facts(1024),
}
# What timm's factories are known to raise on keyword arguments that do not fit.
FACTORY_ERRORS = (
    AssertionError,
    AttributeError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class NetworkSpec:
    """What is needed to build a network again.

    Attributes
    ----------
    arch : str
        A timm model name, or ``package.module:factory`` called with ``num_classes=K`` and kwargs.
    num_classes : int
        Outputs of the last layer, K.
    kwargs : dict
        Passed on to the factory.
    """

    arch: str
    num_classes: int
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The network with fresh random weights.

        Raises
        ------
        InputError
            If the name is unknown, the keyword arguments do not fit, or no linear last layer
            with ``num_classes`` outputs can be told.
        """
        if ":" in self.arch:
            factory = load_object(self.arch, "--arch")
        else:
            if not timm.is_model(self.arch):
                close = difflib.get_close_matches(self.arch, timm.list_models(), 3)
                hint = f"; did you mean {' or '.join(close)}?" if close else ""
                raise InputError(
                    f"--arch {self.arch!r} is not a timm model{hint or '; see timm.list_models()'} "
                    "(a network of your own is given as package.module:factory)"
                )
            factory = timm_factory(self.arch)
        try:
            network = factory(num_classes=self.num_classes, **self.kwargs)
        except FACTORY_ERRORS as error:
            raise InputError(
                f"--arch {self.arch!r} with {self.kwargs}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(network, nn.Module):
            raise InputError(
                f"--arch {self.arch!r} returned {type(network).__name__}, no nn.Module"
            )
        classifier(network, self)
        return network

    @property
    def memory_format(self) -> torch.memory_format:
        """The order of memory in which the network's convolutions are fastest."""
        facts = FACTS.get(self.arch)
        last = facts is None or facts.channels_last
        return torch.channels_last if last else torch.contiguous_format


def training_spec(arch: str, num_classes: int, kwargs: dict[str, Any]) -> NetworkSpec:
    """The network for training: what is known to suit it, and above that the user's `kwargs`."""
    known = FACTS[arch].kwargs if arch in FACTS else {}
    return NetworkSpec(arch, num_classes, {**known, **kwargs})


def checkpoint_gradients(network: nn.Module, spec: NetworkSpec) -> None:
    """Let the network compute activations twice instead of keeping them.

    Raises
    ------
    InputError
        If it cannot.
    """
    try:
        enable: Any = network.set_grad_checkpointing  # timm's protocol
        enable(True)
    except (AttributeError, AssertionError) as error:
        raise InputError(
            f"--gradient-checkpointing: {spec.arch!r} cannot do it; "
            "lower --micro-batch instead to save memory"
        ) from error


def timm_factory(arch: str) -> Any:
    """A factory of an untrained timm model."""
    return lambda **kwargs: timm.create_model(arch, pretrained=False, **kwargs)


# A convolution of 1 x 1 on pooled features is a linear layer as well; some timm models end in one.
LastLayer = nn.Linear | nn.Conv2d


def _outputs(layer: object) -> int | None:
    """Outputs of a layer that is linear in a vector of features; None of any other."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
        return layer.out_channels
    return None


def classifier_name(network: nn.Module, spec: NetworkSpec) -> str:
    """Dotted name of the last linear layer: timm's own, else the last with K outputs.

    Raises
    ------
    InputError
        If there is none, so that penultimate features cannot be told.
    """
    named = {id(module): name for name, module in network.named_modules()}
    get_classifier = getattr(network, "get_classifier", None)  # timm's protocol
    if get_classifier is not None:
        last = get_classifier()
        if _outputs(last) == spec.num_classes and id(last) in named:
            return named[id(last)]
    linear = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == spec.num_classes
    ]
    if not linear:
        raise InputError(
            f"--arch {spec.arch!r} has no linear last layer with {spec.num_classes} outputs, "
            "so its penultimate features cannot be told; choose a network that ends in nn.Linear"
        )
    return linear[-1]


def classifier(network: nn.Module, spec: NetworkSpec) -> LastLayer:
    """The last linear layer itself."""
    layer = network.get_submodule(classifier_name(network, spec))
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer


@contextmanager
def recorded_features(layer: LastLayer) -> Iterator[list[torch.Tensor]]:
    """While open, every forward pass leaves the layer's input (b, d) in the yielded list."""
    inputs: list[torch.Tensor] = []

    def record(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        features = arguments[0]
        pooled = isinstance(layer, nn.Conv2d) and features.shape[2:] == (1, 1)
        inputs[:] = [features.flatten(1) if pooled else features]

    handle = layer.register_forward_pre_hook(record)
    try:
        yield inputs
    finally:
        handle.remove()


def head_error(
    features: torch.Tensor, logits: torch.Tensor, layer: LastLayer, least: float = 1.0
) -> float:
    """Largest |features @ W.T + b - logits| / max(least, |logits|); above 0 by rounding alone."""
    again = nn.functional.linear(features, layer.weight.flatten(1), layer.bias)
    return ((again - logits).abs() / logits.abs().clamp(min=least)).max().item()


def refuse_unfit(network: nn.Module, spec: NetworkSpec, preprocessing: Preprocessing) -> None:
    """Try the network on an image of noise, so that what cannot be extracted is never trained.

    Raises
    ------
    InputError
        If it takes no images of that size, makes something else than K logits of one, or
        these are not what its last layer makes of the features.
    """
    layer, size = classifier(network, spec), preprocessing.image_size
    chance = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (1, 3, size, size), generator=chance, dtype=torch.uint8)
    images = normalise(pixels.to(layer.weight.device), preprocessing)
    with torch.no_grad(), recorded_features(layer) as seen:
        try:
            logits = network(images.contiguous(memory_format=spec.memory_format))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"--arch {spec.arch!r} takes no images of {size} x {size} pixels "
                f"({reason_of(error)}); change --image-size or --model-kwargs"
            ) from error
        found = tuple(getattr(logits, "shape", ()))
        if found != (1, spec.num_classes):
            raise InputError(
                f"--arch {spec.arch!r} makes outputs of shape {found} of one image, expected "
                f"(1, {spec.num_classes}); it must end in one linear layer"
            )
        told = bool(seen) and seen[0].shape == (1, layer.weight.shape[1])
        scale = max(float(logits.abs().max()), 1e-6)
        if not told or not head_error(seen[0], logits, layer, scale) <= 1e-3:
            raise InputError(
                f"--arch {spec.arch!r}: its logits are not features @ W0.T + b0 of its last layer "
                f"{classifier_name(network, spec)!r}, so its penultimate features cannot be told; "
                "choose a network that ends in one nn.Linear"
            )


def resolve_preprocessing(
    network: nn.Module,
    image_size: int,
    crop: float = 1.0,
    interpolation: str = "bilinear",
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> Preprocessing:
    """Everything as asked; without a mean or a standard deviation, timm's for this network.

    Raises
    ------
    InputError
        If the size is below 1 or the crop not in (0, 1].
    """
    if image_size < 1 or not 0 < crop <= 1:
        raise InputError(
            f"--image-size {image_size} --crop {crop}: expected at least 1 pixel, and 0 < crop <= 1"
        )
    usual = {"mean": Preprocessing.mean, "std": Preprocessing.std}
    if hasattr(network, "default_cfg") or hasattr(network, "pretrained_cfg"):
        usual = resolve_data_config({}, model=network)
    return Preprocessing(
        image_size, crop, interpolation, mean or tuple(usual["mean"]), std or tuple(usual["std"])
    )


def network_id(network: nn.Module, preprocessing: Preprocessing, layer: str) -> str:
    """sha256 of the sorted state dict's bytes, the preprocessing and the feature layer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name}:{values.dtype}:{tuple(values.shape)}\n".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps(asdict(preprocessing), sort_keys=True).encode())
    digest.update(layer.encode())
    return digest.hexdigest()


def resolve_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises
    ------
    InputError
        If torch knows no such device, or CUDA is asked for and absent.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device {device!r} is unknown; use auto, cpu or cuda") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise InputError(f"--device {device}: torch sees {count} CUDA devices; use --device cpu")
    return chosen


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` is bf16 on CUDA and float32 on a CPU."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" else "float32"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively, so that bf16 is faster than float32."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(precision: str, device: torch.device) -> Any:
    """A context for forward passes in that precision."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
