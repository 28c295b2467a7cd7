"""Which heads does a grid ask for, what are they called, and which command made a stored one?"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import itertools
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from featcache.console import Parser, add_options, from_arguments
from heads.fitting import FitConfig, parse_numbers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GRID_FORMAT = """the grid, a TOML file:
  Every key is an option of `heads fit` (dashes become underscores). A list makes a head of each
  of its entries, and several lists make one of every combination. An entry of `dropout`,
  `source_weight` or `views` may be a list itself: rates or weights that are compared within one
  head, or views that train it together. `networks` restricts the heads to caches of these names;
  patterns such as "resnet*" will do. What stands outside of [[grid]] tables holds for all heads.

    cv = 5
    decision = "global"                     # the blend has a decision of its own

    [[grid]]
    method = ["ridge", "logistic"]
    dropout = [0.1, 0.3, [0.05, 0.1, 0.2]]  # two heads of one rate, one that compares three
    views = ["all", "eval"]
    source_weight = [0, 0.1]                # only with --source; 0: the target alone trains
    seed = [0, 1]

    [[grid]]
    method = "logistic"
    noise = "gaussian"
    networks = ["resnet*"]
"""
NETWORKS = "networks"
_OF_FILES = frozenset({"cache", "out", "source", "overwrite"})
_JOINED = frozenset({"dropout", "source_weight", "views"})  # texts of several values
_NAMED = (
    "noise",
    "probability",
    "dropout",
    "views",
    "source_weight",
    "seed",
)  # always told by the name
_LETTER = {
    "dropout": "p",
    "source_weight": "w",
    "seed": "s",
    "noise": "",
    "probability": "",
    "views": "",
}
_LONGEST = 60  # characters of a list in a name


@dataclass(frozen=True)
class Recipe:
    """How a head is to be made, but for its files.

    Attributes
    ----------
    config : FitConfig
        Its `cache`, `out` and `source` are empty.
    networks : tuple of str
        Patterns of the names of caches; empty: all.
    varied : tuple of str
        Other fields that differ between the recipes of a grid, so that names must tell them.
    """

    config: FitConfig
    networks: tuple[str, ...] = ()
    varied: tuple[str, ...] = field(default=(), compare=False)

    def fits(self, cache_name: str) -> bool:
        """Whether it is meant for the cache of this name."""
        return not self.networks or any(fnmatch.fnmatch(cache_name, p) for p in self.networks)

    def name(self, cache_name: str, with_source: bool) -> str:
        """``resnet101_ridge_p0.1-0.3_eval_w0.1_s1``: what differs from the defaults."""
        parts = [cache_name, self.config.method]
        for key in (*_NAMED, *self.varied):
            value = getattr(self.config, key)
            if value == getattr(FitConfig, key) or (key == "source_weight" and not with_source):
                continue
            text = str(value).replace(",", "-").replace(os.sep, "-")
            if len(text) > _LONGEST:
                digest = hashlib.sha256(text.encode()).hexdigest()[:8]
                text = f"{text[: _LONGEST - 9].rpartition('-')[0]}-{digest}"
            parts.append(_LETTER.get(key, key.replace("_", "-") + "-") + text)
        return "_".join(parts)


# ------------------------------------------------------------------------- grids


def read_grid(path: str | os.PathLike[str]) -> list[Recipe]:
    """The recipes of a grid file, each once, in the order of the file.

    See :data:`GRID_FORMAT`.

    Raises
    ------
    ValueError
        Naming the file, the key and the value that is wrong.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:  # editors may begin it with a mark
            content = tomllib.loads(file.read())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give a grid, see heads sweep --help") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file ({error})") from None
    tables = content.pop("grid", [{}])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{path}: grid is no list of tables; write [[grid]]")
    found: dict[Recipe, None] = {}
    for table in tables:
        for recipe in _product({**content, **table}, path):
            found.setdefault(recipe)
    recipes = list(found)
    varied = tuple(
        f.name
        for f in dataclasses.fields(FitConfig)
        if f.name not in (*_NAMED, *_OF_FILES, "method")
        and len({getattr(recipe.config, f.name) for recipe in recipes}) > 1
    )
    return [replace(recipe, varied=varied) for recipe in recipes]


