"""A sweep makes every head of its grid once, whatever fails or stops it."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import distributed
import joblib
import numpy as np
import pytest

from featcache.console import Interrupted
from heads import sweep as sweeping
from heads.cli import main
from heads.storage import load
from heads.sweep import SweepConfig, make, planned, sweep
from tests import synthetic

TARGET, SOURCE = synthetic.images(90, 0), synthetic.images(80, 1)
GRID = """
cv = 3
decision = "global"
[[grid]]
method = ["ridge", "logistic"]
dropout = [0.05, [0.1, 0.3]]
"""
NAMES = [
    f"{network}_{method}_{rates}.h5"
    for network in ("net0", "net1")
    for method in ("ridge", "logistic")
    for rates in ("p0.05", "p0.1-0.3")
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders stage_1 and validation with a cache of each of two networks."""
    root = tmp_path_factory.mktemp("data")
    for network in (0, 1):
        name = f"net{network}.h5"
        synthetic.write(root / "stage_1" / name, TARGET, network, shifted=True, views=2)
        synthetic.write(root / "validation" / name, SOURCE, network, views=2)
    return root


def config(data: Path, tmp_path: Path, grid: str = GRID, **more: object) -> SweepConfig:
    (tmp_path / "grid.toml").write_text(grid)
    options: dict[str, object] = {"caches": [str(data / "stage_1")], "out": str(tmp_path / "out")}
    return SweepConfig(grid=str(tmp_path / "grid.toml"), **(options | more))


def weights(path: Path) -> np.ndarray:
    return synthetic.load_head(path).changed()[1]


def test_every_combination_is_made_and_is_what_its_command_makes(
    data: Path, tmp_path: Path
) -> None:
    done = sweep(config(data, tmp_path))
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == sorted(NAMES)
    assert [outcome.name for outcome in done.made] == NAMES
    assert (done.present, done.failed) == ([], [])
    for outcome in done.made[::3]:
        stored = load(out / outcome.name)
        assert outcome.score == stored.provenance["score"]
        words = shlex.split(stored.provenance["command"])
        words[words.index("--out") + 1] = str(tmp_path / "again.h5")
        assert main([*words[1:], "--overwrite"]) == 0
        np.testing.assert_array_equal(weights(tmp_path / "again.h5"), weights(out / outcome.name))


def test_what_is_there_is_not_made_again(data: Path, tmp_path: Path) -> None:
    sweep(config(data, tmp_path))
    out = tmp_path / "out"
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / NAMES[3]).unlink()
    done = sweep(config(data, tmp_path))
    assert [outcome.name for outcome in done.made] == [NAMES[3]]
    assert sorted(done.present) == sorted(set(NAMES) - {NAMES[3]})
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert {name for name in NAMES if after[name] != before[name]} == {NAMES[3]}
    # More of a grid: only what is new is made.
    wider = GRID.replace("0.05,", "0.05, 0.5,")
    assert len(sweep(config(data, tmp_path, wider)).made) == 4


