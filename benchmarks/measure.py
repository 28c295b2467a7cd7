"""How is something measured?  Median and spread in one run, peers taking turns."""

from __future__ import annotations

import csv
import importlib
import importlib.metadata
import os
import platform
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

from benchmarks.pictures import draw_bars

RESULTS = Path(__file__).parent / "results"
COMMAND = "python -m benchmarks "  # NAME follows
PACKAGES = ("numpy", "scipy", "scikit-learn", "h5py", "torch")


@dataclass(frozen=True)
class Timing:
    """Wall times of repeated calls, in seconds, and what the last call returned."""

    seconds: tuple[float, ...]
    result: Any = None

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> str:
        """Least and greatest, as text."""
        return f"{min(self.seconds):.3g} to {max(self.seconds):.3g}"


def timed(function: Callable[[], Any], repeats: int = 3) -> Timing:
    """Wall times of `repeats` calls."""
    return take_turns({"": function}, repeats)[""]


def take_turns(contestants: Mapping[str, Callable[[], Any]], repeats: int = 3) -> dict[str, Timing]:
    """Wall times of contestants that take turns, so that what else the machine does hits all.

    The order of each turn is drawn: who came before leaves its mark in memory.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    results = {}
    names, draw = list(contestants), random.Random(0)
    for _ in range(repeats):
        for name in draw.sample(names, len(names)):
            start = time.perf_counter()
            results[name] = contestants[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(seconds[name]), results[name]) for name in contestants}


def peak_memory() -> int:
    """Bytes of the largest resident set that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_beyond(function: Callable[[], Any]) -> int | None:
    """Bytes that the process held at most during a call beyond before; None if not on Linux."""
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not refs.exists():
        return None
    refs.write_text("5")  # sets the high-water mark to what is held now
    before = _held(status, "VmRSS")
    function()
    return _held(status, "VmHWM") - before


def _held(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def own_process(module: str, *arguments: str) -> str:
    """What ``python -m module arguments`` prints: memory and imports need a fresh process."""
    command = [sys.executable, "-m", module, *arguments]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr[-2000:]}")
    return done.stdout


def peer(name: str) -> ModuleType | None:
    """The module of a peer, or None, said by name, if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"skipped: {name} is not installed", file=sys.stderr)
        return None


def machine() -> str:
    """One line on what the figures were measured on."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return f"{cores} cores of {cpu}; Python {platform.python_version()}, {', '.join(versions)}"


def report(
    name: str, rows: Sequence[Mapping[str, object]], title: str, bars: Sequence[str] = ()
) -> None:
    """Print rows as a table and keep them as ``results/NAME.csv``, with machine and command.

    Parameters
    ----------
    bars : sequence of str
        Columns of numbers that ``results/NAME.png`` shows, where matplotlib is installed; without
        any the first one of seconds, scores or ratios.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_text(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    print(f"\n{title}\n{machine()}\n")
    for line in (columns, ["-" * width for width in widths], *cells):
        print("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)))
    RESULTS.mkdir(exist_ok=True)
    partial = RESULTS / f"{name}.csv.partial"
    with open(partial, "w", newline="", encoding="utf-8") as file:
        print(first_line(title), file=file)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(cells)
    partial.replace(RESULTS / f"{name}.csv")
    draw_bars(RESULTS / f"{name}.png", rows, title, bars)


def first_line(title: str) -> str:
    """Of a file of results: title, machine, and the command if it is known."""
    return f"# {'; '.join(fact for fact in (title, machine(), own_command()) if fact)}"


def own_command() -> str:
    """The command that runs this benchmark, paths left out; empty if it was called otherwise."""
    name = sys.argv[0].removeprefix(COMMAND)
    if name == sys.argv[0] and Path(name).parent != Path(__file__).parent:
        return ""
    words = [
        f"{word.split('=')[0]}=PATH" if "=" in word and os.sep in word else word
        for word in sys.argv[1:]
    ]
    words = ["PATH" if os.sep in word and "=" not in word else word for word in words]
    return " ".join([COMMAND + Path(name).stem, *words])


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
