"""Pictures of the page: SVG that takes its colours and its text from the page around it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np

from heads.blending import Blend
from heads.describing import Setting, settings
from heads.labeltable import LabelTable
from heads.markup import Markup, element
from heads.plots import (
    BlendPathDisplay,
    BlendWeightsDisplay,
    DropoutDisplay,
    LabelChangeDisplay,
    LabelShiftDisplay,
    ParetoDisplay,
    ReliabilityDisplay,
    ThresholdDisplay,
)
from heads.plots.canvas import BLUE, GREEN, GREY, ORANGE, STYLE
from heads.plots.trade import source_weight_labels
from heads.report.contents import Contents

_WIDTH = 5.2  # inches; about a phone's width at the size of text that is drawn
_INK = "#010203"  # becomes the colour of the page's text
_COLOURS = {
    _INK: "currentColor",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
    GREY: "var(--grey)",
}
_STYLE: dict[Any, Any] = {
    **STYLE,
    "svg.hashsalt": "heads",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
}
_DROPOUT_MODELS = 4
_ENOUGH = 5  # images of a label whose change is shown
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Picture:
    """A picture with what it shows in words.

    Attributes
    ----------
    title, words : str
        Heading, and an explanation that stands without the picture.
    draw : function of axes
    height : float
        Inches.
    """

    title: str
    words: str
    draw: Callable[[Any], object]
    height: float = 3.6

    def markup(self, number: int) -> Markup:
        """``<figure>``; `number` tells the pictures of a page apart."""
        drawing = inline_svg(self.draw, self.height, f"p{number}", self.title)
        caption = element("figcaption", element("h3", self.title), element("p", self.words))
        return element("figure", caption, drawing)


def inline_svg(
    draw: Callable[[Any], object], height: float, prefix: str, label: str, width: float = _WIDTH
) -> Markup:
    """SVG to stand in a page: no size of its own, ids of its own, colours of the page."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The browser has glyphs for names that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for key in ("width", "height"):
        del root.attrib[key]
    root.attrib |= {"role": "img", "aria-label": label}
    for node in root.iter():
        for useless in [child for child in node if child.tag.rpartition("}")[2] in _USELESS]:
            node.remove(useless)
        # In a page the namespaces of SVG are understood.
        node.tag = node.tag.removeprefix(_SVG)
        if _LINK in node.attrib:
            node.attrib["href"] = node.attrib.pop(_LINK)
        for key, value in node.attrib.items():
            node.attrib[key] = _own(key, value, prefix)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


_USELESS = frozenset({"metadata", "style"})  # the style would reach the whole page


def _own(key: str, value: str, prefix: str) -> str:
    """An attribute with ids that are this picture's and colours that are the page's."""
    if key == "id":
        return f"{prefix}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{prefix}-{value[1:]}"
    if key == "clip-path":
        return value.replace("url(#", f"url(#{prefix}-")
    if key in ("style", "fill", "stroke"):
        for colour, variable in _COLOURS.items():
            value = value.replace(colour, variable)
    return value


# ---------------------------------------------------------------------- the choice


def pictures(found: Contents, labels: LabelTable) -> list[Picture]:
    """What there is to see of this head or blend, the most telling first."""
    chosen = [_threshold(found)]
    if "AP change" in labels.columns and (labels.columns["target"] >= _ENOUGH).any():
        chosen.append(_change(labels))
    if found.blend is not None:
        chosen += _blend_pictures(found.blend, found.names)
    chosen.append(_reliability(found))
    if found.source_Y is not None:
        chosen.append(_shift(found))
    if any(hasattr(model.estimator, "cv_results_") for model in found.models):
        chosen.append(_dropout(found))
    return [*chosen, *_pareto(found)]


def _threshold(found: Contents) -> Picture:
    oof, blend = found.oof, found.blend
    threshold = blend.threshold_ if blend else found.content.provenance.get("threshold")

    def draw(ax: Any) -> None:
        ThresholdDisplay.from_predictions(
            oof.Y,
            oof.proba,
            beta=found.beta,
            threshold=threshold,
            mask=oof.mask,
            missed=oof.missed,
            ax=ax,
        )

    return Picture(
        "One cut for all labels",
        f"Mean F{found.beta:g} of the labelled images if labels with a probability above the cut "
        "were taken. A broad top means that the cut need not be exact.",
        draw,
    )


