"""How does a checkpoint from elsewhere become the folder of a run?"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

from featcache import runs
from featcache.atomic import refuse_unwritable_folder
from featcache.errors import InputError, reason_of
from featcache.labelfiles import read_class_table
from featcache.networks import (
    NetworkSpec,
    classifier_name,
    refuse_unfit,
    resolve_preprocessing,
)
from featcache.settings import ImportConfig, parse_channels, parse_kwargs
from featcache.views import Preprocessing

# Where checkpoints keep their weights; averaged weights are those that were evaluated.
PARTS = ("state_dict_ema", "model_ema", "state_dict", "model")
# Written by older versions of PyTorch without it; no part of the function.
OPTIONAL = "num_batches_tracked"
_POINTER = b"version https://git-lfs"
_NAMES = 3

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Imported:
    """What became of a checkpoint.

    Attributes
    ----------
    path : Path
        The folder of the run.
    part : str
        The part of the checkpoint that was taken; empty for all of it.
    preprocessing : Preprocessing
        What extraction will do to images.
    """

    path: Path
    part: str
    preprocessing: Preprocessing


def import_checkpoint(config: ImportConfig) -> Imported:
    """Write a run that holds the network of a checkpoint, ready to extract with.

    Raises
    ------
    InputError
        If the checkpoint does not fit the architecture or the classes, the penultimate
        features of the network cannot be told, or the folder is in use.
    """
    out = Path(config.out)
    _refuse_used(out, config.overwrite)
    names = read_class_table(config.classes, described=False)
    spec = NetworkSpec(config.arch, len(names), parse_kwargs(config.model_kwargs))
    mean, std = parse_channels("--mean", config.mean), parse_channels("--std", config.std)
    if std and min(std) <= 0:
        raise InputError(f"--std {config.std}: give positive numbers")
    network = spec.build().eval()
    state, part = read_state(config.weights, config.part)
    fill(network, spec, unwrapped(state, network), config)
    preprocessing = resolve_preprocessing(
        network, config.image_size, config.crop, config.interpolation, mean, std
    )
    refuse_unfit(network, spec, preprocessing)
    resolved = {
        "format": runs.FORMAT,
        "config": asdict(config),
        "network": asdict(spec),
        "preprocessing": asdict(preprocessing),
        "part": part,
        runs.CLASS_IDS: runs.digest(names),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }
    out.mkdir(parents=True, exist_ok=True)
    for name in runs.FILES:  # those of a run that is replaced; the configuration first
        (out / name).unlink(missing_ok=True)
    runs.write_rows(out / runs.CLASSES, [("label_code", "description"), *names.items()])
    runs.save_weights(out / runs.WEIGHTS, network)
    # Last: a folder with a configuration is a whole run.
    runs.write_text(out / runs.CONFIG, json.dumps(resolved, indent=1) + "\n")
    return Imported(out, part, preprocessing)


def _refuse_used(out: Path, overwrite: bool) -> None:
    refuse_unwritable_folder(out)
    if not out.exists():
        return
    others = [path.name for path in out.iterdir() if path.name not in runs.FILES]
    if others and not (out / runs.CONFIG).is_file():
        raise InputError(
            f"{out}: not a run, since {others[0]} is in it; give another --out or empty the folder"
        )
    if (out / runs.CONFIG).is_file() and not overwrite:
        raise InputError(f"{out}: is a run already; pass --overwrite or choose another --out")


def read_state(path: str, part: str = "") -> tuple[State, str]:
    """Weights of a checkpoint by name, and the part of it that they are.

    Parameters
    ----------
    path : str
        A ``.safetensors`` file, or one of ``torch.save``.
    part : str
        Key under which the weights are; by default the first of :data:`PARTS` that is
        there, and without any the whole file.

    Raises
    ------
    InputError
        If the file is missing, damaged, holds objects that might run code, or has
        no such part.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; check --weights")
    content = _read(path)
    keys = list(content) if isinstance(content, Mapping) else []
    if part and part not in keys:
        raise InputError(f"{path}: has no part {part!r}; choose --part from {_listed(keys)}")
    for key in [part] if part else PARTS:
        if key in keys and isinstance(content[key], Mapping):
            content = content[key]
            part = key
            break
    tensors = (
        isinstance(content, Mapping)
        and content
        and all(isinstance(value, torch.Tensor) for value in content.values())
    )
    if not tensors:
        raise InputError(
            f"{path}: no weights by name in it, but {_listed(keys) or type(content).__name__}; "
            "save model.state_dict(), or say with --part where it is"
        )
    return content, part


