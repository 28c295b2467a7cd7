"""Grids become recipes, recipes names, and recorded commands recipes again."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.console import command_line
from heads.fitting import FitConfig
from heads.recipes import GRID_FORMAT, Recipe, differences, parse_command, read_grid


def grid(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return path


def test_lists_are_multiplied_and_scalars_hold_for_all(tmp_path: Path) -> None:
    text = """
    cv = 3
    min-positives = 4
    [[grid]]
    method = ["ridge", "logistic"]
    dropout = [0.1, [0.4, 0.2]]
    seed = [0, 7]
    """
    recipes = read_grid(grid(tmp_path, text))
    wanted = [
        FitConfig("", "", method=m, dropout=p, seed=s, cv=3, min_positives=4)
        for m, p, s in itertools.product(["ridge", "logistic"], ["0.1", "0.2,0.4"], [0, 7])
    ]
    assert [recipe.config for recipe in recipes] == wanted


def test_a_byte_order_mark_is_no_part_of_a_grid(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_bytes(b"\xef\xbb\xbfcv = 3\r\nseed = [0, 1]\r\n")
    assert [(r.config.cv, r.config.seed) for r in read_grid(path)] == [(3, 0), (3, 1)]


def test_tables_are_added_and_a_recipe_is_made_once(tmp_path: Path) -> None:
    text = """
    beta = 1
    [[grid]]
    method = ["ridge", "logistic"]
    [[grid]]
    noise = ["quadratic", "gaussian"]
    method = ["ridge", "logistic"]
    beta = 2.0
    [[grid]]
    method = "ridge"
    """
    configs = [recipe.config for recipe in read_grid(grid(tmp_path, text))]
    assert [(c.method, c.noise, c.beta) for c in configs] == [
        ("ridge", "quadratic", 1.0),
        ("logistic", "quadratic", 1.0),
        ("ridge", "quadratic", 2.0),  # noise says nothing of a ridge head
        ("logistic", "quadratic", 2.0),
        ("logistic", "gaussian", 2.0),
    ]


def test_without_tables_the_file_is_the_grid(tmp_path: Path) -> None:
    assert [r.config.seed for r in read_grid(grid(tmp_path, "seed = [3, 1, 3]"))] == [3, 1]
    assert [r.config for r in read_grid(grid(tmp_path, ""))] == [FitConfig("", "")]


def test_the_example_of_the_help_is_a_grid(tmp_path: Path) -> None:
    text = GRID_FORMAT[GRID_FORMAT.index("    cv = 5") :]
    recipes = read_grid(grid(tmp_path, text))
    assert len(recipes) == 2 * 3 * 2 * 2 * 2 + 1
    assert all(recipe.config.decision == "global" for recipe in recipes)
    assert [recipe.fits("resnet101") for recipe in recipes] == [True] * 49
    assert [recipe.fits("senet154") for recipe in recipes] == [True] * 48 + [False]


def test_names_tell_what_differs(tmp_path: Path) -> None:
    text = """
    method = ["ridge", "logistic"]
    dropout = [0.1, [0.3, 0.25]]
    views = ["all", ["eval", "view1"]]
    source_weight = [0, 1.0]
    """
    names = [recipe.name("net", True) for recipe in read_grid(grid(tmp_path, text))]
    assert len(set(names)) == len(names) == 16
    assert names[0] == "net_ridge_p0.1_w0"
    assert names[-1] == "net_logistic_p0.25-0.3_eval-view1_w1"
    assert Recipe(FitConfig("", "")).name("net", True) == "net_logistic"
    varied = read_grid(grid(tmp_path, "min_positives = [1, 5]\nbeta = 1"))
    assert [r.name("net", False) for r in varied] == [
        "net_logistic",
        "net_logistic_min-positives-5",
    ]


def test_long_lists_have_short_names_that_differ(tmp_path: Path) -> None:
    rates = [round(0.01 * i, 2) for i in range(1, 60)]
    text = f"dropout = [{rates}, {rates[:-1]}]"
    names = [recipe.name("net", False) for recipe in read_grid(grid(tmp_path, text))]
    assert len(set(names)) == 2
    assert max(map(len, names)) < 90


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("rates = [0.1]", "rates is no option of a head; choose from method, noise, prob"),
        ("out = 'x.h5'", "out is no option"),
        ("cv = []", "cv is an empty list"),
        ("cv = 2.5", "cv is 2.5; expected a whole number"),
        ("cv = true", "cv is True; expected a whole number"),
        ("beta = 'two'", "beta is 'two'; expected a number"),
        ("method = [1]", "method is 1; expected a text"),
        ("method = ['forest']", "method is 'forest'; choose from logistic, ridge"),
        ("seed = [[1, 2]]", "seed is [1, 2]; expected a whole number"),
        ("dropout = ['much']", "dropout 'much': expected numbers"),
        ("dropout = [[]]", "dropout '': expected numbers"),
        ("networks = [1]", "networks is [1]; give names of caches"),
        ("grid = 3", "grid is no list of tables; write [[grid]]"),
        ("[grid]\ncv = 3", "grid is no list of tables; write [[grid]]"),
        ("cv = ", "not a TOML file"),
    ],
)
def test_a_wrong_grid_is_refused_with_file_and_value(text: str, part: str, tmp_path: Path) -> None:
    path = grid(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(part)) as caught:
        read_grid(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_grid_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.toml: no such file"):
        read_grid(tmp_path / "none.toml")
    (tmp_path / "x.toml").write_bytes(b"\x89HDF\xff")
    with pytest.raises(ValueError, match=r"x\.toml: not a TOML file"):
        read_grid(tmp_path / "x.toml")


paths = st.text(min_size=1, max_size=12).filter(lambda t: t.isprintable() and not t.isspace())


@given(
    cache=paths.filter(lambda t: not t.startswith("-")),
    out=paths,
    source=st.just("") | paths,
    changes=st.fixed_dictionaries(
        {},
        optional={
            "method": st.sampled_from(["ridge", "logistic"]),
            "noise": st.sampled_from(["quadratic", "gaussian"]),
            "cv": st.integers(2, 9),
            "beta": st.floats(0.1, 9),
            "seed": st.integers(0, 99),
            "max_labels": st.none() | st.integers(1, 9),
            "dropout": st.sampled_from(["", "0.1", "0.1,0.5"]),
            "overwrite": st.booleans(),
        },
    ),
)
def test_a_recorded_command_gives_its_configuration_back(
    cache: str, out: str, source: str, changes: dict[str, Any]
) -> None:
    config = FitConfig(cache, out, source=source, **changes)
    command = command_line("heads fit", config, config.cache)
    assert parse_command(command, "fit", FitConfig) == config
    moved = replace(config, cache="elsewhere", out="x", overwrite=not config.overwrite)
    assert differences(moved, config) == ""
    assert differences(config, replace(config, cv=config.cv + 1)) == (
        f"cv is {config.cv}, not {config.cv + 1}"
    )


@pytest.mark.parametrize(
    "command",
    ["", "heads adapt x.h5 --out y", "heads fit x.h5", "heads fit x --out y --what 3", "rm -r x"],
)
def test_other_commands_are_refused(command: str) -> None:
    with pytest.raises(ValueError, match=r"heads fit|required|unrecognized"):
        parse_command(command, "fit", FitConfig)
