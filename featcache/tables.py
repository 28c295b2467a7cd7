"""How is a table shown, as text and in a notebook?"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def as_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, two spaces apart; no spaces at the ends of lines."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (header, *rows)
    ]
    return "\n".join(lines)


def as_html(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A ``<table>`` below its title; whatever the texts hold is shown and never obeyed."""

    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    head = f"<thead>{line(header, 'th')}</thead>" if header else ""
    body = "".join(line(row, "td") for row in rows)
    return f"<div>{escape(title)}</div><table>{head}<tbody>{body}</tbody></table>"
