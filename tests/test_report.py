"""The page of a report: true to its data, alone, escaped; in a real browser readable, sortable, usable by keys."""

from __future__ import annotations

import contextlib
import json
import re
import shutil

import pytest

from lox_stream import Options
from lox_stream.pages import page_of_analysis, page_of_run
from lox_stream.reporting import page_text

HOSTILE = "</script><img src=x onerror='document.title=1'>\n\x1b[2J\u202eevil"
MODULES = [f"model.layers.*.{name}.weight" for name in (
    *(f"self_attn.{side}_proj" for side in "qkvo"), *(f"mlp.{side}_proj" for side in ("gate", "up", "down"))
)]  # fmt: skip


def matrix(name, module, layer, size):
    values = [size / (1 + i) for i in range(32)]
    energy = [min(1.0, (i + 1) / 40) for i in range(32)]
    grid = [
        {"rank": k, "alpha": alpha, "rounding": rounding, "retention": min(1.0, alpha * k / 6)}
        for k in (1, 6)
        for alpha in (0.5, 1.25)
        for rounding in ("nearest", "stochastic")
    ]
    return {
        "name": name, "tensor": name, "module": module, "layer": layer, "shape": [64, 48], "dtype": "BF16",
        "delta_norm": size, "weight_norm": 10.0, "relative": size / 10, "singular_values": values, "radius": [],
        "energy": energy, "gaps": [0.9] * 31, "stable_rank": 4.0, "entropy_rank": [9.0, 9.0],
        "noise": {"outliers": 3, "edge": values[5], "sigma": 0.1}, "retention": grid, "looked_at": 3072,
        "ours": {"rank": 6, "r_align": 0.5, "r_ft": 0.25, "kept": 0.5}, "reference": None, "notices": [],
    }  # fmt: skip


def document(layers, experts=1):
    """An analysis of so many layers of seven modules, and one matrix with a name that wants to get out."""
    rows = [
        matrix(
            module.replace("*", str(layer)) + (f".{expert}" if experts > 1 else ""), module, layer, 1 + layer + 100 * i
        )
        for layer in range(layers)
        for i, module in enumerate(MODULES)
        for expert in range(experts)
    ]
    rows.append(matrix(HOSTILE, HOSTILE, None, 0.5) | {"notices": [HOSTILE]})
    means = {"matrices": len(rows), "rank": 6, "align": 0.5, "finetuned": 0.25, "left": 0.5}
    return {
        "format": 1, "base": "/models/base", "aligned": f"/models/{HOSTILE}", "finetuned": "/models/tuned",
        "options": json.loads(json.dumps(Options(rank=6, alpha=1.25, skip=("*norm*",)), default=lambda o: {
            name: getattr(o, name) for name in o.__slots__})),
        "values": 32, "ranks": [1, 6], "alphas": [0.5, 1.25], "reference": False,
        "advice": ["They look like a pair.", HOSTILE], "warnings": [HOSTILE], "matrices": rows,
        "totals": {"matrices": len(rows), "changed": len(rows), "retention": rows[0]["retention"],
                   "robustness": {"ours": means, "reference": None}},
        "copied": {}, "elapsed_s": 1.0,
    }  # fmt: skip


def data_of(text):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def test_the_page_holds_its_data_and_asks_for_nothing():
    text = page_text(page_of_analysis(document(3)))
    rows = data_of(text)["rows"]
    assert len(rows) == 22
    assert rows[0]["figures"][0] == pytest.approx(6 / 40)
    assert not re.search(
        r'(?:src|href|url)\s*[=(]\s*["\']?(?!x onerror)', text.replace("&lt;", "<").split("<style>")[0]
    )
    assert "default-src 'none'" in text
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg", "", text)


def test_nothing_of_a_name_is_markup_or_moves_the_text():
    text = page_text(page_of_analysis(document(1)))
    assert "<img" not in text
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert text.count("</script>") == 2


def test_the_command_repeats_what_was_asked():
    page = page_of_analysis(document(1) | {"aligned": "/models/my model"})
    assert page.command == (
        "lox-stream analyze --base /models/base --aligned '/models/my model' --finetuned /models/tuned --skip '*norm*' "
        "--values 32 --ranks 1,6 --alphas 0.5,1.25"
    )


