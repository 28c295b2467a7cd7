"""How are small matrix products shared out over cores?"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")
Map: TypeAlias = "Callable[[Callable[[Item], Result], Iterable[Item]], Iterator[Result]]"

_AHEAD = 2  # items a thread that are given out, so that a slow one does not stop the others


@contextmanager
def worker_threads() -> Iterator[Map]:
    """Give a ``map`` over as many threads as BLAS may use, with BLAS at one thread each.

    Products of a few hundred rows are too small for BLAS to share out well;
    several of them side by side are not. Results come in the order of the items, a few
    of which are taken ahead as results are asked for; they do not depend on the
    number of threads. The limit on BLAS is lifted at the end.
    """
    controller = ThreadpoolController()
    blas = [pool["num_threads"] for pool in controller.info() if pool["user_api"] == "blas"]
    threads = max(blas, default=1)
    with controller.limit(limits=1, user_api="blas"), ThreadPoolExecutor(threads) as pool:

        def run(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
            waiting: deque[Future[Result]] = deque()
            try:
                for item in items:
                    waiting.append(pool.submit(function, item))
                    if len(waiting) > _AHEAD * threads:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

        yield run
