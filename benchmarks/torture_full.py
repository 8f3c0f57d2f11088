"""Small file systems that really fill: a tmpfs that has few blocks or few inodes, and an ext4 in a file.

Something else writes to the same file system, before a run or at one of its calls, and leaves little. The run
succeeds, or says that there is no space; with room made the next one leaves the right bytes. Needs root, and a mount
that is allowed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from torture_faults import require_message
from torture_inputs import Changing
from torture_runs import WAYS, begun, going_on, require_nothing_false, shown_before
from torture_seam import Seam
from torture_world import Law, Outcome, World, commit_often, content, must, require_same, rng_of

KINDS = ("tmpfs", "tmpfs, few inodes", "ext4")
SIZE = 8 << 20  # of a file system
LEFT_BYTES = 200_000  # at most, for the run: it needs about so much
INODES = 60
SPACE = ("space", "quota")


class Full:
    """The cases of this part: a file system, and who fills it when."""

    part = "full"
    cases = None

    def __init__(self, worlds: list[World], folder: Path, seed: int) -> None:
        self._worlds, self._seed = worlds, seed
        self._kinds, self.skipped = [], []
        for kind in KINDS:
            try:
                with mounted(kind, folder / "tried"):
                    self._kinds.append(kind)
            except OSError as error:
                self.skipped.append(f"{kind}: {error}")
        if not self._kinds:
            self.cases = 0

    def case(self, number: int, folder: Path, outcome: Outcome) -> None:
        """Raises Law."""
        rng = rng_of(self._seed, self.part, number)
        world = self._worlds[number % len(self._worlds)]
        kind, way = rng.choice(self._kinds), rng.choice(["new", "resume", "overwrite"])
        with mounted(kind, folder / "disk") as disk:
            out = begun(world, way, disk / "out", rng)
            before = shown_before(way, out)
            said = folder / "out.said"
            fill = fill_inodes if "inodes" in kind else fill_bytes
            left = rng.randint(0, 12 if "inodes" in kind else LEFT_BYTES)
            moment = rng.randrange(-20, 150)
            if moment < 0:
                fill(disk, left)

            def install() -> None:
                commit_often(1)
                Seam(Changing(moment, lambda: fill(disk, left)), out).install()

            ended = world.run(out, *WAYS[way], before=install, said=said)
            found = content(out)
            require_nothing_false(found, world, before)
            outcome.count(f"{kind}: {'filled before the run' if moment < 0 else 'filled during the run'}")
            if ended.code == 0:
                require_same(found, world.reference, "a run that succeeded")
                outcome.count("runs that succeeded")
                return
            require_message(ended)
            if not any(word in ended.said.lower() for word in SPACE):
                raise Law(f"does not say that there is no space: {ended.said}")
            outcome.count("runs that said there is no space")
            shutil.rmtree(disk / "hog")
            flags = going_on(found, world, way)
            if flags:
                must(world.run(out, *flags, said=said))
            require_same(content(out), world.reference, "with room made")


@contextlib.contextmanager
def mounted(kind: str, folder: Path) -> Iterator[Path]:
    """A small file system at `folder`; raises OSError where it cannot be made."""
    folder.mkdir(exist_ok=True)
    image = folder.with_suffix(".ext4")
    if kind == "ext4":
        with image.open("wb") as file:
            file.truncate(SIZE)
        command(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", str(image)])
        command(["mount", "-o", "loop", str(image), str(folder)])
    else:
        options = f"size={SIZE}" + (f",nr_inodes={INODES}" if "inodes" in kind else "")
        command(["mount", "-t", "tmpfs", "-o", options, "lox-torture", str(folder)])
    try:
        yield folder
    finally:
        command(["umount", str(folder)])
        image.unlink(missing_ok=True)


def command(words: list[str]) -> None:
    """Raises OSError with what it said."""
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise OSError(f"{words[0]} cannot be used here: {ran.stderr.strip()[:200]}")


def fill_bytes(disk: Path, left: int) -> None:
    """Write until so many bytes are free."""
    (disk / "hog").mkdir(exist_ok=True)
    fd = os.open(disk / "hog" / "bytes", os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        status = os.fstatvfs(fd)
        os.posix_fallocate(fd, 0, max(1, status.f_bavail * status.f_frsize - left))
    os.close(fd)


def fill_inodes(disk: Path, left: int) -> None:
    """Make files until so many more can be made."""
    (disk / "hog").mkdir(exist_ok=True)
    with contextlib.suppress(OSError):
        for number in range(os.statvfs(disk).f_favail - left):
            os.close(os.open(disk / "hog" / str(number), os.O_WRONLY | os.O_CREAT))
