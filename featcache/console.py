"""What both command lines share: options made from dataclasses, progress, one-line errors."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TextIO

from featcache.errors import MissingExtra, trouble


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like those of :func:`run`."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is; exit status 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


_REDRAW_SECONDS = 0.25
_QUIET_SECONDS = 60.0


class PrintCompletion(argparse.Action):
    """``--print-completion SHELL``: a script of shtab that lets the shell complete a command."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, *_: Any
    ) -> None:
        """Print it and end."""
        try:
            import shtab
        except ModuleNotFoundError as error:
            parser.error(str(MissingExtra(error.name or "shtab", "completion")))
        _complete_files(parser, shtab.FILE)
        print(shtab.complete(parser, values))
        parser.exit()


def _complete_files(parser: argparse.ArgumentParser, files: Any) -> None:
    """Mark what takes text of any kind, which mostly is a path; shtab reads the same list."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                _complete_files(verb, files)
        elif action.nargs != 0 and action.choices is None and action.type in (None, str):
            # shtab's own attribute, which argparse does not declare.
            action.complete = files  # type: ignore[attr-defined]


def add_common(parser: argparse.ArgumentParser, version: str) -> None:
    """What both commands have beside their verbs."""
    parser.add_argument("--version", action="version", version=f"{parser.prog} {version}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help="print a script that completes this command in that shell",
    )


def examples_of(command: str, examples: str) -> str:
    """Those lines of `examples` that show one command, as the end of its help."""
    # A line that ends in a backslash goes on in the next one.
    every = re.findall(r"^ *(?:.*\\\n)*.*$", examples, re.MULTILINE)
    found = [text for text in every if f"{text.strip()} ".startswith(f"{command} ")]
    return "\n".join([f"example{'s' * (len(found) != 1)}:", *found]) if found else ""


def print_json(facts: object) -> None:
    """One object on one line, for other programs; a number that is not finite is null."""
    print(json.dumps(_plain(facts), ensure_ascii=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, typing.Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # arrays and numbers of numpy
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int)) or value is None else str(value)


def with_torch() -> None:
    """Say in one line what is missing; let modules of the user's own be found from here."""
    for package in ("torch", "torchvision", "timm", "PIL", "safetensors"):
        try:
            __import__(package)
        except ModuleNotFoundError as error:
            raise MissingExtra(package, "extract") from error
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def option(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field that is a command-line option as well; extra goes to argparse."""
    metadata = {"help": help, "argparse": extra}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required(help: str, **extra: Any) -> Any:
    """A dataclass field that must be given."""
    return dataclasses.field(metadata={"help": help, "argparse": {"required": True, **extra}})


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """One option for each field of a dataclass made by :func:`option` and :func:`required`."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if "argparse" not in field.metadata:
            continue
        settings = dict(field.metadata["argparse"])
        flag = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if hints[field.name] is bool:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        if "default" not in settings and field.default is not dataclasses.MISSING:
            settings["default"] = field.default
            if field.default not in (None, ""):
                text += " (default: %(default)s)"
        settings.setdefault("type", _value_type(hints[field.name]))
        parser.add_argument(flag, help=text, **settings)


def _value_type(hint: Any) -> Callable[[str], Any]:
    """int of int, of int | None; str of list[str]."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is list:
        hint = typing.get_args(hint)[0]
    return hint if hint in (int, float) else str


def from_arguments(config: type, arguments: argparse.Namespace, **positional: Any) -> Any:
    """The dataclass filled from parsed options; absent lists and dicts take their defaults."""
    values = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(config)
        if "argparse" in field.metadata and getattr(arguments, field.name) is not None
    }
    return config(**positional, **values)


def command_line(verb: str, config: Any, *positional: str) -> str:
    """The shell command that stands for a configuration; options at their defaults are left out."""
    words = [*verb.split(), *positional]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "argparse" not in field.metadata or value == field.default or value == []:
            continue
        flag = "--" + field.name.replace("_", "-")
        if value is True:
            words.append(flag)
        else:
            for item in value if isinstance(value, list) else [value]:
                # A value that begins with a dash would be taken for an option.
                words += [f"{flag}={item}"] if str(item).startswith("-") else [flag, str(item)]
    return shlex.join(words)


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 10 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min"


def _per_time(rate: float) -> str:
    """5/s; 12/min or 3/h where work is slow."""
    for seconds, unit in ((1, "s"), (60, "min")):
        if rate == 0 or rate * seconds >= 1:
            return f"{rate * seconds:,.0f}/{unit}"
    return f"{rate * 3600:,.0f}/h"


class Progress:
    """A line with rate and time left: redrawn on a terminal, elsewhere a new one every minute.

    Parameters
    ----------
    total : int
        Units of work in all.
    unit : str
        What is counted, in the plural.
    done : int
        Units that an earlier run has done; they do not count for the rate.
    stream : file
        Where to draw; standard error by default.
    """

    def __init__(self, total: int, unit: str, done: int = 0, stream: TextIO | None = None) -> None:
        self.total, self.unit, self.done = total, unit, done
        self._start_count, self._start = done, time.monotonic()
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._next = self._start + (0.0 if self._live else _QUIET_SECONDS)
        self._drawn = False

    @property
    def rate(self) -> float:
        """Units a second in this run."""
        return (self.done - self._start_count) / max(time.monotonic() - self._start, 1e-9)

    def describe(self, note: str = "") -> str:
        """``1,200 / 3,000 images, 410/s, 5 s left`` and the note."""
        left = (self.total - self.done) / self.rate if self.rate > 0 else 0.0
        ending = f", {duration(left)} left" if self.done < self.total and self.rate > 0 else ""
        text = f"{self.done:,} / {self.total:,} {self.unit}, {_per_time(self.rate)}{ending}"
        return f"{text}, {note}" if note else text

    def advance(self, count: int, note: str = "") -> None:
        """Count finished units and draw if it is time."""
        self.done += count
        now = time.monotonic()
        if now < self._next and not (self._live and self.done >= self.total):
            return
        text = self.describe(note)
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r\x1b[K" + text[:width])
            self._next, self._drawn = now + _REDRAW_SECONDS, True
        else:
            self._stream.write(text + "\n")
            self._next = now + _QUIET_SECONDS
        self._stream.flush()

    def print(self, line: str) -> None:
        """A lasting line above the moving one."""
        self.clear()
        print(line, flush=True)

    def clear(self) -> None:
        """Take the moving line away."""
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._drawn = False


class Interrupted(Exception):
    """Work was stopped by a signal and can go on later; the message says how.

    Parameters
    ----------
    message : str
    status : int
        Exit status of the command.
    """

    def __init__(self, message: str = "", status: int = 130) -> None:
        super().__init__(message)
        self.status = status


class StopRequest:
    """While open, the first SIGINT or SIGTERM only asks for an end between two batches.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Parameters
    ----------
    patient : bool
        A second signal does not insist. torchrun passes on signals that a batch system may
        have sent to every process already.

    Attributes
    ----------
    asked, terminated : bool
        Whether a signal has come, and whether it was SIGTERM.
    """

    def __init__(self, patient: bool = False) -> None:
        self.asked = self.terminated = False
        self._patient = patient
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and not self._patient:
            raise KeyboardInterrupt
        self.asked = True
        self.terminated = number == signal.SIGTERM

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def run(parser: argparse.ArgumentParser, argv: Iterable[str] | None) -> int:
    """Parse, call the verb's ``function``, and turn errors a user can mend into one line.

    Returns the exit status: 0 fine, 1 ran and the answer is bad, 2 wrong use,
    130 interrupted (unless the work says otherwise). With ``--debug`` tracebacks are shown.
    """
    try:
        arguments = parser.parse_args(None if argv is None else list(argv))
    except SystemExit:
        _flush_or_hush()  # of a help text whose reader has gone
        raise
    except BrokenPipeError:
        _hush()
        return 1
    except KeyboardInterrupt:
        return _interrupted(parser)
    try:
        status: int | None = arguments.function(arguments)
        sys.stdout.flush()  # a reader that has gone shows here, not while Python shuts down
        return status or 0
    except Interrupted as stop:
        print(f"{parser.prog}: {stop}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        return _interrupted(parser)
    except BrokenPipeError:
        _hush()
        return 1
    except (ValueError, OSError, MissingExtra, RuntimeError, MemoryError) as error:
        line = trouble(error) if isinstance(error, RuntimeError | MemoryError) else str(error)
        if line is None:
            raise
        if arguments.debug:
            traceback.print_exc()
        print(f"{parser.prog}: {line}", file=sys.stderr)
        return 2


def _interrupted(parser: argparse.ArgumentParser) -> int:
    print(f"{parser.prog}: interrupted", file=sys.stderr)
    return 130


def _flush_or_hush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _hush()


def _hush() -> None:
    """The reader of our output is gone; say nothing more, at exit either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
