"""How far should a domain's predictions leave the source head?

Five signs that need no label of the domain:

*unsure*    a = clip((E_home - E_domain) / (E_home - E_stage_1), 0, 1), E being the mean expected
            F-beta that the calibrated source head promises itself on a domain's first views. A
            domain on which it is as sure as at home keeps it. Where it is no less sure on
            Stage 1 than at home, sureness says nothing and a = 1.
*familiar*  T = |m_domain - m_stage_1|^2 / (d (1/n + 1/n_1)), in standard deviations of Stage 1's
            features: 1 in expectation for other images of Stage 1's own domain. Of those the
            labels are known, so that nothing needs to be held back (f = 1); f falls to 0 where T
            says that this is another domain.
*home*      f_0, the same from the distance to the validation rows: images that look as at home keep
            the source head, however sure it is. Where few images cannot tell the two domains
            apart, f f_0 of the gate's room goes to the nearer one: f <- f (1 - f_0 + f_0 r) with
            r = e_0 / (e + e_0), e = max(T - 1, 0) the distance beyond chance. Fewer than 100 images
            show less than the whole of either: f <- f n / 100, f_0 <- f_0 n / 100.
*shift*     h of :class:`heads.labelshift.LabelShiftTest`: annotators of the known domains differ,
            so those of a third one will.

*doubt*     q = clip(1 - doubt (1 - h) (1 - E_adapted / E_source), 0, 1), E being what either head
            promises itself on the domain: a head that Stage 1 has made less sure than the source
            head is here learnt what this domain has no need of. Where targets differ it is less
            sure for other reasons.

    gate = f + (1 - f) (1 - f_0) a q (cap - drop h)

"Unsure" cannot tell images that look different from targets that are different; hence the cap.
With doubt and 0.7, against 0.6 alone, shifted typefaces won 0.006 of the gap, and where a third
domain's annotator leaves out labels, which nothing shows beforehand, the least gain over the source
head rose from 0.003 to 0.010 of F2. 0.8 won 0.01 of the gap more, but lost 0.013 of F2 to that head
on made-up data where the label rates of a third domain alone move several-fold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heads.alignment import Moments

_ROWS = 1000  # images beyond which more of them make T no stricter
ENOUGH = 100  # images that can show which domain they are of


@dataclass(frozen=True)
class GateConfig:
    """Constants of the gate; see the module.

    Attributes
    ----------
    fixed : float or None
        That number instead of what the signs say.
    cap, drop, doubt : float
        Of a domain that is not Stage 1's.
    familiar : (float, float)
        T up to which f is 1, and from which it is 0; the same for f_0.
    """

    fixed: float | None = None
    cap: float = 0.7
    drop: float = 0.2
    doubt: float = 2.0
    familiar: tuple[float, float] = (1.5, 3.0)


@dataclass(frozen=True)
class Gate:
    """The gate of a domain and the signs that it follows from.

    Attributes
    ----------
    value : float
        In [0, 1]; 0 is the source head, 1 is the head of Stage 1.
    unsure, familiar, home, trust : float
        a, f, f_0 and q; 1, 1, 0 and 1 where nobody looked.
    """

    value: float
    unsure: float
    familiar: float
    home: float
    trust: float = 1.0

    @property
    def away(self) -> float:
        """How far this is from home: unsure, and not looking as there."""
        return (1 - self.home) * self.unsure

    @property
    def elsewhere(self) -> float:
        """How surely this is a shifted domain that is not Stage 1's either."""
        return (1 - self.familiar) * self.away


def unsureness(home: float, stage_1: float, domain: float) -> float:
    """a, from the expected F-beta of the source head on three domains."""
    if home <= stage_1:
        return 1.0
    return float(np.clip((home - domain) / (home - stage_1), 0, 1))


def distance(domain: Moments, known: Moments) -> float:
    """T, squared distance of two mean features over what chance does to it."""
    moving = known.std > 0
    if not moving.any():
        return 1.0
    apart = (domain.mean[moving] - known.mean[moving]) / known.std[moving]
    chance = 1 / min(domain.images, _ROWS) + 1 / min(known.images, _ROWS)
    return float((apart**2).mean() / chance)


def familiarity(T: float, bounds: tuple[float, float]) -> float:
    """f, falling from 1 to 0 within the bounds."""
    low, high = bounds
    return float(np.clip((high - T) / (high - low), 0, 1))


def likeness(
    to_stage_1: float, to_home: float, images: int, config: GateConfig
) -> tuple[float, float]:
    """f and f_0 of a domain at distances T from Stage 1 and from the validation rows."""
    familiar = familiarity(to_stage_1, config.familiar)
    home = familiarity(to_home, config.familiar)
    beyond, beyond_home = max(to_stage_1 - 1, 0.0), max(to_home - 1, 0.0)
    nearer = beyond_home / (beyond + beyond_home) if beyond + beyond_home > 0 else 0.5
    shown = min(1, images / ENOUGH)
    return shown * familiar * (1 - home + home * nearer), shown * home


def trust(adapted: float, source: float, shift: float, config: GateConfig) -> float:
    """q, from what both heads expect of themselves on a domain."""
    less = 1 - adapted / source if source > 0 else 0.0
    return float(np.clip(1 - config.doubt * (1 - shift) * max(less, 0.0), 0, 1))


def open_gate(
    unsure: float,
    familiar: float,
    home: float,
    shift: float,
    config: GateConfig,
    trusted: float = 1.0,
) -> Gate:
    """The gate of a domain with these signs."""
    cap = float(np.clip(config.cap - config.drop * shift, 0, 1))
    value = familiar + (1 - familiar) * (1 - home) * unsure * trusted * cap
    value = value if config.fixed is None else config.fixed
    return Gate(value, unsure, familiar, home, trusted)
