"""`lox-stream verify`: checksums, and on request a sample recomputed in float64."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lox_stream.errors import OutputError
from lox_stream.manifest import read_manifest
from lox_stream.messages import echo_json, escaped
from lox_stream.names import counted, printable
from lox_stream.rendering import comparison_table, console_of
from lox_stream.sampling import Sample, choose_sample, planned_again
from lox_stream.showing import budget_text, display, size_text, time_text
from lox_stream.signals import Interruption
from lox_stream.verifying import Check, folder_of, verify_checksums

if TYPE_CHECKING:
    from lox_stream.locating import Wrong
    from lox_stream.recomputing import Comparison

SHOWN_FAILURES = 20


@dataclass(frozen=True, slots=True)
class _Reach:
    done_bytes: int
    total_bytes: int
    resumed_bytes: int
    working: tuple[str, ...]
    elapsed_s: float


def check_output(out: Path, inputs: tuple[Path, Path] | None, *, count: int, seed: int, as_json: bool) -> int:
    """Check an output and return the exit code: 0 when everything is right, 1 when something is not."""
    with Interruption(lambda: "stopped"):
        if not out.exists():
            raise OutputError(f"{printable(out)}: no such file or folder, expected an output. Check the path")
        if inputs is not None:
            planned_again(folder_of(out), *inputs)  # inputs that are others are said before every byte was read
        checks = _checksums(out)
        failed = [check for check in checks if not check.ok]
        sample, compared, wrong = None, [], []
        if inputs is not None and failed:
            wrong = _locate(out, inputs, failed)
        elif inputs is not None:
            sample = choose_sample(out, *inputs, count=count, seed=seed)
            compared = _recompute(sample)
    ok = not failed and all(comparison.ok for comparison in compared)
    if as_json:
        echo_json(_document(out, checks, sample, compared, ok, wrong))
    else:
        _show(out, checks, failed, compared, wrong)
    return 0 if ok else 1


def _checksums(out: Path) -> list[Check]:
    """Every check, with its progress on stderr."""
    total = read_manifest(folder_of(out))["totals"].get("n_bytes")
    checks: list[Check] = []
    started, done = time.monotonic(), 0
    with display(console_of(stderr=True), "checking", quiet=False) as show:
        for check in verify_checksums(out):
            checks.append(check)
            done += check.n_bytes
            elapsed_s = time.monotonic() - started
            show(_Reach(done, max(done, total if isinstance(total, int) else 0), 0, (check.name,), elapsed_s))
    return checks


def _locate(out: Path, inputs: tuple[Path, Path], failed: list[Check]) -> list[Wrong]:
    """The wrong bytes, out of what is damaged made again."""
    click.echo(f"making {counted(len(failed), 'damaged part')} again, to find the wrong bytes", err=True)
    from lox_stream.locating import locate

    return list(locate(out, *inputs, failed))


def wrong_text(wrong: Wrong) -> str:
    """`FILE: NAME: byte 4242 is 0x13, expected 0x12`."""
    part = f"{printable(wrong.check.file)}: " + (
        f"{printable(wrong.check.name)}: " if wrong.check.part == "tensor" else ""
    )
    found = "missing" if wrong.found is None else f"0x{wrong.found:02x}"
    more = f", the first of {counted(wrong.n_bytes, 'wrong byte')}" if wrong.n_bytes > 1 else ""
    return f"{part}byte {wrong.first_byte} of the file is {found}, expected 0x{wrong.expected:02x}{more}"


def _recompute(sample: Sample) -> list[Comparison]:
    """Say what it costs, then do it."""
    click.echo(escaped(cost_text(sample)), err=True)
    from lox_stream.recomputing import compare_all

    compared = []
    for comparison in compare_all(sample):
        compared.append(comparison)
        click.echo(
            f"recomputed {printable(comparison.name)} in {time_text(comparison.elapsed_s)} "
            f"({len(compared)} of {len(sample.units)})",
            err=True,
        )
    return compared


def cost_text(sample: Sample) -> str:
    """What a recomputation will take, said before it begins."""
    lines = [
        f"recomputing {counted(len(sample.units), 'matrix', 'matrices')} by a full SVD in float64: about "
        f"{sample.flops / 1e9:.3g} GFLOP, {time_text(sample.expected_s)} or more, {budget_text(sample.memory_bytes)}: "
        + ", ".join(f"{printable(unit.name)} ({unit.shape[0]} x {unit.shape[1]})" for unit in sample.units)
    ]
    if sample.too_large:
        lines.append(
            f"left out, too large for this machine's memory: {counted(len(sample.too_large), 'matrix', 'matrices')} "
            f"({printable(sample.too_large[0])}{', ...' if len(sample.too_large) > 1 else ''})"
        )
    return "\n".join(lines)


def _show(out: Path, checks: list[Check], failed: list[Check], compared: list[Comparison], wrong: list[Wrong]) -> None:
    for check in failed[:SHOWN_FAILURES]:
        click.echo("error: " + escaped(check.message), err=True)
    if len(failed) > SHOWN_FAILURES:
        click.echo(f"error: and {len(failed) - SHOWN_FAILURES} more", err=True)
    where, size = printable(out), size_text(sum(check.n_bytes for check in checks))
    if failed:
        click.echo(f"FAILED: {where}: {len(failed)} of {counted(len(checks), 'check')} failed, {size} read")
        for found in wrong[:SHOWN_FAILURES]:
            click.echo(escaped(wrong_text(found)))
        return
    if compared:
        console_of().print(comparison_table(compared))
    differing = sum(not comparison.ok for comparison in compared)
    if differing:
        click.echo(
            f"FAILED: {where}: {counted(differing, 'matrix', 'matrices')} of {len(compared)} disagree with float64"
        )
    else:
        more = f", and {counted(len(compared), 'matrix agrees', 'matrices agree')} with float64" if compared else ""
        click.echo(f"OK: {where}: {counted(len(checks), 'check')}, every byte of {size} is as it was written{more}")


def _document(
    out: Path, checks: list[Check], sample: Sample | None, compared: list[Comparison], ok: bool, wrong: list[Wrong]
) -> dict[str, Any]:
    located = {found.check: found for found in wrong}
    failed = [_failure(check, located.get(check)) for check in checks if not check.ok]
    recomputed: dict[str, Any] | None = None
    if sample is not None:
        recomputed = {
            "flops": sample.flops,
            "expected_s": sample.expected_s,
            "memory_bytes": sample.memory_bytes,
            "too_large": list(sample.too_large),
            "matrices": [asdict(comparison) | {"share": comparison.share} for comparison in compared],
        }
    return {
        "out": str(out),
        "ok": ok,
        "checks": len(checks),
        "bytes": sum(check.n_bytes for check in checks),
        "failed": failed,
        "recomputed": recomputed,
        "exit_code": 0 if ok else 1,
    }


def _failure(check: Check, wrong: Wrong | None) -> dict[str, Any]:
    """A failed check; with the inputs given also the first byte that is wrong, and how many are."""
    where = None if wrong is None else {"first_byte": wrong.first_byte, "bytes": wrong.n_bytes}
    shown = {"name": check.name, "message": check.message, "file": check.file, "part": check.part}
    return shown | {"first_byte": check.first_byte, "bytes": check.n_bytes, "wrong": where}
