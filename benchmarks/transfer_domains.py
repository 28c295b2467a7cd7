"""Which domains, with which shifts of images and of targets, does `transfer` measure on?

A *pool* is one typeface: all characters that no network was trained on, three views each, and
their components. Domains are cut out of pools: a draw of characters (the split), maybe
unevenly so that components change their frequencies, maybe labelled by an annotator who
leaves out each component with a probability of his own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from examples.kanji.dataset import SOURCE_FONTS, TARGET_FONTS, image_id, read_kanji
from examples.quickstart import VIEWS
from featcache import FeatureCache
from featcache.extraction import extract
from featcache.settings import ExtractionConfig

SOURCE = "source"  # the printed typefaces: held-out characters
FOLDERS = ("stage_1", "stage_2")
LABELLED = 1000
STAGE_2 = 1000
OWN_STATISTICS = 0.5  # share, where batch normalisation takes any of an image set
FEW = 150  # rows of a domain beside these, that some may see the labels of
KINDS = ("none", "frequencies", "habits")


@dataclass(frozen=True)
class Domain:
    """Rows of one domain for one network.

    Attributes
    ----------
    X : (n, v, d) float16
    Y : (n, K) bool
        As the domain's annotator sees them.
    character : (n,) str
        Images of one character are one group.
    """

    X: np.ndarray
    Y: np.ndarray
    character: np.ndarray

    def take(self, rows: np.ndarray) -> Domain:
        """Some of the rows."""
        return Domain(self.X[rows], self.Y[rows], self.character[rows])

    def of(self, characters: np.ndarray) -> Domain:
        """The rows of these characters."""
        return self.take(np.flatnonzero(np.isin(self.character, characters)))

    def labelled_by(self, shift: Shift, annotator: list[int]) -> Domain:
        """As an annotator sees it; the same seed is the same annotator."""
        return replace(self, Y=shift.label(self.Y, np.random.default_rng(annotator)))

    def beside(self, others: Sequence[Domain]) -> Domain:
        """With the features that other networks have of the same images."""
        return replace(self, X=np.concatenate([self.X, *(o.X for o in others)], axis=2))

    def __len__(self) -> int:
        return len(self.Y)


def missing_caches(
    quickstart: Path, folder: Path, networks: Sequence[str]
) -> list[ExtractionConfig]:
    """``featcache extract`` of every typeface that the quickstart did not extract itself.

    And of all of them, and of the validation images, with half of their own statistics.
    """
    typefaces = [f"{font}_{part}" for font in TARGET_FONTS for part in FOLDERS]
    wanted = [(name, 0.0) for name in typefaces]
    wanted += [(name, OWN_STATISTICS) for name in ("validation", *typefaces)]
    configs = []
    for name, share in wanted:
        font, _, part = name.partition("_")
        for network in networks:
            out = cache_file(quickstart, folder, name, network, share)
            if out.is_file():
                continue
            images = f"{font}/{part}" if part else "train"
            configs.append(
                ExtractionConfig(
                    run=str(quickstart / "runs" / network),
                    images=str(quickstart / "data" / images),
                    out=str(out),
                    ids="" if part else str(quickstart / "data" / "validation_ids.txt"),
                    views="strong",
                    view_count=VIEWS,
                    domain_statistics=share,
                    workers=0,
                    threads=1,
                )
            )
    return configs


def make_caches(quickstart: Path, folder: Path, networks: Sequence[str]) -> None:
    """Extract what is missing; some minutes."""
    for network in networks:
        if not (quickstart / "runs" / network).is_dir():
            raise SystemExit(
                f"--quickstart {quickstart}: no runs/{network} there; run `make quickstart` first"
            )
    for config in missing_caches(quickstart, folder, networks):
        print(f"extracting {config.out}", flush=True)
        extract(config)


# ---------------------------------------------------------------------------- domains


@dataclass(frozen=True)
class Shift:
    """How the targets of the domains differ.

    Attributes
    ----------
    kind : "none", "frequencies" or "habits"
        frequencies: characters are drawn so that components become up to `factor` times as
        frequent or rare; habits: a domain's annotator leaves out component k with probability
        p_k of his own. Every domain but the validation rows has its own.
    """

    kind: str
    factor: float = 5.0
    kept: float = 0.5  # share of the characters that is drawn unevenly

    def draw(self, domain: Domain, n: int, rng: np.random.Generator) -> Domain:
        """At most n rows."""
        if self.kind != "frequencies":
            return domain.take(np.sort(rng.permutation(len(domain))[:n]))
        n = min(n, int(self.kept * len(domain)))
        taste = rng.uniform(-1, 1, domain.Y.shape[1]) * np.log(self.factor)
        # The n largest of log w + Gumbel noise are n draws without replacement at odds w.
        keys = domain.Y @ taste + rng.gumbel(size=len(domain))
        return domain.take(np.sort(np.argsort(-keys)[:n]))

    def label(self, Y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """What the domain's annotator sees."""
        if self.kind != "habits":
            return Y
        misses = rng.beta(0.6, 1.0, Y.shape[1])  # many components hardly, some nearly always
        return Y & (rng.random(Y.shape) >= misses)


