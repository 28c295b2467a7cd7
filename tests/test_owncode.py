"""Code of a user's own is found, and told apart from what it was."""

from __future__ import annotations

import importlib
import linecache
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from featcache.cli import main
from featcache.errors import InputError
from featcache.owncode import load_object, source_digest

CODE = """
ANGLE = 10

def helper(image):
    return image.rotate(ANGLE)

def turned(image, size, rng):
    return helper(image).resize((size, size))
"""
Write = Callable[[str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write the user's module, as a new process would find it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(code: str) -> None:
        (tmp_path / "very_own.py").write_text(code)
        sys.modules.pop("very_own", None)
        importlib.invalidate_caches()

    yield write
    sys.modules.pop("very_own", None)


def digest() -> str:
    return source_digest("very_own:turned", "--views")


def test_everything_that_the_module_does_counts(write: Write) -> None:
    found = set()
    for code in (
        CODE,
        CODE.replace("10", "90"),
        CODE.replace("rotate", "reduce"),
        CODE.replace("helper(image).resize", "image.resize"),
        CODE + "import sys\n",
    ):
        write(code)
        found.add(digest())
    assert len(found) == 5


def test_comments_and_layout_do_not(write: Write) -> None:
    write(CODE)
    before = digest()
    write("# Comment.\n" + CODE.replace("10\n", "(\n    10  # degrees\n)\n\n\n"))
    assert digest() == before != ""


def test_a_function_that_is_passed_on_counts_where_it_is_defined(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = set()
    for angle in ("10", "90"):
        monkeypatch.delitem(sys.modules, "its_home", raising=False)
        (tmp_path / "its_home.py").write_text(CODE.replace("10", angle))
        write("from its_home import turned\n")
        found.add(digest())
    assert len(found) == 2
    monkeypatch.delitem(sys.modules, "its_home")


def test_the_file_counts_even_if_it_is_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import math as compiled

    for data in (b"\x7fELF\xff", b"\x7fELF\xfe"):
        (tmp_path / "very_own.so").write_bytes(data)
        monkeypatch.setattr(compiled, "__file__", str(tmp_path / "very_own.so"), raising=False)
        one = source_digest("math:sin", "--views")
        assert one == source_digest("math:cos", "--views") != ""
    (tmp_path / "very_own.so").write_bytes(b"\x7fELF\xff")
    assert source_digest("math:sin", "--views") != one


def test_a_function_of_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose module is no file, though the text of its cells is kept."""
    found = []
    for angle in (10, 90, 10):
        cell = f"<cell {angle}>"
        text = CODE.replace("10", str(angle)).partition("def turned")[0]
        text += f"def turned(image, size, rng):\n    return image.rotate({angle})\n"
        linecache.cache[cell] = (len(text), None, text.splitlines(True), cell)
        names: dict[str, object] = {"__name__": "__main__"}
        exec(compile(text, cell, "exec"), names)
        main = sys.modules["__main__"]
        monkeypatch.setattr(main, "__file__", None, raising=False)
        monkeypatch.setattr(main, "turned", names["turned"], raising=False)
        found.append(source_digest("__main__:turned", "--views"))
    assert found[0] == found[2] != found[1]
    monkeypatch.setattr(sys.modules["__main__"], "turned", len, raising=False)
    assert source_digest("__main__:turned", "--views") == ""


def test_a_module_that_lacks_a_dependency_says_which(write: Write) -> None:
    write("import no_such_dependency\n")
    with pytest.raises(InputError, match="no_such_dependency"):
        load_object("very_own:turned", "augmentation")
    with pytest.raises(InputError, match="no_such_dependency"):
        digest()


@pytest.mark.parametrize(
    ("code", "line", "reason"),
    [
        ("x = 1\ndef turned(:\n", 2, "SyntaxError: invalid syntax"),
        ("\n\n1 / 0\n", 3, "ZeroDivisionError: division by zero"),
        ("raise ValueError('two\\nlines')\n", 1, "ValueError: two"),
        ("import sys\nsys.exit()\n", 2, "SystemExit: "),
        ("def inner():\n    raise KeyError('gone')\ninner()\n", 2, "KeyError: 'gone'"),
    ],
)
def test_a_module_that_fails_says_where_and_why(
    code: str, line: int, reason: str, write: Write, tmp_path: Path
) -> None:
    write(code)
    for call in (lambda: load_object("very_own:turned", "--arch"), digest):
        with pytest.raises(InputError) as caught:
            call()
        message = str(caught.value)
        assert "'very_own:turned'" in message
        assert f"{tmp_path / 'very_own.py'}, line {line} " in message
        assert reason in message
        assert "\n" not in message


def test_the_command_line_says_it_in_one_line(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("def turned(:\n")
    weights, classes = tmp_path / "w.safetensors", tmp_path / "classes.csv"
    weights.write_bytes(b"")
    classes.write_text("label_code,description\na,a\n")
    words = ["--weights", weights, "--classes", classes, "--out", tmp_path / "run"]
    assert main(["import", "--arch", "very_own:turned", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("featcache: --arch 'very_own:turned': importing 'very_own' fails in ")
    assert error.count("\n") == 1
