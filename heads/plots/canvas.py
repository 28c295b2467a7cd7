"""What do all displays share: axes to draw on, colours, and names that are only shown."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

# Told apart in print and by those who see few colours: Okabe and Ito (2008).
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#888888"


class Display:
    """Numbers that can be drawn; subclasses give ``plot``.

    Attributes
    ----------
    ax_, figure_
        Where it was drawn last.
    """

    ax_: Any
    figure_: Any

    @classmethod
    def _check_shown(cls, estimator: Any, attribute: str, kinds: str) -> None:
        """Refuse an estimator that is not fitted, or fitted but not of a kind that is shown."""
        if not hasattr(estimator, attribute):
            check_is_fitted(estimator)
            raise TypeError(
                f"{cls.__name__} shows a fitted {kinds}; "
                f"this {type(estimator).__name__} has no {attribute}"
            )

    def _on(self, ax: Any, height: float = 4.0) -> Any:
        """The axes to draw on: those given, or new ones."""
        if ax is None:
            try:
                from matplotlib import pyplot
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    "pictures need matplotlib: pip install 'featcache-heads[report]'"
                ) from error
            ax = pyplot.subplots(figsize=(6.0, height), layout="constrained")[1]
        self.ax_, self.figure_ = ax, ax.figure
        return ax


# Of the report's pictures and, after `use_svg`, of a notebook's.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read out, searched and has every glyph
    "grid.alpha": 0.15,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "font.size": 10,
}


def use_svg() -> None:
    """Draw a notebook's pictures as SVG: sharp, in a plain style, and with the browser's own text.

    matplotlib's font has no glyphs for many scripts; a browser has. Changes matplotlib's settings
    (``rcParams``) until the kernel ends. Does nothing to figures outside a notebook but the style.
    """
    import matplotlib
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    matplotlib.rcParams.update(STYLE)
    set_matplotlib_formats("svg")
    warnings.filterwarnings("ignore", message="Glyph .* missing from")


def shortened(name: object, length: int = 28) -> str:
    """A name as text to draw, its middle left out where it is long.

    matplotlib would read what is between dollars as a formula, and gives up laying out a picture
    whose names leave no room for it.
    """
    text = str(name)
    if len(text) > length:
        text = f"{text[: length // 2 - 1]}…{text[-(length - length // 2) :]}"
    return text.replace("$", r"\$")


def named_rows(ax: Any, names: Sequence[object]) -> None:
    """A name at each whole number of the y axis, the first on top."""
    ax.set_yticks(np.arange(len(names)), [shortened(name) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