def test_a_head_that_fails_does_not_stop_the_others(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = config(data, tmp_path, 'cv = 3\nviews = ["nowhere", "eval"]\ndropout = 0.1')
    words = ["sweep", *one.caches, "--grid", one.grid, "--out", one.out]
    assert main(words) == 1
    told = capsys.readouterr()
    bad = "net0_logistic_p0.1_nowhere.h5"
    assert f"failed  {bad}: " in told.out
    assert re.search(r"^0\.\d{4}  net1_logistic_p0\.1_eval\.h5$", told.out, re.MULTILINE)
    assert "4 heads asked for, 2 made now, 0 there before, 2 failed" in told.out
    assert told.err.startswith(f"heads: 2 of 4 heads failed, the first is {bad}: ")
    assert "has no view 'nowhere' (--views nowhere); choose from eval, view1" in told.err
    made = sorted(path.name for path in Path(one.out).iterdir())
    assert made == ["net0_logistic_p0.1_eval.h5", "net1_logistic_p0.1_eval.h5"]


def test_errors_of_any_kind_become_outcomes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by\nnothing")

    monkeypatch.setattr(sweeping, "fit", broken)
    one = make(planned(config(data, tmp_path))[0])
    assert (one.name, one.score, one.error) == (NAMES[0], None, "ZeroDivisionError: by nothing")


def test_a_head_that_another_sweep_has_made_meanwhile_is_taken(data: Path, tmp_path: Path) -> None:
    one = planned(config(data, tmp_path))[0]
    made = make(one)
    before = Path(one.out).stat().st_mtime_ns
    assert make(one) == made
    assert Path(one.out).stat().st_mtime_ns == before
    assert "exists already" in make(replace(one, cv=4)).error


def test_views_and_noise_reach_the_head(data: Path, tmp_path: Path) -> None:
    text = 'cv = 3\nviews = ["all", "eval", "view1"]\ndropout = 0.1\nnetworks = "net0"'
    sweep(config(data, tmp_path, text))
    out = tmp_path / "out"
    every = [weights(path) for path in sorted(out.iterdir())]
    assert len(every) == 3  # all, eval, view1
    assert np.abs(every[0] - every[1]).max() > 1e-3
    assert np.abs(every[1] - every[2]).max() > 1e-3
    # That view alone, in a cache of its own, gives the same head.
    X = synthetic.features(TARGET, shifted=True, views=2)[:, 1]
    cache = synthetic.FeatureCache(data / "stage_1" / "net0.h5")
    alone = synthetic.FeatureCache.write(
        tmp_path / "alone.h5",
        X,
        TARGET.ids,
        labels=TARGET.Y,
        classes=synthetic.CLASSES,
        weight=cache.weight,
        bias=cache.bias,
    )
    sweep(config(data, tmp_path, "cv = 3\ndropout = 0.1", caches=[str(alone.path)]))
    np.testing.assert_array_equal(weights(out / "alone_logistic_p0.1.h5"), every[2])
    gaussian = sweep(
        config(data, tmp_path, 'cv = 3\ndropout = 0.5\nnoise = "gaussian"\nnetworks = "net0"')
    )
    head = synthetic.load_head(out / gaussian.made[0].name)
    assert head.estimator.noise == "gaussian"
    assert gaussian.made[0].name == "net0_logistic_gaussian_p0.5.h5"


# ----------------------------------------------------------------------- sources


def test_with_a_source_every_head_is_scored_on_it(data: Path, tmp_path: Path) -> None:
    text = "cv = 3\ndropout = 0.1\nsource_weight = [0, 0.2, [0.1, 0.5]]\nsource_rows = 60"
    done = sweep(config(data, tmp_path, text, source=str(data / "validation")))
    assert [o.name.removeprefix("net0_logistic_p0.1") for o in done.made[:3]] == [
        "_w0.h5",
        "_w0.2.h5",
        "_w0.1-0.5.h5",
    ]
    for outcome in done.made:
        head = synthetic.load_head(tmp_path / "out" / outcome.name)
        assert set(head.oof) == {"target", "source"}
        assert len(head.oof["source"].ids) == 60


def test_source_weights_without_a_source_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source_weight has no effect without --source"):
        sweep(config(data, tmp_path, "source_weight = [0.1]"))


def test_a_network_without_a_source_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    one = config(data, tmp_path, source=str(data / "validation" / "net0.h5"))
    with pytest.raises(ValueError, match=r"net0\.h5: has no cache of network \w{12} of .*net1\.h5"):
        sweep(one)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------ faults


def test_wrong_caches_are_refused_before_anything_is_made(data: Path, tmp_path: Path) -> None:
    bare = synthetic.write(tmp_path / "bare" / "net0.h5", TARGET, labelled=False).path
    with pytest.raises(ValueError, match=rf"{bare}: has no labels"):
        sweep(config(data, tmp_path, caches=[str(bare)]))
    both = [str(data / "stage_1"), str(data / "validation")]
    with pytest.raises(ValueError, match=r"net0\.h5 and .*net0\.h5 have one name"):
        sweep(config(data, tmp_path, caches=both))
    with pytest.raises(ValueError, match="its networks match none of the caches net0, net1"):
        sweep(config(data, tmp_path, 'networks = "resnet*"'))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out: is a file; give --out the name of a folder"):
        sweep(config(data, tmp_path))


def test_a_file_in_the_way_is_named_and_left(data: Path, tmp_path: Path) -> None:
    grid = 'dropout = 0.1\nnetworks = "net0"\ncv = {}'
    sweep(config(data, tmp_path, grid.format(3)))
    path = tmp_path / "out" / "net0_logistic_p0.1.h5"
    before = path.read_bytes()
    (failed,) = sweep(config(data, tmp_path, grid.format(4))).failed
    assert failed.name == path.name
    assert "of another recipe (cv is 3, not 4)" in failed.error
    # The same name, another network: as after training it again.
    other = tmp_path / "new" / "net0.h5"
    synthetic.write(other, TARGET, 1, shifted=True, views=2)
    (failed,) = sweep(config(data, tmp_path, grid.format(3), caches=[str(other)])).failed
    assert "but of network" in failed.error
    assert "heads refit" in failed.error
    assert path.read_bytes() == before
    path.write_bytes(before[: len(before) // 2])
    (failed,) = sweep(config(data, tmp_path, grid.format(3))).failed
    assert str(path) in failed.error
    assert "delete it or choose another --out" in failed.error


def test_an_interrupted_sweep_says_how_to_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = sweeping.fit, [3]

    def stopping(one: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(one)

    monkeypatch.setattr(sweeping, "fit", stopping)
    with pytest.raises(Interrupted, match=r"3 of 8 heads are in .*out; the same command goes on"):
        sweep(config(data, tmp_path))
    monkeypatch.undo()
    assert len(sweep(config(data, tmp_path)).made) == 5


def test_a_dry_run_makes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = config(data, tmp_path)
    words = ["sweep", *one.caches, "--grid", one.grid, "--out", one.out, "--dry-run"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines() == [f"to make {name}" for name in NAMES]
    assert not Path(one.out).exists()


@pytest.mark.slow
def test_a_killed_sweep_goes_on(data: Path, tmp_path: Path) -> None:
    one = config(data, tmp_path)
    words = [sys.executable, "-m", "heads", "sweep", *one.caches, "--grid", one.grid]
    child = subprocess.Popen([*words, "--out", one.out], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list(Path(one.out).glob("*.h5"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    there = sorted(path.name for path in Path(one.out).glob("*.h5"))
    assert len(there) >= 2
    done = sweep(one)
    assert sorted(done.present) == there
    assert not done.failed
    assert len(done.made) == 8 - len(there)


# ------------------------------------------------------------------ many machines


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_processes_make_the_same_heads(data: Path, tmp_path: Path) -> None:
    alone = sweep(config(data, tmp_path))
    many = sweep(config(data, tmp_path, out=str(tmp_path / "many"), jobs=2))
    assert sorted(o.name for o in many.made) == sorted(o.name for o in alone.made)
    for name in NAMES:
        np.testing.assert_allclose(
            weights(tmp_path / "many" / name), weights(tmp_path / "out" / name), atol=1e-4
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of dask and what it brings
def test_a_dask_cluster_makes_the_same_heads(data: Path, tmp_path: Path) -> None:
    alone = sweep(config(data, tmp_path))
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    )
    with cluster, distributed.Client(cluster):
        with joblib.parallel_config("dask"):
            many = sweep(config(data, tmp_path, out=str(tmp_path / "many")))
        address = cluster.scheduler_address
        bad = 'cv = 3\nviews = ["nowhere"]\nnetworks = "net0"'
        failing = sweep(config(data, tmp_path, bad, out=str(tmp_path / "bad"), scheduler=address))
    assert sorted(o.name for o in many.made) == sorted(o.name for o in alone.made)
    for name in NAMES:
        np.testing.assert_allclose(
            weights(tmp_path / "many" / name), weights(tmp_path / "out" / name), atol=1e-4
        )
    assert "has no view 'nowhere'" in failing.failed[0].error


def test_a_file_of_groups_that_was_corrected_is_noticed(data: Path, tmp_path: Path) -> None:
    groups = tmp_path / "groups.csv"

    def written(size: int) -> SweepConfig:
        rows = [f"{name},{i // size}" for i, name in enumerate(TARGET.ids)]
        groups.write_text("\n".join(["image_id,group", *rows]) + "\n")
        return config(data, tmp_path, f'cv = 3\ndropout = 0.1\ngroups = "{groups}"')

    assert len(sweep(written(2)).made) == 2
    assert len(sweep(written(2)).present) == 2
    done = sweep(written(10))
    assert (done.made, done.present) == ([], [])
    assert f"{groups} has been made again since" in str(done.failed[0].error)
