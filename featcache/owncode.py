"""Which code of a user's own is behind ``package.module:attribute``, and is it what it was?"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sys
import textwrap
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from featcache.errors import InputError, reason_of


def load_object(name: str, what: str) -> Any:
    """The function or class behind ``package.module:attribute``.

    Raises
    ------
    InputError
        If the module cannot be imported, whatever it raises, or has no such function or class.
    """
    return _found(name, what)[1]


def _found(name: str, what: str) -> tuple[ModuleType, Any]:
    module_name, _, attribute = name.partition(":")
    if not module_name or module_name.startswith(".") or not attribute:
        raise InputError(f"{what} {name!r}: expected package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"{what} {name!r}: cannot import {module_name!r} ({error}); run from the folder that "
            "holds it, or install it"
        ) from error
    except (Exception, SystemExit) as error:  # code of somebody else's raises what it likes
        raise InputError(
            f"{what} {name!r}: importing {module_name!r} fails in {_place(error)} "
            f"({type(error).__name__}: {reason_of(error)}); mend the module"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise InputError(f"{what} {name!r}: {module_name} has no function {attribute!r}")
    return module, found


def _place(error: BaseException) -> str:
    """File and line that an error comes from; of an error of syntax those that it tells."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}, line {last.lineno}"


def source_digest(name: str, what: str) -> str:
    """SHA-256 of the code of the module behind ``package.module:attribute``; empty: none to be had.

    Comments and the layout of lines do not count, everything else in the module's file does:
    what a function does often hangs on constants and helpers beside it. So does the file in
    which the function is defined, if the module only passes it on. Code that these import is
    not looked at. In a notebook the function alone is hashed.

    Raises
    ------
    InputError
        As :func:`load_object`.
    """
    module, found = _found(name, what)
    home = sys.modules.get(str(getattr(found, "__module__", None)), module)
    files = dict.fromkeys(getattr(where, "__file__", None) for where in (module, home))
    try:
        texts = [Path(file).read_bytes() for file in files if file] or [_typed_in(found)]
    except (OSError, TypeError):  # nothing has kept the text
        return ""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(_meaning(text))
    return digest.hexdigest()


def _typed_in(function: Any) -> bytes:
    return textwrap.dedent(inspect.getsource(function)).encode()


def _meaning(text: bytes) -> bytes:
    """Code without comments and layout; of a compiled module its bytes."""
    try:
        return ast.dump(ast.parse(text)).encode()
    except (SyntaxError, ValueError):
        return text
