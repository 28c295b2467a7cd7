"""What do the processes of one training, which torchrun has started, tell each other?

Each holds the same network; a step's images are dealt out among them. With one process
nothing here does anything.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from featcache.errors import InputError
from featcache.networks import resolve_device
from featcache.shares import share_from

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes, as one of them sees them.

    Attributes
    ----------
    device : torch.device
        Where this process computes.
    rank, size : int
        This process, from 0, and how many there are.
    local_rank : int
        This process among those of its machine.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network for training: its gradients are the mean over processes.

        Statistics of batch normalisation stay with each process until :meth:`share_statistics`.
        """
        if self.size == 1:
            return network
        ids = [self.device.index] if self.device.type == "cuda" else None
        # From torch 2.14 on the option has another name, and the old one warns.
        known = inspect.signature(DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {option: False}
        return DistributedDataParallel(network, device_ids=ids, **options)

    def without_exchange(self, network: nn.Module) -> Any:
        """A context for backward passes whose gradients only add up here."""
        return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """`values` replaced by their sum over processes."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def share_statistics(self, network: nn.Module) -> None:
        """Replace the network's floating-point buffers by their means over processes.

        After every step, so that each process could write the checkpoint, at any step.
        """
        if self.size == 1:
            return
        buffers = [b for b in network.buffers() if b.is_floating_point()]
        if not buffers:
            return
        flat = torch.cat([b.flatten() for b in buffers])
        distributed.all_reduce(flat)
        flat /= self.size
        for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def share(self, value: T) -> T:
        """The first process's value, for all."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, device=self.device)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks, for all."""
        if self.size == 1:
            return [value]
        boxes: list[Any] = [None] * self.size
        distributed.all_gather_object(boxes, value)
        return boxes

    def first_does(self, action: Callable[[], T]) -> T:
        """What the first process's action returns, for all.

        Raises
        ------
        InputError
            As the action does, in every process, so that none waits for the first.
        """
        if self.size == 1:
            return action()
        outcome: list[T] | InputError = []
        if self.first:
            try:
                outcome = [action()]
            except InputError as error:
                outcome = error
        outcome = self.share(outcome)
        if isinstance(outcome, InputError):
            raise outcome
        return outcome[0]

    def one_a_machine_before(self, action: Callable[[], T]) -> T:
        """The action's value; one process of each machine acts before the others do."""
        if self.local_rank == 0:
            result = action()
        if self.size > 1:
            distributed.barrier()
        return result if self.local_rank == 0 else action()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The processes that torchrun has started, or the one that there is, while open.

    Raises
    ------
    InputError
        If the device does not exist, or there are more processes than GPUs.
    """
    share = share_from(os.environ)
    if share.world == 1:
        yield World(resolve_device(device))
        return
    local_rank = int(os.environ.get("LOCAL_RANK", share.rank))
    chosen = resolve_device(device)
    if chosen.type == "cuda":
        chosen = resolve_device(f"cuda:{local_rank}")
        torch.cuda.set_device(chosen)
    distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(chosen, share.rank, share.world, local_rank)
    finally:
        distributed.destroy_process_group()
