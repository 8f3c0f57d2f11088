"""What the commands say beside their result: the one place where errors, and warnings, become messages on stderr."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import click

from lox_stream.errors import CheckpointError, LoxError, OptionError
from lox_stream.names import printable

NO_ARGUMENTS = getattr(click.exceptions, "NoArgsIsHelpError", ())  # since click 8.2; its message is the help
NO_MEMORY = (
    *("can't allocate memory", "annot allocate memory", "failed to map segment", "can't start new thread", "bad_alloc"),
)
LEAST_MAPPED = 1200 << 20  # with torch for the CPU and two threads: `make torture`, part memory
ERROR, USAGE, NOT_CONVERGED, INTERRUPTED = 1, 2, 3, 130  # exit codes; a signal's is 128 + its number


def escaped(message: str) -> str:
    """A message with its line breaks, and nothing else that a terminal obeys; later lines are indented.

    Names in it are `printable` already, or the line breaks in them would be taken for the message's.
    """
    return "\n  ".join(printable(line.strip("\r")) for line in message.split("\n"))


def warn(warnings: Iterable[str]) -> None:
    """Each is a line of its own on stderr."""
    for warning in warnings:
        click.echo("warning: " + printable(warning), err=True)


def echo_json(document: dict[str, Any]) -> None:
    """The one document on stdout, in ASCII; NaN and infinities are null."""
    from lox_stream.journal import finite  # here, so that --help does not wait for safetensors

    try:
        text = _as_json(document)
    except ValueError:  # only such numbers are worth a copy of a document of a hundred thousand tensors
        text = _as_json(finite(document))
    click.echo(text)


def _as_json(document: Any) -> str:
    """Piece by piece: `json.dumps` holds millions of them until it joins them."""
    text = io.StringIO()
    json.dump(document, text, indent=2, allow_nan=False)
    return text.getvalue()


def guarded(action: Callable[[], Any]) -> int:
    """Run a command: its exit code, or a message on stderr and the code of what went wrong."""
    try:
        code = int(action() or 0)
        sys.stdout.flush()
    except click.UsageError as error:
        if isinstance(error, NO_ARGUMENTS):
            click.echo(error.format_message(), err=True)
            return USAGE
        if error.ctx is not None:
            click.echo(error.ctx.get_usage(), err=True)
        _say(error.format_message())
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return INTERRUPTED
    except LoxError as error:
        _say_problems(error)
        return USAGE if isinstance(error, OptionError) else ERROR
    except BrokenPipeError:  # whoever read our stdout has gone: nothing more can be said there, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except Exception as error:
        if _is_of_memory(error):
            _say_without_memory(error)
        elif isinstance(error, OSError):
            where = f"{printable(str(error.filename))}: " if error.filename else ""
            _say(f"{where}{error.strerror or error}. Check the path, its permissions and its disk")
        else:
            click.echo("".join(traceback.format_exception(error)), err=True)
            _say("this is a bug in lox-stream: please report it with the lines above and `lox-stream --version`")
        return ERROR
    return code


def _say(message: str) -> None:
    click.echo("error: " + escaped(message), err=True)


def _say_without_memory(error: BaseException) -> None:
    """That there was none, in words that need next to none; what the frames of the error hold is let go first."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    try:
        _say(f"not enough memory{_allowed()} use a smaller --memory or fewer --threads, or close other programs")
    except MemoryError:
        os.write(2, b"error: not enough memory: use a smaller --memory or fewer --threads, or close other programs\n")


def _say_problems(error: LoxError) -> None:
    """One message as it is; several as a list."""
    problems = error.problems if isinstance(error, CheckpointError) else (str(error),)
    if len(problems) == 1:
        _say(problems[0])
    else:
        _say("\n".join([f"{len(problems)} problems:", *(f"- {text}" for text in problems)]))


def _is_of_memory(error: BaseException) -> bool:
    """Whether there was no memory, which torch, threads and the loader of libraries each report in their own way."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    if isinstance(error, SystemError):  # of Python, where an allocation failed while torch was loaded
        return _mapping_limit() is not None
    return isinstance(error, RuntimeError | ImportError | OSError) and any(text in str(error) for text in NO_MEMORY)


def _allowed() -> str:
    """Of the limit on what this process may map, where it has one and that may be why."""
    limit = _mapping_limit()
    if limit is None:
        return ":"
    return (
        f": this process may map {limit >> 20} MiB (ulimit -v), expected {LEAST_MAPPED >> 20} and what "
        "--memory says, for torch maps most of that. Raise that limit,"
    )


def _mapping_limit() -> int | None:
    """The bytes that this process may map; None without a limit."""
    import resource  # not on Windows, where this module has to be importable to say so

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit
