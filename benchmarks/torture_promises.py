"""The table of docs/reliability.md: what is promised, how it is attacked, and what the last committed runs counted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- written by benchmarks/torture.py --docs -->", "<!-- end -->"
RUN = "`make torture`, `python benchmarks/torture.py --only {part}`"
PROMISES = {  # of each part: the promise, the attack, and which counts tell how often
    "kills": (
        "after `kill -9` at any moment, and the last `--resume`, no byte differs; no index or manifest stands "
        "over weights "
        "that are half new",
        "new runs, runs with `--overwrite`, repairs, and the resumed runs after them, of several shapes, killed at "
        "random times "
        "and before, after and in the middle of a call that changes the disk; up to four kills an output",
        ("kills", "kills of resumed runs", "kills of runs over a finished output", "kills of repairs"),
    ),
    "power": (
        "after a power cut a published output is whole, and a resume is right",
        "the writes, syncs, renames and removals of recorded runs, replayed into states that POSIX allows: "
        "what was not "
        "synced lost, reordered, torn ([the model](../benchmarks/torture_disk.py))",
        ("states", "states that are the finished output", "states met before"),
    ),
    "inputs": (
        "inputs that change end in the right bytes, in a warning, or in one message; two runs never mix; "
        "locks, `fallocate` "
        "and `fadvise` may be missing",
        "files changed in place, cut, removed, replaced or longer, at any call of a run; two runs begun within 80 ms",
        (
            "inputs: the run ended with a message",
            "inputs: finished, and the change was said",
            "two runs into one folder",
        ),
    ),
    "full": (
        "a file system that fills is one message, and with room made the next run is right",
        "tmpfs of few blocks or inodes, ext4 in a file, filled before a run or at any of its calls",
        ("runs that said there is no space", "runs that succeeded"),
    ),
    "memory": (
        "too little memory is one message, with the least that is needed",
        "`RLIMIT_AS` from what Python needs to more than enough, for whole processes and from where torch is loaded",
        (
            "own process: one message",
            "own process: succeeded",
            "forked process: one message",
            "forked process: succeeded",
        ),
    ),
    "cgroup": (
        "tensors larger than the memory of a container are no problem",
        "two tensors of 1.2 GB in a cgroup of 1 GiB, against the same without it",
        ("seconds within the limit", "seconds without the limit"),
    ),
    "faults": (
        "an error of the system at any call is one message, or nothing; the next run is right",
        "EIO, ENOSPC, EDQUOT, EACCES, EROFS, ENOMEM, EMFILE at every call in turn, once or from then on; short "
        "reads and "
        "writes; a signal every half millisecond",
        ("runs that ended with a message", "runs that succeeded all the same"),
    ),
}


def table(tortured: Mapping[str, Any], fuzzed: Mapping[str, Any]) -> str:
    """The rows of both records, as `finish` of harness.py wrote them, and the machines they were taken on."""
    lines = ["| promise | attack | command | counts | broke it |", "| --- | --- | --- | --- | ---: |"]
    for part in tortured["parts"]:
        promise, attack, counts = PROMISES[part["part"]]
        whole = f" of {part['of']:,}" if part.get("of") else ""
        told = [f"{part['cases']:,}{whole} cases", *(f"{part['counts'].get(name, 0):,} {name}" for name in counts)]
        told += [f"not tried here: {reason}" for reason in part["skipped"]]
        command = RUN.format(part=part["part"])
        lines.append(f"| {promise} | {attack} | {command} | {'; '.join(told)} | {len(part['failures']):,} |")
    cases, failed = (sum(target[what] for target in fuzzed["targets"]) for what in ("cases", "failed"))
    lines.append(
        "| whatever is read runs no code, leaves its folder by no name, and is a checkpoint or an error | damaged and "
        f"hostile headers, indexes, configs, pickles, journals, manifests, recipes | `make fuzz` | {cases:,} "
        f"files | {failed:,} |"
    )
    taken = [f"{record['benchmark']}: {on(record)}" for record in (tortured, fuzzed)]
    return "\n".join([*lines, "", "Taken on:", "", *(f"- {line}" for line in taken)])


def on(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    return (
        f"`{record['command']}`, {record['time'][:10]}, at {machine['commit']}: {machine['cpu']}, "
        f"{machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {machine['system']}"
    )


def rewrite(page: Path, results: Path) -> None:
    """Put the table of the records in the folder `results` between the marks of a page."""
    records = [json.loads((results / name).read_text()) for name in ("reliability.json", "fuzzing.json")]
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(*records)}\n{END}{after}")


if __name__ == "__main__":  # from the results that are there
    rewrite(Path(__file__).parents[1] / "docs" / "reliability.md", Path(__file__).parent / "results")
