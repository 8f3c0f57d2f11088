"""The library: `extrapolate` writes a checkpoint, out of a pair and to a place that may lie anywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from lox_stream.api import Progress, Summary, execute, execute_all
from lox_stream.hub import local
from lox_stream.names import address_of
from lox_stream.options import Options
from lox_stream.planning import DEFAULTS, plan
from lox_stream.reaching import as_given, named, reach, require_place
from lox_stream.scratch_disk import scratch_at
from lox_stream.shipping import ship


def extrapolate(
    base: str | Path,
    aligned: str | Path,
    out: str | Path,
    *,
    options: Options = DEFAULTS,
    resume: bool = False,
    overwrite: bool = False,
    repair: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
    scratch: str | Path | None = None,
    scratch_bytes: int = 0,
) -> Summary:
    """Write W_aligned + alpha * Proj_k(W_aligned - W_base) to the folder `out`.

    `base` and `aligned` are folders, single files, names on the hub (`org/name@revision`), which are downloaded into
    its cache, or addresses (s3://, https://); `out` is a folder or an s3:// address. What lies at an address passes
    through the folder `scratch`, of which it takes `scratch_bytes` at most (0: 40 GiB, or half of what is free where
    that is less), and so do names on the hub where `scratch` is given. The other arguments are as for `execute`;
    `repair` is for folders.

    Raises LoxError of some kind for everything that is wrong with inputs,
    options or the output folder, before anything is written where planning can know it.

        from lox_stream import Options, extrapolate

        summary = extrapolate("base", "aligned", "out", options=Options(rank=6, alpha=1.25))
        print(summary.totals.retention)
    """
    ways = {"resume": resume, "overwrite": overwrite, "repair": repair}
    if scratch is None and not any(map(address_of, (base, aligned, out))):
        made = plan(local(base), local(aligned), out, options=options, **ways)
        return execute(made, **ways, progress=progress, cancel=cancel)
    require_place(out, options, repair=repair)
    with scratch_at(None if scratch is None else Path(scratch), scratch_bytes) as passing:
        reached = reach(base, aligned, passing)
        with named(reached):
            if address_of(out):
                made = as_given(plan(reached.base, reached.aligned, options=options), reached)
                (summary,) = ship(
                    [made], [out], passing, resume=resume, overwrite=overwrite, progress=progress, cancel=cancel
                )
            else:
                made = as_given(plan(reached.base, reached.aligned, out, options=options, **ways), reached)
                (summary,) = execute_all([made], **ways, progress=progress, cancel=cancel, source=passing)
    return summary
