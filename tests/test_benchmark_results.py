"""RESULTS.md says what the files of results say, and nothing else."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

import benchmarks.__main__
from benchmarks import measure, transfer
from benchmarks.results import Table, benchmark_of, write_results

KNOWN = {"heads": "How long?", "heads_of_state": "Who?"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    return tmp_path


def test_what_is_measured_comes_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["python -m benchmarks heads", "--cache", "/a/b.h5", "--n=/a", "-k", "5"]
    )
    rows = [
        {"what": "a|b <c>", "seconds": 1.25, "times": 4},
        {"what": "d", "seconds": float("nan"), "times": 1},
    ]
    measure.report("heads_peers", rows, "The same; by others; 3 of them")
    table = Table.read(folder / "heads_peers.csv")
    assert table.title == "The same; by others; 3 of them"
    assert table.machine == measure.machine()
    assert table.command == "python -m benchmarks heads --cache PATH --n=PATH -k 5"
    assert table.columns == ["what", "seconds", "times"]
    assert table.rows == [["a|b <c>", "1.25", "4"], ["d", "nan", "1"]]
    assert "| a\\|b &lt;c> | 1.25 | 4 |" in table.markdown()
    assert (folder / "heads_peers.png").read_bytes()[:4] == b"\x89PNG"


def test_sections_of_all_files_but_smoke_tests(folder: Path) -> None:
    for name in ("heads", "heads_quick", "other"):
        measure.report(name, [{"what": name}], f"About {name}")
    (folder / "plain.csv").write_text("a,b\n1,2\n")  # by hand: no first line, no benchmark
    out = folder / "RESULTS.md"
    assert write_results(folder, out, KNOWN) == 3
    text = out.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## About heads",
        "## About other",
        "## plain",
    ]
    assert "*How long?*" in text
    assert "| ---: | ---: |" in text
    assert "heads_quick" not in text
    assert str(folder) not in text


def test_the_command_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmarks.__main__, "HERE", folder)
    (folder / "heads.py").write_text('"""How long?\n\nVery."""\n')
    (folder / "results").mkdir()
    assert benchmarks.__main__.main(["report"]) == 0
    assert (folder / "RESULTS.md").read_text(encoding="utf-8").startswith("# What")
    assert benchmarks.__main__.main([]) == 0
    assert "heads  How long?\n" in capsys.readouterr().out
    assert benchmarks.__main__.main(["report", "all"]) == 2
    assert benchmarks.__main__.main(["nothing"]) == 2
    assert "report takes no options" in capsys.readouterr().out


def test_benchmarks_run_under_the_name_that_their_processes_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments: list[list[str]] = []

    def sent_and_back() -> None:
        assert pickle.loads(pickle.dumps(transfer._run)) is transfer._run
        arguments.append(sys.argv)

    monkeypatch.setattr(transfer, "main", sent_and_back)
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert benchmarks.__main__.main(["transfer", "--jobs", "2"]) == 0
    assert arguments == [["python -m benchmarks transfer", "--jobs", "2"]]


def test_the_benchmark_of_a_file_is_the_longest_name() -> None:
    assert benchmark_of("heads_peers", KNOWN) == "heads"
    assert benchmark_of("heads_of_state_quick", KNOWN) == "heads_of_state"
    assert benchmark_of("headsx", KNOWN) == ""


@pytest.mark.parametrize("text", ["", "# only a title\n", "a,b\n1\n"])
def test_files_that_hold_no_table_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "heads.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"heads\.csv: .*run its benchmark again"):
        Table.read(path)


def measured(folder: Path) -> list[Path]:
    """Files that no smoke test may touch."""
    return [path for path in folder.iterdir() if not path.stem.endswith("_quick")]


QUICKSTART = {"transfer"}  # needs a finished one: tests/test_pipeline.py has that, and runs it


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*benchmarks.__main__.questions()} - QUICKSTART))
def test_quick_benchmarks_run(name: str) -> None:
    """They name the machine beside what they print, and write files that git ignores."""
    root = Path(measure.__file__).parent
    kept = {path: path.read_bytes() for path in measured(root / "results")}
    printed = measure.own_process("benchmarks", name, "--quick")
    assert printed.strip()
    assert kept == {path: path.read_bytes() for path in measured(root / "results")}
    paths = [*(root / "results").glob(f"{name}*_quick.csv")]
    assert any(path.with_suffix(".png").exists() for path in paths)
    for path in paths:
        table = Table.read(path)
        assert table.machine == measure.machine()
        assert table.command == f"python -m benchmarks {name} --quick"
        assert table.rows


def test_a_long_table_is_linked(tmp_path: Path) -> None:
    rows = [f"{row},0.5" for row in range(1234)]
    (tmp_path / "long.csv").write_text("\n".join(["# Long; machine", "row,value", *rows]) + "\n")
    write_results(tmp_path, tmp_path / "RESULTS.md", {"long": "How long?"})
    text = (tmp_path / "RESULTS.md").read_text()
    assert "1,234 rows: [long.csv](results/long.csv)" in text
    assert "| 0 |" not in text


@pytest.mark.parametrize(
    ("columns", "row", "drawn"),
    [
        ("what,seconds", "a,0.5", True),
        ("what,gain", 'a,"+0.015 [+0.011, -1e-3]"', True),
        ("what,gain", "a,1.2.3", False),
        ("what,why", "a,b", False),
    ],
)
def test_missing_pictures_are_drawn_from_the_files(
    tmp_path: Path, columns: str, row: str, drawn: bool
) -> None:
    (tmp_path / "old.csv").write_text(f"# Old; machine\n{columns}\n{row}\n")
    write_results(tmp_path, tmp_path / "RESULTS.md", {"old": "How old?"})
    assert (tmp_path / "old.png").exists() is drawn
    assert ("![Old" in (tmp_path / "RESULTS.md").read_text()) is drawn
