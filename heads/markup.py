"""How does text become HTML that shows it and never obeys it?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

_VOID = frozenset({"img", "input", "meta", "br"})


class Markup(str):
    """HTML that was put together by :func:`element`; every other text is escaped."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Any value, escaped unless it is markup."""
    return value if isinstance(value, Markup) else Markup(escape(str(value)))


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """``<tag attributes>children</tag>``.

    Children that are not :class:`Markup` are escaped, as are all attributes. ``None`` and
    ``False`` leave an attribute (or a child) out, ``True`` gives it no value; ``class_`` is
    ``class`` and ``aria_label`` is ``aria-label``.
    """
    words = [tag]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        name = key.rstrip("_").replace("_", "-")
        words.append(name if value is True else f'{name}="{escape(str(value))}"')
    opening = f"<{' '.join(words)}>"
    if tag in _VOID:
        return Markup(opening)
    return Markup(f"{opening}{joined(children)}</{tag}>")


def joined(children: Iterable[object]) -> Markup:
    """Pieces one after the other; ``None`` and ``False`` are left out."""
    return Markup("".join(text(c) for c in children if c is not None and c is not False))


def asset(name: str) -> str:
    """Style or script that comes with the package."""
    return (files("heads") / "assets" / name).read_text("utf-8")


def shown(value: object) -> str:
    """A value in a table: counts with commas, other numbers to four digits, nothing for NaN."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else ""
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if isinstance(value, (float, np.floating)):
        return "" if np.isnan(value) else f"{value:.4g}"
    return str(value)


def _cell(value: object) -> Markup:
    if _is_number(value):
        number: Any = value
        return element("td", shown(value), class_="number", data_sort=float(number))
    return element("td", value if isinstance(value, Markup) else shown(value))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def table(caption: str, columns: Mapping[str, Any], *, filterable: bool | None = None) -> Markup:
    """A table whose columns sort at a click and, if it is long, whose rows can be filtered.

    It is a plain table wherever the script of :func:`asset` ``("tables.js")`` does not run.

    Parameters
    ----------
    caption : str
    columns : mapping of heading to a sequence of values
        Numbers sort as numbers, the rest as text.
    filterable : bool, optional
        Whether there is a box to filter rows by; None: from 8 rows on.
    """
    rows = [element("tr", *map(_cell, row)) for row in zip(*columns.values(), strict=True)]
    heads = [
        element("th", name, scope="col", class_=any(map(_is_number, values)) and "number")
        for name, values in columns.items()
    ]
    long = len(rows) >= 8 if filterable is None else filterable
    inner = element(
        "table",
        element("thead", element("tr", *heads)),
        element("tbody", *rows),
        aria_label=caption,
    )
    box = element("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)
    # Above the box and not a <caption> in it, which would be as wide as the widest row.
    above = element("p", caption, class_="caption")
    return element("div", above, box, class_="sortable", data_filter=bool(long))


def in_notebook(content: Markup) -> Markup:
    """Tables and galleries with the style and script that they need, for a notebook's output."""
    return element(
        "div",
        element("style", Markup(asset("parts.css"))),
        content,
        element("script", Markup(asset("tables.js"))),
        class_="heads-output",
    )
