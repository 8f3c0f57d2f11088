"""`lox-stream run --ray` whose nodes take their time for each tensor, and note it beside the output when it is made.

python tests/tools/slow_ray.py run --ray ADDRESS --base base --aligned aligned --out out
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import ray

from lox_stream import on_ray

PAUSE_S = 0.15
carry_out = on_ray.carry_out


def slowly(wholes, part, board):
    """A task: `carry_out`, slowly."""
    from unittest import mock

    from lox_stream.writer import Output

    log, done = wholes[0].out.parent / "made.log", Output.done

    def noted(self, facts):
        done(self, facts)
        with log.open("a") as file:
            file.write(f"{os.getpid()} {facts.name}\n")
        time.sleep(PAUSE_S)

    with mock.patch.object(Output, "done", noted):
        return carry_out(wholes, part, board)


def dying(wholes, part, board):
    """A task whose process dies."""
    os.kill(os.getpid(), signal.SIGKILL)


def made(folder: Path) -> list[tuple[int, str]]:
    """Process and name of each tensor that was made, in order."""
    log = folder / "made.log"
    rows = [line.split(" ", 1) for line in log.read_text().splitlines()] if log.exists() else []
    return [(int(pid), name) for pid, name in rows]


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not find this file

if __name__ == "__main__":
    from lox_stream.cli import main

    on_ray.carry_out = slowly
    main()
