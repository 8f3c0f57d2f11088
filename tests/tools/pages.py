"""README.md and docs/: the blocks in them that are examples, and the commands that stand there.

A command of a `console` block runs as it stands. One of an indented block stands for a user's own folders. The
paragraph above such a block may say that it needs what no test has: "(needs a GPU)".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text()) if found == language]


@dataclass(frozen=True)
class Shown:
    """A line of an indented block: a command without the words beside it, or a formula."""

    line: str
    needs: str  # what the paragraph above says that it needs: "a GPU"; else nothing

    @property
    def synopsis(self) -> bool:
        """Words in capitals stand for what a user has: `lox-stream verify OUT`."""
        return re.search(r"(?<![\w./-])[A-Z]{2,}(?![\w.-])", self.line) is not None


def lines_shown(text: str) -> list[Shown]:
    found: list[Shown] = []
    above = ""
    for part in re.split(r"\n(?:[ \t]*\n)+", re.sub(r" *\\\n +", " ", BLOCK.sub("\n", text))):
        lines = [line for line in part.split("\n") if line.strip()]
        if not lines or not all(line.startswith("    ") for line in lines):
            above = part
            continue
        needs = re.search(r"\bneeds (a (?:GPU|hub|bucket|cluster)(?: and a (?:GPU|hub))?)\b", above.replace("\n", " "))
        found += [Shown(re.split(r" {3,}(?![ &=])|  # ", line.strip())[0], needs[1] if needs else "") for line in lines]
    return found


def commands_shown(page: Path) -> list[str]:
    """The lines of lox-stream in indented blocks.

    Without what stands there in brackets, which may be left out, and without what is done before it.
    """
    lines = [re.sub(r" \[[^]]*\]", "", shown.line.split("&& ")[-1]) for shown in lines_shown(page.read_text())]
    return [line for line in lines if line.startswith("lox-stream ")]
