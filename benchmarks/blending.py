"""How long does it take to choose the weights of 300 models, and what is the choice worth?

The plain call draws scores; ``--transfer`` takes heads on the caches of the quickstart. A peer that
scores every candidate at every step is timed on a sample of them. What AutoGluon does
(F2 at a cut of 0.5) is written here, with counts that are exact.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, vstack
from scipy.special import expit

from benchmarks.blending_chain import chain
from benchmarks.blending_transfer import transfer
from benchmarks.measure import own_process, peak_memory, report, timed
from heads import Blend, bootstrap_interval, fbeta_per_image
from heads.cuts import apply_threshold, best_global_threshold

FAMILIES = 6  # models of one network are alike
SAMPLE = 20  # candidates that the naive selector is timed on


@dataclass(frozen=True)
class Drawn:
    """Scores of M models on some images, float16, and the truth."""

    P: np.ndarray
    Y: csr_matrix


def drawn(M: int, n: int, K: int, seed: int, out: np.ndarray | None = None) -> Drawn:
    """Families of models with noise in common and of their own; some seven labels an image."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, K + 1)
    rate = np.minimum(3 * share / share.sum(), 0.5)
    base = (1.2 * np.log(rate / (1 - rate)) - 2).astype(np.float32)
    signal = base + 3.5 * rng.standard_normal((n, K), np.float32)
    Y = csr_matrix(rng.random((n, K), np.float32) < expit(signal), dtype=np.float64)
    families = rng.standard_normal((FAMILIES, n, K), np.float32)
    P = np.empty((M, n, K), np.float16) if out is None else out
    fixed = np.random.default_rng(0)  # a model is the same on all rows
    for m in range(M):
        common, own = fixed.uniform(0.7, 1.3), fixed.uniform(0.25, 0.75)
        margin = signal + common * families[m % FAMILIES]
        margin += own * rng.standard_normal((n, K), np.float32)
        np.divide(1, 1 + np.exp(-margin, out=margin), out=margin)
        P[m] = margin
    return Drawn(P, Y)


# -------------------------------------------------------------------------- peers


def naive_seconds(data: Drawn, steps: int) -> float:
    """What scoring all candidates of all steps in full would take, from some of the first."""
    total = data.P[:10].astype(np.float32).sum(axis=0)
    some = data.P[:SAMPLE]

    def score_all() -> None:
        for p in some:
            best_global_threshold((total + p) / 11, data.Y)

    return timed(score_all, 1).median / len(some) * len(data.P) * steps


def at_half(data: Drawn, steps: int) -> np.ndarray:
    """Weights of greedy selection by F2 at a cut of 0.5, all candidates scored in full."""
    M, truth = len(data.P), data.Y.toarray() > 0
    true = truth.sum(axis=1)
    total = np.zeros(truth.shape, np.float32)
    added: list[int] = []
    values: list[float] = []
    while len(added) < steps:
        cut = np.float32(0.5 * (len(added) + 1))
        found = np.empty(M)
        for m, p in enumerate(data.P):
            chosen = total + p >= cut
            right = (chosen & truth).sum(axis=1)
            below = 4 * true + chosen.sum(axis=1)
            found[m] = np.where(below > 0, 5 * right / np.maximum(below, 1), 1).mean()
        added.append(int(found.argmax()))
        values.append(float(found.max()))
        total += data.P[added[-1]]
    counts = np.bincount(added[: int(np.argmax(values)) + 1], minlength=M)
    return counts / counts.sum()


# -------------------------------------------------------------------------- rows


