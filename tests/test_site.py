"""The site of `make site`: what is laid out for its builder, and the check of what was built.

The builder itself is not installed here: CI runs `make site`.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re

import check_site
import draw_pictures
import pytest
import stage_site
import yaml
from pages import PAGES, README, ROOT, blocks

import lox_stream
from lox_stream import analyze
from lox_stream.recording import document_of
from lox_stream.synthetic import llama_shapes, write_pair

NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]


@pytest.fixture
def repository(tmp_path):
    """Two pages and what they link to."""
    files = {
        "docs/index.md": "# A\n\n[b](b.md#there) [code](../lox/a.py) `[no](link.md)` ![p](pictures/p.svg) [x](https://x)\n",
        "docs/b.md": "# B\n\n```text\n[no](../link.md)\n```\n\n| `a\\|b` | `--no-x` |\n\n[c](../C.md) [f](../folder)\n",
        "docs/pictures/p.svg": "<svg/>",
        "lox/a.py": "x = 1  # [no](link.md)\n",
        "C.md": "# C\n\n[back](docs/b.md) [own](#c)\n",
        "folder/README.md": "# F\n\n[c](../C.md)\n",
    }
    for name, text in files.items():
        (tmp_path / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repository" / name).write_text(text)
    return tmp_path / "repository"


def test_what_pages_link_to_outside_of_docs_becomes_pages_and_nothing_else(repository, tmp_path):
    stage_site.stage(repository, tmp_path / "site")
    staged = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.*")}
    outside = {"repository/lox/a.py.md", "repository/C.md", "repository/folder/readme.md"}
    assert staged == {"index.md", "b.md", "pictures/p.svg"} | outside


def test_links_lead_to_where_things_lie_in_the_site(repository, tmp_path):
    stage_site.stage(repository, tmp_path / "site")
    text = {path.name: path.read_text() for path in (tmp_path / "site").rglob("*.md")}
    assert (
        "[b](b.md#there) [code](repository/lox/a.py.md) `[no](link.md)` ![p](pictures/p.svg) [x](https://x)"
        in (text["index.md"])
    )
    assert "[no](../link.md)" in text["b.md"]
    assert "[c](repository/C.md) [f](repository/folder/readme.md)" in text["b.md"]
    assert "[back](../b.md) [own](#c)" in text["C.md"]
    assert "[c](../C.md)" in text["readme.md"]
    assert "[no](link.md)" in text["a.py.md"]


def test_code_in_tables_is_written_as_the_builder_reads_it(repository, tmp_path):
    stage_site.stage(repository, tmp_path / "site")
    assert '| `a|b` | <code class="option">--no-x</code> |' in (tmp_path / "site" / "b.md").read_text()


@pytest.mark.parametrize("target", ["nowhere.md", "../nowhere.py", "../../outside.md"])
def test_a_link_to_nothing_is_an_error(repository, tmp_path, target):
    (tmp_path / "outside.md").write_text("# Not of the repository\n")
    (repository / "docs" / "b.md").write_text(f"[gone]({target})\n")
    with pytest.raises(stage_site.BrokenLink, match=r"docs/b\.md links to"):
        stage_site.stage(repository, tmp_path / "site")


def test_every_link_of_the_docs_leads_to_something_in_the_repository(tmp_path):
    staged = stage_site.stage(ROOT, tmp_path / "site")
    assert {path.relative_to(ROOT).as_posix() for path in PAGES if path != README} <= {*staged}
    assert {"CONTRIBUTING.md", "SECURITY.md", "lox_stream/krylov.py", "benchmarks/results/svd.svg"} <= {*staged}


def test_every_page_is_found_from_the_navigation(tmp_path):
    """A page of docs/ that is not there would be read by nobody."""
    named = {target for group in NAV for entry in group.values() for target in targets(entry)}
    assert {path.name for path in PAGES if path != README} <= named
    stage_site.stage(ROOT, tmp_path / "site")
    stage_site.stage_api(ROOT, tmp_path / "site")
    assert [target for target in named if not (tmp_path / "site" / target).is_file()] == []


def targets(entry):
    return [entry] if isinstance(entry, str) else [target for one in entry for target in one.values()]


def test_every_public_name_and_every_module_that_the_docs_import_has_a_place_in_the_api(tmp_path):
    (tmp_path / "site").mkdir()
    stage_site.stage_api(ROOT, tmp_path / "site")
    listed = re.findall(r"^::: lox_stream\.(\w+)$", (tmp_path / "site" / "api" / "lox_stream.md").read_text(), re.M)
    assert {*listed} == {*lox_stream.__all__, "open"}
    index = (tmp_path / "site" / "api" / "index.md").read_text()
    assert "| [`plan`](lox_stream.md#lox_stream.plan) | " in index
    assert not re.search(r"\|\s+\|$", index.split("## `lox_stream`")[1].replace("| | |\n", ""), re.M), (
        "a name without words"
    )
    code = [block for page in PAGES for language in ("python", "py") for block in blocks(page, language)]
    code += [path.read_text() for path in (ROOT / "examples" / "toolchains").glob("*.py")]
    imported = {
        node.module.split(".")[1]
        for text in code
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lox_stream.")
    }
    assert imported <= stage_site.API.keys()
    assert {posixpath.basename(path) for path in map(str, (tmp_path / "site" / "api").iterdir())} == {
        "index.md", "lox_stream.md", *(f"{name}.md" for name in stage_site.API),
    }  # fmt: skip


@pytest.fixture
def site(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "page.html").write_text('<p id="there"><a href="../index.html">back</a></p>')
    (tmp_path / "p.svg").write_text("<svg></svg>")
    (tmp_path / "site.css").write_text("p { background: url(p.svg) }")
    write_index(tmp_path, "")
    return tmp_path


def write_index(site, more: str) -> None:
    (site / "index.html").write_text(
        '<link rel="stylesheet" href="site.css"><a href="b/page.html#there">b</a> <a href="#own" id="own">own</a>'
        '<img src="p.svg" alt="a picture"><a href="https://arxiv.org">elsewhere</a>' + more
    )


def test_a_site_whose_links_all_lead_somewhere_has_no_problems_and_its_other_servers_are_told(site):
    assert check_site.problems(site) == ([], {"https://arxiv.org"})


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ('<a href="gone.html">', "gone.html is not there"),
        ('<a href="b/page.html#gone">', "b/page.html#gone is not there"),
        ('<a href="#gone">', "#gone is not there"),
        ('<a href="../outside.html">', "../outside.html is not there"),
        ('<a href="/index.html">', "/index.html is right only where"),
        ('<img src="gone.svg" alt="a picture">', "gone.svg is not there"),
        ('<img src="p.svg">', "p.svg has no words beside it"),
        ('<img src="https://x.org/p.svg" alt="a picture">', "loads https://x.org/p.svg from elsewhere"),
        ('<script src="//cdn.org/x.js"></script>', "loads //cdn.org/x.js from elsewhere"),
        ('<link rel="preconnect" href="https://fonts.gstatic.com">', "loads https://fonts.gstatic.com from elsewhere"),
        ("<style>p { background: url('https://x.org/p') }</style>", "loads https://x.org/p from elsewhere"),
        ('<p style="background: url(https://x.org/p)">', "loads https://x.org/p from elsewhere"),
        ("<rounded - W, update>", "<rounded> is no tag"),
        ('<pre class="mermaid">', "fetch a script from elsewhere"),
        ('<a class="md-source" data-md-component="source">', "fetch a script from elsewhere"),
    ],
)
def test_what_is_wrong_in_a_page_is_told(site, more, problem):
    (site.parent / "outside.html").write_text("there, but not of the site")
    write_index(site, more)
    (found,) = check_site.problems(site)[0]
    assert problem in found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("site.css", "@import 'https://fonts.googleapis.com/css';"),
        ("site.css", "@font-face { src: url(https://fonts.gstatic.com/x.woff2) }"),
        ("more.js", 'fetch("https://x.org/telling")'),
    ],
)
def test_what_styles_and_scripts_fetch_from_elsewhere_is_told(site, name, text):
    (site / name).write_text(text)
    (found,) = check_site.problems(site)[0]
    assert "from elsewhere" in found


def test_a_folder_without_a_page_is_a_problem(tmp_path):
    assert check_site.problems(tmp_path)[0] == [f"{tmp_path} holds no page"]


def test_the_pictures_are_drawn_out_of_an_analysis_and_are_small(tmp_path):
    pair = write_pair(tmp_path, llama_shapes(64, 96, layers=2, vocabulary=128))
    found = json.loads(json.dumps(document_of(analyze(*pair))))
    draw_pictures.draw(found, tmp_path)
    committed = {path.name: path for path in (ROOT / "docs" / "pictures").iterdir()}
    assert {path.name for path in tmp_path.glob("*.svg")} == committed.keys()
    for name, path in committed.items():
        assert path.stat().st_size < 150_000, name
        assert "self_attn.o_proj" in (tmp_path / name).read_text()
    told = "".join(page.read_text() for page in PAGES)
    assert [name for name in committed if not re.search(rf"!\[[^\]]+\]\(pictures/{name}\)", told)] == []
