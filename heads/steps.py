"""How is told what each step of a chain did?"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A line of an explanation."""

    step: str
    effect: str
    reason: str


def table(steps: tuple[Step, ...] | list[Step]) -> str:
    """Steps as text in columns."""
    widths = [max(len(s.step) for s in steps), max(len(s.effect) for s in steps)]
    return "\n".join(
        f"{s.step:{widths[0]}}  {s.effect:{widths[1]}}  {s.reason}".rstrip() for s in steps
    )
