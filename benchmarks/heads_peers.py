"""How do others fit the heads of :mod:`benchmarks.heads`?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge

from benchmarks.measure import peer
from featcache import FeatureCache
from heads import DropoutLogisticCV, DropoutRidgeCV, MultilabelGroupKFold
from heads.calibration import fit_platt
from heads.decisions import best_global_threshold
from heads.metrics import average_precision, log_loss

ADAM_STEPS = 300
SAMPLE = 2  # labels that a peer of one label at a time is timed on


@dataclass
class Contest:
    """What all fit: folds of X (n, d), Y (n, K), and penalties rho m_j w_j^2 in each."""

    X: np.ndarray
    Y: np.ndarray
    rho: np.ndarray
    quick: bool = False
    folds: list[tuple[np.ndarray, np.ndarray]] = field(init=False)

    def __post_init__(self) -> None:
        self.folds = list(MultilabelGroupKFold(5).split(self.X, self.Y))

    def scaled(self, train: np.ndarray) -> np.ndarray:
        """Features over sqrt(m), in which the penalty is plain."""
        m = np.einsum("ij,ij->j", self.X[train], self.X[train])
        return self.X * np.divide(1, np.sqrt(m), out=np.zeros_like(m), where=m > 0)


@dataclass(frozen=True)
class Play:
    """A peer: the package that it needs, a run, and the share of the whole work that it does."""

    package: str
    run: Callable[[Contest], Any]
    share: Callable[[Contest], float] = lambda _: 1.0


def ridge_loop(game: Contest) -> np.ndarray:
    """Out-of-fold scores (rates, n, K) by scikit-learn's Ridge, a rate at a time."""
    scores = np.empty((len(game.rho), *game.Y.shape), np.float32)
    for train, test in game.folds:
        Z = game.scaled(train)
        for number, rho in enumerate(game.rho):
            model = Ridge(alpha=rho, solver="cholesky").fit(Z[train], game.Y[train])
            scores[number, test] = model.predict(Z[test])
    return scores


def himalaya_ridge(game: Contest) -> Any:
    """RidgeCV of himalaya on features scaled by all rows; it picks a rate a label."""
    module = peer("himalaya.ridge")
    assert module is not None
    Z = game.scaled(np.arange(len(game.X)))
    return module.RidgeCV(alphas=game.rho, fit_intercept=True, cv=game.folds).fit(Z, game.Y)


def himalaya_kernel(game: Contest) -> Any:
    """KernelRidgeCV of himalaya with a linear kernel; centred here, for it has no intercept."""
    module = peer("himalaya.kernel_ridge")
    assert module is not None
    Z = game.scaled(np.arange(len(game.X)))
    model = module.KernelRidgeCV(alphas=game.rho, kernel="linear", cv=game.folds)
    return model.fit(Z - Z.mean(axis=0), game.Y - game.Y.mean(axis=0))


def _one_label(
    game: Contest, label: int, fold: tuple[np.ndarray, np.ndarray], Z: np.ndarray
) -> Iterator[np.ndarray]:
    """Held-out probabilities of scikit-learn's LogisticRegression at each rate."""
    train, test = fold
    y = game.Y[train, label]
    pi = float(y.mean())
    for rho in game.rho:
        if pi in (0.0, 1.0):
            yield np.full(len(test), (y.sum() + 0.5) / (len(y) + 1))
            continue
        model = LogisticRegression(C=1 / (rho * pi * (1 - pi)), max_iter=1000, tol=1e-4)
        yield model.fit(Z[train], y).predict_proba(Z[test])[:, 1]


