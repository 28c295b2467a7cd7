"""What will the recipe take?  Hours and memory, worked out from what was measured.

python -m examples.inclusive_images.hours [--images-per-second R | --tflops S] [--views N]

Reads what `python -m benchmarks training` has written. Measured on a GPU (`--device cuda`), its
images a second give the hours. Measured on a CPU, the counted operations do, at a rate of
operations that is an assumption.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from math import isnan
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "training.csv"
MAKEFILE = Path(__file__).with_name("Makefile")
IMAGES, HELD_OUT, STAGE_1, STAGE_2 = 1_743_042, 100_000, 32_580, 99_649
FORWARD = 1 / 3  # of a step's operations; the backward pass has twice as many
STATE = 16  # bytes a parameter: weight, gradient, momentum and moving average in float32


@dataclass(frozen=True)
class Cost:
    """What a training step of a network costs.

    Attributes
    ----------
    network, device : str
    parameters : float
        Number of weights.
    operations : float
        Floating-point operations of forward and backward pass, of an image; counted.
    kept, copies : float
        Bytes that the backward pass needs in bfloat16: of an image, and of the weights; counted.
    rate : float
        Images a second, measured on the device; NaN where nobody has.
    """

    network: str
    device: str
    parameters: float
    operations: float
    kept: float
    copies: float
    rate: float

    def memory(self, micro_batch: int) -> float:
        """Bytes: weights and what moves them, and a forward pass that waits for its backward."""
        return self.parameters * STATE + self.copies + micro_batch * self.kept

    def rate_on_gpu(self, tflops: float) -> float:
        """Images a second: measured there, else with so many 10^12 operations a second."""
        return tflops * 1e12 / self.operations if self.device == "cpu" else self.rate


def hours_an_epoch(rate: float) -> float:
    """Hours for all training images and the forward pass of those held out; rate in images/s."""
    return (IMAGES - HELD_OUT + FORWARD * HELD_OUT) / rate / 3600


def hours_of_extraction(rate: float, views: int) -> float:
    """Hours for the plain view and `views` more of the three image sets."""
    return FORWARD * (1 + views) * (HELD_OUT + STAGE_1 + STAGE_2) / rate / 3600


def read_costs(path: Path = RESULTS) -> list[Cost]:
    """The networks of the benchmark's table."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return [
        Cost(
            row["network"],
            row["device"],
            float(row["parameters, M"]) * 1e6,
            float(row["GFLOP an image"]) * 1e9,
            float(row["bf16: kept, MB an image"]) * 1e6,
            float(row["bf16: copies of weights, MB"]) * 1e6,
            float(row["images/s"] or "nan"),
        )
        for row in rows
        if row.get("GFLOP an image")
    ]


def micro_batches() -> dict[str, int]:
    """Images in a forward pass of each network, as the Makefile has them."""
    found = {}
    for line in MAKEFILE.read_text("utf-8").splitlines():
        if line.startswith("MICRO_"):
            name, _, value = line.removeprefix("MICRO_").partition(" ?= ")
            found[name] = int(value)
    return found


def table(costs: list[Cost], rate: float = 0.0, tflops: float = 100.0, views: int = 4) -> str:
    """A Markdown table; `rate`, in images/s, goes before what was measured and what is assumed."""
    columns = (
        "network", "parameters", "operations an image", "measured", "memory", "GPU hours an epoch",
        "GPU hours of extraction",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    micro = micro_batches()
    for cost in costs:
        size, speed = micro.get(cost.network, 64), rate or cost.rate_on_gpu(tflops)
        cells = (
            f"`{cost.network}`",
            f"{cost.parameters / 1e6:.1f} M",
            f"{cost.operations / 1e9:.1f} GFLOP",
            "not yet" if isnan(cost.rate) else f"{cost.rate:.3g} images/s ({cost.device})",
            f"{cost.memory(size) / 1e9:.1f} GB at {size} images",
            f"{hours_an_epoch(speed):.2g}",
            f"{hours_of_extraction(speed, views):.2g}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images-per-second", type=float, default=0.0, help="of your GPU")
    parser.add_argument("--tflops", type=float, default=100.0, help="else: what it sustains")
    parser.add_argument("--views", type=int, default=4, help="beside the plain one")
    given = parser.parse_args()
    print(table(read_costs(), given.images_per_second, given.tflops, given.views))


if __name__ == "__main__":
    main()
