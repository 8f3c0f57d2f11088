"""README.md and docs/: the blocks in them that are examples, and the commands that stand there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text()) if found == language]


def commands_shown(page: Path) -> list[str]:
    """The lines of lox-stream in indented blocks, which stand for a user's own folders and are not run.

    Without what stands there in brackets, which may be left out, and without the words beside a command.
    """
    text = re.sub(r" *\\\n +", " ", BLOCK.sub("", page.read_text()))
    lines = re.findall(r"^    (?:.*&& )?(lox-stream .*)$", text, re.MULTILINE)
    return [re.sub(r" \[[^]]*\]", "", re.split(r" {3,}", line)[0]) for line in lines]
