"""Where does a run stand, and how is its folder begun, taken up again and kept?"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from featcache import runs
from featcache.atomic import clear_leftovers
from featcache.datasets import Data
from featcache.errors import InputError
from featcache.settings import CHANGEABLE, TrainingConfig


@dataclass
class State:
    """Where a run stands; everything that a checkpoint needs besides tensors.

    The order of images, their augmentation and chance inside the network are functions of
    (seed, epoch, step), so these numbers stand for sampler and generators as well.
    """

    epoch: int = 0
    step: int = 0  # within the epoch
    best: float = -math.inf
    reductions: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    finished: bool = False
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)


def open_folder(
    path: Path, resolved: dict[str, Any], data: Data, overwrite: bool
) -> dict[str, Any] | None:
    """Prepare the folder of a run, or return the checkpoint in it.

    Raises
    ------
    InputError
        If the folder holds a run with other settings, or other files.
    """
    for name in runs.FILES:
        clear_leftovers(path / name)
    (path / runs.BAD_BATCH).unlink(missing_ok=True)
    if overwrite:
        # The configuration goes last: a folder without it is not known to be a run.
        for name in reversed(runs.FILES):
            (path / name).unlink(missing_ok=True)
    elif (path / runs.CONFIG).is_file():
        _refuse_difference(path, resolved)
        if (path / runs.CHECKPOINT).is_file():
            return runs.load_checkpoint(path / runs.CHECKPOINT, torch.device("cpu"))
    elif any(not item.name.startswith(".") for item in path.iterdir()):
        raise InputError(f"{path}: not empty and not a run; give another --out or empty the folder")
    # And comes first, for the same reason.
    labels = data.train_labels
    known = resolved | {runs.CLASS_IDS: runs.digest(labels.classes)}
    runs.write_text(path / runs.CONFIG, json.dumps(known, indent=1) + "\n")
    names = labels.classes if labels.names is None else labels.names
    classes = zip(labels.classes, names, strict=True)
    runs.write_rows(path / runs.CLASSES, [("label_code", "description"), *classes])
    held_out = "".join(f"{i}\n" for i in data.validation.ids)
    runs.write_text(path / runs.VALIDATION_IDS, held_out)
    runs.write_text(path / runs.MISSING, "".join(f"{i}\n" for i in data.missing))
    return None


def _refuse_difference(path: Path, resolved: dict[str, Any]) -> None:
    before = _flat(runs.read_config(path))
    now = _flat(json.loads(json.dumps(resolved)))
    differing = [k for k in now if k not in CHANGEABLE and before.get(k) != now[k]]
    if differing:
        table = "\n".join(f"  {k}: {before.get(k)!r} there, {now[k]!r} now" for k in differing)
        raise InputError(
            f"{path}: holds a run with other settings; give another --out, or "
            f"--overwrite to begin anew\n{table}"
        )


def _flat(resolved: dict[str, Any]) -> dict[str, Any]:
    """Settings, and above them what they were resolved to.

    A setting that an earlier version did not know had no other value than its default.
    """
    config = resolved.get("config", {})
    defaults = {f.name: f.default for f in fields(TrainingConfig) if f.default is not MISSING}
    rest = {k: v for k, v in resolved.items() if k != "config"}
    flat = {**defaults, **config, **rest}
    if "micro_batch" not in rest and "batch_size" in config:
        flat["micro_batch"] = min(config["batch_size"], resolved["images"]["train"])
    return flat


def write_log(path: Path, state: State) -> None:
    """``log.csv`` and ``unreadable_images.csv`` as the state has them."""
    if state.log:
        columns = list(state.log[-1])
        # Rows of an earlier version may lack columns.
        rows = [[row.get(column, "") for column in columns] for row in state.log]
        runs.write_rows(path / runs.LOG, [columns, *rows])
    if state.unreadable:
        bad = sorted(state.unreadable.items())
        runs.write_rows(path / runs.UNREADABLE, [("image_id", "reason"), *bad])


def checkpoint(state: State, **parts: Any) -> dict[str, Any]:
    """What is written: the state, and the state dicts of whatever has one; None is left out."""
    return {"state": asdict(state)} | {
        name: part.state_dict() for name, part in parts.items() if part is not None
    }
