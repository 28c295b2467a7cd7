"""What the benchmark of training compares and counts."""

from __future__ import annotations

import pytest
import torch

from benchmarks import training
from benchmarks.training import CLASSES, SIDE, Bench, counted

ARCH = "tests.tiny:separate"


def test_the_bare_loop_takes_the_step_of_the_learner() -> None:
    torch.manual_seed(0)
    bench = Bench(ARCH, 3, torch.device("cpu"), steps=2)
    bench.build_bare()
    before = [p.detach().clone() for p in bench.bare.parameters()]
    bench.ours()
    bench.loop()
    for ours, bare, first in zip(
        bench.learner.network.parameters(), bench.bare.parameters(), before, strict=True
    ):
        torch.testing.assert_close(ours, bare, rtol=1e-5, atol=1e-7)
        assert not torch.equal(ours, first)


def test_operations_and_bytes_of_a_known_network() -> None:
    convolution, last = 2 * 16 * 3 * 9 * SIDE**2, 2 * 16 * CLASSES
    operations, kept = counted(ARCH, 2, bf16=False)
    # Nothing is sent back to the images: the convolution is done twice, the last layer three times.
    assert operations == 2 * (2 * convolution + 3 * last)
    pixels = SIDE**2
    # Images, what the convolution made, and what was normalised and cut off at zero; and pooled.
    least, most = 4 * 2 * pixels * (3 + 16 + 16), 4 * 2 * (pixels * (3 + 16 + 16) + 100)
    assert least <= kept <= most
    halved = counted(ARCH, 4, bf16=True)[1] - counted(ARCH, 2, bf16=True)[1]
    assert halved < 0.8 * kept


def test_rows_of_other_networks_are_kept_on_the_same_machine(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("results")
    monkeypatch.setattr("benchmarks.measure.RESULTS", folder)
    monkeypatch.setattr(training, "RESULTS", folder)
    assert training.kept_rows("x", []) == []
    rows = [{"network": "a", "images/s": 1.5}, {"network": "b", "images/s": 2.5}]
    monkeypatch.setattr(
        "sys.argv", ["python -m benchmarks training", "--networks", "a,b"]
    )  # is noted, too
    training.report("x", rows, training.TITLE)
    assert "--networks a,b" in (folder / "x.csv").read_text(encoding="utf-8")
    assert training.kept_rows("x", ["a"]) == [{"network": "b", "images/s": "2.5"}]
    monkeypatch.setattr(training, "machine", lambda: "another")
    assert training.kept_rows("x", ["a"]) == []
