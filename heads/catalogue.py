"""Which heads and blends are in a folder, and what is each?  Read without their arrays."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from featcache.cacheset import short
from featcache.tables import as_text
from heads.storage import DAMAGE, open_content
from heads.stored_adaptation import is_frozen

_SHORT = 6  # characters of an id in a table
SORTS = ("f2", "name", "method", "rate", "network", "source")


@dataclass(frozen=True)
class Entry:
    """What a file says of itself.

    Attributes
    ----------
    path : Path
    kind : "head", "adapted", "domain head", "blend" or, within a blend, "scores"
    method : str
    rate : float or None
        Dropout; the mean where labels have rates of their own.
    network : str
        Name or beginning of the id; of a blend, how many there are.
    network_id : str or None
    classes : int
    domains : dict
        Out-of-fold rows of each domain.
    provenance : dict
    """

    path: Path
    kind: str
    method: str
    rate: float | None
    network: str
    network_id: str | None
    classes: int
    domains: dict[str, int]
    provenance: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """The file's, without ending."""
        return self.path.stem

    @property
    def command(self) -> str:
        """That makes it again."""
        return str(self.provenance.get("command", ""))

    @property
    def score(self) -> float:
        """Out-of-fold F-beta on the target at the best cut."""
        return float(self.provenance.get("score", np.nan))

    @property
    def beta(self) -> float:
        """Of the scores."""
        return float(self.provenance.get("beta", 2.0))

    @property
    def source_score(self) -> float:
        """F-beta on the source at its own best cut; NaN if it was not fitted on both."""
        return float(self.provenance.get("source_score", np.nan))


def read_entry(path: str | os.PathLike[str]) -> Entry:
    """One file's entry; some milliseconds at any size.

    Raises
    ------
    ValueError
        If the file is none of ours, or damaged.
    """
    with open_content(path) as file:
        try:
            return entry_of(Path(path), file)
        except DAMAGE as error:
            raise ValueError(f"{path}: damaged ({error}); make or copy it again") from error


def entry_of(path: Path, file: h5py.Group) -> Entry:
    """Of the group of a head or a blend; `path` is what it is called."""
    facts = json.loads(file.attrs["provenance"])
    domains = {name: len(part["ids"]) for name, part in file.get("oof", {}).items()}
    common: dict[str, Any] = {"path": path, "domains": domains, "provenance": facts}
    if file.attrs["kind"] == "blend":
        models = list(file["models"].values())
        networks = {model.attrs.get("network_id") for model in models}
        params = json.loads(file.attrs["estimator"])["params"]
        return Entry(
            kind="blend",
            method=f"{params['method']} blend of {len(models)}",
            rate=None,
            network=f"{len(networks)} network{'s' * (len(networks) > 1)}",
            network_id=None,
            classes=len(models[0]["classes/id"]),
            **common,
        )
    network_id = file.attrs.get("network_id")
    given = "given" in file.attrs
    kind = "scores" if given else _kind(file)
    return Entry(
        kind=kind,
        # What is told of it may be of the model that it was made by.
        method=kind if kind == "domain head" else str(facts.get("method", "")),
        rate=_rate(file) if kind == "head" else None,
        network="" if given else str(facts.get("network") or short(network_id)),
        network_id=network_id,
        classes=len(file["classes/id"]),
        **common,
    )


def _kind(file: h5py.Group) -> str:
    if "adapted" not in file:
        return "head"
    return "domain head" if is_frozen(file["adapted"]) else "adapted"


def _rate(file: h5py.Group) -> float:
    fitted = json.loads(file.attrs["estimator"])
    if "fitted/dropout_" in file:
        return float(np.mean(file["fitted/dropout_"][()]))
    return float(fitted["fitted"].get("dropout_", fitted["params"].get("dropout", np.nan)))


# ------------------------------------------------------------------------ folders


@dataclass(frozen=True)
class Listing:
    """Entries, and the files that are none, with reasons."""

    entries: list[Entry]
    unreadable: list[str]


def list_entries(places: Sequence[str], sort: str = "f2") -> Listing:
    """Heads and blends of files and folders, best or smallest first.

    Raises
    ------
    ValueError
        If there is no file, or `sort` is not one of :data:`SORTS`.
    """
    if sort not in SORTS:
        raise ValueError(f"--sort {sort}: choose from {', '.join(SORTS)}")
    entries, unreadable = [], []
    for path in files_of(places):
        try:
            entries.append(read_entry(path))
        except ValueError as error:
            unreadable.append(str(error))
    return Listing(sorted(entries, key=lambda entry: _key(entry, sort)), unreadable)


def files_of(places: Sequence[str]) -> list[Path]:
    """The ``.h5`` files of folders, and the files themselves, each once.

    Raises
    ------
    ValueError
        If there is none.
    """
    found: dict[Path, None] = {}
    for place in map(Path, places):
        for path in sorted(place.glob("*.h5")) if place.is_dir() else [place]:
            found.setdefault(path)
    if not found:
        raise ValueError(f"{' '.join(places)}: no .h5 file there; give a folder of heads")
    return list(found)


def _key(entry: Entry, sort: str) -> tuple[Any, ...]:
    number = {
        "f2": -entry.score,
        "source": -entry.source_score,
        "rate": np.nan if entry.rate is None else entry.rate,
    }.get(sort)
    if number is not None:
        return bool(np.isnan(number)), number, entry.name
    return {"method": entry.method, "network": entry.network}.get(sort, ""), entry.name


def table(entries: Sequence[Entry], weights: np.ndarray | None = None) -> str:
    """One line a head, with its weight in a blend if `weights` are given."""
    betas = sorted({f"{entry.beta:g}" for entry in entries})
    header = ["name", "method", "rate", f"F{'/'.join(betas)}", "decided", "source"]
    rows = [
        [
            entry.name,
            entry.method,
            "" if entry.rate is None else f"{entry.rate:.3g}",
            _number(entry.score),
            _number((entry.provenance.get("decision") or {}).get("score", np.nan)),
            _number(entry.source_score),
            ", ".join(f"{name} {rows:,}" for name, rows in sorted(entry.domains.items())[::-1]),
            _network(entry),
        ]
        for entry in entries
    ]
    header += ["out-of-fold images", "network"]
    if weights is not None:
        header = ["weight", *header]
        rows = [[f"{weight:.3f}", *row] for weight, row in zip(weights, rows, strict=True)]
    return as_text(header, rows)


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.4f}"


def _network(entry: Entry) -> str:
    """Its name and the beginning of its id: two networks may have one name."""
    if entry.network_id is None or entry.network == short(entry.network_id):
        return entry.network
    return f"{entry.network} ({entry.network_id[:_SHORT]})"
