"""Command lines from dataclasses, progress, signals, and the status with which commands end."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache import cli, console
from featcache.console import (
    Interrupted,
    Parser,
    Progress,
    StopRequest,
    add_options,
    command_line,
    duration,
    from_arguments,
    option,
    required,
    run,
)
from featcache.errors import InputError, MissingExtra
from featcache.settings import ExtractionConfig, TrainingConfig

ROOT = Path(__file__).parents[1]
SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=150)


@dataclass(frozen=True)
class Config:
    """One field of every kind."""

    cache: str
    out_file: str = required("where to", metavar="FILE")
    inputs: list[str] = required("read these", action="append")
    name: str = option("", "a name")
    mode: str = option("slow", "how", choices=["slow", "fast"])
    count: int = option(3, "how many")
    rate: float = option(0.1, "how fast")
    limit: int | None = option(None, "at most")
    share: float | None = option(None, "of all")
    more: list[str] = option([], "also", action="append")
    sizes: list[int] = option([7], "sizes", action="append")
    force: bool = option(False, "do it")
    hidden: int = 5
    found: list[str] = field(default_factory=list)


def parsed(words: list[str]) -> Config:
    parser = Parser(prog="tool")
    parser.add_argument("cache")
    add_options(parser, Config)
    arguments = parser.parse_args(words)
    config: Config = from_arguments(Config, arguments, cache=arguments.cache)
    return config


# --------------------------------------------------------------------- options


def test_defaults() -> None:
    config = parsed(["c", "--out-file", "o", "--inputs", "i"])
    assert config == Config("c", "o", ["i"])
    assert (config.count, config.rate, config.limit, config.share) == (3, 0.1, None, None)
    assert (config.more, config.sizes, config.force, config.hidden) == ([], [7], False, 5)
    other = parsed(["c", "--out-file", "o", "--inputs", "i"])
    other.more.append("x")
    assert parsed(["c", "--out-file", "o", "--inputs", "i"]).more == []


def test_every_kind_of_option() -> None:
    words = "c --out-file o --inputs a --inputs b --count 4 --rate 1e-3 --limit 9 --share .5"
    words += " --sizes 1 --sizes 2 --mode fast --force --name x --more y"
    config = parsed(words.split())
    assert config == Config(
        "c",
        "o",
        ["a", "b"],
        name="x",
        mode="fast",
        count=4,
        rate=1e-3,
        limit=9,
        share=0.5,
        more=["y"],
        sizes=[1, 2],
        force=True,
    )
    assert isinstance(config.limit, int)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--mode medium", "invalid choice: 'medium'"),
        ("--count many", "invalid int value: 'many'"),
        ("--limit 1.5", "invalid int value: '1.5'"),
        ("--hidden 3", "unrecognized arguments: --hidden"),
        ("--inputs", "expected one argument"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(
    extra: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed(["c", "--out-file", "o", "--inputs", "i", *extra.split()])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("tool: ")
    assert error.count("\n") == 1


def test_what_is_required_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(["c", "--inputs", "i"])
    assert "--out-file" in capsys.readouterr().err


def test_help_tells_the_defaults_that_say_something() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, Config)
    text = " ".join(parser.format_help().split())
    assert "how many (default: 3)" in text
    assert "how fast (default: 0.1)" in text
    assert "a name (default" not in text
    assert "at most (default" not in text
    assert "--hidden" not in text


# argparse before Python 3.13 loses a value that is nothing but two dashes.
TEXTS = (st.text(max_size=9) | st.sampled_from(["-x", "--force", "-1", "=", "a b"])).filter(
    lambda text: text != "--"
)
CONFIGS = st.builds(
    Config,
    cache=st.sampled_from(["c.h5", "a folder/c.h5"]),
    out_file=TEXTS,
    inputs=st.lists(TEXTS, min_size=1, max_size=3),
    name=TEXTS,
    mode=st.sampled_from(["slow", "fast"]),
    count=st.integers(),
    rate=st.floats(allow_nan=False),
    limit=st.none() | st.integers(),
    share=st.none() | st.floats(allow_nan=False),
    more=st.lists(TEXTS, max_size=3),
    sizes=st.lists(st.integers(-9, 9), min_size=1, max_size=3),
    force=st.booleans(),
)


@SETTINGS
@given(CONFIGS)
def test_a_command_line_stands_for_its_configuration(config: Config) -> None:
    words = shlex.split(command_line("tool do", config, config.cache))
    assert words[:3] == ["tool", "do", config.cache]
    assert parsed(words[2:]) == config


def test_defaults_are_left_out_of_a_command_line() -> None:
    assert command_line("tool", Config("c", "o", ["i"], sizes=[])) == "tool --out-file o --inputs i"
    text = command_line("tool", Config("c", "a b", ["i"], rate=1e-5, sizes=[], force=True), "c")
    assert text == "tool c --out-file 'a b' --inputs i --rate 1e-05 --force"


@pytest.mark.parametrize(
    ("verb", "config"),
    [
        ("train", TrainingConfig("images", ["a.csv", "b.csv"], "resnet101", "runs/x")),
        (
            "train",
            TrainingConfig(
                "images",
                ["a.csv"],
                "own:net",
                "-out",
                validation="0.25",
                model_kwargs=["width=3"],
                lr=0.123456789,
                seed=8,
                overwrite=True,
            ),
        ),
        ("extract", ExtractionConfig("r", "i", "o.h5")),
        ("extract", ExtractionConfig("r", "i", "o.h5", ["l.csv"], "unknown", "ids", "strong", 2)),
    ],
)
def test_the_command_lines_of_the_package(
    verb: str, config: TrainingConfig | ExtractionConfig
) -> None:
    program, *words = shlex.split(command_line(f"featcache {verb}", config))
    assert program == "featcache"
    assert from_arguments(type(config), cli.parser().parse_args(words)) == config


# ---------------------------------------------------------------------- status


def tool(function: Callable[[argparse.Namespace], Any]) -> argparse.ArgumentParser:
    parser = Parser(prog="tool")
    parser.add_argument("--debug", action="store_true")
    parser.set_defaults(function=function)
    return parser


def raising(error: BaseException) -> Callable[[argparse.Namespace], None]:
    def function(arguments: argparse.Namespace) -> None:
        raise error

    return function


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_status_of_what_runs(
    returned: int | None, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tool(lambda arguments: returned), []) == status
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("x.csv: wrong"), 2, "tool: x.csv: wrong"),
        (ValueError("wrong value"), 2, "tool: wrong value"),
        (FileNotFoundError(2, "No such file", "a"), 2, "tool: [Errno 2] No such file: 'a'"),
        (MissingExtra("timm", "extract"), 2, "tool: this needs timm, which is not installed"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is ..."),
            2,
            "tool: a worker process was ended (too little memory, or too little of /dev/shm?); ",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.\nmore"),
            2,
            "tool: no memory is left (CUDA out of memory); free some ",
        ),
        (Interrupted("stopped at step 3"), 130, "tool: stopped at step 3"),
        (Interrupted("stopped at step 3", 0), 0, "tool: stopped at step 3"),
        (KeyboardInterrupt(), 130, "tool: interrupted"),
    ],
)
def test_errors_are_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tool(raising(error)), []) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1


def test_an_interrupt_while_words_are_read_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tool(lambda arguments: 0)
    monkeypatch.setattr(made, "parse_args", raising(KeyboardInterrupt()))
    assert run(made, []) == 130
    assert capsys.readouterr().err == "tool: interrupted\n"


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tool(raising(InputError("x.csv: wrong"))), ["--debug"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("tool: x.csv: wrong\n")


@pytest.mark.parametrize(
    "error",
    [
        KeyError("k"),
        RuntimeError("r"),
        AttributeError("a"),
        RuntimeError("Caught RuntimeError in DataLoader worker process 0."),
    ],
)
def test_faults_of_the_program_are_not_hidden(error: Exception) -> None:
    with pytest.raises(type(error)):
        run(tool(raising(error)), [])


BROKEN_PIPE = """
import argparse, sys
from featcache.console import run
def function(arguments):
    print("first", flush=True)
    sys.stdin.readline()
    for k in range({lines}):
        print("line", k)
