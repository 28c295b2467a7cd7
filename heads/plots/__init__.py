"""Pictures of what was fitted, as scikit-learn's displays.

Each display keeps the numbers that it draws. ``from_estimator`` or ``from_predictions`` makes
and draws it, ``plot(ax=)`` draws it (again), on axes that are given or on new ones; ``ax_`` and
``figure_`` are where it was drawn last. matplotlib is imported when something is drawn.

=================  =================================================================
``selection``      DropoutDisplay, ThresholdDisplay: why that rate, why that cut?
``labels``         LabelChangeDisplay, LabelShiftDisplay: which labels changed?
``reliable``       ReliabilityDisplay: do probabilities hold what they promise?
``trade``          ParetoDisplay, GapDisplay: what is won on which domain?
``blends``         BlendPathDisplay, BlendWeightsDisplay: what is in the blend?
=================  =================================================================
"""

from __future__ import annotations

from heads.plots.blends import BlendPathDisplay, BlendWeightsDisplay
from heads.plots.canvas import BLUE, GREEN, GREY, ORANGE, use_svg
from heads.plots.labels import LabelChangeDisplay, LabelShiftDisplay
from heads.plots.reliable import ReliabilityDisplay
from heads.plots.selection import DropoutDisplay, ThresholdDisplay
from heads.plots.trade import GapDisplay, ParetoDisplay

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "BlendPathDisplay",
    "BlendWeightsDisplay",
    "DropoutDisplay",
    "GapDisplay",
    "LabelChangeDisplay",
    "LabelShiftDisplay",
    "ParetoDisplay",
    "ReliabilityDisplay",
    "ThresholdDisplay",
    "use_svg",
]
