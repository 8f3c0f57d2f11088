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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lox_stream.errors import Cancelled, JudgeError, OptionError
from lox_stream.journal import finite
from lox_stream.landscape_file import is_number, number_text
from lox_stream.names import printable, shown
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
        raise OptionError(f"the judge's {printable(words[0])}: no such program, expected one that can be run")

    def judge(folder: Path, x: float, y: float) -> Mapping[str, Any]:
        said = {"{model}": str(folder), "{x}": number_text(x), "{y}": number_text(y)}
        command = [PLACES.sub(lambda found: said[found[0]], word) for word in words]
        at = f"the judge at x {number_text(x)}, y {number_text(y)}"
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            code = _run(command, out, err, cancel, at)
            line, problem = _last_line(out), f"ended with {code}, expected 0" if code else ""
            try:
                verdict = {} if problem else verdict_of(line)
            except ValueError as error:
                problem = f"said {shown(line)} on its last line, {error}"
            if problem:
                raise JudgeError(f"{at}: {problem}. {_told(err)}")
        return verdict

    return judge


def _run(command: Sequence[str], out: IO[bytes], err: IO[bytes], cancel: threading.Event, at: str) -> int:
    """Its exit code, in a session of its own, so that a stop reaches what it started, too. Raises Cancelled."""
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
    except (OSError, ValueError) as error:
        raise JudgeError(f"{at}: cannot be run: {printable(str(error))}. Check the command") from error
    try:
        while not cancel.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(LOOK_EVERY_S)
        raise Cancelled("stopped on request")
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask what is left of it to stop, then end it."""
    for number, patience_s in ((signal.SIGTERM, PATIENCE_S), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)


def verdict_of(line: str) -> dict[str, Any]:
    """What a line says; raises ValueError where that is no number, nor an object with one.

    >>> verdict_of("0.25"), verdict_of('{"asr": 0.25, "of": 100}')
    ({'value': 0.25}, {'asr': 0.25, 'of': 100})
    """
    try:
        said: Any = float(line)
    except ValueError:
        with contextlib.suppress(ValueError):
            said, _ = parse_json(line.encode("utf-8", "surrogateescape"))
            said = finite(said)
            if isinstance(said, dict) and not {"x", "y"} & said.keys() and any(map(is_number, said.values())):
                return said
        raise ValueError("expected a number, or a JSON object with one and no x or y in it") from None
    if not math.isfinite(said):
        raise ValueError("expected a finite number")
    return {VALUE: said}


def _last_line(file: IO[bytes]) -> str:
    """The last that is not empty."""
    lines = _tail(file).strip().splitlines()
    return lines[-1].strip() if lines else ""


def _told(err: IO[bytes]) -> str:
    lines = [printable(line) for line in _tail(err).rstrip().splitlines()[-LINES:]]
    return "\n".join(["Its last lines on stderr:", *lines]) if lines else "It said nothing on stderr"


def _tail(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
    return file.read().decode("utf-8", "replace")
