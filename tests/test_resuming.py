"""A killed prediction goes on; its submission is that of an unbroken one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix, random

from featcache.console import Interrupted
from heads import commands, prediction
from heads.commands import FitConfig
from heads.prediction import Predictor
from heads.resuming import ChosenSets, job_of
from tests import synthetic

TARGET, STAGE_2 = synthetic.images(90, 0), synthetic.images(60, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    cache = synthetic.write(root / "stage_1.h5", TARGET, shifted=True).path
    synthetic.write(root / "stage_2.h5", STAGE_2, shifted=True, labelled=False)
    commands.fit(FitConfig(str(cache), str(root / "head.h5"), dropout="0.1", cv=3))
    commands.predict(str(root / "head.h5"), [str(root / "stage_2.h5")], str(root / "whole.csv"))
    return root


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "ROWS_AT_ONCE", 7)


def predict(data: Path, out: Path) -> commands.Prediction:
    return commands.predict(str(data / "head.h5"), [str(data / "stage_2.h5")], str(out))


def stopped_after(chunks: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks stop with an error after some; the starts that they were asked for."""
    real, starts = Predictor.sets, []

    def sets(self: Predictor, start: int = 0) -> object:
        starts.append(start)
        for number, part in enumerate(real(self, start)):
            if number == chunks:
                raise RuntimeError("killed")
            yield part

    monkeypatch.setattr(Predictor, "sets", sets)
    return starts


def test_what_was_chosen_is_not_chosen_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.csv"
    starts = stopped_after(3, monkeypatch)
    with pytest.raises(RuntimeError, match="killed"):
        predict(data, out)
    assert not out.exists()
    with pytest.raises(RuntimeError, match="killed"):
        predict(data, out)
    assert starts == [0, 21]
    monkeypatch.undo()
    done = predict(data, out)
    assert out.read_bytes() == (data / "whole.csv").read_bytes()
    assert done.images == 60
    assert list(tmp_path.iterdir()) == [out]


def test_torn_and_damaged_records_are_chosen_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.csv"
    starts = stopped_after(4, monkeypatch)
    with pytest.raises(RuntimeError, match="killed"):
        predict(data, out)
    partial = tmp_path / ".s.csv.partial"
    whole = partial.read_bytes()
    for cut in range(0, len(whole), 5):
        partial.write_bytes(whole[:cut])
        with pytest.raises(RuntimeError, match="killed"):
            predict(data, out)
        assert starts[-1] % 7 == 0
        assert starts[-1] <= 28
    assert starts[1] == 0
    assert starts[-1] == 21
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    partial.write_bytes(flipped)
    monkeypatch.undo()
    predict(data, out)
    assert out.read_bytes() == (data / "whole.csv").read_bytes()


def test_another_head_starts_anew(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, head = tmp_path / "s.csv", tmp_path / "head.h5"
    head.write_bytes((data / "head.h5").read_bytes())
    starts = stopped_after(3, monkeypatch)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="killed"):
            commands.predict(str(head), [str(data / "stage_2.h5")], str(out))
        os.utime(head, (1, 1))
    assert starts == [0, 0]


def test_a_signal_ends_it_between_two_chunks(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Predictor.sets

    def sets(self: Predictor, start: int = 0) -> object:
        for part in real(self, start):
            os.kill(os.getpid(), signal.SIGINT)
            yield part

    monkeypatch.setattr(Predictor, "sets", sets)
    with pytest.raises(Interrupted, match="7 of 60 images are predicted; the same command goes on"):
        predict(data, tmp_path / "s.csv")
    monkeypatch.undo()
    predict(data, tmp_path / "s.csv")
    assert (tmp_path / "s.csv").read_bytes() == (data / "whole.csv").read_bytes()


def test_two_predictions_to_one_file_are_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.csv"
    code = (
        "import sys, time; from heads.resuming import ChosenSets\n"
        "with ChosenSets(sys.argv[1], {}, 3):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, out], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=rf"s\.csv: is being written .*{child.pid}"):
            predict(data, out)
        child.kill()
    assert predict(data, out).images == 60


def test_images_of_one_name_are_refused_before_the_work(data: Path, tmp_path: Path) -> None:
    twice = synthetic.Images([*STAGE_2.ids[:-1], STAGE_2.ids[0]], STAGE_2.latent, STAGE_2.Y)
    path = synthetic.write(tmp_path / "twice.h5", twice, shifted=True, labelled=False).path
    with pytest.raises(ValueError, match=rf"twice\.h5: has image '{STAGE_2.ids[0]}' 2 times"):
        commands.predict(str(data / "head.h5"), [str(path)], str(tmp_path / "s.csv"))
    assert list(tmp_path.iterdir()) == [path]


def test_label_sets_come_back_as_they_were(tmp_path: Path) -> None:
    parts = [csr_matrix(random(n, 30, 0.2, random_state=n) > 0) for n in (5, 1, 8)]
    parts.append(csr_matrix((4, 30), dtype=bool))
    with ChosenSets(tmp_path / "s.csv", {"a": 1}, 30) as chosen:
        for part in parts:
            chosen.append(part)
    with ChosenSets(tmp_path / "s.csv", {"a": 1}, 30) as chosen:
        assert chosen.rows == 18
        expected = np.vstack([part.toarray() for part in parts])
        np.testing.assert_array_equal(chosen.sets().toarray(), expected)
    for other, labels in (({"a": 2}, 30), ({"a": 1}, 31)):
        with ChosenSets(tmp_path / "s.csv", other, labels) as chosen:
            assert chosen.rows == 0
            assert chosen.sets().shape == (0, labels)


def test_a_job_is_known_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = job_of([tmp_path / "a"], False)
    assert first == job_of([str(tmp_path / "a")], False) != job_of([tmp_path / "a"], True)
    (tmp_path / "b").write_text("1")
    names = [dict(zip(("amy", "bob"), pair, strict=True)) for pair in (("a", "b"), ("b", "a"))]
    jobs = [job_of([], False, {n: str(tmp_path / f) for n, f in some.items()}) for some in names]
    assert jobs[0] != jobs[1]  # the same files, given to other members
    (tmp_path / "a").write_text("12")
    assert job_of([tmp_path / "a"], False) != first


@pytest.mark.slow
def test_a_killed_process_leaves_what_it_chose(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.csv"
    code = (
        "import sys, time; from heads import commands, prediction\n"
        "prediction.ROWS_AT_ONCE = 7\n"
        "real = prediction.Predictor.sets\n"
        "def sets(self, start=0):\n"
        "    for part in real(self, start):\n"
        "        time.sleep(0.05); yield part\n"
        "prediction.Predictor.sets = sets\n"
        "commands.predict(sys.argv[1], [sys.argv[2]], sys.argv[3])\n"
    )
    words = [sys.executable, "-c", code, data / "head.h5", data / "stage_2.h5", out]
    partial = tmp_path / ".s.csv.partial"
    for grown in (600, 900):
        with subprocess.Popen(words) as child:
            deadline = time.monotonic() + 60
            while child.poll() is None and time.monotonic() < deadline:
                if partial.exists() and partial.stat().st_size > grown:
                    break
                time.sleep(0.002)
            child.kill()
        assert not out.exists()
    assert partial.stat().st_size > 600
    predict(data, out)
    assert out.read_bytes() == (data / "whole.csv").read_bytes()
