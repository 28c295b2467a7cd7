"""What goes wrong for reasons a user can mend."""

from __future__ import annotations


class InputError(ValueError):
    """Wrong input; the message is one line that names the file, the value and the remedy."""


def reason_of(error: BaseException) -> str:
    """The first line of a message of somebody else's."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class MissingExtra(ImportError):
    """An optional dependency is needed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs {package}, which is not installed: pip install 'featcache-heads[{extra}]'"
        )
