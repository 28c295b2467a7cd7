"""How long do cross-validated heads take, beside peers, and is being fast paid for in quality?

Sizes are those of the challenge: 1,000 labelled images, 2,048 features, 500 labels. Peers fit
the same penalties on the same folds where they can. What would take them hours is timed on a
sample of labels, or for one fold and rate, and multiplied: "(part)" says so. `--cache` names
a labelled cache, such as ``make quickstart`` makes; on it out-of-fold scores are compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.heads_peers import PEERS, Contest, quality
from benchmarks.measure import (
    Timing,
    memory_beyond,
    own_process,
    peer,
    report,
    take_turns,
    timed,
)
from benchmarks.problems import Problem, problem
from heads import DropoutLogisticCV, DropoutRidgeCV

RIDGE_RHO = 0.125 * 2.0 ** np.arange(10)
LOGISTIC_RHO = 2.0 ** np.arange(8)


def rates(rho: np.ndarray) -> tuple[float, ...]:
    """p = rho / (1 + rho)."""
    return tuple((rho / (1 + rho)).tolist())


@dataclass(frozen=True)
class Row:
    """One line of the table: a problem, a head and the seconds to reach."""

    name: str
    make: Callable[[], tuple[Problem, dict[str, Any]]]
    head: Any
    reach: float
    limited_by: str


def _ridge(scoring: str = "mse") -> DropoutRidgeCV:
    return DropoutRidgeCV(rates(RIDGE_RHO), scoring=scoring)


def _logistic(noise: str = "quadratic") -> DropoutLogisticCV:
    return DropoutLogisticCV(rates(LOGISTIC_RHO), noise=noise, scoring="log_loss")


def _plain(**sizes: int) -> Callable[[], tuple[Problem, dict[str, Any]]]:
    return lambda: (problem(**sizes), {})


def _with_source(small: bool) -> Callable[[], tuple[Problem, dict[str, Any]]]:
    def make() -> tuple[Problem, dict[str, Any]]:
        p = problem(**(_SMALL | {"n": 300})) if small else problem(n=6000)
        n = len(p.X)
        weight = np.where(np.arange(n) < n // 6, 1.0, 0.1)
        return p, {"sample_weight": weight}

    return make


_SMALL = {"n": 120, "d": 96, "K": 20}
_REPEATS = 3


def rows(quick: bool) -> list[Row]:
    """All lines; small problems if `quick`."""

    def sized(**sizes: int) -> Callable[[], tuple[Problem, dict[str, Any]]]:
        return _plain(**_SMALL) if quick else _plain(**sizes)

    return [
        Row("ridge 5 x 10, mse", sized(), _ridge(), 0.8, "factorisations, products"),
        Row("ridge 5 x 10, F-beta", sized(), _ridge("fbeta"), np.nan, "scores sorted for cuts"),
        Row("ridge d=4,320", sized(d=4320), _ridge(), 1.5, "products"),
        Row("ridge K=7,178", sized(K=7178), _ridge(), 4.0, "products, memory"),
        Row("ridge n=100,000", sized(n=100_000), _ridge(), 12.0, "products"),
        Row("quadratic 5 x 8", sized(), _logistic(), 4.0, "products of few rows"),
        Row("gaussian 5 x 8", sized(), _logistic("gaussian"), 12.0, "products, expectations"),
        Row("quadratic, 8 views", sized(views=8), _logistic(), 20.0, "products"),
        Row("quadratic, + 5,000 source", _with_source(quick), _logistic(), 20.0, "products"),
        Row("quadratic, K=7,178 of 484", sized(K=7178, present=484), _logistic(), 6.0, "memory"),
    ]


def contest(quick: bool) -> list[dict[str, object]]:
    """Ridge and logistic heads beside their peers, taking turns."""
    p = problem(**_SMALL) if quick else problem()
    found: list[dict[str, object]] = []
    for name, head, rho, peers in (
        ("ridge 5 x 10, mse", _ridge(), RIDGE_RHO, PEERS["ridge"]),
        ("quadratic 5 x 8", _logistic(), LOGISTIC_RHO, PEERS["logistic"]),
    ):
        game = Contest(p.X, p.Y, rho, quick)
        players = {label: play for label, play in peers.items() if peer(play.package) is not None}
        turns: dict[str, Callable[[], Any]] = {"this": partial(head.fit, p.X, p.Y)}
        turns |= {label: partial(play.run, game) for label, play in players.items()}
        times = take_turns(turns, 1 if quick else 3)
        own = times["this"].median
        for label, play in players.items():
            share = play.share(game)
            seconds = times[label].median / share
            part = "" if share == 1 else f" (part: {share:.2g})"
            what = f"{name} against {label}{part}"
            found.append({"what": what, "seconds": own, "peer": seconds, "times": seconds / own})
    return found


def measure(row: Row) -> dict[str, object]:
    """One line: seconds, memory beyond X, what limits it."""
    p, more = row.make()
    small = problem(**_SMALL)
    runs: list[float] = []

    def fit() -> None:
        runs.extend(timed(lambda: row.head.fit(p.X, p.Y, **more), 1).seconds)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row.head.fit(small.X, small.Y)  # libraries and their buffers are there
        held = memory_beyond(fit)
        while len(runs) < _REPEATS:
            fit()
    times = Timing(tuple(runs))
    scores = p.Y.size * 4
    return {
        "what": row.name,
        "seconds": times.median,
        "spread": times.spread,
        "reach": row.reach,
        "MB beyond X": np.nan if held is None else held / 1e6,
        "of X, scores taken off": np.nan if held is None else (held - scores) / p.X.nbytes,
        "best": row.head.best_score_,
        "limited by": row.limited_by,
    }


def alone(name: str, quick: bool) -> dict[str, object]:
    """A line by a process of its own: what others have freed would hide what it takes."""
    found: dict[str, object] = json.loads(
        own_process("benchmarks.heads", f"--row={name}", *(["--quick"] if quick else []))
    )
    return found


def import_seconds() -> list[dict[str, object]]:
    """Seconds of the imports, each in a process of its own."""
    found: list[dict[str, object]] = []
    for what in ("import heads", "from heads import DropoutLogisticCV, DropoutRidgeCV"):
        code = f"import time; t = time.perf_counter(); {what}; print(time.perf_counter() - t)"
        command = [sys.executable, "-c", code]
        runs = [subprocess.run(command, capture_output=True, check=True) for _ in range(5)]
        seconds = sorted(float(run.stdout) for run in runs)
        found.append({"what": what, "seconds": seconds[2], "reach": 1.5})
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the tables and keep them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small problems, as a smoke test")
    parser.add_argument(
        "--cache", default="", help="a labelled cache, such as one of a quickstart: quality"
    )
    parser.add_argument("--only", default="", help="lines whose name contains this")
    parser.add_argument("--row", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.row:
        chosen = next(row for row in rows(options.quick) if row.name == options.row)
        print(json.dumps(measure(chosen)))
        return 0
    quick = "_quick" if options.quick or options.only else ""  # not kept under the whole name
    lines = [
        alone(row.name, options.quick) for row in rows(options.quick) if options.only in row.name
    ]
    if not options.only:
        lines += import_seconds()
    report(f"heads{quick}", lines, "Cross-validated heads; n=1,000 d=2,048 K=500 unless said")
    if not options.only:
        report(f"heads_peers{quick}", contest(options.quick), "The same fits by others, seconds")
    if options.cache:
        report(
            f"heads_quality{quick}", quality(options.cache), "Out-of-fold scores on kanji features"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
