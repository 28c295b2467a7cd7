"""How are heads and blends kept in files, and read back to the same bits?

HDF5, no pickle. A group (the whole file of a head, ``/models/0`` ... of a blend) holds

==============================  ====================================================
attribute ``kind``, ``format``  "head" or "blend"; version of this table
attribute ``estimator``,        class, parameters, fitted values of the head
``/fitted``, ``/cv``            (:mod:`heads.stored_estimators`)
``/classes/id``, ``name``       (K,) utf-8
``/coef/rows``, ``/values``     the rows of ``coef_`` that differ from W0, and their numbers
``/coef_init``                  W0 in full, unless attribute ``network_id`` refers to it
``/oof/DOMAIN/ids``, ``proba``  out-of-fold probabilities of each domain, and what is true
                                (``indptr``, ``indices``, ``missed``, maybe ``mask``)
attribute ``given``             instead of ``estimator``, ``coef``: see :mod:`heads.given`
``/adapted/...``                instead of ``estimator``, ``coef``: a model for any domain or,
                                of format 3, for one (:mod:`heads.stored_adaptation`)
``/decision``                   how label sets are made (:mod:`heads.stored_decisions`); files
                                of format 1 have a threshold alone, in ``provenance``
attribute ``provenance``        caches, command, versions, scores (JSON)
==============================  ====================================================
"""

from __future__ import annotations

import json
import numbers
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from featcache.atomic import refuse_unwritable, replacing
from heads.blending import Blend
from heads.decisions import Decision
from heads.domain_heads import DomainHead
from heads.given import GivenScores
from heads.stored_adaptation import ADAPTED, read_adapted, write_adapted
from heads.stored_decisions import plain_params, plain_value, read_decision, write_decision
from heads.stored_estimators import read_estimator, write_estimator
from heads.stored_scores import OutOfFold, put_strings, read_oof, strings, write_oof

FORMAT = 3  # if there is the head of one domain in it, else 2, which older versions read as well
# Of a blend, where they are.
_HONEST = ("domains_", "nested_", "nested_score_", "optimism_")
# What reading a file raises in which something is missing, cut off or of another shape.
DAMAGE = (KeyError, IndexError, TypeError, ValueError, OSError)


