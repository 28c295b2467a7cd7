"""The names of the package, which are loaded when first used."""

import subprocess
import sys

import pytest

import heads


def test_every_public_name_is_there_and_listed():
    for name in heads.__all__:
        assert getattr(heads, name).__name__ == name
        assert name in dir(heads)


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        heads.Nonsense  # noqa: B018


def test_importing_alone_loads_neither_scikit_learn_nor_torch():
    code = (
        "import sys, heads; from featcache import FeatureCache; "
        "print(sorted(set(sys.modules) & {'sklearn', 'torch', 'timm', 'PIL', 'matplotlib'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_star_import_gives_the_public_names():
    namespace = {}
    exec("from heads import *", namespace)
    assert set(heads.__all__) <= set(namespace)
