"""The page itself: summary, pictures, tables, gallery, provenance."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from featcache import __version__
from heads.blending import Blend
from heads.chain import described
from heads.domain_heads import DomainHead
from heads.galleries import gallery
from heads.labeltable import LabelTable, label_table
from heads.markup import Markup, asset, element, joined, table
from heads.metrics import bootstrap_interval, paired_bootstrap_interval
from heads.nested import images_needed
from heads.report.contents import TARGET, Contents
from heads.report.pictures import pictures
from heads.results import honest_text
from heads.storage import Head

_LABEL_ROWS = 1000


def page(found: Contents, title: str, images: str, count: int) -> str:
    """The whole HTML document."""
    labels = label_table(
        found.oof.Y,
        found.oof.proba if found.unadapted is None else found.unadapted.proba,
        None if found.unadapted is None else found.oof.proba,
        names=found.class_names,
        Y_source=found.source_Y,
        beta=found.beta,
        mask=found.oof.mask,
        missed=found.oof.missed,
    )
    sections = {
        "Summary": _summary(found),
        "Pictures": _pictures(found, labels),
        "Models": _models(found),
        "Labels": _labels(labels),
        "Images": _images(found, images, count),
        "Provenance": _provenance(found),
    }
    return _document(title or Path(found.path).name, sections)


def _document(title: str, sections: Mapping[str, Markup]) -> str:
    script = asset("tables.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    # Even if text should become markup by a mistake of ours, nothing in it may run or load.
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    anchors = {name: name.lower() for name in sections}
    links = [element("li", element("a", name, href=f"#{at}")) for name, at in anchors.items()]
    parts = [
        element(
            "section", element("h2", name, id=anchors[name]), body, aria_labelledby=anchors[name]
        )
        for name, body in sections.items()
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(asset("page.css")), Markup(asset("parts.css"))),
    )
    body = element(
        "body",
        element("a", "Skip to the summary", href="#summary", class_="skip"),
        element("header", element("h1", title), element("nav", element("ul", *links))),
        element("main", *parts),
        element("footer", f"Written by heads {__version__}. This page loads nothing."),
        element("script", Markup(script)),
    )
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"


# ------------------------------------------------------------------------- summary


def _summary(found: Contents) -> Markup:
    score, oof, F = found.score, found.oof, f"F{found.beta:g}"
    tiles = []
    if score is not None:
        interval = f"95 % interval {score.low:.3f} to {score.high:.3f}"
        words = f"{interval}, {len(oof.ids):,} labelled images"
        tiles.append(_tile(f"Mean {F} per image", f"{score.score:.3f}", words))
    if found.unadapted is not None:
        before = found.unadapted.fbeta
        origin = "validation images" if found.unadapted.from_source else "these images"
        interval = "95 % interval {:.3f} to {:.3f}".format(
            *bootstrap_interval(before, groups=oof.groups)
        )
        words = f"{interval}, cut chosen on {origin}"
        tiles.append(_tile("Without adaptation", f"{before.mean():.3f}", words))
        if score is not None:
            low, high = paired_bootstrap_interval(score.fbeta, before, groups=oof.groups)
            words = f"95 % interval {low:+.3f} to {high:+.3f}, image by image"
            tiles.append(_tile("Gain", f"{score.score - before.mean():+.3f}", words))
    networks = {model.network_id for model in found.models}
    plural = "s" * (len(networks) != 1)
    tiles.append(
        _tile("Models", f"{len(found.models)}", f"heads of {len(networks)} network{plural}")
    )
    true = np.diff(oof.Y.indptr) + oof.missed
    chosen = np.diff(found.sets.indptr)
    tiles.append(
        _tile(
            "Labels an image",
            f"{chosen.mean():.2f}",
            f"predicted; {true.mean():.2f} are true. {np.count_nonzero(chosen == 0):,} images get "
            "none",
        )
    )
    return joined([element("div", *tiles, class_="tiles"), element("ul", *_remarks(found))])


def _optimism(blend: Blend, facts: Mapping[str, Any]) -> list[str]:
    if blend.method == "uniform":
        return []  # nothing was chosen
    text = "The weights of the blend were chosen on these images, so that the figure is optimistic"
    nested = facts.get("nested")
    if not nested:
        return [f"{text}."]
    told = honest_text(nested, nested["optimism"])
    return [f"{text}: one cut for all labels has {blend.score_:.4f} on them, and {told}."]


def _tile(name: str, value: str, words: str) -> Markup:
    return element(
        "div",
        element("h3", name),
        element("p", value, class_="figure"),
        element("p", words, class_="words"),
        class_="tile",
    )


def _remarks(found: Contents) -> list[Markup]:
    """What one must know to read the figures."""
    units = "labelled images" if found.oof.groups is None else "groups of labelled images"
    texts = [
        f"Label sets are decided by {described(found.rule)}.",
        "Every score is out of fold: neither the heads nor the decision had seen the labels of the "
        "images that they are scored on."
        if found.score is not None
        else f"{found.oof.units} {units} are too few to fit the decision anew in folds "
        f"({images_needed(found.rule)} are enough), so there is no score of it, and its label sets "
        "are those of images whose labels it has seen.",
    ]
    if found.blend is not None:
        texts += _optimism(found.blend, found.content.provenance)
    missed = int(found.oof.missed.sum())
    if missed:
        texts.append(f"{missed:,} true labels are outside the classes and count as missed.")
    if found.unadapted is None:
        texts.append(
            "No comparison with the unadapted networks: that needs caches of the labelled images "
            "with the networks' last layers; pass --caches."
        )
    for name, model in zip(found.names, found.models, strict=True):
        texts += [f"{name}: {note}" for note in model.provenance.get("warnings", [])]
    return [element("li", text) for text in texts]


# ------------------------------------------------------------------------ sections


def _pictures(found: Contents, labels: LabelTable) -> Markup:
    chosen = pictures(found, labels)
    figures = [picture.markup(number) for number, picture in enumerate(chosen)]
    return element("div", *figures, class_="figures")


def _models(found: Contents) -> Markup:
    order = np.argsort(-found.weights, kind="stable").tolist()  # the heaviest first
    models = [found.models[m] for m in order]
    facts = [model.provenance for model in models]
    betas = {float(f.get("beta", found.beta)) for f in facts}
    measure = f"F{betas.pop():g}" if len(betas) == 1 else "F-beta, each of its own beta,"
    columns: dict[str, list[Any]] = {
        "model": [found.names[m] for m in order],
        "network": [found.network(model) for model in models],
        "weight": found.weights[order].tolist(),
        "method": [_method(model) for model in models],
        "dropout": [_rate(model) for model in models],
        "score": [float(f.get("score", np.nan)) for f in facts],
        "source weight": [float(f.get("source_weight", np.nan)) for f in facts],
        "source score": [float(f.get("source_score", np.nan)) for f in facts],
        "features": [getattr(model.estimator, "n_features_in_", "") for model in models],
    }
    parts = [
        table(
            f"The models by themselves; out-of-fold mean {measure} at their own best cuts",
            columns,
            filterable=len(found.models) > 5,
        )
    ]
    for name, model in zip(columns["model"], models, strict=True):
        of_domain = isinstance(model.estimator, DomainHead)
        told = model.estimator.explain() if of_domain else model.provenance.get("explanation")
        if told:
            parts.append(_folded(f"How {name} was adapted", str(told)))
    return joined(parts)


def _folded(name: str, content: str) -> Markup:
    return element("details", element("summary", name), element("pre", content, tabindex=0))


def _method(model: Head) -> str:
    frozen = isinstance(model.estimator, DomainHead)
    return "domain head" if frozen else str(model.provenance.get("method", ""))


def _rate(model: Any) -> float:
    rate = np.asarray(getattr(model.estimator, "dropout_", np.nan))  # adapted models have several
    return float(rate) if rate.ndim == 0 else float(rate.mean())


def _labels(labels: LabelTable) -> Markup:
    """Labels that occur, those first that contribute most."""
    last = "F after" if "F after" in labels.columns else "F before"
    ordered = labels.sort(last)
    seen = np.flatnonzero(ordered.columns["target"] > 0)
    columns = {key: values[seen[:_LABEL_ROWS]] for key, values in ordered.columns.items()}
    del columns["label"]
    named = {"source": "images, source", "target": "images, target"}
    if last == "F before":  # there is only one side: these are the adapted heads
        named |= {"AP before": "AP", "F before": f"F{labels.beta:g}"}
    caption = f"{len(seen):,} of {len(labels):,} labels have a labelled image"
    if len(seen) > _LABEL_ROWS:
        caption += f"; the {_LABEL_ROWS:,} that contribute most are shown"
    caption += f". F: contribution to the mean F{labels.beta:g}. AP: average precision"
    return table(caption, {named.get(key, key): values for key, values in columns.items()})


def _images(found: Contents, images: str, count: int) -> Markup:
    oof = found.oof
    shown = gallery(
        oof.ids,
        oof.Y,
        oof.proba,
        images or None,
        names=found.class_names,
        sets=found.sets,
        beta=found.beta,
        count=count,
        mask=oof.mask,
        missed=oof.missed,
    )
    words = (
        "Right labels are bold, missed ones underlined, wrongly predicted ones struck through. "
        "Sure means: the probabilities promise a high score."
    )
    ids = [picture.id for kind in shown.pictures.values() for picture in kind]
    if not images:
        words += " Pass --images to see the images themselves."
    elif ids and not shown.thumbnails:
        raise ValueError(
            f"{images}: holds none of the labelled images, such as {ids[0]!r}; --images is the "
            "folder that their caches were extracted from"
        )
    elif missing := len(ids) - len(shown.thumbnails):
        words += f" {missing:,} of {len(ids):,} images could not be read from --images."
    return joined([element("p", words), shown.markup()])


def _provenance(found: Contents) -> Markup:
    facts = found.content.provenance
    rows = [(used, used.cache) for used in found.used]
    columns = {
        "cache": [used.path for used, _ in rows],
        "of": [used.role for used, _ in rows],
        "network": [c.network_name if c else "not found there" for _, c in rows],
        "id": [(c.network_id or "")[:12] if c else "" for _, c in rows],
        "images": [len(c) if c else "" for _, c in rows],
        "unreadable": [int(np.count_nonzero(~c.valid)) if c else "" for _, c in rows],
        "views": [c.shape[1] if c else "" for _, c in rows],
        "models": [", ".join(used.models) for used, _ in rows],
    }
    parts = [
        element("h3", "Made by"),
        element("pre", str(facts.get("command", "not recorded")), tabindex=0),
        element("p", ", ".join(f"{k} {v}" for k, v in facts.get("versions", {}).items())),
        element("h3", "Caches"),
        table("Caches that the heads were fitted on", columns),
    ]
    for used, cache in rows:
        if cache is not None:
            whole = json.dumps(dict(cache.provenance), indent=1, ensure_ascii=False, default=str)
            parts.append(_folded(f"Provenance of {used.path}", whole))
    heads = [str(model.provenance.get("command", "not recorded")) for model in found.models]
    parts.append(_folded(f"Commands of the {len(heads)} heads", "\n".join(heads)))
    if not any(used.role == TARGET and cache is not None for used, cache in rows):
        parts.append(element("p", "No cache of the labelled images was found; pass --caches."))
    return joined(parts)
