"""How far should a domain's predictions leave the source head?

Signs that need no label of the domain (D is the squared distance of two mean features beyond
chance, in variances of both):

*unsure*    a = clip((E_home - E_domain) / (E_home - E_stage_1), 0, 1), E being the mean expected
            F-beta that the calibrated source head promises itself on a domain's first views. A
            domain on which it is as sure as at home keeps it. Where it is hardly less sure on
            Stage 1 than at home that says little: with c = clip((E_home - E_stage_1) / 0.05, 0, 1)
            it is a <- c a + (1 - c) max(r, clip((E_home - E_domain) / 0.1, 0, 1)), where
            r = min(1, sqrt(D_home / D_home(Stage 1))) tells how far the domain has moved.
*familiar*  T, the mean over features of (m_domain - m_stage_1)^2 over the variance of that
            difference: 1 in expectation for other images of Stage 1's own domain. Of those the
            labels are known, so that nothing needs to be held back (f = 1); f falls to 0 where T
            says that this is another domain.
*home*      f_0, the same from the distance to the validation rows: images that look as at home keep
            the source head, however sure it is. Where few images cannot tell the two domains
            apart, f f_0 of the gate's room goes to the nearer one: f <- f (1 - f_0 + f_0 r) with
            r = e_0 / (e + e_0), e = max(T - 1, 0) the distance beyond chance. Fewer than 100 images
            show less than the whole of either: f <- f n / 100, f_0 <- f_0 n / 100.
*near*      b = clip((1/2 - D_stage_1 / D_home) / 0.4, 0, 1) (1 - h / 2) (1 - f_0): another domain,
            but one much nearer to Stage 1 than to home, as Stage 1's camera in the next street.
            Of fewer than 100 images, and with a cap below 0.7, b is less in proportion.
*aim*       k = 1/2 + clip(cos, 0, 1/2), cos of the angle between the domain's way from home and
            Stage 1's: the map that Stage 1 taught says less of a shift that goes elsewhere.
*shift*     h of :class:`heads.labelshift.LabelShiftTest`: annotators of the known domains differ,
            so those of a third one will.
*doubt*     q = clip(1 - doubt (1 - h) (1 - E_adapted / E_source), 0, 1), E being what either head
            promises itself on the domain: a head that Stage 1 has made less sure than the source
            head is here learnt what this domain has no need of. Where targets differ it is less
            sure for other reasons.

    gate = b + (1 - b) (f + (1 - f) (1 - f_0) a q k (cap - drop h))

"Unsure" cannot tell images that look different from targets that are different; hence the cap.
With doubt and 0.7, against 0.6 alone, shifted typefaces won 0.006 of the gap, and where a third
domain's annotator leaves out labels, which nothing shows beforehand, the least gain over the source
head rose from 0.003 to 0.010 of F2. 0.8 won 0.01 of the gap more, but lost 0.013 of F2 to that head
on made-up data where the label rates of a third domain alone move several-fold. `near`, `aim`, and
what `unsure` does where sureness says little, were found on drawn shapes, digits, letters and
made-up features; there they halved the domains that ended below the source head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from heads.alignment import DomainMoments, Moments

_ROWS = 1000  # images beyond which more of them make T no stricter
ENOUGH = 100  # images that can show which domain they are of
_CLEAR = 0.05  # E_home - E_stage_1 from which sureness is believed
_FALL = 0.1  # E_home - E_domain that is unsure, whatever Stage 1 is
_NEAR = (0.1, 0.5)  # D_stage_1 / D_home where b is 1 and 0


@dataclass(frozen=True)
class GateConfig:
    """Constants of the gate; see the module.

    Attributes
    ----------
    fixed : float or None
        That number instead of what the signs say.
    cap, drop, doubt : float
        Of a domain that is not Stage 1's, nor much nearer to it than to home.
    familiar : (float, float)
        T up to which f is 1, and from which it is 0; the same for f_0.
    """

    fixed: float | None = None
    cap: float = 0.7
    drop: float = 0.2
    doubt: float = 2.0
    familiar: tuple[float, float] = (1.5, 3.0)


@dataclass(frozen=True)
class Sureness:
    """E: the mean expected F-beta of the source head on three domains.

    Attributes
    ----------
    home, stage_1, domain : float
    """

    home: float
    stage_1: float
    domain: float


@dataclass(frozen=True)
class Gate:
    """The gate of a domain and the signs that it follows from.

    Attributes
    ----------
    value : float
        In [0, 1]; 0 is the source head, 1 is the head of Stage 1.
    unsure, familiar, home, trust, near, aim : float
        a, f, f_0, q, b and k; 1, 1, 0, 1, 0 and 1 where nobody looked.
    to_stage_1, to_home : float
        T of both known domains.
    """

    value: float
    unsure: float
    familiar: float
    home: float
    trust: float = 1.0
    near: float = 0.0
    aim: float = 1.0
    to_stage_1: float = 1.0
    to_home: float = 1.0

    @property
    def away(self) -> float:
        """How far this is from home: unsure, and not looking as there."""
        return (1 - self.home) * self.unsure

    @property
    def elsewhere(self) -> float:
        """How surely this is a shifted domain that is not Stage 1's either."""
        return (1 - self.familiar) * self.away

    def opened(self, shift: float, config: GateConfig) -> Gate:
        """With the value that follows from the signs."""
        cap = float(np.clip(config.cap - config.drop * shift, 0, 1))
        rest = (1 - self.familiar) * (1 - self.home) * self.unsure * self.trust * self.aim * cap
        near = self.near * min(1.0, config.cap / GateConfig.cap)  # who lowers the cap means it
        value = near + (1 - near) * (self.familiar + rest)
        return replace(self, value=value if config.fixed is None else config.fixed)


