"""How close does extraction come to what decoding and the network can do, and what does it cost?

Pictures are drawn, coded as JPEG and decoded again; networks have random weights, which cost
what trained ones do. On a CPU decoding and the forward pass share the cores: with rates a
and b alone, both together cannot beat 1 / (1/a + 1/b). The ratio is to that, of each turn by
itself, and the median of all: a shared machine is a tenth faster in one minute than in another.
It counts what comes before the first image (the network is read, hashed and checks itself),
which is also told apart, as it does not grow with the number of images.
What writing costs is told by the difference to features that are discarded, which is as noisy,
and bounded by the time that the writer is busy. On a GPU decoding and the network do not share,
and the peer is the network alone on inputs that lie on the device already.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageFilter

from benchmarks.measure import own_process, peak_memory, report, take_turns
from featcache import extraction
from featcache.batches import ViewImages, loader, row_batches
from featcache.embedding import Embedder
from featcache.extraction import extract
from featcache.filling import fill
from featcache.images import find_images
from featcache.networks import NetworkSpec, autocast, resolve_preprocessing
from featcache.runs import CLASSES, CONFIG, FORMAT, WEIGHTS, save_weights, write_rows, write_text
from featcache.settings import ExtractionConfig
from featcache.views import Recipe
from featcache.writing import CacheWriter

LARGE = ("pnasnet5large", "nasnetalarge", "senet154")
SMALL = ("resnet152", "resnet101", "densenet121")
CLASSES_OF_ALL = 100


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def make_run(folder: Path, arch: str, size: int) -> Path:
    """The folder of a network with random weights."""
    torch.manual_seed(0)
    spec = NetworkSpec(arch, CLASSES_OF_ALL)
    network = spec.build()
    folder.mkdir(parents=True)
    config = {
        "format": FORMAT,
        "network": asdict(spec),
        "preprocessing": asdict(resolve_preprocessing(network, size)),
    }
    write_text(folder / CONFIG, json.dumps(config))
    names = [(f"c{k}", f"class {k}") for k in range(CLASSES_OF_ALL)]
    write_rows(folder / CLASSES, [("label_code", "description"), *names])
    save_weights(folder / WEIGHTS, network)
    return folder


def make_images(folder: Path, n: int, shape: tuple[int, int], different: int = 64) -> Path:
    """`n` JPEG files; beyond `different` ones they are links to the first."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(n):
        path = folder / f"i{k:07d}.jpg"
        if k >= different:
            os.link(folder / f"i{k % different:07d}.jpg", path)
            continue
        coarse = rng.integers(0, 256, (shape[1] // 16 + 1, shape[0] // 16 + 1, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize(shape, Image.Resampling.BICUBIC)
        noise = rng.integers(-12, 13, (shape[1], shape[0], 3))
        pixels = (np.asarray(smooth).astype(np.int64) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).filter(ImageFilter.SMOOTH).save(path, quality=90)
    return folder


@dataclass
class Bench:
    """An extraction, and its parts alone."""

    config: ExtractionConfig
    device: torch.device

    def __post_init__(self) -> None:
        self.embedder = Embedder.load(self.config)
        self.images = find_images(self.config.images)
        recipe = Recipe(self.config.views, 0, 1, self.embedder.run.preprocessing)
        self.views = ViewImages(self.images, recipe)
        self.writing: list[float] = []
        self.starting: list[float] = []
        self.order = row_batches([(0, len(self.images))], self.config.batch_size)

    def decode(self) -> None:
        """Decode and render, by the same number of workers."""
        for _ in loader(self.views, self.order, self.config.workers, torch.device("cpu")):
            pass

    def forward(self) -> None:
        """The network on as many images that need not be decoded, a block at a time."""
        size = self.embedder.run.preprocessing.image_size
        shape = (self.config.batch_size, 1, 3, size, size)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8).to(self.device)
        waiting = [self.embedder(pixels[: len(rows)]) for rows in self.order]
        for features in waiting:
            features.numpy()

    @torch.inference_mode()
    def network_alone(self) -> None:
        """As timm's benchmark of inference has it: one synthetic input that stays on the device."""
        size = self.embedder.run.preprocessing.image_size
        spec, network = self.embedder.run.network, self.embedder.network
        images = torch.randn(self.config.batch_size, 3, size, size, device=self.device)
        images = images.contiguous(memory_format=spec.memory_format)
        for _ in self.order:
            with autocast(self.embedder.precision, self.device):
                network(images)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def whole(self) -> None:
        """All of it; notes the seconds before the images, and the share that the writer works."""
        begun = time.perf_counter()
        writing: list[float] = []

        def begin(*arguments: Any) -> None:
            self.starting.append(time.perf_counter() - begun)
            fill(*arguments)

        with quiet(), timing_writer(writing), mock.patch.object(extraction, "fill", begin):
            extract(self.config)
        self.writing.append(sum(writing) / (time.perf_counter() - begun))

    def without_writer(self) -> None:
        """All but the writing of features."""
        with quiet(), discarding():
            extract(self.config)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what extraction prints."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def timing_writer(seconds: list[float]) -> ExitStack:
    """Writers note how long each of their steps takes, in their thread or at the end."""
    stack = ExitStack()

    def timed_step(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begun = time.perf_counter()
            result = step(*arguments)
            seconds.append(time.perf_counter() - begun)
            return result

        return call

    for name in ("write", "finish"):
        step = timed_step(getattr(CacheWriter, name))
        stack.enter_context(mock.patch.object(CacheWriter, name, step))
    return stack


def discarding() -> ExitStack:
    """Writers take features and drop them."""
    stack = ExitStack()
    stack.enter_context(mock.patch.object(CacheWriter, "write", return_value=None))
    stack.enter_context(mock.patch.object(CacheWriter, "finish", lambda self, *rest: self.path))
    return stack


def config_of(root: Path, arch: str, device: str, **changes: Any) -> ExtractionConfig:
    """An extraction of the images below `root` by a network with random weights."""
    options: dict[str, Any] = {
        "run": str(root / arch),
        "images": str(root / "images"),
        "out": str(root / f"{arch}.h5"),
        "device": device,
        "overwrite": True,
    }
    return ExtractionConfig(**options | changes)


def metered(run: Callable[[], None], spent: list[float]) -> Callable[[], None]:
    """The same, noting seconds of CPU of this process and of workers that have ended by then."""

    def used() -> float:
        return sum(
            usage.ru_utime + usage.ru_stime
            for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )

    def call() -> None:
        before = used()
        run()
        spent.append(used() - before)

    return call


def on_cpu(root: Path, arch: str, size: int, repeats: int, **changes: Any) -> list[dict[str, Any]]:
    """Both alone, both together, and together without writing."""
    make_run(root / arch, arch, size)
    config = config_of(root, arch, "cpu", **changes)
    bench = Bench(config, torch.device("cpu"))
    torch.set_num_threads(config.threads or torch.get_num_threads())
    contestants = {
        "decode + render alone": bench.decode,
        "forward alone": bench.forward,
        "extraction": bench.whole,
        "extraction, features discarded": bench.without_writer,
    }
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    times = take_turns(
        {name: metered(run, spent[name]) for name, run in contestants.items()}, repeats
    )
    n = len(bench.images)
    a, b, both, discarded = (np.array(timing.seconds) for timing in times.values())
    ratios = {
        "decode + render alone": ("", ""),
        "forward alone": ("", ""),
        "extraction": (float(np.median((a + b) / both)), ">= 0.95"),
        "extraction, features discarded": (
            float(np.median(both / discarded - 1)),
            "cost of writing <= 0.02",
        ),
    }
    question = (
        f"{arch} at {size} px, CPU, {config.workers} workers, {torch.get_num_threads()} threads"
    )
    rows = [
        {
            "question": question,
            "what": name,
            "images a second": n / timing.median,
            "seconds": timing.spread,
            "CPU seconds": median(spent[name]),
            "ratio": ratios[name][0],
            "target": ratios[name][1],
        }
        for name, timing in times.items()
    ]
    told: list[dict[str, Any]] = [
        {"what": "before the first image", "seconds": f"{median(bench.starting):.2g}"},
        {
            "what": "share of time that writing takes",
            "ratio": median(bench.writing),
            "target": "bounds the cost of writing",
        },
    ]
    return [*rows, *({"question": question} | row for row in told)]


def memory(n: int) -> int:
    """Peak bytes of a process that extracts `n` small images, and of its largest worker."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_run(root / "test_resnet", "test_resnet", 32)
        make_images(root / "images", n, (40, 32))
        with quiet():
            extract(config_of(root, "test_resnet", "cpu", threads=1, workers=1, batch_size=64))
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return peak_memory() + worker


def memory_rows(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Peak memory of extractions of different length, each in a fresh process."""
    peaks = [int(own_process("benchmarks.extraction", "--memory", str(n))) / 1e6 for n in sizes]
    return [
        {
            "question": "peak memory of process and worker",
            "what": f"{n:,} images",
            "MB": peak,
            "ratio": peak - peaks[0] if n > sizes[0] else "",
            "target": "< 100 MB more" if n > sizes[0] else "",
        }
        for n, peak in zip(sizes, peaks, strict=True)
    ]


def on_gpu(root: Path, arch: str, repeats: int, **changes: Any) -> list[dict[str, Any]]:
    """From JPEG files, against the network alone on inputs that lie on the device."""
    make_run(root / arch, arch, 224)
    config = config_of(root, arch, "cuda", **changes)
    bench = Bench(config, torch.device("cuda"))
    bench.network_alone()  # kernels are chosen and loaded
    contestants = {
        f"{config.workers} workers, decode + render alone": bench.decode,
        "timm's way: synthetic input": bench.network_alone,
        "extraction": bench.whole,
        "extraction, features discarded": bench.without_writer,
    }
    times = take_turns(contestants, repeats)
    n = len(bench.images)
    a, b, both, discarded = (np.array(timing.seconds) for timing in times.values())
    target = ">= 0.9 of timm's way" if arch in LARGE else f"host decodes {n / np.median(a):,.0f}/s"
    ratios = ["", "", float(np.median(b / both)), float(np.median(both / discarded - 1))]
    targets = ["", "", target, "cost of writing <= 0.02"]
    return [
        {
            "question": f"{arch} at 224 px, {torch.cuda.get_device_name()}, "
            f"{bench.embedder.precision}",
            "what": name,
            "images a second": n / timing.median,
            "seconds": timing.spread,
            "ratio": ratio,
            "target": target,
        }
        for (name, timing), ratio, target in zip(times.items(), ratios, targets, strict=True)
    ]


def rates(root: Path, n: int, workers: int, repeats: int) -> list[dict[str, Any]]:
    """On a CPU, by so many workers beside a thread of the network for each core."""
    make_images(root / "images", n, (640, 480))
    return on_cpu(root, "resnet18", 224, repeats, workers=workers, threads=cores())


def gpu_rates(root: Path, n: int) -> list[dict[str, Any]]:
    """The six networks, at 224 px."""
    make_images(root / "images", n, (640, 480))
    workers = max(1, cores() - 1)
    rows = []
    for arch in (*LARGE, *SMALL):
        rows += on_gpu(root, arch, 3, workers=workers, batch_size=256)
    return rows


PARTS = {
    "rates": "on a CPU, with a worker for each core",
    "alone": "on a CPU, all in one process",
    "memory": "peaks of short and long extractions",
    "gpu": "from files to features on a GPU",
}


def measured(part: str, root: Path, n: int, quick: bool) -> list[dict[str, Any]]:
    """The rows of a part; those of the first two are about `n` pictures."""
    if part == "memory":
        return memory_rows((500, 2_000) if quick else (10_000, 100_000))
    if part == "gpu":
        return gpu_rates(root, 2_048 if quick else 16_384)
    return rates(root, n, cores() if part == "rates" else 0, 1 if quick else 5)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a minute or two, with more noise")
    told = "; ".join(f"{name}: {text}" for name, text in PARTS.items())
    parser.add_argument("--part", choices=PARTS, help=f"{told} (default: all that can be had)")
    parser.add_argument("--images", type=int, default=0, help="pictures of the parts on a CPU")
    parser.add_argument("--memory", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(memory(options.memory))
        return
    n = options.images or (192 if options.quick else 2_048)
    for part in PARTS if options.part is None else [options.part]:
        if part == "gpu" and not torch.cuda.is_available():
            print("skipped: the part on a GPU, since torch sees none")
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows = measured(part, Path(folder), n, options.quick)
        name = "extraction" if part == "rates" else f"extraction_{part}"
        name += "_quick" if options.quick else ""
        report(name, rows, f"Extraction against its parts: {PARTS[part]}")


if __name__ == "__main__":
    main()