def _read(path: str) -> Any:
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise InputError(
                f"{path}: a pointer of git-lfs, not the checkpoint itself; run git lfs pull there"
            )
    if path.endswith(".safetensors"):
        try:
            return safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(
                f"{path}: not a readable safetensors file ({reason_of(error)}); copy it again"
            ) from error
    # timm keeps the options of its training beside the weights; they are plain values. torch
    # before 2.5 has no way to allow them for one file.
    allow = getattr(torch.serialization, "safe_globals", lambda kinds: nullcontext())
    try:
        with allow([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        kind = re.search(r"GLOBAL (\S+)", str(error))
        if kind is None:  # no object of any kind: text, say; torch's own advice is to run it
            raise InputError(
                f"{path}: not a readable checkpoint; copy it again, or save the weights alone as "
                ".safetensors"
            ) from error
        raise InputError(
            f"{path}: holds a {kind[1]}, which might run code; save the weights alone: "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # whatever bytes make of a parser
        raise InputError(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {reason_of(error)}); "
            "copy it again, or save it as .safetensors"
        ) from error


def unwrapped(state: State, network: nn.Module) -> State:
    """Names without what wrappers put before all of them: ``module.``, ``_orig_mod.``, ``model.``.

    A common beginning stays where the network itself has a part of that name.
    """
    own = {name for name, _ in network.named_children()}
    while True:
        first = {name.partition(".")[0] for name in state}
        if len(first) != 1 or first <= own or not all("." in name for name in state):
            return state
        state = {name.partition(".")[2]: value for name, value in state.items()}


def fill(network: nn.Module, spec: NetworkSpec, state: State, config: ImportConfig) -> None:
    """Load the weights, every one of them and no other.

    Raises
    ------
    InputError
        If the number of classes, the names or the shapes differ; names the first few.
    """
    own = network.state_dict()
    last = f"{classifier_name(network, spec)}.weight"
    if last in state and len(state[last]) != spec.num_classes:
        raise InputError(
            f"{config.weights}: its last layer {last} has {len(state[last]):,} outputs, but "
            f"{config.classes} lists {spec.num_classes:,} classes; list those of the checkpoint, "
            "in the order of its outputs"
        )
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    faults = {
        "missing": [name for name in own if name not in state and not name.endswith(OPTIONAL)],
        "unexpected": [name for name in state if name not in own],
        "of another shape": shapes,
    }
    told = [f"{len(found)} {what} ({_listed(found)})" for what, found in faults.items() if found]
    if told:
        raise InputError(
            f"{config.weights}: its weights are not those of --arch {spec.arch!r}: "
            f"{', '.join(told)}; check --arch, --model-kwargs and --part"
        )
    broken = [name for name in own if name in state and not state[name].isfinite().all()]
    if broken:
        raise InputError(
            f"{config.weights}: {_listed(broken)} has a NaN or an infinity; its training has gone "
            "wrong, take an earlier checkpoint"
        )
    network.load_state_dict(dict(state), strict=False)


def _listed(names: Sequence[object]) -> str:
    some = ", ".join(map(str, names[:_NAMES]))
    return some + f" and {len(names) - _NAMES} more" * (len(names) > _NAMES)
