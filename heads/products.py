"""How do hundreds of heads score a block of rows, at the cost of their matrix products alone?

A blend is a weighted average over models of probabilities or of their logits. Rows of a network
are read and averaged over views once for all its heads. Labels that a head did not train keep
the network's own weights: their margins are made once a network, and a head multiplies by the rows
that it changed. Where logits are averaged, heads whose logits are affine in the features (those
with Platt-scaled margins) add up to one matrix a network before any row is seen.

The noise-averaged logit of a logistic head is mu / sqrt(1 + pi v / 8), v = rho (x * x)' (D * D):
two products, and no logit or exponential of it needs to be taken where logits are averaged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import logit

from heads.calibration import PlattScaling
from heads.dropout import rho_from_dropout
from heads.given import ScoreFile
from heads.logistic import DropoutLogistic, DropoutLogisticCV
from heads.platt import sigmoid
from heads.screening import TINY, space
from heads.storage import Head
from heads.training import view_means

_FAR = float(logit(1 - TINY))
_RUN = 1 << 16  # entries that stay in a core's cache from one operation to the next


class Block:
    """Some rows of the features of one network, and what several heads need of them.

    Parameters
    ----------
    features : (r, v, d)
    own : (K, d) float32 or None
        The network's own last layer W0.
    """

    def __init__(self, features: np.ndarray, own: np.ndarray | None) -> None:
        self.features, self._own = features, own

    @cached_property
    def X(self) -> np.ndarray:
        """(r, d) float32 mean over the views."""
        return view_means(self.features, np.arange(len(self.features)), np.dtype(np.float32))

    @cached_property
    def squares(self) -> np.ndarray:
        """(r, d) x * x."""
        return self.X * self.X

    @cached_property
    def base(self) -> np.ndarray:
        """(r, K) X W0'."""
        assert self._own is not None
        return self.X @ self._own.T

    def prepare(self, *names: str) -> Block:
        """Make now what several threads will read."""
        for name in names:
            getattr(self, name)
        return self


class Term(ABC):
    """What one model, or several that are added up, contribute to an average.

    Attributes
    ----------
    network : int
        Number of the block that it reads.
    weight : float
    logits : bool
        Whether logits are averaged, not probabilities.
    """

    needs: tuple[str, ...] = ("X",)

    def __init__(self, network: int, weight: float, logits: bool) -> None:
        self.network, self.weight, self.logits = network, weight, logits

    @abstractmethod
    def scores(self, block: Block, rows: slice) -> np.ndarray:
        """(r, K) float32: the weighted logits or probabilities of a block, which are `rows`."""

    def _averaged(self, P: np.ndarray) -> np.ndarray:
        """Weighted probabilities, or their logits."""
        averaged = space(P.astype(np.float32), self.logits)
        averaged *= np.float32(self.weight)
        return averaged


@dataclass(frozen=True)
class Margins:
    """W x + b of all labels.

    Attributes
    ----------
    W : (k, d) float32
    b : (K,) float32
    rows : (k,) int or None
        Labels that W is of; None: all.
    own : bool
        Whether the others have the network's own weights; else they have none.
    """

    W: np.ndarray
    b: np.ndarray
    rows: np.ndarray | None = None
    own: bool = False

    @classmethod
    def of(cls, head: Head) -> Margins:
        """Of a linear head, which needs not be complete."""
        rows, W = head.changed()
        b = np.asarray(head.estimator.intercept_, np.float32)
        if not head.by_reference and getattr(head.estimator, "coef_init_", None) is not None:
            return cls(np.asarray(head.estimator.coef_, np.float32), b)
        some = None if len(rows) == len(head.classes) else rows
        return cls(np.asarray(W, np.float32), b, some, own=head.by_reference)

    @property
    def needs(self) -> tuple[str, ...]:
        """Of a block."""
        return ("X", "base") if self.rows is not None and self.own else ("X",)

    def __call__(self, block: Block) -> np.ndarray:
        product = block.X @ self.W.T
        if self.rows is not None:
            shape = len(product), len(self.b)
            whole = block.base.copy() if self.own else np.zeros(shape, np.float32)
            whole[:, self.rows] = product
            product = whole
        product += self.b
        return product

    def full(self, own: np.ndarray | None) -> np.ndarray:
        """(K, d) weights of all labels, float64."""
        if self.rows is None:
            return self.W.astype(np.float64)
        W = np.zeros((len(self.b), self.W.shape[1]))
        if self.own:
            assert own is not None
            W[:] = own
        W[self.rows] = self.W
        return W


class Affine(Term):
    """A head whose logits are affine in its margins: slope (W x + b) + intercept."""

    def __init__(
        self, margins: Margins, scaling: PlattScaling, network: int, weight: float, logits: bool
    ) -> None:
        super().__init__(network, weight, logits)
        self.margins, self.scaling, self.needs = margins, scaling, margins.needs

    def scores(self, block: Block, rows: slice) -> np.ndarray:
        t = self.margins(block)
        for part in _runs(t):
            part *= np.float32(self.scaling.slope)
            part += np.float32(self.scaling.intercept)
            _finish(part, self.logits, self.weight)
        return t


