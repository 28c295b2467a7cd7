"""How much of a domain shift do adapted heads recover? The table of the quickstart."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, vstack
from scipy.special import expit

from featcache import FeatureCache, Labels
from featcache.annotations import read_labels
from heads import (
    Blend,
    CalibratedDecision,
    DropoutLogisticCV,
    GlobalThreshold,
    bootstrap_interval,
    fbeta_per_image,
)
from heads.decisions import Decision, best_global_threshold
from heads.prediction import Predictor
from heads.storage import Head

ALL, CONCATENATED = "all", "concatenated"  # the networks side by side, and where their caches are
ORACLE_DROPOUT = 0.05  # with thousands of labels the rate hardly matters


def caches_of(out: Path, image_set: str) -> list[Path]:
    """Where the caches of an image set are: those of networks, and of all side by side."""
    together = out / CONCATENATED / image_set
    return [out / "caches" / image_set, *([together] if together.is_dir() else [])]


@dataclass
class Row:
    """One model on all domains: F2 of each image, and the share of the gap that it recovers."""

    network: str
    model: str
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    gaps: dict[str, float] = field(default_factory=dict)


@dataclass
class Scored:
    """Truth of the scored rows of an image set."""

    rows: np.ndarray
    Y: csr_matrix
    missed: np.ndarray


@dataclass
class Recovery:
    """Unadapted heads, adapted heads, their blend and the oracle on every domain.

    The *gap* of a domain is between the unadapted head with the source's cut and the oracle:
    a head towards W0 fitted on thousands of labels in that very typeface. A blend is measured
    between the uniform averages of the networks' unadapted heads and of their oracles.
    """

    out: Path
    data: Path
    target: str
    unseen: Sequence[str]
    networks: Sequence[str]
    seed: int = 0
    rows: list[Row] = field(default_factory=list)

    @staticmethod
    def oracle_folders(target: str, unseen: Sequence[str]) -> list[tuple[str, str]]:
        """(typeface, folder) of the images that oracles train on, beside Stage 1's labelled."""
        pairs = [(target, "source"), (target, "stage_1"), (target, "stage_2")]
        for font in unseen:
            pairs += [(font, "source"), (font, "stage_1"), (font, "stage_2")]
        return pairs

    @property
    def domains(self) -> dict[str, str]:
        """Title of each scored domain by its image set."""
        titles = {"validation": "validation", f"{self.target}_stage_1": f"Stage 1 {self.target}"}
        return titles | {f"{font}_stage_2": f"Stage 2 {font}" for font in self.unseen}

    # -- data ----------------------------------------------------------------------------

    def cache(self, image_set: str, network: str) -> FeatureCache:
        """A cache of the quickstart."""
        return FeatureCache(self.out / "caches" / image_set / f"{network}.h5")

    def truth(self, image_set: str, cache: FeatureCache) -> Scored:
        """Labels of the rows that are scored: all of validation, the rest of Stage 1, Stage 2."""
        if image_set == "validation":
            labels = cache.labels
            assert labels is not None
            return Scored(np.arange(len(cache)), labels.positives, labels.outside)
        font, _, stage = image_set.partition("_")
        labels = self._labels(font, f"{stage}_solution.csv", cache)
        rows = np.flatnonzero(labels.known)
        return Scored(rows, labels.positives[rows], labels.outside[rows])

    def _labels(self, font: str, name: str, cache: FeatureCache) -> Labels:
        return read_labels(self.data / font / name).restrict(cache.classes).select(cache.ids)

    # -- models --------------------------------------------------------------------------

    def measure(self) -> None:
        """Score every model on every domain."""
        unadapted, oracles = {}, {}
        for network in self.networks:
            unadapted[network] = self._unadapted(network)
            for row in (*unadapted[network], *self._heads(network)):
                self.rows.append(row)
            oracles[network] = self._oracle(network)
            self.rows.append(oracles[network][0])
            self._fill_gaps(network)
        self._blends(
            [self._source_probabilities(n) for n in self.networks],
            [oracles[n][1] for n in self.networks],
        )
        self._fill_gaps("blend")

    def _source_probabilities(self, network: str) -> dict[str, np.ndarray]:
        """The network's own last layer on the plain view of every domain."""
        found = {}
        for image_set in self.domains:
            cache = self.cache(image_set, network)
            assert cache.weight is not None
            assert cache.bias is not None
            found[image_set] = expit(cache.x("eval") @ cache.weight.T + cache.bias)
        return found

    def _unadapted(self, network: str) -> list[Row]:
        P = self._source_probabilities(network)
        source = self.truth("validation", self.cache("validation", network))
        cut = best_global_threshold(P["validation"], source.Y, missed=source.missed)[0]
        cache = self.cache(f"{self.target}_stage_1", network)
        assert cache.labels is not None
        known = cache.labels.known
        tuned = best_global_threshold(
            P[f"{self.target}_stage_1"][known],
            cache.labels.positives[known],
            missed=cache.labels.outside[known],
        )[0]
        return [
            self._row(network, "unadapted, source cut", P, cut),
            self._row(network, "unadapted, cut tuned on Stage 1", P, tuned),
        ]

    def _row(
        self, network: str, model: str, P: dict[str, np.ndarray], cut: float | Decision
    ) -> Row:
        row = Row(network, model)
        name = self.networks[0] if network == "blend" else network
        for image_set, proba in P.items():
            truth = self.truth(image_set, self.cache(image_set, name))
            rule = GlobalThreshold.at(cut, proba.shape[1]) if isinstance(cut, float) else cut
            predicted = rule.predict(proba[truth.rows])
            row.scores[image_set] = fbeta_per_image(truth.Y, predicted, missed=truth.missed)
        return row

    def _stored(self, path: Path, network: str, model: str) -> Row:
        """A stored head or blend; validation rows that it was fitted on are scored out of fold."""
        predictors = {
            image_set: Predictor.open(path, caches_of(self.out, image_set))
            for image_set in self.domains
        }
        P = {image_set: predictor.predict_proba() for image_set, predictor in predictors.items()}
        content = predictors["validation"].content
        if isinstance(content, Head) and "source" in content.oof:
            self._put_out_of_fold(P["validation"], content)
        return self._row(network, model, P, predictors["validation"].rule())

    def _put_out_of_fold(self, proba: np.ndarray, head: Head) -> None:
        ids = self.cache("validation", self.networks[0]).ids
        row = {image_id: r for r, image_id in enumerate(ids.tolist())}
        proba[[row[i] for i in head.oof["source"].ids.tolist()]] = head.oof["source"].proba

    def _heads(self, network: str) -> Iterator[Row]:
        titles = {
            "logistic": "logistic on Stage 1",
            "both_logistic": "logistic on Stage 1 + validation",
            "ridge": "ridge on Stage 1",
            "both_ridge": "ridge on Stage 1 + validation",
        }
        for name, title in titles.items():
            yield self._stored(self.out / "heads" / f"{network}_{name}.h5", network, title)

    def _oracle(self, network: str) -> tuple[Row, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """For each target typeface a head fitted on all its unscored characters.

        Returns the row, and (probabilities, out-of-fold ones, truth) of each scored image set.
        """
        row = Row(network, "oracle (labels of that typeface)")
        kept: dict[str, Any] = {}
        for image_set in list(self.domains)[1:]:
            font, _, stage = image_set.partition("_")
            X, Y, scored = [], [], None
            for folder in ("source", "stage_1", "stage_2"):
                cache = self.cache(f"oracle_{font}_{folder}", network)
                labels = self._all_labels(font, folder, cache)
                unscored = np.ones(len(cache), bool)
                if folder == stage:
                    scored = cache
                    unscored[self.truth(image_set, cache).rows] = False
                X.append(cache.x("eval")[unscored])
                Y.append(labels.positives[unscored])
            assert scored is not None
            head = DropoutLogisticCV([ORACLE_DROPOUT], cv=3, random_state=self.seed).fit(
                np.concatenate(X),
                csr_matrix(vstack(Y)),
                coef_init=scored.weight,
                intercept_init=scored.bias,
            )
            held, truth = head.oof_predict_proba_, csr_matrix(vstack(Y))
            P = head.predict_proba(scored.x("eval"))
            kept[image_set] = (P, held, truth)
            rule = CalibratedDecision().fit(held, truth)
            row.scores |= self._row(network, "", {image_set: P}, rule).scores
        return row, kept

    def _all_labels(self, font: str, folder: str, cache: FeatureCache) -> Labels:
        files = {
            "source": ["source_labels.csv"],
            "stage_1": ["tuning_labels.csv", "stage_1_solution.csv"],
            "stage_2": ["stage_2_solution.csv"],
        }[folder]
        labels = read_labels([self.data / font / name for name in files])
        return labels.restrict(cache.classes).select(cache.ids)

    def _blends(self, unadapted: list[Any], oracles: list[Any]) -> None:
        source = self.truth("validation", self.cache("validation", self.networks[0]))
        blend = Blend(method="uniform")
        P = {s: np.mean([p[s] for p in unadapted], axis=0) for s in self.domains}
        blend.fit([P["validation"]], source.Y, missed=source.missed)
        self.rows.append(self._row("blend", "unadapted, source cut", P, blend.threshold_))
        together = self.out / "heads" / f"{ALL}_both_logistic.h5"
        if together.is_file():
            title = "one head on all features, Stage 1 + validation"
            self.rows.append(self._stored(together, "blend", title))
        self.rows.append(self._stored(self.out / "blend.h5", "blend", "adapted heads"))
        row = Row("blend", "oracle (labels of that typeface)")
        for image_set in list(self.domains)[1:]:
            held = np.mean([o[image_set][1] for o in oracles], axis=0)
            rule = CalibratedDecision().fit(held, oracles[0][image_set][2])
            proba = np.mean([o[image_set][0] for o in oracles], axis=0)
            row.scores |= self._row("blend", "", {image_set: proba}, rule).scores
        self.rows.append(row)

    def _fill_gaps(self, network: str) -> None:
        rows = [row for row in self.rows if row.network == network]
        first, last = rows[0], rows[-1]
        for row in rows:
            for image_set in last.scores:
                low, high = first.scores[image_set].mean(), last.scores[image_set].mean()
                row.gaps[image_set] = float((row.scores[image_set].mean() - low) / (high - low))

    # -- output --------------------------------------------------------------------------

    def table(self) -> str:
        """As text: F2 with its bootstrap interval, and gap recovered, for each domain."""
        width = max(len(row.model) for row in self.rows)
        lines = [" " * (width + 9) + "".join(f"{title:>27}" for title in self.domains.values())]
        for row in self.rows:
            cells = [f"{row.network:<8} {row.model:<{width}}"]
            for image_set in self.domains:
                cells.append(f"{self._cell(row, image_set):>27}")
            lines.append("".join(cells))
        return "\n".join(lines)

    def _cell(self, row: Row, image_set: str) -> str:
        if image_set not in row.scores:
            return "-"
        values = row.scores[image_set]
        low, high = bootstrap_interval(values)
        gap = f"{row.gaps[image_set]:+.2f}" if image_set in row.gaps else ""
        return f"{values.mean():.3f} [{low:.3f}, {high:.3f}] {gap:>5}"

    def note(self) -> str:
        """How to read the table."""
        return (
            "mean F2 per image [95 % bootstrap over images] and the share of the gap between\n"
            "the unadapted head (source cut) and the oracle that is recovered. Stage 1 is scored\n"
            "on its unlabelled rest. One seed; no head knows a label of Stage 2."
        )

    def save(self) -> None:
        """``recovery.csv`` and ``recovery.png`` in the output folder."""
        with (self.out / "recovery.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["network", "model", "domain", "f2", "low", "high", "gap_recovered"])
            for row in self.rows:
                for image_set, values in row.scores.items():
                    low, high = bootstrap_interval(values)
                    numbers = [values.mean(), low, high, row.gaps.get(image_set, np.nan)]
                    title = self.domains[image_set]
                    writer.writerow([row.network, row.model, title, *(f"{v:.4f}" for v in numbers)])
        self._draw()

    def _draw(self) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        targets = list(self.domains)[1:]
        models = [row for row in self.rows if row.network == "blend"]
        slim = [row for row in self.rows if row.network == self.networks[0]]
        rows = [*slim, *models]
        figure, axes = plt.subplots(
            1, len(targets), figsize=(4.2 * len(targets), 0.42 * len(rows) + 1.2), sharey=True
        )
        names = [f"{row.network}: {row.model}" for row in rows]
        for axis, image_set in zip(np.atleast_1d(axes), targets, strict=True):
            means = np.array([row.scores[image_set].mean() for row in rows])
            ends = np.array([bootstrap_interval(row.scores[image_set]) for row in rows]).T
            colours = [
                "#999999" if "unadapted" in n else "#c8a24a" if "oracle" in n else "#3a6ea5"
                for n in names
            ]
            axis.barh(names, means, color=colours, xerr=np.abs(ends - means), ecolor="#333333")
            axis.set_title(self.domains[image_set])
            axis.set_xlabel("mean F2 per image")
        np.atleast_1d(axes)[0].invert_yaxis()
        figure.tight_layout()
        figure.savefig(self.out / "recovery.png", dpi=120)
        plt.close(figure)