def _product(table: Mapping[str, Any], path: str | os.PathLike[str]) -> Iterator[Recipe]:
    """One recipe for every combination of the lists."""
    axes: dict[str, list[Any]] = {}
    for written, value in table.items():
        key = written.replace("-", "_")
        values = value if isinstance(value, list) else [value]
        if not values:
            raise ValueError(f"{path}: {written} is an empty list; give a value or leave it out")
        axes[key] = values if key == NETWORKS else [_checked(path, key, v) for v in values]
    networks = axes.pop(NETWORKS, [])
    if not all(isinstance(pattern, str) for pattern in networks):
        raise ValueError(f"{path}: networks is {networks}; give names of caches")
    for combination in itertools.product(*axes.values()):
        config = FitConfig(cache="", out="", **dict(zip(axes, combination, strict=True)))
        if config.method == "ridge":
            config = replace(config, noise=FitConfig.noise, probability=FitConfig.probability)
        yield Recipe(config, tuple(networks))


def _checked(path: str | os.PathLike[str], key: str, value: Any) -> Any:
    """The value as `FitConfig` has it."""
    fields = {f.name: f for f in dataclasses.fields(FitConfig) if f.name not in _OF_FILES}
    if key not in fields:
        raise ValueError(
            f"{path}: {key} is no option of a head; choose from {', '.join(fields)}, {NETWORKS}"
        )
    if key in _JOINED:
        text = ",".join(map(str, value if isinstance(value, list) else [value]))
        if key == "views":
            return text
        return ",".join(_text(x) for x in sorted(set(parse_numbers(text, f"{path}: {key}"))))
    kind = get_type_hints(FitConfig)[key]
    allowed = (int, float) if kind is float else str if kind is str else int
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise ValueError(f"{path}: {key} is {value!r}; expected {_kind_words(kind)}")
    choices = fields[key].metadata["argparse"].get("choices")
    if choices and value not in choices:
        raise ValueError(f"{path}: {key} is {value!r}; choose from {', '.join(choices)}")
    return float(value) if kind is float else value


def _text(number: float) -> str:
    """0.1 -> 0.1, 1.0 -> 1."""
    return repr(number).removesuffix(".0")


def _kind_words(kind: Any) -> str:
    return "a text" if kind is str else "a number" if kind is float else "a whole number"


# ------------------------------------------------------------------ stored heads


class _Strict(Parser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_command(command: str, verb: str, config: type) -> Any:
    """The configuration that a recorded command stands for.

    Raises
    ------
    ValueError
        If the command is not one of that verb, or of options unknown here.
    """
    words = shlex.split(command)
    if words[:2] != ["heads", verb]:
        raise ValueError(f"was not made by `heads {verb}` but by {command or 'nobody knows what'}")
    parser = _Strict(prog=f"heads {verb}")
    parser.add_argument("cache")
    add_options(parser, config)
    arguments = parser.parse_args(words[2:])
    return from_arguments(config, arguments, cache=arguments.cache)


def without_files(config: FitConfig) -> FitConfig:
    """What of a configuration is its recipe."""
    return replace(config, cache="", out="", source="", overwrite=False)


def differences(made: Any, wanted: Any) -> str:
    """``cv is 5, not 3``; empty if both configurations, of one kind, are one recipe."""
    fields: Iterable[str] = (f.name for f in dataclasses.fields(wanted))
    told = [
        f"{key} is {getattr(made, key)}, not {getattr(wanted, key)}"
        for key in fields
        if key not in _OF_FILES and getattr(made, key) != getattr(wanted, key)
    ]
    if bool(made.source) != bool(wanted.source):
        told.append("it has a source" if made.source else "it has no source")
    return ", ".join(told)


def cache_name(path: str | os.PathLike[str]) -> str:
    """What people call the network of a cache: the name of its file."""
    return Path(path).stem
