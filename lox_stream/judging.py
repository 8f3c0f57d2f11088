"""A judge: a command that is given the folder of a model, and says a number, or a JSON object, on its last line."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lox_stream import files
from lox_stream.errors import Cancelled, JudgeError, OptionError
from lox_stream.grids import Place, number_text, place_text
from lox_stream.landscape_file import Landscape, verdict_problem
from lox_stream.names import listing, printable, shown
from lox_stream.shards import parse_json

MODEL, PLACES = "{model}", re.compile(r"\{(?:model|x|y)\}")
VALUE = "value"  # what a number alone is called
LOOK_EVERY_S = 0.1
PATIENCE_S = 1.0  # for a judge that was asked to stop
TAIL_BYTES = 1 << 20
LINES = 8  # of its stderr that an error shows

Judge = Callable[[Path, float, float], Mapping[str, Any]]  # of a point's folder, x and y


def judge_by(words: Sequence[str], cancel: threading.Event) -> Judge:
    """The judge that runs a command, with no shell; `{model}`, `{x}` and `{y}` in its words are filled in.

    Raises OptionError for what cannot be run. Setting `cancel` ends the command with all that it started.
    """
    if not any(MODEL in word for word in words):
        raise OptionError(f"the judge is {shown(list(words))}, expected {MODEL} in it: the folder of the point's model")
    if shutil.which(words[0]) is None:
        why = "is there, and may not be executed" if Path(words[0]).exists() else "no such program"
        raise OptionError(
            f"the judge's {printable(words[0])}: {why}, expected one that can be run. Check the name, or chmod +x"
        )

    def judge(folder: Path, x: float, y: float) -> Mapping[str, Any]:
        said = {"{model}": str(folder), "{x}": number_text(x), "{y}": number_text(y)}
        command = [PLACES.sub(lambda found: said[found[0]], word) for word in words]
        at = f"the judge at {place_text((x, y))}"
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            code = _run(command, out, err, cancel, at, folder)
            try:
                if code:
                    raise ValueError(f"{_ended(code)}, expected 0")
                return verdict_of(_last_line(out))
            except ValueError as error:
                raise JudgeError(f"{at}: {error}. {_told(err)}") from None

    return judge


def _ended(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"ended with {code}"


def _run(command: Sequence[str], out: IO[bytes], err: IO[bytes], cancel: threading.Event, at: str, folder: Path) -> int:
    """Its exit code, in a session of its own, so that its end reaches what it started, too. Raises Cancelled.

    It inherits the lock of the model's folder, which tells the next command that it lives, where this one is killed.
    """
    try:
        lock, _ = files.lock_folder(folder)
    except OSError as error:
        raise JudgeError(f"{at}: {printable(folder)} cannot be locked ({error.strerror}). End what uses it") from error
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True, pass_fds=(lock,)
        )
    except (OSError, ValueError) as error:
        raise JudgeError(f"{at}: cannot be run: {printable(str(error))}. Check the command") from error
    finally:
        files.close(lock)
    try:
        while not cancel.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(LOOK_EVERY_S)
        raise Cancelled("stopped on request")
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to stop, then end it, with whatever it left in its group, which could write on in what is removed."""
    if process.poll() is None:
        _tell(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
    started = time.monotonic()
    while _tell(process.pid, signal.SIGKILL) and time.monotonic() - started < PATIENCE_S:
        process.poll()
        time.sleep(0.01)
    process.wait()


def _tell(group: int, number: int) -> bool:
    """Send a signal to a group of processes; whether there is one."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # the latter on macOS, of one that waits to be reaped
        return False
    return True


def verdict_of(line: str) -> dict[str, Any]:
    """What a line says; raises ValueError where that is no number, nor an object with one.

    >>> verdict_of("0.25"), verdict_of('{"asr": 0.25, "of": 100}')
    ({'value': 0.25}, {'asr': 0.25, 'of': 100})
    """
    try:
        said: Any = float(line)
    except ValueError:
        why = "it is no JSON"
        with contextlib.suppress(ValueError):
            said, _ = parse_json(line.encode("utf-8", "surrogateescape"))
            why = verdict_problem(said)
        if not why:
            return dict(said)
        expected = "expected a number, or a JSON object with one and no x or y in it"
        raise ValueError(f"said {shown(line)} on its last line, {expected}: {why}") from None
    if not math.isfinite(said):
        raise ValueError(f"said {shown(line)} on its last line, expected a finite number")
    return {VALUE: said}


def require_verdict(verdict: object, known: Landscape, place: Place) -> None:
    """Raise JudgeError for what is no verdict, or has not the names that the earlier ones have."""
    at = f"the judge at {place_text(place)} said {shown(verdict)}"
    if problem := verdict_problem(verdict):
        raise JudgeError(f"{at}, {problem}")
    assert isinstance(verdict, Mapping), "a verdict"
    expected = sorted(known.points[0].verdict) if known.points else sorted(verdict)
    if sorted(verdict) != expected:
        raise JudgeError(f"{at}, expected {listing(expected)} in it, as at the points before. Give each the same names")


def _last_line(file: IO[bytes]) -> str:
    """The last that is not empty; raises ValueError where it is too long to be read."""
    lines = _tail(file).strip().splitlines()
    if len(lines) == 1 and file.seek(0, os.SEEK_END) > TAIL_BYTES:
        raise ValueError(f"its last line is too long, expected one of {TAIL_BYTES} bytes at most")
    return lines[-1].strip() if lines else ""


def _told(err: IO[bytes]) -> str:
    lines = [printable(line) for line in _tail(err).rstrip().splitlines()[-LINES:]]
    return "\n".join(["Its last lines on stderr:", *lines]) if lines else "It said nothing on stderr"


def _tail(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
    return file.read().decode("utf-8", "replace")