def signs_of(
    domain: DomainMoments,
    stage_1: DomainMoments,
    home: DomainMoments,
    sure: Sureness,
    shift: float,
    config: GateConfig,
) -> Gate:
    """The gate of a domain, of which no head has been asked yet how sure it is (q = 1)."""
    away, back = domain.like(home), home.like(domain)
    near, back_1 = domain.like(stage_1), stage_1.like(domain)
    way, back_way = stage_1.like(home), home.like(stage_1)
    T, T_home = distance(near, back_1), distance(away, back)
    images = domain.every.images
    f, f_0 = likeness(T, T_home, images, config)
    D_home = apart(away, back)
    moved = min(1.0, float(np.sqrt(D_home / max(apart(way, back_way), 1e-9))))
    low, high = _NEAR
    b = (high - apart(near, back_1) / max(D_home, 1e-9)) / (high - low)
    b = float(np.clip(b, 0, 1)) * (1 - shift / 2) * (1 - f_0) * min(1, images / ENOUGH)
    k = 0.5 + float(np.clip(cosine(away, way, back), 0, 0.5))
    a = unsureness(sure.home, sure.stage_1, sure.domain, moved)
    return Gate(0.0, a, f, f_0, 1.0, b, k, T, T_home).opened(shift, config)


def unsureness(home: float, stage_1: float, domain: float, moved: float = 1.0) -> float:
    """a, from the expected F-beta of the source head on three domains, and r."""
    told = float(np.clip((home - domain) / (home - stage_1), 0, 1)) if home > stage_1 else 0.0
    clear = float(np.clip((home - stage_1) / _CLEAR, 0, 1))
    fallen = float(np.clip((home - domain) / _FALL, 0, 1))
    return clear * told + (1 - clear) * max(moved, fallen)


def distance(domain: Moments, known: Moments) -> float:
    """T, squared difference of two mean features over what chance does to it."""
    images = min(domain.images, _ROWS), min(known.images, _ROWS)
    chance = domain.std**2 / images[0] + known.std**2 / images[1]
    moving = chance > 0  # on either side: a feature that is dead at home may live elsewhere
    if not moving.any():
        return 1.0
    return float(((domain.mean - known.mean)[moving] ** 2 / chance[moving]).mean())


def apart(domain: Moments, known: Moments) -> float:
    """D, squared distance beyond chance, in mean variances of both sides."""
    spread = (domain.std**2 + known.std**2) / 2
    moving = spread > 0
    if not moving.any():
        return 0.0
    D = float(((domain.mean - known.mean)[moving] ** 2 / spread[moving]).mean())
    return max(0.0, D - 1 / min(domain.images, _ROWS) - 1 / min(known.images, _ROWS))


def cosine(first: Moments, second: Moments, home: Moments) -> float:
    """Of the angle between two domains' ways from home, in standard deviations of all three."""
    spread = (first.std**2 + second.std**2 + home.std**2) / 3
    moving = spread > 0
    u, v = ((m.mean - home.mean)[moving] / np.sqrt(spread[moving]) for m in (first, second))
    size = float(np.sqrt((u @ u) * (v @ v)))
    return float(u @ v) / size if size > 0 else 1.0


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


def words(gate: Gate, sure: Sureness, beta: float, config: GateConfig) -> str:
    """Why the gate is what it is."""
    if config.fixed is not None:
        return "fixed"
    reason = (
        f"the source head expects F{beta:g} {sure.domain:.3f} here, {sure.home:.3f} at home, "
        f"{sure.stage_1:.3f} on Stage 1: {gate.unsure:.0%} as unsure"
    )
    if gate.familiar > 0:
        reason += (
            f"; images are {gate.familiar:.0%} like those of Stage 1 "
            f"(distance {gate.to_stage_1:.1f})"
        )
    else:
        limit = f"{gate.near:.0%} beside it, else capped" if gate.near > 0 else "capped"
        away = f"distance {gate.to_stage_1:.0f} of chance"
        reason += f"; another domain than Stage 1 ({away}): {limit}"
    if gate.aim < 1 and gate.elsewhere > 0:
        reason += f"; moved another way than Stage 1: {gate.aim:.0%} of the cap"
    if gate.home > 0:
        reason += f"; images are {gate.home:.0%} like those at home (distance {gate.to_home:.1f})"
    return reason