def logistic_by_label(game: Contest) -> None:
    """LogisticRegression (lbfgs) of a frequent and a rare label in one fold, at all rates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        Z = game.scaled(game.folds[0][0])
        for label in (2, game.Y.shape[1] // 2)[:SAMPLE]:
            list(_one_label(game, label, game.folds[0], Z))


def torch_dropout(
    game: Contest, rho: float | None = None, fold: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """Held-out probabilities by Adam and sampled dropout, one fold and rate."""
    torch: Any = peer("torch")
    train, test = fold or game.folds[0]
    p = float((rho or 8.0) / (1 + (rho or 8.0)))
    torch.manual_seed(0)
    X, Y = torch.from_numpy(game.X[train]), torch.from_numpy(game.Y[train])
    head = torch.nn.Linear(X.shape[1], Y.shape[1])
    rate = game.Y[train].mean(axis=0).clip(1e-3, 1 - 1e-3)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.from_numpy(np.log(rate / (1 - rate))))
    optimiser = torch.optim.Adam(head.parameters(), lr=1e-3)
    loss_of = torch.nn.BCEWithLogitsLoss(reduction="sum")
    for _ in range(10 if game.quick else ADAM_STEPS):
        optimiser.zero_grad()
        loss = loss_of(head(torch.nn.functional.dropout(X, p)), Y) / len(X)
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        return np.asarray(head(torch.from_numpy(game.X[test])).sigmoid().numpy())


PEERS: dict[str, dict[str, Play]] = {
    "ridge": {
        "scikit-learn Ridge": Play("sklearn", ridge_loop),
        "himalaya RidgeCV": Play("himalaya", himalaya_ridge),
        "himalaya KernelRidgeCV": Play("himalaya", himalaya_kernel),
    },
    "logistic": {
        "scikit-learn lbfgs": Play(
            "sklearn", logistic_by_label, lambda game: SAMPLE / game.Y.shape[1] / len(game.folds)
        ),
        "torch Adam, dropout": Play(
            "torch", torch_dropout, lambda game: 1 / len(game.folds) / len(game.rho)
        ),
    },
}


# ------------------------------------------------------------------- quality


def quality(path: str) -> list[dict[str, object]]:
    """Out-of-fold log-loss, AP and F2 of each contestant on a labelled cache, view 0.

    Each at its best rate by log-loss; ridge scores are made probabilities by one Platt map.
    AP is a mean over labels and folds, since folds have intercepts of their own; F2 is that at
    the best threshold over all images.
    """
    cache = FeatureCache(path)
    rows = cache.training()
    Y = np.asarray(rows["Y"].todense(), np.float32)
    game = Contest(np.ascontiguousarray(rows["X"][:, 0], np.float32), Y, 2.0 ** np.arange(8))
    start = {key: rows[key] for key in ("coef_init", "intercept_init")}
    return [{"head": name} | _scores(game, P) for name, P in _contestants(game, start)]


def _contestants(game: Contest, start: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    rates = tuple((game.rho / (1 + game.rho)).tolist())
    for noise in ("quadratic", "gaussian"):
        for name, more in ((noise, {}), (f"{noise} towards W0", start)):
            head = DropoutLogisticCV(rates, noise=noise, cv=game.folds, scoring="log_loss")
            yield f"this, {name}", head.fit(game.X, game.Y, **more).oof_predict_proba_
    ridge = DropoutRidgeCV(rates, cv=game.folds, scoring="log_loss").fit(game.X, game.Y)
    yield "this, ridge", ridge.oof_predict_proba_
    every = np.ones(len(game.X))
    scores = (fit_platt(s, game.Y, None, every).transform(s) for s in ridge_loop(game))
    yield "scikit-learn Ridge", _best(game, list(scores))
    by_label = np.empty((len(game.rho), *game.Y.shape), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for fold in game.folds:
            Z = game.scaled(fold[0])
            for label in range(game.Y.shape[1]):
                for number, P in enumerate(_one_label(game, label, fold, Z)):
                    by_label[number, fold[1], label] = P
    yield "scikit-learn lbfgs", _best(game, list(by_label))
    if peer("torch") is not None:
        sampled = np.empty((3, *game.Y.shape), np.float32)
        for number, rho in enumerate((0.25, 1.0, 4.0)):
            for fold in game.folds:
                sampled[number, fold[1]] = torch_dropout(game, rho, fold)
        yield "torch Adam, dropout", _best(game, list(sampled))


def _best(game: Contest, candidates: list[np.ndarray]) -> np.ndarray:
    return min(candidates, key=lambda P: log_loss(game.Y, P))


def _scores(game: Contest, P: np.ndarray) -> dict[str, object]:
    folds = [float(average_precision(game.Y[test], P[test])) for _, test in game.folds]
    return {
        "log-loss": log_loss(game.Y, P),
        "AP": float(np.mean(folds)),
        "F2": best_global_threshold(P, game.Y)[1],
    }
