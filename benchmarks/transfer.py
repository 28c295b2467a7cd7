"""How much of a shift of domain, of targets or of both is recovered, and is anything harmed?

On the networks of the quickstart, which must have run (``python -m examples.quickstart --out
quickstart``); typefaces that it did not extract are, once, into ``--caches``. Each brush or pen
typeface is Stage 1 in turn, with 1,000 labelled characters; the others, and held-out characters
in the printed typefaces of the source, are what nobody labelled. Everything is scored for the
average of the networks; *side by side* are their features as those of one network (``featcache
concat``), which then counts as much as the average of the networks does; *own statistics* are
those of an image set, here a folder of a typeface, of which batch normalisation takes half
(``featcache extract --domain-statistics 0.5``). *Gap* is between the
unadapted head at the source's cut and the oracle, a head a network, averaged; it is left out where
that is less than 0.05 of F2. A run that was stopped goes on where it was: ``--caches``/cells keeps
a file for each case and step (``ours``, ``himalaya``, ...). Remove those of a step whose code has
changed, and only these are made again. "Against unadapted" is against the better of the unadapted
rows, as it is, and calibrated with expected F; paired by image.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import expit

from benchmarks.measure import RESULTS, first_line, report
from benchmarks.transfer_domains import (
    KINDS,
    OWN_STATISTICS,
    SOURCE,
    Case,
    Pools,
    Shift,
    make_caches,
    make_case,
)
from benchmarks.transfer_methods import (
    ORACLE,
    OURS,
    SIDE_BY_SIDE,
    oracle,
    oracle_side_by_side,
    ours,
    ours_side_by_side,
    unadapted,
    whole_chain,
)
from benchmarks.transfer_peers import (
    Method,
    fine_tuned,
    fine_tuned_side_by_side,
    himalaya,
    scikit_learn,
    torch_adam,
)
from examples.kanji.dataset import TARGET_FONTS
from examples.quickstart import RECIPES
from featcache.atomic import write_atomically
from heads import ExpectedFBeta, bootstrap_interval, fbeta_per_image
from heads.cuts import best_global_threshold
from heads.metrics import paired_bootstrap_interval
from heads.platt import logits

LEAST_GAP = 0.05
UNADAPTED = ("unadapted, source cut", "unadapted, calibrated, expected F")
MILD = ("seto", "yozfont", SOURCE)
STEPS: dict[str, Callable[[Case, Pools], Iterator[tuple[str, Method]]]] = {
    "unadapted": unadapted,
    "scikit_learn": scikit_learn,
    "himalaya": himalaya,
    "torch_adam": torch_adam,
    "fine_tuned": fine_tuned,
    "ours": ours,
    "oracle": oracle,
}
STATISTICS = "own_statistics"  # the step that needs networks in two forms
# What follows a step on the features of all networks at once.
WHOLE = {
    "fine_tuned": fine_tuned_side_by_side,
    "ours": ours_side_by_side,
    "oracle": oracle_side_by_side,
}
COLUMNS = (
    *("shift", "split", "stage_1", "domain", "group", "model", "F2", "low", "high"),
    *("against_unadapted", "against_low", "against_high", "gap", "seconds"),
)


@dataclass(frozen=True)
class Job:
    """One case for all networks."""

    quickstart: Path
    caches: Path
    networks: tuple[str, ...]
    font: str
    kind: str
    split: int

    def file(self, step: str) -> Path:
        """Where its scores are kept, so that a run that was cut short goes on where it stopped."""
        name = f"{self.font}_{self.kind}_{self.split}_{'_'.join(self.networks)}"
        return self.caches / "cells" / name / f"{step}.json"

    def run(self) -> list[dict[str, Any]]:
        """Rows of all cells."""
        missing = [step for step in (*STEPS, STATISTICS) if not self.file(step).is_file()]
        if missing:
            self._measure(missing)
            print(f"{self.font}, {self.kind}, split {self.split}: done", flush=True)
        scored: dict[str, Any] = {}
        for step in (*STEPS, STATISTICS):
            if self.file(step).is_file():  # a peer that is not installed leaves none
                scored |= json.loads(self.file(step).read_text(encoding="utf-8"))
        return list(self._rows(scored))

    def _measure(self, steps: Sequence[str]) -> None:
        pools = [Pools.read(self.quickstart, self.caches, network) for network in self.networks]
        cases = [self._case(own) for own in pools]
        for step in steps:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if step == STATISTICS:
                    blend = self._with_statistics(cases, pools)
                else:
                    parts = [dict(STEPS[step](*each)) for each in zip(cases, pools, strict=True)]
                    blend = {name: _average([part[name] for part in parts]) for name in parts[0]}
                if step in WHOLE and len(pools) > 1:
                    blend |= self._side_by_side(step, pools, blend)
            scored = {
                name: {"seconds": method.seconds, "scores": _scores(method, cases[0])}
                for name, method in blend.items()
            }
            if scored:
                self.file(step).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.file(step), json.dumps(scored).encode())

    def _with_statistics(self, cases: Sequence[Case], pools: Sequence[Pools]) -> dict[str, Method]:
        """Networks that take half of an image set's own statistics, alone and beside the others."""
        own = [Pools.read(self.quickstart, self.caches, n, OWN_STATISTICS) for n in self.networks]
        own_cases = [self._case(each) for each in own]
        before = [dict(unadapted(*each)) for each in zip(own_cases, own, strict=True)]
        plain = _average([whole_chain(*each) for each in zip(cases, pools, strict=True)])
        ours = _average([whole_chain(*each) for each in zip(own_cases, own, strict=True)])
        every = Pools.side_by_side([*pools, *own])
        beside = whole_chain(self._case(every), every)
        beside.seconds /= len(pools)
        everything = _average([plain, ours, beside])
        everything.seconds *= 3
        return {
            f"{UNADAPTED[0]}, own statistics": _average([each[UNADAPTED[0]] for each in before]),
            "ours, own statistics": ours,
            "ours, with and without own statistics side by side": beside,
            "ours, all of these averaged": everything,
        }

    def _case(self, pools: Pools) -> Case:
        return make_case(pools, self.font, Shift(self.kind), self.split)

    def _side_by_side(
        self, step: str, pools: list[Pools], averaged: Mapping[str, Method]
    ) -> dict[str, Method]:
        """All networks as one, and that beside the average of the networks."""
        whole = Pools.side_by_side(pools)
        found = dict(WHOLE[step](self._case(whole), whole))
        for method in found.values():
            method.seconds /= len(pools)
        if step == "ours":
            both = _average([averaged[OURS], found[SIDE_BY_SIDE]])
            both.seconds *= 2
            found["ours, averaged and side by side"] = both
        return found

    def _rows(self, scored: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Of the scores of all models, by image."""
        scores = {
            name: {domain: np.array(values) for domain, values in model["scores"].items()}
            for name, model in scored.items()
        }
        low, high = scores[UNADAPTED[0]], scores[ORACLE]
        for domain in low:
            best = max((scores[name][domain] for name in UNADAPTED), key=lambda v: float(v.mean()))
            room = high[domain].mean() - low[domain].mean()
            for name, by_domain in scores.items():
                values = by_domain[domain]
                interval = bootstrap_interval(values)
                against = paired_bootstrap_interval(values, best)
                gap = (values.mean() - low[domain].mean()) / room if room >= LEAST_GAP else np.nan
                cells = (self.kind, self.split, self.font, domain, _group(self.font, domain), name)
                numbers = (values.mean(), *interval, values.mean() - best.mean(), *against, gap)
                seconds = scored[name]["seconds"]
                yield dict(zip(COLUMNS, (*cells, *numbers, seconds), strict=True))


def _group(font: str, domain: str) -> str:
    """own: Stage 1's typeface; mild: near the source; far: shifted, as is Stage 1, or not."""
    if domain == font:
        return "Stage 1"
    if domain in MILD:
        return "mild"
    return "far" if font not in MILD else "far from mild"


def _average(parts: Sequence[Method]) -> Method:
    known = None
    if parts[0].known is not None:
        known = np.mean([p.known for p in parts if p.known is not None], axis=0)
    tests = {}
    for name in parts[0].tests:
        P = np.stack([p.tests[name] for p in parts])
        if parts[0].average == "logit":
            tests[name] = expit(logits(P).mean(axis=0))
        else:
            tests[name] = P.mean(axis=0)
    return Method(parts[0].rule, known, tests, float(np.mean([p.seconds for p in parts])))


def _scores(method: Method, case: Case) -> dict[str, list[float]]:
    """F2 of each image of each domain."""
    cut = None
    if method.known is not None:
        truth = case.source.Y if method.rule == "source cut" else case.stage_1.Y
        cut = best_global_threshold(method.known, _sparse(truth), 2)[0]
    found = {}
    for name, P in method.tests.items():
        sets = csr_matrix(cut <= P) if cut is not None else ExpectedFBeta(2).fit(P).predict(P)
        found[name] = fbeta_per_image(_sparse(case.tests[name].Y), sets, 2).tolist()
    return found


def _sparse(Y: np.ndarray) -> csr_matrix:
    return csr_matrix(Y.astype(np.float32))


def _run(job: Job) -> list[dict[str, Any]]:
    return job.run()


def summary(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over cells, a row a shift, group and model."""
    keys = dict.fromkeys((c["shift"], c["group"], c["model"]) for c in cells)
    table = []
    for shift, group, model in sorted(keys, key=lambda k: (KINDS.index(k[0]), k[1])):
        part = [c for c in cells if (c["shift"], c["group"], c["model"]) == (shift, group, model)]
        gaps = [c["gap"] for c in part if not np.isnan(c["gap"])]
        harm = [c["against_unadapted"] for c in part]
        row = {
            "shift": shift,
            "group": group,
            "model": model,
            "domains": len(part),
            "F2": float(np.mean([c["F2"] for c in part])),
            "gap": f"{np.mean(gaps):.2f}" if gaps else "-",
            "least gap": f"{min(gaps):.2f}" if gaps else "-",
            "against unadapted": f"{np.mean(harm):+.4f}",
            "worst": f"{min(harm):+.4f}",
            "surely worse": sum(c["against_high"] < 0 for c in part),
            "surely better": sum(c["against_low"] > 0 for c in part),
            "seconds": f"{np.mean([c['seconds'] for c in part]):.1f}",
        }
        table.append(row)
    return table


def _write_cells(cells: list[dict[str, Any]], name: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        print(first_line("Recovered of shifts, every domain"), file=file)
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for cell in cells:
            writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in cell.items()})


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quickstart", type=Path, default=Path("quickstart"))
    parser.add_argument("--caches", type=Path, default=Path("transfer_caches"))
    parser.add_argument("--stage-1", nargs="+", choices=TARGET_FONTS, default=list(TARGET_FONTS))
    parser.add_argument("--shifts", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--splits", type=int, default=2)
    parser.add_argument("--networks", nargs="+", default=[recipe.name for recipe in RECIPES])
    parser.add_argument("--jobs", type=int, default=2, help="cases side by side, a core each")
    parser.add_argument("--quick", action="store_true", help="one network, split and Stage 1")
    arguments = parser.parse_args()
    suffix = ""
    if arguments.quick:
        suffix = "_quick"
        arguments.stage_1, arguments.splits = ["gyosho"], 1
        arguments.networks = arguments.networks[:2][-1:]  # of the quickstart's a small one
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that are started
    make_caches(arguments.quickstart, arguments.caches, arguments.networks)
    jobs = [
        Job(arguments.quickstart, arguments.caches, tuple(arguments.networks), font, kind, split)
        for split in range(arguments.splits)
        for font in arguments.stage_1
        for kind in arguments.shifts
    ]
    if arguments.jobs == 1:
        cells = [cell for job in jobs for cell in job.run()]
    else:
        with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
            cells = [cell for rows in pool.map(_run, jobs) for cell in rows]
    _write_cells(cells, f"transfer_cells{suffix}")
    title = "Recovered of shifts; mean F2 of blended networks"
    report(f"transfer{suffix}", summary(cells), title, ("F2",))


if __name__ == "__main__":
    main()
