"""Which labels do stored heads give to the images of a set of caches?"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, vstack

from featcache import CacheSet, FeatureCache
from featcache.cacheset import refuse_other_images, short
from featcache.combined import combination
from heads.decisions import Decision, GlobalThreshold
from heads.domain_heads import AdaptedModel, DomainHead
from heads.given import GivenScores, ScoreFile, named_files
from heads.parallel import worker_threads
from heads.products import Block, Given, Term, blended, collapsed, term_of
from heads.storage import Head, StoredBlend, load

ROWS_AT_ONCE = 4096
_SCORES_AT_ONCE = 1 << 23  # of each model: what a few of them take at once stays bounded
IMAGE_SET = "--caches"  # all caches that are given, whatever their folders


@dataclass
class Predictor:
    """A stored head or blend, with the caches of one image set that it needs.

    Attributes
    ----------
    content : Head or StoredBlend
    caches : list of FeatureCache
        One for each network, or, if only scores are blended, any.
    heads : list of estimators
        For each model what predicts: an adapted model's head of the domain that its cache
        is, else the estimator.
    terms : list of Term
        Of a blend: what is added up, a term for each model or for several.
    """

    content: Head | StoredBlend
    caches: list[FeatureCache]
    heads: list[Any]
    terms: list[Term] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        caches: Sequence[str | os.PathLike[str]],
        strict: bool = False,
        scores: Sequence[str] = (),
    ) -> Predictor:
        """Read the file and match its heads with caches by ``network_id``.

        A cache is one domain: adapted models look at all its readable images, and at no label,
        before anything is predicted; unless `strict`, which leaves them at Stage 1's own map.
        `scores` are files, by their name or as ``NAME=FILE``, for members of a blend that are
        known by their scores alone.

        Raises
        ------
        ValueError
            If a network has no cache or two, or the caches are of different images.
        """
        content = load(path)
        cut = isinstance(content, StoredBlend) or own_rule(content) is not None
        if not cut and "threshold" not in content.provenance:
            raise ValueError(f"{path}: has no threshold to cut at; make it with `heads fit`")
        return cls.of(content, caches, strict, scores, path)

    @classmethod
    def of(
        cls,
        content: Head | StoredBlend,
        caches: Sequence[str | os.PathLike[str] | FeatureCache],
        strict: bool = False,
        scores: Sequence[str] = (),
        path: str | os.PathLike[str] = "the blend",
    ) -> Predictor:
        """:meth:`open` of what has been read; `path` is what it is called in errors."""
        found = CacheSet(caches, image_set=lambda cache: IMAGE_SET, recursive=False)
        models = content.models if isinstance(content, StoredBlend) else [content]
        networks: dict[str | None, FeatureCache] = {}
        for model in models:
            if not isinstance(model.estimator, GivenScores):
                networks[model.network_id] = _checked(path, found, model)
        used = list(networks.values()) or [found.caches[0]]
        refuse_other_images(used)
        heads = [
            model.estimator
            if isinstance(model.estimator, GivenScores)
            else _for_domain(model, networks[model.network_id], strict)
            for model in models
        ]
        if isinstance(content, StoredBlend):
            terms = _terms(path, content, heads, used, named_files(scores))
            return cls(content, used, heads, terms)
        content.complete(used[0].weight)
        return cls(content, used, heads)

    @property
    def models(self) -> list[Head]:
        """One or, of a blend, several."""
        return self.content.models if isinstance(self.content, StoredBlend) else [self.content]

    @property
    def ids(self) -> np.ndarray:
        """(n,) of the image set."""
        return self.caches[0].ids

    @property
    def classes(self) -> np.ndarray:
        """(K,) class ids."""
        return self.models[0].classes

    def explanations(self) -> dict[str, str]:
        """By network, what an adapted model did to this domain and why.

        Of several models of a network, or networks of one name, by the model's name as well.
        """
        names = {cache.network_id: cache.network_name for cache in self.caches}
        stored = isinstance(self.content, StoredBlend)
        files = self.content.model_names if isinstance(self.content, StoredBlend) else [""]
        told = [
            (names[model.network_id], file, head.explain())
            for head, model, file in zip(self.heads, self.models, files, strict=True)
            if isinstance(head, DomainHead)
        ]
        often = Counter(network for network, _, _ in told)
        return {
            f"{network} ({file})" if stored and often[network] > 1 else network: text
            for network, file, text in told
        }

    @property
    def readable(self) -> np.ndarray:
        """(n,) bool: rows whose image could be read for every model."""
        return np.logical_and.reduce([cache.valid for cache in self.caches])

    @property
    def rows_at_once(self) -> int:
        """Of a chunk."""
        return min(ROWS_AT_ONCE, max(64, _SCORES_AT_ONCE // max(1, len(self.classes))))

    def chunks(self, start: int = 0) -> Iterator[np.ndarray]:
        """Probabilities (rows, K) in the order of ``ids`` from row `start`, some at a time.

        Memory is that of the heads and of a few chunks, whatever the number of images.
        """
        step = self.rows_at_once
        parts = [slice(at, at + step) for at in range(start, len(self.ids), step)]
        if isinstance(self.content, StoredBlend):
            yield from self._blended(parts, self.content.blend.average == "logit")
            return
        for rows in parts:
            yield self.heads[0].predict_proba(self.caches[0].features[rows])

    def _blended(self, parts: Sequence[slice], logits: bool) -> Iterator[np.ndarray]:
        needs: list[set[str]] = [set() for _ in self.caches]
        for term in self.terms:
            needs[term.network].update(term.needs)
        owns = [cache.weight for cache in self.caches]
        with worker_threads() as run:
            for rows in parts:
                made = [
                    Block(cache.features[rows], own)
                    for cache, own in zip(self.caches, owns, strict=True)
                ]
                pairs = zip(made, needs, strict=True)
                blocks = list(run(lambda pair: pair[0].prepare(*sorted(pair[1])), pairs))
                total: np.ndarray | None = None
                for scores in run(partial(_scores, blocks=blocks, rows=rows), self.terms):
                    total = scores if total is None else np.add(total, scores, out=total)
                assert total is not None
                yield blended(total, logits)

    def rule(self) -> Decision:
        """The rule that goes with the content."""
        return rule_of(self.content)

    def predict_proba(self) -> np.ndarray:
        """(n, K) probabilities."""
        return np.concatenate(list(self.chunks()))

    def sets(self, start: int = 0) -> Iterator[csr_matrix]:
        """Label sets (rows, K) bool of chunks from row `start` on.

        Nothing for an image that could not be read.
        """
        rule, readable = self.rule(), self.readable
        for P in self.chunks(start):
            chosen = rule.predict(P)
            keep = csr_matrix(readable[start : start + len(P), None])
            part = csr_matrix(chosen.multiply(keep))
            part.sort_indices()  # a product with a column leaves them in any order
            yield part
            start += len(P)

    def predict(self) -> csr_matrix:
        """(n, K) bool: label sets."""
        return csr_matrix(vstack(list(self.sets())))

    def label_sets(self) -> list[list[str]]:
        """Class ids of each image."""
        return named(self.predict(), self.classes)


def _scores(term: Term, blocks: Sequence[Block], rows: slice) -> np.ndarray:
    return term.scores(blocks[term.network], rows)


def named(sets: csr_matrix, classes: np.ndarray) -> list[list[str]]:
    """Class ids of each row."""
    return [
        classes[sets.indices[a:b]].tolist()
        for a, b in zip(sets.indptr, sets.indptr[1:], strict=False)
    ]


def rule_of(content: Head | StoredBlend) -> Decision:
    """The rule that a head or blend decides by; files of old have a global threshold alone."""
    rule = own_rule(content)
    if rule is not None:
        return rule
    if isinstance(content, StoredBlend):
        return GlobalThreshold.at(content.blend.threshold_, content.blend.n_features_in_)
    return GlobalThreshold.at(content.provenance["threshold"], len(content.classes))


def own_rule(content: Head | StoredBlend) -> Decision | None:
    """The rule that is kept with a head or blend, or that an adapted model brings.

    None where a threshold alone is kept.
    """
    if content.decision is not None or isinstance(content, StoredBlend):
        return content.decision
    return (
        None if "threshold" in content.provenance else getattr(content.estimator, "decision", None)
    )


def _checked(path: str | os.PathLike[str], caches: CacheSet, model: Head) -> FeatureCache:
    """The cache of a model's network, which must have what the model needs."""
    cache = _matching(path, caches, model.network_id)
    _refuse_other_width(path, model, cache)
    try:
        model.refuse_layer(cache.weight)
    except ValueError as error:
        raise ValueError(f"{cache.path}: {error}") from None
    return cache


