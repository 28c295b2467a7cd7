"""Turn views of images into penultimate features."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from featcache.errors import InputError
from featcache.networks import (
    LastLayer,
    autocast,
    classifier,
    head_error,
    recorded_features,
    resolve_device,
    resolve_precision,
)
from featcache.runs import Run
from featcache.settings import ExtractionConfig
from featcache.views import normalise

TOLERANCE = {"float32": 1e-3, "bf16": 2e-2}


@dataclass
class Features:
    """Features on their way from the device.

    Attributes
    ----------
    tensor : (b, v, d) float32
        In the memory of the CPU, filled once `events` have come to pass.
    seconds : float
        What the forward passes took, on a CPU.
    events : pair of torch.cuda.Event, or None
        Beginning and end of the forward passes, on a GPU.
    copied : torch.cuda.Event or None
    """

    tensor: torch.Tensor
    seconds: float = 0.0
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
    copied: torch.cuda.Event | None = None

    def numpy(self) -> np.ndarray:
        """The features, once they are there."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensor.numpy()

    def busy(self) -> float:
        """Seconds that the device was busy with them; after :meth:`numpy`."""
        if self.events is None:
            return self.seconds
        return self.events[0].elapsed_time(self.events[1]) / 1000


@dataclass
class Embedder:
    """A frozen network that turns views into penultimate features.

    Attributes
    ----------
    run : Run
        Where the network comes from.
    network : Module
        In evaluation mode, on the device.
    layer : Linear or Conv2d
        Its last layer; the features are the layer's input.
    device : torch.device
    precision : str
        ``float32`` or ``bf16``.
    """

    run: Run
    network: nn.Module
    layer: LastLayer
    device: torch.device
    precision: str
    _stream: torch.cuda.Stream | None = None

    @classmethod
    def load(cls, config: ExtractionConfig) -> Embedder:
        """Read the run and put its network on the device."""
        run = Run.open(config.run)
        device = own_device(resolve_device(config.device))
        network = run.load_network().to(device).to(memory_format=run.network.memory_format)
        layer = classifier(network, run.network)
        return cls(run, network, layer, device, resolve_precision(config.precision, device))

    @torch.inference_mode()
    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, 3, s, s) uint8 -> features (b, d) and logits (b, K), float32."""
        images = normalise(pixels.to(self.device, non_blocking=True), self.run.preprocessing)
        images = images.contiguous(memory_format=self.run.network.memory_format)
        with recorded_features(self.layer) as seen, autocast(self.precision, self.device):
            logits = self.network(images)
        return seen[0].float(), logits.float()

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> Features:
        """(b, v, 3, s, s) uint8 -> (b, v, d) float32, one view at a time to bound memory.

        A GPU is given its work and not waited for.
        """
        if self.device.type != "cuda":
            begun = time.perf_counter()
            features = self._all_views(pixels).cpu()
            return Features(features, time.perf_counter() - begun)
        events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        events[0].record()
        on_device = self._all_views(self.sent(pixels))
        events[1].record()
        features = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
        features.copy_(on_device, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return Features(features, events=(events[0], events[1]), copied=copied)

    def sent(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels on the GPU, copied while it computes on those before."""
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copying()):
            here = pixels.to(self.device, non_blocking=True)
        computing.wait_stream(self._copying())
        here.record_stream(computing)
        return here

    def _copying(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return self._stream

    def _all_views(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.forward(pixels[:, k])[0] for k in range(pixels.shape[1])], 1)

    @torch.inference_mode()
    def check(self, pixels: torch.Tensor) -> None:
        """Features times the last layer must give the network's own logits.

        Raises
        ------
        InputError
            If they do not: the features would be of no use to a linear head.
        """
        features, logits = self.forward(pixels)
        error = head_error(features, logits, self.layer)
        if not error <= TOLERANCE[self.precision]:
            raise InputError(
                f"{self.run.path}: features @ W0.T + b0 differ from the network's own logits by "
                f"{error:.2g} of their size; the network does something after its last linear layer"
            )

    @property
    def head(self) -> tuple[np.ndarray, np.ndarray]:
        """W0 (K, d) and b0 (K,), float32; b0 is zero where the layer has none."""
        weight = self.layer.weight.detach().flatten(1).float().cpu().numpy()
        if self.layer.bias is None:
            return weight, np.zeros(len(weight), np.float32)
        return weight, self.layer.bias.detach().float().cpu().numpy()


def own_device(device: torch.device) -> torch.device:
    """Of several GPUs the one of this process, as `torchrun` numbers the processes of a machine."""
    if device.type != "cuda":
        return device
    local = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    chosen = torch.device("cuda", local if device.index is None else device.index)
    torch.cuda.set_device(chosen)
    return chosen
