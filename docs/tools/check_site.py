"""Every link of the built site leads to something, and nothing is loaded from elsewhere: python check_site.py FOLDER

Addresses on other servers are listed, and not asked: the check needs no network. The theme's own script would fetch
other scripts where a page has what they are for (a diagram, a lightbox, code to run in the page, the stars of a
repository): such pages are refused.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {  # what a browser fetches by itself; a plain link waits for somebody to follow it
    ("link", "href"), ("script", "src"), ("img", "src"), ("img", "srcset"), ("source", "src"), ("source", "srcset"),
    ("iframe", "src"), ("object", "data"), ("embed", "src"), ("video", "src"), ("audio", "src"), ("image", "href"),
    ("use", "href"), ("form", "action"), ("video", "poster"), ("input", "src"),
}  # fmt: skip
FOLLOWED = {("a", "href"), ("area", "href")}
# what the builder writes; any other tag is text in angle brackets, which a browser does not show
TAGS = """
a article aside blockquote body br button circle code dd del details div dl dt em figcaption figure footer
form g h1 h2 h3 h4 h5 h6 head header hr html img input kbd label li line link main meta nav noscript ol p path
polyline pre rect s script section small span strong style sub summary sup svg table tbody td template th
thead title tr ul use
"""
FETCHED_FOR = re.compile(r"\b(?:mermaid|glightbox)\b|^source$")  # classes, or components of the theme
IN_CSS = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")
IN_SCRIPT = re.compile(r"(?:fetch|importScripts|import)\(\s*['\"](https?:)?//")


@dataclass
class Page(HTMLParser):
    """What of a page can be linked to, and what it links to and loads: (address, whether it is loaded)."""

    anchors: set[str] = field(default_factory=set)
    targets: list[tuple[str, bool]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    style: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.style = tag == "style"
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "img" and not given.get("alt", "").strip():
            self.faults.append(f"{given.get('src')} has no words beside it")
        if tag not in TAGS.split():
            self.faults.append(f"<{tag}> is no tag: write &lt;{tag}")
        marks = [*given.get("class", "").split(), given.get("data-md-component", "")]
        if any(FETCHED_FOR.search(mark) for mark in marks) or any(name.startswith("data-md-exec") for name in given):
            self.faults.append(f"<{tag} class='{given.get('class', '')}'> has the theme fetch a script from elsewhere")
        if "canonical" in given.get("rel", ""):
            return
        for name, value in given.items():
            if (tag, name) in LOADS | FOLLOWED:
                self.targets.append((value, (tag, name) in LOADS))
            elif name == "style":
                self.targets += [(one, True) for one in loaded_by_css(value)]

    def handle_data(self, data: str) -> None:
        if self.style:
            self.targets += [(one, True) for one in loaded_by_css(data)]


def loaded_by_css(text: str) -> list[str]:
    return [first or second for first, second in IN_CSS.findall(text)]


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text())
    return page


def problems(folder: Path) -> tuple[list[str], set[str]]:
    """What is wrong, a line each, and the addresses on other servers that somebody may follow."""
    pages = {path.resolve(): read(path) for path in sorted(folder.rglob("*.html"))}
    found: list[str] = [] if pages else [f"{folder} holds no page"]
    elsewhere: set[str] = set()
    sources = [(path, target, loads) for path, page in pages.items() for target, loads in page.targets]
    for path in sorted(folder.rglob("*.css")) + sorted(folder.rglob("*.svg")):
        sources += [(path.resolve(), target, True) for target in loaded_by_css(path.read_text())]

    for path, target, loads in sources:
        parts, name = urlsplit(target), path.relative_to(folder.resolve())
        if parts.scheme in ("http", "https", "mailto") or parts.netloc:
            if loads:
                found.append(f"{name} loads {target} from elsewhere")
            else:
                elsewhere.add(target)
        elif parts.scheme != "data":
            found += [f"{name}: {what}" for what in missing(folder.resolve(), path, parts.path, parts.fragment, pages)]

    for path, page in pages.items():
        found += [f"{path.relative_to(folder.resolve())}: {fault}" for fault in page.faults]
    for path in sorted(folder.rglob("*.js")):
        if IN_SCRIPT.search(path.read_text()):
            found.append(f"{path.relative_to(folder)} loads something from elsewhere")
    return found, elsewhere


def missing(folder: Path, path: Path, to: str, anchor: str, pages: dict[Path, Page]) -> list[str]:
    """What a target inside the site lacks: its file, or the anchor in it."""
    if to.startswith("/") and path != folder / "404.html":  # which is shown at any depth
        return [f"{to} is right only where the site is the root of its server"]
    file = (path.parent / unquote(to)).resolve() if to[:1] != "/" else folder / unquote(to[1:])
    if not to:
        file = path
    if file.is_dir():
        file /= "index.html"
    if not file.is_relative_to(folder) or not file.is_file():
        return [f"{to} is not there"]
    if anchor and file in pages and unquote(anchor) not in pages[file].anchors:
        return [f"{to}#{anchor} is not there"]
    return []


def main() -> None:
    folder = Path(sys.argv[1])
    found, elsewhere = problems(folder)
    for line in found:
        print(f"check_site: {line}")
    if found:
        sys.exit(f"check_site: {len(found)} problems")
    pages = len(list(folder.rglob("*.html")))
    print(f"check_site: every link of {pages} pages leads somewhere, and nothing is loaded from elsewhere")
    print(f"check_site: {len(elsewhere)} addresses on other servers were not asked: {', '.join(sorted(elsewhere))}")


if __name__ == "__main__":
    main()
