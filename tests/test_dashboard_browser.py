"""The dashboard in a browser: what it shows and asks for, by keyboard, in light and dark."""

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from dashboard_world import KEY, PROMPTS, TIERS, contrast, serving

from dvpa.server.config import ServeConfig

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
chromium = import_module("browser")
Browser, Page = chromium.Browser, chromium.Page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = chromium.find_chromium()
    if binary is None:
        pytest.skip("no Chromium: install Debian's `chromium`")
    with Browser(binary, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(ServeConfig()) as address:
        yield address


def text_of(page: Page, name: str) -> str:
    return str(page.run(f"document.getElementById('{name}').textContent"))


def open_page(browser: Browser, address: str, width: int = 1280, scheme: str = "light") -> Page:
    page = browser.page(width, 900, scheme)
    page.open(f"{address}/")
    page.wait_for("document.querySelectorAll('#decision-rows th').length > 20")
    return page


SHIFT = """new Promise((done) => {
  let sum = 0;
  new PerformanceObserver((list) => list.getEntries().forEach((entry) => { sum += entry.value; }))
    .observe({ type: "layout-shift", buffered: true });
  setTimeout(() => done(sum), 2500);
})"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_the_page_shows_the_server(
    browser: Browser, address: str, tmp_path: Path, width: int, scheme: str
) -> None:
    page = open_page(browser, address, width, scheme)
    assert page.run(SHIFT) < 0.05
    assert text_of(page, "model-name") == "tiny"
    assert text_of(page, "state") == "live"
    assert text_of(page, "requests-total") == str(len(PROMPTS))
    for part in ("share-list", "tier-rows", "decision-rows"):
        assert all(name in text_of(page, part) for name in TIERS)
    assert "asked for by the client" in text_of(page, "decision-rows")
    assert "tier map: " in text_of(page, "decision-rows")
    assert re.search(r"rejected\s*1", text_of(page, "reasons"))
    assert re.fullmatch(r"\d+\s%", text_of(page, "saved"))
    assert text_of(page, "drift") == "unknown"  # too few requests
    for name, datasets in (("flow", 3), ("difficulty", 2), ("frontier", 3)):
        assert page.run(f"Chart.getChart('{name}-chart').data.datasets.length") == datasets
        assert page.run(f"document.getElementById('{name}-empty').hidden")
    # Nothing is cut off at the side, and every tier stands out from its panel.
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    style = "getComputedStyle(document.documentElement).getPropertyValue('{}').trim()"
    panel = page.run(style.format("--panel"))
    colors = [page.run(style.format(f"--tier-{tier}")) for tier in range(3)]
    assert all(contrast(color, panel) >= 3.0 for color in colors)
    assert len(set(colors)) == 3
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 30_000
    assert page.problems == []
    assert all(url.startswith(f"{address}/") for url in page.requested)
    page.close()


@pytest.mark.slow
def test_a_prompt_is_tried_with_the_keyboard_alone(browser: Browser, address: str) -> None:
    page = open_page(browser, address)
    page.press("Tab")
    assert page.run("document.activeElement.className") == "skip"
    page.press("Enter")
    reached = []
    while "prompt" not in reached:
        page.press("Tab")
        assert page.run("getComputedStyle(document.activeElement).outlineStyle !== 'none'")
        reached.append(page.run("document.activeElement.id"))
        assert len(reached) < 20
    page.type("one and two")
    reached = []
    while "route" not in reached:
        page.press("Tab")
        reached.append(page.run("document.activeElement.id"))
        assert len(reached) < 20
    page.press("Enter")
    page.wait_for("document.querySelectorAll('#decision .bars dt').length === 3")
    assert "difficulty 0." in text_of(page, "decision")
    assert text_of(page, "answer") == ""
    page.press("Tab")
    assert page.run("document.activeElement.id") == "generate"
    page.press("Enter")
    page.wait_for("document.querySelectorAll('#answer-facts dd').length === 8")
    assert text_of(page, "answer-state") == "cut at max tokens"
    assert text_of(page, "answer").strip()
    assert "64 out" in text_of(page, "answer-facts")
    assert page.run("document.activeElement.id") == "generate"
    assert page.problems == []
    page.close()


@pytest.mark.slow
def test_errors_are_told_where_they_happen(browser: Browser, address: str) -> None:
    page = open_page(browser, address)
    page.run("document.getElementById('prompt').value = 'one '.repeat(2000)")
    page.run("document.getElementById('generate').click()")
    page.wait_for("document.getElementById('prompt-error').textContent")
    assert "context" in text_of(page, "prompt-error")
    page.run("Object.defineProperty(document, 'hidden', { value: true, configurable: true })")
    page.run("document.dispatchEvent(new Event('visibilitychange'))")
    assert text_of(page, "state") == "paused"
    browser.pump(0.5)
    asked = len(page.requested)
    browser.pump(2.5)
    assert len(page.requested) == asked
    page.close()


@pytest.mark.slow
def test_charts_take_on_the_other_colours(browser: Browser, address: str) -> None:
    page = open_page(browser, address)
    color = "Chart.getChart('flow-chart').getDatasetMeta(0).data[0].options.backgroundColor"
    before = page.run(color)
    page.prefer("dark")
    page.wait_for(f"{color} !== '{before}'")
    assert page.problems == []
    page.close()


@pytest.mark.slow
def test_a_key_is_asked_for_and_kept_in_the_tab_only(browser: Browser) -> None:
    with serving(ServeConfig(api_keys=(KEY,))) as address:
        page = browser.page(375, 800)
        page.open(f"{address}/")
        page.wait_for("document.activeElement?.id === 'key'")
        for key in ("not-the-key", KEY):
            page.type(key)
            page.press("Enter")
            if key != KEY:
                page.wait_for("document.getElementById('key-why').textContent.includes('refuses')")
                page.wait_for("document.activeElement?.id === 'key'")
        page.wait_for("document.querySelectorAll('#decision-rows th').length > 20")
        assert page.run("document.getElementById('key-form').hidden")
        assert page.run("Object.values({...sessionStorage})") == [KEY]
        assert page.run("localStorage.length + document.cookie.length") == 0
        assert page.run("document.documentElement.outerHTML").count(KEY) == 0
    page.wait_for("document.getElementById('state').textContent.includes('does not answer')")
    page.close()
