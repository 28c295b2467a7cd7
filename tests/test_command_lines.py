"""What both command lines have in common, beside their verbs."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import featcache.cli
import heads.cli
from featcache import FeatureCache
from featcache.console import examples_of, print_json
from tests import synthetic

COMMANDS = {"featcache": featcache.cli, "heads": heads.cli}


def verbs(command: str) -> dict[str, argparse.ArgumentParser]:
    parser = COMMANDS[command].parser()
    found = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(found.choices)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_verb_has_an_example_that_is_right(command: str) -> None:
    for name, verb in verbs(command).items():
        assert verb.epilog is not None
        examples = verb.epilog[verb.epilog.index("example") :].splitlines()[1:]
        assert examples, name
        for example in "\n".join(examples).replace("\\\n", " ").splitlines():
            program, *words = example.split()
            assert program == command
            arguments = COMMANDS[command].parser().parse_args(words)  # exits if it is wrong
            assert arguments.function == verb.get_default("function")


@pytest.mark.parametrize("place", ["README.md", "heads --help"])
def test_commands_can_be_typed_in_the_order_in_which_they_are_told(place: str) -> None:
    """No result has the name of an earlier one; blends on both domains are of heads that know both.

    A folder of heads that were fitted without --source as well would be refused there.
    """
    readme = (Path(heads.cli.__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    text = readme if place == "README.md" else heads.cli.EPILOG
    made: dict[str, bool] = {}  # file or folder -> whether it knows the validation images
    for line in re.findall(r"^ +heads (.*)$", text.replace("\\\n", " "), re.MULTILINE):
        arguments = heads.cli.parser().parse_args(line.partition("#")[0].split())
        if hasattr(arguments, "heads") and arguments.max_source_loss is not None:
            folders = {str(Path(name).parent) for name in arguments.heads}
            of_them = [both for out, both in made.items() if str(Path(out).parent) in folders]
            assert all([*of_them, *(made.get(folder, True) for folder in folders)]), line
        if out := getattr(arguments, "out", ""):
            assert out not in made, line
            folder = str(Path(out).parent)
            assert folder == "." or folder not in made, line
            made[out] = bool(getattr(arguments, "source", ""))
    assert len(made) >= 8


def test_examples_of_a_verb_keep_their_continued_lines() -> None:
    text = "examples:\n  a fit x\n  a fit y \\\n      --z\n  a fitting\n  b fit\n"
    assert examples_of("a fit", text) == "examples:\n  a fit x\n  a fit y \\\n      --z"
    assert examples_of("a fitting", text) == "example:\n  a fitting"
    assert examples_of("c", text) == ""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_verb(
    command: str, shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        COMMANDS[command].main(["--print-completion", shell])
    assert end.value.code == 0
    script = capsys.readouterr().out
    assert all(name in script for name in verbs(command))
    assert "--out" in script or shell == "tcsh"


def test_bash_completes_verbs_options_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        heads.cli.main(["--print-completion", "bash"])
    (tmp_path / "complete.sh").write_text(capsys.readouterr().out)
    (tmp_path / "stage1.h5").touch()

    def completed(*words: str) -> list[str]:
        typed = " ".join(f"'{word}'" for word in ("heads", *words))
        script = (
            f"source complete.sh; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; "
            "_shtab_heads; printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert completed("sco") == ["score"]
    assert completed("fit", "stage") == ["stage1.h5"]
    assert completed("fit", "stage1.h5", "--metho") == ["--method"]
    assert completed("fit", "stage1.h5", "--method", "r") == ["ridge"]


def test_without_shtab_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as end:
        featcache.cli.main(["--print-completion", "bash"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "featcache-heads[completion]" in error
    assert error.count("\n") == 1


# -------------------------------------------------------------------------------- JSON


def test_json_is_one_line_of_plain_values(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": np.array([1.5, np.nan]), 2: Path("x"), "b": (True, None, "猫\n"), "c": np.inf})
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    assert json.loads(text) == {
        "a": [1.5, None],
        "2": "x",
        "b": [True, None, "猫\n"],
        "c": None,
    }


def test_featcache_info_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = synthetic.images(20, 1)
    cache = synthetic.write(tmp_path / "a" / "net.h5", some, views=2)
    X = np.ones((2, 3))
    FeatureCache.write(tmp_path / "b.h5", X, ["x", "y"], valid=np.array([True, False]))
    assert featcache.cli.main(["info", str(tmp_path), "--json"]) == 0
    found = {Path(f["path"]).name: f for f in map(json.loads, capsys.readouterr().out.splitlines())}
    assert found["net.h5"]["labels"]["positives"] == int(some.Y.sum())
    assert found["net.h5"]["network_id"] == cache.network_id
    assert found["net.h5"]["views"] == ["eval", "view1"]
    assert found["b.h5"]["labels"] is None
    assert (found["b.h5"]["images"], found["b.h5"]["valid"]) == (2, 1)
    assert list(found["b.h5"]["skipped"]) == ["y"]


def test_heads_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = synthetic.images(60, 1)
    synthetic.write(tmp_path / "net.h5", some)
    head, truth = tmp_path / "heads" / "one.h5", synthetic.write_truth(tmp_path / "y.csv", some)
    head.parent.mkdir()
    fit = ["fit", str(tmp_path / "net.h5"), "--dropout", "0.1,0.5", "--out", str(head)]
    assert heads.cli.main(fit) == 0
    capsys.readouterr()
    assert heads.cli.main(["list", str(head.parent), "--json"]) == 0
    assert heads.cli.main(["info", str(head), "--json"]) == 0
    assert heads.cli.main(["score", str(truth), "--labels", str(truth), "--json"]) == 0
    listed, told, score = map(json.loads, capsys.readouterr().out.splitlines())
    assert listed == told
    assert (told["kind"], told["method"], told["classes"]) == ("head", "logistic", synthetic.K)
    assert told["provenance"]["command"].startswith("heads fit")
    assert (score["fbeta"], score["images"], score["beta"]) == (1.0, 60, 2.0)


# ----------------------------------------------------------------- readers that have gone


@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"], ["--print-completion", "bash"]])
def test_a_reader_that_has_gone_is_no_error(words: list[str]) -> None:
    module = Path(heads.cli.__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-m", "heads", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=module,
    )
    assert process.stdout is not None
    process.stdout.close()  # before anything is printed
    assert process.communicate()[1] == b""
