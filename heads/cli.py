"""The command ``heads``: from caches to heads, blends, submissions and reports."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from featcache import __version__
from featcache.console import (
    Parser,
    add_common,
    add_options,
    examples_of,
    from_arguments,
    print_json,
    run,
)
from heads import adapting, commands, verbs_of_many
from heads.adapting import AdaptConfig
from heads.chain import described
from heads.commands import BlendConfig, FitConfig
from heads.describing import settings
from heads.exporting import ExportConfig, export
from heads.report import ReportConfig, report
from heads.results import honest_text
from heads.storage import Head, StoredBlend
from heads.verbs_of_many import Verb

EPILOG = """examples:
  heads fit caches/stage_1/resnet101.h5 --out heads/resnet101.h5
  heads fit caches/stage_1/resnet101.h5 --source caches/validation/resnet101.h5 \\
      --method ridge --out heads/resnet101_both.h5
  heads adapt caches/stage_1/resnet101.h5 --source caches/validation/resnet101.h5 \\
      --out adapted/resnet101.h5
  heads sweep caches/stage_1 --source caches/validation --grid grid.toml --out swept
  heads list swept --sort f2
  heads info heads/resnet101.h5
  heads compare heads/resnet101.h5 heads/resnet101_both.h5
  heads refit swept --caches caches_again --out swept_again
  heads blend heads/*.h5 --out blend.h5
  heads blend swept/*.h5 --max-source-loss 0 --out blend_swept.h5
  heads predict blend.h5 --caches caches/stage_2 --out submission.csv
  heads score submission.csv --labels solution.csv
  heads score submission.csv --labels solution.csv --json
  heads export heads/resnet101.h5 --run runs/resnet101 --out model.onnx
  heads report blend.h5 --images stage_1/ --out report.html
"""


def _fit(arguments: argparse.Namespace) -> None:
    head = commands.fit(from_arguments(FitConfig, arguments, cache=arguments.cache))
    facts, table = head.provenance, head.estimator.cv_results_
    chosen = f"{head.estimator.dropout_:.4g}"
    domains = ", of both domains together (what decides follows)" if "pareto" in facts else ""
    print(f"{'dropout':>9}  out-of-fold {head.estimator.scoring}{domains}")
    for rate, value in zip(table["dropout"], table["score"], strict=True):
        mark = "  <- chosen" if f"{rate:.4g}" == chosen else ""
        print(f"{rate:9.4g}  {value:.4f}{mark}")
    if "pareto" in facts:
        rows = [row for row in settings(facts) if row.efficient or row.chosen]
        pairs = len(facts["pareto"]["source_weight"])
        print(
            f"{'weight':>9}  {'dropout':>9}  F-beta on target and source, each at its best cut; "
            f"of {pairs} pairs those that no other beats"
        )
        for row in rows:
            mark = "  <- chosen" if row.chosen else ""
            print(f"{row.source_weight:9.4g}  {row.dropout:9.4g}  {row}{mark}")
    for warning in facts["warnings"]:
        print(f"note: {warning}")
    print(
        f"{arguments.out}: {facts['method']} head, out-of-fold F{facts['beta']:g} "
        f"{facts['score']:.4f} at cut {facts['threshold']:.4f}; {_deciding(head)}"
    )


def _adapt(arguments: argparse.Namespace) -> None:
    head = adapting.adapt(from_arguments(AdaptConfig, arguments, cache=arguments.cache))
    facts = head.provenance
    print(facts["explanation"])
    print(
        f"{arguments.out}: out-of-fold F{facts['beta']:g} on Stage 1 {facts['score']:.4f}; "
        f"`heads predict` adapts it to the images of each set of caches"
    )


def _blend(arguments: argparse.Namespace) -> None:
    stored = commands.blend(from_arguments(BlendConfig, arguments, heads=arguments.heads))
    for name, weight in zip(stored.model_names, stored.blend.weights_, strict=True):
        print(f"{weight:7.3f}  {name}")
    honest = "so an optimistic figure"
    if hasattr(stored.blend, "nested_"):
        honest = honest_text(stored.blend.nested_, stored.blend.optimism_)
    print(
        f"{arguments.out}: {len(stored.models)} of {len(arguments.heads)} heads, "
        f"F{stored.blend.beta:g} {stored.blend.score_:.4f} at cut {stored.blend.threshold_:.4f} "
        f"on the {_chosen_on(stored)} ({honest}); {_deciding(stored)}"
    )


def _chosen_on(stored: StoredBlend) -> str:
    """``150 target and 40 source images that chose them``."""
    counts = stored.provenance["chosen_on"]
    rows = [f"{count:,} {domain}" for domain, count in counts.items()]
    if stored.blend.max_source_loss is not None:  # the score is the target's
        return f"{rows[0]} images that chose them, with {rows[1]} images to lose little on"
    return " and ".join(rows) + " images that chose them"


def _deciding(content: Head | StoredBlend) -> str:
    """How label sets are made, and how good they are on images that taught it nothing."""
    if content.decision is None:
        return ""
    text = f"decides by {described(content.decision)}"
    if found := content.provenance.get("decision"):
        text += f": {found['score']:.4f} [{found['low']:.4f}, {found['high']:.4f}] cross-validated"
    return text


def _predict(arguments: argparse.Namespace) -> None:
    done = commands.predict(
        arguments.content,
        arguments.caches,
        arguments.out,
        arguments.overwrite,
        arguments.strict,
        arguments.scores,
    )
    for network, text in done.explanations.items():
        print(f"{network}:\n{text}")
    print(f"{arguments.out}: {done.images:,} images, {done.empty:,} of them without a label")


def _score(arguments: argparse.Namespace) -> None:
    result = commands.score(arguments.submission, arguments.labels, arguments.beta)
    if arguments.json:
        print_json(result | {"beta": arguments.beta})
        return
    print(
        f"mean F{arguments.beta:g} {result['fbeta']:.4f}  "
        f"[{result['low']:.4f}, {result['high']:.4f}] (95 % bootstrap), "
        f"{result['images']:,.0f} images"
    )


def _report(arguments: argparse.Namespace) -> None:
    print(report(from_arguments(ReportConfig, arguments, content=arguments.content)))


def _export(arguments: argparse.Namespace) -> None:
    done = export(from_arguments(ExportConfig, arguments, content=arguments.content))
    print(f"{done.path}: pixels to probabilities and labels, decided by a threshold")
    if not done.exact:
        print(
            f"note: the head itself decides by {done.decision}, which a network cannot hold; the "
            "file cuts at its best threshold (`heads fit --decision global` makes both the same)"
        )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(
        prog="heads",
        description="Fit, blend and apply linear heads on cached embeddings.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(top, __version__)
    verbs = top.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, function: object, text: str, epilog: str = "") -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog="\n\n".join(t for t in (epilog, examples_of(f"heads {name}", EPILOG)) if t),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("--debug", action="store_true", help="show tracebacks")
        added.set_defaults(function=function)
        return added

    _add_fitting(verb)
    verbs_of_many.add(verb)
    _add_blending(verb)
    _add_results(verb)
    return top


def _add_fitting(verb: Verb) -> None:
    fit = verb("fit", _fit, "fit a head on a labelled cache, comparing dropout rates out of fold")
    fit.add_argument("cache", metavar="STAGE1.h5", help="labelled cache of the target domain")
    add_options(fit, FitConfig)
    adapt = verb(
        "adapt", _adapt, "adapt a network's last layer to a labelled domain and to any other"
    )
    adapt.add_argument("cache", metavar="STAGE1.h5", help="labelled cache of the target domain")
    add_options(adapt, AdaptConfig)


def _add_blending(verb: Verb) -> None:
    blend = verb("blend", _blend, "choose the weights of several heads and one cut for all")
    blend.add_argument(
        "heads", nargs="+", metavar="HEAD.h5", help="files of `heads fit` or `adapt`"
    )
    add_options(blend, BlendConfig)
    predict = verb("predict", _predict, "write a submission for the images of some caches")
    predict.add_argument("content", metavar="BLEND.h5", help="a blend, a head or an adapted model")
    predict.add_argument(
        "--caches",
        nargs="+",
        required=True,
        metavar="DIR_OR_FILE",
        help="caches of one image set, one for each network; a folder stands for its .h5 files",
    )
    predict.add_argument("--out", required=True, metavar="submission.csv", help="image_id,labels")
    predict.add_argument(
        "--scores",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="scores of these images, for members of the blend that are known by their scores",
    )
    predict.add_argument(
        "--strict",
        action="store_true",
        help="adapted models do not look at the unlabelled images: Stage 1's own map",
    )
    predict.add_argument("--overwrite", action="store_true", help="replace an existing file")


def _add_results(verb: Verb) -> None:
    score = verb("score", _score, "print the mean F-beta of a submission with its interval")
    score.add_argument("submission", metavar="submission.csv", help="image_id,labels")
    score.add_argument(
        "--labels", action="append", required=True, metavar="CSV", help="the truth; repeat it"
    )
    score.add_argument("--beta", type=float, default=2.0, help="of F-beta (default: %(default)s)")
    score.add_argument("--json", action="store_true", help="a line of JSON")
    exported = verb("export", _export, "put a head back into its network, as torch or ONNX")
    exported.add_argument("content", metavar="HEAD.h5", help="a file of `heads fit` or `adapt`")
    add_options(exported, ExportConfig)
    page = verb("report", _report, "write a page on a blend: what it is worth, why, and of what")
    page.add_argument("content", metavar="BLEND.h5", help="a blend, a head or an adapted model")
    add_options(page, ReportConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run(parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