@dataclass
class Head:
    """A fitted head with all that a later user must know of it.

    Attributes
    ----------
    estimator : DropoutRidge, DropoutRidgeCV, DropoutLogistic, DropoutLogisticCV, AdaptedModel
        Fitted, of several labels. Or DomainHead; in blends also GivenScores, somebody else's.
    classes, names : (K,) str
    network_id : str or None
        Of the network that its features come from.
    by_reference : bool
        Whether W0 is that network's own last layer, which a cache of it holds too.
    oof : dict of OutOfFold
        By domain: "target" and, where it was fitted on both, "source".
    provenance : dict
        JSON.
    decision : Decision or None
        Fitted on the target's out-of-fold scores; None: `provenance`'s threshold, or the model's.
    """

    estimator: Any
    classes: np.ndarray
    names: np.ndarray
    network_id: str | None = None
    by_reference: bool = False
    oof: dict[str, OutOfFold] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    decision: Decision | None = None
    _changed: tuple[np.ndarray, np.ndarray] | None = None

    def complete(self, weight: np.ndarray | None) -> None:
        """Give a head that was stored by reference its W0 (K, d), so that it can predict.

        Raises
        ------
        ValueError
            If `weight` is missing or of another shape.
        """
        if self._changed is None:
            return
        self.refuse_layer(weight)
        self._set_coef(*self._changed, weight if self.by_reference else None)
        self._changed = None

    def refuse_layer(self, weight: np.ndarray | None) -> None:
        """Refuse a last layer that the head cannot be completed with, if it needs one.

        Raises
        ------
        ValueError
            As :meth:`complete`.
        """
        if self._changed is None or not self.by_reference:
            return
        shape = (len(self.classes), self._changed[1].shape[1])
        if weight is None or weight.shape != shape:
            got = "nothing" if weight is None else f"shape {weight.shape}"
            raise ValueError(
                f"the head holds only what differs from the last layer of network "
                f"{str(self.network_id)[:12]}, which has shape {shape}; got {got}"
            )

    def _set_coef(self, rows: np.ndarray, values: np.ndarray, coef_init: np.ndarray | None) -> None:
        coef = np.zeros((len(self.classes), values.shape[1]), values.dtype)
        if coef_init is not None:
            coef_init = coef_init.astype(values.dtype, copy=False)
            coef[:] = coef_init
        coef[rows] = values
        self.estimator.coef_, self.estimator.coef_init_ = coef, coef_init

    def changed(self) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of coef_ differ from W0, and these rows; it needs not be complete."""
        if self._changed is not None:
            return self._changed
        coef, coef_init = self.estimator.coef_, self.estimator.coef_init_
        changed = (coef != (0 if coef_init is None else coef_init)).any(axis=1)
        return np.flatnonzero(changed).astype(np.int32), coef[changed]


@dataclass
class StoredBlend:
    """A fitted blend with its models.

    Attributes
    ----------
    blend : Blend
        Fitted; ``weights_`` go with `models`.
    models : list of Head
        Without out-of-fold scores and decisions.
    model_names : list of str
        The files that they came from.
    oof : dict of OutOfFold
        Of the blend.
    provenance : dict
        JSON.
    decision : Decision or None
        Fitted on the out-of-fold scores of the blend; None: the threshold of `blend`.
    """

    blend: Blend
    models: list[Head]
    model_names: list[str]
    oof: dict[str, OutOfFold] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    decision: Decision | None = None


def save(
    path: str | os.PathLike[str], content: Head | StoredBlend, overwrite: bool = False
) -> Path:
    """Write a head or a blend; the file appears whole or not at all.

    Raises
    ------
    ValueError
        If the file exists and `overwrite` is False, or the head is of a kind unknown here, of a
        1-D target, or has not one class and name a label.
    """
    target = Path(path)
    refuse_existing(target, overwrite)
    with replacing(target) as temporary, h5py.File(temporary, "w") as file:
        if isinstance(content, Head):
            _write_head(file, content)
        else:
            _write_blend(file, content)
    return target


def refuse_existing(
    path: str | os.PathLike[str], overwrite: bool, inputs: Iterable[str] = ()
) -> None:
    """A result must not replace what is there, unless asked to; never a folder or what it is of.

    Raises
    ------
    ValueError
        Naming the path and the remedy.
    """
    refuse_unwritable(path)
    if os.path.exists(path) and not overwrite:
        raise ValueError(f"{path}: exists already; pass --overwrite or choose another --out")
    if os.path.exists(path) and any(os.path.samefile(path, i) for i in inputs if os.path.exists(i)):
        raise ValueError(f"{path}: is what the result is to be made of; choose another --out")


def load(path: str | os.PathLike[str], mapped: bool = False) -> Head | StoredBlend:
    """Read a head or a blend.

    A head that refers to the last layer of its network, and the heads of a blend, predict only
    after :meth:`Head.complete`; :class:`heads.prediction.Predictor` sees to that. `mapped`:
    out-of-fold scores are mapped, not read.

    Raises
    ------
    ValueError
        If the file is none of ours, damaged, or of a newer format.
    """
    with open_content(path) as file:
        try:
            return _read_head(file, mapped) if file.attrs["kind"] == "head" else _read_blend(file)
        except DAMAGE as error:
            raise ValueError(f"{path}: damaged ({error}); make or copy it again") from error


def open_content(path: str | os.PathLike[str]) -> h5py.File:
    """The file of a head or a blend, opened for reading.

    Raises
    ------
    ValueError
        If the file is none of ours, or of a newer format.
    """
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        reason = "no such file" if not os.path.exists(path) else f"not an HDF5 file ({error})"
        reason = "is a folder" if os.path.isdir(path) else reason
        raise ValueError(f"{path}: {reason}; give a file made by `heads fit` or `blend`") from error
    kind, version = file.attrs.get("kind"), file.attrs.get("format")
    ours = str(kind) in ("head", "blend") and isinstance(version, numbers.Integral)
    if ours and version <= FORMAT:
        return file
    file.close()
    if not ours:
        raise ValueError(f"{path}: no head or blend; give a file of `heads fit` or `heads blend`")
    raise ValueError(f"{path}: format {version}, this version reads up to {FORMAT}; upgrade")


# ------------------------------------------------------------------------ heads


def _write_head(group: h5py.Group, head: Head) -> None:
    _put_attributes(group, kind="head", format=_format([head]), provenance=head.provenance)
    put_strings(group, "classes/id", head.classes)
    put_strings(group, "classes/name", head.names)
    if head.network_id is not None:
        group.attrs["network_id"] = head.network_id
    if isinstance(head.estimator, GivenScores):
        _put_attributes(group, given=asdict(head.estimator))
        _check_labels(head, len(head.classes))
    elif isinstance(head.estimator, ADAPTED):
        write_adapted(group.create_group("adapted"), head.estimator)
        _check_labels(head, len(head.estimator.source.head.b))
    else:
        write_estimator(group, head.estimator)
        _check_labels(head, len(head.estimator.intercept_))
        group.attrs["by_reference"] = head.by_reference
        if not head.by_reference and head.estimator.coef_init_ is not None:
            group["coef_init"] = head.estimator.coef_init_
        group["coef/rows"], group["coef/values"] = head.changed()
    write_oof(group, head.oof)
    if head.decision is not None:
        write_decision(group.create_group("decision"), head.decision)


def _check_labels(head: Head, n_labels: int) -> None:
    """Classes and names must be as many as the labels that the estimator was fitted on."""
    for what, given in (("classes", head.classes), ("names", head.names)):
        if len(given) != n_labels:
            raise ValueError(f"there are {len(given)} {what} for {n_labels} labels; give one each")


def _read_head(group: h5py.Group, mapped: bool = False, lazy: bool = False) -> Head:
    """`lazy`: weights are left as they are stored, of changed rows only, until completed."""
    classes = strings(group, "classes/id")
    decision = _read_decision(group, len(classes))
    estimator: Any
    if "given" in group.attrs:
        estimator = GivenScores(**json.loads(group.attrs["given"]))
    elif "adapted" in group:
        estimator = read_adapted(group["adapted"], len(classes), decision)
    else:
        estimator = read_estimator(group, len(classes))
    head = Head(
        estimator=estimator,
        classes=classes,
        names=strings(group, "classes/name"),
        network_id=group.attrs.get("network_id"),
        by_reference=bool(group.attrs.get("by_reference", False)),
        oof=read_oof(group, mapped),
        provenance=json.loads(group.attrs["provenance"]),
        decision=decision,
    )
    if not isinstance(estimator, (GivenScores, *ADAPTED)):
        rows, values = group["coef/rows"][()], group["coef/values"][()]
        if head.by_reference or (lazy and "coef_init" not in group):
            head._changed = rows, values
        else:
            head._set_coef(rows, values, group["coef_init"][()] if "coef_init" in group else None)
    return head


# ----------------------------------------------------------------------- blends


def _write_blend(group: h5py.Group, stored: StoredBlend) -> None:
    blend = stored.blend
    kept = ("threshold_", "score_", "n_features_in_", *(k for k in _HONEST if hasattr(blend, k)))
    fitted = {key: plain_value(getattr(blend, key)) for key in kept}
    _put_attributes(
        group,
        kind="blend",
        format=_format(stored.models),
        estimator={"params": plain_params(blend), "fitted": fitted},
        provenance=stored.provenance,
    )
    group["weights"] = blend.weights_
    for name in ("path", "pareto"):
        for key, value in getattr(blend, f"{name}_", {}).items():
            group[f"{name}/{key}"] = value
    put_strings(group, "model_names", np.array(stored.model_names))
    for m, model in enumerate(stored.models):
        _write_head(group.create_group(f"models/{m}"), model)
    write_oof(group, stored.oof)
    if stored.decision is not None:
        write_decision(group.create_group("decision"), stored.decision)


def _read_blend(group: h5py.Group) -> StoredBlend:
    spec = json.loads(group.attrs["estimator"])
    blend = Blend(**spec["params"])
    for key, value in spec["fitted"].items():
        setattr(blend, key, value)
    blend.weights_ = group["weights"][()]
    blend.path_ = {key: value[()] for key, value in group["path"].items()}
    if "pareto" in group:
        blend.pareto_ = {key: value[()] for key, value in group["pareto"].items()}
    names = strings(group, "model_names").tolist()
    return StoredBlend(
        blend=blend,
        models=[_read_head(group[f"models/{m}"], lazy=True) for m in range(len(names))],
        model_names=names,
        oof=read_oof(group),
        provenance=json.loads(group.attrs["provenance"]),
        decision=_read_decision(group, blend.n_features_in_),
    )


# ------------------------------------------------------------------------ parts


def _format(heads: Iterable[Head]) -> int:
    return FORMAT if any(isinstance(head.estimator, DomainHead) for head in heads) else 2


def _read_decision(group: h5py.Group, n_labels: int) -> Decision | None:
    return read_decision(group["decision"], n_labels) if "decision" in group else None


def _put_attributes(group: h5py.Group, **values: Any) -> None:
    for key, value in values.items():
        group.attrs[key] = json.dumps(value) if isinstance(value, dict) else value
