"""What goes wrong for reasons a user can mend."""

from __future__ import annotations

import os

# How torch begins to tell, and what to say of it.
BY_SIGNAL = "DataLoader worker (pid"
WORKER_ENDED = (
    "a worker process was ended (too little memory, or too little of /dev/shm?); take fewer "
    "--workers, the same command goes on where it stopped"
)


class InputError(ValueError):
    """Wrong input; the message is one line that names the file, the value and the remedy."""


def damage(path: str | os.PathLike[str], what: str) -> InputError:
    """The error to raise where a file is not what was written."""
    return InputError(f"{path}: damaged, {what}; make or copy it again")


def trouble(error: RuntimeError | MemoryError) -> str | None:
    """What to do, in one line, where memory was too little; None of any other error.

    Those of torch are known by their texts: this module is there without torch, and the end of a
    worker is told by a signal, wherever the program is.
    """
    text = str(error)
    if text.startswith(BY_SIGNAL):
        return WORKER_ENDED
    if isinstance(error, MemoryError):
        return f"no memory is left ({reason_of(error)}); free some and run the same command again"
    if "out of memory" in text or "DefaultCPUAllocator" in text:
        return (
            f"no memory is left ({reason_of(error).partition('. ')[0]}); free some (of the GPU, if "
            "it ran there) and run the same command again, which goes on where it stopped; a "
            "smaller --batch-size begins anew, with --overwrite"
        )
    return None


def reason_of(error: BaseException) -> str:
    """The first line of a message of somebody else's."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class MissingExtra(ImportError):
    """An optional dependency is needed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs {package}, which is not installed: pip install 'featcache-heads[{extra}]'"
        )