@dataclass(frozen=True)
class Pools:
    """All characters of every typeface, for one network.

    Attributes
    ----------
    source : Domain
        The validation characters in the printed typefaces.
    fonts : dict of Domain
    train : dict of Domain
        Characters of the training set in typefaces that have them, plain view; for oracles.
    weight, bias : (K, d), (K,)
        The network's last layer.
    """

    source: Domain
    fonts: dict[str, Domain]
    train: dict[str, Domain]
    weight: np.ndarray
    bias: np.ndarray

    @classmethod
    def read(cls, quickstart: Path, folder: Path, network: str, share: float = 0.0) -> Pools:
        """From the caches of the quickstart and those of :func:`make_caches`.

        `share` is that of an image set's own statistics.
        """

        def cache(name: str) -> FeatureCache:
            return FeatureCache(cache_file(quickstart, folder, name, network, share))

        source = cache("validation")
        truth = _Truth(source.classes)
        fonts, train = {}, {}
        for font in TARGET_FONTS:
            parts = [truth.domain(cache(f"{font}_{part}"), (font,)) for part in FOLDERS]
            fonts[font] = _joined(parts)
            oracle = quickstart / "caches" / f"oracle_{font}_source" / f"{network}.h5"
            if oracle.is_file() and not share:
                train[font] = truth.domain(FeatureCache(oracle), (font,))
        assert source.weight is not None
        assert source.bias is not None
        own = truth.domain(source, SOURCE_FONTS)
        return cls(own, fonts, train, source.weight, source.bias)

    @classmethod
    def side_by_side(cls, pools: Sequence[Pools]) -> Pools:
        """The features of several networks as those of one, as by ``featcache concat``."""
        first, others = pools[0], pools[1:]
        known = [name for name in first.train if all(name in p.train for p in others)]
        return cls(
            first.source.beside([p.source for p in others]),
            {name: d.beside([p.fonts[name] for p in others]) for name, d in first.fonts.items()},
            {name: first.train[name].beside([p.train[name] for p in others]) for name in known},
            np.concatenate([p.weight for p in pools], axis=1) / len(pools),
            np.mean([p.bias for p in pools], axis=0),
        )


class _Truth:
    """Components by image id."""

    def __init__(self, classes: np.ndarray) -> None:
        self.kanji = read_kanji()
        self.column = {c: k for k, c in enumerate(classes.tolist())}

    def domain(self, cache: FeatureCache, fonts: tuple[str, ...]) -> Domain:
        """The rows of a cache with their true labels."""
        of_id = {image_id(font, k.character): k for font in fonts for k in self.kanji}
        found = [of_id[i] for i in cache.ids.tolist()]
        Y = np.zeros((len(found), len(self.column)), bool)
        for row, kanji in enumerate(found):
            Y[row, [self.column[c] for c in kanji.labels if c in self.column]] = True
        return Domain(cache.features[:], Y, np.array([k.character for k in found]))


def cache_file(quickstart: Path, folder: Path, name: str, network: str, share: float = 0.0) -> Path:
    """Of an image set, with a share of its own statistics: the quickstart's, or ours."""
    if share:
        return folder / f"domain_statistics_{share}" / name / f"{network}.h5"
    own = quickstart / "caches" / name / f"{network}.h5"
    return own if own.is_file() else folder / name / f"{network}.h5"


def _joined(parts: list[Domain]) -> Domain:
    return Domain(
        np.concatenate([p.X for p in parts]),
        np.concatenate([p.Y for p in parts]),
        np.concatenate([p.character for p in parts]),
    )


@dataclass(frozen=True)
class Case:
    """A Stage 1 with all the domains that are judged by it.

    Attributes
    ----------
    source : Domain
        Validation rows, half of the validation characters.
    stage_1 : Domain
        Labelled rows.
    tests : dict of Domain
        By name: what is scored. Nobody looks at its labels.
    few : dict of Domain
        Other rows of the same domains, for those who may use some labels.
    oracles : dict of (X, Y)
        Labelled plain views of each test's domain, none of them scored.
    """

    source: Domain
    stage_1: Domain
    tests: dict[str, Domain]
    few: dict[str, Domain]
    oracles: dict[str, tuple[np.ndarray, np.ndarray]]


def make_case(pools: Pools, font: str, shift: Shift, split: int) -> Case:
    """Cut the domains out of the pools; all networks get the same images and labels."""
    number = KINDS.index(shift.kind)
    rng = np.random.default_rng([split, number, TARGET_FONTS.index(font)])
    order = rng.permutation(pools.fonts[font].character)
    first, rest = order[: LABELLED + 200], order[LABELLED + 200 :]
    held = rng.permutation(np.unique(pools.source.character))
    halves = np.isin(pools.source.character, held[: len(held) // 2])
    pool_of = pools.fonts | {SOURCE: pools.source.take(np.flatnonzero(halves))}
    tests, few, oracles = {}, {}, {}
    stage_1 = None
    for code, (name, pool) in enumerate(sorted(pool_of.items())):
        own, seed = pool.labelled_by(shift, [split, number, 100 + code]), int(rng.integers(1 << 30))
        if name == font:
            stage_1 = shift.draw(own.of(first), LABELLED, np.random.default_rng(seed))
        left = own if name == SOURCE else own.of(rest)
        domain = shift.draw(left, STAGE_2 + FEW, np.random.default_rng(seed))
        mixed = rng.permutation(len(domain))
        few[name], tests[name] = domain.take(mixed[:FEW]), domain.take(np.sort(mixed[FEW:]))
        unscored = own.take(np.flatnonzero(~np.isin(own.character, domain.character)))
        parts = [unscored, few[name]]
        if name in pools.train:
            parts.append(pools.train[name].labelled_by(shift, [split, number, 100 + code]))
        oracles[name] = (
            np.concatenate([p.X[:, 0] for p in parts]),
            np.concatenate([p.Y for p in parts]),
        )
    assert stage_1 is not None
    source = pools.source.take(np.flatnonzero(~halves))
    return Case(source, stage_1, {font: tests[font]} | tests, few, oracles)
