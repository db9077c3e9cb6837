"""Screenshots of the dashboard over a checkpoint of the demo under load: docs/images/dashboard-*.

Serves the checkpoint, sends it graded tasks for two minutes and a half, some with a tier of their
own, tries a prompt in the page, and takes pictures at desktop and phone width, light and dark.
Needs Chromium.

    python scripts/dashboard_screenshots.py runs/demo/checkpoint
"""

import argparse
import asyncio
import math
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from browser import Browser, Page, find_chromium
from server_load import HOST, ROOT, Server, post

from dvpa.tasks import GradedTasks

OUT = ROOT / "docs" / "images"
VIEWS = ((1280, "light"), (1280, "dark"), (375, "light"), (375, "dark"))
TASKS = GradedTasks(  # as train/nano.yaml asks them
    num_facts=4000,
    filler=0.7,
    recall_share=[0.15, 0.3, 0.75, 0.8],
    level_weights=[1.0, 1.0, 1.25, 1.25, 0.3],
)
ENGINE = {"read_prompt": "base"}  # what the demo's tier map is calibrated for


def main() -> int:
    """Exit code 2 without Chromium or checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder with tokenizer")
    parser.add_argument("--out", type=Path, default=OUT, help="default: docs/images")
    parser.add_argument("--name", default="nano", help="the model's name (default: nano)")
    parser.add_argument(
        "--seconds", type=float, default=150.0, help="of load before (default: 150)"
    )
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second (default: 4)")
    arguments = parser.parse_args()
    binary = find_chromium()
    if binary is None or not (arguments.checkpoint / "config.json").is_file():
        missing = "Chromium" if binary is None else f"{arguments.checkpoint}/config.json"
        print(f"there is no {missing}", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(
            arguments.checkpoint, Path(folder), model_name=arguments.name, engine=ENGINE
        )
        server.start()
        stop = threading.Event()
        load = threading.Thread(
            target=lambda: asyncio.run(send_tasks(server.port, arguments.rate, stop))
        )
        load.start()
        try:
            time.sleep(arguments.seconds)
            question = asyncio.run(middling_question(server.port))
            with Browser(binary, Path(folder)) as browser:
                for width, scheme in VIEWS:
                    page = browser.page(width, 900, scheme)
                    path = arguments.out / f"dashboard-{width}-{scheme}.png"
                    take(page, server.port, question, path)
        finally:
            stop.set()
            load.join()
            server.stop()
    return 0


async def send_tasks(port: int, rate: float, stop: threading.Event) -> None:
    """Tasks of the test split, more and fewer in turns, until told to stop."""
    questions = [task.question for task in TASKS.sample("test", 1500)]
    running: set[asyncio.Task[Any]] = set()
    number, start = 0, time.monotonic()
    while not stop.is_set():
        body: dict[str, Any] = {
            "prompt": questions[number % len(questions)],
            "max_tokens": 24,
            "temperature": 0.0,
            "stream": True,
        }
        if number % 19 == 7:
            body["dvpa"] = {"tier": "top"}
        elif number % 23 == 11:
            body["dvpa"] = {"max_tier": 1}
        task = asyncio.ensure_future(post(port, "/v1/completions", body))
        running.add(task)
        task.add_done_callback(running.discard)
        number += 1
        wave = 1.0 + 0.6 * math.sin((time.monotonic() - start) / 12.0)
        await asyncio.sleep(1.0 / (rate * wave))
    await asyncio.gather(*running)


async def middling_question(port: int) -> str:
    """A question that the tier map finds neither easy nor hard."""
    asked: list[tuple[float, str]] = []
    for task in TASKS.sample("test", 40, seed=1):
        answer = await post(port, "/v1/dvpa/route", {"prompt": task.question})
        asked.append((abs(answer.json()["difficulty"] - 0.45), task.question))
    return min(asked)[1]


def take(page: Page, port: int, question: str, path: Path) -> None:
    """Try a prompt, then take the picture.

    Raises:
        RuntimeError: something went wrong in the page.
    """
    page.open(f"http://{HOST}:{port}/")
    page.wait_for("document.querySelectorAll('#decision-rows th').length > 20")
    page.run("document.getElementById('prompt').focus()")
    page.type(question)
    page.run("document.getElementById('generate').click()")
    page.wait_for("document.querySelectorAll('#answer-facts dd').length === 8")
    page.run("document.activeElement.blur()")
    page.browser.pump(2.5)  # one more poll
    page.screenshot(path)
    if page.problems:
        raise RuntimeError("; ".join(page.problems))
    page.close()
    print(path)


if __name__ == "__main__":
    sys.exit(main())
