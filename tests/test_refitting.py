"""Every head of a folder is fitted again on the caches of a network that was trained again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache import FeatureCache
from heads import commands
from heads.adapting import AdaptConfig, adapt
from heads.cli import main
from heads.commands import BlendConfig, FitConfig
from heads.recipes import parse_command, without_files
from heads.refitting import RefitConfig, refit
from heads.storage import load
from heads.sweep import in_the_way
from tests import synthetic

TARGET, SOURCE = synthetic.images(90, 0), synthetic.images(80, 1)


def caches(root: Path, networks: dict[str, int]) -> None:
    """Folders stage_1 and validation with a cache of each network."""
    for name, network in networks.items():
        synthetic.write(root / "stage_1" / f"{name}.h5", TARGET, network, shifted=True, views=2)
        synthetic.write(root / "validation" / f"{name}.h5", SOURCE, network, views=2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Heads on networks a and b; `new` holds a retrained network a."""
    caches(tmp_path / "old", {"a": 0, "b": 1})
    caches(tmp_path / "new", {"a": 2})
    old, heads = tmp_path / "old", tmp_path / "heads"
    plain = FitConfig(
        str(old / "stage_1/a.h5"), str(heads / "plain.h5"), dropout="0.1", cv=3, seed=5
    )
    commands.fit(plain)
    commands.fit(
        replace(
            plain,
            out=str(heads / "both.h5"),
            source=str(old / "validation/a.h5"),
            method="ridge",
            source_weight="0.2",
            source_rows=50,
        )
    )
    commands.fit(
        replace(plain, cache=str(old / "stage_1/b.h5"), out=str(heads / "b.h5"), views="eval")
    )
    commands.blend(BlendConfig([str(heads / "plain.h5")], str(heads / "mix.h5")))
    return tmp_path


def coefficients(path: Path) -> np.ndarray:
    return synthetic.load_head(path).changed()[1]


def config(data: Path, **more: object) -> RefitConfig:
    return RefitConfig(str(data / "heads"), **({"caches": [str(data / "new")]} | more))


def test_heads_are_those_of_the_same_recipe_on_the_new_caches(data: Path) -> None:
    before = {path.name: path.read_bytes() for path in (data / "heads").iterdir()}
    done = refit(config(data, out=str(data / "again")))
    assert [o.name for o in done.sweep.made] == ["both.h5", "plain.h5"]
    assert sorted(done.left) == ["b.h5", "mix.h5"]
    assert not done.sweep.failed
    assert {path.name: path.read_bytes() for path in (data / "heads").iterdir()} == before
    for name in ("plain", "both"):
        old = parse_command(load(data / f"heads/{name}.h5").provenance["command"], "fit", FitConfig)
        again = data / f"again/{name}.h5"
        new = parse_command(load(again).provenance["command"], "fit", FitConfig)
        assert without_files(new) == without_files(old)
        assert new.cache == str(data / "new/stage_1/a.h5")
        assert new.source == (str(data / "new/validation/a.h5") if name == "both" else "")
        assert load(again).network_id == FeatureCache(new.cache).network_id
        commands.fit(replace(new, out=str(data / "direct.h5"), overwrite=True))
        np.testing.assert_array_equal(coefficients(data / "direct.h5"), coefficients(again))
    # Once more: all is there.
    done = refit(config(data, out=str(data / "again")))
    assert (done.sweep.made, sorted(done.sweep.present)) == ([], ["both.h5", "plain.h5"])


