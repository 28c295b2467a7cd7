"""RESULTS.md: what has been measured, from the files of ``benchmarks/results`` alone."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pictures import draw_bars
from featcache.atomic import write_atomically

QUICK = "_quick"
# As benchmarks.measure.report writes it: title; machine[; command].
_MOST = 400  # rows that are shown
_FIRST_LINE = re.compile(r"(.*?); (\d+ cores of .*?)(?:; (python -m .*))?")
INTRODUCTION = """# What has been measured

Written by `python -m benchmarks report` from `benchmarks/results/*.csv`; every section names the
machine and the versions of its figures. Times of different sections may be of different machines.
"""


@dataclass(frozen=True)
class Table:
    """A file of results.

    Attributes
    ----------
    name : str
        Of the file, without ending.
    title, machine, command : str
        From its first line; empty where it does not say.
    columns : list of str
    rows : list of list of str
    """

    name: str
    title: str
    machine: str
    command: str
    columns: list[str]
    rows: list[list[str]]

    @classmethod
    def read(cls, path: Path) -> Table:
        """A CSV file of :func:`benchmarks.measure.report`.

        Raises
        ------
        ValueError
            If it holds no columns, or a row of another length.
        """
        with open(path, newline="", encoding="utf-8") as file:
            lines = file.read().splitlines(keepends=True)
        comments = [line[1:].strip() for line in lines if line.startswith("#")]
        body = list(csv.reader(line for line in lines if not line.startswith("#")))
        if not body:
            raise ValueError(f"{path}: holds no table; run its benchmark again")
        for number, row in enumerate(body[1:], 1):
            if len(row) != len(body[0]):
                raise ValueError(
                    f"{path}: row {number} has {len(row)} values for {len(body[0])} columns; "
                    "run its benchmark again"
                )
        first = comments[0] if comments else ""
        found = _FIRST_LINE.fullmatch(first)
        title, machine, command = found.groups("") if found else (first, "", "")
        return cls(path.stem, title, machine, command, body[0], body[1:])

    def markdown(self) -> str:
        """The table, numbers to the right."""
        sides = [
            "---:" if all(_is_number(row[at]) for row in self.rows) and self.rows else "---"
            for at in range(len(self.columns))
        ]
        lines = [self.columns, sides, *self.rows]
        return "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)

    def draw(self, path: Path) -> bool:
        """Write a picture of it; False where that cannot be had."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return draw_bars(path, rows, self.title or self.name)


def _is_number(text: str) -> bool:
    try:
        float(text or "nan")
    except ValueError:
        return False
    return True


def _escaped(text: str) -> str:
    """No bar that would end a cell, no tag that would vanish."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def benchmark_of(name: str, known: Mapping[str, str]) -> str:
    """The benchmark that a file is of: NAME or NAME_part; empty if there is none."""
    fits = [b for b in known if name == b or name.startswith(f"{b}_")]
    return max(fits, key=len, default="")


def section(table: Table, known: Mapping[str, str], picture: bool) -> str:
    """Question, command, machine, table (a link to a long one) and picture."""
    benchmark = benchmark_of(table.name, known)
    command = table.command or (f"python -m benchmarks {benchmark}" if benchmark else "")
    parts = [f"## {table.title or table.name}"]
    if benchmark:
        parts.append(f"*{known[benchmark]}*")
    facts = [f"`{command}`"] if command else []
    facts += [table.machine] if table.machine else []
    parts += [" on ".join(facts)] if facts else []
    if len(table.rows) > _MOST:
        parts.append(f"{len(table.rows):,} rows: [{table.name}.csv](results/{table.name}.csv)")
    else:
        parts.append(table.markdown())
    if picture:
        parts.append(f"![{table.title or table.name}](results/{table.name}.png)")
    return "\n\n".join(parts)


def write_results(folder: Path, out: Path, known: Mapping[str, str]) -> int:
    """Write the page and the pictures that are missing; returns the number of its sections.

    Smoke tests are left out.

    Parameters
    ----------
    folder : of CSV files, and of PNG files of the same names
    out : RESULTS.md
    known : mapping of benchmark to its question
    """
    files = [path for path in sorted(folder.glob("*.csv")) if not path.stem.endswith(QUICK)]
    sections = []
    for path in files:
        table, picture = Table.read(path), path.with_suffix(".png")
        drawn = picture.exists() or (len(table.rows) <= _MOST and table.draw(picture))
        sections.append(section(table, known, drawn))
    text = "\n\n".join([INTRODUCTION.strip(), *sections]) + "\n"
    write_atomically(out, text.encode("utf-8"))
    return len(sections)
