"""Errors that end a command with one line, and how that line is made of an exception."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CommandError(Exception):
    """What the user can mend. Its text is one line: ``expected <what>, got <value>; <fix>``."""


class Interrupted(Exception):  # noqa: N818  # no error
    """Ctrl-C; the text says how to go on."""


def one_line(error: BaseException) -> str:
    """What an exception says, as one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if len(lines) > 1 and lines[1].startswith("Original Traceback"):  # from a process of a data loader
        return lines[-1].partition(": ")[2]
    return lines[0]


@contextmanager
def mendable(*types: type[Exception]) -> Iterator[None]:
    """Make a `CommandError` of exceptions that, in this block, mean that the user gave something wrong."""
    try:
        yield
    except types as error:
        raise CommandError(one_line(error)) from error