class Sum(Term):
    """Affine heads of one network, their logits added up: one matrix."""

    def __init__(self, terms: Sequence[Affine], own: np.ndarray | None) -> None:
        super().__init__(terms[0].network, 1.0, True)
        W, b = np.zeros((0, 0)), np.zeros(0)
        for term in terms:
            w, scaling = term.weight, term.scaling
            added = term.margins.full(own)
            added *= w * scaling.slope
            W = added if not W.size else W + added
            shift = w * (scaling.slope * term.margins.b.astype(np.float64) + scaling.intercept)
            b = shift if not b.size else b + shift
        self.margins = Margins(W.astype(np.float32), b.astype(np.float32))

    def scores(self, block: Block, rows: slice) -> np.ndarray:
        return self.margins(block)


class Noisy(Term):
    """A logistic head: noise-averaged probabilities."""

    def __init__(
        self, head: Head, own: np.ndarray | None, network: int, weight: float, logits: bool
    ) -> None:
        super().__init__(network, weight, logits)
        self.margins = Margins.of(head)
        self.rho = np.broadcast_to(
            np.asarray(rho_from_dropout(head.estimator.dropout_), np.float32), len(head.classes)
        )
        start = getattr(head.estimator, "coef_init_", None)
        self._start = own if head.by_reference else start
        self.needs = (*self.margins.needs, "squares")

    def _penalised(self) -> np.ndarray:
        """(k, d) rho D * D of the labels that were trained; made anew, as memory is dearer."""
        rows = slice(None) if self.margins.rows is None else self.margins.rows
        D = self.margins.W if self._start is None else self.margins.W - self._start[rows]
        scaled: np.ndarray = D * D
        scaled *= self.rho[rows, None]
        return scaled

    def scores(self, block: Block, rows: slice) -> np.ndarray:
        t = self.margins(block)
        variance = block.squares @ self._penalised().T
        for part, v in zip(_runs(t), _runs(variance, t.shape[1]), strict=True):
            v *= np.float32(np.pi / 8)
            v += 1
            np.sqrt(v, out=v)
            if self.margins.rows is None:
                part /= v
            else:
                part[:, self.margins.rows] /= v
            _finish(part, self.logits, self.weight)
        return t


class Plain(Term):
    """Any other estimator, asked for its probabilities."""

    needs = ()

    def __init__(self, estimator: Any, network: int, weight: float, logits: bool) -> None:
        super().__init__(network, weight, logits)
        self.estimator = estimator

    def scores(self, block: Block, rows: slice) -> np.ndarray:
        return self._averaged(self.estimator.predict_proba(block.features))


class Given(Term):
    """Scores from a file.

    Parameters
    ----------
    file : ScoreFile
    at : (n,) int
        Its row of each image.
    columns : (K,) int
        Its column of each class.
    """

    needs = ()

    def __init__(
        self, file: ScoreFile, at: np.ndarray, columns: np.ndarray, weight: float, logits: bool
    ) -> None:
        super().__init__(0, weight, logits)
        self.file, self.at, self.columns = file, at, columns

    def scores(self, block: Block, rows: slice) -> np.ndarray:
        return self._averaged(self.file.scores(self.at[rows], self.columns))


def term_of(
    head: Head, domain_head: Any, own: np.ndarray | None, network: int, weight: float, logits: bool
) -> Term:
    """The cheapest term that gives a head's probabilities.

    `domain_head` predicts if it is not the head's own estimator.
    """
    estimator = head.estimator
    if domain_head is not estimator:
        return Plain(domain_head, network, weight, logits)
    scaling = getattr(estimator, "calibration_", None)
    if scaling is not None:  # a ridge head's, or a logistic head's with Platt's probabilities
        return Affine(Margins.of(head), scaling, network, weight, logits)
    if isinstance(estimator, (DropoutLogistic, DropoutLogisticCV)):
        return Noisy(head, own, network, weight, logits)
    head.complete(own)
    return Plain(estimator, network, weight, logits)


def collapsed(terms: Sequence[Term], owns: Sequence[np.ndarray | None]) -> list[Term]:
    """The same average in fewer products: affine logits of one network add up to one term.

    A single head's logits are then no longer kept within those of :data:`TINY` and
    1 - :data:`TINY`.
    """
    left = [term for term in terms if not (isinstance(term, Affine) and term.logits)]
    affine: dict[int, list[Affine]] = {}
    for term in terms:
        if isinstance(term, Affine) and term.logits:
            affine.setdefault(term.network, []).append(term)
    return [*left, *(Sum(some, owns[network]) for network, some in affine.items())]


def blended(total: np.ndarray, logits: bool) -> np.ndarray:
    """Probabilities of the sum of all terms."""
    if logits:
        return sigmoid(total)
    return np.minimum(total, 1, out=total)  # rounded weights may add up to a little more


def _finish(t: np.ndarray, logits: bool, weight: float) -> None:
    """Logits to weighted logits or probabilities, in place."""
    if logits:
        np.clip(t, -_FAR, _FAR, out=t)
    else:
        sigmoid(t)
    t *= np.float32(weight)


def _runs(values: np.ndarray, columns: int | None = None) -> list[np.ndarray]:
    """Views of a few rows each; as many as of an array of so many columns."""
    step = max(1, _RUN // max(1, columns or values.shape[1]))
    return [values[start : start + step] for start in range(0, len(values), step)]
