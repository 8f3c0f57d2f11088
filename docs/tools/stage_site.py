"""The pages of the site, laid out for its builder: python docs/tools/stage_site.py FOLDER

docs/*.md are written to be read in the repository, too, so they link to what lies outside of docs/. There is no address
of the repository to send such links to: what they lead to becomes a page of the site, and what that leads to, until
nothing is left outside. A link to nothing is an error. The pages of the API are lists of names, which the builder fills
from docstrings.
"""

from __future__ import annotations

import ast
import os
import posixpath
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
# a fenced block, a piece of code, or the target of a link
CODE_OR_LINK = re.compile(
    r"^(?P<fence>`{3,}).*?^(?P=fence)$|(?P<code>`[^`\n]+`)|\]\((?P<target>[^)\s]+)\)", re.MULTILINE | re.DOTALL
)
OPTION = re.compile(r"`(-{1,2}[a-z-]+)`")  # which a browser would break after its hyphens
ELSEWHERE = re.compile(r"[a-z]+:|#")  # another server, or this page
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "sh", ".mk": "make", ".cff": "yaml", ".txt": "text"}
AS_THEY_ARE = {".svg", ".png", ".json", ".csv"}
OUTSIDE = "repository"
API = {  # beside the names of `lox_stream` itself: modules that docs/ or examples/ import
    "ladder": "models between base and aligned",
    "synthetic": "pairs with known spectra",
    "for_mergekit": "a merge method of mergekit",
    "for_compressed_tensors": "a converter of compressed-tensors",
    "for_dcp": "checkpoints of FSDP",
}


class BrokenLink(Exception):
    """A page links to what is not in the repository."""


def place(path: str, root: Path = ROOT) -> str:
    """Where a file or folder of the repository is found in the site's sources: `docs/cli.md` is `cli.md`."""
    if (root / path).is_dir():
        path = posixpath.join(path, "README.md" if (root / path / "README.md").exists() else "index.md")
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    suffix = posixpath.splitext(path)[1]
    name = path.replace("README.md", "readme.md")  # the builder takes a README.md for an index
    return posixpath.join(OUTSIDE, name if suffix in AS_THEY_ARE | {".md"} else f"{name}.md")


