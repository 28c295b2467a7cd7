"""How are small matrix products shared out over cores?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

from joblib import Parallel, delayed
from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")
Map: TypeAlias = "Callable[[Callable[[Item], Result], Iterable[Item]], Iterator[Result]]"


@contextmanager
def worker_threads() -> Iterator[Map]:
    """Give a ``map`` over as many threads as BLAS may use, with BLAS at one thread each.

    Products of a few hundred rows are too small for BLAS to share out well;
    several of them side by side are not. Results come in the order of the items,
    which are taken as threads become free; they do not depend on the number of
    threads. The limit on BLAS is lifted at the end.
    """
    controller = ThreadpoolController()
    blas = [pool["num_threads"] for pool in controller.info() if pool["user_api"] == "blas"]
    with (
        controller.limit(limits=1, user_api="blas"),
        Parallel(
            n_jobs=max(blas, default=1),
            backend="threading",
            batch_size=1,
            pre_dispatch="n_jobs",
            return_as="generator",
        ) as pool,
    ):

        def run(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
            results: Iterator[Result] = pool(delayed(function)(item) for item in items)
            return results

        yield run
