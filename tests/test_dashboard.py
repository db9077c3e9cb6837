"""The dashboard: what its files may hold, and how they are served."""

import hashlib
import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser

import pytest
from dashboard_world import KEY, contrast
from fastapi.testclient import TestClient

from dvpa.server.app import STATIC, create_app
from dvpa.server.config import ServeConfig

CHART_JS = "chart.umd.js"
CHART_JS_SHA256 = "87364cc2b2a76a6684929e7d6b80b18a897794db38400caff1fcf1791c6925d2"
OURS = {path.name: path.read_text(encoding="utf-8") for path in STATIC.iterdir()}
OURS = {name: text for name, text in OURS.items() if not name.startswith("chart.")}
SCRIPTS = {name: text for name, text in OURS.items() if name.endswith(".js")}
HTML, CSS = OURS["index.html"], OURS["dashboard.css"]


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
