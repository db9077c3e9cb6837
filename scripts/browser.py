"""Headless Chromium driven over its debugging pipe; nothing to install but Chromium itself.

A page knows what went wrong in it (`problems`: exceptions, console errors, refused by the content
security policy) and every address it has asked for (`requested`).
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT_S = 60.0  # for an answer; a busy machine is slow to start a browser
KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowRight": 39}


def find_chromium() -> str | None:
    """Where Chromium is, if it is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A Chromium of its own, with its profile in `folder`; ends with the `with` block."""

    def __init__(self, binary: str, folder: Path) -> None:
        child_in, self._out = os.pipe()
        self._in, child_out = os.pipe()
        command = [
            *(binary, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage"),
            *("--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"),
        ]

        def connect() -> None:
            # By way of high numbers, so that neither overwrites the other.
            low, high = os.dup2(child_in, 60), os.dup2(child_out, 61)
            os.dup2(low, 3)
            os.dup2(high, 4)

        self._log = (folder / "chromium.log").open("wb")
        self._process = subprocess.Popen(
            command, close_fds=False, preexec_fn=connect, stdout=self._log, stderr=self._log
        )
        os.close(child_in)
        os.close(child_out)
        self._buffer = b""
        self._last_id = 0
        self.pages: dict[str, Page] = {}

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError, RuntimeError, TimeoutError):
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._log.close()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of one command; events meanwhile go to their pages.

        Raises:
            RuntimeError: the browser refuses the command, or has ended.
            TimeoutError: it does not answer.
        """
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            answer = self._read(deadline)
            if answer is None:
                raise TimeoutError(f"Chromium does not answer {method}")
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._take(answer)

    def pump(self, seconds: float) -> None:
        """Let the pages live on for a while."""
        deadline = time.monotonic() + seconds
        while (event := self._read(deadline)) is not None:
            self._take(event)

    def page(self, width: int, height: int, scheme: str = "light") -> "Page":
        """An empty page of that size; scheme: "light" or "dark"."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session, width, height)
        page.prefer(scheme)
        return page

    def _read(self, deadline: float) -> dict[str, Any] | None:
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                return None
            data = os.read(self._in, 1 << 20)
            if not data:
                raise RuntimeError("Chromium has ended")
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        event: dict[str, Any] = json.loads(message)
        return event

    def _take(self, event: dict[str, Any]) -> None:
        page = self.pages.get(event.get("sessionId", ""))
        if page is not None:
            page.take(event["method"], event["params"])


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str, width: int, height: int) -> None:
        self.browser = browser
        self._session = session
        self._width, self._height = width, height
        self.problems: list[str] = []
        self.requested: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self._resize(width, height)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the debugging protocol."""
        return self.browser.call(method, self._session, **params)

    def take(self, method: str, params: dict[str, Any]) -> None:
        """Note an event."""
        if method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            thrown = details.get("exception", {}).get("description", details["text"])
            self.problems.append(f"exception: {thrown}")
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(f"console: {[a.get('value') for a in params['args']]}")
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            entry = params["entry"]
            self.problems.append(f"{entry['source']}: {entry['text']} {entry.get('url', '')}")

    def prefer(self, scheme: str, motion: str = "no-preference") -> None:
        """Appear "light" or "dark"."""
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)

    def open(self, address: str) -> None:
        """Go to an address."""
        self.call("Page.navigate", url=address)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression.

        Raises:
            RuntimeError: it throws.
        """
        done = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in done:
            raise RuntimeError(str(done["exceptionDetails"].get("exception", {})))
        return done["result"].get("value")

    def wait_for(self, expression: str, seconds: float = TIMEOUT_S) -> None:
        """Until an expression is true.

        Raises:
            TimeoutError: it does not become true.
        """
        deadline = time.monotonic() + seconds
        while not self.run(expression):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true after {seconds} s: {expression}; {self.problems}")
            self.browser.pump(0.1)

    def press(self, key: str) -> None:
        """One key, as the keyboard would."""
        code = {"key": key, "code": {" ": "Space"}.get(key, key)}
        code |= {"windowsVirtualKeyCode": KEYS[key]}
        text = {"Enter": "\r", " ": " "}.get(key)
        more = {} if text is None else {"text": text}
        self.call("Input.dispatchKeyEvent", type="keyDown", **code, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """A PNG of the whole page, in a window as high as it is."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        self._resize(self._width, int(size["height"]))
        self.browser.pump(0.5)  # charts follow
        shot = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))
        self._resize(self._width, self._height)

    def _resize(self, width: int, height: int) -> None:
        is_phone = width < 500
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if is_phone else 1,
            mobile=is_phone,
        )

    def close(self) -> None:
        """Shut the tab."""
        del self.browser.pages[self._session]
        self.call("Page.close")