def test_the_manifest_of_a_run_is_a_page_with_what_the_run_measured(tmp_path):
    from lox_stream import extrapolate
    from lox_stream.manifest import read_manifest
    from lox_stream.synthetic import llama_shapes, write_pair

    pair = write_pair(tmp_path, llama_shapes(64, 96, 2, 128, 32))
    extrapolate(*pair, tmp_path / "out", options=Options(rank=2, alpha=0.5))
    manifest = read_manifest(tmp_path / "out")
    page = page_of_run(manifest)
    assert len(page.rows) == sum(len(one["matrices"]) for one in manifest["tensors"].values())
    for row in page.rows:
        (facts,) = manifest["tensors"][row.name]["matrices"]
        assert row.figures[:2] == (facts["energy"], facts["retention"])
        assert row.figures[4:6] == (facts["residual"], facts["predicted_share"])
        assert row.values == tuple(facts["singular_values"])
    assert "--rank 2 --alpha 0.5" in page.command
    assert any("Rounding (nearest) left" in sentence for sentence in page.sentences)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    assert found is not None, "make browser installs it"
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@contextlib.contextmanager
def opened(browser, tmp_path, said, **options):
    """The page in a window of its own, which must say nothing on the console and ask for nothing but the file."""
    path = tmp_path / "report.html"
    path.write_text(page_text(page_of_analysis(said)))
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
    page = context.new_page()
    told, asked = [], []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    yield page
    assert told == []
    assert asked == [path.as_uri()]
    context.close()


@pytest.mark.browser
def test_five_thousand_matrices_are_searched_and_sorted(browser, tmp_path):
    with opened(browser, tmp_path, document(45, experts=16)) as page:
        assert page.locator("#heat td:not(.empty)").count() == 45 * 7 + 1
        assert page.locator("#rows tbody tr").count() == 200
        assert page.locator("#count").inner_text() == "5041 of 5041 matrices"
        page.fill("#search", "layers.7. up_proj")
        assert page.locator("#count").inner_text() == "16 of 5041 matrices"
        page.fill("#search", "")
        heads = page.locator("#rows thead th")
        heads.nth(4).locator("button").click()
        assert heads.nth(4).get_attribute("aria-sort") == "descending"
        first = page.locator("#rows tbody tr").first
        assert "layers.44.mlp.down_proj" in first.inner_text()
        heads.nth(4).locator("button").click()
        assert heads.nth(4).get_attribute("aria-sort") == "ascending"
        page.click("#more")
        assert page.locator("#rows tbody tr").count() == 5041


@pytest.mark.browser
def test_all_of_it_is_reached_by_keys(browser, tmp_path):
    with opened(browser, tmp_path, document(4)) as page:
        page.focus("#metric")
        page.keyboard.press("Tab")
        label = "document.activeElement.getAttribute('aria-label')"
        assert "layer 0: " in page.evaluate(label)
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        assert page.evaluate(label).startswith("model.layers.*.self_attn.k_proj.weight, layer 1: ")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.textContent") == "model.layers.1.self_attn.k_proj.weight"
        assert page.locator("#detail svg").count() == 4  # values, energy, retention at two ranks
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "search"


@pytest.mark.browser
def test_what_a_cell_shows_follows_the_metric(browser, tmp_path):
    with opened(browser, tmp_path, document(4)) as page:
        page.select_option("#metric", label="|delta| / |W|")
        cell = page.locator("#heat td:not(.empty)").first
        assert cell.get_attribute("title").endswith("layer 0: 10.0 %")
        cell.click()
        assert page.locator("#detail h2").inner_text() == "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.browser
def test_hostile_names_are_text(browser, tmp_path):
    with opened(browser, tmp_path, document(1)) as page:
        page.fill("#search", "onerror")
        page.locator("#rows tbody button").click()
        assert "<img src=x" in page.locator("#detail h2").inner_text()
        assert page.locator("img").count() == 0
        assert page.title() != "1"


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_a_desk_by_day_and_night(browser, tmp_path, width, scheme):
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    with opened(browser, tmp_path, document(40), **options) as page:
        page.locator("#rows tbody button").first.click()
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        ink, paper = (page.evaluate(f"getComputedStyle(document.body).{what}") for what in ("color", "backgroundColor"))
        light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
        assert (light[0] < light[1]) == (scheme == "light")


@pytest.mark.browser
def test_it_can_be_printed(browser, tmp_path):
    with opened(browser, tmp_path, document(4)) as page:
        page.emulate_media(media="print")
        assert not page.locator("#search").is_visible()
        assert page.locator("#rows tbody tr").first.is_visible()
        assert page.pdf(format="A4").startswith(b"%PDF")
