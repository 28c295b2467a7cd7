"""Parts of a step make the gradient of the whole, whatever cannot be read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from featcache.batches import Clocked, dealt_out, epoch_batches
from featcache.updates import NotFinite, Update
from featcache.world import World

ALONE = World(torch.device("cpu"))
SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=60)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return found


@SETTINGS
@given(readable=st.lists(st.booleans(), min_size=1, max_size=9).filter(any), size=st.integers(1, 9))
def test_the_gradient_is_that_of_the_mean_over_readable_images(
    readable: list[bool], size: int
) -> None:
    images = torch.randn(len(readable), 3, generator=torch.Generator().manual_seed(1))
    whole = network()
    mean = whole(images[torch.tensor(readable)]).square().mean()
    mean.backward()
    model = network()
    update = Update(ALONE, model, len(readable))
    starts = range(0, len(readable), size)
    for start in starts:
        rows = np.flatnonzero(readable[start : start + size]) + start
        last = start == starts[-1]
        if len(rows):
            with update.part(last):
                update.add(model(images[rows]).square()[:, 0], rows, last)
    value, wishes = update.finish()
    assert value == pytest.approx(mean.item(), rel=1e-5)
    assert wishes == []
    for found, expected in zip(gradients(model), gradients(whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_norm_of_the_whole_gradient_is_clipped() -> None:
    images = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)) * 10
    model = network()
    update = Update(ALONE, model, 6)
    for start in (0, 3):
        update.add(
            model(images[start : start + 3]).square()[:, 0],
            np.arange(start, start + 3),
            bool(start),
        )
    update.finish(clip=0.01)
    norm = torch.cat([g.flatten() for g in gradients(model)]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_rows_of_the_part_that_is_not_finite_are_named() -> None:
    model = network()
    update = Update(ALONE, model, 4)
    update.add(model(torch.ones(2, 3)).square()[:, 0], np.array([7, 9]), last=False)
    update.add(model(torch.full((2, 3), torch.nan)).square()[:, 0], np.array([3, 5]), last=True)
    with pytest.raises(NotFinite) as caught:
        update.finish()
    assert caught.value.rows.tolist() == [3, 5]


def test_wishes_are_told() -> None:
    model = network()
    update = Update(ALONE, model, 1, (False, True))
    update.add(model(torch.ones(1, 3)).square()[:, 0], np.array([0]), last=True)
    assert update.finish()[1] == [False, True]


@SETTINGS
@given(
    n=st.integers(1, 60),
    batch=st.integers(1, 20),
    size=st.integers(1, 20),
    world=st.integers(1, 4),
    skip=st.integers(0, 3),
)
def test_processes_share_every_step_without_overlap(
    n: int, batch: int, size: int, world: int, skip: int
) -> None:
    steps = list(epoch_batches(n, batch, 0, 2, skip))
    alone = list(dealt_out(iter(steps), size))
    assert [item for part in alone for item in part] == [item for step in steps for item in step]
    assert all(len(part) <= size for part in alone)
    shares = [list(dealt_out(iter(steps), size, rank, world)) for rank in range(world)]
    every = sorted(part for share in shares for part in share)
    assert every == sorted(alone)  # the same parts, so the same images are normalised together


def test_waiting_is_counted() -> None:
    clocked = Clocked(iter([1, 2]))
    assert (next(clocked), next(clocked)) == (1, 2)
    with pytest.raises(StopIteration):
        next(clocked)
    assert clocked.waited > 0
