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
    """Steps as text in columns; nothing of none."""
    widths = [max((len(getattr(s, name)) for s in steps), default=0) for name in ("step", "effect")]
    return "\n".join(
        f"{s.step:{widths[0]}}  {s.effect:{widths[1]}}  {s.reason}".rstrip() for s in steps
    )
