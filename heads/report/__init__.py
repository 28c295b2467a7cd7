"""One page about a blend or a head, for people: what it is worth, why, and what it is made of.

The page is one file that needs no network: pictures, styles and the script of its tables are in
it, and nothing else may run or be loaded (a Content-Security-Policy says so).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from featcache.atomic import write_atomically
from featcache.console import option, required
from featcache.errors import MissingExtra
from heads.report.contents import gather
from heads.report.page import page
from heads.storage import refuse_existing


@dataclass(frozen=True)
class ReportConfig:
    """What the page is about; every field is an option of ``heads report``."""

    content: str
    out: str = required("the page", metavar="report.html")
    images: str = option(
        "", "folder of the labelled images, to show those that are right and wrong", metavar="DIR"
    )
    caches: list[str] = field(
        default_factory=list,
        metadata={
            "help": "caches that the heads were fitted on, where they are no longer at their "
            "places; a folder stands for its .h5 files and those below",
            "argparse": {"nargs": "+", "metavar": "DIR_OR_FILE"},
        },
    )
    count: int = option(12, "images of each kind that are shown")
    title: str = option("", "of the page (default: the name of the file)")
    overwrite: bool = option(False, "replace an existing file")


def report(config: ReportConfig) -> Path:
    """Write the page.

    Raises
    ------
    ValueError
        If the file is no head or blend, has no out-of-fold scores, or images are not found.
    MissingExtra
        If matplotlib (or, for images, Pillow) is not installed.
    """
    refuse_existing(config.out, config.overwrite, [config.content, *config.caches])
    if config.count < 0:
        raise ValueError(f"--count {config.count}: expected at least 0")
    contents = gather(config.content, config.caches)
    refuse_existing(config.out, config.overwrite, [used.path for used in contents.used])
    try:
        html = page(contents, config.title, config.images, config.count)
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "matplotlib", "report") from error
    write_atomically(Path(config.out), html.encode("utf-8"))
    return Path(config.out)
