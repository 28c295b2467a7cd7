"""What is in one file of a head, an adapted model or a blend, in one screen?"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from featcache.cacheset import short
from heads import steps
from heads.catalogue import Entry, entry_of, table
from heads.chain import described
from heads.results import honest_text
from heads.storage import DAMAGE, open_content
from heads.stored_adaptation import steps_of
from heads.stored_decisions import read_decision

_MEMBERS = 20  # of a blend, whose commands are shown


def describe(path: str) -> str:
    """Facts, scores, and the command that makes it again.

    Raises
    ------
    ValueError
        If the file is none of ours, or damaged.
    """
    with open_content(path) as file:
        try:
            entry = entry_of(Path(path), file)
            facts = list(_facts(entry, file))
            members = _members(file) if entry.kind == "blend" else []
        except DAMAGE as error:
            raise ValueError(f"{path}: damaged ({error}); make or copy it again") from error
    width = max(len(name) for name, _ in facts)
    lines = [f"{path}: {_title(entry)}"]
    for name, text in facts:
        first, *more = text.splitlines() or [""]
        lines.append(f"  {name:{width}}  {first}".rstrip())
        lines += [" " * (width + 4) + line for line in more]
    lines += ["  made by", f"    {_made_by(entry)}", *members]
    return "\n".join(lines)


def _title(entry: Entry) -> str:
    named = {"head": f"{entry.method} head", "adapted": "adapted model"}
    named["domain head"] = "adapted head of one domain"
    what = named.get(entry.kind, entry.method)
    return f"{what}, {entry.classes:,} classes"


def _facts(entry: Entry, file: h5py.File) -> Iterator[tuple[str, str]]:
    facts = entry.provenance
    network = entry.network
    if entry.network_id and "network" in facts:
        network += f" ({short(entry.network_id)})"
    yield "network", network
    if entry.kind == "head":
        rows, values = file["coef/rows"], file["coef/values"]
        stored = f"{len(rows):,} of {entry.classes:,} classes have weights of their own"
        yield "features", f"{values.shape[1]:,}; {stored}"
    elif entry.kind == "domain head":
        yield "features", f"{file['adapted/source/W'].shape[1]:,}"
    if "cv/dropout" in file:
        yield "rate", _rates(entry, file)
    if "pareto" in facts:
        yield "source weight", _pareto(facts)
    yield f"F{entry.beta:g}", _scores(entry)
    if facts.get("nested"):
        told = honest_text(facts["nested"], facts["nested"]["optimism"])
        yield "left out", textwrap.fill(told, 88)
    places = ["decision"] if "threshold" in facts else ["decision", "adapted/decision"]
    if place := next((place for place in places if place in file), None):
        rule = described(read_decision(file[place], entry.classes))
        tested = facts.get("decision")
        if tested:
            rule += (
                f"\n{tested['score']:.4f} [{tested['low']:.4f}, {tested['high']:.4f}] "
                "cross-validated"
            )
        yield "decision", rule
    domains = [f"{name}: {rows:,} images" for name, rows in entry.domains.items()]
    yield "out of fold", ", ".join(domains) or "nothing kept"
    for name in ("cache", "source"):
        if facts.get(name):
            yield name, str(facts[name])
    if entry.kind == "domain head":
        yield "adaptation", steps.table(steps_of(file["adapted"]))
    elif facts.get("explanation"):
        yield "adaptation", str(facts["explanation"])
    for warning in facts.get("warnings", []):
        yield "note", textwrap.fill(warning, 88)
    yield "versions", ", ".join(f"{k} {v}" for k, v in facts.get("versions", {}).items())


def _scores(entry: Entry) -> str:
    if np.isnan(entry.score):
        return "not recorded"
    text = f"{entry.score:.4f} on the target"
    threshold = entry.provenance.get("threshold")
    if threshold is not None:
        text += f", at the cut {threshold:.4f} that is best for it"
    if not np.isnan(entry.source_score):
        text += f"; {entry.source_score:.4f} on the source, at its own best cut"
    return text


def _rates(entry: Entry, file: h5py.File) -> str:
    tried = zip(file["cv/dropout"][()], file["cv/score"][()], strict=True)
    compared = ", ".join(f"{rate:.3g} ({score:.4f})" for rate, score in tried)
    return textwrap.fill(f"{entry.rate:.3g}, of {compared}", 88)


class Setting(NamedTuple):
    """A row of ``TwoDomainCV.pareto_``."""

    source_weight: float
    dropout: float
    target_score: float
    source_score: float
    efficient: bool
    chosen: bool

    def __str__(self) -> str:
        return f"{self.target_score:.4f}  {self.source_score:.4f}"


def settings(facts: Mapping[str, Any]) -> list[Setting]:
    """What was compared for a head of both domains; of old files a row a weight."""
    rows = dict(facts["pareto"])
    rows.setdefault("chosen", [w == facts["source_weight"] for w in rows["source_weight"]])
    return [Setting(*row) for row in zip(*(rows[key] for key in Setting._fields), strict=True)]


def _pareto(facts: dict[str, Any]) -> str:
    tried = settings(facts)
    front = [row for row in tried if row.efficient or row.chosen]
    compared = ", ".join(
        f"{row.source_weight:g} at {row.dropout:.3g} ({row.target_score:.4f}, "
        f"{row.source_score:.4f}{', chosen' * row.chosen})"
        for row in front
    )
    return textwrap.fill(
        f"{facts['source_weight']:g}, of {len(tried)} pairs of weight and dropout; F on target "
        f"and on source of those that no other beats: {compared}",
        88,
    )


def _members(file: h5py.File) -> list[str]:
    """Weights, names and commands of the models of a blend, the heaviest first."""
    weights, names = file["weights"][()], file["model_names"].asstr()[()]
    order = np.argsort(-weights, kind="stable")
    entries = [entry_of(Path(names[m]), file[f"models/{m}"]) for m in order]
    lines = ["  models"]
    lines += textwrap.indent(table(entries, weights[order]), "    ").splitlines()
    lines.append("  made by")
    lines += [f"    {_made_by(entry)}" for entry in entries[:_MEMBERS]]
    if len(entries) > _MEMBERS:
        lines.append(f"    ... and {len(entries) - _MEMBERS:,} more; `heads info` of each tells")
    return lines


def _made_by(entry: Entry) -> str:
    if entry.kind == "scores":
        return f"somebody else: {entry.provenance['scores']}"
    frozen = "  # then frozen for one domain" * (entry.kind == "domain head")
    return entry.command + frozen if entry.command else "not recorded"