parser = argparse.ArgumentParser()
parser.set_defaults(function=function, debug=False)
sys.exit(run(parser, []))
"""


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_is_no_error_to_talk_about(lines: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BROKEN_PIPE.format(lines=lines)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process, process.stderr as error:
        assert process.stdout.readline() == b"first\n"
        process.stdout.close()
        process.stdin.write(b"go\n")
        process.stdin.close()
        assert error.read() == b""
    assert process.returncode == 1


# -------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock with ``now``, in seconds, which only the test moves."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    return clock


def drawn(stream: io.StringIO) -> list[str]:
    """Texts of the moving line, one after the other; an empty one where it was wiped."""
    return stream.getvalue().split("\r\x1b[K")[1:]


def test_rate_and_time_left(clock: SimpleNamespace) -> None:
    progress = Progress(1200, "images", done=100, stream=io.StringIO())
    assert progress.describe() == "100 / 1,200 images, 0/s"
    clock.now += 10
    progress.advance(50)
    assert progress.rate == 5
    assert progress.describe() == "150 / 1,200 images, 5/s, 3 min 30 s left"
    assert progress.describe("loss 3") == "150 / 1,200 images, 5/s, 3 min 30 s left, loss 3"
    clock.now += 10
    progress.advance(1050)
    assert progress.describe() == "1,200 / 1,200 images, 55/s"


def test_slow_work_is_told_by_the_minute_or_hour(clock: SimpleNamespace) -> None:
    progress = Progress(10, "heads", stream=io.StringIO())
    clock.now += 60
    progress.advance(6)
    assert progress.describe() == "6 / 10 heads, 6/min, 40 s left"
    clock.now += 3 * 3600
    progress.advance(1)
    assert progress.describe() == "7 / 10 heads, 2/h, 1 h 17 min left"


def test_no_time_has_passed(clock: SimpleNamespace) -> None:
    progress = Progress(10, "rows", stream=io.StringIO())
    progress.advance(10)
    assert progress.describe().startswith("10 / 10 rows, ")


def test_a_terminal_is_redrawn_now_and_then_and_at_the_end(clock: SimpleNamespace) -> None:
    stream = Terminal()
    progress = Progress(1000, "rows", stream=stream)
    for _ in range(999):
        clock.now += 0.01
        progress.advance(1)
    lines = drawn(stream)
    assert 30 <= len(lines) <= 41  # 10 seconds, four times a second
    clock.now += 0.01
    progress.advance(1, "done")
    assert drawn(stream)[-1].startswith("1,000 / 1,000 rows")
    assert drawn(stream)[-1].endswith("done")
    assert "\n" not in stream.getvalue()


def test_lasting_lines_take_the_moving_one_away(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = Terminal()
    progress = Progress(10, "rows", stream=stream)
    progress.clear()
    assert stream.getvalue() == ""
    clock.now += 1
    progress.advance(5)
    progress.print("epoch 1")
    assert drawn(stream)[-1] == ""
    assert capsys.readouterr().out == "epoch 1\n"


def test_a_line_longer_than_the_terminal_is_cut(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    progress = Progress(1000, "rows", stream=stream)
    clock.now += 1
    progress.advance(10, "a long note " * 10)
    assert len(drawn(stream)[-1]) < 20


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_elsewhere_a_plain_line_a_minute(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    progress = Progress(1000, "rows", stream=stream)
    for _ in range(59):
        clock.now += 1
        progress.advance(1)
    progress.clear()
    assert stream.getvalue() == ""
    for _ in range(66):
        clock.now += 1
        progress.advance(1)
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["60", "120"]
    assert "".join(lines).isprintable()  # nothing to move a cursor


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (12.4, "12 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --------------------------------------------------------------------- signals

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def handlers() -> list[Any]:
    return [signal.getsignal(s) for s in SIGNALS]


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_first_signal_asks_and_the_second_insists(
    first: signal.Signals, second: signal.Signals, handlers: list[Any]
) -> None:
    with StopRequest() as stop:
        assert not stop.asked
        signal.raise_signal(first)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)
    assert [signal.getsignal(s) for s in SIGNALS] == handlers


def test_one_that_is_patient_is_asked_any_number_of_times() -> None:
    with StopRequest(patient=True) as stop:
        for number in (signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        assert (stop.asked, stop.terminated) == (True, True)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert (stop.asked, stop.terminated) == (True, False)


def test_an_interruption_keeps_its_status_between_processes() -> None:
    copy = pickle.loads(pickle.dumps(Interrupted("stopped", 0)))
    assert (str(copy), copy.status) == ("stopped", 0)


def test_handlers_are_put_back_after_an_error(handlers: list[Any]) -> None:
    def fail() -> None:
        with StopRequest():
            assert signal.getsignal(signal.SIGTERM) != handlers[1]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [signal.getsignal(s) for s in SIGNALS] == handlers


def test_outside_the_main_thread_handlers_are_left_alone(handlers: list[Any]) -> None:
    seen: list[list[Any]] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.append([signal.getsignal(s) for s in SIGNALS])
            assert not stop.asked

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handlers]