def test_in_place_only_with_overwrite(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["refit", str(data / "heads"), "--caches", str(data / "new")]
    assert main(words) == 2
    assert "its heads would be replaced; pass --overwrite or give --out" in capsys.readouterr().err
    (data / "heads/both.h5").rename(data / "both.h5")
    assert main([*words, "--overwrite"]) == 0
    told = capsys.readouterr().out
    assert "1 heads asked for, 1 made now" in told
    assert "2 files of" in told
    (data / "both.h5").rename(data / "heads/both.h5")
    done = refit(config(data, overwrite=True))
    assert ([o.name for o in done.sweep.made], done.sweep.present) == (["both.h5"], ["plain.h5"])
    new = FeatureCache(data / "new/stage_1/a.h5").network_id
    networks = [load(data / f"heads/{n}.h5").network_id for n in ("both", "plain", "b")]
    assert [network == new for network in networks] == [True, True, False]


def test_a_cache_that_was_made_again_in_its_place_is_noticed(data: Path) -> None:
    old = data / "old"
    places = {"caches": [str(old)], "overwrite": True}
    first = refit(config(data, **places)).sweep
    assert (first.made, sorted(first.present)) == ([], ["b.h5", "both.h5", "plain.h5"])
    before = FeatureCache(old / "stage_1/a.h5")
    path = old / "validation/a.h5"
    path.unlink()
    synthetic.write(path, synthetic.images(80, 7), 0, views=2)  # other images, the same network
    assert FeatureCache(path).network_id == before.network_id
    assert [o.name for o in refit(config(data, **places)).sweep.made] == ["both.h5"]
    path.unlink()
    synthetic.write(path, synthetic.images(80, 7), 0, views=2)  # the same images again
    assert refit(config(data, **places)).sweep.made == []
    wanted = parse_command(load(data / "heads/both.h5").provenance["command"], "fit", FitConfig)
    assert in_the_way(wanted) == ""
    path.unlink()
    synthetic.write(path, SOURCE, 0, views=2)
    assert f"{path} has been made again since, with another content" in in_the_way(wanted)


def test_without_new_validation_images_only_heads_that_need_them_fail(data: Path) -> None:
    done = refit(
        config(data, caches=[str(data / "new/stage_1/a.h5")], out=str(data / "again"))
    ).sweep
    assert [o.name for o in done.made] == ["plain.h5"]
    (failed,) = done.failed
    assert failed.name == "both.h5"
    assert "of which there is no new one; give a cache called a.h5 in a folder validation" in (
        failed.error
    )


def test_folders_tell_caches_of_one_name_apart(data: Path) -> None:
    caches(data / "new/more", {"a": 3})
    done = refit(config(data, out=str(data / "again"))).sweep
    assert [o.name for o in done.failed] == ["both.h5", "plain.h5"]
    for outcome in done.failed:
        assert "which may now be" in outcome.error
        assert str(data / "new/more/stage_1/a.h5") in outcome.error


@pytest.mark.parametrize("more", [{}, {"overwrite": True}, {"out": "again"}])
def test_a_missing_folder_is_told_before_anything_else(more: dict[str, Any], data: Path) -> None:
    wrong = RefitConfig(str(data / "nope"), caches=[str(data / "nowhere")], **more)
    with pytest.raises(
        ValueError, match=rf"{data}/nope: no such folder; give one that holds heads"
    ):
        refit(wrong)


def test_nothing_to_fit_is_refused(data: Path, tmp_path: Path) -> None:
    caches(tmp_path / "other", {"c": 4})
    with pytest.raises(ValueError, match="none of its heads was fitted on a cache called like"):
        refit(config(data, caches=[str(tmp_path / "other")], out=str(tmp_path / "again")))
    assert not (tmp_path / "again").exists()


def test_adapted_models_are_adapted_again(tmp_path: Path) -> None:
    caches(tmp_path / "old", {"a": 0})
    caches(tmp_path / "new", {"a": 2})
    old = AdaptConfig(
        str(tmp_path / "old/stage_1/a.h5"),
        str(tmp_path / "old/validation/a.h5"),
        str(tmp_path / "heads/adapted.h5"),
        dropout="0.3",
        cv=3,
    )
    adapt(old)
    done = refit(config(tmp_path, overwrite=True)).sweep
    assert [o.name for o in done.made] == ["adapted.h5"]
    new = FeatureCache(tmp_path / "new/stage_1/a.h5")
    stored = synthetic.load_head(tmp_path / "heads/adapted.h5")
    assert stored.network_id == new.network_id
    assert stored.provenance["cache"] == str(new.path)


def test_a_head_of_another_recipe_is_not_taken_for_one_that_is_there(data: Path) -> None:
    again = str(data / "again")
    refit(config(data, out=again))
    old = data / "heads/plain.h5"
    made = parse_command(load(old).provenance["command"], "fit", FitConfig)
    commands.fit(replace(made, dropout="0.5", overwrite=True))
    done = refit(config(data, out=again)).sweep
    assert (done.made, done.present) == ([], ["both.h5"])
    assert [o.name for o in done.failed] == ["plain.h5"]
    assert "dropout is 0.1, not 0.5" in str(done.failed[0].error)