def linked(text: str, page: str, turn: Callable[[str], str]) -> str:
    """A page's text with each link into the repository turned: `turn` gets the path there, and gives what to write.

    Code of a table has its bars without the backslash that GitHub wants there, and the builder shows.
    """

    def turned(match: re.Match[str]) -> str:
        target, code = match["target"], match["code"]
        if code is not None:
            return OPTION.sub(r'<code class="option">\1</code>', code.replace(r"\|", "|"))
        if target is None or ELSEWHERE.match(target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        return f"]({turn(posixpath.normpath(posixpath.join(posixpath.dirname(page), path)))}{hash_}{anchor})"

    return CODE_OR_LINK.sub(turned, text)


def text_of(path: str, root: Path) -> str:
    """The page that a file or a folder becomes."""
    file = root / path
    if file.is_dir() and not (file / "README.md").exists():
        names = sorted(one.name for one in file.iterdir() if one.is_file())
        return f"# {path}\n\n" + "".join(f"- [{name}]({posixpath.basename(path)}/{name})\n" for name in names)
    if file.is_dir():
        file /= "README.md"
    if file.suffix == ".md":
        return file.read_text()
    return f"# {path}\n\n````{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text().rstrip()}\n````\n"


def stage(root: Path, folder: Path) -> list[str]:
    """Write all pages into a folder, which is made anew; returns what of the repository is there."""
    shutil.rmtree(folder, ignore_errors=True)
    left = sorted(path.relative_to(root).as_posix() for path in (root / "docs").glob("*.md"))
    seen = set(left)

    while left:
        page = left.pop()
        to = place(page, root)
        (folder / to).parent.mkdir(parents=True, exist_ok=True)
        if posixpath.splitext(page)[1] in AS_THEY_ARE:
            shutil.copyfile(root / page, folder / to)
            continue

        def turn(path: str, page: str = page, to: str = to) -> str:
            if path.startswith("..") or not (root / path).exists():
                raise BrokenLink(f"{page} links to {path}, which is not there")
            if path not in seen:
                seen.add(path)
                left.append(path)
            return posixpath.relpath(place(path, root), posixpath.dirname(to) or ".")

        is_folder = (root / page).is_dir() and (root / page / "README.md").exists()
        own = posixpath.join(page, "README.md") if is_folder else page
        text = linked(text_of(page, root), own, turn)
        searched = "/" not in to or posixpath.dirname(to) == OUTSIDE  # docs/, and what lies beside it: CONTRIBUTING.md
        (folder / to).write_text(text if searched else f"---\nsearch:\n  exclude: true\n---\n\n{text}")
    return sorted(seen)


def public(root: Path) -> dict[str, str]:
    """Each public name of the package and the first sentence of its docstring, without importing it."""
    tree = ast.parse((root / "lox_stream" / "__init__.py").read_text())
    values = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    homes = {name: module for module, names in ast.literal_eval(values["_MODULES"]).items() for name in names}
    names = [*ast.literal_eval(values["__all__"]), "open"]
    return {name: sentence(docstring(root, homes.get(name, "errors"), name)) for name in names}


def docstring(root: Path, module: str, name: str) -> str:
    """What a module says of one of its names, which it may have from another module."""
    wanted = {"open": "Extrapolated"}.get(name, name)
    for node in ast.parse((root / "lox_stream" / f"{module}.py").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == wanted:
            return ast.get_docstring(node) or ""
        if isinstance(node, ast.ImportFrom) and wanted in [alias.name for alias in node.names]:
            return docstring(root, (node.module or "").removeprefix("lox_stream."), wanted)
    raise LookupError(f"lox_stream.{module} has no {wanted}")


def sentence(text: str) -> str:
    """The first sentence of a docstring, on one line."""
    return re.split(r"(?<=[.:])\s|\n\n", text)[0].replace("\n", " ").rstrip(":")


def stage_api(root: Path, folder: Path) -> None:
    """api/index.md, which lists all names, and the pages that the builder fills."""
    api = folder / "api"
    api.mkdir()
    names = public(root)
    rows = [f"| [`{name}`](lox_stream.md#lox_stream.{name}) | {told} |" for name, told in sorted(names.items())]
    modules = [f"| [`lox_stream.{name}`]({name}.md) | {told} |" for name, told in API.items()]
    heading = "| | |\n| --- | --- |\n"
    (api / "index.md").write_text(
        "# The API\n\nOut of the docstrings. [The library](../library.md) shows how the functions are used.\n\n"
        "## `lox_stream`\n\n" + heading + "\n".join(rows) + "\n\n"
        "## Modules\n\n" + heading + "\n".join(modules) + "\n"
    )
    (api / "lox_stream.md").write_text(
        "# `lox_stream`\n\n" + "".join(f"::: lox_stream.{name}\n\n" for name in sorted(names))
    )
    for name in API:
        (api / f"{name}.md").write_text(
            f"# `lox_stream.{name}`\n\n::: lox_stream.{name}\n    options:\n"
            "      show_root_heading: false\n      show_root_toc_entry: false\n"
        )


def main() -> None:
    folder = Path(sys.argv[1])
    try:
        pages = stage(ROOT, folder)
    except BrokenLink as error:
        sys.exit(f"stage_site: {error}")
    stage_api(ROOT, folder)
    for name in ("site.css", "site.svg"):
        if (ROOT / "docs" / "tools" / name).exists():
            shutil.copyfile(ROOT / "docs" / "tools" / name, folder / name)
    print(f"stage_site: {len(pages)} pages and files of the repository in {os.path.relpath(folder)}")


if __name__ == "__main__":
    main()
