"""The dashboard: what its files may hold, how they are served, and how it lives in a browser."""

import hashlib
import re
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient
from helpers import thresholds, tiny_config, tiny_model

from dvpa.engine import Engine, SamplingParams
from dvpa.server.app import STATIC, create_app
from dvpa.server.backend import LocalBackend
from dvpa.server.config import ServeConfig
from dvpa.tasks.tokenizer import train_tokenizer

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
chromium = import_module("browser")
Browser, Page = chromium.Browser, chromium.Page

CHART_JS = "chart.umd.js"
CHART_JS_SHA256 = "87364cc2b2a76a6684929e7d6b80b18a897794db38400caff1fcf1791c6925d2"
OURS = {path.name: path.read_text(encoding="utf-8") for path in STATIC.iterdir()}
OURS = {name: text for name, text in OURS.items() if not name.startswith("chart.")}
SCRIPTS = {name: text for name, text in OURS.items() if name.endswith(".js")}
HTML, CSS = OURS["index.html"], OURS["dashboard.css"]
TIERS = ("base", "middle", "top")
KEY = "a-key-of-the-tests"
REPORT = {
    "tiers": [
        {"name": name, "activated_params": 1e4 * (tier + 1), "quality": 0.3 + 0.2 * tier}
        for tier, name in enumerate(TIERS)
    ],
    "routers": {},
    "frontier": {"adaptive": {"cost": [1e4, 2e4, 3e4], "quality": [0.3, 0.6, 0.7]}},
}


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.inline = ""
        self._labels = 0
        self.in_label: list[dict[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.found.append((tag, attributes))
        self._labels += tag == "label"
        if self._labels:
            self.in_label.append(attributes)

    def handle_endtag(self, tag: str) -> None:
        self._labels -= tag == "label"

    def handle_data(self, data: str) -> None:
        if self.lasttag in ("script", "style"):
            self.inline += data.strip()

    def values(self, *names: str) -> list[str]:
        """All values of attributes of these names."""
        return [a[name] for _, a in self.found for name in names if name in a]


ELEMENTS = Elements(HTML)
IDS = ELEMENTS.values("id")


# -- the files ---------------------------------------------------------------------------------


def test_chart_js_is_the_released_one_with_its_licence() -> None:
    content = (STATIC / CHART_JS).read_bytes()
    assert content.startswith(b"/*!\n * Chart.js v4.6.1\n")
    assert hashlib.sha256(content).hexdigest() == CHART_JS_SHA256
    assert "The MIT License" in (STATIC / "chart.LICENSE.md").read_text()


@pytest.mark.parametrize("name", sorted(OURS))
def test_nothing_comes_from_elsewhere(name: str) -> None:
    text = OURS[name].replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.findall(r"https?:|wss?:|@import|[\"'(]//|url\(", text)
    assert len(text.splitlines()) <= 400 or name.endswith(".css")


def test_the_page_holds_no_script_and_no_style() -> None:
    """A content security policy without 'unsafe-inline' would refuse them."""
    assert ELEMENTS.inline == ""
    for tag, attributes in ELEMENTS.found:
        assert tag != "style"
        assert not [name for name in attributes if name == "style" or name.startswith("on")]
    for script in SCRIPTS.values():
        banned = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|cssText"
        assert not re.findall(banned + r"|setAttribute\(\"style|localStorage|\.cookie", script)


def test_every_id_that_scripts_use_is_there_once() -> None:
    assert len(IDS) == len(set(IDS))
    used = {name for text in SCRIPTS.values() for name in re.findall(r"\$\(\"([^\"]+)\"\)", text)}
    used |= {f"{chart}-{part}" for chart in re.findall(r"show\(\"(\w+)\"", SCRIPTS["charts.js"])
             for part in ("chart", "empty")}  # fmt: skip
    assert len(used) > 40
    assert used <= set(IDS)


def test_every_reference_inside_the_page_leads_somewhere() -> None:
    named = ELEMENTS.values("for", "aria-labelledby", "aria-describedby")
    named += [link[1:] for link in ELEMENTS.values("href") if link.startswith("#")]
    assert set(named) <= set(IDS)


def test_every_control_has_a_name() -> None:
    labelled = set(ELEMENTS.values("for"))
    for tag, attributes in ELEMENTS.found:
        if tag in ("input", "select", "textarea"):
            is_named = attributes.get("id") in labelled or "aria-label" in attributes
            assert is_named or attributes in ELEMENTS.in_label, attributes
        if tag == "canvas":
            assert attributes["role"] == "img" and attributes["aria-label"]
        if tag == "th":
            assert attributes["scope"] == "col"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read(scheme: str) -> None:
    """WCAG AA: 4.5 for text, 3 for the edges of controls."""
    blocks = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    colors = dict(re.findall(r"--([\w-]+): (#\w{6});", blocks[0]))
    if scheme == "dark":
        colors |= dict(re.findall(r"--([\w-]+): (#\w{6});", blocks[1]))
    for back in ("page", "panel"):
        for front in ("text", "muted", "accent", "good", "bad", "focus"):
            assert contrast(colors[front], colors[back]) >= 4.5, (front, back)
        assert contrast(colors["control"], colors[back]) >= 3.0
    assert contrast(colors["solid-text"], colors["solid"]) >= 4.5


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours, "#rrggbb" or "rgb(r, g, b)"."""
    levels = sorted(luminance(color) for color in (one, other))
    return (levels[1] + 0.05) / (levels[0] + 0.05)


def luminance(color: str) -> float:
    if color.startswith("#"):
        parts = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
    else:
        parts = [int(part) for part in re.findall(r"\d+", color)]
    linear = [
        part / 255 / 12.92 if part / 255 <= 0.04045 else ((part / 255 + 0.055) / 1.055) ** 2.4
        for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_file_is_shipped() -> None:
    project = tomllib.loads((STATIC.parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["dvpa.server"]
    for path in STATIC.iterdir():
        assert any(fnmatch(f"static/{path.name}", pattern) for pattern in patterns)


# -- how they are served -----------------------------------------------------------------------


def test_the_page_and_all_it_needs_are_served_without_a_key() -> None:
    client = TestClient(create_app(None, ServeConfig(api_keys=(KEY,))))
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text == HTML
    imported = {f"static/{name}" for text in SCRIPTS.values()
                for name in re.findall(r"from \"\./([\w.]+)\"", text)}  # fmt: skip
    linked = {link for link in ELEMENTS.values("src", "href") if not link.startswith("#")}
    assert linked | imported >= {f"static/{name}" for name in SCRIPTS}
    types = {"js": "javascript", "css": "text/css", "svg": "image/svg+xml"}
    for link in linked | imported:
        assert not link.startswith("/")  # so that it also works below a proxy's prefix
        answer = client.get(f"/{link}")
        assert answer.status_code == 200, link
        assert types[link.rsplit(".", 1)[1]] in answer.headers["content-type"]
        for name, value in (
            ("x-content-type-options", "nosniff"),
            ("referrer-policy", "no-referrer"),
        ):
            assert answer.headers[name] == value
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert client.get("/v1/dvpa/telemetry").status_code == 401


def test_the_dashboard_can_be_left_out() -> None:
    client = TestClient(create_app(None, ServeConfig(dashboard=False)))
    assert client.get("/").status_code == 404
    assert client.get("/static/dashboard.js").status_code == 404


def test_static_files_stay_in_their_folder() -> None:
    client = TestClient(create_app(None, ServeConfig()))
    for path in ("../app.py", "%2e%2e/app.py", "..%2fapp.py", "%2fetc%2fpasswd", ""):
        assert client.get(f"/static/{path}").status_code == 404, path


# -- in a browser ------------------------------------------------------------------------------


def served_backend() -> LocalBackend:
    """A tiny model whose own difficulties fall into all three tiers, with a calibration."""
    texts = ["one and two", "two and three", "sort 312 -> 123", "four"]
    tokenizer = train_tokenizer(texts * 4, 300)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
    model = tiny_model(tiny_config(vocab_size=len(tokenizer), eos_token_id=None, **ids), seed=1)
    engine = Engine(model, tokenizer, max_queue=64)
    asked = SamplingParams(max_tokens=1, temperature=0.0)
    found = sorted(out.telemetry.difficulty or 0.0 for out in engine.generate(PROMPTS, asked))
    cuts = [found[len(found) // 3], found[2 * len(found) // 3]]
    curves = tuple(((0.0, 1.0), (0.6 + 0.1 * tier, 0.1 + 0.2 * tier)) for tier in range(3))
    engine.set_tier_map(
        replace(
            thresholds(model, *cuts),
            calibration=curves,
            statistics={"difficulty_histogram": [1] * 20},
        )
    )
    backend = LocalBackend(engine, "tiny")
    backend.info = replace(backend.info, report=REPORT)
    return backend


PROMPTS = [
    f"{'one two three four '[: 4 + 3 * length]}{digit}" for length in range(5) for digit in range(6)
]


@contextmanager
def serving(config: ServeConfig) -> Iterator[str]:
    """The address of a running server with some requests behind it."""
    app = create_app(served_backend(), config)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.05)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        address = f"http://{host}:{port}"
        headers = {"authorization": f"Bearer {KEY}"} if config.api_keys else {}
        with httpx.Client(base_url=address, headers=headers, timeout=60) as client:
            for number, prompt in enumerate(PROMPTS):
                body = {"prompt": prompt, "max_tokens": 4}
                if number % 10 == 0:
                    body["dvpa"] = {"tier": "top"}
                client.post("/v1/completions", json=body).raise_for_status()
            assert client.post("/v1/completions", json={"prompt": ""}).status_code == 400
        yield address
    finally:
        server.should_exit = True
        thread.join(30)


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
