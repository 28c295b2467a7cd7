"""The examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import featcache
import heads

ROOT = Path(__file__).parent.parent
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in (featcache, heads)
    for path in sorted(Path(package.__file__ or "").parent.rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]


def test_the_main_classes_have_examples() -> None:
    names = ["DropoutRidgeCV", "DropoutLogisticCV", "GlobalThreshold", "ExpectedFBeta"]
    names += ["CalibratedDecision", "Blend", "Adaptation", "MultilabelGroupKFold"]
    for name in names:
        assert ">>>" in getattr(heads, name).__doc__
    assert "FeatureCache.write(" in str(featcache.__doc__)


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_right(name: str) -> None:
    done = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert done.failed == 0
