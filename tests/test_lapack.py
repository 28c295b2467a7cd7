"""Factorisations are those of numpy, by either way to LAPACK, and errors are not lost."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from heads import lapack
from heads.lapack import cholesky, cholesky_solve, eigh

Ways = pytest.mark.parametrize("direct", [True, False])
Types = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture
def way(direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lapack._is_plain("potrf", np.dtype(np.float32))
    if not direct:
        monkeypatch.setattr(lapack, "_is_plain", lambda *_: False)


def positive(n: int, dtype: type, seed: int = 0) -> np.ndarray:
    X = np.random.default_rng(seed).normal(size=(2 * n + 3, n))
    return (X.T @ X / n + np.eye(n)).astype(dtype)


@Ways
@Types
@pytest.mark.parametrize("n", [0, 1, 2, 7, 150])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.usefixtures("way")
def test_systems_are_solved(n: int, dtype: type, order: str, direct: bool) -> None:
    A = positive(n, dtype)
    rng = np.random.default_rng(1)
    B = np.array(rng.normal(size=(n, 5)), order=order)  # float64: given in another type
    before, atol = B.copy(), 1e-3 if dtype is np.float32 else 1e-10
    factor = cholesky(A.copy(order))
    assert_allclose(np.tril(factor), np.linalg.cholesky(A), atol=atol)
    solved = cholesky_solve(factor, B)
    assert solved.dtype == dtype
    assert_allclose(A @ solved, B, atol=atol)
    assert_array_equal(B, before)


@Ways
@Types
@pytest.mark.parametrize("n", [0, 1, 2, 7, 150])
@pytest.mark.usefixtures("way")
def test_eigenvectors_turn_a_matrix_into_its_eigenvalues(n: int, dtype: type, direct: bool) -> None:
    A = positive(n, dtype) if n else np.zeros((0, 0), dtype)
    before = A.copy()
    values, vectors = eigh(A)
    atol = 1e-4 if dtype is np.float32 else 1e-11
    assert values.dtype == vectors.dtype == dtype
    assert_allclose(values, np.linalg.eigvalsh(before), atol=atol)
    assert_allclose(vectors.T @ vectors, np.eye(n), atol=atol)
    assert_allclose(vectors @ np.diag(values) @ vectors.T, before, atol=atol)
    assert_array_equal(A, before)


@Ways
@Types
@pytest.mark.usefixtures("way")
def test_what_is_not_positive_definite_is_refused(dtype: type, direct: bool) -> None:
    with pytest.raises(np.linalg.LinAlgError):
        cholesky(np.diag([1, -1, 1]).astype(dtype))


@pytest.mark.parametrize("function", [cholesky, eigh, lambda a: cholesky_solve(a, np.eye(3))])
def test_other_shapes_are_refused(function: Callable[[np.ndarray], object]) -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 5\)"):
        function(np.ones((3, 5)))
    with pytest.raises(ValueError, match="2 right-hand rows"):
        cholesky_solve(np.eye(3), np.ones((2, 1)))


def test_an_array_that_may_not_be_written_is_kept() -> None:
    A = np.asfortranarray(positive(4, np.float64))
    A.flags.writeable, before = False, A.copy()
    assert_allclose(np.tril(cholesky(A)), np.linalg.cholesky(before))
    assert_array_equal(A, before)


def test_threads_do_not_disturb_each_other() -> None:
    matrices = [positive(90, np.float64, seed) for seed in range(24)]

    def solved(A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return cholesky_solve(cholesky(A.copy("F")), np.eye(90)), eigh(A)[0]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(solved, matrices))
    for A, (inverse, values) in zip(matrices, together, strict=True):
        assert_allclose(inverse, np.linalg.inv(A), atol=1e-10)
        assert_allclose(values, np.linalg.eigvalsh(A), atol=1e-10)