def _terms(
    path: str | os.PathLike[str],
    stored: StoredBlend,
    heads: Sequence[Any],
    caches: Sequence[FeatureCache],
    files: dict[str, str],
) -> list[Term]:
    """What is added up: models, in as few products as there may be."""
    number = {cache.network_id: at for at, cache in enumerate(caches)}
    owns = [cache.weight for cache in caches]
    logits = stored.blend.average == "logit"
    terms: list[Term] = []
    for model, head, weight in zip(stored.models, heads, stored.blend.weights_, strict=True):
        if isinstance(head, GivenScores):
            file = _given(path, head, files)
            at, columns = file.rows(caches[0].ids), file.columns(model.classes)
            terms.append(Given(file, at, columns, float(weight), logits))
        else:
            network = number[model.network_id]
            terms.append(term_of(model, head, owns[network], network, float(weight), logits))
    return collapsed(terms, owns)


def _given(path: str | os.PathLike[str], model: GivenScores, files: dict[str, str]) -> ScoreFile:
    if model.name not in files:
        have = ", ".join(files) or "none is given"
        raise ValueError(
            f"{path}: needs the scores of {model.name!r} for these images; pass --scores "
            f"{model.name}=FILE ({have})"
        )
    return ScoreFile(files[model.name])


def _for_domain(model: Head, cache: FeatureCache, strict: bool) -> Any:
    """The estimator, or what an adapted model makes of the domain that the cache is."""
    if not isinstance(model.estimator, AdaptedModel):
        return model.estimator
    if strict:
        return model.estimator.for_domain()
    features, valid = cache.features, cache.valid
    try:
        return model.estimator.for_domain(features if valid.all() else features[valid])
    except ValueError as error:
        raise ValueError(f"{cache.path}: {error}") from None


def _refuse_other_width(path: str | os.PathLike[str], model: Head, cache: FeatureCache) -> None:
    """Features that were written without a name may be of any network."""
    wanted = model.estimator.n_features_in_
    if wanted != cache.shape[2]:
        raise ValueError(
            f"{cache.path}: has {cache.shape[2]} features, but a head of {path} was fitted on "
            f"{wanted}; give the features of the network that it was fitted on"
        )


def _matching(
    path: str | os.PathLike[str], caches: CacheSet, network_id: str | None
) -> FeatureCache:
    if network_id in caches.networks:
        return caches[network_id, IMAGE_SET]
    parts = shlex.join(str(cache.path) for cache in combination(network_id, caches))
    raise ValueError(
        f"{path}: needs a cache of network {short(network_id)}; "
        + (
            f"`featcache concat {parts} --out CACHE.h5` makes it: add it to --caches"
            if parts
            else f"--caches has only {caches.listing}"
        )
    )