def _change(labels: LabelTable) -> Picture:
    enough = int(np.count_nonzero(labels.columns["target"] >= _ENOUGH))
    return Picture(
        "Labels before and after adaptation",
        "Average precision of single labels by the networks' own last layer (before) and by the "
        "adapted heads (after): the greatest gains and losses among labels of at least "
        f"{_ENOUGH} images, with their number.",
        lambda ax: LabelChangeDisplay(labels, max_labels=24, min_count=_ENOUGH).plot(ax),
        1.2 + 0.22 * min(24, enough),
    )


def _blend_pictures(blend: Blend, names: list[str]) -> list[Picture]:
    rows = min(len(names), 30)
    both = [
        Picture(
            "Weights in the blend",
            f"{len(names)} model{' has' if len(names) == 1 else 's have'} a weight; all weights "
            "add up to 1.",
            lambda ax: BlendWeightsDisplay.from_estimator(blend, names, ax=ax),
            1.2 + 0.26 * rows,
        )
    ]
    if len(blend.path_["score"]) > 1:
        both.append(
            Picture(
                "How the blend grew",
                f"Mean F{blend.beta:g} after each addition, on the images that chose them. Once "
                "more models no longer help, the best step is kept.",
                lambda ax: BlendPathDisplay.from_estimator(blend, ax=ax),
            )
        )
    return both


def _reliability(found: Contents) -> Picture:
    oof = found.oof

    def draw(ax: Any) -> None:
        ReliabilityDisplay.from_predictions(
            oof.Y, oof.proba, mask=oof.mask, ax=ax, name="as stored"
        )
        rule: Any = found.rule
        if getattr(rule, "calibration_", None) is not None:
            calibrated = rule.predict_proba(oof.proba)
            ReliabilityDisplay.from_predictions(
                oof.Y, calibrated, mask=oof.mask, ax=ax, name="calibrated", color=ORANGE
            )

    return Picture(
        "Do probabilities hold?",
        "How often labels are true, against the probability that was given. Below the diagonal "
        "probabilities are too high, above it too low.",
        draw,
    )


def _shift(found: Contents) -> Picture:
    assert found.source_Y is not None
    source = found.source_Y
    return Picture(
        "Label frequencies of the two places",
        "Share of the images that have a label, among the validation images and among the labelled "
        "ones of the new place. Far from the diagonal, people label other things there.",
        lambda ax: LabelShiftDisplay.from_labels(source, found.oof.Y, found.class_names, ax=ax),
        4.2,
    )


def _dropout(found: Contents) -> Picture:
    order = np.argsort(-found.weights, kind="stable").tolist()
    heaviest = [m for m in order if hasattr(found.models[m].estimator, "cv_results_")]
    heaviest = heaviest[:_DROPOUT_MODELS]

    def draw(ax: Any) -> None:
        for m, colour in zip(heaviest, (BLUE, ORANGE, GREEN, GREY), strict=False):
            display = DropoutDisplay.from_estimator(
                found.models[m].estimator, ax=ax, name=found.names[m], color=colour
            )
            display.band_.set_label("_")
            if display.marker_ is not None:
                display.marker_.set_label("_")
        ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.18), ncols=2)

    return Picture(
        "Dropout rates",
        "Out-of-fold score of the heaviest models on the images that they were fitted on (of both "
        "places, where it was both) against the dropout rate; the band is one standard deviation "
        "of the folds, the star the rate that was taken.",
        draw,
        4.0,
    )


def _pareto(found: Contents) -> list[Picture]:
    """Of the heaviest model that was fitted on both domains."""
    for m in np.argsort(-found.weights, kind="stable").tolist():
        facts = found.models[m].provenance
        if len(facts.get("pareto", {}).get("source_weight", [])) < 2:
            continue

        def draw(ax: Any, facts: dict[str, Any] = facts) -> None:
            table = dict(zip(Setting._fields, zip(*settings(facts), strict=True), strict=True))
            ParetoDisplay.from_table(
                table,
                chosen=table["chosen"].index(True),
                labels=source_weight_labels(table),
                measure=f"mean F{facts['beta']:g}",
                ax=ax,
            )

        words = (
            f"{found.names[m]}: out-of-fold score on both, by the weight of the source (beside "
            "those that no other setting beats) and the dropout rate."
        )
        return [Picture("New place against old", words, draw)]
    return []