def _mean(P: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = np.zeros(P.shape[1:], np.float32)
    for m in np.flatnonzero(weights):
        total += np.float32(weights[m]) * P[m]
    return total


def held_out(
    fitted: Drawn, unseen: Drawn, weights: np.ndarray, cut: float | None = None
) -> dict[str, Any]:
    """F2 of images that chose neither weights nor cut (None: the best one of those that did)."""
    if cut is None:
        cut = best_global_threshold(_mean(fitted.P, weights), fitted.Y)[0]
    values = fbeta_per_image(unseen.Y, apply_threshold(_mean(unseen.P, weights), cut))
    low, high = bootstrap_interval(values)
    return {"held-out F2": float(values.mean()), "low": low, "high": high}


def one_domain(M: int, n: int, K: int, steps: int) -> list[dict[str, Any]]:
    """Our methods and the peers on one domain; ratios to the greedy method."""
    data, unseen = drawn(M, n, K, 1), drawn(M, n, K, 2)
    size = f"{M} x {n:,} x {K}, {steps} steps"
    run = timed(lambda: Blend(max_steps=steps, patience=steps).fit(data.P, data.Y), 1)
    greedy, seconds = run.result, run.median
    again = best_global_threshold(_mean(data.P, greedy.weights_), data.Y)[1]
    rows: list[dict[str, Any]] = [
        {"what": "greedy, own cut", "size": size, "seconds": seconds, "ratio": 1.0}
        | held_out(data, unseen, greedy.weights_)
        | {"F2": greedy.score_, "recomputed": again}
    ]
    naive = naive_seconds(data, steps)
    rows.append({"what": "naive greedy, own cut (extrapolated)", "size": size, "seconds": naive})
    half = timed(lambda: at_half(data, steps), 1)
    rows.append(
        {"what": "greedy at 0.5, cut 0.5", "size": size, "seconds": half.median}
        | held_out(data, unseen, half.result, 0.5)
    )
    rows.append(
        {"what": "greedy at 0.5, then the best cut", "size": size, "seconds": half.median}
        | held_out(data, unseen, half.result)
    )
    others: dict[str, Callable[[], Any]] = {
        "simplex, log-loss": lambda: Blend(method="simplex").fit(data.P, data.Y),
        "simplex, squared": lambda: Blend(method="simplex", loss="squared").fit(data.P, data.Y),
        "uniform": lambda: Blend(method="uniform").fit(data.P, data.Y),
    }
    for what, fit in others.items():
        done = timed(fit, 1)
        rows.append(
            {"what": what, "size": size, "seconds": done.median}
            | held_out(data, unseen, done.result.weights_)
            | {"F2": done.result.score_}
        )
    single = np.eye(M)[greedy.path_["model"][0]]
    rows.append({"what": "best model", "size": size} | held_out(data, unseen, single))
    for row in rows:
        if "seconds" in row:
            row["ratio"] = row["seconds"] / seconds
    return rows


def two_domains(
    M: int, n: int, n_source: int, K: int, steps: int, source_rows: int | None
) -> list[dict[str, Any]]:
    """The greedy method with a source domain."""
    P = np.empty((M, n + n_source, K), np.float16)
    target, source = drawn(M, n, K, 1, P[:, :n]), drawn(M, n_source, K, 3, P[:, n:])
    truth = csr_matrix(vstack([target.Y, source.Y]))
    domains = np.repeat(["target", "source"], [n, n_source])
    blend = Blend(max_steps=steps, patience=steps, source_rows=source_rows)
    run = timed(lambda: blend.fit(P, truth, domains), 1)
    weight = np.where(domains == "target", 1 / n, 1 / n_source)
    again = best_global_threshold(_mean(P, blend.weights_), truth, sample_weight=weight)[1]
    drawn_rows = "all" if source_rows is None else f"{source_rows:,}"
    return [
        {
            "what": f"greedy, two domains, {drawn_rows} rows of the source choose",
            "size": f"{M} x ({n:,} + {n_source:,}) x {K}, {steps} steps",
            "seconds": run.median,
            "F2": blend.score_,
            "recomputed": again,
        }
    ]


def from_disk(M: int, n: int, K: int, steps: int) -> dict[str, Any]:
    """Files of one model each, read by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        P = np.empty((1, n, K), np.float16)
        rng = np.random.default_rng(0)
        share = 1 / np.arange(1, K + 1)
        base = np.log(np.minimum(4 * share / share.sum(), 0.5)).astype(np.float32) - 3
        signal = base + 3 * rng.standard_normal((n, K), np.float32)
        Y = rng.random((n, K), np.float32) < expit(signal)
        np.save(f"{folder}/truth.npy", np.argwhere(Y))
        for m in range(M):
            margin = signal + rng.uniform(0.5, 1.5) * rng.standard_normal((n, K), np.float32)
            P[0] = 1 / (1 + np.exp(-margin))
            np.save(f"{folder}/{m:03}.npy", P[0])
        size = sum(path.stat().st_size for path in Path(folder).glob("*.npy"))
        text = own_process("benchmarks.blending", "--from", folder, "--steps", str(steps))
    seconds, score, memory = (float(part) for part in text.split())
    return {
        "what": f"greedy from files of {size / 2**30:.1f} GiB",
        "size": f"{M} x {n:,} x {K:,}, {steps} steps",
        "seconds": seconds,
        "F2": score,
        "peak memory, GiB": memory,
    }


def _fit_files(folder: Path, steps: int) -> None:
    files = sorted(folder.glob("[0-9]*.npy"))
    at = np.load(folder / "truth.npy")
    shape = np.load(files[0], mmap_mode="r").shape
    Y = csr_matrix((np.ones(len(at)), at.T), shape=shape)
    start = time.perf_counter()
    blend = Blend(max_steps=steps, patience=steps).fit(files, Y)
    print(time.perf_counter() - start, blend.score_, peak_memory() / 2**30)


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument(
        "--parts", nargs="+", choices=("one", "two", "disk", "chain"), default=["one", "two"]
    )
    parser.add_argument("--transfer", action="store_true", help="F2 on the quickstart's domains")
    parser.add_argument("--caches", type=Path, default=Path("quickstart/caches"))
    parser.add_argument("--from", dest="folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=50, help="of the greedy method")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        _fit_files(arguments.folder, arguments.steps)
        return 0
    suffix = "_quick" if arguments.quick else ""
    if arguments.transfer:
        title = "F2 of blends, 95 % bootstrap over images"
        report(f"blending_transfer{suffix}", transfer(arguments.caches, arguments.quick), title)
        return 0
    M, n, n_source, K, steps = (
        (12, 200, 400, 60, 5) if arguments.quick else (300, 1000, 10_000, 500, arguments.steps)
    )
    rows: list[dict[str, Any]] = []
    if "one" in arguments.parts:
        rows += one_domain(M, n, K, steps)
    if "two" in arguments.parts:
        rows += two_domains(M, n, n_source, K, steps, n if arguments.quick else 2000)
    if "chain" in arguments.parts:
        rows += chain(M, n, 64 if arguments.quick else 2048, K, steps)
    if "disk" in arguments.parts:
        rows.append(from_disk(M, n, 10 * K if arguments.quick else 7178, steps))
    parts = "" if len(arguments.parts) > 1 else f"_{arguments.parts[0]}"
    report(
        f"blending{parts}{suffix}",
        rows,
        "Choosing weights and cut; held-out F2 on as many new images",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
